"""Find keys whose names suggest that the prompt needs them, at any depth of what the prompts and the answers are read from.

    {"input": {"kwargs": {"question": "...", "context": "..."}}}        input.kwargs.context
    {"messages": [{"role": "user", "content": "...", "files": [...]}]}  messages[].files

Values that are read, and the parts of messages that are read elsewhere, are no such keys. Parts of the AI SDK with data in a
user's message are: "messages[].data-chart".
"""

import functools
import re
from collections.abc import Collection, Iterable
from collections.abc import Mapping as AnyMapping
from typing import Any

from offline_kto.kto_core.feedback.message_keys import DATA_PART, MESSAGE_KEYS, ROLES
from offline_kto.kto_core.feedback.paths import opened_at
from offline_kto.kto_core.feedback.reads import Route
from offline_kto.kto_core.feedback.stored_values import opened

# Names of what a model saw beside the question: a system text, documents, earlier turns, tools, media.
_CONTEXT = re.compile(
    r"system(?:_(?:prompts?|messages?|msg|text|instructions?|context|role))?|sys|sys_(?:prompt|message|msg|text|instructions?)"
    r"|developer(?:_\w+)?|preamble|persona|(?:\w+_)?instructions?|tools|functions|(?:\w+_)?contexts?|(?:\w+_)?(?:docs?|documents?)"
    r"|(?:\w+_)?passages?|paragraphs?|snippets|sources|citations|references?|(?:\w+_)?chunks|retriev(?:ed|er)(?:_\w+)?|search_results"
    r"|used_tools|intermediate_steps|tool_(?:results?|outputs?)"
    r"|(?:\w+_)?knowledge(?:_\w+)?|grounding(?:_\w+)?|evidence|(?:\w+_)?history|(?:earlier|previous|prior|past)(?:_\w+)?|thread"
    r"|transcript|pre_?prompt|prompt_prefix|prefix|pre_?fill(?:ed)?|(?!(?:num|n|max|min|total|count|training|eval)_)\w+_steps|few_shot\w*|images?|image_\w+|audios?|audio_\w+|videos?|video_\w+|(?:\w+_)?attachments?|files|media"
)
# Keys of a message beside its text that change the meaning of a row.
_OF_MESSAGE = re.compile(r"file|document|error|deleted|hidden|edited\w*|weight", re.IGNORECASE)
_IDENTIFIES = re.compile(r"_(?:ids?|dates?|at|time|timestamp|fingerprint|version|tokens?|count|name|length|score)$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Keys in JSON text, also in text that is encoded twice.
_KEY_IN_TEXT = re.compile(r'"(\w+)\\*"\s*:')
# Objects below each other, and values of one record, that are looked at.
_DEEPEST, _MOST_VALUES = 12, 20_000


@functools.lru_cache(maxsize=4096)
def is_context(name: str) -> bool:
    """Return whether the name of a key suggests that the prompt needs its value."""
    word = re.sub(r"[-\s]+", "_", _CAMEL.sub("_", name.rpartition(".")[2])).lower()
    return _CONTEXT.fullmatch(word) is not None and _IDENTIFIES.search(word) is None


def changes_a_message(key: str) -> bool:
    """Return whether a key of a message, by its name, changes the meaning of a row."""
    return _OF_MESSAGE.fullmatch(key) is not None or key.startswith(DATA_PART)


def is_data_part(value: AnyMapping[str, object]) -> bool:
    """Return whether an object is a part of the AI SDK's with data, which only the code of an application turns into words."""
    kind = value.get("type")
    return type(kind) is str and kind.startswith(DATA_PART)


def unusual(items: Iterable[object]) -> list[object]:
    """Return the items of a list without messages of a role and a text, as nearly all are."""
    return [
        one
        for one in items
        if not (type(one) is dict and len(one) == 2 and type(one.get("content")) is str and "role" in one)
    ]


def context_names(value: object) -> set[str]:
    """Return the names in a value that are those of context, and names in JSON text, which is not parsed, that change a message.

    They tell cheaply whether a record has anything that the records before it do not have.
    """
    found: set[str] = set()
    rest: list[object] = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            if is_data_part(one):
                found.add(one["type"])
            for key, inner in one.items():
                if inner and type(key) is str:
                    if is_context(key):
                        found.add(key)
                    if type(inner) is not str or inner[:1] in "[{":
                        rest.append(inner)
        elif isinstance(one, list):
            rest += unusual(one)
        elif isinstance(one, str) and one[:1] in ("[", "{"):
            found.update(key for key in _KEY_IN_TEXT.findall(one) if is_context(key) or changes_a_message(key))
    return found


def unread_context(
    record: AnyMapping[str, Any], roots: Collection[str], read: Collection[Route], words: Collection[str]
) -> set[str]:
    """Return the keys of context that are not read, as "input.kwargs.context" and "messages[].files".

    Args:
        roots: the columns with prompts, answers and conversations.
        read: the routes that are read. They lead through lists.
        words: names that are read in the items of lists.
    """
    above = {route[:size] for route in read for size in range(1, len(route))}
    known = {route[-1] for route in read if opened_at(record, route) is not None}  # the answers may repeat them
    found: set[str] = set()
    rest: list[tuple[Route, str, object]] = [((root,), root, record.get(root)) for root in roots]
    for _ in range(_MOST_VALUES):
        if not rest:
            break
        route, name, stored = rest.pop()
        value = opened(stored)
        is_text = isinstance(stored, str) and isinstance(value, dict) and len(route) == 1 and route not in above
        if is_text or len(route) > _DEEPEST:
            continue
        if isinstance(value, dict) and _are_turns(value):
            value = list(value.values())
        if isinstance(value, list):
            rest += [(route, name if name.endswith("[]") else f"{name}[]", one) for one in value]
        elif isinstance(value, dict):
            kept = _without_parts(value)
            if ROLES.get(str(value.get("role"))) == "user":
                found |= {f"{name}.{kind}" for kind in _data_parts(value)}
            for key, inner in kept.items():
                here = (*route, key)
                is_read = here in above or here in read or key in known or ("[]" in name and key in words)
                if is_context(key) and not is_read:
                    found.add(f"{name}.{key}")
                else:
                    rest.append((here, f"{name}.{key}", inner))
    return found


def _without_parts(value: AnyMapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an object that say something; of a message, those beside the message itself."""
    is_message = "role" in value or "from" in value or _is_langchain(value)
    return {
        key: inner
        for key, inner in value.items()
        if inner not in (None, "", [], {}) and inner is not False and not (is_message and key in MESSAGE_KEYS)
    }


def _data_parts(message: AnyMapping[str, Any]) -> set[str]:
    """Return the types of the parts with data in a message."""
    parts = opened(message.get("parts"))
    return (
        {one["type"] for one in parts if isinstance(one, dict) and is_data_part(one)}
        if isinstance(parts, list)
        else set()
    )


def _are_turns(value: AnyMapping[str, object]) -> bool:
    """Return whether an object has the turns of a conversation by their ids."""
    return bool(value) and all(isinstance(one, dict) and ("role" in one or "author" in one) for one in value.values())


def _is_langchain(value: AnyMapping[str, object]) -> bool:
    return isinstance(value.get("kwargs", value.get("data")), dict) and isinstance(value.get("type"), str | int)
