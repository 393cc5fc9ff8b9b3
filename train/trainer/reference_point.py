"""Compute the point that a loss measures the rows of a batch from: z0 of KTO, the reward shift of BCO, or 0.

z0 is the mean log-ratio of the mismatched rows of the whole batch, weighted by the rows' masses. Every rank scores its
share of the rows and the sums are added over ranks, so that all ranks use the same z0. The formula is
`kl_reference_point` in `kto_core/losses/preference_losses.py`; `evaluation.py` estimates z0 over held-out rows in the same
way. `loss_traits.py` lists the point of each loss.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import transformers
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from offline_kto.kto_core.losses.metrics import Tokens
from offline_kto.kto_core.losses.preference_losses import kl_reference_point
from offline_kto.train.data.cache_rows import TrainingRow
from offline_kto.train.trainer.policy_scores import PolicyScores


class ReferencePoint(NamedTuple):
    """The point that a loss measures the rows of one batch from.

    Attributes:
        point: nats, scalar, the same on all ranks.
        metrics: scalars to log, the same on all ranks.
        tokens: tokens of this rank's passes that computed it.
    """

    point: Tensor
    metrics: dict[str, Tensor]
    tokens: Tokens


class RunningShift(transformers.TrainerCallback, ExportableState):
    """BCO's reward shift on the scale of log-ratios: their mean over all batches so far, including the last one.

    It is a callback because the Trainer saves the state of callbacks in checkpoints.
    """

    def __init__(self, total: float = 0.0, batches: int = 0) -> None:
        self.total: Tensor | float = total
        self.batches = batches

    def begin_at(self, total: float, batches: int) -> None:
        """Continue from a sum over batches, nats."""
        self.total, self.batches = total, batches

    def load(self, checkpoint: Path) -> None:
        """Load the sum from a checkpoint."""
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        self.begin_at(**state["stateful_callbacks"][type(self).__name__]["args"])

    def after(self, batch_mean: Tensor) -> Tensor:
        """Add a batch and return the new mean; nats, scalar."""
        self.total, self.batches = self.total + batch_mean, self.batches + 1
        return self.total / self.batches

    @property
    def mean(self) -> float:
        """Mean over the batches so far, nats; 0 before the first."""
        return float(self.total) / max(1, self.batches)

    def state(self) -> dict[str, object]:
        return {"args": {"total": float(self.total), "batches": self.batches}, "attributes": {}}


def reference_point(scores: PolicyScores, rows: Sequence[TrainingRow], shift: RunningShift | None) -> ReferencePoint:
    """Return the point that the loss measures this batch's rows from; called on every rank.

    Args:
        scores: of the current policy.
        rows: the whole batch, of all ranks.
        shift: updated with this batch if the loss has one.
    """
    objective, masses = scores.objective, [row.masses.total for row in rows]
    if objective.traits.needs_mismatched:
        logratio_sum, tokens = scores.logratio_sum([row.mismatched for row in rows], masses)
        kl, kl_raw = kl_reference_point(logratio_sum, sum(masses))
        return ReferencePoint(kl, {"kl": kl, "kl_raw": kl_raw}, tokens)
    if shift is not None:
        logratio_sum, tokens = scores.logratio_sum([row.matched for row in rows], masses)
        point = shift.after(logratio_sum / sum(masses))
        return ReferencePoint(point, {"reward_shift": objective.beta * point}, tokens)
    return ReferencePoint(scores.policy.zero(), {}, Tokens(0, 0, 0))
