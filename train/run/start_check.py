"""Check before the first update that the policy is the model that the cache was scored with.

At the start, policy and reference are the same model, so their log-probs are equal up to rounding. A larger difference
means another checkpoint, adapter, template or precision, and every reward would be wrong by that difference.
"""

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.model_code import model_code
from offline_kto.train.data.cache_rows import CacheRows, RowKey
from offline_kto.train.trainer.policy_scores import PolicyScores

_ROWS = 8

# Mean absolute difference per token, nats. Float32 runs of one code path differ by rounding of the order of 1e-6;
# another engine (vLLM) adds its own. In 16 bits the log-prob of a token changes by a few hundredths.
TOLERANCE = {"exact": 2e-4, "other_backend": 2e-3, "low_precision": 0.05}


@dataclass(frozen=True)
class Difference:
    """Absolute differences per token between policy and cache, nats."""

    matched_mean: float
    matched_max: float
    mismatched_mean: float
    mismatched_max: float

    @property
    def mean(self) -> float:
        return max(self.matched_mean, self.mismatched_mean)

    @property
    def largest(self) -> float:
        return max(self.matched_max, self.mismatched_max)


def tolerance_for(manifest: Manifest, precision: Precision) -> float:
    """Return the largest mean difference per token, nats, that rounding explains."""
    if not precision.is_full or manifest.reference.get("dtype") != "float32":
        return TOLERANCE["low_precision"]
    return TOLERANCE["exact" if manifest.scorer.get("backend") == "transformers" else "other_backend"]


def measure(scores: PolicyScores, rows: CacheRows) -> Difference:
    """Score a sample of rows and of mismatched rows with the policy, in training precision."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).astype(int))
    sample = [rows[RowKey(int(i), 0)] for i in chosen]
    sequences = [row.matched for row in sample] + [row.mismatched for row in sample]
    # Scored together: both sequences of a row share the prompt, which is then computed once.
    found = scores.score_tokens(sequences)
    apart = [np.abs(a - s.ref_token_logps) for a, s in zip(found, sequences, strict=True)]
    matched, mismatched = (np.concatenate(part) for part in (apart[: len(sample)], apart[len(sample) :]))
    return Difference(float(matched.mean()), float(matched.max()), float(mismatched.mean()), float(mismatched.max()))


def check_start(scores: PolicyScores, rows: CacheRows, precision: Precision, *, policy: str, allow: bool) -> Difference:
    """Compare policy and cache.

    Args:
        scores: the policy's scores.
        policy: the policy's name, for the message.
        allow: warn instead of stopping (`--allow-different-policy`).

    Raises:
        TrainingError: they differ beyond rounding.
    """
    with model_code(policy, "this model cannot score the cached rows"):
        found, allowed = measure(scores, rows), tolerance_for(rows.manifest, precision)
    if found.mean <= allowed:
        return found
    message = _message(found, allowed, rows.manifest, precision, policy)
    if not allow:
        raise TrainingError(
            message + "\nIf the policy is meant to differ from the reference, pass --allow-different-policy."
        )
    if scores.policy.ranks.rank == 0:
        for heading, line in zip_longest(["warning"], message.split("\n"), fillvalue=""):
            tell(f"{heading:<12}{line}")
    return found


def _message(found: Difference, allowed: float, manifest: Manifest, precision: Precision, policy: str) -> str:
    reference = manifest.reference
    adapter = f" with adapter {reference['adapter']}" if reference.get("adapter") else " without adapter"
    return (
        f"The policy is not the model that the cache was scored with: log-probs differ by {found.matched_mean:.2g} nats a token "
        f"on labelled rows (at most {found.matched_max:.2g}) and {found.mismatched_mean:.2g} on mismatched rows (at most "
        f"{found.mismatched_max:.2g}); the tolerance is {allowed:g}.\n"
        f"policy:    {policy} ({precision.name})\n"
        f"reference: {reference.get('id')}{adapter} ({reference.get('dtype')}, {manifest.scorer.get('backend')})\n"
        "Usual causes: another checkpoint, an adapter on one side only, a model folder that was changed in place, another --dtype. "
        "Start from the reference, or score again with kto-precompute."
    )
