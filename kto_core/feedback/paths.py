"""Find values in records with JMESPath: no code is run, and a path that leads nowhere gives None.

    input.messages                         a nested key
    "inputs.input"                         a key with a dot in its name
    scores[?name=='thumbs'] | [-1].value   the last score of that name

Functions beside JMESPath's own:

    json(text)             the value of a JSON text; any other value as it is
    without(object, keys)  the object without some of its keys
    split(text, mark)      the parts of a text between marks
"""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jmespath
from jmespath import functions
from jmespath.exceptions import JMESPathError

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.quoting import quoted


class _Functions(functions.Functions):  # type: ignore[misc]  # the library has no types
    @functions.signature({"types": []})  # type: ignore[misc]
    def _func_json(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value

    @functions.signature({"types": ["object"]}, {"types": ["array"]})  # type: ignore[misc]
    def _func_without(self, value: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        return {key: item for key, item in value.items() if key not in keys}

    @functions.signature({"types": ["string"]}, {"types": ["string"]})  # type: ignore[misc]
    def _func_split(self, value: str, mark: str) -> list[str]:
        return value.split(mark)


_OPTIONS = jmespath.Options(custom_functions=_Functions())


class Path:
    """A JMESPath expression.

    Args:
        text: the expression.
        source: where it is written, for errors: "maps/mine.yaml: prompt" or "--prompt-field".

    Raises:
        ConfigError: not an expression.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        try:
            self._compiled = jmespath.compile(text)
        except JMESPathError as error:
            raise ConfigError(f"{source}: {quoted(text)} is not a JMESPath expression: {_first_line(error)}") from None
        self._key = text if text.isidentifier() else None

    def find(self, record: Mapping[str, object], where: str) -> Any:
        """Return the value in a record; None where there is none.

        Raises:
            FeedbackError: a function of the expression was given a value of another type.
        """
        if self._key is not None:  # most paths are the name of a key
            return record.get(self._key)
        try:
            return self._compiled.search(record, _OPTIONS)
        except JMESPathError as error:
            raise FeedbackError(
                f"{where}: {self.source}: {quoted(self.text)} cannot be applied to this record: {_first_line(error)}"
            ) from None

    def keys(self) -> set[str]:
        """Return the keys that the expression names, at any depth."""
        return set(_named(self._compiled.parsed))

    def __repr__(self) -> str:
        return f"Path({self.text!r})"


def _named(node: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys in a node of a parsed expression."""
    if node["type"] == "field":
        yield node["value"]
    for child in node.get("children", ()):
        yield from _named(child) if isinstance(child, Mapping) else ()


@functools.lru_cache(maxsize=256)
def compiled(text: str, source: str) -> Path:
    """Return a path, compiled once."""
    return Path(text, source)


def key_path(name: str) -> str:
    """Return the expression for a key, whatever characters its name has."""
    return name if name.isidentifier() else json.dumps(name)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
