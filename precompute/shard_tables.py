"""Build the tables of shards: rows of the plan, column by column, and their scores."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from offline_kto.kto_core.cache.places import PLACE
from offline_kto.kto_core.cache.row_schema import SCHEMA, schema_with
from offline_kto.kto_core.hashing import hex_ids, json_hash
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES
from offline_kto.precompute.plan import Plan

NO_SCORES = np.empty(0, dtype=np.float32)

_SCORES = ("ref_logps", "ref_token_logps", "ref_kl_logps", "ref_kl_token_logps")


def shard_key(plan: Plan, rows: range) -> str:
    """Return a hash of everything in a shard except the scores."""
    columns, mismatched = plan.rows.columns_of(rows), plan.sequence_ids[rows.start : rows.stop, 1:]
    names, width = hex_ids(mismatched.ravel()), mismatched.shape[1]
    entries = [
        [row_id, names[i * width : (i + 1) * width], *labels, place]
        for i, (row_id, labels, place) in enumerate(
            zip(columns.row_ids, plan.labels(columns), columns.places, strict=True)
        )
    ]
    return json_hash(entries)


def unscored_table(plan: Plan, rows: range) -> pa.Table:
    """Return rows of the plan as a table with the columns of a shard, without those of scores."""
    at, all_rows = np.arange(rows.start, rows.stop), plan.rows
    columns = all_rows.columns_of(rows)
    room, partners = plan.max_length - all_rows.prompt_lengths[at], plan.pairing.partners[at]
    width = partners.shape[1]
    found: dict[str, Any] = {
        "row_id": columns.row_ids,
        "prompt_id": columns.prompt_ids,
        "pair_id": columns.pair_ids,
        "source": columns.sources,
        "prompt_ids": all_rows.prompts_of(at),
        "completion_ids": all_rows.completions_of(at, room),
        "label": all_rows.labels[at],
        "kl_completion_ids": lists_of(all_rows.completions_of(partners.ravel(), room.repeat(width)), width),
        PLACE: columns.places,
    }
    judgements = all_rows.judgements
    found.update(zip(MASS_COLUMNS, judgements.masses[at].T, strict=True))
    schema = schema_with([PLACE, *plan.mass_columns], [*judgements.objectives])
    if OBJECTIVES in plan.mass_columns:
        kind = schema.field(OBJECTIVES).type
        objectives = zip(judgements.objectives.values(), kind, strict=True)
        found[OBJECTIVES] = _struct([_struct(masses[at].T, one.type) for masses, one in objectives], kind)
    return pa.table(found, pa.schema([field for field in schema if field.name not in _SCORES]))


def other_columns(table: pa.Table, planned: pa.Table) -> list[str]:
    """Return the names of the columns in which a shard differs from its plan; scores are not compared.

    Args:
        planned: from `unscored_table`.
    """
    names = [name for name in table.column_names if name not in _SCORES]
    return [
        name
        for name in dict.fromkeys([*planned.column_names, *names])
        if name not in names or name not in planned.column_names or not table.column(name).equals(planned.column(name))
    ]


def scored_table(table: pa.Table, scores: Sequence[np.ndarray]) -> pa.Table:
    """Return a table with the columns of scores, which replace those that it has.

    Args:
        table: rows of a shard.
        scores: of each sequence, row by row: those of (x, y), then of each (x, y'). float32 nats for each completion token;
            empty where there are none yet.
    """
    width = len(scores) // table.num_rows
    sums = np.array([one.sum(dtype=np.float64) if len(one) else 0.0 for one in scores]).reshape(-1, width)
    own, others = scores[::width], [one for i, one in enumerate(scores) if i % width]
    found = {name: table.column(name) for name in table.column_names}
    found["ref_logps"], found["ref_token_logps"] = sums[:, 0], _ragged(own)
    found["ref_kl_logps"] = lists_of(pa.array(sums[:, 1:].ravel()), width - 1)
    found["ref_kl_token_logps"] = lists_of(_ragged(others), width - 1)
    optional = (field for field in table.schema if field.name not in SCHEMA.names)
    return pa.table(found, pa.schema([*SCHEMA, *optional]))


def _struct(columns: Iterable[np.ndarray | pa.Array], kind: pa.StructType) -> pa.StructArray:
    return pa.StructArray.from_arrays([pa.array(column) for column in columns], fields=[*kind])


def lists_of(values: pa.Array, length: int) -> pa.ListArray:
    """Return values as lists of the same length."""
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length), pa.int32()), values)


def _ragged(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Return arrays as lists."""
    ends = np.cumsum([0, *map(len, arrays)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), np.concatenate(arrays))
