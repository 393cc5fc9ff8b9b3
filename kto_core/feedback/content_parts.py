"""Sort the content of a message that is a list of parts: text, reasoning, calls and results of tools."""

import re
from collections.abc import Mapping
from typing import Any

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.foreign_parts import typed_part
from offline_kto.kto_core.feedback.left_out import MEDIA, LeftOut
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.text_parts import TEXT_PARTS, are_text_parts, text_in
from offline_kto.kto_core.feedback.tool_calls import call_in

_REASONING_PARTS = {"thinking", "think", "reasoning", "redacted_thinking"}
_MEDIA_PARTS = re.compile("image|audio|video|file|document|media")


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
        given = typed_part(part) if isinstance(part, Mapping) else {}
        kind = str(given.get("type", "text" if "text" in given else ""))
        if isinstance(given.get("text"), Mapping):  # the Assistants API, and LibreChat
            given["text"] = given["text"].get("value")
        if kind in _REASONING_PARTS and are_text_parts(given.get(kind)):  # Mistral
            given["text"] = text_in(given[kind])
        text = next(
            (given[key] for key in ("text", kind, "refusal", "content") if isinstance(given.get(key), str)), None
        )
        if kind in TEXT_PARTS | {"refusal"} and isinstance(text, str):
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
            name = given.get("tool_use_id")
            self.results.append({"role": "tool", "content": inner, **({} if name is None else {"tool_call_id": name})})
        elif _MEDIA_PARTS.search(kind):
            raise LeftOut(MEDIA, f"{what} contains {quoted(part)}")
        else:
            raise FeedbackError(
                f'{where}: {what} contains {quoted(part)}; give text, or parts like {{"type": "text", "text": "..."}}.'
            )
