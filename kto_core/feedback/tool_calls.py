"""Convert tool calls to OpenAI's form, with their arguments as an object."""

import copy
import json
from collections.abc import Iterator, Mapping

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.quoting import quoted


def has_tool_calls(message: Mapping[str, object]) -> bool:
    """Return whether a message calls a tool."""
    calls = message.get("tool_calls")
    return isinstance(calls, list | tuple) and len(calls) > 0


def are_tool_calls(value: object) -> bool:
    """Return whether a value is a list of tool calls, or one of them, also as JSON text."""
    if not value:
        return False
    calls = list(calls_in(value))
    return bool(calls) and all(isinstance(one, Mapping) and "function" in one for one in calls)


def called(content: object, where: str, what: str) -> tuple[list[object], str]:
    """Return the tool calls in the JSON text of a turn `function_call` or `tool_call`, and an empty text."""
    calls = list(calls_in(content))
    if not calls or not all(isinstance(one, Mapping) and "function" in one for one in calls):
        raise FeedbackError(
            f'{where}: {what} has the role "function_call" or "tool_call" and must contain JSON like {{"name": "...", "arguments": {{}}}}, '
            f"got {quoted(content)}."
        )
    return calls, ""


def calls_in(value: object) -> Iterator[object]:
    """Yield tool calls in OpenAI's form, with their arguments as an object."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    for call in [value] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []:
        yield call_in(call)


def call_in(call: object) -> object:
    if not isinstance(call, Mapping):
        return copy.deepcopy(call)
    if "toolName" in call and "name" not in call:  # the AI SDK
        call = {**call, "id": call.get("toolCallId"), "name": call["toolName"]}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return copy.deepcopy(dict(call))
    arguments: object = next(
        (function[key] for key in ("arguments", "args", "parameters", "input") if key in function), {}
    )
    if isinstance(arguments, str):
        read = _read_object(arguments)
        arguments = arguments if read is None else read
    kept = {key: call[key] for key in ("id", "index") if call.get(key) is not None}
    return {
        **kept,
        "type": "function",
        "function": {"name": function["name"], "arguments": copy.deepcopy({} if arguments is None else arguments)},
    }


def without_repeats(calls: list[object]) -> list[object]:
    """Return tool calls without those that have the id of an earlier one: some programs write each call twice."""
    found: dict[object, object] = {}
    for number, call in enumerate(calls):
        name = call.get("id") if isinstance(call, Mapping) else None
        found.setdefault(name if isinstance(name, str) else number, call)
    return list(found.values())


def _read_object(text: str) -> dict[str, object] | None:
    """Return the object in a JSON text of arguments, also if it is encoded twice; None for other text.

    An object with a repeated key is not parsed, because a value would be lost.
    """
    try:
        read = json.loads(text, object_pairs_hook=_only_once) if text.strip() else {}
        read = json.loads(read, object_pairs_hook=_only_once) if isinstance(read, str) else read
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _only_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a repeated key")
    return dict(pairs)
