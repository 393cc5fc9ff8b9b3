"""Train 16-bit weights with AdamW: 2 bytes a weight, 2 a gradient and 2 for both moments.

An update of 1e-6 on a weight of 1e-2 is below half a unit in the last place of bfloat16, and rounding to the nearest
would lose it. Here the update is computed in float32 and rounded up or down at random, with the probability that
keeps the mean: after many updates the weight is where float32 would have brought it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from offline_kto.train.trainer.eight_bit_moments import FIRST, SECOND, block_of, decode, encode
from offline_kto.train.trainer.narrow_optimizer import NarrowOptimizer
from offline_kto.train.trainer.sharding import like_weight, local_part

# Values whose update is computed at a time: bounds the float32 temporaries.
_CHUNK = {"cpu": 2**20}
_CHUNK_ACCELERATOR = 2**24

_MASK = 2**63 - 1


class LeanAdamW(NarrowOptimizer):
    """AdamW with 8-bit moments and stochastically rounded 16-bit weights; float32 weights are updated as usual.

    Matrices get 8-bit moments; vectors (norms, biases), which are few, get float32 ones. The random numbers depend on
    seed, update and weight alone: a resumed run makes those of an uninterrupted one, and all replicas of a weight make
    the same.

    Args:
        params: weights, or groups of them with their own options.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        seed: of the rounding.
        rank: of this process, if it has its own part of each weight; else 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed, self._rank = seed, rank
        self._generators: dict[torch.device, torch.Generator] = {}

    def update(self, weight: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        if not state:
            state.update(_new_state(weight))
        state["step"] += 1
        moments = {name: local_part(value) for name, value in state.items() if name != "step"}
        part, gradient = local_part(weight.detach()), local_part(weight.grad)  # type: ignore[arg-type]
        if not part.numel():
            return
        block = block_of(part.shape)
        width = block or part.shape[-1] if part.ndim else 1
        views = {name: value.view(-1, 1 if name.endswith("scale") else width) for name, value in moments.items()}
        target, gradient = part.view(-1, width), gradient.reshape(-1, width)
        random = self._generator(part.device, int(state["step"]), number)
        rows = max(1, _CHUNK.get(part.device.type, _CHUNK_ACCELERATOR) // width)
        for start in range(0, len(target), rows):
            chunk = slice(start, start + rows)
            _update_chunk(
                target[chunk],
                gradient[chunk],
                {name: view[chunk] for name, view in views.items()},
                group,
                float(state["step"]),
                random,
            )

    def device_of_states(self, weight: Tensor) -> torch.device:
        return weight.device

    def _generator(self, device: torch.device, step: int, number: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        seed = self._seed
        for one in (step, number, self._rank):
            seed = (seed * 6364136223846793005 + one * 1442695040888963407 + 1) & _MASK
        return self._generators[device].manual_seed(seed)


def _new_state(weight: Tensor) -> dict[str, Tensor]:
    part = local_part(weight.detach())
    block = block_of(part.shape)
    state = {"step": torch.tensor(0.0)}
    for name, form in (("exp_avg", FIRST), ("exp_avg_sq", SECOND)):
        kind = torch.float32 if block is None else form.dtype
        state[name] = like_weight(torch.zeros_like(part, dtype=kind), weight)
        if block is not None:
            scales = part.new_zeros((*part.shape[:-1], part.shape[-1] // block), dtype=torch.float32)
            state[f"{name}_scale"] = like_weight(scales, weight)
    return state


def _update_chunk(
    weight: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    group: dict[str, Any],
    step: float,
    random: torch.Generator,
) -> None:
    """Update some rows of a weight and of its moments, in place."""
    (beta1, beta2), rounds = group["betas"], weight.dtype == torch.bfloat16
    narrow = "exp_avg_scale" in moments
    gradient = gradient.float()
    if narrow:
        first = decode(moments["exp_avg"], moments["exp_avg_scale"], FIRST)
        second = decode(moments["exp_avg_sq"], moments["exp_avg_sq_scale"], SECOND)
    else:
        first, second = moments["exp_avg"], moments["exp_avg_sq"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    size = float(group["lr"]) / (1 - beta1**step)
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    value = weight.float() if rounds else weight
    value.mul_(1 - float(group["lr"]) * group["weight_decay"])
    value.addcdiv_(first, denominator, value=-size)
    if not (rounds or narrow):
        return
    # 16 bits round the weight, the other 16 its second moment.
    bits = torch.empty(weight.shape, dtype=torch.int32, device=weight.device).random_(-(2**31), None, generator=random)
    if rounds:
        weight.copy_(round_stochastically(value, bits))
    if narrow:
        for name, form, values, noise in (
            ("exp_avg", FIRST, first, None),
            ("exp_avg_sq", SECOND, second, (bits >> 16).add_(2**15).float().div_(2**16)),
        ):
            codes, scale = encode(values, form, noise)
            moments[name].copy_(codes)
            moments[f"{name}_scale"].copy_(scale)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16 up or down, with the probability that keeps the mean.

    bfloat16 is the upper half of float32: adding a random number to the lower half carries into the upper one with
    the probability of the lower half's share.

    Args:
        bits: int32, of the same shape; the lower 16 bits are random.
    """
    sums = (values.view(torch.int32) + (bits & 0xFFFF)).bitwise_and_(-0x10000)
    return sums.view(torch.float32).to(torch.bfloat16)
