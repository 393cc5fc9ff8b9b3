"""Read the row groups of a cache's shards; the files stay open, and few of their footers stay in memory."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offline_kto.train.data.verified_file import VerifiedFile

# Memory for parsed footers, and what one needs for each column of a row group, in bytes (as measured).
_BYTES_OF_FOOTERS, _BYTES_OF_CHUNK = 8 * 2**20, 900

# Row groups read together when a whole column is read.
_GROUPS_AT_ONCE = 16

# Row groups in a block: with 64 rows each, those of a shard of the usual size.
_GROUPS_OF_BLOCK = 64


class ShardFiles:
    """The open shards of a cache.

    Row groups are numbered through all of them, and so are rows, and blocks: neighbouring row groups of one shard.

    Args:
        shards: in their order.
        groups: rows of each of their row groups.
    """

    def __init__(self, shards: Sequence[VerifiedFile], groups: Sequence[Sequence[int]]) -> None:
        self._shards = list(shards)
        self._first_groups = np.cumsum([0, *map(len, groups)])
        self._ends = np.cumsum(np.concatenate([np.asarray(of_shard, dtype=np.int64) for of_shard in groups]))
        firsts = [np.arange(*span, _GROUPS_OF_BLOCK) for span in itertools.pairwise(self._first_groups.tolist())]
        self._block_ends = self.first_rows(np.append(np.concatenate(firsts)[1:], len(self._ends)))
        self._footers = _Footers(self._shards)

    @property
    def group_count(self) -> int:
        return len(self._ends)

    @property
    def block_count(self) -> int:
        return len(self._block_ends)

    def blocks_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the block of each row, shape (rows,)."""
        return np.searchsorted(self._block_ends, rows, side="right")

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the row group of each row, shape (rows,)."""
        return np.searchsorted(self._ends, rows, side="right")

    def find(self, row: int) -> tuple[int, int]:
        """Return a row's group and its position there."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        return group, row - self.first_row(group)

    def first_row(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0

    def first_rows(self, groups: np.ndarray) -> np.ndarray:
        """Return the first row of each row group, or of the end for the number after the last."""
        return np.where(groups > 0, self._ends[groups - 1], 0)

    def sizes(self, groups: np.ndarray) -> np.ndarray:
        """Return the number of rows in each row group."""
        return self._ends[groups] - self.first_rows(groups)

    def read(self, group: int, columns: list[str], *, keep: bool = True) -> pa.Table:
        """Read some columns of a row group.

        Args:
            keep: keep the footer of its shard in memory, for further reads.

        Raises:
            CacheError: damaged or changed content.
        """
        shard = self._shard_of(group)
        position = group - int(self._first_groups[shard])
        with self._footers.of(shard) if keep else _File(self._shards[shard]) as file:
            (table,) = self._shards[shard].tables(file, columns, groups=[position])
        return table

    def _shard_of(self, group: int) -> int:
        return int(np.searchsorted(self._first_groups, group, side="right")) - 1

    def pieces(
        self, groups: np.ndarray, columns: list[str], *, most_bytes: int
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Read some columns of row groups of one shard, and yield as many together as fit into some memory.

        Args:
            groups: sorted.
            most_bytes: of a table with more than one row group.

        Raises:
            CacheError: damaged or changed content.
        """
        number = self._shard_of(int(groups[0]))
        shard, positions = self._shards[number], (groups - self._first_groups[number]).tolist()
        with _File(shard) as file:
            start, together = 0, 1
            while start < len(groups):
                some = slice(start, start + together)
                (table,) = shard.tables(file, columns, groups=positions[some], at_once=together)
                yield groups[some], table
                start += together
                together = max(1, most_bytes * len(groups[some]) // max(1, table.nbytes))

    def column(self, name: str, summary: Callable[[pa.Array], pa.Array]) -> pa.ChunkedArray:
        """Read a column of all shards, and summarize it chunk by chunk. Raises: CacheError: damaged or changed content."""
        return pa.chunked_array(
            [summary(chunk) for table in self.tables([name]) for chunk in table.column(name).chunks]
        )

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Yield some columns of all rows, a few row groups at a time. Raises: CacheError: damaged or changed content."""
        for shard in self._shards:
            yield from shard.tables(shard.parsed(), columns, at_once=_GROUPS_AT_ONCE)


class _File:
    """A shard with its parsed footer, for one thread at a time."""

    def __init__(self, shard: VerifiedFile) -> None:
        self._lock = threading.Lock()
        self._file = shard.parsed()
        metadata = self._file.metadata
        self.nbytes = metadata.num_row_groups * metadata.num_columns * _BYTES_OF_CHUNK

    def __enter__(self) -> pq.ParquetFile:
        self._lock.acquire()
        return self._file

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class _Footers:
    """The shards that were read last."""

    def __init__(self, shards: Sequence[VerifiedFile]) -> None:
        self._shards, self._lock = shards, threading.Lock()
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._bytes = 0

    def of(self, shard: int) -> _File:
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        file = _File(self._shards[shard])  # two threads may do so at once, and the first one's is kept
        with self._lock:
            if shard not in self._files:
                self._files[shard] = file
                self._bytes += file.nbytes
            while self._bytes > _BYTES_OF_FOOTERS and len(self._files) > 1:
                self._bytes -= self._files.popitem(last=False)[1].nbytes
            return file
