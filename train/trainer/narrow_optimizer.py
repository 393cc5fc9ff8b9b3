"""What optimizers of 16-bit weights share: a loop over weights, and states that keep their types."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NarrowOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose states have other types than the weights, and may be on another device."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for weight in group["params"]:
                number += 1
                if weight.grad is not None:
                    self.update(weight, group, number)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states as they were saved; the inherited method would convert them to the weights' type."""
        super().load_state_dict({**state_dict, "state": {}})
        ids = [one for group in state_dict["param_groups"] for one in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for one, weight in zip(ids, weights, strict=True):
            for name, value in state_dict["state"].get(one, {}).items():
                device = value.device if name == "step" else self.device_of_states(weight)
                self.state[weight][name] = value.to(device, copy=True)

    @abstractmethod
    def update(self, weight: Tensor, group: dict[str, Any], number: int) -> None:
        """Update one weight.

        Args:
            group: its options.
            number: its position among all weights, from 1.
        """

    @abstractmethod
    def device_of_states(self, weight: Tensor) -> torch.device:
        """Return where the states of a weight are."""
