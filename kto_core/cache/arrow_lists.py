"""Read columns of Arrow as arrays of NumPy: numbers, and lists of them."""

import functools

import numpy as np
import pyarrow as pa


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


class Lists:
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

    def inner(self) -> "Lists":
        return Lists(self.flat)

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
