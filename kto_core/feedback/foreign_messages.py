"""Recognise messages as other programs write them, and return them with a role and a content."""

from collections.abc import Mapping

from offline_kto.kto_core.feedback.message_keys import REASONING, ROLE_KEYS, SPELLINGS, TEXT_KEYS

_LANGCHAIN_TYPES = {
    *("human", "ai", "system", "tool", "function", "HumanMessage", "AIMessage", "SystemMessage", "ToolMessage"),
    *("HumanMessageChunk", "AIMessageChunk"),
}
# The roles that LangChain takes in pairs.
_PAIRED_ROLES = {"human", "user", "ai", "assistant", "system", "developer"}


def messages_in_columns(value: Mapping[str, object]) -> list[object] | None:
    """Return the messages in an object that has a list for each of their keys, as a `Sequence` of the datasets library is stored."""
    lists = {key: one for key, one in value.items() if isinstance(one, list | tuple)}
    sizes = {len(one) for one in lists.values()}
    if len(sizes) != 1 or lists.keys() != value.keys() or not any(key in lists for key in ROLE_KEYS):
        return None
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    if langchain_message(value) is not None or openinference_message(value) is not None:
        return True
    if is_reasoning_item(value) or responses_item(value) is not None:
        return True
    roles = [value.get(key) for key in ROLE_KEYS]
    return any(isinstance(role, str) for role in roles) and any(
        key in value for key in (*TEXT_KEYS, "parts", "tool_calls", "function_call", "refusal", *SPELLINGS, *REASONING)
    )


def is_exchange(value: object) -> bool:
    """Return whether a value is a question and its answer in one object."""
    if not isinstance(value, Mapping) or any(key in value for key in ROLE_KEYS):
        return False
    return isinstance(value.get("assistant"), str) and ("human" in value) != ("user" in value)


def langchain_message(value: Mapping[str, object]) -> dict[str, object] | None:
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
    for key in (
        "tool_calls",
        "reasoning_content",
    ):  # where older versions of LangChain keep calls, and DeepSeek its reasoning
        if not kept.get(key) and isinstance(extra, Mapping) and extra.get(key):
            kept[key] = extra[key]
    return {"role": kind, **kept}


def openinference_message(value: Mapping[str, object]) -> dict[str, object] | None:
    """Return a message of OpenInference's, whose keys begin with "message." or are nested; None if it is of another kind."""
    if (
        isinstance(inner := value.get("message"), Mapping)
        and isinstance(inner.get("role"), str)
        and "role" not in value
    ):
        return openinference_message({f"message.{key}": item for key, item in inner.items()})
    if not isinstance(value.get("message.role"), str):
        return None
    found = {key.removeprefix("message."): item for key, item in value.items() if key.startswith("message.")}
    calls, parts = found.pop("tool_calls", None), found.pop("contents", None)
    if isinstance(calls, list | tuple):
        found["tool_calls"] = [_without_prefixes(one, "tool_call.", "function.") for one in calls]
    if isinstance(parts, list | tuple) and not found.get("content"):
        found["content"] = [_without_prefixes(one, "message_content.") for one in parts]
    return found


def is_reasoning_item(value: Mapping[str, object]) -> bool:
    """Return whether a value is reasoning of the Responses API, which is encrypted or a summary: not the model's own words."""
    return (
        value.get("type") == "reasoning"
        and "role" not in value
        and ("summary" in value or "encrypted_content" in value)
    )


def responses_item(value: Mapping[str, object]) -> dict[str, object] | None:
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
        if isinstance(inner := found.get(prefix.removesuffix(".")), Mapping):
            found |= inner
        found = {key.removeprefix(prefix): item for key, item in found.items()}
    return found


def is_batch(value: list[object] | tuple[object, ...]) -> bool:
    """Return whether a list has one conversation, as LangChain writes the inputs of a batch."""
    only = value[0] if len(value) == 1 else None
    return isinstance(only, list | tuple) and all(isinstance(one, Mapping | list | tuple) for one in only)


def message_of_pair(value: object) -> dict[str, object] | None:
    """Return a message that LangChain writes as a pair of role and content, ["human", "Hi"]; None for any other value."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not isinstance(value[0], str):
        return None
    role, content = value
    is_content = isinstance(content, str) or (
        isinstance(content, list | tuple) and len(content) > 0 and all(isinstance(one, Mapping) for one in content)
    )
    return {"role": role, "content": content} if role in _PAIRED_ROLES and is_content else None


def messages_of_exchanges(value: object) -> list[dict[str, object]] | None:
    """Return the messages of a list of [question, answer] pairs, the last of which may have no answer; None for any other value."""
    if not isinstance(value, list | tuple):
        return None
    found: list[dict[str, object]] = []
    for number, pair in enumerate(value, 1):
        match pair:
            case [str() as asked, str() as answered]:
                found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            case [str() as asked, None] if number == len(value):
                found.append({"role": "user", "content": asked})
            case _:
                return None
    return found
