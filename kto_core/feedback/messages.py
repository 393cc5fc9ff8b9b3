"""Convert messages of any known form to one form.

    "text"                                          text
    {"role": "user", "content": "..."}              a message
    [{"from": "human", "value": "..."}]             ShareGPT
    [{"human": "...", "assistant": "..."}]          ms-swift: a question and its answer
    {"messages": [...]}, {"choices": [{"message"}]} requests and responses of an API
    [{"type": "human", "data": {...}}]              LangChain; `data` may be left out
    [{"message.role": "user", ...}]                 OpenInference (Phoenix)
    [{"role": "user", "parts": [...]}]              the AI SDK, Gemini
    {"role": ["user", ...], "content": [...]}       a list for each key, as the datasets library stores a `Sequence`
    [{"type": "function_call", "call_id": ...}]     items of OpenAI's Responses API, among messages
    '[{"role": "user", ...}]'                       any of these as JSON text, as tables store them

A message has a `role` and a `content`, which are strings; other keys are kept for the chat template. Tool
calls have OpenAI's form, with their arguments as an object. The given values are not modified.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias, TypeGuard

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.labels import holds
from offline_kto.kto_core.feedback.left_out import MEDIA, LeftOut
from offline_kto.kto_core.feedback.message_text import begins_with_roles, misread_messages
from offline_kto.kto_core.feedback.quoting import quoted

Message: TypeAlias = dict[str, Any]
Turns: TypeAlias = str | tuple[Message, ...]

# Roles by the names that tools use, in lower case. Other names are kept: the chat template decides which it supports.
ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("user", "human", "prompter", "input_user"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),  # LLaMA-Factory's name and ms-swift's
}

# Keys of a message's role, content and reasoning; the first with a value is used.
_ROLE_KEYS = ("role", "from")
TEXT_KEYS: Final = ("content", "value", "text")
REASONING: Final = ("reasoning_content", "reasoning", "thinking", "thought")

# Keys as programs in JavaScript write them.
_SPELLINGS: Final[Mapping[str, str]] = {
    "toolCalls": "tool_calls",
    "functionCall": "function_call",
    "toolCallId": "tool_call_id",
    "reasoningContent": "reasoning_content",
}

_TEXT_PARTS = {"text", "output_text", "input_text"}
_REASONING_PARTS = {"thinking", "think", "reasoning", "redacted_thinking"}
_LANGCHAIN_TYPES = {
    *("human", "ai", "system", "tool", "function", "HumanMessage", "AIMessage", "SystemMessage", "ToolMessage"),
    *("HumanMessageChunk", "AIMessageChunk"),
}
_MEDIA_PARTS = re.compile("image|audio|video|file|document|media")

_MESSAGE_TEXT = re.compile(r"\s*[\[{]")

# Results of tools as the templates of Hermes and Qwen write them.
_RESULT_TAG = "<tool_response>"
_RESULT = re.compile(r"\s*<tool_response>\n?((?:(?!</?tool_response>).)*?)\n?</tool_response>\s*", re.DOTALL)

# Keys of a message with media or attached files, which the text does not contain.
MEDIA_KEYS: Final = (
    *("images", "image", "videos", "video", "audios", "audio", "image_url", "image_urls"),
    *("attachments", "experimental_attachments"),
)

# Keys of a message, in any form, that are read.
MESSAGE_KEYS: Final = frozenset(
    {
        *(*_ROLE_KEYS, *TEXT_KEYS, *REASONING, *_SPELLINGS, *_SPELLINGS.values(), *MEDIA_KEYS),
        *("type", "data", "kwargs", "additional_kwargs", "parts", "toolInvocations", "refusal", "tool_calls"),
        *("call_id", "arguments", "output", "summary", "encrypted_content", "human", "user", "assistant"),
    }
)


def as_turns(value: object, where: str, field: str) -> Turns:
    """Return text unchanged, and messages in any form as a tuple of messages.

    Raises:
        FeedbackError: neither text nor messages, an empty list, no role, no content, a Python repr of messages.
        LeftOut: images, sound or other media.
    """
    if isinstance(value, str):
        found = _read_text(value, where, field)
        if found is None:
            return value
        value = found
    if type(value) is list and value and all(map(_is_plain, value)):
        return tuple(map(dict, value))
    if isinstance(value, list | tuple) and _are_text_parts(value):
        return "".join(part["text"] for part in value)
    messages = _message_list(value)
    if messages is None:
        raise FeedbackError(f"{where}: '{field}' must be text or a list of messages, got {quoted(value)}.")
    if len(messages) == 0:
        raise FeedbackError(f"{where}: '{field}' is an empty list. Give it a message, or remove the row.")
    single = isinstance(value, Mapping) and len(messages) == 1
    turns = tuple(
        one
        for number, item in enumerate(messages, 1)
        for one in _message(item, where, f"'{field}'" if single else f"message {number} of '{field}'")
    )
    if not turns:
        raise FeedbackError(f"{where}: '{field}' contains only reasoning. Give it a message, or remove the row.")
    return turns


def as_conversation(value: object, where: str, field: str) -> tuple[Message, ...]:
    """Convert like `as_turns`, but refuse text, for columns such as `messages`."""
    turns = as_turns(value, where, field)
    if isinstance(turns, str):
        raise FeedbackError(f"{where}: '{field}' must be a list of messages, got the text {quoted(turns)}.")
    return turns


def said(role: str, turns: Turns) -> tuple[Message, ...]:
    """Return text as one message of a role, and messages as they are."""
    return ({"role": role, "content": turns},) if isinstance(turns, str) else turns


def has_tool_calls(message: Mapping[str, object]) -> bool:
    """Return whether a message calls a tool."""
    calls = message.get("tool_calls")
    return isinstance(calls, list | tuple) and len(calls) > 0


def are_tool_calls(value: object) -> bool:
    """Return whether a value is a list of tool calls, or one of them, also as JSON text."""
    if not value:
        return False
    calls = list(_calls(value))
    return bool(calls) and all(isinstance(one, Mapping) and "function" in one for one in calls)


def _read_text(text: str, where: str, field: str) -> object | None:
    """Return the messages in a JSON text; None for any other text."""
    if (mistake := misread_messages(text)) is not None:
        raise FeedbackError(f"{where}: '{field}' contains messages {mistake}")
    if _MESSAGE_TEXT.match(text) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if _are_text_parts(value):
        return value
    messages = _message_list(value)
    if messages and (all(map(_is_message, messages)) or (isinstance(value, list) and all(map(_is_exchange, messages)))):
        return value
    if begins_with_roles(text):
        raise FeedbackError(
            f"{where}: '{field}' begins like messages, {quoted(text)}, but is not valid JSON, or has messages without 'content'. "
            "It would be scored as text. Repair the cell, or remove the row."
        )
    return None


def _are_text_parts(value: object) -> bool:
    """Return whether a value is the content of one message as a list of parts that are text."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_text_part, value))


def _is_text_part(part: object) -> bool:
    if not isinstance(part, Mapping) or any(key in part for key in _ROLE_KEYS):
        return False
    kind = part.get("type")
    return isinstance(kind, str) and kind in _TEXT_PARTS and isinstance(part.get("text"), str)


def _message_list(value: object) -> list[object] | None:
    """Return the messages in a value; None if it is of another kind."""
    if isinstance(value, Mapping) and not _is_message(value):
        if isinstance(value.get("messages"), list | tuple):
            value = value["messages"]
        elif isinstance(value.get("choices"), list | tuple) and value["choices"]:
            first = value["choices"][0]
            value = first.get("message") if isinstance(first, Mapping) else None
        elif (columns := messages_in_columns(value)) is not None:
            value = columns
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list | tuple):
        return None
    if len(value) == 1 and isinstance(value[0], list | tuple):  # LangChain writes a batch of one conversation
        value = value[0]
    return list(value)


def messages_in_columns(value: Mapping[str, object]) -> list[object] | None:
    """Return the messages in an object that has a list for each of their keys, as a `Sequence` of the datasets library is stored."""
    lists = {key: one for key, one in value.items() if isinstance(one, list | tuple)}
    sizes = {len(one) for one in lists.values()}
    if len(sizes) != 1 or lists.keys() != value.keys() or not any(key in lists for key in _ROLE_KEYS):
        return None
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    if _langchain(value) is not None or isinstance(value.get("message.role"), str):
        return True
    if _is_reasoning_item(value) or _responses_item(value) is not None:
        return True
    roles = [value.get(key) for key in _ROLE_KEYS]
    return any(isinstance(role, str) for role in roles) and any(
        key in value for key in (*TEXT_KEYS, "parts", "tool_calls", "function_call", "refusal", *_SPELLINGS, *REASONING)
    )


def _is_exchange(value: object) -> bool:
    """Return whether a value is a question and its answer in one object."""
    if not isinstance(value, Mapping) or any(key in value for key in _ROLE_KEYS):
        return False
    return isinstance(value.get("assistant"), str) and ("human" in value) != ("user" in value)


def _langchain(value: Mapping[str, object]) -> dict[str, object] | None:
    """Return a message of LangChain's as role and content; None if it is of another kind."""
    inner = value.get("kwargs", value.get("data"))
    kind = value.get("type")
    if inner is None and "role" not in value and isinstance(kind, str) and kind in _LANGCHAIN_TYPES:
        inner = value
    if not isinstance(inner, Mapping) or "content" not in inner:
        return None
    kind = inner.get("type", kind)
    names = value.get("id")
    if kind in (None, "constructor") and isinstance(names, list) and names:
        kind = str(names[-1])
    if not isinstance(kind, str):
        return None
    kind = kind.removesuffix("Chunk").removesuffix("Message").lower()
    kept = {key: item for key, item in inner.items() if key in ("content", "tool_calls", "name", "tool_call_id")}
    extra = inner.get("additional_kwargs")
    if not kept.get("tool_calls") and isinstance(extra, Mapping) and extra.get("tool_calls"):
        kept["tool_calls"] = extra["tool_calls"]  # where older versions of LangChain keep them
    return {"role": kind, **kept}


def _openinference(value: Mapping[str, object]) -> dict[str, object] | None:
    """Return a message of OpenInference's, whose keys begin with "message."; None if it is of another kind."""
    if not isinstance(value.get("message.role"), str):
        return None
    found = {key.removeprefix("message."): item for key, item in value.items() if key.startswith("message.")}
    calls, parts = found.pop("tool_calls", None), found.pop("contents", None)
    if isinstance(calls, list | tuple):
        found["tool_calls"] = [_without_prefixes(one, "tool_call.", "function.") for one in calls]
    if isinstance(parts, list | tuple) and not found.get("content"):
        found["content"] = [_without_prefixes(one, "message_content.") for one in parts]
    return found


def _is_reasoning_item(value: Mapping[str, object]) -> bool:
    """Return whether a value is reasoning of the Responses API, which is encrypted or a summary: not the model's own words."""
    return (
        value.get("type") == "reasoning"
        and "role" not in value
        and ("summary" in value or "encrypted_content" in value)
    )


def _responses_item(value: Mapping[str, object]) -> dict[str, object] | None:
    """Return a call of a function, or its result, of the Responses API as a message; None if it is of another kind."""
    kind, name = value.get("type"), value.get("call_id")
    if "role" in value or not isinstance(name, str):
        return None
    if kind == "function_call":
        call = {"id": name, "name": value.get("name"), "arguments": value.get("arguments")}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "content": value.get("output"), "tool_call_id": name}
    return None


def _without_prefixes(value: object, *prefixes: str) -> object:
    if not isinstance(value, Mapping):
        return value
    found = dict(value)
    for prefix in prefixes:
        found = {key.removeprefix(prefix): item for key, item in found.items()}
    return found


def _message(value: object, where: str, what: str) -> Iterator[Message]:
    """Yield the message, preceded by messages of tools if it contains tool results."""
    if _is_plain(value):
        yield dict(value)
        return
    if not isinstance(value, Mapping):
        raise FeedbackError(
            f'{where}: {what} must look like {{"role": "user", "content": "..."}}, got {quoted(value)}.'
        )
    if _is_exchange(value):
        for side in ("human", "user", "assistant"):
            if value.get(side) is not None:
                yield from _message({"role": side, "content": value[side]}, where, what)
        return
    if _is_reasoning_item(value):
        return
    value = _langchain(value) or _openinference(value) or _responses_item(value) or value
    given = {key: item for key, item in value.items() if item is not None}
    given = {_SPELLINGS.get(key, key): item for key, item in given.items()}
    inside, used = given.get("parts"), given.pop("toolInvocations", None)
    if (
        not isinstance(inside, list | tuple) and isinstance(used, list | tuple) and used
    ):  # the first versions of the AI SDK
        inside = [*({"type": "tool-invocation", "toolInvocation": one} for one in used), given.get("content") or ""]
    if isinstance(inside, list | tuple) and inside and not isinstance(given.get("content"), list | tuple):
        given.pop("parts", None)  # other versions repeat the text of the parts in `content`
        given["content"] = [one for part in inside for one in _ai_sdk_part(part) if one != ""]
    if _has_calls_inside(given.get("content")):
        yield from _steps(given, where, what)
        return
    for key in MEDIA_KEYS:
        if holds(given.get(key)):
            raise LeftOut(MEDIA, f"'{key}' of {what}")
    role = _take(given, _ROLE_KEYS)
    if not isinstance(role, str):
        keys = (
            f"; its keys are {quoted(list(given), 200)}. If one of them has the text, name that key"
            if role is None
            else ""
        )
        raise FeedbackError(f"{where}: {what} needs a 'role' that is a string, got {quoted(role)}{keys}.")
    role = ROLES.get(role.strip().lower(), role)
    content = _take(given, TEXT_KEYS)
    refusal = given.pop("refusal", None)
    calls = [*_calls(given.pop("tool_calls", None)), *_calls(given.pop("function_call", None))]
    if role == "function_call":
        role, calls, content = "assistant", *_called(content, where, what)
    text = "" if content is None else content
    if isinstance(content, list | tuple):
        parts = _Parts(content, where, what)
        yield from parts.results
        text, calls = "".join(parts.texts), [*calls, *parts.calls]
        if parts.reasoning and not any(name in given for name in REASONING):
            given["reasoning_content"] = "".join(parts.reasoning)
        if parts.results and not text and not calls:
            return
    elif content is not None and not isinstance(content, str):
        raise FeedbackError(f"{where}: the 'content' of {what} must be a string, got {quoted(content)}.")
    elif content is None and isinstance(refusal, str):
        text = refusal
    elif content is None and not calls:
        raise FeedbackError(f"{where}: {what} has no 'content'. Give it a string.")
    texts = _results_in(text) if role == "tool" and isinstance(text, str) and not calls else [text]
    for one in texts:
        yield {"role": role, "content": one, **copy.deepcopy(given), **({"tool_calls": calls} if calls else {})}


def _results_in(text: str) -> list[str]:
    """Return the results of tools in a text without the tags around them, which the chat template writes too."""
    found: list[str] = []
    end = 0
    while end < len(text) and (match := _RESULT.match(text, end)) is not None:
        found.append(match[1])
        end = match.end()
    return found if found and end == len(text) else [text]


def _is_plain(value: object) -> TypeGuard[Message]:
    """Return whether a value is a message of role and content that needs no conversion, as nearly all do."""
    if type(value) is not dict or len(value) != 2:
        return False
    role, content = value.get("role"), value.get("content")
    return type(content) is str and (
        role in ("user", "assistant", "system") or (role == "tool" and _RESULT_TAG not in content)
    )


def _has_calls_inside(content: object) -> bool:
    """Return whether parts of a content are calls of tools together with their results, as LibreChat writes them."""
    return isinstance(content, list | tuple) and any(isinstance(_call_inside(part), Mapping) for part in content)


def _call_inside(part: object) -> object:
    return part.get("tool_call") if isinstance(part, Mapping) and part.get("type") == "tool_call" else None


def _ai_sdk_part(part: object) -> Iterator[object]:
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
    elif kind != "step-start" and not kind.startswith("source"):
        yield part


def _steps(given: dict[str, object], where: str, what: str) -> Iterator[Message]:
    """Yield the messages of an answer that contains tool calls with their results, in order."""
    content = given["content"]
    assert isinstance(content, list | tuple)
    parts: list[object] = []
    calls: list[Mapping[str, object]] = []
    for part in [*content, None]:
        call = _call_inside(part)
        if isinstance(call, Mapping):
            calls.append(call)
            continue
        if calls:
            yield from _message({**given, "content": parts, "tool_calls": calls}, where, what)
            for one in calls:
                result = {"role": "tool", "content": _result_inside(one), "tool_call_id": one.get("id")}
                yield {key: item for key, item in result.items() if item is not None}
            parts, calls = [], []
        parts += [part]
    if parts[:-1]:
        yield from _message({**given, "content": parts[:-1]}, where, what)


def _result_inside(call: Mapping[str, object]) -> str:
    """Return the result in a call of LibreChat's; that of an assistant's function is beside its arguments."""
    function = call.get("function")
    found = call.get("output") or (function.get("output") if isinstance(function, Mapping) else None)
    return found if isinstance(found, str) else "" if found is None else json.dumps(found, ensure_ascii=False)


def _take(given: dict[str, object], names: tuple[str, ...]) -> object:
    """Remove the first of these keys that is present, and return its value."""
    for name in names:
        if name in given:
            return given.pop(name)
    return None


def _called(content: object, where: str, what: str) -> tuple[list[object], str]:
    """Return the tool calls in the JSON text of a turn `function_call` or `tool_call`, and an empty text."""
    calls = list(_calls(content))
    if not calls or not all(isinstance(one, Mapping) and "function" in one for one in calls):
        raise FeedbackError(
            f'{where}: {what} has the role "function_call" or "tool_call" and must contain JSON like {{"name": "...", "arguments": {{}}}}, '
            f"got {quoted(content)}."
        )
    return calls, ""


def _calls(value: object) -> Iterator[object]:
    """Yield tool calls in OpenAI's form, with their arguments as an object."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    for call in [value] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []:
        yield _call(call)


def _call(call: object) -> object:
    if not isinstance(call, Mapping):
        return copy.deepcopy(call)
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


class _Parts:
    """The content of a message that is a list of parts, sorted by kind."""

    def __init__(self, parts: list[Any] | tuple[Any, ...], where: str, what: str) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[object] = []
        self.results: list[Message] = []  # messages of tools
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
            self.calls.append(_call(given))
        elif kind == "tool_result":
            inner = given.get("content", "")
            if not isinstance(inner, str | list | tuple):
                raise FeedbackError(
                    f"{where}: {what} contains {quoted(part)}; the 'content' of a tool result must be text or parts."
                )
            inner = inner if isinstance(inner, str) else "".join(_Parts(inner, where, what).texts)
            self.results.append({"role": "tool", "content": inner, "tool_call_id": given.get("tool_use_id")})
        elif _MEDIA_PARTS.search(kind):
            raise LeftOut(MEDIA, f"{what} contains {quoted(part)}")
        else:
            raise FeedbackError(
                f'{where}: {what} contains {quoted(part)}; give text, or parts like {{"type": "text", "text": "..."}}.'
            )
