"""Find the headers with which a chat template opens the turn of the assistant."""

import json
import re
from collections.abc import Callable, Iterator, Mapping

from offline_kto.kto_core.library_types import Tokenizer


class TurnHeaders:
    """The headers that one chat template writes, by the settings that it is rendered with.

    Args:
        tokenizer: the tokenizer with the template.
        render: renders messages with the template; keyword arguments as `apply_chat_template` takes them.
    """

    def __init__(self, tokenizer: Tokenizer, render: Callable[..., str]) -> None:
        self._tokenizer, self._apply = tokenizer, render
        self._known: dict[str, list[str]] = {}

    def of(self, options: Mapping[str, object]) -> list[str]:
        """Return headers that open a turn and may follow the last answer; empty if they cannot be determined."""
        settings = {name: bool(value) if name == "tools" else str(value) for name, value in options.items()}
        key = json.dumps(settings) if len(settings) > 1 else str(settings["tools"])
        if key not in self._known:
            try:
                headers = [self._asked_header(options), self._unasked_header(options)]
            except Exception:  # noqa: BLE001 - a template that refuses an ordinary conversation has no known header
                headers = []
            self._known[key] = [header for header in headers if header.strip()]
        return self._known[key]

    def _asked_header(self, options: Mapping[str, object]) -> str:
        """Return the text that `add_generation_prompt` adds."""
        ask = [{"role": "user", "content": "ktoquestion"}]
        opened, closed = (self._apply(ask, add_generation_prompt=wanted, **options) for wanted in (True, False))
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def _unasked_header(self, options: Mapping[str, object]) -> str:
        """Return the turn header that the template writes after the last answer although no generation prompt was requested."""
        words = ("ktoquestion", "ktoanswer", "ktoanother")
        roles = ("user", "assistant", "user")
        ask, answer, again = ({"role": role, "content": word} for role, word in zip(roles, words, strict=True))
        whole, longer = self._apply([ask, answer], **options), self._apply([ask, answer, again], **options)
        start, asked = whole.split(words[0])[:2]
        end = whole.rpartition(words[1])[2]
        middle = longer.partition(words[1])[2].partition(words[2])[0]
        if end == middle:  # of the user's next turn, perhaps
            marks = {self._tokenizer.bos_token, self._tokenizer.eos_token}
            fits = (h for h in _possible_headers(end) if start.rstrip().endswith(h) and h not in marks)
        elif middle.startswith(end):
            return ""
        else:
            before = asked.partition(words[1])[0].rstrip()
            fits = (
                h
                for h in _possible_headers(end)
                if before.endswith(h) and middle.startswith(end.rstrip().removesuffix(h))
            )
        return next(fits, "")


def user_header(before: str) -> str:
    """Return the header of the user's turn at the end of the text before a question; all of it if no part names the user."""
    text = before.strip()
    starts = sorted((found.start() for found in _TURN_START.finditer(text)), reverse=True)
    return next((text[start:] for start in starts if _USER.search(text[start:])), text)


# Names of the user in the headers of templates.
_USER = re.compile("user|human|inst", re.IGNORECASE)
# Where a turn may begin: at a line or a marker, or else at a word after a space or a marker.
_TURN_START = re.compile(r"(?<=\n)[^\n]|(?<![<\[{])[<\[{]")
_WORD_START = re.compile(r"(?:^|(?<=[ >\]}]))[^\s<\[{]")


def _possible_headers(end: str) -> Iterator[str]:
    """Yield possible turn headers at the end of a text, the shortest first."""
    end = end.rstrip()
    for starts in (_TURN_START, _WORD_START):
        for start in sorted((found.start() for found in starts.finditer(end)), reverse=True):
            yield end[start:]
