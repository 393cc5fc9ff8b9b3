"""Convert text to messages: by the markers of its turns, or as one message of the user."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from offline_kto.kto_core.feedback.message_keys import ROLES
from offline_kto.kto_core.feedback.messages import Message, Turns, said
from offline_kto.kto_core.feedback.turn_headers import user_header

# Turn markers in raw text: Anthropic's (hh-rlhf) and NVIDIA's (HelpSteer, NeMo).
_MARKERS = (
    re.compile(r"(?:\A|\n\n)(Human|Assistant|System):(?=\s|\Z)"),
    re.compile(r"(?:\A|\n)<extra_id_[01]>(User|Assistant|System)(?:\n|\Z)"),
)

_OPENED = ("Assistant:", "<extra_id_1>Assistant")
# The mark of the next turn, with which NeMo-Aligner ends every answer.
_NEXT_TURN = "<extra_id_1>"


@dataclass(frozen=True)
class RenderedText:
    """Recognises text that a chat template has rendered already.

    Attributes:
        special: the tokenizer's special tokens.
        before, after: the text that the template writes before and after a question; empty if unknown.
        end: the special token with which it ends an answer; empty if there is none.
        template: its source.
    """

    special: Collection[str] = ()
    before: str = ""
    after: str = ""
    end: str = ""
    template: str = ""

    def fits(self, prompt: str) -> bool:
        """Return whether a prompt has been rendered: it has the whole header of a turn where the template writes one.

        A question about a special token, or an answer that ends with one, has not been rendered.
        """
        text = prompt.strip()
        if self._before and text.startswith(self._before):
            return True
        if self._opening and text.endswith(self._opening):
            return True
        return self._header != "" and self._header in text and text.startswith(tuple(self.special))

    def opens_answer(self, prompt: str, completion: str) -> bool:
        """Return whether the turn of the assistant begins after the user's last turn in rendered text; True if unknown."""
        if not self._opening:
            return True
        text = prompt + completion
        return text.rfind(self._opening) > (prompt.rfind(self._header) if self._header else -1)

    @cached_property
    def _before(self) -> str:
        return self.before.strip()

    @cached_property
    def _opening(self) -> str:
        """The end of the user's turn with the header of the answer; empty if the template writes no header."""
        after = self.after.strip()
        return "" if after == self.end else after

    @cached_property
    def _header(self) -> str:
        return user_header(self.before)


def as_chat(prompt: str, completions: tuple[Turns, ...], rendered: RenderedText) -> tuple[Turns, tuple[Turns, ...]]:
    """Return a prompt of text and its completions as messages; rendered text is returned unchanged.

    Args:
        prompt: with or without markers of turns.
    """
    if rendered.fits(prompt):
        return prompt, completions
    turns = turns_in(prompt)
    if turns is None:
        return said("user", prompt), tuple(said("assistant", one) for one in completions)
    completions = tuple(_without_prompt(one, prompt.strip()) if isinstance(one, str) else one for one in completions)
    if turns[-1]["role"] == "assistant":  # the completion continues this message
        return turns, tuple(said("assistant", one) for one in completions)
    opened = prompt.rstrip().endswith(_OPENED)
    end = _NEXT_TURN if _NEXT_TURN in prompt else ""
    return turns, tuple(
        said("assistant", _answer(one, opened=opened, end=end) if isinstance(one, str) else one) for one in completions
    )


def turns_in(text: str) -> tuple[Message, ...] | None:
    """Return the turns of a text with markers; None for other text. An empty last turn of the assistant is removed.

    Text that only begins with "Human:", or has markers only after other words, is not a conversation.
    """
    for marker in _MARKERS:
        found = list(marker.finditer(text))
        if not found:
            continue
        first, opening = text[: found[0].start()].strip(), found[0][0]
        if first and "<" not in opening:  # HelpSteer 2 marks only what follows the first question
            continue
        if opening[0] not in "\n<" and all(one[1] != "Assistant" for one in found):
            continue
        turns: list[Message] = list(said("user", first)) if first else []
        ends = [*(one.start() for one in found[1:]), len(text)]
        for one, end in zip(found, ends, strict=True):
            content = text[one.end() : end].lstrip()
            if content or one[1] != "System":
                is_begun = end == len(text) and one[1] == "Assistant"
                turns.append({"role": ROLES[one[1].lower()], "content": content if is_begun else content.rstrip()})
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()  # the turn that the completion fills
        if turns and turns[-1]["role"] != "system":
            return tuple(turns)
    return None


def _without_prompt(text: str, prompt: str) -> str:
    """Return an answer without the turns of the prompt, which some data sets repeat."""
    return text.strip().removeprefix(prompt) if text.lstrip().startswith(prompt) else text


def _answer(text: str, *, opened: bool, end: str) -> str:
    """Return an answer stripped of white space, of the mark of the next turn, and of its own if the prompt does not end with it.

    Args:
        opened: whether the prompt ends with the mark of the answer.
        end: the mark of the next turn; empty if the format has none.
    """
    text = text.strip().removesuffix(end).rstrip()
    marks = [] if opened else [mark for mark in _OPENED if text.startswith(mark)]
    return text.removeprefix(marks[0]).strip() if marks else text
