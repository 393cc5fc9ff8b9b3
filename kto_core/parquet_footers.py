"""Read the metadata of columns in the footer of a Parquet file, which may be damaged."""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.parquet as pq


def column_chunks(
    file: "pq.ParquetFile", size: int, columns: Sequence[int] | None = None
) -> "Iterator[list[pq.ColumnChunkMetaData]]":
    """Yield the metadata of columns, a row group at a time. No page is read.

    `RowGroupMetaData.column` of pyarrow catches no exception of C++, so damaged metadata end the process. A reader that
    buffers ahead parses the same metadata of all row groups before it reads, and raises an error. It is asked for batches
    of no rows, of a file without content.

    Args:
        size: of the file, bytes.
        columns: numbers of leaves of the schema; None for all of them.

    Raises:
        OSError, ValueError: damaged metadata.
    """
    import pyarrow.parquet as pq

    metadata = file.metadata
    groups, leaves = range(metadata.num_row_groups), range(metadata.num_columns) if columns is None else columns
    if groups and leaves:  # without columns, Arrow divides by the size of a batch
        hollow = pq.ParquetFile(_Hollow(size), metadata=metadata, pre_buffer=True)
        for _ in hollow.reader.iter_batches(0, groups, leaves, use_threads=False):
            pass
    for number in groups:
        group = metadata.row_group(number)
        yield [group.column(i) for i in leaves]


class _Hollow(io.RawIOBase):
    """A file of a certain size that has zeros everywhere."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        found = bytes(left if size < 0 else min(size, left))
        self._at += len(found)
        return found
