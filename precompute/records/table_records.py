"""Read records of CSV, TSV and Parquet files."""

import csv
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING

from offline_kto.kto_core.errors import FeedbackError, said_by
from offline_kto.kto_core.feedback.columns import CONVERSATIONS
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.parquet_footers import column_chunks
from offline_kto.precompute.records.class_names import ClassNames
from offline_kto.precompute.records.text_files import (
    COPY_AGAIN,
    LARGEST_RECORD,
    MOST_PACKED,
    TOO_LARGE,
    Located,
    Record,
    lines_of,
    readable,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# What separates the columns of tables, and how Excel says it on a line of its own.
_DELIMITERS = (",", ";", "\t")
_QUOTED = re.compile(r'"[^"]*"')
_EXCEL_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?', re.IGNORECASE)

_BATCH_ROWS = 256
# Bytes of a column read at a time while only its metadata are wanted.
_BUFFER = 4096
# The value of a column that was not requested.
NOT_READ = "(not read)"
_MESSAGES_NOT_READ = [{"role": NOT_READ}]

# The log of Gradio's ChatInterface names five columns and writes four: its "value" is missing.
_GRADIO_HEADER = ["conversation", "index", "value", "flag", "timestamp"]
_GRADIO_ROW = ["conversation", "index", "flag", "timestamp"]

# Values of one column in a row group: a billion of them may be compressed into a few bytes.
_MOST_VALUES = 2**27
# Bytes of one value as a Python object, at the least.
_OBJECT = 64


def read_csv(handle: IO[bytes], name: str, delimiter: str = ",") -> Iterator[Located]:
    # The default of 131,072 characters is less than a long answer. The limit is global, so it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_RECORD))
    delimiter, skipped, spaced = _delimiter(handle, name, delimiter)
    rows = itertools.dropwhile(lambda row: row[0] <= skipped, _csv_rows(handle, name, delimiter, spaced=spaced))
    unnamed: list[int] = []
    columns: list[str] | None = None
    for line, cells in rows:
        where = f"{name}:{line}"
        if columns is None:
            columns = _csv_header(cells, where, delimiter)
            unnamed = [number for number, column in enumerate(columns) if column == ""]
        elif columns == _GRADIO_HEADER and len(cells) == len(_GRADIO_ROW):
            yield where, _named(_GRADIO_ROW, cells)
        elif not any(map(str.strip, cells)):
            yield where, dict.fromkeys(filter(None, columns))
        elif len(cells) != len(columns):
            raise FeedbackError(
                f"{where}: {len(cells)} cells under a header of {len(columns)}. The file is truncated, or a"
                " cell with a delimiter or a line break is not in quotes."
            )
        else:
            record = _named(columns, cells)
            record.update(
                (f"(column {number + 1})", cells[number])
                for number in unnamed
                if cells[number].strip() and not (number == 0 and cells[0].isdecimal())  # the index of pandas
            )
            yield where, record


def _named(columns: Iterable[str], cells: list[str]) -> Record:
    """Return the cells by column, empty ones as None."""
    return {column: cell or None for column, cell in zip(columns, cells, strict=True) if column != ""}


def _delimiter(handle: IO[bytes], name: str, usual: str) -> tuple[str, int, bool]:
    """Return (what separates the columns, number of lines before the header, whether a space follows each separator).

    A header without the usual delimiter that has another one is separated by that: Excel writes semicolons in many
    countries, tabs in its Unicode text, and may begin a file with "sep=;".
    """
    first = next(lines_of(handle, name), "").strip("\r\n")
    handle.seek(0)
    said = _EXCEL_SEPARATOR.fullmatch(first)
    if said is not None:
        return said[1], 1, False
    bare = _QUOTED.sub("", first)
    others = [mark for mark in _DELIMITERS if mark in bare]
    mark = others[0] if usual not in bare and len(others) == 1 else usual
    after = bare.split(mark)[1:]
    return mark, 0, bool(after) and all(text.startswith(" ") for text in after)


def _csv_rows(handle: IO[bytes], name: str, delimiter: str, *, spaced: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it begins, cells) for each row that is not blank."""
    size = 0

    def counted() -> Iterator[str]:
        nonlocal size
        for text in lines_of(handle, name):
            size += len(text)
            if size > LARGEST_RECORD:  # also a row of many cells on several lines
                raise FeedbackError(f"{name}:{line}: a row of more than {LARGEST_RECORD // 2**20} MiB. {TOO_LARGE}")
            yield text

    reader = csv.reader(counted(), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    while True:
        line, size = reader.line_num + 1, 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _bad_csv(error, f"{name}:{line}") from None
        if cells is None:
            return
        if cells != []:
            yield line, cells


def _bad_csv(error: csv.Error, where: str) -> FeedbackError:
    reason = str(error)
    if "unexpected end of data" in reason:
        return FeedbackError(
            f"{where}: a quote is opened and never closed. The file is truncated, or there is one quote too many"
            " (inside a cell, write it twice)."
        )
    if "new-line character" in reason:
        return FeedbackError(
            f"{where}: a carriage return outside of quotes. Put the cell in quotes, or end lines with \\n."
        )
    return FeedbackError(f"{where}: not readable as a table ({said_by(error)}). Repair the row's quotes.")


# What separates columns in tables that are no CSV.
_OTHER_MARKS = ("|", "^", "~")


def _csv_header(cells: list[str], where: str, delimiter: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    named = [column for column in columns if column != ""]  # pandas writes its index without a column name
    if len(named) < 2 and columns[0].lower() not in CONVERSATIONS:  # whose messages may have labels of their own
        expected = "tabs" if delimiter == "\t" else "commas"
        mark = next((f', with "{one}" between words' for one in _OTHER_MARKS if one in columns[0]), "")
        raise FeedbackError(
            f"{where}: the header is the single column {quoted(columns[0])}{mark}. Separate columns by {expected}."
        )
    _refuse_twins(named, where)
    return columns


def _refuse_twins(columns: Collection[str], where: str) -> None:
    """Refuse columns with the same name: a record would only have the last. Raises: FeedbackError: two have."""
    column, count = Counter(columns).most_common(1)[0] if columns else ("", 0)
    if count > 1:
        raise FeedbackError(f"{where}: two columns have the name {quoted(column)}. Rename one of them.")


def read_parquet(path: Path, name: str, columns: Collection[str] | None = None) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with readable(name), path.open("rb") as handle:
        try:
            schema = pq.ParquetFile(handle).schema_arrow
            names, named = schema.names, ClassNames.of_schema(schema.metadata)
            wanted = [column for column in names if columns is None or column in columns] or names
            _refuse_twins(wanted, name)
            unread = {
                name: _MESSAGES_NOT_READ if _are_messages(schema.field(name).type) else NOT_READ
                for name in names
                if name not in wanted
            }
            size, most = 0, LARGEST_RECORD + MOST_PACKED * path.stat().st_size
            for batch in _batches(handle, wanted, name):
                size += _size(batch)
                if size > most:
                    raise FeedbackError(f"{name}: unpacks to more than {MOST_PACKED} times its size. {COPY_AGAIN}")
                for row in _rows_of(batch, f"{name}: after row {number}"):
                    number += 1
                    yield f"{name}: row {number}", {**named.record(without_nulls(row)), **unread}
        except MemoryError:  # Arrow's is one too
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise FeedbackError(
                f"{name}: not readable as Parquet after row {number} ({said_by(error)}). {COPY_AGAIN}"
            ) from error


def _are_messages(kind: "pa.DataType") -> bool:
    """Return whether a column has lists of messages."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    return any(field.name in ("role", "from") for field in kind.value_type)


def _batches(handle: IO[bytes], columns: list[str], name: str) -> Iterator["pa.RecordBatch"]:
    """Yield batches of rows in which each text is stored once, however often it is repeated.

    Raises:
        FeedbackError: the sizes in the file's metadata are larger than those of any real records.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=_BUFFER)
    leaves = [file.schema.column(i) for i in range(len(file.schema))]
    repeated = [
        leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"
    ]
    wanted = [i for i, leaf in enumerate(leaves) if leaf.path.split(".")[0] in columns]
    for chunks in column_chunks(file, handle.seek(0, os.SEEK_END), wanted):
        for chunk in chunks:
            if _is_bomb(chunk):
                raise FeedbackError(
                    f"{name}: column '{chunk.path_in_schema}' unpacks to {chunk.num_values:,} values and "
                    f"{chunk.total_uncompressed_size:,} bytes in one row group. {TOO_LARGE}"
                )
    file = pq.ParquetFile(handle, read_dictionary=repeated)
    yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)


def _is_bomb(chunk: "pq.ColumnChunkMetaData") -> bool:
    """Return whether a column of a row group expands to more than any real data, as in a decompression bomb."""
    size = chunk.total_uncompressed_size
    packed = size > 4 * LARGEST_RECORD and size > MOST_PACKED * chunk.total_compressed_size
    return bool(packed or chunk.num_values > _MOST_VALUES or size > LARGEST_RECORD * max(1, chunk.num_values))


def _rows_of(batch: "pa.RecordBatch", where: str) -> Iterator[Record]:
    """Yield the rows of a batch, converted one by one if together they would take much memory.

    Raises:
        FeedbackError: a row that is too large.
    """
    if _size(batch) <= LARGEST_RECORD:
        yield from batch.to_pylist()
        return
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        if _size(row) > LARGEST_RECORD:
            raise FeedbackError(f"{where}: a row of more than {LARGEST_RECORD // 2**20} MiB. {TOO_LARGE}")
        yield from row.to_pylist()


def _size(batch: "pa.RecordBatch") -> int:
    """Return about how many bytes a batch takes as Python objects."""
    return sum(_array_size(column) for column in batch.columns)


def _array_size(array: "pa.Array") -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0) + _OBJECT * len(array)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _array_size(array.flatten()) + _OBJECT * len(array)
    if pa.types.is_map(kind):
        ends = array.offsets
        inside = slice(ends[0].as_py(), ends[-1].as_py())
        return _array_size(array.keys[inside]) + _array_size(array.items[inside]) + _OBJECT * len(array)
    if pa.types.is_struct(kind):
        return sum(map(_array_size, array.flatten())) + _OBJECT * len(array)
    return int(array.nbytes) + _OBJECT * len(array)


def without_nulls(row: Record) -> Record:
    """Return `row` without the nested keys that are only there because other rows of the column have them.

    Decimal numbers become int or float, as in JSON.
    """
    return {key: _pruned(value) for key, value in row.items()}


def _pruned(value: object) -> object:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    return value
