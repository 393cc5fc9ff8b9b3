"""Lay out one rank's labelled rows of an update in micro-batches, and copy them to the device in one transfer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.scoring.sequences import FILLER, Sequences
from offline_kto.kto_core.scoring.transfer import in_transfers, to_device
from offline_kto.train.data.cache_rows import TrainingRow
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.prepared_policy import PreparedPolicy


class RowFacts(NamedTuple):
    """What a loss needs to know of rows beside their scores.

    Attributes:
        masses: desirable and undesirable mass, float64, shape (rows, 2).
        tokens: of each completion, float64, shape (rows,).
    """

    masses: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, rows: Sequence[TrainingRow]) -> "RowFacts":
        tokens = torch.tensor([len(row.matched.completion_ids) for row in rows], dtype=torch.float64)
        return cls(torch.tensor([row.masses for row in rows], dtype=torch.float64).view(-1, 2), tokens)


class MicroBatch(NamedTuple):
    """The rows of one forward and backward pass.

    Attributes:
        part: their positions among the rank's rows; empty for a pass that only other ranks need.
        batch: the model's input.
        where: `part` as a tensor, int64, shape (rows,).
        reference: `Objective.reference_values` of the rows, one after the other.
        facts: of the rows.
    """

    part: tuple[int, ...]
    batch: Sequences
    where: Tensor
    reference: Tensor
    facts: RowFacts


class UpdateInputs:
    """One rank's rows of an update.

    Args:
        rows: of this rank.
        parts: positions into `rows` for each micro-batch; an empty part is a pass without rows.
        share: whether rows of a micro-batch share prompts.

    Attributes:
        facts: of all rows, on the device.
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        parts: Sequence[Sequence[int]],
        *,
        policy: PreparedPolicy,
        objective: Objective,
        share: bool = False,
    ) -> None:
        self._rows, self._policy, self._objective, self._share = rows, policy, objective, share
        groups = [*in_transfers(parts, lambda part: sum(len(rows[j].matched) for j in part), policy.device)]
        first, self._later = groups[0] if groups else [], groups[1:]
        self.facts, self._first = to_device((RowFacts.of(rows), self._laid_out(first)), policy.device)

    def micro_batches(self) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield the micro-batches, on the device, and whether each is the last."""
        groups, device = len(self._later), self._policy.device
        for number, group in enumerate([None, *self._later]):
            on_device = self._first if group is None else to_device(self._laid_out(group), device)
            for micro_batch in on_device:
                yield micro_batch, number == groups and micro_batch is on_device[-1]

    def _laid_out(self, parts: Sequence[Sequence[int]]) -> list[MicroBatch]:
        return [self._micro_batch([self._rows[j] for j in part], part) for part in parts]

    def _micro_batch(self, rows: Sequence[TrainingRow], part: Sequence[int]) -> MicroBatch:
        reference = [self._objective.reference_values(row.matched) for row in rows]
        return MicroBatch(
            part=tuple(part),
            batch=self._policy.lay_out([row.matched.ids for row in rows] or [FILLER], share=self._share),
            where=torch.tensor(part, dtype=torch.int64),
            reference=torch.from_numpy(np.concatenate([np.empty(0), *reference])),
            facts=RowFacts.of(rows),
        )
