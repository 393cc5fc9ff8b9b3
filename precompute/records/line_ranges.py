"""Divide files of JSON Lines into ranges of whole lines, which can be read independently of each other."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offline_kto.precompute.records.text_files import readable

_PIECE = 2**20
_NOT_BLANK = re.compile(rb"\S")


@dataclass(frozen=True)
class LineRange:
    """Whole lines of a file.

    Attributes:
        path: absolute.
        name: of the file, for places in it.
        start, end: bytes.
        before: number of lines before the range.
        state: size and time of the file when it was divided, to notice that it has changed.
    """

    path: str
    name: str
    start: int
    end: int
    before: int
    state: tuple[int, int]


def state_of(path: Path) -> tuple[int, int]:
    """Return size and time of a file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def line_ranges(path: Path, name: str, size: int) -> Iterator[LineRange]:
    """Yield the ranges of a file in order; together they are all of it.

    A range ends after a line that is not blank, so that consecutive blank lines are never divided: their number is limited.

    Args:
        size: least number of bytes of a range that is not the last one.

    Raises:
        FeedbackError: the file cannot be read.
    """
    with readable(name), path.open("rb") as file:
        state = state_of(path)
        start = position = before = lines = 0
        is_blank = True  # whether nothing but white space was read since the range became large enough
        while piece := file.read(_PIECE):
            at = 0
            while (end := _end_of_range(piece, at, start + size - position, is_blank)) is not None:
                lines += piece.count(b"\n", at, end)
                yield LineRange(str(path), name, start, position + end, before, state)
                at, start, before, is_blank = end, position + end, before + lines, True
                lines = 0
            lines += piece.count(b"\n", at)
            is_blank = is_blank and not _NOT_BLANK.search(piece, max(at, start + size - position))
            position += len(piece)
        if position > start:
            yield LineRange(str(path), name, start, position, before, state)


def _end_of_range(piece: bytes, at: int, least: int, is_blank: bool) -> int | None:
    """Return where a range ends in a piece of the file; None if it does not.

    Args:
        at: where the range begins in the piece, or continues.
        least: where it is large enough.
        is_blank: whether nothing but white space was read before the piece, since the range is large enough.
    """
    begin = max(at, least)
    if is_blank:
        found = _NOT_BLANK.search(piece, begin)
        if found is None:
            return None
        begin = found.start()
    end = piece.find(b"\n", begin)
    return None if end < 0 else end + 1
