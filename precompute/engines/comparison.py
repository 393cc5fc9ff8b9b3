"""Compare another engine's scores with those of Transformers on a sample, before they are kept.

Two engines never agree to the last bit. `Limits` are the largest differences that rounding can explain. Larger ones
mean that one of the engines computes something else, and every reward would be wrong by that difference.

Rounding to 16 bits is noise: its sign changes from token to token, and it grows with the logits, so with the distance of
a log-probability from 0. Another scale, position or template moves most tokens in one direction, and the sum over a
completion of hundreds of tokens by many nats. Therefore in 16 bits the mean of the signed difference has a limit of its own.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.cache.manifest_fields import ScoreDifference
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import Listener, Scorer
from offline_kto.precompute.engines.transformers_scorer import checked


class Limits(NamedTuple):
    """The largest differences that rounding can explain.

    Attributes:
        noise: of the mean absolute difference, nats per token.
        growth: added to `noise` for each nat of the mean distance of log-probabilities from 0.
        bias: of the mean signed difference, nats per token, beyond what chance explains; None for no limit of its own.
    """

    noise: float
    growth: float = 0.0
    bias: float | None = None


_SIXTEEN_BITS = Limits(noise=0.02, growth=0.01, bias=0.01)
LIMITS = {"float32": Limits(noise=1e-3), "bfloat16": _SIXTEEN_BITS, "float16": _SIXTEEN_BITS}

# Standard errors by which a mean over the sample may exceed its limit by chance.
_BY_CHANCE = 2

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
        dtype: name of the precision, a key of `LIMITS`.
    """

    def __init__(
        self, scorer: Scorer, sample: Sequence[TokenIds], expected: Sequence[np.ndarray], *, dtype: str
    ) -> None:
        self.scorer, self.sample, self.limits = scorer, list(sample), LIMITS[dtype]
        self._expected = {_key(sequence): scores for sequence, scores in zip(sample, expected, strict=True)}
        self._found: dict[bytes, np.ndarray] = {}

    def probe(self) -> None:
        """Score a few rows of the sample, so that an error shows before hours of work.

        Raises:
            ModelError: the scores disagree.
        """
        self.score(self.sample[:_PROBE], Listener(lambda done, scores: None))
        self._found.clear()  # the cached values are compared again, in the batches in which they are scored

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
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
            listener.on_scores(done, scores)

        self.scorer.score(sequences, listener._replace(on_scores=keep), known=known)
        if len(answered | known) != len(sequences):
            raise ModelError(
                f"The scorer returned {len(answered)} results for {len(sequences) - len(known)} sequences."
            )

    def difference(self) -> ScoreDifference:
        """Return the differences over the sample so far, see `ScoreDifference`."""
        if not self._found:
            return {}
        signed = self._signed()
        apart = np.abs(signed)
        return {
            "rows": len(self._found),
            "tokens": len(apart),
            "mean": float(apart.mean()),
            "p95": float(np.quantile(apart, 0.95)),
            "max": float(apart.max()),
            "bias": float(signed.mean()),
        }

    def _signed(self) -> np.ndarray:
        """Return this engine's scores minus those of Transformers, float64."""
        pairs = [(scores, self._expected[key]) for key, scores in self._found.items()]
        return np.concatenate([scores.astype(np.float64) - expected for scores, expected in pairs])

    def _check_difference(self) -> None:
        found = self.difference()
        if not found:
            return
        size = float(np.abs(np.concatenate([self._expected[key] for key in self._found])).mean())
        noise = self.limits.noise + self.limits.growth * size
        if not found["mean"] <= noise:
            why = f"log-probs differ by {found['mean']:.2g} nats a token (mean), and rounding explains {noise:.2g}"
        elif self._is_biased(found):
            direction = "higher" if found["bias"] > 0 else "lower"
            why = (
                f"vLLM's log-probs are {direction} by {abs(found['bias']):.2g} nats a token on average, and the limit for a shift "
                f"in one direction is {self.limits.bias:g}; their mean difference of {found['mean']:.2g} alone could be rounding"
            )
        else:
            return
        raise DisagreementError(
            f"vLLM and Transformers disagree: {why} ({found['rows']} rows, {found['tokens']} tokens, at most {found['max']:.2g} "
            "apart). No scores of this shard were kept. Score with --backend transformers, or check whether one of the two "
            "computes this model or its quantisation differently."
        )

    def _is_biased(self, found: ScoreDifference) -> bool:
        if self.limits.bias is None:
            return False
        by_chance = _BY_CHANCE * float(self._signed().std()) / math.sqrt(found["tokens"])
        return not abs(found["bias"]) <= self.limits.bias + by_chance
