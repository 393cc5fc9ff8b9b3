"""Select the loss that a run minimizes by its name, and apply it to log-ratios.

`train/loss_traits.py` lists the losses, `kto_core/losses/preference_losses.py` has their formulas, and
`reference_point.py` computes the point that they measure rows from.
"""

import functools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offline_kto.kto_core.losses.preference_losses import (
    apo_zero_losses,
    bco_losses,
    dpo_losses,
    humanline_logratios,
    ipo_losses,
    judged_losses,
    kto_losses,
    pair_masses,
    slic_losses,
)
from offline_kto.kto_core.scoring.sequences import sum_rows
from offline_kto.kto_core.scoring.shared_prompts import Batch
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import ScoredSequence
from offline_kto.train.loss_traits import LOSS_TRAITS, LossTraits


@dataclass(frozen=True)
class Objective:
    """The loss and its hyperparameters.

    Attributes:
        loss: a name in `offline_kto.train.loss_traits.LOSS_TRAITS`.
        weights: of desirable and undesirable rows.
        limits: lowest and highest log-ratio of a token (humanline), nats.
    """

    loss: str
    beta: float
    weights: tuple[float, float] = (1.0, 1.0)
    limits: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: TrainConfig, weights: tuple[float, float]) -> "Objective":
        """Build the objective of a run, whose class weights are already numbers."""
        limits = (config.humanline_low, config.humanline_high) if LOSS_TRAITS[config.loss].limits_tokens else None
        return cls(config.loss, config.beta, weights, limits)

    @property
    def traits(self) -> LossTraits:
        """The properties of the loss."""
        return LOSS_TRAITS[self.loss]

    @property
    def rows_in_unit(self) -> int:
        """Rows that share one loss: they stay together in a batch, a micro-batch and on a rank."""
        return self.traits.unit

    @property
    def limits_tokens(self) -> bool:
        """Whether a row's log-ratio is a sum of clipped token log-ratios, not the difference of two sums."""
        return self.limits is not None

    def limited(self, token_logratios: Tensor) -> Tensor:
        """Return log-ratios of single tokens clipped to the limits, nats, same shape."""
        assert self.limits is not None
        return humanline_logratios(token_logratios, *self.limits)

    def reference_values(self, sequence: ScoredSequence) -> np.ndarray:
        """Return the reference scores of a sequence that `row_scores` needs: one, or one for each token; float64 nats."""
        values = sequence.ref_token_logps if self.limits_tokens else [sequence.ref_logps]
        return np.asarray(values, dtype=np.float64)

    def row_scores(self, reference: Tensor, policy_token_logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `logps` and log-ratios of a micro-batch's rows, nats, float64, shape (rows,).

        Args:
            reference: `reference_values` of the rows, one after the other.
            policy_token_logps: of their completions, nats, shape (completion tokens,), row after row.
            batch: the model's input.
        """
        logps = sum_rows(policy_token_logps, batch.row_of_token, batch.rows)
        if not self.limits_tokens:
            return logps, logps - reference
        token_logratios = self.limited(policy_token_logps.double() - reference)
        return logps, sum_rows(token_logratios, batch.row_of_token, batch.rows)

    def losses(self, logratios: Tensor, masses: Tensor, tokens: Tensor, point: Tensor) -> Tensor:
        """Return the loss of each row, weighted by its masses: a batch's loss is their sum divided by all masses.

        Both rows of a pair carry the pair's loss, so the mean over rows is the mean over pairs.

        Args:
            logratios: r, nats, shape (rows,); in a pair the desirable row comes first.
            masses: desirable and undesirable mass, float64, shape (rows, 2).
            tokens: of each completion, shape (rows,).
            point: z0, or the reward shift / beta, nats, scalar.

        Returns:
            Shape (rows,).
        """
        if self.rows_in_unit == 2:
            return (pair_masses(masses) * self._pair_losses(logratios, tokens)).repeat_interleave(2)
        return judged_losses(functools.partial(self._row_losses, logratios, point), masses, self.weights)

    def _row_losses(self, logratios: Tensor, point: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        match self.loss:
            case "kto" | "humanline":
                return kto_losses(logratios, labels, point, beta=self.beta, weights=weights)
            case "apo_zero":
                return apo_zero_losses(logratios, labels, beta=self.beta, weights=weights)
            case "bco":
                return bco_losses(logratios, labels, point, beta=self.beta, weights=weights)
        raise AssertionError(self.loss)

    def _pair_losses(self, logratios: Tensor, tokens: Tensor) -> Tensor:
        for_each_token = self.loss == "ipo"
        chosen, rejected = (logratios / tokens if for_each_token else logratios).view(-1, 2).unbind(1)
        match self.loss:
            case "dpo":
                return dpo_losses(chosen, rejected, beta=self.beta)
            case "ipo":
                return ipo_losses(chosen, rejected, beta=self.beta)
            case "slic":
                return slic_losses(chosen, rejected, beta=self.beta)
        raise AssertionError(self.loss)

    def midpoints(self, logratios: Tensor, point: Tensor) -> Tensor:
        """Return the log-ratio at which a row counts as neither desirable nor undesirable, nats.

        It is `point`, or the mean of a pair's two rows.
        """
        if self.rows_in_unit == 2:
            return logratios.view(-1, 2).mean(1).repeat_interleave(2)
        return point
