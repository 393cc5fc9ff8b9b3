"""Put the conversations of Gradio and Dify in order: functions that mappings use beside JMESPath's."""

import re
from typing import Any, Final

from offline_kto.kto_core.feedback.labels import has_no_value
from offline_kto.kto_core.feedback.ordering import in_order
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import entered

# How Dify writes that a message has no parent.
NIL: Final = "00000000-0000-0000-0000-000000000000"
# Gradio puts an apostrophe before cells that a spreadsheet could interpret as a formula.
_ESCAPED = re.compile(r"'(?=[=+\-@\t\n]|.*,[=+\-@\t\n])", re.DOTALL)


def unescaped(value: object) -> object:
    """Return a cell without the apostrophe that Gradio put before it."""
    return _ESCAPED.sub("", value, count=1) if isinstance(value, str) and _ESCAPED.match(value) else value


def pairs(value: object) -> list[dict[str, object]]:
    """Return pairs of question and answer as turns, each with its `id`: "1,0" is the question of the second pair.

    A side that is null, as before a greeting, is skipped. A side that is a list is the path of a file.
    """
    found = entered(value)
    turns: list[dict[str, object]] = []
    for number, pair in enumerate(found if isinstance(found, list) else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"not a pair of question and answer: {pair!r:.60}")
        for side, text in enumerate(pair):
            content = [{"type": "file", "file": text}] if isinstance(text, list) else text
            if text is not None:
                turns.append({"id": f"{number},{side}", "role": ("user", "assistant")[side], "content": content})
    return turns


def threaded(messages: object) -> list[dict[str, Any]]:
    """Return the messages of a conversation of Dify's with the id of the message before each as `parent_message_id`.

    The API writes an id of zeros, which stands for the message before in time; without any id, that is meant too. Beside
    ids, a message without one begins a thread of its own, as a first question that was edited.

    Raises:
        ValueError: the times of such messages are not known.
    """
    found = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    for one in found:
        for key in ("id", "parent_message_id"):
            if isinstance(one.get(key), list | dict):
                raise ValueError(f"the '{key}' of a message is {quoted(one[key])}; ids are text")
    parents = [one.get("parent_message_id") or None for one in found]
    if all(parent not in (None, NIL) for parent in parents):
        return found
    if len({one.get("id") for one in found}) > 1 and _needs_times(found, parents):
        if any(has_no_value(one.get("created_at")) for one in found):
            raise ValueError(
                "messages without 'parent_message_id' are in the order of 'created_at', which is missing. Export it, or give each "
                "message the id of the one before"
            )
        keys = in_order([one["created_at"] for one in found])
        in_time = [found[number] for number in sorted(range(len(found)), key=keys.__getitem__)]
    else:
        in_time = found[:1]
    before = _messages_before(in_time)
    is_flat = all(parent is None for parent in parents)
    return [
        {**one, "parent_message_id": before.get(one.get("id")) if parent == NIL or is_flat else parent}
        for one, parent in zip(found, parents, strict=True)
    ]


def _needs_times(messages: list[dict[str, Any]], parents: list[object]) -> bool:
    """Return whether it depends on the time what comes before a message without a parent."""
    unknown = sum(parent in (None, NIL) for parent in parents)
    return unknown > 1 or (NIL in parents and all(not has_no_value(one.get("created_at")) for one in messages))


def _messages_before(messages: list[dict[str, Any]]) -> dict[object, object]:
    """Return the id of the message before each; answers to the same question follow the same message."""
    before: dict[object, object] = {}
    last: dict[str, Any] | None = None
    for one in messages:
        name = one.get("id")
        if last is not None and name != last.get("id"):
            is_other_answer = one.get("query") == last.get("query")
            before.setdefault(name, before.get(last.get("id")) if is_other_answer else last.get("id"))
        before.setdefault(name, None)
        last = one
    return before
