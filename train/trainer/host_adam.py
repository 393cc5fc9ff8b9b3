"""Train with float32 weights and AdamW moments on the host: the device holds 16-bit weights and gradients only.

In each update, gradients move to the host, and the rounded weights back. Nothing is lost by rounding, because the
float32 weights remember it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from offline_kto.train.trainer.narrow_optimizer import NarrowOptimizer


class HostAdamW(NarrowOptimizer):
    """AdamW on the host.

    Args:
        params: weights, or groups of them with their own options.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, weight: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        if not state:
            state.update(_new_state(weight))
        assert weight.grad is not None
        beta1, beta2 = group["betas"]
        adamw(
            [state["weight"]],
            [weight.grad.to("cpu", torch.float32)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weight.copy_(state["weight"])

    def device_of_states(self, weight: Tensor) -> torch.device:
        return torch.device("cpu")


def _new_state(weight: Tensor) -> dict[str, Tensor]:
    kept = weight.detach().to("cpu", torch.float32, copy=True)
    return {
        "step": torch.tensor(0.0),
        "weight": kept,
        "exp_avg": torch.zeros_like(kept),
        "exp_avg_sq": torch.zeros_like(kept),
    }
