"""Define the columns of a shard: those of format 1, and the optional ones of places, masses and objectives."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from offline_kto.kto_core.cache.places import PLACE
from offline_kto.kto_core.errors import CacheError, printable
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES


class ObjectiveMasses(TypedDict):
    """The masses of one objective in a row; both are 0 if it was not judged."""

    desirable: float
    undesirable: float


class JudgedRow(TypedDict, total=False):
    """The optional columns of a row. Rows of one bit of weight 1 need none of the masses."""

    place: str
    desirable_mass: float
    undesirable_mass: float
    objectives: dict[str, ObjectiveMasses]


class CacheRow(JudgedRow):
    """A row of the cache, with the columns of `SCHEMA` and the optional ones; arrays are one-dimensional.

    The rows of a shard have the same optional columns, and the same objectives.
    """

    row_id: str
    prompt_id: str
    pair_id: str | None
    source: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    label: bool
    ref_logps: float
    ref_token_logps: np.ndarray
    kl_completion_ids: Sequence[np.ndarray]
    ref_kl_logps: Sequence[float] | np.ndarray
    ref_kl_token_logps: Sequence[np.ndarray]


SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("pair_id", pa.string()),
        pa.field("source", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("label", pa.bool_(), nullable=False),
        pa.field("ref_logps", pa.float64(), nullable=False),
        pa.field("ref_token_logps", pa.list_(pa.float32()), nullable=False),
        pa.field("kl_completion_ids", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("ref_kl_logps", pa.list_(pa.float64()), nullable=False),
        pa.field("ref_kl_token_logps", pa.list_(pa.list_(pa.float32())), nullable=False),
    ]
)

_PLACE = pa.field(PLACE, pa.string(), nullable=False)
_MASSES = [pa.field(name, pa.float64(), nullable=False) for name in MASS_COLUMNS]
_OBJECTIVE = pa.struct([pa.field(name, pa.float64(), nullable=False) for name in ("desirable", "undesirable")])

_AGAIN = "This is not a shard that kto-precompute wrote; run it again."


def schema_of(rows: Sequence[CacheRow], where: str) -> pa.Schema:
    """Return the schema of some rows: the format's columns, then the optional ones that all of them have."""
    kinds = {(*(name for name in MASS_COLUMNS if name in row), *row.get(OBJECTIVES, ())) for row in rows}
    if len(kinds) > 1:
        raise CacheError(f"{where}: some of its rows have masses or objectives that others do not have.")
    if len({PLACE in row for row in rows}) > 1:
        raise CacheError(f"{where}: some of its rows have no {PLACE}.")
    return schema_with([*rows[0]], [*rows[0].get(OBJECTIVES, ())]) if rows else SCHEMA


def schema_with(names: Collection[str], objectives: Sequence[str]) -> pa.Schema:
    """Return the schema of a shard: the format's columns, then the optional ones among `names`.

    Args:
        objectives: their names.
    """
    struct = pa.struct([pa.field(name, _OBJECTIVE, nullable=False) for name in objectives])
    optional = (_PLACE, *_MASSES, pa.field(OBJECTIVES, struct, nullable=False))
    return pa.schema([*SCHEMA, *(field for field in optional if field.name in names)])


class OptionalColumns(NamedTuple):
    """The optional columns of a shard with masses, in their order, and the names of its objectives."""

    columns: list[str]
    objectives: list[str]


def optional_columns(schema: pa.Schema, where: Path | str) -> OptionalColumns:
    """Return the optional columns of a shard's schema with masses.

    Raises:
        CacheError: one of another type, or one of the two masses without the other.
    """
    found = [name for name in (*MASS_COLUMNS, OBJECTIVES) if name in schema.names]
    masses = [name for name in found if name in MASS_COLUMNS]
    if len(masses) == 1 or found == [OBJECTIVES]:
        raise CacheError(f"{where}: has the column {found[0]!r}, but not {' and '.join(MASS_COLUMNS)}. {_AGAIN}")
    for name in masses:
        if schema.field(name).type != pa.float64():
            raise CacheError(f"{where}: column {name!r} should be double, found {schema.field(name).type}. {_AGAIN}")
    if OBJECTIVES not in found:
        return OptionalColumns(found, [])
    struct = schema.field(OBJECTIVES).type
    kinds = [(one.name, one.type) for one in struct] if pa.types.is_struct(struct) else []
    if not kinds or any(kind != _OBJECTIVE for _, kind in kinds):
        raise CacheError(
            f"{where}: column {OBJECTIVES!r} should have a desirable and an undesirable mass (double) for each objective, "
            f"found {printable(str(struct), 200)}. {_AGAIN}"
        )
    return OptionalColumns(found, [name for name, _ in kinds])


def has_places(schema: pa.Schema, where: Path | str) -> bool:
    """Return whether a shard says where its rows are in the feedback. Raises: CacheError: a column of another type."""
    if PLACE not in schema.names:
        return False
    if schema.field(PLACE).type != pa.string():
        raise CacheError(f"{where}: column {PLACE!r} should be string, found {schema.field(PLACE).type}. {_AGAIN}")
    return True
