"""Records of CSV, TSV and Parquet files."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kto_core.errors import FeedbackError, said_by
from kto_core.feedback_formats import quoted
from precompute.text_files import COPY_AGAIN, Located, Record, lines_of, readable

_BATCH_ROWS = 256


def read_csv(handle: IO[bytes], name: str, delimiter: str = ",") -> Iterator[Located]:
    # The default of 131,072 characters is less than a long answer. It belongs to the process: only raise it.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    rows = _csv_rows(handle, name, delimiter)
    columns: list[str] | None = None
    for line, cells in rows:
        where = f"{name}:{line}"
        if columns is None:
            columns = _csv_header(cells, where, delimiter)
        elif len(cells) != len(columns):
            raise FeedbackError(
                f"{where}: {len(cells)} cells under a header of {len(columns)}. The file is cut off, or a"
                " cell with a delimiter or a line break is not in quotes."
            )
        else:
            named = zip(columns, cells, strict=True)
            yield where, {column: _cell(cell, column, where) for column, cell in named if column != ""}


def _csv_rows(handle: IO[bytes], name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line it begins on, cells) for each row that is not blank."""
    reader = csv.reader(lines_of(handle, name), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
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
            f"{where}: a quote is opened and never closed. The file is cut off, or the quote is one too many"
            " (inside a cell, write it twice)."
        )
    if "new-line character" in reason:
        return FeedbackError(
            f"{where}: a carriage return outside of quotes. Put the cell in quotes, or end lines with \\n."
        )
    return FeedbackError(f"{where}: not readable as a table ({said_by(error)}). Repair the row's quotes.")


def _csv_header(cells: list[str], where: str, delimiter: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    named = [column for column in columns if column != ""]  # pandas writes its index under no name
    if len(named) < 2:
        expected = "tabs" if delimiter == "\t" else "commas"
        raise FeedbackError(
            f"{where}: the header is the single column {quoted(columns[0])}. Separate columns by {expected}."
        )
    column, count = Counter(named).most_common(1)[0]
    if count > 1:
        raise FeedbackError(f"{where}: two columns have the name {quoted(column)}. Rename one of them.")
    return columns


def _cell(cell: str, column: str, where: str) -> Any:
    """None for an empty cell; the value of a JSON list in the columns that can hold nothing else."""
    if cell == "":
        return None
    if column not in ("messages", "conversations") or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise FeedbackError(
            f"{where}: '{column}' is not valid JSON, got {quoted(cell)}. Write it with json.dumps, not str."
        ) from None


def read_parquet(path: Path, name: str) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with readable(name), path.open("rb") as handle:
        try:
            for batch in pq.ParquetFile(handle).iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", without_nulls(row)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise FeedbackError(
                f"{name}: not readable as Parquet after row {number} ({said_by(error)}). {COPY_AGAIN}"
            ) from error


def without_nulls(row: Record) -> Record:
    """`row` without the keys that nested objects have only because others in the column have them."""
    return {key: _pruned(value) for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value
