"""Find a second answer beside the one that would be read: what a model wrote, where the other is the expected answer.

Evaluation logs have both, as {"question": ..., "answer": "#### 6", "prediction": "It is 7", "correct": false}. The label is that of the
model's answer, so to read the other one would train on the wrong text.
"""

import functools
import re
from collections.abc import Mapping

from offline_kto.kto_core.feedback.labels import usual_label

_NAME = re.compile(
    r"(?:model|llm|ai|bot|assistant|agent|student|candidate|gpt|generated|predicted)"
    r"(?:answer|output|response|completion|reply|text|prediction|generation)s?"
    r"|pred|preds|predictions?|predicted|hypothesis|generations?|generated|reply|outputs?|outputtext|text"
)
# Columns that may just as well have the name of a model.
_OR_MODEL = re.compile(r"assistant|candidate|(?:response|answer|completion|output)(?:model|llm|ai|bot)")
_SEPARATORS = re.compile(r"[_ .-]+")
# A column with prompt and answer, as trainers of plain text read it.
_WHOLE_TEXT = "text"


@functools.lru_cache(maxsize=4096)
def is_own_answer(name: str) -> bool:
    """Return whether a column's name is that of what a model wrote."""
    plain = _plain(name)
    return _NAME.fullmatch(plain) is not None or _OR_MODEL.fullmatch(plain) is not None


def another_answer(present: Mapping[str, object], used: str, prompt: str, answer: str) -> str | None:
    """Return the column with another answer than the one that is read; None without one.

    Args:
        used: the column of the answer, or of the messages that end with it.
        prompt, answer: their texts. A column that contains both has the whole text of the row.
    """
    prompt, answer = prompt.strip(), answer.strip()
    for name in _own_answers(tuple(present)):
        value = present[name]
        if name == used or not isinstance(value, str) or value.strip() in ("", answer):
            continue
        is_whole = _plain(name) == _WHOLE_TEXT and prompt in value and answer in value
        is_mark = usual_label(value) is not None and usual_label(answer) is None
        is_model = _OR_MODEL.fullmatch(_plain(name)) is not None and " " not in value.strip()
        if not (is_whole or is_mark or is_model):
            return name
    return None


@functools.lru_cache(maxsize=1024)
def _own_answers(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(is_own_answer, names))


def _plain(name: str) -> str:
    return _SEPARATORS.sub("", name).lower()
