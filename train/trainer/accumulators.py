"""Accumulate metrics and log-ratios on the device between two logs, and copy them to the host once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_kto.kto_core.losses.metrics import BatchOutcome, metrics_from, tokens_of
from offline_kto.train.trainer.ranks import Ranks
from offline_kto.train.trainer.reference_point import ReferencePoint

_ROWS = "row_logratios.safetensors"

# Updates whose log-ratios wait on the device for one transfer to the host.
_MOST_WAITING = 256


@dataclass
class Window:
    """Sums of the updates since the last log."""

    sums: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None
    updates: int = 0
    started: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Measure the time from now on, unless there are updates already."""
        if not self.updates:
            self.started = time.monotonic()

    def add(self, outcome: BatchOutcome, reference: ReferencePoint, aux_loss: Tensor | None) -> None:
        """Add one update of this rank."""
        sums = outcome.sums()
        self.sums = sums if self.sums is None else self.sums + sums
        for name, value in reference.metrics.items():
            self.shared[name] = self.shared[name] + value if name in self.shared else value
        if aux_loss is not None:
            self.aux_loss = aux_loss if self.aux_loss is None else self.aux_loss + aux_loss
        self.updates += 1

    def metrics(self, ranks: Ranks, *, beta: float) -> dict[str, float]:
        """Return means over all ranks and updates, of which there is at least one; called on every rank."""
        assert self.sums is not None
        size = len(self.sums)
        summed = self.sums if self.aux_loss is None else torch.cat([self.sums, self.aux_loss[None]])
        # All values are read from the device at once.
        values = torch.cat([ranks.sum(summed), *(one[None] for one in self.shared.values())]).cpu()
        sums, others = values[:size], (values[size:] / self.updates).tolist()
        metrics = metrics_from(sums, beta=beta)
        if self.aux_loss is not None:
            metrics["aux_loss"] = others.pop(0)
        metrics.update(zip(self.shared, others, strict=True))
        metrics["tokens_per_second"] = tokens_of(sums) / (time.monotonic() - self.started)
        return metrics


class RowLogratios:
    """The latest log-ratio of each training row on this rank, for the report's histogram of rewards."""

    def __init__(self, rows: int) -> None:
        self.logratios = np.zeros(rows, dtype=np.float32)
        self.steps = np.full(rows, -1, dtype=np.int32)  # update in which the row was last seen
        self._waiting: list[tuple[Sequence[int], Tensor, int]] = []

    def add(self, rows: Sequence[int], logratios: Tensor, step: int) -> None:
        """Record the log-ratios of one update, nats, shape (rows,); they are copied to the host from time to time."""
        if len(self._waiting) >= _MOST_WAITING:
            self._settle()
        self._waiting.append((rows, logratios.detach(), step))

    def _settle(self) -> None:
        """Copy the recorded values from the device to the host, in one transfer."""
        if not self._waiting:
            return
        values = torch.cat([logratios for _, logratios, _ in self._waiting]).float().cpu().numpy()
        indices = np.concatenate([np.asarray(rows, dtype=np.int64) for rows, _, _ in self._waiting])
        self.logratios[indices] = values
        self.steps[indices] = np.concatenate([np.full(len(rows), step) for rows, _, step in self._waiting])
        self._waiting = []

    def over_ranks(self, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
        """Return step and latest log-ratio of every row over all ranks; step -1 means never. Called on every rank."""
        self._settle()
        steps, logratios = ranks.gather(torch.from_numpy(self.steps)), ranks.gather(torch.from_numpy(self.logratios))
        last = steps.argmax(0)[None]
        return steps.gather(0, last)[0].numpy(), logratios.gather(0, last)[0].numpy()

    def save(self, checkpoint: Path, ranks: Ranks, *, main: bool) -> None:
        """Write steps and log-ratios into a checkpoint; called on every rank."""
        steps, logratios = self.over_ranks(ranks)
        if main:
            save_file({"steps": torch.from_numpy(steps), "logratios": torch.from_numpy(logratios)}, checkpoint / _ROWS)

    def load(self, checkpoint: Path) -> None:
        """Load steps and log-ratios from a checkpoint; one of an older version has none."""
        if not (checkpoint / _ROWS).exists():
            return
        found = load_file(checkpoint / _ROWS)
        if len(found["steps"]) == len(self.steps):
            self.steps, self.logratios = found["steps"].numpy().astype(np.int32), found["logratios"].numpy()
