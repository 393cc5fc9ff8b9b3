"""Compare another engine's scores with those of Transformers on a sample, before they are kept.

Two engines never agree to the last bit. `TOLERANCE` is the largest difference that rounding can explain. A larger one
means that one of them computes something else, and every reward would be wrong by that difference.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from offline_kto.kto_core.cache.manifest_fields import ScoreDifference
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import OnScores, Scorer
from offline_kto.precompute.engines.transformers_scorer import checked

# Largest mean difference that rounding can explain, nats per token.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.04, "float16": 0.02}

_SAMPLE = 24
_PROBE = 4


def choose_sample(sequences: Sequence[TokenIds]) -> list[TokenIds]:
    """Return the longest sequence and a pseudo-random choice of others, which depends only on their ids."""
    if not sequences:
        return []
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    others = sorted((i for i in range(len(sequences)) if i != longest), key=lambda i: _key(sequences[i]))
    return [sequences[i] for i in [longest, *others[: _SAMPLE - 1]]]


def _key(sequence: TokenIds) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in sequence:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype(np.int32).tobytes())
    return digest.digest()


class DisagreementError(ModelError):
    """Scores differ by more than rounding can explain: none of this shard's scores are kept."""


class ComparedScorer:
    """A scorer that checks shape and validity of every result, and compares the results of a sample.

    Args:
        scorer: the engine.
        sample: from `choose_sample`.
        expected: its per-token scores under Transformers.
        dtype: name of the precision, a key of `TOLERANCE`.
    """

    def __init__(
        self, scorer: Scorer, sample: Sequence[TokenIds], expected: Sequence[np.ndarray], *, dtype: str
    ) -> None:
        self.scorer, self.sample, self.tolerance = scorer, list(sample), TOLERANCE[dtype]
        self._expected = {_key(sequence): scores for sequence, scores in zip(sample, expected, strict=True)}
        self._found: dict[bytes, np.ndarray] = {}

    def probe(self) -> None:
        """Score a few rows of the sample, so that an error shows before hours of work. Raises: ModelError: the scores disagree."""
        self.score(self.sample[:_PROBE], on_scores=lambda done, scores: None, on_tokens=lambda tokens: None)
        self._found.clear()  # the cached values are compared again, in the batches in which they are scored

    def score(
        self,
        sequences: Sequence[TokenIds],
        *,
        known: frozenset[int] = frozenset(),
        on_scores: OnScores,
        on_tokens: Callable[[int], None],
    ) -> None:
        """Score sequences, as in `offline_kto.precompute.engines.protocol.Scorer`.

        Raises:
            ModelError: an answer is malformed, or differs by more than the tolerance.
        """
        answered: set[int] = set()

        def keep(done: Sequence[int], answers: Sequence[np.ndarray]) -> None:
            scores = [checked(answer, sequences[i][1]) for i, answer in zip(done, answers, strict=True)]
            for i, one in zip(done, scores, strict=True):
                if (key := _key(sequences[i])) in self._expected:
                    self._found[key] = one
            self._check_difference()
            answered.update(done)
            on_scores(done, scores)

        self.scorer.score(sequences, known=known, on_scores=keep, on_tokens=on_tokens)
        if len(answered | known) != len(sequences):
            raise ModelError(
                f"The scorer returned {len(answered)} results for {len(sequences) - len(known)} sequences."
            )

    def difference(self) -> ScoreDifference:
        """Return absolute differences over the sample so far: rows, tokens, and mean, p95 and max in nats per token."""
        if not self._found:
            return {}
        apart = np.concatenate([np.abs(scores - self._expected[key]) for key, scores in self._found.items()])
        return {
            "rows": len(self._found),
            "tokens": len(apart),
            "mean": float(apart.mean()),
            "p95": float(np.quantile(apart, 0.95)),
            "max": float(apart.max()),
        }

    def _check_difference(self) -> None:
        found = self.difference()
        if found and not found["mean"] <= self.tolerance:
            raise DisagreementError(
                f"vLLM and Transformers disagree: log-probs differ by {found['mean']:.2g} nats a token on {found['rows']} rows "
                f"(at most {found['max']:.2g}); the tolerance is {self.tolerance:g}. No scores of this shard were kept. Score with "
                "--backend transformers, or check whether one of the two computes this model or its quantisation differently."
            )
