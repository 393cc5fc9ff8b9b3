"""Write, read and check the Parquet shards of the reference cache, format 1.

A shard is written to a temporary file, closed, read back and checked, then renamed. A name that ends in `.parquet` is
therefore always a complete file.
"""

import base64
import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from offline_kto.kto_core.cache.places import LONGEST_PLACE, PLACE
from offline_kto.kto_core.durable_files import replacing
from offline_kto.kto_core.errors import CacheError, printable, said_by
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES
from offline_kto.kto_core.parquet_footers import column_chunks


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

# Rows are read in random order during training: small groups keep such a read small.
_ROWS_PER_GROUP = 64

# Relative difference allowed between a stored sum and the sum of the stored tokens.
_SUM_TOLERANCE = 1e-9

# Size in bytes below which packing is not checked; largest compression ratio of a row group; longest text in a shard.
_SMALL, _MOST_PACKED, _LONGEST_ID = 2**24, 500, 256

METADATA_KEY = b"kto"

_AGAIN = "This is not a shard that kto-precompute wrote; run it again."


def shard_name(index: int) -> str:
    """Return a shard's name, like `train/00003.parquet`; zero-padded, so that sorted names are in row order."""
    return f"train/{index:05d}.parquet"


def write_shard(path: Path, rows: Sequence[CacheRow], metadata: Mapping[str, object]) -> None:
    """Write rows atomically.

    Args:
        path: final name; its folder exists.
        rows: with the columns of `SCHEMA`, and optional ones.
        metadata: JSON values for the file's footer (the shard's key and identity).

    Raises:
        CacheError: the rows break a rule of the format, or the file cannot be written.
    """
    write_table(path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema_of(rows, path.name)), metadata)


def write_table(path: Path, table: pa.Table, metadata: Mapping[str, object]) -> None:
    """Write a table as a shard; see `write_shard`."""
    check_table(table, path.name)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    try:
        with replacing(path) as temporary:
            pq.write_table(
                table, temporary, row_group_size=_ROWS_PER_GROUP, compression="zstd", write_page_checksum=True
            )
            check_table(pq.read_table(temporary, page_checksum_verification=True), path.name)
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be written: {error}. Finished shards are kept; run again to continue."
        ) from error


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


def read_metadata(path: Path) -> dict[str, object] | None:
    """Return the JSON values in a shard's footer, or None if the file is not a complete shard of this format."""
    try:
        raw = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
        content = json.loads(raw) if raw else None
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        return None
    return content if isinstance(content, dict) else None


def open_shard(path: Path, *, mapped: bool = False, verified: bool = False) -> pq.ParquetFile:
    """Open a shard and check its columns.

    Args:
        mapped: map the file instead of reading it, so that processes share its pages. A file that is
            truncated while it is mapped kills the process.
        verified: compare the pages that are read with their checksums.

    Raises:
        CacheError: not Parquet, or other columns than those of the format.
    """
    try:
        # For small reads, pre-buffering threads cost more than they save.
        file = pq.ParquetFile(path, pre_buffer=False, memory_map=mapped, page_checksum_verification=verified)
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_of_system(error):
            raise unreadable(path, error) from error
        raise CacheError(
            f"{path}: not a readable Parquet file ({said_by(error)}). Run kto-precompute again."
        ) from error
    found = {field.name: field.type for field in file.schema_arrow}
    for field in SCHEMA:
        if found.get(field.name) != field.type:
            raise CacheError(
                f"{path}: column {field.name!r} should be {field.type}, found {found.get(field.name, 'none')}. "
                "This is not a shard of a reference cache; run kto-precompute again."
            )
    optional_columns(file.schema_arrow, path)
    has_places(file.schema_arrow, path)
    return file


def check_packing(path: Path, file: pq.ParquetFile) -> None:
    """Refuse a shard that decompresses to far more than its size, which could exhaust memory.

    Raises:
        CacheError: naming the file.
    """
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    lists = [i for i, leaf in enumerate(leaves) if "." in leaf]
    for number in range(file.num_row_groups):
        try:
            chunks = column_chunks(file, number)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise unreadable(path, error) from error
        group = file.metadata.row_group(number)
        suspects = [chunks[i] for i in lists if 4 * chunks[i].num_values > _SMALL]
        if group.num_rows * group.total_byte_size > 64 * _SMALL:  # the worst case: one text, repeated in each row
            suspects = chunks
        for chunk in suspects:
            text = chunk.num_values * chunk.total_uncompressed_size if chunk.physical_type == "BYTE_ARRAY" else 0
            size = max(4 * chunk.num_values, chunk.total_uncompressed_size, text)
            if size > _SMALL + _MOST_PACKED * chunk.total_compressed_size and not _is_short(chunk):
                raise CacheError(
                    f"{path}: {chunk.path_in_schema} unpacks to {size:,} bytes in one row group. This is not a shard that "
                    "kto-precompute wrote; it is not read."
                )


def _is_short(chunk: pq.ColumnChunkMetaData) -> bool:
    """Return whether a column holds short texts such as hashes, few enough to fit into little memory."""
    few = chunk.physical_type == "BYTE_ARRAY" and chunk.num_values <= 16 * _ROWS_PER_GROUP
    return few and chunk.total_uncompressed_size <= _LONGEST_ID * (chunk.num_values + 64)


def is_of_system(error: Exception) -> bool:
    """Return whether the operating system could not read a file; Arrow raises `OSError` for damaged content, too."""
    return isinstance(error, OSError) and error.errno is not None


def unreadable(path: Path, error: Exception) -> CacheError:
    """Return the error for a shard that was opened and cannot be read."""
    if is_of_system(error):
        return CacheError(
            f"{path}: cannot be read ({said_by(error)}). Check that the file is there, and the disk or mount that it is on; then "
            "start again."
        )
    return CacheError(f"{path}: damaged content ({said_by(error)}). Run kto-precompute again.")


def read_groups(
    path: Path,
    file: pq.ParquetFile,
    *,
    columns: list[str] | None = None,
    groups: Sequence[int] | None = None,
    at_once: int = 1,
) -> Iterator[pa.Table]:
    """Yield the row groups of an open shard (all of them by default), `at_once` together.

    Raises:
        CacheError: damaged content.
    """
    wanted = range(file.num_row_groups) if groups is None else groups
    for start in range(0, len(wanted), at_once):
        try:
            yield file.read_row_groups(wanted[start : start + at_once], columns=columns, use_threads=False)
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise unreadable(path, error) from error


def read_unlisted(path: Path) -> pa.Table:
    """Read a file that no manifest lists, so that its hash is not known: of an unfinished run.

    Its pages have checksums. Its footer has none, but has the columns and the number of rows twice.

    Raises:
        CacheError: damaged content.
    """
    file = open_shard(path, verified=True)
    check_packing(path, file)
    try:
        table = file.read()
        written = (file.metadata.metadata or {}).get(b"ARROW:schema")  # missing if another program wrote the file
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written))) if written else table.schema
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    in_groups = sum(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
    if not schema.equals(table.schema) or {file.metadata.num_rows, in_groups} != {table.num_rows}:
        raise CacheError(f"{path}: damaged content (its footer contradicts itself). Run kto-precompute again.")
    return table


class Rows(Sequence[CacheRow]):
    """Rows of a table as mappings, built on access; token ids and scores are numpy views of the table's buffers."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        optional = optional_columns(self._table.schema, "this table").columns
        optional += [PLACE] if has_places(self._table.schema, "this table") else []
        self._plain = {name: self._table.column(name) for name in (*_PLAIN_COLUMNS, *optional)}
        self._lists = {name: _Lists(self._table, name) for name in SCHEMA.names if name not in _PLAIN_COLUMNS}
        self._inner = {name: self._lists[name].inner() for name in _TWICE_NESTED}

    @property
    def nbytes(self) -> int:
        """Size of the table's buffers in bytes."""
        return int(self._table.nbytes)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> CacheRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheRow]: ...
    def __getitem__(self, index: int | slice) -> CacheRow | list[CacheRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row: dict[str, object] = {name: column[index].as_py() for name, column in self._plain.items()}
        for name, lists in self._lists.items():
            if name in _TWICE_NESTED:
                row[name] = [self._inner[name].one(i) for i in lists.span(index)]
            else:
                row[name] = lists.one(index)
        return cast("CacheRow", row)


_PLAIN_COLUMNS = ("row_id", "prompt_id", "pair_id", "source", "label", "ref_logps")
_TWICE_NESTED = ("kl_completion_ids", "ref_kl_token_logps")


def check_table(table: pa.Table, where: str, *, vocabulary: int | None = None, partners: int | None = None) -> int:
    """Check every rule of the format: counts, finiteness, signs, sums, masses, places, token ids.

    Args:
        table: rows with the columns of `SCHEMA`, and optional ones.
        where: named in errors.
        vocabulary: token ids must be below it; None skips that check.
        partners: mismatched completions that every row must have; None skips that check.

    Returns:
        The largest token id.

    Raises:
        CacheError: naming the first row and the rule it breaks.
    """
    for name in SCHEMA.names:
        missing = 0 if name == "pair_id" else _count_nulls(table.column(name))
        if missing:
            raise CacheError(f"{where}: column {name!r} has {missing} missing values.")
    prompts, completions = _Lists(table, "prompt_ids"), _Lists(table, "completion_ids")
    logps = _Lists(table, "ref_token_logps")
    kl_completions, kl_logps = _Lists(table, "kl_completion_ids"), _Lists(table, "ref_kl_token_logps")
    kl_sums = _Lists(table, "ref_kl_logps")
    if (prompts.lengths == 0).any() or (completions.lengths == 0).any():
        raise CacheError(f"{where}: a row without prompt or completion tokens.")
    _require_equal(where, "ref_token_logps", logps.lengths, completions.lengths)
    _require_equal(where, "ref_kl_token_logps", kl_logps.lengths, kl_completions.lengths)
    _require_equal(where, "ref_kl_logps", kl_sums.lengths, kl_completions.lengths)
    if partners is not None and (kl_completions.lengths != partners).any():
        raise CacheError(f"{where}: a row without its {partners} mismatched completions.")
    inner_ids, inner_logps = kl_completions.inner(), kl_logps.inner()
    _require_equal(where, "ref_kl_token_logps (tokens)", inner_logps.lengths, inner_ids.lengths)
    for name, values in (("ref_token_logps", logps.values), ("ref_kl_token_logps", inner_logps.values)):
        if not np.isfinite(values).all():
            raise CacheError(
                f"{where}: {name} contains {int((~np.isfinite(values)).sum())} values that are not finite."
            )
        if (values > 0).any():
            raise CacheError(f"{where}: {name} contains positive log-probabilities (up to {values.max():g}).")
    _require_sums(where, "ref_logps", numbers(table.column("ref_logps")), logps)
    _require_sums(where, "ref_kl_logps", kl_sums.values, inner_logps)
    _check_masses(table, where)
    _check_places(table, where)
    largest = 0
    for name, ids in (
        ("prompt_ids", prompts),
        ("completion_ids", completions),
        ("kl_completion_ids", inner_ids),
    ):
        if len(ids.values) and (ids.values.min() < 0 or (vocabulary is not None and ids.values.max() >= vocabulary)):
            raise CacheError(
                f"{where}: {name} contains token ids from {ids.values.min()} to {ids.values.max()}, "
                f"outside the vocabulary ({vocabulary} tokens)."
            )
        largest = max(largest, int(ids.values.max(initial=0)))
    return largest


def _check_masses(table: pa.Table, where: str) -> None:
    """Check the optional columns: masses that are finite and not negative, and that agree with the label."""
    optional = optional_columns(table.schema, where)
    if not optional.columns:
        return
    desirable, undesirable = (_mass_column(table.column(name), name, where) for name in MASS_COLUMNS)
    if (desirable + undesirable == 0).any():
        raise CacheError(
            f"{where}: row {_first(desirable + undesirable == 0)} has a desirable and an undesirable mass of 0."
        )
    other = numbers(table.column("label")) != (desirable >= undesirable)
    if other.any():
        row = _first(other)
        raise CacheError(
            f"{where}: label of row {row} does not agree with its masses, {desirable[row]:g} desirable and "
            f"{undesirable[row]:g} undesirable."
        )
    for name in optional.objectives:
        for side in ("desirable", "undesirable"):
            masses = pc.struct_field(table.column(OBJECTIVES), [name, side])
            _mass_column(masses, f"{OBJECTIVES}.{printable(name, 100)}.{side}", where)


def _check_places(table: pa.Table, where: str) -> None:
    if not has_places(table.schema, where):
        return
    places = table.column(PLACE)
    if places.null_count:
        raise CacheError(f"{where}: column {PLACE!r} has {places.null_count} missing values.")
    longest = pc.max(pc.utf8_length(places)).as_py() or 0
    if longest > LONGEST_PLACE:
        raise CacheError(f"{where}: a {PLACE} of {longest:,} characters; the longest has {LONGEST_PLACE}.")


def _mass_column(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    if column.null_count:
        raise CacheError(f"{where}: column {name!r} has {column.null_count} missing values.")
    masses = numbers(column)
    wrong = ~(np.isfinite(masses) & (masses >= 0))
    if wrong.any():
        row = _first(wrong)
        raise CacheError(f"{where}: {name} of row {row} is {masses[row]:g}; a mass is finite and not negative.")
    return masses


def _first(found: np.ndarray) -> int:
    return int(np.flatnonzero(found)[0])


def _count_nulls(column: pa.ChunkedArray) -> int:
    """Return the number of missing values at any depth of a column."""
    count = int(column.null_count)
    if pa.types.is_list(column.type):
        count += sum(_count_nulls(pa.chunked_array([chunk.flatten()])) for chunk in column.chunks)
    return count


def numbers(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return Arrow's numbers or booleans as NumPy's, without a copy where there is one chunk.

    Arrow's own `to_numpy` imports pandas wherever it is installed, which takes 0.3 s at the start of every run.
    """
    if isinstance(array, pa.ChunkedArray):
        chunks = [numbers(chunk) for chunk in array.chunks]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks or [numbers(pa.array([], array.type))])
    if array.null_count:
        return array.to_numpy(zero_copy_only=False)
    kind, values, span = array.type, array.buffers()[1], slice(array.offset, array.offset + len(array))
    if values is None:
        return np.empty(0, dtype=kind.to_pandas_dtype())
    if pa.types.is_boolean(kind):
        return np.unpackbits(np.frombuffer(values, dtype=np.uint8), count=span.stop, bitorder="little")[span].view(bool)
    return np.frombuffer(values, dtype=kind.to_pandas_dtype(), count=span.stop)[span]


class _Lists:
    """A list column as flat values and lengths."""

    def __init__(self, source: pa.Table | pa.Array, name: str = "") -> None:
        array = source.column(name).combine_chunks() if isinstance(source, pa.Table) else source
        if isinstance(array, pa.ChunkedArray):  # an empty table keeps its chunks
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
        self.flat = array.flatten()
        self.lengths = numbers(array.value_lengths()).astype(np.int64)

    @functools.cached_property
    def values(self) -> np.ndarray:
        return numbers(self.flat)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    def inner(self) -> "_Lists":
        return _Lists(self.flat)

    def span(self, index: int) -> range:
        """Return the range of one list's entries in the flat values."""
        end = int(self._ends[index])
        return range(end - int(self.lengths[index]), end)

    def one(self, index: int) -> np.ndarray:
        """Return one list, as a view."""
        span = self.span(index)
        return self.values[span.start : span.stop]

    def sums(self) -> np.ndarray:
        """Return the sum of each list, in float64."""
        sums = np.zeros(len(self.lengths))
        filled = self.lengths > 0  # for an empty list `reduceat` returns the next list's first value
        starts = (np.cumsum(self.lengths) - self.lengths)[filled]
        if len(starts):
            sums[filled] = np.add.reduceat(self.values.astype(np.float64), starts)
        return sums


def _require_equal(where: str, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    if len(found) != len(wanted) or (found != wanted).any():
        row = int(np.flatnonzero(found != wanted)[0]) if len(found) == len(wanted) else 0
        raise CacheError(f"{where}: {name} does not have one score for each token (first at entry {row}).")


def _require_sums(where: str, name: str, found: np.ndarray, tokens: _Lists) -> None:
    wanted = tokens.sums()
    wrong = ~(np.abs(found - wanted) <= _SUM_TOLERANCE * np.maximum(1.0, np.abs(wanted)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise CacheError(f"{where}: {name} of row {row} is {found[row]:.6f}, but its tokens sum to {wanted[row]:.6f}.")
