"""Read rows in random order: a block of row groups that is decoded also yields its rows of the coming batches.

A row is stored in a row group of 64, and decoding takes the whole group. An epoch's order is known, so all rows of a block
that are read soon are taken at once, and wait in a table of their own. With memory for W rows in advance, a group of a cache
of N rows is decoded once for about 64 W / N of its rows.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.cache.arrow_lists import numbers
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.data.shard_files import ShardFiles

# Memory for rows of the coming batches, for whole row groups that were read out of order, and for what one thread decodes
# at a time, in bytes.
_BYTES_AHEAD, _BYTES_OF_GROUPS, _BYTES_DECODED = 48 * 2**20, 8 * 2**20, 4 * 2**20

# Bytes of a row before one was read: so large that few are taken.
_LARGE_ROW = 16 * 2**10

_COLUMNS = [
    *("row_id", "label", "prompt_ids", "completion_ids", "ref_logps", "ref_token_logps"),
    *("kl_completion_ids", "ref_kl_logps", "ref_kl_token_logps"),
]
_OF_PARTNERS = [name for name in _COLUMNS if "kl_" in name]


class StoredRow(NamedTuple):
    """A row as it is stored, with one of its mismatched completions."""

    row_id: str
    label: bool
    matched: ScoredSequence
    mismatched: ScoredSequence


class _Lists:
    """A list column: views of its values."""

    def __init__(self, array: pa.ListArray) -> None:
        self._starts, self._values = numbers(array.offsets), numbers(array.values)

    def one(self, index: int) -> np.ndarray:
        return self._values[int(self._starts[index]) : int(self._starts[index + 1])]


class _Decoded:
    """Decoded rows with one of their mismatched completions; rows that it returns are views."""

    def __init__(self, table: pa.Table) -> None:
        columns = {name: _one_chunk(table.column(name)) for name in _COLUMNS}
        self.nbytes = int(table.nbytes)
        self._row_ids, self._labels = columns["row_id"], numbers(columns["label"])
        self._logps, self._kl_logps = numbers(columns["ref_logps"]), numbers(columns["ref_kl_logps"])
        self._prompts, self._completions, self._token_logps, self._kl_completions, self._kl_token_logps = (
            _Lists(columns[name])
            for name in ("prompt_ids", "completion_ids", "ref_token_logps", "kl_completion_ids", "ref_kl_token_logps")
        )

    def row(self, index: int) -> StoredRow:
        prompt = self._prompts.one(index)
        matched = ScoredSequence(
            prompt, self._completions.one(index), float(self._logps[index]), self._token_logps.one(index)
        )
        mismatched = ScoredSequence(
            prompt, self._kl_completions.one(index), float(self._kl_logps[index]), self._kl_token_logps.one(index)
        )
        return StoredRow(self._row_ids[index].as_py(), bool(self._labels[index]), matched, mismatched)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _with_partner(table: pa.Table, partner: int) -> pa.Table:
    """Return a table with one mismatched completion of each row in place of the list of all."""
    for name in _OF_PARTNERS:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pc.list_element(table.column(name), partner))
    return table


class _Order:
    """The order in which rows will be read, each once.

    Args:
        rows: positions in the cache, shape (rows,).
        blocks: the block of each of them.
        partner: the mismatched completion that all of them are read with.

    Attributes:
        visits: how many blocks were decoded for it.
    """

    def __init__(self, rows: np.ndarray, blocks: np.ndarray, partner: int) -> None:
        self.partner, self.visits, self._rows = partner, 0, rows
        self._by_block = np.argsort(blocks, kind="stable").astype(np.int32)
        self._ends = np.cumsum(np.bincount(blocks))

    def coming(self, block: int, row: int, window: int) -> np.ndarray:
        """Return a row of a block and those that are read within a number of places after it; sorted."""
        if block >= len(self._ends):
            return np.array([row])
        places = self._by_block[int(self._ends[block - 1]) if block else 0 : int(self._ends[block])]
        rows = self._rows[places]
        first = int(np.argmax(rows == row)) if len(rows) else 0
        if not len(rows) or rows[first] != row:  # not in the order
            return np.array([row])
        last = int(np.searchsorted(places, int(places[first]) + window, side="right"))
        return np.sort(rows[first:last])


class _Waiting(NamedTuple):
    """Rows of a block that are read soon, and their positions in the cache, sorted."""

    rows: np.ndarray
    decoded: _Decoded

    def find(self, row: int) -> StoredRow | None:
        at = int(np.searchsorted(self.rows, row))
        return self.decoded.row(at) if at < len(self.rows) and self.rows[at] == row else None


class RowReader:
    """Rows of a cache, in any order.

    Args:
        files: the cache's.
    """

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self._lock = threading.Lock()  # the next batch is read in its own thread
        self._groups: OrderedDict[tuple[int, int], _Decoded] = OrderedDict()
        self._group_bytes = 0
        self._order: _Order | None = None
        self._waiting: dict[int, _Waiting] = {}  # by block; an epoch visits a block again when all of them were read
        self._row_bytes: dict[int, float] = {}  # of the rows that waited last, by block
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, rows: np.ndarray, partner: int) -> None:
        """Prepare for reading rows once each, in this order and with this mismatched completion."""
        order = _Order(rows, self._files.blocks_of(rows), partner)
        with self._lock:
            self._order, self._waiting = order, {}

    def expect_nothing(self) -> None:
        """Release the rows that were read ahead."""
        with self._lock:
            self._order, self._waiting = None, {}

    def read(self, rows: Sequence[int], partner: int, *, in_order: bool = True) -> list[StoredRow]:
        """Return rows with one of their mismatched completions.

        Args:
            in_order: whether these are the next rows of the order that is expected.

        Raises:
            CacheError: damaged content.
        """
        with self._lock:
            order = self._order
            if not in_order or order is None or order.partner != partner:
                return [self._read_alone(row, partner) for row in rows]
            return self._read_next(rows, order)

    def read_together(self, rows: Sequence[int], partner: int) -> list[StoredRow]:
        """Return rows that keep nothing else of their row groups in memory.

        Raises:
            CacheError: damaged content.
        """
        blocks = self._files.blocks_of(np.asarray(rows))
        wanted = {int(block): np.unique(np.asarray(rows)[blocks == block]) for block in np.unique(blocks)}
        with self._lock:
            decoded = self._decoded(wanted, partner)
        found = (decoded[block].find(row) for row, block in zip(rows, blocks.tolist(), strict=True))
        return [stored for stored in found if stored is not None]

    def _read_next(self, rows: Sequence[int], order: _Order) -> list[StoredRow]:
        blocks = self._files.blocks_of(np.asarray(rows)).tolist()
        found = [
            self._waiting[block].find(row) if block in self._waiting else None
            for row, block in zip(rows, blocks, strict=True)
        ]
        # A block is decoded for the first of its rows that is missing; the others are mostly read with it.
        while None in found:
            first: dict[int, int] = {}
            for row, block, stored in zip(rows, blocks, found, strict=True):
                if stored is None:
                    first.setdefault(block, row)
            wanted = {block: order.coming(block, row, self._window(block, order)) for block, row in first.items()}
            self._waiting.update(self._decoded(wanted, order.partner))
            for number, (row, block) in enumerate(zip(rows, blocks, strict=True)):
                if found[number] is None:
                    found[number] = self._waiting[block].find(row)
        return [stored for stored in found if stored is not None]

    def _window(self, block: int, order: _Order) -> int:
        """Return how many places ahead a block is read, so that the waiting rows of all blocks fill the memory for them."""
        order.visits += 1
        latest = next(reversed(self._row_bytes.values()), _LARGE_ROW)
        # The first time, a few rows of the first blocks and more of the later ones: otherwise all blocks would be read at the
        # beginning, and from then on again at the same time.
        share = min(1.0, order.visits / self._files.block_count)
        return int(share * _BYTES_AHEAD / self._row_bytes.get(block, latest))

    def _decoded(self, wanted: Mapping[int, np.ndarray], partner: int) -> dict[int, _Waiting]:
        """Return rows of several blocks, which are decoded in parallel."""

        def decode(rows: np.ndarray) -> _Waiting:
            return _Waiting(rows, self._decode(rows, partner))

        if len(wanted) < 2:
            results: Iterator[_Waiting] = map(decode, wanted.values())
        else:
            self._pool = self._pool or ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
            results = self._pool.map(decode, wanted.values())
        found = dict(zip(wanted, results, strict=True))
        self._row_bytes.update({block: one.decoded.nbytes / len(one.rows) for block, one in found.items()})
        return found

    def _decode(self, rows: np.ndarray, partner: int) -> _Decoded:
        """Return rows of one shard, in ascending order."""
        groups = self._files.groups_of(rows)
        tables = []
        for some, table in self._files.pieces(np.unique(groups), _COLUMNS, most_bytes=_BYTES_DECODED):
            inside = slice(*np.searchsorted(groups, [some[0], some[-1] + 1]))
            firsts = self._files.first_rows(some)
            begins = np.cumsum(self._files.sizes(some)) - self._files.sizes(some)
            at = np.searchsorted(some, groups[inside])
            tables.append(_with_partner(table.take(pa.array(rows[inside] - firsts[at] + begins[at])), partner))
        return _Decoded(pa.concat_tables(tables))

    def _read_alone(self, row: int, partner: int) -> StoredRow:
        """Return a row of a group that is kept, because the next one is often asked for next."""
        group, at = self._files.find(row)
        decoded = self._groups.pop((group, partner), None)
        if decoded is None:
            decoded = _Decoded(_with_partner(self._files.read(group, _COLUMNS), partner))
            self._group_bytes += decoded.nbytes
        self._groups[group, partner] = decoded
        while self._group_bytes > _BYTES_OF_GROUPS and len(self._groups) > 1:
            self._group_bytes -= self._groups.popitem(last=False)[1].nbytes
        return decoded.row(at)
