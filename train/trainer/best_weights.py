"""Keep a copy of the weights of the best evaluation in host memory, for runs without checkpoints."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offline_kto.kto_core.library_types import Model
from offline_kto.train.trainer.reference_point import RunningShift


@dataclass(frozen=True)
class BestWeights:
    """The trained weights after an update.

    Attributes:
        step: that update.
        weights: by name, on the host.
        shift: sum and batches of BCO's running mean; None for other losses.
    """

    step: int
    weights: dict[str, Tensor]
    shift: tuple[float, int] | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, step: int, shift: RunningShift | None) -> "BestWeights":
        """Copy the weights that training changes."""
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return cls(
            step,
            {name: weight.detach().to("cpu", copy=True) for name, weight in trained.items()},
            None if shift is None else (float(shift.total), shift.batches),
        )

    @torch.no_grad()
    def restore(self, model: Model, shift: RunningShift | None) -> None:
        """Write the weights back into the model."""
        for name, weight in model.named_parameters():
            if name in self.weights:
                weight.copy_(self.weights[name])
        if shift is not None and self.shift is not None:
            shift.begin_at(*self.shift)
