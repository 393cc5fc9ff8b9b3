"""Read the metadata of columns in the footer of a Parquet file, which may be damaged."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.parquet as pq


def column_chunks(
    file: "pq.ParquetFile", group: int, columns: Sequence[int] | None = None
) -> "list[pq.ColumnChunkMetaData]":
    """Return the metadata of columns in a row group. Nothing is decompressed.

    `RowGroupMetaData.column` of pyarrow catches no exception of C++, so damaged metadata end the process. A reader of the
    same columns parses the same metadata and raises an error. It is asked for batches of no rows, so it decodes no page.

    Args:
        columns: numbers of leaves of the schema; None for all of them.

    Raises:
        OSError, ValueError: damaged metadata.
    """
    leaves = range(file.metadata.num_columns) if columns is None else columns
    if not leaves:  # without columns, Arrow divides by the size of a batch
        return []
    for _ in file.reader.iter_batches(0, [group], leaves, use_threads=False):
        pass
    metadata = file.metadata.row_group(group)
    return [metadata.column(i) for i in leaves]
