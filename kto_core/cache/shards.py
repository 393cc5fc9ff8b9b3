"""Write and read the Parquet shards of the reference cache, format 1.

A shard is written to a temporary file, closed, read back and checked, then renamed. A name that ends in `.parquet` is
therefore always a complete file.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.row_schema import SCHEMA, CacheRow, has_places, optional_columns, schema_of
from offline_kto.kto_core.durable_files import replacing
from offline_kto.kto_core.errors import CacheError, said_by
from offline_kto.kto_core.parquet_footers import column_chunks

# Rows are read in random order during training: small groups keep such a read small.
_ROWS_PER_GROUP = 64

# Size in bytes below which packing is not checked; largest compression ratio of a row group; longest text in a shard.
_SMALL, _MOST_PACKED, _LONGEST_ID = 2**24, 500, 256

METADATA_KEY = b"kto"

# What to do when a file of a cache cannot be written.
WRITE_AGAIN = "Finished shards are kept: make room there, or correct its permissions, and run again to continue."


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
        raise CacheError(f"{path}: cannot be written: {error}. {WRITE_AGAIN}") from error


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


def check_packing(path: Path, file: pq.ParquetFile) -> list[int]:
    """Refuse a shard that decompresses to far more than its size, which could exhaust memory.

    Returns:
        About the size in memory of each row group, bytes.

    Raises:
        CacheError: naming the file.
    """
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    lists = [i for i, leaf in enumerate(leaves) if "." in leaf]
    sizes = []
    try:
        for number, chunks in enumerate(column_chunks(file, path.stat().st_size)):
            group = file.metadata.row_group(number)
            values = [chunks[i].num_values for i in lists]
            suspects = [chunks[i] for i, count in zip(lists, values, strict=True) if 4 * count > _SMALL]
            if group.num_rows * group.total_byte_size > 64 * _SMALL:  # the worst case: one text, repeated in each row
                suspects = chunks
            for chunk in suspects:
                _check_packing_of(chunk, path)
            sizes.append(max(group.total_byte_size, 4 * sum(values)))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    return sizes


def _check_packing_of(chunk: pq.ColumnChunkMetaData, path: Path) -> None:
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
