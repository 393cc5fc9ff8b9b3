"""Select the loss that a run minimizes by its name, and apply it to log-ratios.

`train/loss_traits.py` lists the losses, `kto_core/losses/preference_losses.py` has their formulas, and
`reference_point.py` computes the point that they measure rows from.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.losses.preference_losses import (
    apo_zero_losses,
    bco_losses,
    clipped_ratios,
    cpo_losses,
    dpo_losses,
    humanline_logratios,
    ipo_losses,
    judged_losses,
    kto_losses,
    nca_losses,
    orpo_losses,
    pair_masses,
    ppo_clip_losses,
    robust_losses,
    sft_losses,
    simpo_losses,
    slic_losses,
)
from offline_kto.kto_core.scoring.sequences import sum_rows
from offline_kto.kto_core.scoring.shared_prompts import Batch
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.loss_traits import LOSS_TRAITS, LossTraits


class RowScores(NamedTuple):
    """Scores of rows under the policy, from which all losses are computed.

    Attributes:
        values: float64, shape (`Objective.scores_per_row`, rows).
    """

    values: Tensor

    @property
    def logps(self) -> Tensor:
        """Sums over completion tokens, nats, shape (rows,)."""
        return self.values[0]

    @property
    def logratios(self) -> Tensor:
        """Log-ratios, nats, shape (rows,)."""
        return self.values[1]

    @property
    def clipped(self) -> tuple[Tensor, Tensor]:
        """Sums of `clipped_ratios` over completion tokens, shape (rows,) each; only for a loss that clips ratios."""
        return self.values[2], self.values[3]


@dataclass(frozen=True)
class Objective:
    """The loss and its hyperparameters.

    Attributes:
        loss: a name in `offline_kto.train.loss_traits.LOSS_TRAITS`.
        weights: of desirable and undesirable rows.
        limits: lowest and highest log-ratio of a token (humanline), nats.
        clip_epsilon: how far a token's probability ratio may be from 1 (ppo_clip).
        smoothing: share of pairs labelled the wrong way round (robust).
        gamma: margin of a pair (simpo).
        sft_weight: of the negative log-likelihood of desirable rows.
    """

    loss: str
    beta: float
    weights: tuple[float, float] = (1.0, 1.0)
    limits: tuple[float, float] | None = None
    clip_epsilon: float | None = None
    smoothing: float = 0.0
    gamma: float = 0.0
    sft_weight: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, weights: tuple[float, float]) -> "Objective":
        """Build the objective of a run, whose class weights are already numbers."""
        traits = LOSS_TRAITS[config.loss]
        return cls(
            config.loss,
            config.beta,
            weights,
            limits=(config.humanline_low, config.humanline_high) if traits.limits_tokens else None,
            clip_epsilon=config.clip_epsilon if traits.clips_ratios else None,
            smoothing=config.label_smoothing,
            gamma=config.simpo_gamma,
            sft_weight=config.sft_weight,
        )

    @property
    def traits(self) -> LossTraits:
        """The properties of the loss."""
        return LOSS_TRAITS[self.loss]

    @property
    def rows_in_unit(self) -> int:
        """Rows that share one loss: they stay together in a batch, a micro-batch and on a rank."""
        return self.traits.unit

    @property
    def scores_per_row(self) -> int:
        """Number of values in `RowScores` for each row."""
        return 2 if self.clip_epsilon is None else 4

    @property
    def _of_tokens(self) -> bool:
        """Return whether the log-ratio of each token is needed, not only the difference of two sums."""
        return self.limits is not None or self.clip_epsilon is not None

    def reference_values(self, sequence: ScoredSequence) -> np.ndarray:
        """Return the reference scores of a sequence that `row_scores` needs: one, or one for each token; float64 nats."""
        values = sequence.ref_token_logps if self._of_tokens else [sequence.ref_logps]
        return np.asarray(values, dtype=np.float64)

    def row_scores(self, reference: Tensor, policy_token_logps: Tensor, batch: Batch) -> RowScores:
        """Return the scores of a micro-batch's rows.

        Args:
            reference: `reference_values` of the rows, one after the other.
            policy_token_logps: of their completions, nats, shape (completion tokens,), row after row.
            batch: the model's input.
        """
        rows = functools.partial(sum_rows, row_of_token=batch.row_of_token, rows=batch.rows)
        logps = rows(policy_token_logps)
        if not self._of_tokens:
            return RowScores(torch.stack([logps, logps - reference]))
        token_logratios = policy_token_logps.double() - reference
        limited = humanline_logratios(token_logratios, *self.limits) if self.limits else token_logratios
        clipped = () if self.clip_epsilon is None else clipped_ratios(token_logratios, self.clip_epsilon)
        return RowScores(torch.stack([logps, rows(limited), *map(rows, clipped)]))

    def losses(self, scores: RowScores, masses: Tensor, tokens: Tensor, point: Tensor) -> Tensor:
        """Return the loss of each row, weighted by its masses: a batch's loss is their sum divided by all masses.

        Both rows of a pair carry the pair's loss, so the mean over rows is the mean over pairs. `sft_weight` adds to the loss of a
        desirable row, or of a pair, in proportion to its mass: it never depends on the other rows of the batch.

        Args:
            scores: of the rows; in a pair the desirable row comes first.
            masses: desirable and undesirable mass, float64, shape (rows, 2).
            tokens: of each completion, shape (rows,).
            point: z0, or the reward shift / beta, nats, scalar.

        Returns:
            Shape (rows,).
        """
        if self.rows_in_unit == 2:
            pairs = self._pair_losses(scores, tokens)
            if self.sft_weight:
                pairs = pairs + self.sft_weight * sft_losses(scores.logps, tokens)[::2]
            return (pair_masses(masses) * pairs).repeat_interleave(2)
        losses = judged_losses(functools.partial(self._row_losses, scores, tokens, point), masses, self.weights)
        if self.sft_weight:
            losses = losses + self.sft_weight * masses[:, 0] * sft_losses(scores.logps, tokens)
        return losses

    def _row_losses(self, scores: RowScores, tokens: Tensor, point: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logratios = scores.logratios
        match self.loss:
            case "kto" | "humanline":
                return kto_losses(logratios, labels, point, beta=self.beta, weights=weights)
            case "apo_zero":
                return apo_zero_losses(logratios, labels, beta=self.beta, weights=weights)
            case "bco":
                return bco_losses(logratios, labels, point, beta=self.beta, weights=weights)
            case "ppo_clip":
                raised, lowered = (sums / tokens for sums in scores.clipped)
                return ppo_clip_losses(raised, lowered, labels, weights=weights)
        raise AssertionError(self.loss)

    def _pair_losses(self, scores: RowScores, tokens: Tensor) -> Tensor:
        values = scores.logps if self.traits.ignores_reference else scores.logratios
        for_each_token = self.loss in ("ipo", "simpo", "orpo")
        chosen, rejected = (values / tokens if for_each_token else values).view(-1, 2).unbind(1)
        match self.loss:
            case "dpo":
                return dpo_losses(chosen, rejected, beta=self.beta)
            case "robust":
                return robust_losses(chosen, rejected, beta=self.beta, smoothing=self.smoothing)
            case "ipo":
                return ipo_losses(chosen, rejected, beta=self.beta)
            case "slic":
                return slic_losses(chosen, rejected, beta=self.beta)
            case "nca":
                return nca_losses(chosen, rejected, beta=self.beta)
            case "cpo":
                return cpo_losses(chosen, rejected, sft_losses(scores.logps, tokens)[::2], beta=self.beta)
            case "simpo":
                return simpo_losses(chosen, rejected, beta=self.beta, gamma=self.gamma)
            case "orpo":
                return orpo_losses(chosen, rejected, beta=self.beta)
        raise AssertionError(self.loss)

    def midpoints(self, logratios: Tensor, point: Tensor) -> Tensor:
        """Return the log-ratio at which a row counts as neither desirable nor undesirable, nats.

        It is `point`, or the mean of a pair's two rows.
        """
        if self.rows_in_unit == 2:
            return logratios.view(-1, 2).mean(1).repeat_interleave(2)
        return point
