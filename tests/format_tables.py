"""Describe the mappings in configs/formats in words, for the tables in docs/feedback.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jmespath

from offline_kto.kto_core.feedback import paths
from offline_kto.kto_core.feedback.mapping import Mapping
from offline_kto.kto_core.feedback.presets import presets

FORMATS = Path(__file__).resolve().parent.parent / "configs/formats"


def formats_table() -> str:
    """Return a Markdown table of the formats that are recognised."""
    lines = ["| `--map` | file | recognised by | label |", "| --- | --- | --- | --- |"]
    for name, mapping in presets().items():
        cells = (f"`{name}`", _note(name), _recognised_by(mapping), _label(mapping))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def functions_table() -> str:
    """Return a Markdown table of the functions that paths may call."""
    functions = re.findall(r"^    (\w+\([^)]*\)) {2,}(.*)$", str(paths.__doc__), re.M)
    return "\n".join(
        ["| function | value |", "| --- | --- |", *(f"| `{name}` | {value} |" for name, value in functions)]
    )


def _note(name: str) -> str:
    """Return the comment at the top of a format's file, without its sources."""
    text = (FORMATS / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line[1:].strip() for line in re.match(r"(#.*\n)*", text)[0].splitlines())  # type: ignore[index]
    return re.sub(r" ?Written from .*?(\.(?= [A-Z])|\.$)", "", comment)


def _recognised_by(mapping: Mapping) -> str:
    if mapping.recognise is None:
        return "only with `--map`"
    return _words(jmespath.compile(mapping.recognise.text).parsed)


def _words(node: dict[str, Any]) -> str:
    """Return a condition in words; empty for one that excludes another format, or that only compares types."""
    children = node.get("children", [])
    match node["type"]:
        case "and_expression" | "or_expression":
            own, other = (" and ", " or ") if node["type"] == "and_expression" else (" or ", " and ")
            parts = list(dict.fromkeys(words for child in children if (words := _words(child))))
            return own.join(f"({one})" if len(parts) > 1 and other in _outside(one) else one for one in parts)
        case "function_expression" if node["value"] == "has":
            path = _path(children[0])
            return ", ".join(f"`{path}{key}`" for key in _literals(children[1]))
        case "comparator" if node["value"] == "eq" and children[0]["type"] == "field":
            return f'`{children[0]["value"]}` is "{children[1].get("value")}"'
        case "function_expression" if node["value"] == "contains" and children[0].get("value") == "join":
            return f"`*{children[1]['value']}*`"
        case "comparator":
            return " or ".join(_affixes(node)) or ", ".join(f"`{key}`" for key in _literals(children[1]))
    return ""


def _outside(words: str) -> str:
    """Return words without what is in parentheses."""
    shorter = re.sub(r"\([^()]*\)", "", words)
    return words if shorter == words else _outside(shorter)


def _path(node: dict[str, Any]) -> str:
    """Return the path of a nested object, with a dot at its end; empty for the record."""
    names = [one["value"] for one in _nodes(node) if one["type"] == "field"]
    lists = any(one["type"] == "index" for one in _nodes(node))
    return "".join(f"{name}." for name in names).replace(".", "[0].", 1 if lists else 0)


def _affixes(node: dict[str, Any]) -> Iterator[str]:
    """Yield the beginnings and ends of keys that a comparison counts."""
    for one in _nodes(node):
        if one["type"] == "function_expression" and one["value"] in ("starts_with", "ends_with"):
            text = one["children"][1]["value"]
            yield f"`{text}*`" if one["value"] == "starts_with" else f"`*{text}`"


def _literals(node: dict[str, Any]) -> list[str]:
    """Return the texts of a list that is written in an expression."""
    return [one["value"] for one in node["children"]] if node["type"] == "multi_select_list" else []


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.get("children", []):
            yield from _nodes(child)


def _label(mapping: Mapping) -> str:
    """Return where the label is, and which values are up and down."""
    if mapping.refuse is not None:
        return "refused; the message says what to do"
    if mapping.pair is not None:
        return "pairs" if mapping.pair.better is None else f"pairs; the better one: {_code(mapping.pair.better.text)}"
    if mapping.turns is not None and mapping.turns.label is None:
        return "pairs of the best answer to a message and each of the others"
    label = mapping.turns.label if mapping.turns is not None else mapping.label
    assert label is not None
    if label.path is None:
        return "a score; if there are several, `--label-field` chooses one"
    up, down = (", ".join(f"`{one}`" for one in values) for values in (label.rule.up, label.rule.down))
    values = f"up {up}, down {down}, others left out" if up else "label words"
    return f"{_code(label.path.text)}: {values}"


def _code(path: str) -> str:
    """Return a path as Markdown, in whose tables a bar ends a cell."""
    path = re.sub(r"^unescaped\((.*)\)$", r"\1", path)
    return (
        " or ".join(f"`{one}`" for one in path.split(" || "))
        if len(path) < 60 and "&&" not in path
        else "computed from several keys"
    )
