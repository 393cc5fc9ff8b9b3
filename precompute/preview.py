"""Show token ids as text, as the model sees them: special tokens and line breaks are visible."""

import re
import shutil
import unicodedata
from collections.abc import Iterator

import numpy as np

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.library_types import Tokenizer

# Columns of a terminal, and of a pipe or a terminal that reports 0.
_LEAST_WIDTH, _MOST_WIDTH = 40, 160
# A special token or an escaped character, at which text without spaces is broken, and which is not broken itself.
_MARK = r"<[^<>\s]{1,60}>|\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)"
_AT_MARKS = re.compile(r"(?=<[^<>\s]{1,60}>)|(?<=>)(?!\s)|(?<=\\n)(?!\s)")
_ATOM = re.compile(rf"{_MARK}|.", re.DOTALL)


def visible(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Return token ids as one line of text; control characters are escaped, because data are untrusted."""
    text: str = tokenizer.decode(ids)
    return printable(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t"))


def width(most: int = _MOST_WIDTH) -> int:
    """Return how many columns to fill."""
    return max(_LEAST_WIDTH, min(shutil.get_terminal_size((100, 20)).columns, most))


def block(title: str, text: str, columns: int, most: int = 6) -> list[str]:
    """Return text wrapped beside a title; of more than `most` lines the first and the last."""
    lines = folded(text, columns - len(title), at_marks=True)
    if len(lines) > most:
        lines = [*lines[: most // 2], "...", *lines[-most // 2 :]]
    return [(title if number == 0 else " " * len(title)) + line for number, line in enumerate(lines)]


def folded(text: str, most: int, *, at_marks: bool = False) -> list[str]:
    """Return a text as lines of at most `most` columns of a terminal; at least one line.

    It is broken at spaces, and in words that are longer than a line. Special tokens and escaped characters are kept whole.

    Args:
        at_marks: also break before and after special tokens, and after line breaks.
    """
    lines, line, size = [], "", 0
    for piece in _pieces(text, at_marks=at_marks):
        wide = columns_of(piece.rstrip())
        if line and size + wide > most:
            lines.append(line.rstrip())
            line, size = "", 0
        for atom in [piece] if wide <= most else _atoms(piece, most):
            wide = columns_of(atom)
            if line and size + columns_of(atom.rstrip()) > most:
                lines.append(line.rstrip())
                line, size = "", 0
            line, size = line + atom, size + wide
    return [*lines, line.rstrip()]


def _atoms(piece: str, most: int) -> Iterator[str]:
    """Yield the special tokens, escaped characters and other characters of a piece; tokens that are too long in characters."""
    for atom in _ATOM.findall(piece):
        yield from [atom] if columns_of(atom) <= most else atom


def _pieces(text: str, *, at_marks: bool) -> Iterator[str]:
    """Yield the pieces of a text between which a line may end, each with the spaces that follow."""
    for word in re.findall(r"\S+\s*|\s+", text):
        yield from (piece for piece in _AT_MARKS.split(word) if piece) if at_marks else [word]


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text fills: two for a character of Chinese, Japanese or Korean, and for an emoji."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
