"""Keep the tokenized rows of a plan in a file that is mapped into memory, and what is small of each row in arrays.

The file is an Arrow IPC file of record batches, written while the rows are tokenized. It has no name: the system frees
its space when the process ends, however it ends. Processes that read parts of the data write a file with a name each.
The pages are the system's cache of the disk, which gives them back when memory is scarce; a row takes some 35 bytes of
memory here.
"""

import bisect
import contextlib
import mmap
import operator
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.durable_files import written_to
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import ID, hex_ids, id_array, ids_id
from offline_kto.kto_core.judgements import Judgement, Masses
from offline_kto.precompute.feedback.weights import Judgements

# Limits of a record batch. One batch of strings is decoded at a time.
_ROWS, _TOKENS = 1024, 2**20

_ID = pa.binary(ID.itemsize)
_MASSES = pa.struct([pa.field(name, pa.float64(), nullable=False) for name in Masses._fields])
_SCHEMA = pa.schema(
    [
        pa.field("ids", pa.list_(pa.int32()), nullable=False),  # of the prompt, then of the completion
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("row_id", _ID, nullable=False),
        pa.field("prompt_id", _ID, nullable=False),
        pa.field("completion_id", _ID, nullable=False),  # of the completion before it is truncated
        pa.field("source", pa.int64(), nullable=False),
        pa.field("label", pa.bool_(), nullable=False),
        pa.field("masses", _MASSES, nullable=False),
        pa.field("objectives", pa.map_(pa.string(), _MASSES), nullable=False),
        pa.field("pair_id", pa.string()),
        pa.field("place", pa.string(), nullable=False),
    ]
)

# Columns that are not kept in memory; of the token ids there are views.
_DECODED = ["row_id", "prompt_id", "source", "pair_id", "place"]


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row that will be scored.

    Attributes:
        source: row number in the input, from 0; the two rows of a pair have two numbers.
        prompt_ids: int32.
        full_completion_ids: int32, before it is truncated to fit after this prompt.
        completion_ids: int32, as scored.
        judgement: its masses, with its weight; the label is `judgement.masses.label`.
        place: of its record in the feedback, as error messages name it; rows of one record share it.
    """

    source: int
    row_id: str
    prompt_id: str
    pair_id: str | None
    label: bool
    prompt_ids: np.ndarray
    full_completion_ids: np.ndarray
    completion_ids: np.ndarray
    judgement: Judgement
    place: str


class SpooledFile(NamedTuple):
    """A file of rows that is mapped into memory.

    Attributes:
        rows: number of rows.
        largest_id: of all tokens.
        first_source: what is added to the `source` of its rows.
    """

    mapped: mmap.mmap
    rows: int
    largest_id: int
    first_source: int = 0

    @classmethod
    def open(cls, path: Path, rows: int, largest_id: int, *, first_source: int) -> "SpooledFile":
        """Map a file that a `Spool` has written. Raises: CacheError: it cannot be read."""
        with _on_disk(path.parent), path.open("rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), rows, largest_id, first_source)


class Spool:
    """Writes rows to a file, which is closed at the end of a `with` block; the rows remain mapped.

    Args:
        folder: on the disk that has room for them.
        max_length: tokens of a sequence, to which completions are truncated.
        path: of the file, in that folder; None for a file without a name.

    Raises:
        CacheError: the file cannot be written.
    """

    def __init__(self, folder: Path, max_length: int, *, path: Path | None = None) -> None:
        self._folder, self._max_length = folder, max_length
        self._waiting: list[PlannedRow] = []
        self._tokens = self._written = self._largest_id = 0
        with _on_disk(folder):
            self._file = tempfile.TemporaryFile(dir=folder) if path is None else path.open("w+b")  # noqa: SIM115 (closed by `__exit__`)
            self._writer = pa.ipc.new_file(self._file, _SCHEMA)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported when it was written
            self._file.close()

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def add(self, row: PlannedRow) -> None:
        """Add a row, whose judgement has no weight yet. Raises: CacheError: the file cannot be written."""
        self._waiting.append(row)
        self._tokens += len(row.prompt_ids) + len(row.full_completion_ids)
        if len(self._waiting) >= _ROWS or self._tokens >= _TOKENS:
            self._write()

    def finish(self, factors: np.ndarray | None) -> "PlannedRows":
        """Return the rows.

        Args:
            factors: float64, what the masses of each row are multiplied by; None without weights.

        Raises:
            CacheError: the file cannot be written or mapped.
        """
        return PlannedRows([self.map()], self._max_length, factors)

    def map(self) -> SpooledFile:
        """Return the finished file. Raises: CacheError: it cannot be written or mapped."""
        if self._waiting:
            self._write()
        with _on_disk(self._folder):
            self._writer.close()
            self._file.flush()
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)  # it has a descriptor of its own
        return SpooledFile(mapped, len(self), self._largest_id)

    def _write(self) -> None:
        batch = _batch(self._waiting)
        self._largest_id = max(self._largest_id, int(batch.column("ids").values.to_numpy().max()))
        with _on_disk(self._folder):
            self._writer.write_batch(batch)
        self._written += len(self._waiting)
        self._waiting.clear()
        self._tokens = 0


def _on_disk(folder: Path) -> contextlib.AbstractContextManager[None]:
    return written_to(
        folder,
        CacheError,
        "The tokenized rows are kept there while the command runs. Free space, or name a folder on another disk with TMPDIR.",
    )


def _batch(rows: Sequence[PlannedRow]) -> pa.RecordBatch:
    ids = [side for row in rows for side in (row.prompt_ids, row.full_completion_ids)]
    ends = np.cumsum(np.fromiter(map(len, ids), dtype=np.int32, count=len(ids)), dtype=np.int32)[1::2]
    columns = {
        "ids": pa.ListArray.from_arrays(np.append(np.int32(0), ends), np.concatenate(ids)),
        "prompt_length": [len(row.prompt_ids) for row in rows],
        "row_id": _id_column(row.row_id for row in rows),
        "prompt_id": _id_column(row.prompt_id for row in rows),
        "completion_id": _id_column(ids_id(row.full_completion_ids) for row in rows),
        "source": [row.source for row in rows],
        "label": [row.label for row in rows],
        "masses": [row.judgement.masses for row in rows],
        "objectives": [[*row.judgement.objectives.items()] for row in rows],
        "pair_id": [row.pair_id for row in rows],
        "place": [row.place for row in rows],
    }
    arrays = [
        found if isinstance(found, pa.Array) else pa.array(found, field.type)
        for field, found in ((field, columns[field.name]) for field in _SCHEMA)
    ]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _id_column(ids: Iterable[str]) -> pa.Array:
    found = id_array(ids)
    return pa.FixedSizeBinaryArray.from_buffers(_ID, len(found), [None, pa.py_buffer(found)])


class RowColumns(NamedTuple):
    """The columns `_DECODED` of some rows."""

    rows: range
    row_ids: list[str]
    prompt_ids: list[str]
    sources: list[int]
    pair_ids: list[str | None]
    places: list[str]


class _OpenFile:
    """A mapped file, open.

    Attributes:
        tokens: the whole file as tokens. Arrow aligns the parts of a file to 8 bytes.
    """

    def __init__(self, file: SpooledFile) -> None:
        self.first_source = file.first_source
        self._buffer = pa.py_buffer(file.mapped)
        self.reader = pa.ipc.open_file(pa.BufferReader(self._buffer))
        self.tokens = np.frombuffer(self._buffer, dtype=np.int32, count=self._buffer.size // 4)

    def position(self, values: pa.Array) -> int:
        """Return where the values of an array begin in `tokens`."""
        return int((values.buffers()[1].address - self._buffer.address) // 4)


class PlannedRows(Sequence[PlannedRow]):
    """The rows of a plan. A row is decoded when it is asked for, fastest in order; its ids are views of a mapped file.

    Args:
        files: with the rows, in their order.
        factors: float64, what the masses of each row are multiplied by; None without weights.

    Attributes:
        max_length: tokens of a sequence, to which completions are truncated.
        largest_id: of all tokens.
        prompt_lengths: int32, shape (rows,).
        full_lengths: int32, shape (rows,); tokens of the completions before they are truncated.
        labels: bool, shape (rows,).
        judgements: with the weights.
    """

    def __init__(self, files: Sequence[SpooledFile], max_length: int, factors: np.ndarray | None) -> None:
        self.max_length, self.largest_id = max_length, max(file.largest_id for file in files)
        rows = sum(file.rows for file in files)
        self._starts = np.empty(rows, dtype=np.int64)  # of each row's prompt in the tokens of its file
        self.prompt_lengths, self.full_lengths = np.empty(rows, dtype=np.int32), np.empty(rows, dtype=np.int32)
        self.labels, masses = np.empty(rows, dtype=bool), np.empty((rows, 2))
        self._files = [_OpenFile(file) for file in files]
        self._first_in_files: list[int] = []  # first rows of the files
        self._batches: list[tuple[_OpenFile, int]] = []  # file and number in it of each batch
        self._first_rows: list[int] = []  # of the batches
        names: set[str] = set()
        first = 0
        for file in self._files:
            self._first_in_files.append(first)
            for number in range(file.reader.num_record_batches):
                batch = file.reader.get_batch(number)
                here = slice(first, first + batch.num_rows)
                ids = batch.column("ids")
                offsets = ids.offsets.to_numpy()
                self._starts[here] = file.position(ids.values) + offsets[:-1]
                self.prompt_lengths[here] = batch.column("prompt_length").to_numpy()
                self.full_lengths[here] = np.diff(offsets) - self.prompt_lengths[here]
                self.labels[here] = batch.column("label").to_numpy(zero_copy_only=False)
                for side, values in enumerate(batch.column("masses").flatten()):
                    masses[here, side] = values.to_numpy()
                names.update(batch.column("objectives").keys.unique().to_pylist())
                self._batches.append((file, number))
                self._first_rows.append(first)
                first = here.stop
        self.judgements = Judgements(masses, self._objectives(sorted(names)), factors)
        self._decoded: RowColumns | None = None

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> PlannedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PlannedRow]: ...
    def __getitem__(self, index: int | slice) -> PlannedRow | list[PlannedRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[operator.index(index)]
        return self._row(index, self.columns_with(index))

    def __iter__(self) -> Iterator[PlannedRow]:
        return (self._row(index, columns) for columns in self.columns() for index in columns.rows)

    def columns(self) -> Iterator[RowColumns]:
        """Yield the columns of all rows, some rows at a time."""
        return map(self.columns_with, self._first_rows)

    @property
    def lengths(self) -> np.ndarray:
        """int32, shape (rows,); tokens of the completions as scored."""
        return np.minimum(self.full_lengths, self.max_length - self.prompt_lengths)

    def prompt(self, index: int) -> np.ndarray:
        """Return the prompt's ids, int32."""
        start = self._starts[index]
        return self._tokens_of(index)[start : start + self.prompt_lengths[index]]

    def completion(self, index: int) -> np.ndarray:
        """Return the completion's ids as scored, int32."""
        return self.full_completion(index)[: self.max_length - self.prompt_lengths[index]]

    def full_completion(self, index: int) -> np.ndarray:
        """Return the completion's ids before it is truncated, int32."""
        start = self._starts[index] + self.prompt_lengths[index]
        return self._tokens_of(index)[start : start + self.full_lengths[index]]

    def _tokens_of(self, index: int) -> np.ndarray:
        """Return the tokens of the file with a row."""
        if len(self._files) == 1:
            return self._files[0].tokens
        return self._files[bisect.bisect_right(self._first_in_files, index) - 1].tokens

    def prompts_of(self, rows: np.ndarray) -> pa.ListArray:
        """Return the prompts' ids of some rows."""
        return self._lists(rows, self._starts[rows], self.prompt_lengths[rows])

    def completions_of(self, rows: np.ndarray, room: np.ndarray) -> pa.ListArray:
        """Return the completions' ids of some rows.

        Args:
            room: tokens to which each of them is truncated.
        """
        starts = self._starts[rows] + self.prompt_lengths[rows]
        return self._lists(rows, starts, np.minimum(self.full_lengths[rows], room))

    def _lists(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
        """Return tokens of each row, given where they begin in its file, and their number."""
        ends = np.cumsum(lengths, dtype=np.int64)
        places = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
        files = np.searchsorted(self._first_in_files, rows, side="right") - 1
        tokens = np.empty(len(places), dtype=np.int32)
        for file in np.unique(files).tolist():
            here = np.repeat(files == file, lengths)
            tokens[here] = self._files[file].tokens[places[here]]
        return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), tokens)

    def ids(self, column: Literal["row_id", "prompt_id", "completion_id"]) -> np.ndarray:
        """Return an id of every row, shape (rows,), dtype `ID`; `completion_id` is that of the full completion."""
        found = np.empty(len(self), dtype=ID)
        for first, batch in zip(self._first_rows, self._all_batches(), strict=True):
            found[first : first + batch.num_rows] = _fixed(batch.column(column))
        return found

    def _objectives(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the masses of every row by objective, shape (rows, 2); (0, 0) where one is not judged."""
        found = {name: np.zeros((len(self), 2)) for name in names}
        if found:
            for first, batch in zip(self._first_rows, self._all_batches(), strict=True):
                for index, judged in enumerate(batch.column("objectives").to_pylist(), first):
                    for name, masses in judged:
                        found[name][index] = masses["desirable"], masses["undesirable"]
        return found

    def _all_batches(self) -> Iterator[pa.RecordBatch]:
        return (file.reader.get_batch(number) for file, number in self._batches)

    def columns_with(self, index: int) -> RowColumns:
        """Return the columns of a row and of others around it; the last ones are kept."""
        decoded = self._decoded
        if decoded is None or index not in decoded.rows:
            number = bisect.bisect_right(self._first_rows, index)
            end = self._first_rows[number] if number < len(self._first_rows) else len(self)
            decoded = self._decoded = self.columns_of(range(self._first_rows[number - 1], end))
        return decoded

    def columns_of(self, rows: range) -> RowColumns:
        """Return the columns of some rows, in the order of the plan."""
        first = bisect.bisect_right(self._first_rows, rows.start) - 1
        numbers = range(first, bisect.bisect_left(self._first_rows, rows.stop))
        found = pa.Table.from_batches(map(self._batch_of_plan, numbers))
        found = found.slice(rows.start - self._first_rows[first], len(rows)).combine_chunks()
        row_ids, prompt_ids, *others = found.columns
        return RowColumns(rows, _texts(row_ids), _texts(prompt_ids), *(column.to_pylist() for column in others))

    def _batch_of_plan(self, number: int) -> pa.RecordBatch:
        """Return the columns `_DECODED` of a batch, with sources in all data."""
        file, number_in_file = self._batches[number]
        batch = file.reader.get_batch(number_in_file).select(_DECODED)
        at = _DECODED.index("source")
        return batch.set_column(at, _SCHEMA.field("source"), pc.add(batch.column(at), file.first_source))

    def _row(self, index: int, columns: RowColumns) -> PlannedRow:
        i = index - columns.rows.start
        prompt, full = self.prompt(index), self.full_completion(index)
        return PlannedRow(
            source=columns.sources[i],
            row_id=columns.row_ids[i],
            prompt_id=columns.prompt_ids[i],
            pair_id=columns.pair_ids[i],
            label=bool(self.labels[index]),
            prompt_ids=prompt,
            full_completion_ids=full,
            completion_ids=full[: self.max_length - len(prompt)],
            judgement=self.judgements[index],
            place=columns.places[i],
        )


def _fixed(column: pa.Array) -> np.ndarray:
    return np.frombuffer(column.buffers()[1], dtype=ID, count=len(column), offset=column.offset * ID.itemsize)


def _texts(column: pa.ChunkedArray) -> list[str]:
    return hex_ids(_fixed(column.combine_chunks()))
