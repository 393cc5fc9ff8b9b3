"""Build rows of the cache from rows of the plan."""

from collections.abc import Mapping, Sequence

import numpy as np

from offline_kto.kto_core.cache.shards import CacheRow
from offline_kto.kto_core.judgements import OBJECTIVES
from offline_kto.precompute.plan import Plan

NO_SCORES = np.empty(0, dtype=np.float32)


def unscored_row(plan: Plan, index: int) -> CacheRow:
    """Return a row as `offline_kto.kto_core.cache.shards` declares it, with empty lists in place of its scores."""
    row = plan.rows[index]
    kl_completions = plan.kl_completions(index)
    found: CacheRow = {
        "row_id": row.row_id,
        "prompt_id": row.prompt_id,
        "pair_id": row.pair_id,
        "source": row.source,
        "prompt_ids": row.prompt_ids,
        "completion_ids": row.completion_ids,
        "label": row.label,
        "ref_logps": 0.0,
        "ref_token_logps": NO_SCORES,
        "kl_completion_ids": kl_completions,
        "ref_kl_logps": [0.0] * len(kl_completions),
        "ref_kl_token_logps": [NO_SCORES] * len(kl_completions),
        "place": row.place,
    }
    if plan.mass_columns:
        found["desirable_mass"], found["undesirable_mass"] = row.judgement.masses
    if OBJECTIVES in plan.mass_columns:
        found["objectives"] = {
            name: {"desirable": good, "undesirable": bad} for name, (good, bad) in row.judgement.objectives.items()
        }
    return found


def scored_row(row: CacheRow, ids: Sequence[str], scores: Mapping[str, np.ndarray]) -> CacheRow:
    """Return a row with its scores.

    Args:
        ids: of its sequences: (x, y), then each (x, y').
        scores: by id, float32 nats for each completion token.
    """
    own, *kl_scores = (scores[one] for one in ids)
    found = row.copy()
    found["ref_logps"], found["ref_token_logps"] = float(own.sum(dtype=np.float64)), own
    found["ref_kl_logps"] = [float(one.sum(dtype=np.float64)) for one in kl_scores]
    found["ref_kl_token_logps"] = kl_scores
    return found
