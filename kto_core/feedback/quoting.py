"""Show values and counts of feedback in messages."""

import json

from offline_kto.kto_core.errors import printable


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 row", "2,000 rows"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def quoted(value: object, limit: int = 60) -> str:
    """Return `value` as JSON on one line, with unprintable characters escaped, cut to about `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return printable(text, limit)
