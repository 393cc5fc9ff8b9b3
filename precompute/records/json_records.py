"""Read records of JSON and JSON Lines files, each with the line on which it begins."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import IO

from offline_kto.kto_core.errors import FeedbackError, said_by
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.precompute.records.text_files import (
    COPY_AGAIN,
    LARGEST_RECORD,
    TOO_LARGE,
    Located,
    OnBadLine,
    Record,
    lines_of,
    texts_of,
)

_BLANK_LINES_BEFORE = 1000
# Longest escape, literal or number that the end of a piece may cut in two.
_LONGEST_WORD = 32
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def read_jsonl(handle: IO[bytes], name: str, on_bad: OnBadLine | None = None) -> Iterator[Located]:
    """Yield the record of each line; of a file that is a JSON document, its items.

    Args:
        on_bad: called for a line that is no record; without it, the first such line ends the reading.
    """
    if is_document(handle):
        yield from read_json(handle, name)
    else:
        yield from read_lines(handle, name, on_bad)


def read_lines(
    handle: IO[bytes], name: str, on_bad: OnBadLine | None = None, *, before: int = 0, size: int | None = None
) -> Iterator[Located]:
    """Yield the record of each line.

    Args:
        before, size: see `lines_of`.
    """
    for number, line in enumerate(lines_of(handle, name, before=before, size=size), before + 1):
        line = line.removeprefix("\ufeff")  # concatenated files may each have a byte order mark
        if line.strip() == "":
            continue
        where = f"{name}:{number}"
        try:
            record = _record_of(line, where)
        except FeedbackError as error:
            if on_bad is None:
                raise
            on_bad(where, error)
        else:
            yield where, record


def _record_of(line: str, where: str) -> Record:
    try:
        value = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and line[error.pos :].strip() == ",":
            raise FeedbackError(
                f"{where}: there is a comma after the object. In JSON Lines only the ends of lines separate objects: remove "
                "the comma, or write all objects as one array, [...]."
            ) from None
        cut = not line.endswith("\n") and _is_cut(error, line, _skip(line, 0), "}")
        raise _bad_json(error, where, getattr(error, "colno", 1), cut=cut) from None
    return _object(value, where)


def is_document(handle: IO[bytes]) -> bool:
    """Return whether the file is an array, or its first object continues on the next line; its name may not tell.

    Args:
        handle: at its beginning, before and after.
    """
    try:
        return _begins_document(handle)
    finally:
        handle.seek(0)


def _begins_document(handle: IO[bytes]) -> bool:
    read = itertools.islice(iter(lambda: handle.readline(LARGEST_RECORD), b""), _BLANK_LINES_BEFORE)
    lines = (line for line in read if line.strip() or len(line) == LARGEST_RECORD)
    first = next(lines, b"")
    text = first.decode("utf-8-sig", errors="replace").strip()
    if text.startswith("{") and first.endswith(b"\n"):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return error.pos >= len(text) and not _are_records(lines)
        except (ValueError, RecursionError):
            return False
    return text.startswith("[")


def _are_records(lines: Iterator[bytes]) -> bool:
    """Return whether the next two lines are objects: a first line that is cut off is then a defect of this line only."""
    following = list(itertools.islice(lines, 2))
    try:
        return len(following) == 2 and all(isinstance(json.loads(line), dict) for line in following)
    except (ValueError, RecursionError):
        return False


def read_json(handle: IO[bytes], name: str) -> Iterator[Located]:
    text = _Text(texts_of(handle, name), name)
    items = _array_items(text) if text.begins("[") else _object_items(text)
    before = 0
    for number, (line, item) in enumerate(items, 1):
        where = f"{name}:{line}" if line != before else f"{name}:{line} (record {number})"
        before = line
        yield where, _object(item, where)


def _array_items(text: "_Text") -> Iterator[tuple[int, object]]:
    """Yield (line, item) for each item of the array in `text`."""
    text.drop(1)
    closed = text.begins("]")
    while not closed:
        yield text.line, text.item("]")
        closed = text.begins("]")
        if not closed:
            if not text.begins(","):
                raise text.broken(text.error("Expecting ',' or ']' after an item"), "]")
            text.drop(1)
            text.begins("")
    text.drop(1)
    if not text.is_over():
        raise FeedbackError(f"{text.name}:{text.line}: there is text after the array. Keep one array, or write JSONL.")


def _object_items(text: "_Text") -> Iterator[tuple[int, object]]:
    """Yield (line, item) for consecutive objects, each on one or several lines."""
    while not text.is_over():
        yield text.line, text.item("}")


class _Text:
    """The unread rest of a JSON file, read only as far as the next item needs.

    Attributes:
        line: line number at which it begins.
    """

    def __init__(self, pieces: Iterator[str], name: str) -> None:
        self.name, self.line = name, 1
        self._pieces, self._left, self._start = pieces, "", 0
        self._column = 0  # of the first character in `_left`
        self._last_line = 1  # the last line with something other than white space

    def begins(self, start: str) -> bool:
        """Return whether the rest begins with `start` after white space, which is dropped."""
        dropped = 0
        while True:
            end = _skip(self._left, self._start)
            dropped += end - self._start
            self._advance(end - self._start)
            if self._start < len(self._left) or not self._more():
                return self._left.startswith(start, self._start)
            if dropped > LARGEST_RECORD:
                raise FeedbackError(
                    f"{self.name}:{self.line}: more than {LARGEST_RECORD // 2**20} MiB of white space. {COPY_AGAIN}"
                )

    def is_over(self) -> bool:
        self.begins("")
        return self._start == len(self._left)

    def drop(self, count: int) -> None:
        self._advance(count)
        self._last_line = self.line

    def _advance(self, count: int) -> None:
        self.line += self._left.count("\n", self._start, self._start + count)
        self._start += count

    def item(self, closing: str) -> object:
        """Take the next item.

        Args:
            closing: the character with which a complete file ends.

        Raises:
            FeedbackError: not JSON, truncated, or too large.
        """
        while True:
            try:
                item, end = _DECODER.raw_decode(self._left, self._start)
            except (ValueError, RecursionError) as error:
                if not self._may_go_on(error) or not self._more():
                    raise self.broken(error, closing) from None
            else:
                # A number may have further digits in the next piece.
                if end < len(self._left) or isinstance(item, dict | list | str) or not self._more():
                    self.drop(end - self._start)
                    return item

    def _may_go_on(self, error: Exception) -> bool:
        """Return whether more text can resolve the error: it is near the end, or a string is unterminated."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self._left) - _LONGEST_WORD

    def _more(self) -> bool:
        """Read as much again as there is. Returns: whether there was anything left to read."""
        size = len(self._left) - self._start
        if size > LARGEST_RECORD:
            raise FeedbackError(
                f"{self.name}:{self.line}: a record of more than {LARGEST_RECORD // 2**20} MiB. {TOO_LARGE}"
            )
        read: list[str] = []
        for piece in self._pieces:
            read.append(piece)
            if sum(map(len, read)) >= size:
                break
        if read:
            self._column = self._column_of(self._start)
            self._left, self._start = "".join([self._left[self._start :], *read]), 0
        return bool(read)

    def _column_of(self, position: int) -> int:
        """Return the number of characters before a position on its line."""
        line_end = self._left.rfind("\n", 0, position)
        return position - line_end - 1 + (self._column if line_end < 0 else 0)

    def error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._left, self._start)

    def broken(self, error: Exception, closing: str) -> FeedbackError:
        """Return the error for the item that begins here, with the line at which parsing stopped."""
        stop = error.pos if isinstance(error, json.JSONDecodeError) else self._start
        line = self.line + self._left.count("\n", self._start, min(stop, len(self._left.rstrip())))
        if not self._left[self._start :].strip():
            line = self._last_line
        column = 1 + self._column_of(stop)
        cut = _is_cut(error, self._left, self._start, closing) and not self._more()
        return _bad_json(error, f"{self.name}:{line}", column, cut=cut)


def _unambiguous(pairs: list[tuple[str, object]]) -> Record:
    """Return the object for keys and values. Raises: ValueError: a key has two values; Python would keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            if value != record[key]:
                raise ValueError(f"the key {quoted(key)} occurs twice, with {quoted(value)} and {quoted(record[key])}")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unambiguous)


def _is_cut(error: Exception, text: str, position: int, closing: str) -> bool:
    """Return whether the item at `position` is invalid only because `text`, the end of the file, is cut off."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    body = text.rstrip()
    if error.pos >= len(body) or error.msg.startswith("Unterminated string"):
        return True
    begun = text.startswith("{", position) and not body.endswith(closing)
    return begun and "\n" not in body[error.pos :]


def _bad_json(error: Exception, where: str, column: int, *, cut: bool) -> FeedbackError:
    if cut:
        return FeedbackError(f"{where}: the last line is truncated: the file is cut off. {COPY_AGAIN}")
    if isinstance(error, json.JSONDecodeError):
        return FeedbackError(f"{where}: not valid JSON: {error.msg} (column {column}). Repair the line.")
    return FeedbackError(f"{where}: not readable as JSON ({said_by(error)}). Repair or remove the record.")


def _skip(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return position if match is None else match.end()


def _object(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise FeedbackError(f"{where}: a record must be a JSON object, got {quoted(value)}.")
    return value
