"""`--data` -> an iterator of (where, record).

    feedback.jsonl, .ndjson     one object on each line                      feedback.jsonl:17
    feedback.json               an array of objects, or one object a line    feedback.json:17
    feedback.csv, .tsv          a header, then one record each               feedback.csv:17
    feedback.parquet                                                         feedback.parquet: row 17
    a folder                    a saved dataset, or one of data files        folder: row 17
    owner/name                  a dataset of the hub, its split `train`      owner/name: row 17

All files but Parquet may end in .gz as well. Lines and rows count from 1; a record of several lines has the
number of its first. Text is UTF-8, with or without a byte order mark. Files are read as they are asked for, a
line or a batch of rows at a time, except .json, which is decoded item by item but held whole.
"""

import csv
import difflib
import gzip
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from kto_core.errors import FeedbackError
from kto_core.feedback_formats import printable, quoted

Record = dict[str, Any]
Located = tuple[str, Record]

_BATCH_ROWS = 256
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
# Keys under which one object holds a whole data set.
_WRAPPERS = ("data", "rows", "train", "examples", "records", "instances", "items")
# JSON files of the datasets library that hold no rows.
_DATASET_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class SourceFile:
    """What the manifest remembers of one file: its name without a folder, SHA-256 (hex) and size in bytes."""

    name: str
    sha256: str
    bytes: int


def read_records(data: str, *, limit: int | None = None) -> Iterator[Located]:
    """(where, record) for each record of `data`, or for its first `limit`, in the order they are stored in.

    A record is a dict as it stands there. A column without a value holds None; in Parquet and datasets, which
    give every nested object the keys of all others, nested keys without a value are left out.

    Raises:
        FeedbackError: `data` is not there, not readable, of no known format, or holds no record. What a look
            at the path shows is raised by the call, all else by the iterator when it gets there.
    """
    path, kind = _look(data)
    if kind == "file":
        _check_suffix(path.name)
        name, records = path.name, _read_file(path)
    else:
        name, records = _dataset_name(path, kind), _read_dataset(path, kind)
    return itertools.islice(_not_empty(records, name), limit)


def describe_source(data: str) -> list[SourceFile]:
    """Name, hash and size of what stands behind `data`, in the order of the paths.

    A file is one entry; a folder of data files has one for each of them, whichever split it belongs to. A
    dataset of the hub or from save_to_disk is one entry, and hash and size are those of its rows as canonical
    JSON, one on each line: the files that hold them differ with the version of the library that wrote them.

    Raises:
        FeedbackError: as read_records does.
    """
    path, kind = _look(data)
    if kind == "file":
        _check_suffix(path.name)
        return [_hash_file(path)]
    if kind == "folder" and not _is_saved(path):
        return [_hash_file(file) for file in _data_files(path)]
    digest = hashlib.sha256()
    size = 0
    for _, row in _read_dataset(path, kind):
        line = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n"
        digest.update(line)
        size += len(line)
    return [SourceFile(_dataset_name(path, kind), digest.hexdigest(), size)]


def _hash_file(path: Path) -> SourceFile:
    digest = hashlib.sha256()
    size = 0
    with _readable(path.name), path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return SourceFile(path.name, digest.hexdigest(), size)


def _look(data: str) -> tuple[Path, str]:
    """(path, kind), with the kind "file", "folder" or "hub". What exists is never taken for a hub id."""
    if data.strip() == "":
        raise FeedbackError("--data is empty. Give a file, a folder or a dataset of the hub (owner/name).")
    path = Path(data)
    shown = printable(data, 200)
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except PermissionError:
        raise FeedbackError(f"{shown}: no permission to look there. Check the rights of its folders.") from None
    except (OSError, ValueError, RuntimeError):  # also a NUL in the name, and the home of nobody
        if _HUB_ID.fullmatch(data) is not None and _format_of(data) is None:
            return Path(data), "hub"
        raise FeedbackError(f"{shown}: no such file.{_suggest(path)}") from None
    if stat.S_ISDIR(mode):
        return path, "folder"
    if stat.S_ISREG(mode):
        return path, "file"
    raise FeedbackError(f"{shown}: neither a file nor a folder. Save the feedback to a file first.")


def _suggest(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return f" Its folder {printable(str(path.parent), 200)} cannot be listed either. Check the path."
    near = [printable(name, 100) for name in difflib.get_close_matches(path.name, names, n=3)]
    return f" Did you mean {' or '.join(near)}?" if near else " Check the path."


def _format_of(name: str) -> str | None:
    """The suffix that says how to read the file, in lower case and without .gz; None where none is known."""
    lower = name.lower()
    suffix = Path(lower.removesuffix(".gz")).suffix
    known = suffix in _TEXT_FORMATS or (suffix == ".parquet" and not lower.endswith(".gz"))
    return suffix if known else None


def _check_suffix(name: str) -> None:
    if _format_of(name) is None:
        known = " ".join([*_TEXT_FORMATS, ".parquet"])
        raise FeedbackError(
            f"{printable(name, 200)}: unknown kind of file. Known: {known} (all but .parquet also with .gz)."
        )


def _not_empty(records: Iterator[Located], name: str) -> Iterator[Located]:
    empty = True
    for item in records:
        empty = False
        yield item
    if empty:
        raise FeedbackError(f"{name}: empty, or without any record. Check that this is the right source.")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Puts what the system says of a file into words that the user can act on."""
    try:
        yield
    except PermissionError:
        raise FeedbackError(f"{name}: no permission to read it. Check its owner and mode (ls -l).") from None
    except EOFError:
        raise FeedbackError(f"{name}: the gzip data is cut off. {_AGAIN}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FeedbackError(
            f"{name}: not readable as gzip ({_first_line(error)}). {_AGAIN} Drop .gz if it is not packed."
        ) from error
    except OSError as error:
        raise FeedbackError(f"{name}: cannot be read ({_first_line(error)}).") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__, 200)


def _read_file(path: Path) -> Iterator[Located]:
    suffix = _format_of(path.name)
    if suffix is None or suffix == ".parquet":
        yield from _read_parquet(path)
        return
    with _readable(path.name), _open(path) as handle:
        yield from _TEXT_FORMATS[suffix](handle, path.name)


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _decode(raw: bytes, name: str, line: int) -> str:
    """`raw`, which begins at `line`, as text; only the first line may begin with a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where = f"{name}:{line + error.object.count(10, 0, error.start)}"  # 10 is the line feed
        if error.reason == "unexpected end of data" and error.end == len(error.object):
            raise FeedbackError(f"{where}: the last line looks cut off. {_AGAIN}") from None
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        raise FeedbackError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}). Convert it, for instance with"
            f" iconv -f {encoding} -t utf-8."
        ) from None


def _lines(handle: IO[bytes], name: str) -> Iterator[str]:
    for number, raw in enumerate(handle, 1):
        yield _decode(raw, name, number)


def _read_jsonl(handle: IO[bytes], name: str) -> Iterator[Located]:
    for number, line in enumerate(_lines(handle, name), 1):
        if line.strip() == "":
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith("["):
                raise FeedbackError(f"{where}: a JSON array. Rename the file to end in .json.") from None
            cut = not line.endswith("\n") and _is_cut(error, line, _skip(line, 0), "}")
            raise _bad_json(error, where, cut=cut) from None
        yield where, _object(value, where)


def _read_json(handle: IO[bytes], name: str) -> Iterator[Located]:
    text = _decode(handle.read(), name, 1)
    array = text.startswith("[", _skip(text, 0))
    items = _array_items(text, name) if array else _object_items(text, name)
    for line, item in items:
        yield f"{name}:{line}", _object(item, f"{name}:{line}")


def _array_items(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """(line, item) for each item of the array that `text` is."""
    line = 1
    last = 0
    position = _skip(text, _skip(text, 0) + 1)
    closed = text.startswith("]", position)
    while not closed:
        line += text.count("\n", last, position)
        last = position
        item, position = _decode_item(text, position, name, "]")
        yield line, item
        position = _skip(text, position)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                error = json.JSONDecodeError("Expecting ',' or ']' after an item", text, position)
                raise _broken(error, text, position, name, "]")
            position = _skip(text, position + 1)
    end = _skip(text, position + 1)
    if end < len(text):
        line += text.count("\n", last, end)
        raise FeedbackError(f"{name}:{line}: something follows the array. Keep one array, or write JSONL.")


def _object_items(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """(line, item) for JSON lines under the suffix .json; an item may take several lines."""
    line = 1
    last = 0
    start = position = _skip(text, 0)
    while position < len(text):
        line += text.count("\n", last, position)
        last = position
        item, position = _decode_item(text, position, name, "}")
        position = _skip(text, position)
        if last == start and position == len(text) and isinstance(item, dict):
            _refuse_wrapper(item, f"{name}:{line}")
        yield line, item


def _refuse_wrapper(item: Record, where: str) -> None:
    for key in _WRAPPERS:
        if isinstance(item.get(key), list):
            raise FeedbackError(
                f"{where}: one object with a list under '{key}'. Expected an array of records, or one record"
                f" on each line: save that list alone (jq .{key})."
            )


def _decode_item(text: str, position: int, name: str, closing: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise _broken(error, text, position, name, closing) from None


def _broken(error: Exception, text: str, position: int, name: str, closing: str) -> FeedbackError:
    """The error for the item at `position` of a whole file, with the line where reading had to stop."""
    cut = _is_cut(error, text, position, closing)
    stop = error.pos if isinstance(error, json.JSONDecodeError) else position
    return _bad_json(error, f"{name}:{1 + text.count(chr(10), 0, min(stop, len(text.rstrip())))}", cut=cut)


def _is_cut(error: Exception, text: str, position: int, closing: str) -> bool:
    """Whether the item at `position` is broken because `text`, the end of the file, ends before it does."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    body = text.rstrip()
    if error.pos >= len(body) or error.msg.startswith("Unterminated string"):
        return True
    begun = text.startswith("{", position) and not body.endswith(closing)
    return begun and "\n" not in body[error.pos :]


def _bad_json(error: Exception, where: str, *, cut: bool) -> FeedbackError:
    if cut:
        return FeedbackError(f"{where}: the last line looks cut off. {_AGAIN}")
    if isinstance(error, json.JSONDecodeError):
        return FeedbackError(f"{where}: not valid JSON: {error.msg} (column {error.colno}). Repair the line.")
    return FeedbackError(f"{where}: not readable as JSON ({_first_line(error)}). Repair or remove the record.")


def _skip(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return position if match is None else match.end()


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise FeedbackError(f"{where}: a record must be a JSON object, got {quoted(value)}.")
    return value


def _read_csv(handle: IO[bytes], name: str, delimiter: str = ",") -> Iterator[Located]:
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
    reader = csv.reader(_lines(handle, name), delimiter=delimiter, strict=True)
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
    return FeedbackError(f"{where}: not readable as a table ({_first_line(error)}). Repair the row's quotes.")


def _csv_header(cells: list[str], where: str, delimiter: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    named = [column for column in columns if column != ""]  # pandas writes its index under no name
    if len(named) < 2:
        expected = "tabs" if delimiter == "\t" else "commas"
        raise FeedbackError(
            f"{where}: the header is the single column {quoted(columns[0])}. Separate columns by {expected}."
        )
    for column in named:
        if named.count(column) > 1:
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


_TEXT_FORMATS: dict[str, Callable[[IO[bytes], str], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
}


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with _readable(path.name), path.open("rb") as handle:
        try:
            for batch in pq.ParquetFile(handle).iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}: row {number}", _without_nulls(row)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise FeedbackError(
                f"{path.name}: not readable as Parquet after row {number} ({_first_line(error)}). {_AGAIN}"
            ) from error


def _without_nulls(row: Record) -> Record:
    """`row` without the keys that nested objects have only because others in the column have them."""
    return {key: _pruned(value) for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value


def _dataset_name(path: Path, kind: str) -> str:
    return path.as_posix() if kind == "hub" else path.resolve().name


def _read_dataset(path: Path, kind: str) -> Iterator[Located]:
    name = _dataset_name(path, kind)
    number = 0
    dataset = _load_hub(path) if kind == "hub" else _load_folder(path)
    try:
        for row in dataset:
            number += 1
            yield f"{name}: row {number}", _without_nulls(row)
    except Exception as error:
        raise FeedbackError(f"{name}: not readable after row {number} ({_first_line(error)}).") from error


def _load_hub(path: Path) -> Any:
    import datasets

    name = path.as_posix()
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        hint = _suggest(path) if path.parent.is_dir() else " Check the name, or log in (hf auth login)."
        raise FeedbackError(
            f"{name}: neither a local path nor readable from the hub ({_first_line(error)}).{hint}"
        ) from error


def _is_saved(path: Path) -> bool:
    """Whether `path` is a folder that save_to_disk wrote."""
    info = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    return info or (path / "dataset_dict.json").is_file()


def _load_folder(path: Path) -> Any:
    import datasets

    name = _dataset_name(path, "folder")
    saved = _is_saved(path)
    if not saved:
        _data_files(path)
    try:
        if not saved:
            return datasets.load_dataset(str(path), split="train")
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise FeedbackError(f"{name}: not readable as a dataset ({_first_line(error)}).") from error
    if not isinstance(dataset, dict):
        return dataset
    if "train" not in dataset:
        raise FeedbackError(
            f"{name}: no split 'train'; found {quoted(list(dataset))}. Pass the folder of the split you want."
        )
    return dataset["train"]


def _data_files(path: Path) -> list[Path]:
    """The files of one kind that make up the folder, at most one folder down, sorted.

    Raises:
        FeedbackError: none, several kinds (of which datasets would quietly read one), or a cache of ours.
    """
    name = printable(_dataset_name(path, "folder"), 200)
    if (path / "manifest.json").is_file():
        raise FeedbackError(f"{name}: this is a reference cache (manifest.json). Pass the feedback it came from.")
    with _readable(name):
        found = [file for pattern in ("*", "*/*") for file in path.glob(pattern)]
    files = [file for file in sorted(found) if _is_data(file, path)]
    kinds = sorted({str(_format_of(file.name)).replace("jsonl", "json") for file in files})
    if len(kinds) == 0:
        raise FeedbackError(
            f"{name}: a folder with no dataset in it. Expected one from save_to_disk, or files that end in"
            " .parquet, .jsonl, .json or .csv."
        )
    if len(kinds) > 1:
        raise FeedbackError(f"{name}: holds files of several kinds, {', '.join(kinds)}. Pass one file, or one kind.")
    return files


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    readable = _format_of(file.name) in (".parquet", ".jsonl", ".json", ".csv")
    return readable and not hidden and file.name not in _DATASET_NOTES and file.is_file()
