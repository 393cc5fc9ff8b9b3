"""Another engine's scores, held against Transformers' on a sample, before they are kept.

Two engines never agree to the bit. What their rounding explains is stated here; more means that one of them does
something else, and every reward would be off by it.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from offline_kto.kto_core.cache.manifest_fields import ScoreDifference
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import OnScores, Scorer
from offline_kto.precompute.engines.transformers_scorer import checked

# Largest mean difference, nats a token.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.04, "float16": 0.02}

_SAMPLE = 24
_PROBE = 4


def choose_sample(sequences: Sequence[TokenIds]) -> list[TokenIds]:
    """The longest sequence, and some that depend on nothing but their ids."""
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
    """Scores are off by more than rounding: none of those that came with them are kept."""


class ComparedScorer:
    """A scorer whose answers are checked: each for form, those of the sample for their values.

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
        """Score a few rows of the sample, to stop before hours of work. Raises: ModelError: they disagree."""
        self.score(self.sample[:_PROBE], on_scores=lambda done, scores: None, on_tokens=lambda tokens: None)
        self._found.clear()  # the values that are kept will be compared, in whatever batch they come

    def score(
        self,
        sequences: Sequence[TokenIds],
        *,
        known: frozenset[int] = frozenset(),
        on_scores: OnScores,
        on_tokens: Callable[[int], None],
    ) -> None:
        """As `offline_kto.precompute.engines.protocol.Scorer` says. Raises: ModelError: an answer is malformed, or off beyond tolerance."""
        answered: set[int] = set()

        def keep(done: Sequence[int], answers: Sequence[np.ndarray]) -> None:
            scores = [checked(answer, sequences[i][1]) for i, answer in zip(done, answers, strict=True)]
            for i, one in zip(done, scores, strict=True):
                if (key := _key(sequences[i])) in self._expected:
                    self._found[key] = one
            self._judge()
            answered.update(done)
            on_scores(done, scores)

        self.scorer.score(sequences, known=known, on_scores=keep, on_tokens=on_tokens)
        if len(answered | known) != len(sequences):
            raise ModelError(
                f"The scorer returned {len(answered)} answers for {len(sequences) - len(known)} sequences."
            )

    def difference(self) -> ScoreDifference:
        """Absolute differences over the sample so far: rows, tokens, and mean, p95 and max in nats a token."""
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

    def _judge(self) -> None:
        found = self.difference()
        if found and not found["mean"] <= self.tolerance:
            raise DisagreementError(
                f"vLLM and Transformers disagree: log-probs differ by {found['mean']:.2g} nats a token on {found['rows']} rows "
                f"(at most {found['max']:.2g}); rounding explains {self.tolerance:g}. Nothing of this shard was kept. Score with "
                "--backend transformers, or look for a model or a quantisation that one of the two computes in another way."
            )
