"""Show token ids as text, as the model sees them: special tokens and line breaks are visible."""

import shutil
import textwrap

import numpy as np

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.library_types import Tokenizer

# Columns of a terminal, and of a pipe or a terminal that reports 0.
_LEAST_WIDTH, _MOST_WIDTH = 40, 160


def visible(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Return token ids as one line of text; control characters are escaped, because data are untrusted."""
    text: str = tokenizer.decode(ids)
    return printable(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t"))


def width(most: int = _MOST_WIDTH) -> int:
    """Return how many columns to fill."""
    return max(_LEAST_WIDTH, min(shutil.get_terminal_size((100, 20)).columns, most))


def block(title: str, text: str, columns: int, most: int = 6) -> list[str]:
    """Return text wrapped beside a title; of more than `most` lines the first and the last."""
    lines = textwrap.wrap(text, columns - len(title), break_on_hyphens=False) or [""]
    if len(lines) > most:
        lines = [*lines[: most // 2], "...", *lines[-most // 2 :]]
    return [(title if number == 0 else " " * len(title)) + line for number, line in enumerate(lines)]
