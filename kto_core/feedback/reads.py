"""Find which keys of a record a JMESPath expression reads, as routes such as ("input", "messages").

A route without further keys is read whole, and so is a list, except for `rows`: the records that were joined.
"""

from collections.abc import Mapping
from typing import Any, Final

from offline_kto.kto_core.feedback import logged_calls, stored_values

Route = tuple[str, ...]

# Begin of the routes into the result of `nested(@)`, and of `values(@)`.
_NESTED: Final = "\0nested"
_VALUES: Final = "\0values"
# Functions that return their first argument, or most of it.
_SAME: Final = {"entered", "json", "unescaped", "without"}
# Functions that look only at the keys of their argument.
_KEYS_ONLY: Final = {"has", "keys", "type"}


def routes(node: Mapping[str, Any], record: Mapping[str, Any]) -> set[Route]:
    """Return the routes that a parsed expression reads in a record; the whole record is none.

    Args:
        node: of the expression, as JMESPath parses it.
    """
    found: set[Route] = set()
    for route in _follow(node, {()}, record):
        if route[:1] == (_NESTED,):
            found |= {(name,) for name in record if route[1:] and _begins(stored_values.segments(name), route[1:])}
        elif route and route[0] != _VALUES:
            found.add(route)
    return found


def _begins(one: list[str], other: Route) -> bool:
    """Return whether one of two routes is the beginning of the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _follow(node: Mapping[str, Any], at: set[Route], record: Mapping[str, Any]) -> set[Route]:
    """Return the routes to the values of a node."""
    kind, children = node["type"], node.get("children", [])
    if kind in ("current", "identity"):
        return at
    if kind == "field":
        return {(*route, node["value"]) for route in at}
    if kind in ("subexpression", "index_expression", "pipe"):
        for child in children:
            at = _follow(child, at, record)
        return at
    if kind == "index":
        return _indexed(at, node["value"], record)
    if kind == "function_expression":
        return _called(node["value"], [_follow(one, at, record) for one in children], children, record)
    if kind.endswith("projection") or kind == "flatten":
        at = _follow(children[0], at, record) if children else at
        if ("rows",) in at and "rows" not in record and kind.endswith("projection"):  # of each of the joined records
            return (_follow(children[1], {()}, record) - {()} or {("rows",)}) | at - {("rows",)}
        return at
    if kind == "or_expression":
        return _alternatives(children, at, record)
    inner = [_follow(one, at, record) for one in children if isinstance(one, Mapping)]
    return set().union(*inner)


def _alternatives(children: list[Any], at: set[Route], record: Mapping[str, Any]) -> set[Route]:
    """Return the routes of alternatives; the whole record only if no other has a value."""
    found: set[Route] = set().union(*(_follow(one, at, record) for one in children))
    there = any(route and _value_at(record, route) for route in found)
    return found - {()} if there else found


def _indexed(at: set[Route], number: int, record: Mapping[str, Any]) -> set[Route]:
    names = list(record)
    if at == {("rows",)} and "rows" not in record:
        return {()}
    if at == {(_VALUES,)}:
        return {(names[number],)} if -len(names) <= number < len(names) else set()
    return at


def _called(name: str, found: list[set[Route]], nodes: list[Any], record: Mapping[str, Any]) -> set[Route]:
    first = found[0] if found else set()
    if name in _KEYS_ONLY:
        return set()
    if name in _SAME:
        return first
    if name == "nested":
        return {(_NESTED,)}
    if name == "values":
        return {(_VALUES,)} if first == {()} else first
    if name == "under":
        prefix = nodes[1].get("value")
        return {(one,) for one in record if isinstance(prefix, str) and one.startswith(prefix)}
    if name == "own_scores":
        return {("scores",)}
    if name == "threaded":
        return first | {("created_at",)}
    if name == "submitted":
        return {("responses",), ("status",)}
    chosen = {
        "asked": logged_calls.asked_routes,
        "asked_before": logged_calls.asked_routes,
        "answered": logged_calls.answered_routes,
        "only": logged_calls.only_routes,
    }.get(name)
    if chosen is not None:
        return {(*route, *one) for route in first for one in chosen(_value_at(record, route)) or [()]}
    return set().union(*found)


def _value_at(record: Mapping[str, Any], route: Route) -> object:
    value: object = record
    if route[:1] == (_NESTED,):
        value, route = stored_values.nested(record), route[1:]
    for name in route:
        value = stored_values.opened(value)
        value = value.get(name) if isinstance(value, Mapping) else None
    return stored_values.opened(value)
