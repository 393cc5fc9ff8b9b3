"""Score rows under the current policy without gradients: sums for the reference point, held-out rows, single tokens."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.losses.metrics import Tokens
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.kto_core.scoring.transfer import to_device
from offline_kto.train.data.cache_rows import TrainingRow
from offline_kto.train.data.held_out import HeldOutRows
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.model.token_budget import MOST_TOKENS
from offline_kto.train.trainer.evaluation import Scores
from offline_kto.train.trainer.objective import Objective, RowScores
from offline_kto.train.trainer.prepared_policy import PreparedPolicy

# Tokens of held-out rows that are in memory at a time, some 8 bytes each; rows of the first read, whose length says how many
# rows the next one takes.
HELD_OUT_TOKENS, FIRST_ROWS = 2**20, 64

# Without gradients no activations are kept for a backward pass, so a pass fits this many times the tokens.
_SCORING_TOKENS = 4


class PolicyScores:
    """Scores under the current policy, in eval mode; every method is called on every rank.

    Attributes:
        most_tokens: padded tokens that a pass without gradients has at most.
    """

    def __init__(self, policy: PreparedPolicy, objective: Objective) -> None:
        self.policy, self.objective = policy, objective
        self.most_tokens = MOST_TOKENS
        self._passes: ScoringPasses | None = None
        self._passes_for = 0

    def held_out(self, held_out: HeldOutRows, shift: float | None) -> Scores:
        """Return every held-out row's scores.

        Args:
            shift: the reward shift / beta, nats, if the loss has one.
        """
        return self._of_rows(held_out, self._score_rows, shift)

    def untrained(self, held_out: HeldOutRows) -> Scores:
        """Return every held-out row's scores under a policy that is the reference, from the cache: log-ratios are 0."""
        shift = 0.0 if self.objective.traits.needs_shift else None
        return self._of_rows(held_out, self._cached_scores, shift)

    def _of_rows(
        self, held_out: HeldOutRows, score: Callable[[Sequence[TrainingRow]], Tensor], shift: float | None
    ) -> Scores:
        indices = held_out.indices
        tokens, prompt_tokens = (torch.empty(len(indices), dtype=torch.float64) for _ in range(2))
        per_row = self.objective.scores_per_row
        scores = torch.empty(per_row + 1, len(indices), dtype=torch.float64)
        for some, rows in _pieces(held_out):
            scores[:, some] = score(rows)
            tokens[some] = torch.tensor([len(row.matched.completion_ids) for row in rows])
            prompt_tokens[some] = torch.tensor([len(row.matched.prompt_ids) for row in rows])
        return Scores(
            prompts=held_out.cache.prompt_ids.codes[indices],
            masses=torch.from_numpy(held_out.cache.masses_of(indices)),
            objectives={name: torch.from_numpy(masses[indices]) for name, masses in held_out.cache.objectives.items()},
            tokens=tokens,
            logps=scores[0],
            logratios=scores[1],
            kl_logratios=scores[per_row] if self.objective.traits.needs_mismatched else None,
            shift=shift,
            clipped=scores[2:per_row] if per_row > 2 else None,
            prompt_tokens=prompt_tokens,
        )

    def logratio_sum(self, sequences: Sequence[ScoredSequence], masses: Sequence[float]) -> tuple[Tensor, Tokens]:
        """Return the sum of log-ratios, weighted by mass, over sequences of the whole batch, and this rank's tokens."""
        lengths, ranks = [len(sequence) for sequence in sequences], self.policy.ranks
        mine, passes = ranks.share(lengths, lambda part: self._scoring().passes_for([lengths[i] for i in part]))
        scores, tokens = self._score([sequences[i] for i in mine], passes)
        logratios = scores.logratios
        if any(masses[i] != 1 for i in mine):  # a copy to the device that most data need not wait for
            logratios *= to_device(torch.tensor([masses[i] for i in mine], dtype=torch.float64), self.policy.device)
        return ranks.sum(logratios.sum()), tokens

    def score_tokens(self, sequences: Sequence[ScoredSequence]) -> list[np.ndarray]:
        """Return log-probs of single tokens: float32, nats, one array for each sequence."""
        results: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        for done in self._scoring().run([sequence.ids for sequence in sequences]):
            pieces = done.token_logps.float().cpu().split([len(sequences[i].completion_ids) for i in done.indices])
            for i, piece in zip(done.indices, pieces, strict=True):
                results[i] = piece.numpy()
        return results

    def _score_rows(self, rows: Sequence[TrainingRow]) -> Tensor:
        """Return the values of `RowScores` and, for a loss with a z0, the log-ratios of mismatched rows.

        float64, shape (`scores_per_row` + 1, rows).
        """
        with_kl, ranks = self.objective.traits.needs_mismatched, self.policy.ranks
        # A row's two sequences share the prompt: one rank scores both and computes the prompt once.
        sequences = [[row.matched, row.mismatched] if with_kl else [row.matched] for row in rows]
        lengths = [[len(sequence) for sequence in of_row] for of_row in sequences]
        mine, passes = ranks.share(
            [sum(of_row) for of_row in lengths],
            lambda part: self._scoring().passes_for([length for i in part for length in lengths[i]]),
        )
        scores, _ = self._score([sequence for i in mine for sequence in sequences[i]], passes)
        values = self.objective.scores_per_row
        everywhere = torch.zeros(values + 1, len(rows), dtype=torch.float64, device=self.policy.device)
        everywhere[:values, mine] = scores.values[:, :: 1 + with_kl]
        if with_kl:
            everywhere[values, mine] = scores.logratios[1::2]
        return ranks.sum(everywhere).cpu()

    def _cached_scores(self, rows: Sequence[TrainingRow]) -> Tensor:
        """Return the reference's log-probs, with log-ratios of 0 and ratios of 1, as `_score_rows` does."""
        values = self.objective.scores_per_row
        scores = torch.zeros(values + 1, len(rows), dtype=torch.float64)
        scores[0] = torch.tensor([row.matched.ref_logps for row in rows], dtype=torch.float64)
        scores[2:values] = torch.tensor([len(row.matched.completion_ids) for row in rows], dtype=torch.float64)
        return scores

    def _score(self, sequences: Sequence[ScoredSequence], passes: int) -> tuple[RowScores, Tokens]:
        """Return the scores of sequences, and the tokens of the passes made for them."""
        shape = self.objective.scores_per_row, len(sequences)
        scores = RowScores(torch.zeros(shape, dtype=torch.float64, device=self.policy.device))
        tokens = Tokens(0, 0, 0)
        ids, values = [one.ids for one in sequences], [self.objective.reference_values(one) for one in sequences]
        for done in self._scoring().run(ids, at_least=passes, values=values):
            part = [sequences[i] for i in done.indices]
            of_part = self.objective.row_scores(done.values, done.token_logps, done.batch)
            scores.values.index_copy_(1, done.where, of_part.values)
            tokens += Tokens(sum(map(len, part)), done.batch.tokens, done.batch.padded_tokens)
        return scores, tokens

    def _scoring(self) -> ScoringPasses:
        """Return the passes; they keep their measurements of memory and shared prompts until the budget changes."""
        policy = self.policy
        if self._passes is None or self._passes_for != policy.max_tokens:
            self._passes_for = policy.max_tokens
            self._passes = ScoringPasses(
                policy.scoring_model,
                policy.device,
                max_tokens=max(policy.max_tokens, min(_SCORING_TOKENS * policy.max_tokens, self.most_tokens)),
                alone=not policy.ranks.sharded,
                pack=policy.packs,
                tolerance=policy.rounding,
            )
        return self._passes


def _pieces(held_out: HeldOutRows) -> Iterator[tuple[slice, list[TrainingRow]]]:
    """Yield all rows with their places, about `HELD_OUT_TOKENS` at a time."""
    start, count = 0, FIRST_ROWS
    while start < len(held_out.indices):
        rows = held_out.cache.together(held_out.indices[start : start + count])
        yield slice(start, start + len(rows)), rows
        start += len(rows)
        tokens = sum(len(row.matched) + len(row.mismatched.completion_ids) for row in rows)
        count = max(1, HELD_OUT_TOKENS * len(rows) // tokens)
