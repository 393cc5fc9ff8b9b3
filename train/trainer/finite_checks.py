"""Stop a run before numbers that are not finite are applied to its weights or saved."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.losses.metrics import BatchOutcome
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.train.data.cache_rows import TrainingRow
from offline_kto.train.model.saved_model import not_finite
from offline_kto.train.trainer.evaluation import Scores
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.sharding import local_part

_CAUSES = (
    "Usual causes: a learning rate that is too high, or damaged weights. Use a lower --learning-rate; --resume "
    "continues from the last checkpoint."
)


def check_losses(rows: Sequence[TrainingRow], outcome: BatchOutcome, *, step: int) -> None:
    """Check the losses of a rank's rows before the update.

    Raises:
        TrainingError: names the rows whose loss is not finite.
    """
    if not bool(outcome.finite.all()):
        _refuse_losses(rows, outcome.finite, step)


def _refuse_losses(rows: Sequence[TrainingRow], finite: Tensor, step: int) -> None:
    bad = [row.row_id for row, good in zip(rows, finite.tolist(), strict=True) if not good]
    raise TrainingError(
        f"Step {step}: the loss is not finite (row_id {_first(bad)}). The run stopped before the update. {_CAUSES}"
    )


class FiniteChecks:
    """Checks that gradients, weights and scores are finite.

    Args:
        policy: the policy to check.
        learning_rate: for messages.

    Attributes:
        last_rows: the last batch; it is named in messages, and scored with the weights before they are saved.
    """

    def __init__(self, policy: PreparedPolicy, *, learning_rate: float) -> None:
        self.policy, self.learning_rate = policy, learning_rate
        self.last_rows: Sequence[TrainingRow] = ()
        self._unread: tuple[Sequence[TrainingRow], Tensor] | None = None

    def add_losses(self, rows: Sequence[TrainingRow], outcome: BatchOutcome, *, step: int) -> None:
        """Check a rank's losses: together with the gradient norm, or at once if the weights are sharded.

        Unsharded ranks have added up their gradients by then, so that a loss that is not finite stops all of them.

        Raises:
            TrainingError: names the rows whose loss is not finite.
        """
        if self.policy.ranks.sharded:
            check_losses(rows, outcome, step=step)
        else:
            self._unread = rows, outcome.finite

    def check_update(self, norm: Tensor | float | None, *, step: int) -> float | None:
        """Check losses and gradient norm before an update; a norm that is not finite would corrupt all weights.

        Everything is read from the device at once: each read stops the host until the device has computed all that is
        queued.

        Args:
            norm: a number, a scalar tensor, or None where there is none.

        Returns:
            The norm as a number.

        Raises:
            TrainingError: they are not finite.
        """
        unread, self._unread = self._unread, None
        if unread is not None and isinstance(norm, Tensor):
            rows, finite = unread
            all_finite, number = torch.stack([finite.all().double(), norm.double()]).tolist()
            if not all_finite:
                _refuse_losses(rows, finite, step)
        else:
            number = None if norm is None else float(norm)
        if number is not None and not math.isfinite(number):
            raise TrainingError(
                f"Step {step}: the gradients are not finite. {self._where_it_broke()} Nothing of this update is saved."
            )
        return number

    def check_weights(
        self, optimizer: torch.optim.Optimizer | None, held_out: Scores | None, *, what: str, step: int
    ) -> None:
        """Check the state before it is saved: every trained weight, and the score of one row; called on every rank.

        Args:
            optimizer: its state is checked as well; None without one.
            held_out: scores of the same weights.
            what: name of what is saved, for the message.
            step: number of the last update.

        Raises:
            TrainingError: a weight, an optimizer's state or a score is not finite.
        """
        found = self._found_here(optimizer, held_out)
        if not self.policy.ranks.any(bool(found)):
            if self._scores_are_finite():
                return
            found = "the trained weights are so large that log-probabilities are not finite"
        raise TrainingError(
            f"Step {step}: {found or 'the weights of another process are not finite'}. {self._where_it_broke()} The {what} "
            "is not saved."
        )

    def _found_here(self, optimizer: torch.optim.Optimizer | None, held_out: Scores | None) -> str:
        """Describe what is not finite on this rank; return an empty string if everything is finite."""
        weights = {name: one for name, one in self.policy.model.named_parameters() if one.requires_grad}
        if bad := not_finite({name: local_part(one) for name, one in weights.items()}):
            return f"{len(bad)} of {len(weights)} trained weights are not finite ({bad[0]}, ...)"
        if states := not_finite(_states_of(optimizer)):
            return f"the optimizer's state is not finite ({states[0]})"
        if held_out is not None and not held_out.logps.isfinite().all():
            return "log-probabilities of held-out rows are not finite"
        return ""

    @torch.no_grad()
    def _scores_are_finite(self) -> bool:
        """Return whether the shortest row of the last batch has a finite score; finite weights can be too large."""
        if not self.last_rows:
            return True
        row = min(self.last_rows, key=lambda row: len(row.matched))
        model = self.policy.scoring_model
        model.eval()
        batch = pad_sequences([row.matched.ids]).to(self.policy.device)
        return not self.policy.ranks.any(not token_logps(model, batch).token_logps.isfinite().all())

    def _where_it_broke(self) -> str:
        ids = [row.row_id for row in self.last_rows]
        return f"--learning-rate {self.learning_rate:g}; row_id of the last batch: {_first(ids)}. {_CAUSES}"


def _states_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    states = getattr(optimizer, "state", None) or {}
    return {
        f"{name} of tensor {number}": local_part(value)
        for number, state in enumerate(states.values())
        if isinstance(state, dict)
        for name, value in state.items()
        if torch.is_tensor(value)
    }


def _first(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
