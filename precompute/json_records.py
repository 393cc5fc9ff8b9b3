"""Records of JSON and JSON Lines files, each with the line it begins on."""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from kto_core.errors import FeedbackError, said_by
from kto_core.feedback_formats import quoted
from precompute.text_files import COPY_AGAIN, Located, Record, decode, lines_of

_JSON_SPACE = re.compile(r"[ \t\r\n]*")
# Keys under which one object holds a whole data set.
_WRAPPERS = ("data", "rows", "train", "examples", "records", "instances", "items")


def read_jsonl(handle: IO[bytes], name: str) -> Iterator[Located]:
    for number, line in enumerate(lines_of(handle, name), 1):
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


def read_json(handle: IO[bytes], name: str) -> Iterator[Located]:
    text = decode(handle.read(), name, 1)
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
        return FeedbackError(f"{where}: the last line looks cut off. {COPY_AGAIN}")
    if isinstance(error, json.JSONDecodeError):
        return FeedbackError(f"{where}: not valid JSON: {error.msg} (column {error.colno}). Repair the line.")
    return FeedbackError(f"{where}: not readable as JSON ({said_by(error)}). Repair or remove the record.")


def _skip(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return position if match is None else match.end()


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise FeedbackError(f"{where}: a record must be a JSON object, got {quoted(value)}.")
    return value
