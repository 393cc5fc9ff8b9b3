"""Show values, counts and numbers in messages."""

import json
from collections.abc import Sequence

from offline_kto.kto_core.errors import printable


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 row", "2,000 rows"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def numbered(noun: str, numbers: Sequence[int], most: int = 10) -> str:
    """Return a noun with its numbers: "trial 0", "trials 0, 1 and 2"; of many, the first ones and how many more there are."""
    named = [str(number) for number in numbers[:most]]
    if len(numbers) > most:
        named.append(f"{len(numbers) - most:,} more")
    *first, last = named
    return f"{noun}s {', '.join(first)} and {last}" if first else f"{noun} {last}"


def quoted(value: object, limit: int = 60) -> str:
    """Return `value` as JSON on one line, with unprintable characters escaped, cut to about `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return printable(text, limit)
