"""Convert typed values to JSON and back: data classes, named tuples, lists, sets, and dictionaries with keys of any type.

Unlike a pickle, the JSON can only become values of the type that the reader names.
"""

import dataclasses
import functools
import types
import typing
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


def to_json(value: object) -> object:
    """Return a value as `json.dumps` takes it; a dictionary becomes a list of pairs, in its order."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return [[to_json(key), to_json(one)] for key, one in value.items()]
    if isinstance(value, array):
        return value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(one) for one in value]
    return value


def from_json(kind: type[T], content: object) -> T:
    """Return the value of a type that `to_json` has converted.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the content is that of another type.
    """
    return cast(T, _from(kind, content))


def _from(kind: Any, content: Any) -> object:
    if content is None or kind in (str, int, float, bool, Any):
        return content
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [one for one in arguments if one is not type(None)]
        return _from(inner[0], content) if len(inner) == 1 else content
    if dataclasses.is_dataclass(origin):
        hints = _hints(cast(type, origin))
        return cast(Any, origin)(**{name: _from(hints[name], content[name]) for name in content})
    if origin is array:
        return array("d", content)
    if origin is Counter:
        return Counter({_from(arguments[0], key): count for key, count in content})
    if origin is dict:
        return {_from(arguments[0], key): _from(arguments[1], one) for key, one in content}
    if origin in (list, set, frozenset):
        return origin(_from(arguments[0], one) for one in content)
    if origin is tuple:
        each = arguments[:1] * len(content) if arguments[1:] == (...,) else arguments
        return tuple(_from(one, item) for one, item in zip(each, content, strict=True))
    raise TypeError(f"no JSON for {kind}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
