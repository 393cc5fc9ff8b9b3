"""Read rows in random order: each row group that is decoded also yields its rows of the coming batches.

A row is stored in a row group of 64, and decoding takes the whole group. An epoch's order is known, so with memory for
W rows in advance, a group of a cache with G groups is decoded once for about 1 + W / G of its rows.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from offline_kto.kto_core.cache.shards import numbers
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.data.shard_files import ShardFiles

# Memory for rows of the coming batches, and for whole row groups that were read out of order, in bytes.
_BYTES_AHEAD, _BYTES_OF_GROUPS = 96 * 2**20, 32 * 2**20

# What a kept row needs beside its numbers, in bytes (as measured): its Python objects.
_BYTES_OF_ROW = 1500

_COLUMNS = [
    *("row_id", "label", "prompt_ids", "completion_ids", "ref_logps", "ref_token_logps"),
    *("kl_completion_ids", "ref_kl_logps", "ref_kl_token_logps"),
]


class StoredRow(NamedTuple):
    """A row as it is stored, with one of its mismatched completions."""

    row_id: str
    label: bool
    matched: ScoredSequence
    mismatched: ScoredSequence

    def copied(self) -> "StoredRow":
        """Return the row with its own memory, so that it does not keep its row group."""
        prompt = self.matched.prompt_ids.copy()
        sequences = (
            ScoredSequence(prompt, one.completion_ids.copy(), one.ref_logps, one.ref_token_logps.copy())
            for one in (self.matched, self.mismatched)
        )
        return StoredRow(self.row_id, self.label, *sequences)

    @property
    def nbytes(self) -> int:
        sequences = (self.matched, self.mismatched)
        arrays = [array for one in sequences for array in (one.completion_ids, one.ref_token_logps)]
        return _BYTES_OF_ROW + self.matched.prompt_ids.nbytes + sum(array.nbytes for array in arrays)


class _Lists:
    """A list column of a row group: views of its values."""

    def __init__(self, array: pa.ListArray) -> None:
        self.inner = array.values
        self._starts = numbers(array.offsets)
        self._values = None if pa.types.is_list(self.inner.type) else numbers(self.inner)

    def span(self, index: int) -> tuple[int, int]:
        return int(self._starts[index]), int(self._starts[index + 1])

    def one(self, index: int) -> np.ndarray:
        start, end = self.span(index)
        assert self._values is not None
        return self._values[start:end]


class _Group:
    """A decoded row group."""

    def __init__(self, table: pa.Table) -> None:
        columns = {name: _one_chunk(table.column(name)) for name in _COLUMNS}
        self.nbytes, self.rows = int(table.nbytes), int(table.num_rows)
        self._row_ids, self._labels = columns["row_id"], numbers(columns["label"])
        self._logps = numbers(columns["ref_logps"])
        self._prompts, self._completions = _Lists(columns["prompt_ids"]), _Lists(columns["completion_ids"])
        self._token_logps, self._kl_logps = _Lists(columns["ref_token_logps"]), _Lists(columns["ref_kl_logps"])
        self._kl_completions, self._kl_token_logps = (
            _Lists(columns["kl_completion_ids"]),
            _Lists(columns["ref_kl_token_logps"]),
        )
        self._kl_ids, self._kl_scores = _Lists(self._kl_completions.inner), _Lists(self._kl_token_logps.inner)

    def row(self, index: int, partner: int) -> StoredRow:
        prompt = self._prompts.one(index)
        at, at_scores = self._kl_completions.span(index)[0] + partner, self._kl_token_logps.span(index)[0] + partner
        matched = ScoredSequence(
            prompt, self._completions.one(index), float(self._logps[index]), self._token_logps.one(index)
        )
        mismatched = ScoredSequence(
            prompt, self._kl_ids.one(at), float(self._kl_logps.one(index)[partner]), self._kl_scores.one(at_scores)
        )
        return StoredRow(self._row_ids[index].as_py(), bool(self._labels[index]), matched, mismatched)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


class _Order:
    """The order in which rows will be read, each once.

    Args:
        rows: int64, shape (rows,).
        groups: the row group of each of them.
        partner: the mismatched completion that all of them are read with.
    """

    def __init__(self, rows: np.ndarray, groups: np.ndarray, partner: int) -> None:
        self.partner, self._rows = partner, rows
        self._by_group = np.argsort(groups, kind="stable").astype(np.int32)
        self._ends = np.cumsum(np.bincount(groups))
        self._places = np.full(int(rows.max(initial=-1)) + 1, -1, dtype=np.int32)
        self._places[rows] = np.arange(len(rows), dtype=np.int32)

    def place_of(self, row: int) -> int:
        """Return when a row is read; -1 if it is not."""
        return int(self._places[row]) if row < len(self._places) else -1

    def coming(self, group: int, after: int, window: int) -> list[int]:
        """Return the rows of a group that are read at one of the next places, the next one first."""
        places = self._by_group[int(self._ends[group - 1]) if group else 0 : int(self._ends[group])]
        first, last = np.searchsorted(places, [after + 1, after + 1 + window])
        return list(map(int, self._rows[places[first:last]]))


class RowReader:
    """Rows of a cache, in any order.

    Args:
        files: the cache's.
    """

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self._lock = threading.Lock()  # the next batch is read in its own thread
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._group_bytes = 0
        self._order: _Order | None = None
        self._kept: dict[int, StoredRow] = {}
        self._kept_bytes = 0
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, rows: np.ndarray, partner: int) -> None:
        """Prepare for reading rows once each, in this order and with this mismatched completion."""
        order = _Order(rows, self._files.groups_of(rows), partner)
        with self._lock:
            self._order, self._kept, self._kept_bytes = order, {}, 0

    def read(self, rows: Sequence[int], partner: int, *, in_order: bool = True) -> list[StoredRow]:
        """Return rows with one of their mismatched completions.

        Args:
            in_order: whether these are the next rows of the order that is expected.

        Raises:
            CacheError: damaged content.
        """
        with self._lock:
            order = self._order if in_order and self._order and self._order.partner == partner else None
            found = {row: self._take(row) for row in rows if order and row in self._kept}
            missing: dict[int, list[int]] = {}
            for row in rows:
                if row not in found:
                    missing.setdefault(self._files.find(row)[0], []).append(row)
            for group, decoded in zip(missing, self._decoded(list(missing)), strict=True):
                first = self._files.first_row(group)
                found.update({row: decoded.row(row - first, partner) for row in missing[group]})
                place = max(map(order.place_of, missing[group])) if order else -1
                if order and place >= 0:
                    self._keep_coming(order, group, decoded, place)
                else:
                    self._keep_group(group, decoded)
        return [found[row] for row in rows]

    def _take(self, row: int) -> StoredRow:
        found = self._kept.pop(row)
        self._kept_bytes -= found.nbytes
        return found

    def _decoded(self, groups: list[int]) -> list[_Group]:
        """Return row groups, from memory if they are there; several are decoded in parallel."""
        unread = [group for group in groups if group not in self._groups]
        if len(unread) < 2:
            results: Iterator[_Group] = map(self._decode, unread)
        else:
            self._pool = self._pool or ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
            results = self._pool.map(self._decode, unread)
        read = dict(zip(unread, results, strict=True))
        return [read[group] if group in read else self._groups[group] for group in groups]

    def _decode(self, group: int) -> _Group:
        return _Group(self._files.read(group, _COLUMNS))

    def _keep_coming(self, order: _Order, group: int, decoded: _Group, after: int) -> None:
        """Keep those rows of a group that are read soon after a place in the order."""
        window = _BYTES_AHEAD // (decoded.nbytes // max(1, decoded.rows) + _BYTES_OF_ROW)
        first = self._files.first_row(group)
        for row in order.coming(group, after, window):
            if self._kept_bytes >= _BYTES_AHEAD:
                break
            if row not in self._kept:
                self._kept[row] = decoded.row(row - first, order.partner).copied()
                self._kept_bytes += self._kept[row].nbytes

    def _keep_group(self, group: int, decoded: _Group) -> None:
        if group not in self._groups:
            self._groups[group] = decoded
            self._group_bytes += decoded.nbytes
        self._groups.move_to_end(group)
        while self._group_bytes > _BYTES_OF_GROUPS and len(self._groups) > 1:
            self._group_bytes -= self._groups.popitem(last=False)[1].nbytes
