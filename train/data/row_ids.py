"""Hold ids as arrays: 16 bytes for each distinct one, and a number for each row."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from offline_kto.kto_core.cache.arrow_lists import numbers
from offline_kto.kto_core.equal_ids import EqualIds, IdIndex, index_type
from offline_kto.kto_core.hashing import ID, hex_ids

# Texts that are Python objects at the same time.
_AT_ONCE = 4096

# Digits of the ids that kto-precompute writes.
_DIGITS = 2 * ID.itemsize


class RowIds:
    """The ids of rows.

    Args:
        column: from `as_ids`.

    Attributes:
        codes: number of each row's id in `distinct`, -1 for none; int32 where it suffices, shape (rows,).
        distinct: the ids in the order of their bytes, which is that of their texts; dtype `hashing.ID`.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        present = numbers(column.is_valid())
        ids = id_array_of(column)[present]
        equal = EqualIds.of(ids)
        self.codes = np.full(len(column), -1, dtype=index_type(len(column)))
        self.codes[present] = equal.numbers()
        self.distinct = ids[equal.order[equal.heads]]

    def texts(self) -> Iterator[str]:
        """Yield the distinct ids as texts."""
        for start in range(0, len(self.distinct), _AT_ONCE):
            yield from hex_ids(self.distinct[start : start + _AT_ONCE])

    def among(self, ids: np.ndarray) -> np.ndarray:
        """Return whether each row's id is among some, bool, shape (rows,)."""
        found = _are_among(self.distinct, np.sort(ids))
        return np.append(found, False)[self.codes]  # the last one is that of rows without an id

    def shared_with(self, others: "RowIds") -> int:
        """Return how many distinct ids also occur among others."""
        return int(_are_among(self.distinct, others.distinct).sum())


def _are_among(ids: np.ndarray, others: np.ndarray) -> np.ndarray:
    return IdIndex(others, np.zeros(len(others), dtype=np.int64)).find(ids) == 0


def as_ids(texts: pa.Array) -> pa.Array:
    """Return texts as ids of 16 bytes, and missing ones as missing.

    The ids of kto-precompute are hashes in hexadecimal digits. Other programs and users may write other texts, which are
    hashed here.
    """
    if not texts.null_count and len(texts):
        offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
        if (np.diff(offsets) == _DIGITS).all():
            whole = _from_digits(texts.buffers()[2][int(offsets[0]) : int(offsets[-1])].to_pybytes())
            if whole is not None:
                return pa.FixedSizeBinaryArray.from_buffers(_TYPE, len(texts), [None, pa.py_buffer(whole)])
    return pa.array([None if text is None else _id_of(text) for text in texts.to_pylist()], _TYPE)


_TYPE = pa.binary(ID.itemsize)


def _from_digits(digits: bytes) -> bytes | None:
    """Return the bytes that lower-case hexadecimal digits stand for; None if they are something else."""
    try:
        found = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return None
    return found if found.hex().encode() == digits else None


def _id_of(text: str) -> bytes:
    whole = _from_digits(text.encode()) if len(text) == _DIGITS else None
    return hashlib.blake2b(text.encode(), digest_size=ID.itemsize).digest() if whole is None else whole


def id_array_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of `as_ids` as an array of dtype `hashing.ID`; missing ids have any value."""
    found = np.empty(len(column), dtype=ID)
    start = 0
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], dtype=ID)[chunk.offset : chunk.offset + len(chunk)]
        found[start : start + len(chunk)] = values
        start += len(chunk)
    return found
