"""Read the content of messages that is a list of parts: text, reasoning, calls and results of tools."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.left_out import MEDIA, LeftOut
from offline_kto.kto_core.feedback.message_keys import DATA_PART, ROLE_KEYS
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import opened
from offline_kto.kto_core.feedback.tool_calls import call_in

_TEXT_PARTS = {"text", "output_text", "input_text"}
_REASONING_PARTS = {"thinking", "think", "reasoning", "redacted_thinking"}
_MEDIA_PARTS = re.compile("image|audio|video|file|document|media")


def are_text_parts(value: object) -> TypeGuard[list[Mapping[str, str]]]:
    """Return whether a value is the content of one message as a list of parts that are text."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_text_part, value))


def text_in(value: object) -> object:
    """Return the text in a list of parts that are text, also as JSON text; any other value as it is."""
    found = opened(value)
    return "".join(part["text"] for part in found) if are_text_parts(found) else value


def _is_text_part(part: object) -> bool:
    if not isinstance(part, Mapping) or any(key in part for key in ROLE_KEYS):
        return False
    kind = part.get("type")
    return isinstance(kind, str) and kind in _TEXT_PARTS and isinstance(part.get("text"), str)


def has_calls_inside(content: object) -> bool:
    """Return whether parts of a content are calls of tools together with their results, as LibreChat writes them."""
    return isinstance(content, list | tuple) and any(isinstance(call_inside(part), Mapping) for part in content)


def call_inside(part: object) -> object:
    return part.get("tool_call") if isinstance(part, Mapping) and part.get("type") == "tool_call" else None


def ai_sdk_part(part: object) -> Iterator[object]:
    """Yield a part of a message of the AI SDK's as other tools write it; parts that are not the model's words are skipped."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        yield part
    elif kind == "reasoning":
        yield {"type": kind, "text": part.get("text") or part.get("reasoning")}
    elif kind == "dynamic-tool" or kind.startswith("tool-"):
        inner = part.get("toolInvocation")
        call = inner if isinstance(inner, Mapping) else part
        name = call.get("toolName") or kind.removeprefix("tool-")
        used: dict[str, object] = {
            "id": call.get("toolCallId"),
            "name": name,
            "args": call.get("input", call.get("args", {})),
        }
        result = next((call[key] for key in ("output", "result", "errorText") if call.get(key) is not None), None)
        if result is None:
            yield {"type": "tool_use", **used}
        else:
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            yield {"type": "tool_call", "tool_call": {**used, "output": text}}
    elif kind != "step-start" and not kind.startswith(("source", DATA_PART)):
        yield part


def is_output(content: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Return whether a content is the output of OpenAI's Responses API: messages, and calls of tools with their results."""
    return (
        isinstance(content, list | tuple)
        and len(content) > 0
        and all(isinstance(one, Mapping) and isinstance(one.get("type"), str) for one in content)
        and any(one["type"] in ("function_call", "message") for one in content)
    )


def parts_of_output(items: Iterable[Mapping[str, Any]]) -> Iterator[object]:
    """Yield the parts of an output, each call with its result; reasoning, which is encrypted or a summary, is skipped."""
    kept = [one for one in items if one["type"] != "reasoning"]
    results = {one.get("call_id"): one.get("output") for one in kept if one["type"] == "function_call_output"}
    after_text = False
    for one in kept:
        kind = one["type"]
        if kind == "message":
            inner = one.get("content") or []
            parts = [inner] if isinstance(inner, str) else list(inner)
            yield from ["\n", *parts] if after_text and parts else parts
            after_text = after_text or bool(parts)
        elif kind == "function_call":
            call = {"id": one.get("call_id"), "name": one.get("name"), "args": one.get("arguments")}
            if one.get("call_id") in results:
                yield {"type": "tool_call", "tool_call": {**call, "output": text_in(results[one.get("call_id")])}}
            else:
                yield {"type": "tool_use", **call}
            after_text = False
        elif kind != "function_call_output":
            yield one


def result_inside(call: Mapping[str, object]) -> str:
    """Return the result in a call of LibreChat's; that of an assistant's function is beside its arguments."""
    function = call.get("function")
    found = call.get("output") or (function.get("output") if isinstance(function, Mapping) else None)
    return found if isinstance(found, str) else "" if found is None else json.dumps(found, ensure_ascii=False)


class Parts:
    """The content of a message that is a list of parts, sorted by kind."""

    def __init__(self, parts: list[Any] | tuple[Any, ...], where: str, what: str) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[object] = []
        self.results: list[dict[str, Any]] = []  # messages of tools
        for part in parts:
            self._add(part, where, what)

    def _add(self, part: object, where: str, what: str) -> None:
        if isinstance(part, str):
            self.texts.append(part)
            return
        given = {key: item for key, item in part.items() if item is not None} if isinstance(part, Mapping) else {}
        kind = str(given.get("type", "text" if "text" in given else ""))
        if isinstance(given.get("text"), Mapping):  # the Assistants API, and LibreChat
            given["text"] = given["text"].get("value")
        text = next(
            (given[key] for key in ("text", kind, "refusal", "content") if isinstance(given.get(key), str)), None
        )
        if kind in _TEXT_PARTS | {"refusal"} and isinstance(text, str):
            self.texts.append(text)
        elif kind in _REASONING_PARTS:
            self.reasoning.append(text or "")
        elif kind == "tool_use" and isinstance(given.get("name"), str):
            self.calls.append(call_in(given))
        elif kind == "tool_result":
            inner = given.get("content", "")
            if not isinstance(inner, str | list | tuple):
                raise FeedbackError(
                    f"{where}: {what} contains {quoted(part)}; the 'content' of a tool result must be text or parts."
                )
            inner = inner if isinstance(inner, str) else "".join(Parts(inner, where, what).texts)
            self.results.append({"role": "tool", "content": inner, "tool_call_id": given.get("tool_use_id")})
        elif _MEDIA_PARTS.search(kind):
            raise LeftOut(MEDIA, f"{what} contains {quoted(part)}")
        else:
            raise FeedbackError(
                f'{where}: {what} contains {quoted(part)}; give text, or parts like {{"type": "text", "text": "..."}}.'
            )
