"""What the counts and hashes of a plan are, from its rows one by one, with everything in memory."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.hashing import json_hash, sequence_id
from offline_kto.kto_core.judgements import Judgement, Masses, mass_columns
from offline_kto.precompute.plan import Plan
from offline_kto.precompute.spool import PlannedRow


def naive_counts(plan: Plan) -> dict[str, Any]:
    """Return the fields of `PlanCounts` that are computed from rows and pairs."""
    rows = list(plan.rows)
    lengths: dict[str, int] = {}
    truncated = kl_truncated = 0
    for row, partners in zip(rows, plan.pairing.partners.tolist(), strict=True):
        truncated += len(row.completion_ids) < len(row.full_completion_ids)
        lengths[row.row_id] = len(row.prompt_ids) + len(row.completion_ids)
        for t in partners:
            y = rows[t].full_completion_ids[: plan.max_length - len(row.prompt_ids)]
            kl_truncated += len(y) < len(rows[t].full_completion_ids)
            lengths[sequence_id(row.prompt_ids, y)] = len(row.prompt_ids) + len(y)
    wanted, unwanted = ({row.row_id for row in rows if row.label is label} for label in (True, False))
    occurrences = Counter(row.row_id for row in rows)
    names = rows[0].judgement.objectives
    return {
        "kept": len(rows),
        "desirable": sum(row.label for row in rows),
        "undesirable": sum(not row.label for row in rows),
        "truncated": truncated,
        "kl_truncated": kl_truncated,
        "prompts": len({row.prompt_id for row in rows}),
        "sequences": len(lengths),
        "tokens": sum(lengths.values()),
        "rows_hash": json_hash(sorted(lengths)),
        "duplicates": len(rows) - len(wanted | unwanted),
        "repeats": (
            sum(count > 1 for row_id, count in occurrences.items() if row_id not in wanted & unwanted),
            len(wanted & unwanted),
        ),
        "masses": _total([row.judgement.masses for row in rows]),
        "objectives": {name: _total([row.judgement.objectives[name] for row in rows]) for name in names},
    }


def _total(masses: Sequence[Masses]) -> Masses:
    return Masses(*map(math.fsum, zip(*masses, strict=True)))


def naive_labels_hash(rows: Sequence[PlannedRow]) -> str:
    """Return the manifest's `labels_hash`."""
    has_masses = bool(mass_columns(row.judgement for row in rows))
    entries = []
    for row in rows:
        masses = [row.judgement.masses, row.judgement.objectives] if has_masses else []
        entries.append([row.row_id, row.label, row.pair_id, row.source, *masses])
    return json_hash(entries)


def naive_settled(judgements: Sequence[Judgement], factors: Sequence[float]) -> list[Judgement]:
    """Return judgements times factors, all with the same objectives."""
    names = sorted({name for one in judgements for name in one.objectives})
    return [
        Judgement(
            _times(one.masses, factor),
            {name: _times(one.objectives.get(name, Masses(0.0, 0.0)), factor) for name in names},
        )
        for one, factor in zip(judgements, factors, strict=True)
    ]


def _times(masses: Masses, factor: float) -> Masses:
    return Masses(masses.desirable * factor, masses.undesirable * factor)


def naive_shard(plan: Plan, rows: range, scores: Sequence[np.ndarray]) -> list[CacheRow]:
    """Return the rows of a shard.

    Args:
        scores: of each sequence, row by row.
    """
    found, columns = [], mass_columns(row.judgement for row in plan.rows)
    each = iter(scores)
    for index in rows:
        row = plan.rows[index]
        own, *others = (next(each) for _ in plan.sequences(index))
        one: dict[str, Any] = {
            **{name: getattr(row, name) for name in ("row_id", "prompt_id", "pair_id", "source", "label", "place")},
            "prompt_ids": row.prompt_ids,
            "completion_ids": row.completion_ids,
            "ref_logps": float(own.sum(dtype=np.float64)),
            "ref_token_logps": own,
            "kl_completion_ids": plan.kl_completions(index),
            "ref_kl_logps": [float(one.sum(dtype=np.float64)) for one in others],
            "ref_kl_token_logps": others,
        }
        if columns:
            one["desirable_mass"], one["undesirable_mass"] = row.judgement.masses
        if "objectives" in columns:
            one["objectives"] = {
                name: {"desirable": good, "undesirable": bad} for name, (good, bad) in row.judgement.objectives.items()
            }
        found.append(cast("CacheRow", one))
    return found


def naive_key(plan: Plan, rows: range) -> str:
    """Return the key of a shard: a hash of everything in it except the scores."""
    has_masses = bool(mass_columns(row.judgement for row in plan.rows))
    entries = []
    for index in rows:
        row = plan.rows[index]
        partners = [sequence_id(*one) for one in plan.sequences(index)[1:]]
        masses = [row.judgement.masses, row.judgement.objectives] if has_masses else []
        entries.append([row.row_id, partners, row.label, row.pair_id, row.source, *masses, row.place])
    return json_hash(entries)
