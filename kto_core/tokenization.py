"""From feedback rows to prompt and completion tokens, with the boundary between them checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kto_core.errors import TokenizationError, said_by
from kto_core.feedback import FeedbackRow


class Tokens(NamedTuple):
    """int32 ids, untruncated; the prompt has at least one token, and so has the completion."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray


def tokenize_rows(rows: Sequence[FeedbackRow], tokenizer: Any) -> list[Tokens]:
    """Tokenize rows: conversations through the chat template, once; plain text with EOS appended, once.

    The prompt's ids are a prefix of the ids of prompt and completion together. Where the tokenizer
    merges across the boundary, the two are tokenized apart, as they are when the model is sampled.

    Args:
        rows: rows of one file, in order.
        tokenizer: a `transformers` tokenizer; it is called, never changed.

    Raises:
        TokenizationError: no chat template for a conversation, no EOS for plain text, a template that
            renders the prompt differently once an answer follows, or a prompt without tokens.
    """
    rendered = [
        _render_chat(row, tokenizer) if not isinstance(row.prompt, str) else _render_text(row, tokenizer)
        for row in rows
    ]
    # One call for all texts: the tokenizer works in parallel inside. Templates write BOS themselves.
    prompts = _encode(tokenizer, [item.prompt for item in rendered], [item.special for item in rendered])
    fulls = _encode(
        tokenizer, [item.prompt + item.completion for item in rendered], [item.special for item in rendered]
    )
    results = []
    for row, item, prompt, full in zip(rows, rendered, prompts, fulls, strict=True):
        joined = full[: len(prompt)] == prompt
        completion = full[len(prompt) :] if joined else _encode_apart(tokenizer, item.completion)
        if item.append_eos and (not completion or completion[-1] != tokenizer.eos_token_id):
            completion = [*completion, tokenizer.eos_token_id]
        _check(row, prompt, completion)
        results.append(Tokens(np.array(prompt, dtype=np.int32), np.array(completion, dtype=np.int32)))
    return results


class _Rendered(NamedTuple):
    prompt: str
    completion: str
    special: bool  # whether the tokenizer adds its own BOS
    append_eos: bool


def _render_text(row: FeedbackRow, tokenizer: Any) -> _Rendered:
    if tokenizer.eos_token_id is None:
        raise TokenizationError(
            f"{row.where}: plain text needs an end-of-sequence token after the completion, and this tokenizer has none. "
            "Set eos_token in tokenizer_config.json."
        )
    return _Rendered(str(row.prompt), str(row.completion), special=True, append_eos=True)


def _render_chat(row: FeedbackRow, tokenizer: Any) -> _Rendered:
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizationError(
            f"{row.where}: the row is a conversation, and this tokenizer has no chat template. Use the instruct "
            "model's tokenizer, add chat_template.jinja to the model folder, or give prompt and completion as text."
        )
    prompt_messages, completion_messages = list(row.prompt), list(row.completion)
    taken = [name for name in row.template_kwargs if name in _NOT_FOR_DATA]
    if taken:
        raise TokenizationError(
            f"{row.where}: 'chat_template_kwargs' sets {taken[0]!r}, which is not a template's own variable. Remove it; "
            "the template comes with the tokenizer, and tools stand in the record's 'tools'."
        )
    options = {**row.template_kwargs, "tools": list(row.tools) if row.tools else None, "tokenize": False}
    try:
        prompt = tokenizer.apply_chat_template(prompt_messages, add_generation_prompt=True, **options)
        full = tokenizer.apply_chat_template(
            prompt_messages + completion_messages, add_generation_prompt=False, **options
        )
    except Exception as error:
        reason = said_by(error)
        raise TokenizationError(f"{row.where}: the chat template refuses this conversation: {reason}") from error
    if not full.startswith(prompt):
        raise TokenizationError(_rewritten(row, prompt, full))
    return _Rendered(prompt, full[len(prompt) :], special=False, append_eos=False)


# Parameters of `apply_chat_template`: a record that set them would bring a template, a program that no fingerprint
# covers, or change what is rendered.
_NOT_FOR_DATA = {
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "processor_kwargs",
}


def _rewritten(row: FeedbackRow, prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return (
        f"{row.where}: the chat template renders the prompt differently once the answer follows: "
        f"{prompt[at : at + 40]!r} becomes {full[at : at + 40]!r} (earlier thinking dropped, or a generation prompt "
        "that the answer does not continue). Training would see a prompt that sampling never shows. Use a template "
        "that keeps the prompt, or give prompt and completion as text."
    )


def _encode_apart(tokenizer: Any, completion: str) -> list[int]:
    """Ids of a completion that continues a prompt.

    SentencePiece tokenizers put a space before whatever they encode, which nobody sampled; behind a
    line break, which is then taken off again, they do not.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    start, ids = encode("\n"), encode("\n" + completion)
    return ids[len(start) :] if ids[: len(start)] == start else encode(completion)


def _encode(tokenizer: Any, texts: list[str], special: list[bool]) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in texts]
    for add_special in (True, False):
        chosen = [i for i, wants in enumerate(special) if wants == add_special]
        if not chosen:
            continue
        encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=add_special, verbose=False)["input_ids"]
        for i, one in zip(chosen, encoded, strict=True):
            ids[i] = list(one)
            # Some tokenizers close whatever they encode: the end belongs after the completion alone,
            # where it is appended once.
            if add_special and one and one[-1] == tokenizer.eos_token_id and _adds_eos(tokenizer):
                ids[i] = ids[i][:-1]
    return ids


def _adds_eos(tokenizer: Any) -> bool:
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    closed = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    return bool(closed[-1] == tokenizer.eos_token_id and bare[-1] != tokenizer.eos_token_id)


def _check(row: FeedbackRow, prompt: list[int], completion: list[int]) -> None:
    if not prompt:
        raise TokenizationError(
            f"{row.where}: the prompt has no tokens, so nothing predicts the first token of the completion. "
            "Give a prompt, or use a tokenizer that starts every text with BOS."
        )
    if not completion:
        raise TokenizationError(f"{row.where}: the completion has no tokens.")
