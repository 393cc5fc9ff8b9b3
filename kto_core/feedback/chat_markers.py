"""Turn text into the messages of a conversation: by the markers of its turns, or as one message of the user's."""

import re
from collections.abc import Collection

from offline_kto.kto_core.feedback.messages import ROLES, Message, Turns, said

# How raw text marks its turns: Anthropic's (hh-rlhf), and NVIDIA's (HelpSteer, NeMo).
_MARKERS = (
    re.compile(r"(?:\A|\n\n)(Human|Assistant|System):(?=\s|\Z)"),
    re.compile(r"(?:\A|\n)<extra_id_[01]>(User|Assistant|System)\n?"),
)


def as_chat(prompt: str, completions: tuple[Turns, ...], special: Collection[str]) -> tuple[Turns, tuple[Turns, ...]]:
    """Return a prompt of text and its completions as messages.

    Text that holds a special token of the tokenizer was rendered with a chat template before, and stays as it is.

    Args:
        prompt: with or without markers of turns.
        special: the tokenizer's special tokens.
    """
    if any(token in prompt for token in special):
        return prompt, completions
    turns = turns_in(prompt)
    if turns is None:
        return said("user", prompt), tuple(said("assistant", one) for one in completions)
    return turns, tuple(said("assistant", one.strip() if isinstance(one, str) else one) for one in completions)


def turns_in(text: str) -> tuple[Message, ...] | None:
    """Return the turns of a text with markers, up to the assistant's turn that it opens; None for any other text."""
    for marker in _MARKERS:
        found = list(marker.finditer(text))
        if not found or text[: found[0].start()].strip():
            if not _opens_later(text, marker):
                continue
            turns: list[Message] = list(said("user", text[: found[0].start()].strip()))
        else:
            turns = []
        for number, one in enumerate(found):
            end = found[number + 1].start() if number + 1 < len(found) else len(text)
            content = text[one.end() : end].strip()
            if content or one[1] != "System":  # NeMo writes an empty system turn
                turns.append({"role": ROLES.get(one[1].lower(), "user"), "content": content})
        if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
            turns.pop()  # the turn that the completion goes on with
        if turns and turns[-1]["role"] == "user" and all(turn["content"] for turn in turns):
            return tuple(turns)
    return None


def _opens_later(text: str, marker: re.Pattern[str]) -> bool:
    """Return whether a text begins with the user's words and marks only what follows, as HelpSteer 2 does."""
    found = marker.search(text)
    return found is not None and found[0].lstrip().startswith("<extra_id") and found.start() > 0
