"""Render conversations of plain text with the compiled chat template, without the copies that the usual call makes.

`apply_chat_template` copies every message twice to protect the template from objects, and reads the special tokens
anew: half its time. Messages that hold nothing but text need neither. The result is compared with the usual call for
the first conversations and for samples of all others; where they differ, this way is not used again.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

from offline_kto.kto_core.feedback.messages import Message
from offline_kto.kto_core.library_types import CompiledTemplate, Tokenizer

# Conversations at the beginning that are rendered in the usual way too; after them, one of so many.
_FIRST, _SAMPLED = 64, 128
_NO_TOOLS = {"tools": None}


class PlainRendering:
    """Renders with one tokenizer, which is never changed.

    Args:
        tokenizer: a `transformers` tokenizer.
        render: the usual call: messages and `add_generation_prompt` as `apply_chat_template` takes them.
    """

    def __init__(self, tokenizer: Tokenizer, render: Callable[..., str]) -> None:
        self._usual = render
        self._template = _compiled(tokenizer)
        self._special = dict(getattr(tokenizer, "special_tokens_map", {}))
        self._calls = 0

    def takes(self, messages: Sequence[Message], options: Mapping[str, object]) -> bool:
        """Return whether messages and options hold nothing that the usual call would change."""
        return (
            self._template is not None
            and options == _NO_TOOLS
            and all(len(one) == 2 and type(one.get("content")) is str for one in messages)
        )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the rendered text of messages that `takes` accepts; raises what the template raises."""
        assert self._template is not None
        text = str(
            self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        )
        self._calls += 1
        if self._calls > _FIRST and self._calls % _SAMPLED:
            return text
        usual = self._usual(messages, add_generation_prompt=add_generation_prompt)
        if usual != text:
            self._template = None
        return usual


def _compiled(tokenizer: Tokenizer) -> CompiledTemplate | None:
    """Return the compiled template; None if the tokenizer has several, renders in its own way, or none is found."""
    module = sys.modules.get("transformers.utils.chat_template_utils")
    compile_template = getattr(module, "_compile_jinja_template", None)
    method = getattr(type(tokenizer), "apply_chat_template", None)
    if compile_template is None or getattr(method, "__module__", "") != "transformers.tokenization_utils_base":
        return None
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or "strftime_now" in template:  # the date is frozen by the usual call
        return None
    try:
        return _with_plain_globals(compile_template(template))
    except Exception:  # noqa: BLE001 - the usual call reports it, with the row
        return None


def _with_plain_globals(template: CompiledTemplate) -> CompiledTemplate:
    """Return a copy whose globals are a dict: jinja copies them for every text, which takes longer from its chain of maps."""
    copy = object.__new__(type(template))
    vars(copy).update(vars(template), globals=dict(template.globals))
    return copy
