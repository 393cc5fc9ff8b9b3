"""Compare JSON content with the typed record that declares it."""

import ast
import inspect
import types
import typing
from types import ModuleType
from typing import Any


def documented(module: ModuleType) -> dict[str, tuple[list[str], list[str]]]:
    """Return the fields that each record of a module declares, and those that its docstring explains."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            fields = [ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)]
            _, _, explained = (ast.get_docstring(node) or "").partition("Attributes:\n")
            lines = [line.strip() for line in explained.splitlines() if line.strip()]
            found[node.name] = fields, [line.partition(":")[0] for line in lines]
    return found


def departures(value: object, declared: Any, where: str = "") -> list[str]:
    """Return where content has a field that its record does not declare, or a value of another type."""
    origin, args = typing.get_origin(declared), typing.get_args(declared)
    if typing.is_typeddict(declared):
        if not isinstance(value, dict):
            return [f"{where}: no object"]
        fields = typing.get_type_hints(declared)
        return [
            line
            for name, one in value.items()
            for line in (
                departures(one, fields[name], f"{where}.{name}")
                if name in fields
                else [f"{where}.{name} is not declared"]
            )
        ]
    if origin in (types.UnionType, typing.Union):
        found = [departures(value, one, where) for one in args]
        return [] if [] in found else max(found, key=len)
    if origin is list and isinstance(value, list):
        return [line for one in value for line in departures(one, args[0], f"{where}[]")]
    if origin is dict and isinstance(value, dict):
        return [line for name, one in value.items() for line in departures(one, args[1], f"{where}.{name}")]
    kinds = {float: (int, float), Any: object}.get(declared, origin or declared)
    fits = isinstance(value, kinds) and (declared in (bool, object, Any) or not isinstance(value, bool))
    return [] if fits else [f"{where}: {value!r} is no {declared}"]
