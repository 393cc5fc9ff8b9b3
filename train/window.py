"""Metrics between two logs: added up on the device, brought to the host once."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kto_core.metrics import BatchOutcome, metrics_from, tokens_of
from train.ranks import Ranks


@dataclass
class Window:
    """What was added up since the last log."""

    sums: Tensor | None = None
    kl: Tensor | float = 0.0
    kl_raw: Tensor | float = 0.0
    aux_loss: Tensor | float | None = None
    updates: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, outcome: BatchOutcome, kl_raw: Tensor, aux_loss: Tensor | None) -> None:
        """One update of this rank; `kl` and `kl_raw` are the same on all of them."""
        sums = outcome.sums()
        self.sums = sums if self.sums is None else self.sums + sums
        self.kl, self.kl_raw = self.kl + outcome.kl, self.kl_raw + kl_raw
        if aux_loss is not None:
            self.aux_loss = aux_loss + (self.aux_loss or 0.0)
        self.updates += 1

    def metrics(self, ranks: Ranks, *, beta: float) -> dict[str, float]:
        """Means over all ranks and updates, at least one; called on every rank."""
        assert self.sums is not None
        sums = ranks.sum(self.sums)
        metrics = metrics_from(sums, beta=beta)
        metrics["kl"] = float(self.kl) / self.updates
        metrics["kl_raw"] = float(self.kl_raw) / self.updates
        if self.aux_loss is not None:
            metrics["aux_loss"] = float(ranks.sum(torch.as_tensor(self.aux_loss))) / self.updates
        metrics["tokens_per_second"] = tokens_of(sums) / (time.monotonic() - self.started)
        return metrics
