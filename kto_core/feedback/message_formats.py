"""Convert messages to the formats that chat templates expect."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from offline_kto.kto_core.feedback.messages import Message


class MessageFormat(NamedTuple):
    """A message format that templates expect.

    Most templates expect the arguments of tool calls as objects, a few as text; OpenAI's format has text. Templates of
    vision models expect content as a list of parts.
    """

    arguments_as_text: bool = False
    parts: bool = False

    def of(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in this format."""
        shaped = [_with_text(message) if self.arguments_as_text else message for message in messages]
        if not self.parts:
            return shaped
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in shaped]


def message_formats(messages: Sequence[Message]) -> Iterator[MessageFormat]:
    """Yield the formats to try, the usual one first."""
    yield MessageFormat()
    if any(message.get("tool_calls") for message in messages):
        yield MessageFormat(arguments_as_text=True)
    yield MessageFormat(parts=True)


def _with_text(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call_with_text(call) for call in calls]} if calls else message


def _call_with_text(call: object) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_text(call["function"])}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    return call if isinstance(arguments, str) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
