"""Find what was asked and answered in the records of tools that log calls, and what was handed in by raters.

These are functions of mappings (see `paths`): they do what JMESPath cannot say. All of them read JSON text, as tables
store it, like what it says.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

# Keys of a call's inputs and outputs that hold the text, by the name that programmers give them.
_ASKED: Final = (
    *("prompt", "input", "inputs", "question", "query", "instruction", "user_input", "user_query", "user_message"),
    *("user_prompt", "message", "text"),
)
_ANSWERED: Final = (
    *("output", "outputs", "answer", "response", "completion", "result", "generation", "output_text", "text", "message"),
    *("content", "reply"),
)
_HISTORY: Final = ("chat_history", "history")
_SYSTEM: Final = ("system", "system_prompt", "system_message")
_SEGMENT = re.compile(r"\[[^\]]*\]|[^.]+")
_JSON_START = re.compile(r"\s*[\[{]")
# Gradio puts an apostrophe before cells that a spreadsheet may take for a formula.
_ESCAPED = re.compile(r"'(?=[=+\-@\t\n]|.*,[=+\-@\t\n])", re.DOTALL)


def opened(value: Any) -> Any:
    """Return the list or object in a JSON text; any other value as it is."""
    if not isinstance(value, str) or _JSON_START.match(value) is None:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def has(value: object, keys: list[str]) -> bool:
    """Return whether a value is an object with all of these keys; their values may be null."""
    found = opened(value)
    return isinstance(found, dict) and all(key in found for key in keys)


def under(value: object, prefix: str) -> dict[str, object]:
    """Return the keys of an object that begin with a prefix, without it, where they have a value."""
    found = value if isinstance(value, dict) else {}
    return {key[len(prefix) :]: item for key, item in found.items() if key.startswith(prefix) and item is not None}


def nested(value: object) -> object:
    """Return an object whose keys are paths ("output.choices.0.message") as nested objects and lists.

    Null values are left out. What stands in brackets is one key: "feedback.[wandb.reaction.1].payload".
    """
    tree: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        *parents, last = _SEGMENT.findall(key) or [key]
        at = tree
        for one in parents:
            inner = at.setdefault(one, {})
            if not isinstance(inner, dict):
                break
            at = inner
        else:
            if item is not None:
                at[last] = opened(item)
    return _with_lists(tree)


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    found = {key: _with_lists(item) for key, item in value.items()}
    numbers = [str(number) for number in range(len(found))]
    return [found[number] for number in numbers] if found and set(found) == set(numbers) else found


def matching(values: object, key: str, value: object) -> list[object]:
    """Return the objects of a list in which a key has a value, compared as text."""
    found = values if isinstance(values, list) else []
    return [one for one in found if isinstance(one, dict) and str(one.get(key)) == str(value)]


def unescaped(value: object) -> object:
    """Return a cell without the apostrophe that Gradio put before it."""
    return _ESCAPED.sub("", value, count=1) if isinstance(value, str) and _ESCAPED.match(value) else value


def asked(value: object) -> object:
    """Return what a call was asked: text, or messages with the system text and the history that stand beside it.

    Raises:
        ValueError: an object in which nothing says what the question is.
    """
    found = _known(value, (*_ASKED, "messages", "args", "kwargs"))
    if not isinstance(found, Mapping) or "role" in found:
        return found
    call = _arguments(found)
    if call is not found:
        return asked(call)
    messages = opened(found.get("messages"))
    text = messages if isinstance(messages, list) and messages else _text_at(found, _ASKED, "asked")
    if isinstance(text, Mapping):
        return asked(text)
    return _with_context(found, text)


def _with_context(found: Mapping[str, Any], text: object) -> object:
    """Return a question, preceded by the system text and the earlier turns that stand beside it."""
    turns = text if isinstance(text, list) else None
    before: list[object] = []
    for name in _HISTORY:
        earlier = opened(found.get(name))
        if not earlier:
            continue
        if not isinstance(earlier, list) or not all(isinstance(one, Mapping) for one in earlier):
            raise ValueError(f"'{name}' stands beside the question and is no list of messages")
        before += earlier
    system = next((found[name] for name in _SYSTEM if isinstance(found.get(name), str) and found[name].strip()), None)
    if system is not None:
        before.insert(0, {"role": "system", "content": system})
    if not before or text is None:
        return text
    return [*before, *(turns if turns is not None else [{"role": "user", "content": text}])]


def _arguments(call: Mapping[str, Any]) -> Any:
    """Return the only argument of a function that was called with `args` and `kwargs`; other objects as they are."""
    if not call or not set(call) <= {"args", "kwargs"}:
        return call
    args, kwargs = opened(call.get("args")) or [], opened(call.get("kwargs")) or {}
    if isinstance(args, list) and isinstance(kwargs, dict) and len(args) + bool(kwargs) == 1:
        return args[0] if args else kwargs
    raise ValueError("several arguments, and nothing says which of them is the question")


def answered(value: object) -> object:
    """Return what a call answered: text or messages; None if there is nothing.

    Raises:
        ValueError: an object in which nothing says what the answer is.
    """
    found = _known(value, (*_ANSWERED, "choices", "generations", "messages"))
    if isinstance(found, list):
        # The Responses API lists the reasoning, which is encrypted or a summary, before the message.
        kept = [one for one in found if not (isinstance(one, Mapping) and one.get("type") == "reasoning")]
        return kept or None
    if not isinstance(found, Mapping) or "role" in found or _is_langchain(found):
        return found
    for name in ("choices", "generations"):
        options = opened(found.get(name))
        while isinstance(options, list) and len(options) == 1 and isinstance(options[0], list):
            options = options[0]  # a batch of one
        if isinstance(options, list) and options:
            if len(options) > 1:
                raise ValueError(f"several {name}, and nothing says which of them was judged")
            return _chosen(options[0])
    messages = opened(found.get("messages"))
    if isinstance(messages, list) and messages:
        return messages
    text = _text_at(found, _ANSWERED, "answered")
    return answered(text) if isinstance(text, Mapping | list) else text


def _chosen(option: object) -> object:
    if not isinstance(option, Mapping):
        return option
    message = opened(option.get("message")) or option.get("text")
    # A table may have the message's content alone.
    return message.get("content") if isinstance(message, Mapping) and set(message) == {"content"} else message


def _is_langchain(value: Mapping[str, object]) -> bool:
    return isinstance(value.get("kwargs", value.get("data")), Mapping) or isinstance(value.get("type"), str)


def _known(value: object, keys: tuple[str, ...]) -> object:
    """Return the object in a JSON text if it has one of these keys: other JSON text may be what somebody wrote."""
    found = opened(value)
    if isinstance(value, str) and isinstance(found, dict) and not any(key in found for key in keys):
        return value
    if isinstance(value, str) and isinstance(found, list) and not all(isinstance(one, dict) for one in found):
        return value
    return found


def _text_at(found: Mapping[str, Any], names: tuple[str, ...], what: str) -> object:
    """Return the value of the only key that is one of these, or of the only key at all."""
    there = {key: item for key, item in found.items() if item not in (None, "", [], {})}
    beside = {*_HISTORY, *_SYSTEM}
    known = [name for name in names if name in there]
    if not known:
        known = [key for key in there if key not in beside]
    if not known:
        return None
    if len(known) > 1:
        raise ValueError(f"nothing says which of the keys {', '.join(known[:6])} holds what was {what}")
    return opened(there[known[0]])


def submitted(record: object) -> dict[str, list[object]]:
    """Return the answers to each question of an Argilla record that were handed in, by the question's name.

    Drafts and discarded answers do not count. Where an answer has no status of its own, the record's status does.
    """
    if not isinstance(record, dict):
        return {}
    whole = record.get("status") not in ("pending", "draft", "discarded")
    found: dict[str, list[object]] = {}
    for name, values, statuses in _questions(record):
        kept = [
            value
            for value, status in zip(values, statuses, strict=True)
            if value is not None and (status == "submitted" or (status is None and whole))
        ]
        if kept:
            found[name] = kept
    return found


def _questions(record: dict[str, Any]) -> Any:
    """Yield (name, values, statuses) of each question, in the nested, the flat and the older form of the records."""
    inner = opened(record.get("responses"))
    for name, answers in inner.items() if isinstance(inner, dict) else ():
        yield name, *_answers(answers)
    for key in record:
        if key.endswith(".responses"):
            values = opened(record[key])
            values = values if isinstance(values, list) else []
            statuses = opened(record.get(f"{key}.status"))
            fits = isinstance(statuses, list) and len(statuses) == len(values)
            yield key.removesuffix(".responses"), values, statuses if fits else [None] * len(values)
        elif f"{key}-suggestion" in record:
            yield key, *_answers(record[key])


def _answers(value: object) -> tuple[list[object], list[object]]:
    found = opened(value)
    if isinstance(found, dict):  # a list of objects, as `datasets` stores it
        columns = {key: item for key, item in found.items() if isinstance(item, list)}
        values = columns.get("value", [])
        return values, columns.get("status", [None] * len(values))
    items = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [one.get("value") for one in items], [one.get("status") for one in items]
