"""Read `--data` as an iterator of (where, record).

    feedback.jsonl, .ndjson     one object on each line                      feedback.jsonl:17
    feedback.json               an array of objects                          feedback.json:17
    feedback.csv, .tsv          a header, then one record each               feedback.csv:17
    feedback.parquet                                                         feedback.parquet: row 17
    a folder of these           its split                                    sub/feedback.jsonl:17
    a folder of save_to_disk    its split                                    folder: row 17
    owner/name                  a dataset of the hub, its split              owner/name: row 17

The split is `train`, or that of `--split`. The three suffixes of JSON are interchangeable, and an object may span
several lines. All files but Parquet may also end in .gz. Lines and rows count from 1; a record of several lines has the
number of its first; after another on the same line, it is counted: feedback.json:1 (record 3). Text is UTF-8, with or
without a byte order mark, or UTF-16 with one. Files are read lazily, an item, a line or a batch of rows at a time. A
record may have 64 MiB: a few compressed bytes may expand to more than the memory.
"""

import gzip
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from offline_kto.kto_core.errors import FeedbackError, printable
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.precompute.records.class_names import ClassNames
from offline_kto.precompute.records.dataset_records import (
    backup_files,
    data_files,
    dataset_name,
    is_saved,
    read_dataset,
    split_in_full,
    splits_of,
    suggest,
    unread_files,
)
from offline_kto.precompute.records.json_records import is_document, read_json, read_jsonl, read_lines
from offline_kto.precompute.records.line_ranges import LineRange, line_ranges, state_of
from offline_kto.precompute.records.table_records import read_csv, read_parquet
from offline_kto.precompute.records.text_files import (
    COPY_AGAIN,
    GZIP,
    LARGEST_RECORD,
    MOST_PACKED,
    PARQUET,
    Located,
    OnBadLine,
    as_utf_8,
    check_form,
    readable,
)

_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class SourceFile:
    """The manifest's entry for a file: its name without a folder, SHA-256 (hex) and size in bytes."""

    name: str
    sha256: str
    bytes: int


def read_records(
    data: str,
    *,
    limit: int | None = None,
    columns: Collection[str] | None = None,
    split: str = "train",
    on_bad: OnBadLine | None = None,
) -> Iterator[Located]:
    """Return (where, record) for each record of `data`, or for its first `limit`, in stored order.

    `columns` names those that are needed. In Parquet only these are read, and all others have the value `NOT_READ`. A
    record is a dict as stored. A column without a value holds None. Parquet and datasets give every nested object the
    keys of all others; there, nested keys without a value are left out. `split` is that of a folder or a dataset.

    `on_bad` is called for each line of JSON Lines that is no record, and reading continues; without it, and in a file
    without any record, such a line is an error.

    Raises:
        FeedbackError: `data` does not exist, is not readable, has no known format, or has no record. Errors in the path
            are raised by the call, all others by the iterator.
    """
    path, kind = _look(data)
    name = source_name(data)
    if kind == "file":
        _check_suffix(path.name)
    of_library = kind == "hub" or is_saved(path)
    records = read_dataset(path, kind, split) if of_library else _read_files(data, columns, split, on_bad)
    return itertools.islice(_not_empty(records, name), limit)


def source_name(data: str) -> str:
    """Return the name of the data in messages. Raises: FeedbackError: as read_records does."""
    path, kind = _look(data)
    return path.name if kind == "file" else dataset_name(path, kind)


def divided(data: str, split: str, size: int) -> list[LineRange] | None:
    """Return the lines of `data` as ranges that can be read independently, in the order of `read_records`.

    Only files of JSON Lines have them: a record elsewhere may need what comes before it (a header, an array, a compressed
    stream), or the libraries that read it use several cores already.

    Args:
        size: least number of bytes of a range that is not the last one of its file.

    Returns:
        None if there is anything but JSON Lines.

    Raises:
        FeedbackError: as read_records does.
    """
    found: list[LineRange] = []
    for path, name in files_of(data, split):
        if not _has_lines(path, name):
            return None
        found += line_ranges(path.absolute(), name, size)
    return found or None


def files_of(data: str, split: str) -> list[tuple[Path, str]]:
    """Return path and name, in the places of records, of each file that is read; none if the datasets library reads the data."""
    path, kind = _look(data)
    if kind == "file":
        return [(path, path.name)]
    if kind == "folder" and not is_saved(path):
        return [(file, os.path.relpath(file, path.resolve())) for file in data_files(path, split)]
    return []


def file_of(where: str) -> str:
    """Return the name of the file in a record's place: "sub/feedback.jsonl" in "sub/feedback.jsonl:17"."""
    return where.rpartition(":")[0]


def _has_lines(path: Path, name: str) -> bool:
    """Return whether a file is read line by line."""
    suffix = format_of(path.name)
    if suffix is None or _TEXT_FORMATS.get(suffix) is not read_jsonl or path.name.lower().endswith(".gz"):
        return False
    with readable(name), path.open("rb") as file:
        try:
            check_form(file, name)
        except FeedbackError:  # reported where it is read
            return False
        return as_utf_8(file, name) is file and not is_document(file)


def read_range(lines: LineRange, on_bad: OnBadLine) -> Iterator[Located]:
    """Yield the records of a range as `read_records` does. There may be none.

    Raises:
        FeedbackError: the file cannot be read, or has changed since it was divided.
    """
    path = Path(lines.path)
    named = ClassNames.beside(path.resolve())
    with readable(lines.name), path.open("rb") as file:
        _check_unchanged(lines)
        file.seek(lines.start)
        for where, record in read_lines(file, lines.name, on_bad, before=lines.before, size=lines.end - lines.start):
            yield where, named.record(record)
        _check_unchanged(lines)


def _check_unchanged(lines: LineRange) -> None:
    if state_of(Path(lines.path)) != lines.state:
        raise FeedbackError(
            f"{lines.name}: the file changed while it was read. Run the command again when it is complete."
        )


def describe_source(data: str, split: str = "train") -> list[SourceFile]:
    """Return name, hash and size of each file in `data`, in the order of the paths.

    A file is one entry. A folder of data files has one entry for each file that is read. A dataset of the hub or from
    save_to_disk is one entry; hash and size are those of its rows as canonical JSON, one on each line, because its
    files differ with the version of the library that wrote them.

    Raises:
        FeedbackError: as read_records does.
    """
    path, kind = _look(data)
    if kind == "file":
        _check_suffix(path.name)
        return [_hash_file(path)]
    if kind == "folder" and not is_saved(path):
        return [_hash_file(file) for file in sorted(data_files(path, split))]
    digest = hashlib.sha256()
    size = 0
    for _, row in read_dataset(path, kind, split):
        line = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n"
        digest.update(line)
        size += len(line)
    return [SourceFile(dataset_name(path, kind), digest.hexdigest(), size)]


def warnings_about(data: str, split: str = "train") -> list[str]:
    """Return warnings about files, backups and splits of a folder that are not read. Raises: FeedbackError: as read_records does."""
    path, kind = _look(data)
    if kind != "folder":
        return []
    read = split_in_full(path, split)
    others = [name for name in splits_of(path) if name != read]
    found = (
        [f"{data}: the split {quoted(read)} is read; --split chooses another: {quoted(others, 200)[1:-1]}."]
        if others
        else []
    )
    if is_saved(path):
        return found
    if unread := unread_files(path):
        found.append(_unread(data, unread))
    if backups := backup_files(path):
        found.append(f"{data}: backups and temporary copies are not read: {quoted(backups[:5], 200)[1:-1]}.")
    return found


def _unread(data: str, unread: list[str]) -> str:
    files = "1 file is" if len(unread) == 1 else f"{len(unread):,} files are"
    return (
        f"{data}: {files} not read, because the folder's other names, or its README, do not assign them to a split: "
        f"{quoted(unread[:5], 200)}. Rename them, or pass one file."
    )


def _hash_file(path: Path) -> SourceFile:
    digest = hashlib.sha256()
    size = 0
    with readable(path.name), path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return SourceFile(path.name, digest.hexdigest(), size)


def _look(data: str) -> tuple[Path, str]:
    """Return (path, kind), with the kind "file", "folder" or "hub". An existing path is never taken for a hub id."""
    if data.strip() == "":
        raise FeedbackError("--data is empty. Give a file, a folder or a dataset of the hub (owner/name).")
    path = Path(data)
    shown = printable(data, 200)
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except PermissionError:
        raise FeedbackError(f"{shown}: no permission to access it. Check the permissions of its folders.") from None
    except (OSError, ValueError, RuntimeError):  # also a NUL in the name, and an unknown user's home
        if _HUB_ID.fullmatch(data) is not None and format_of(data) is None:
            return Path(data), "hub"
        raise FeedbackError(f"{shown}: no such file.{suggest(path)}") from None
    if stat.S_ISDIR(mode):
        return path, "folder"
    if stat.S_ISREG(mode):
        return path, "file"
    raise FeedbackError(f"{shown}: neither a file nor a folder. Save the feedback to a file first.")


def _check_suffix(name: str) -> None:
    if format_of(name) is None:
        known = " ".join([*_TEXT_FORMATS, ".parquet"])
        advice = " Save the sheet as CSV (UTF-8)." if Path(name.lower()).suffix in _SPREADSHEETS else ""
        raise FeedbackError(
            f"{printable(name, 200)}: unknown kind of file. Known: {known} (all but .parquet also with .gz).{advice}"
        )


def _not_empty(records: Iterator[Located], name: str) -> Iterator[Located]:
    empty = True
    for item in records:
        empty = False
        yield item
    if empty:
        raise no_record(name)


def no_record(name: str) -> FeedbackError:
    """Return the error about data without any record."""
    return FeedbackError(f"{name}: empty, or without any record. Check that this is the right source.")


def _read_files(data: str, columns: Collection[str] | None, split: str, on_bad: OnBadLine | None) -> Iterator[Located]:
    for file, name in files_of(data, split):
        yield from _read_file(file, name, columns, on_bad)


def _read_file(path: Path, name: str, columns: Collection[str] | None, on_bad: OnBadLine | None) -> Iterator[Located]:
    named = ClassNames.beside(path.resolve())
    yield from ((where, named.record(record)) for where, record in _stored(path, name, columns, on_bad))


def _stored(path: Path, name: str, columns: Collection[str] | None, on_bad: OnBadLine | None) -> Iterator[Located]:
    """Yield the records of a file as they are stored."""
    suffix = format_of(path.name)
    packed = path.name.lower().endswith(".gz")
    with readable(name), path.open("rb") as raw:
        check_form(raw, name, GZIP if packed else PARQUET if suffix == ".parquet" else None)
    if suffix is None or suffix == ".parquet":
        yield from read_parquet(path, name, columns)
        return
    with readable(name), _open(path) as file:
        check_form(file, name)
        handle = as_utf_8(file, name)
        records = _records_in(handle, name, suffix, on_bad)
        yield from _unpacked(records, handle, path, name) if packed else records


def _unpacked(records: Iterator[Located], handle: IO[bytes], path: Path, name: str) -> Iterator[Located]:
    """Yield the records of a packed file. Raises: FeedbackError: it unpacks to far more than its size."""
    most = LARGEST_RECORD + MOST_PACKED * path.stat().st_size
    for item in records:
        if handle.tell() > most:
            raise FeedbackError(f"{name}: unpacks to more than {MOST_PACKED} times its size. {COPY_AGAIN}")
        yield item


def _records_in(handle: IO[bytes], name: str, suffix: str, on_bad: OnBadLine | None) -> Iterator[Located]:
    if on_bad is None or _TEXT_FORMATS[suffix] is not read_jsonl:
        yield from _TEXT_FORMATS[suffix](handle, name)
        return
    errors: list[FeedbackError] = []
    empty = True

    def note(where: str, error: FeedbackError) -> None:
        if empty and not errors:
            errors.append(error)
        on_bad(where, error)

    for item in read_jsonl(handle, name, note):
        empty = False
        yield item
    if empty and errors:
        raise errors[0]  # no line is a record: the file has another format


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


_TEXT_FORMATS: dict[str, Callable[[IO[bytes], str], Iterator[Located]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
}


def format_of(name: str) -> str | None:
    """Return the suffix that determines the file's format, in lower case and without .gz; None if it is unknown."""
    lower = name.lower()
    suffix = Path(lower.removesuffix(".gz")).suffix
    known = suffix in _TEXT_FORMATS or (suffix == ".parquet" and not lower.endswith(".gz"))
    return suffix if known else None
