"""Train 16-bit weights with AdamW: 2 bytes a weight, 2 a gradient and 2 for both moments.

An update of 1e-6 on a weight of 1e-2 is below half a unit in the last place of bfloat16, and rounding to the nearest
would lose it. Here the update is computed in float32 and rounded up or down at random, with the probability that
keeps the mean: after many updates the weight is where float32 would have brought it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from offline_kto.kto_core.errors import TrainingError, in_one_line
from offline_kto.train.trainer.eight_bit_moments import FIRST, SECOND, block_of, decode, encode
from offline_kto.train.trainer.narrow_optimizer import NarrowOptimizer
from offline_kto.train.trainer.sharding import like_weight, local_part

# Values whose update is computed at a time: bounds the float32 temporaries.
_CHUNK = {"cpu": 2**20}
_CHUNK_ACCELERATOR = 2**24

# Rounding at random adds noise to the second moment, more for a smaller code, whose neighbours are further away. The mean of
# 1 / sqrt(v) is then larger than that of an exact v, by this / code after many updates of noisy gradients: a learning rate
# that is 1 to 2 % too high. The number is from a simulation, which tests/test_lean_adam.py repeats.
_NOISE = 1.95

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
        self._last: tuple[Any, Tensor] = (None, torch.empty(0))

    def update(self, weight: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        if not state:
            state.update(_new_state(weight))
        state["step"] += 1
        step = int(state["step"])
        states = {name: local_part(value) for name, value in state.items() if name != "step"}
        part, gradient = local_part(weight.detach()), local_part(weight.grad)  # type: ignore[arg-type]
        if not part.numel():
            return
        numbers = self._numbers(group, step, part.device)
        random = self._generator(part.device, step, number)
        block = block_of(part)
        if block is None:
            _update_vector(part, gradient, states["exp_avg"], states["exp_avg_sq"], numbers, random)
            return
        names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        views = [states[name].view(-1, 1 if name.endswith("scale") else block) for name in names]
        views = [part.view(-1, block), gradient.reshape(-1, block), *views]
        blocks = max(1, _CHUNK.get(part.device.type, _CHUNK_ACCELERATOR) // block)
        update = compiled_update(part.device)
        for start in range(0, len(views[0]), blocks):
            chunk = [view[start : start + blocks] for view in views]
            update(*chunk, _random_bits(chunk[0], random), numbers)

    def device_of_states(self, weight: Tensor) -> torch.device:
        return weight.device

    def _numbers(self, group: dict[str, Any], step: int, device: torch.device) -> Tensor:
        """Return an update's numbers on the device: as Python numbers they would be compiled into the code."""
        (beta1, beta2), rate = group["betas"], float(group["lr"])
        numbers = (
            1 - rate * group["weight_decay"],
            1 - beta1,
            beta2,
            1 - beta2,
            rate / (1 - beta1**step),
            (1 - beta2**step) ** 0.5,
            group["eps"],
            _NOISE * (1 - beta2 ** (4 * step)),
        )
        if self._last[0] != (numbers, device):
            self._last = (numbers, device), torch.tensor(numbers, dtype=torch.float32, device=device)
        return self._last[1]

    def _generator(self, device: torch.device, step: int, number: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        seed = self._seed
        for one in (step, number, self._rank):
            seed = (seed * 6364136223846793005 + one * 1442695040888963407 + 1) & _MASK
        return self._generators[device].manual_seed(seed)


def _new_state(weight: Tensor) -> dict[str, Tensor]:
    part = local_part(weight.detach())
    block = block_of(part)
    state = {"step": torch.tensor(0.0)}
    for name, form in (("exp_avg", FIRST), ("exp_avg_sq", SECOND)):
        kind = torch.float32 if block is None else form.dtype
        state[name] = like_weight(torch.zeros_like(part, dtype=kind), weight)
        if block is not None:
            scales = part.new_zeros((*part.shape[:-1], part.shape[-1] // block), dtype=torch.float32)
            state[f"{name}_scale"] = like_weight(scales, weight)
    return state


def _random_bits(like: Tensor, random: torch.Generator) -> Tensor:
    bits = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    return bits.random_(-(2**31), None, generator=random)


def _moved(weight: Tensor, first: Tensor, second: Tensor, numbers: Tensor) -> Tensor:
    """Return updated weights in float32."""
    decay, _, _, _, size, correction, eps, _ = numbers.unbind()
    return weight.float() * decay - size * first / (second.sqrt() / correction + eps)


def _update_vector(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor, random: torch.Generator
) -> None:
    """Update a weight with float32 moments, in place."""
    _, gain1, beta2, gain2, *_ = numbers.unbind()
    gradient = gradient.float()
    first.add_((gradient - first) * gain1)
    second.mul_(beta2).add_(gradient.square() * gain2)
    value = _moved(weight, first, second, numbers)
    rounds = weight.dtype == torch.bfloat16
    weight.copy_(round_stochastically(value, _random_bits(weight, random)) if rounds else value)


def update_blocks(
    weight: Tensor,
    gradient: Tensor,
    first_codes: Tensor,
    first_scale: Tensor,
    second_codes: Tensor,
    second_scale: Tensor,
    bits: Tensor,
    numbers: Tensor,
) -> None:
    """Update some blocks of a weight and their 8-bit moments, in place.

    Args:
        weight, gradient, first_codes, second_codes: shape (blocks, block).
        first_scale, second_scale: float32, shape (blocks, 1).
        bits: random, int32, shape (blocks, block): 16 round the weight, the other 16 its second moment.
        numbers: float32, from `LeanAdamW`.
    """
    _, gain1, beta2, gain2, *_ = numbers.unbind()
    gradient = gradient.float()
    first = decode(first_codes, first_scale, FIRST)
    first = first + (gradient - first) * gain1
    second = decode(second_codes, second_scale, SECOND) * beta2 + gradient.square() * gain2
    first_corrected = first / (1 + numbers[-1] / second_codes.float().clamp(min=1))
    value = _moved(weight, first_corrected, second, numbers)
    weight.copy_(round_stochastically(value, bits) if weight.dtype == torch.bfloat16 else value)
    noise = ((bits >> 16) + 2**15).float() / 2**16
    for codes, scale, found in (
        (first_codes, first_scale, encode(first, FIRST, None)),
        (second_codes, second_scale, encode(second, SECOND, noise)),
    ):
        codes.copy_(found[0])
        scale.copy_(found[1])


@functools.cache
def _compiled() -> Callable[..., None]:
    update: Callable[..., None] = torch.compile(update_blocks, dynamic=True, fullgraph=True)

    def explained(*arguments: Tensor) -> None:
        try:
            update(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise TrainingError(
                "--memory lean: torch.compile cannot build the optimizer's kernel, for which it needs Triton and a C compiler "
                f"({in_one_line(error)}). Install gcc, or set TORCH_COMPILE_DISABLE=1: updates then take longer."
            ) from error

    return explained


def compiled_update(device: torch.device) -> Callable[..., None]:
    """Return `update_blocks` as one kernel on a GPU: there, its forty operations would each go through memory."""
    return _compiled() if device.type == "cuda" else update_blocks


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16 up or down, with the probability that keeps the mean.

    bfloat16 is the upper half of float32: adding a random number to the lower half carries into the upper one with
    the probability of the lower half's share.

    Args:
        bits: int32, of the same shape; the lower 16 bits are random.
    """
    sums = (values.view(torch.int32) + (bits & 0xFFFF)).bitwise_and_(-0x10000)
    # A GPU's NaN has all bits set: the carry would turn it into a zero, which no check would find.
    return torch.where(values.isnan(), values, sums.view(torch.float32)).to(torch.bfloat16)
