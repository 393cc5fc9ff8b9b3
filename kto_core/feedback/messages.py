"""Convert messages of any known form to one form.

    "text"                                          text
    {"role": "user", "content": "..."}              a message
    [{"from": "human", "value": "..."}]             ShareGPT
    [{"human": "...", "assistant": "..."}]          ms-swift: a question and its answer
    {"messages": [...]}, {"choices": [{"message"}]} requests and responses of an API
    [{"type": "human", "data": {...}}]              LangChain; `data` may be left out
    [["human", "..."], ["ai", "..."]]               LangChain, messages as pairs of role and text
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
from typing import Any, TypeAlias, TypeGuard

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.content_parts import Parts
from offline_kto.kto_core.feedback.foreign_messages import (
    is_batch,
    is_exchange,
    is_message,
    is_reasoning_item,
    langchain_message,
    message_of_pair,
    messages_in_columns,
    openinference_message,
    responses_item,
)
from offline_kto.kto_core.feedback.foreign_parts import (
    ai_sdk_part,
    call_inside,
    has_calls_inside,
    is_output,
    parts_of_output,
    result_inside,
    with_outputs,
)
from offline_kto.kto_core.feedback.labels import holds
from offline_kto.kto_core.feedback.left_out import MEDIA, LeftOut
from offline_kto.kto_core.feedback.message_keys import MEDIA_KEYS, REASONING, ROLE_KEYS, ROLES, SPELLINGS, TEXT_KEYS
from offline_kto.kto_core.feedback.message_order import check_oldest_first
from offline_kto.kto_core.feedback.message_text import begins_with_roles, misread_messages
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.text_parts import are_text_parts
from offline_kto.kto_core.feedback.tool_calls import called, calls_in, without_repeats

Message: TypeAlias = dict[str, Any]
Turns: TypeAlias = str | tuple[Message, ...]

_MESSAGE_TEXT = re.compile(r"\s*[\[{]")

# Results of tools as the templates of Hermes and Qwen write them.
_RESULT_TAG = "<tool_response>"
_RESULT = re.compile(r"\s*<tool_response>\n?((?:(?!</?tool_response>).)*?)\n?</tool_response>\s*", re.DOTALL)


class MisreadMessagesError(FeedbackError):
    """Text that was meant to be messages, also if no label beside it was found."""


def as_turns(value: object, where: str, field: str) -> Turns:
    """Return text unchanged, and messages in any form as a tuple of messages.

    Raises:
        FeedbackError: neither text nor messages, an empty list, no role, no content, a Python repr of messages, messages that are
            stored newest first.
        LeftOut: images, sound or other media.
    """
    if isinstance(value, str):
        found = _read_text(value, where, field)
        if found is None:
            return value
        value = found
    if type(value) is list and value and all(map(_is_plain, value)):
        return tuple(map(dict, value))
    if isinstance(value, list | tuple) and are_text_parts(value):
        return "".join(part["text"] for part in value)
    messages = _message_list(value)
    if messages is None:
        raise FeedbackError(f"{where}: '{field}' must be text or a list of messages, got {quoted(value)}.")
    if len(messages) == 0:
        raise FeedbackError(f"{where}: '{field}' is an empty list. Give it a message, or remove the row.")
    check_oldest_first(messages, where, field)
    single = isinstance(value, Mapping) and len(messages) == 1
    turns = tuple(
        one
        for number, item in enumerate(with_outputs(messages), 1)
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


def _read_text(text: str, where: str, field: str) -> object | None:
    """Return the messages in a JSON text; None for any other text."""
    if (mistake := misread_messages(text)) is not None:
        raise MisreadMessagesError(f"{where}: '{field}' contains messages {mistake}")
    if _MESSAGE_TEXT.match(text) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if are_text_parts(value):
        return value
    messages = _message_list(value)
    if messages and (all(map(is_message, messages)) or (isinstance(value, list) and _are_exchanges_or_pairs(messages))):
        return value
    if begins_with_roles(text):
        raise FeedbackError(
            f"{where}: '{field}' begins like messages, {quoted(text)}, but is not valid JSON, or has messages without 'content'. "
            "It would be scored as text. Repair the cell, or remove the row."
        )
    return None


def _message_list(value: object) -> list[object] | None:
    """Return the messages in a value; None if it is of another kind."""
    if isinstance(value, Mapping) and not is_message(value):
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
    return list(value[0] if is_batch(value) else value)


def _are_exchanges_or_pairs(messages: list[object]) -> bool:
    return all(map(is_exchange, messages)) or all(message_of_pair(one) is not None for one in messages)


def _message(value: object, where: str, what: str) -> Iterator[Message]:
    """Yield the message, preceded by messages of tools if it contains tool results."""
    if _is_plain(value):
        yield dict(value)
        return
    value = message_of_pair(value) or value
    if not isinstance(value, Mapping):
        raise FeedbackError(
            f'{where}: {what} must look like {{"role": "user", "content": "..."}}, got {quoted(value)}.'
        )
    if is_exchange(value):
        for side in ("human", "user", "assistant"):
            if value.get(side) is not None:
                yield from _message({"role": side, "content": value[side]}, where, what)
        return
    if is_reasoning_item(value):
        return
    value = langchain_message(value) or openinference_message(value) or responses_item(value) or value
    given = {key: item for key, item in value.items() if item is not None}
    given = {SPELLINGS.get(key, key): item for key, item in given.items()}
    inside, used = given.get("parts"), given.pop("toolInvocations", None)
    if (
        not isinstance(inside, list | tuple) and isinstance(used, list | tuple) and used
    ):  # the first versions of the AI SDK
        inside = [*({"type": "tool-invocation", "toolInvocation": one} for one in used), given.get("content") or ""]
    if isinstance(inside, list | tuple) and inside and not isinstance(given.get("content"), list | tuple):
        given.pop("parts", None)  # other versions repeat the text of the parts in `content`
        given["content"] = [one for part in inside for one in ai_sdk_part(part) if one != ""]
    if is_output(content := given.get("content")):
        given["content"] = list(parts_of_output(content))
    if has_calls_inside(given.get("content")):
        yield from _steps(given, where, what)
        return
    for key in MEDIA_KEYS:
        if holds(given.get(key)):
            raise LeftOut(MEDIA, f"'{key}' of {what}")
    role = _take(given, ROLE_KEYS)
    if not isinstance(role, str):
        raise FeedbackError(
            f"{where}: {what} needs a 'role' that is a string, got {quoted(role)}{_instead(given) if role is None else ''}."
        )
    role = ROLES.get(role.strip().lower(), role)
    content = _take(given, TEXT_KEYS)
    refusal = given.pop("refusal", None)
    calls = [*calls_in(given.pop("tool_calls", None)), *calls_in(given.pop("function_call", None))]
    if role == "function_call":
        role, calls, content = "assistant", *called(content, where, what)
    text = "" if content is None else content
    if isinstance(content, list | tuple):
        parts = Parts(content, where, what)
        yield from parts.results
        text, calls = "".join(parts.texts), without_repeats([*calls, *parts.calls])
        if any(parts.reasoning) and not any(name in given for name in REASONING):
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


def _instead(given: Mapping[str, object]) -> str:
    """Return what a message without a role has."""
    kind = given.get("type")
    known = f" and its type {quoted(kind)}, which is not read" if isinstance(kind, str) else ""
    return f"; its keys are {quoted(list(given), 200)}{known}. If one of them has the text, name that key"


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


def _steps(given: dict[str, object], where: str, what: str) -> Iterator[Message]:
    """Yield the messages of an answer that contains tool calls with their results, in order."""
    content = given["content"]
    assert isinstance(content, list | tuple)
    parts: list[object] = []
    calls: list[Mapping[str, object]] = []
    for part in [*content, None]:
        call = call_inside(part)
        if isinstance(call, Mapping):
            calls.append(call)
            continue
        if calls:
            yield from _message({**given, "content": parts, "tool_calls": calls}, where, what)
            for one in calls:
                result = {"role": "tool", "content": result_inside(one), "tool_call_id": one.get("id")}
                yield {key: item for key, item in result.items() if item is not None}
            parts, calls = [], []
        parts += [part]
    if parts[:-1]:
        yield from _message({**given, "content": parts[:-1]}, where, what)


def _take(given: dict[str, object], names: tuple[str, ...]) -> object:
    """Remove the first of these keys that is present, and return its value."""
    for name in names:
        if name in given:
            return given.pop(name)
    return None
