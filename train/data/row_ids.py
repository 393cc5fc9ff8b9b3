"""Hold a column of ids as numbers: equal ids have equal numbers, and each distinct text is kept once."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.cache.shards import numbers

# Texts that are Python objects at the same time.
_AT_ONCE = 4096

# Characters of the ids that kto-precompute writes.
_LENGTH = 32


_Id = TypeVar("_Id", str, str | None)


class RowIds(Sequence[_Id]):
    """The ids of rows.

    Attributes:
        codes: number of each row's id in `distinct`, -1 for none, shape (rows,).
        distinct: the ids, in the order in which they occur first.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        encoded = column.dictionary_encode().combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # an empty column keeps its chunks
            encoded = pa.array([], column.type).dictionary_encode()
        self.codes, self.distinct = numbers(encoded.indices.fill_null(-1)), encoded.dictionary

    def texts(self) -> Iterator[str]:
        """Yield the distinct ids."""
        for start in range(0, len(self.distinct), _AT_ONCE):
            yield from self.distinct.slice(start, _AT_ONCE).to_pylist()

    def among(self, ids: pa.Array) -> np.ndarray:
        """Return whether each row's id is among some, bool, shape (rows,)."""
        found = numbers(pc.is_in(self.distinct, value_set=ids))
        return np.append(found, False)[self.codes]  # the last one is that of rows without an id

    def shared_with(self, others: "RowIds[str]") -> int:
        """Return how many distinct ids also occur among others."""
        return int(pc.sum(pc.is_in(self.distinct, value_set=others.distinct)).as_py() or 0)

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> _Id: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Id]: ...
    def __getitem__(self, index: int | slice) -> _Id | list[_Id]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        code = int(self.codes[index])
        return cast("_Id", None if code < 0 else self.distinct[code].as_py())


def sortable(column: pa.ChunkedArray) -> np.ndarray:
    """Return ids as `equal_rows` takes them: their own bytes if all have the length of a hash, otherwise numbers."""
    ids = column.combine_chunks()
    if isinstance(ids, pa.ChunkedArray) or not len(ids):
        return np.empty(0, dtype=np.int64)
    offsets = np.frombuffer(ids.buffers()[1], dtype=np.int32)[ids.offset : ids.offset + len(ids) + 1]
    if ids.null_count or (np.diff(offsets) != _LENGTH).any():
        return RowIds[str](column).codes.astype(np.int64)
    return np.frombuffer(ids.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]].view(f"S{_LENGTH}")
