"""Convert the parts of a message's content to one form: Anthropic's, and LibreChat's for calls with their results."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeGuard

from offline_kto.kto_core.feedback.message_keys import DATA_PART
from offline_kto.kto_core.feedback.text_parts import are_text_parts, text_in


def has_calls_inside(content: object) -> bool:
    """Return whether parts of a content are calls of tools together with their results, as LibreChat writes them."""
    return isinstance(content, list | tuple) and any(isinstance(call_inside(part), Mapping) for part in content)


def call_inside(part: object) -> object:
    return part.get("tool_call") if isinstance(part, Mapping) and part.get("type") == "tool_call" else None


def result_inside(call: Mapping[str, object]) -> str:
    """Return the result in a call of LibreChat's; that of an assistant's function is beside its arguments."""
    function = call.get("function")
    found = call.get("output") or (function.get("output") if isinstance(function, Mapping) else None)
    return found if isinstance(found, str) else "" if found is None else json.dumps(found, ensure_ascii=False)


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
        if call.get("state") == "output-denied":
            result = "Tool execution denied."  # as the AI SDK says it to the model
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
    results = {str(one.get("call_id")): one.get("output") for one in kept if one["type"] == "function_call_output"}
    calls = {str(one.get("call_id")) for one in kept if one["type"] == "function_call"}
    after_text = False
    for one in kept:
        kind = one["type"]
        if kind == "message":
            inner = one.get("content") or []
            parts = list(inner) if isinstance(inner, list | tuple) else [inner]
            yield from ["\n", *parts] if after_text and parts else parts
            after_text = after_text or bool(parts)
        elif kind == "function_call":
            call = {"id": one.get("call_id"), "name": one.get("name"), "args": one.get("arguments")}
            if str(one.get("call_id")) in results:
                yield {"type": "tool_call", "tool_call": {**call, "output": text_in(results[str(one.get("call_id"))])}}
            else:
                yield {"type": "tool_use", **call}
            after_text = False
        elif kind != "function_call_output":
            yield one
        elif str(one.get("call_id")) not in calls:
            yield {"type": "tool_result", "tool_use_id": one.get("call_id"), "content": text_in(one.get("output"))}


def with_outputs(messages: list[object]) -> list[object]:
    """Return messages in which successive items of an output that calls tools are one message of the assistant's."""
    found: list[object] = []
    for is_item, group in itertools.groupby(messages, _is_output_item):
        run = list(group)
        calls, results = (
            {str(one.get("call_id")) for one in run if isinstance(one, Mapping) and one.get("type") == kind}
            for kind in ("function_call", "function_call_output")
        )
        joined = is_item and bool(calls) and results <= calls
        found += [{"role": "assistant", "content": run}] if joined else run
    return found


def _is_output_item(one: object) -> bool:
    if not isinstance(one, Mapping):
        return False
    kind = one.get("type")
    if kind == "message":
        return one.get("role") == "assistant"
    is_call = kind in ("function_call", "function_call_output") and isinstance(one.get("call_id"), str)
    return "role" not in one and (kind == "reasoning" or is_call)


def typed_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of the AI SDK's model messages, LangChain's, Gemini's or Bedrock's as Anthropic writes it; any other part as it is."""
    given = {key: item for key, item in part.items() if item is not None}
    kind = given.get("type")
    if kind == "tool-call" or (kind == "tool_call" and isinstance(given.get("name"), str)):
        name, used = given.get("toolName", given.get("name")), given.get("input", given.get("args"))
        return {"type": "tool_use", "id": given.get("toolCallId", given.get("id")), "name": name, "input": used}
    if kind == "tool-result":
        content = _result_of_ai_sdk(given.get("output", given.get("result")))
        return {"type": "tool_result", "tool_use_id": given.get("toolCallId"), "content": content}
    if kind is not None:
        return given
    if given.get("thought") is True and isinstance(given.get("text"), str):
        return {"type": "thinking", "thinking": given["text"]}
    for key, typed in _UNTYPED.items():
        if isinstance(inner := given.get(key), Mapping):
            return typed(inner)
    return given


def _result_of_ai_sdk(output: object) -> object:
    """Return the text of a result, or its parts."""
    inner = output.get("value", output.get("reason")) if isinstance(output, Mapping) and "type" in output else output
    return inner if isinstance(inner, str) or are_text_parts(inner) else _as_json(inner)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _use_of_bedrock(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": inner.get("toolUseId"), "name": inner.get("name"), "input": inner.get("input")}


def _result_of_bedrock(inner: Mapping[str, Any]) -> dict[str, Any]:
    parts = inner.get("content") or []
    texts = [_as_json(one["json"]) if isinstance(one, Mapping) and "json" in one else one for one in parts]
    return {"type": "tool_result", "tool_use_id": inner.get("toolUseId"), "content": texts}


def _reasoning_of_bedrock(inner: Mapping[str, Any]) -> dict[str, Any]:
    found = inner.get("reasoningText")
    return {"type": "thinking", "thinking": found.get("text") if isinstance(found, Mapping) else None}


def _call_of_gemini(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": inner.get("id"), "name": inner.get("name"), "input": inner.get("args")}


def _result_of_gemini(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": inner.get("id"), "content": _as_json(inner.get("response"))}


def _media(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "media", "media": inner}


# Parts of Gemini and Bedrock, which have a key for each kind in place of a type.
_UNTYPED: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    **dict.fromkeys(("functionCall", "function_call"), _call_of_gemini),
    **dict.fromkeys(("functionResponse", "function_response"), _result_of_gemini),
    **dict.fromkeys(
        ("inlineData", "inline_data", "fileData", "file_data", "image", "document", "video", "audio"), _media
    ),
    "toolUse": _use_of_bedrock,
    "toolResult": _result_of_bedrock,
    "reasoningContent": _reasoning_of_bedrock,
}
