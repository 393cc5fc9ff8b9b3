"""Read values as tables store them: lists and objects as JSON text, and objects whose keys are paths."""

import json
import re
from typing import Any

_SEGMENT = re.compile(r"\[[^\]]*\]|[^.]+")
_JSON_START = re.compile(r"\s*[\[{]")
_PYTHON_START = re.compile(r"\s*(?:\[\s*)?[\[{]\s*'|\s*array\(")


def opened(value: Any) -> Any:
    """Return the list or object in a JSON text; any other value as it is."""
    if not isinstance(value, str) or _JSON_START.match(value) is None:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def entered(value: Any) -> Any:
    """Return like `opened`, for a value whose content is needed.

    Raises:
        ValueError: a list or an object as Python prints it.
    """
    found = opened(value)
    if is_printed(found):
        raise ValueError(
            f"a value as Python prints it, {found[:60]!r}; write the column with json.dumps, or save the data as JSON Lines"
        )
    return found


def is_printed(value: object) -> bool:
    """Return whether a text is a list or an object as Python prints it."""
    return isinstance(value, str) and _PYTHON_START.match(value) is not None


def has(value: object, keys: list[str]) -> bool:
    """Return whether a value is an object with all of these keys; their values may be null."""
    found = opened(value)
    return isinstance(found, dict) and all(key in found for key in keys)


def without(value: object, keys: list[str]) -> object:
    """Return an object without some of its keys; any other value as it is."""
    found = opened(value)
    return {key: item for key, item in found.items() if key not in keys} if isinstance(found, dict) else value


def under(value: object, prefix: str) -> dict[str, object]:
    """Return the keys of an object that begin with a prefix, without it, where they have a value."""
    found = value if isinstance(value, dict) else {}
    return {key[len(prefix) :]: item for key, item in found.items() if key.startswith(prefix) and item is not None}


def nested(value: object) -> object:
    """Return an object whose keys are paths ("output.choices.0.message") as nested objects and lists.

    Null values are left out. Text in brackets is one key: "feedback.[wandb.reaction.1].payload".
    """
    tree: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        *parents, last = segments(key)
        at = tree
        for one in parents:
            inner = at.setdefault(one, {})
            if not isinstance(inner, dict):
                break
            at = inner
        else:
            if item is not None:
                at[last] = opened(item)
    return _with_lists(tree)


def segments(key: str) -> list[str]:
    """Return the parts of a key that is a path; text in brackets is one part."""
    return _SEGMENT.findall(key) or [key]


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    found = {key: _with_lists(item) for key, item in value.items()}
    numbers = [str(number) for number in range(len(found))]
    return [found[number] for number in numbers] if found and set(found) == set(numbers) else found


def matching(values: object, key: str, value: object) -> list[object]:
    """Return the objects of a list in which a key has a value, compared as text."""
    found = values if isinstance(values, list) else []
    return [one for one in found if isinstance(one, dict) and str(one.get(key)) == str(value)]
