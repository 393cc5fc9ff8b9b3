"""Encode texts of prompts and completions to token ids, each text once.

A tokenizer splits its text at special tokens before it does anything else. So the ids of a text are those of what
comes before a special token, followed by those of the rest, and a prompt that ends in the template's header need not be
encoded a second time for the text that continues it. Both that and the direct call of the tokenizer's Rust backend are
compared with the usual call on the first texts and on samples of all others; where they differ, neither is used.
"""

import re
from collections.abc import Sequence

from offline_kto.kto_core.feedback.word_ids import Ids, WordIds
from offline_kto.kto_core.library_types import Tokenizer

# Rows at the beginning that are encoded in the usual way too; after them, one of so many.
_FIRST, _SAMPLED = 256, 128
# Different beginnings of completions (template headers) whose ids are kept.
_MOST_HEADERS = 1000


class Encoder:
    """Encodes with one tokenizer, which is never changed.

    Args:
        tokenizer: a `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        has_backend = getattr(tokenizer, "backend_tokenizer", None) is not None
        self._split = _last_special(tokenizer) if has_backend else None
        self._word_ids = None if self._split is None else WordIds(tokenizer)
        self._is_proven = False
        self._headers: dict[str, Ids] = {}

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
        """Return the ids of texts, without BOS and EOS unless `special` asks for them."""
        encoded = self._tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def cuts_words(self, texts: Sequence[str]) -> bool:
        """Return whether all texts are cut into words in Python, and few are encoded by the tokenizer's backend."""
        return self._split is not None and self._word_ids is not None and all(map(self._word_ids.cuts, texts))

    def encode_sides(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[Ids], list[Ids]]:
        """Return the ids of prompts, and those of prompts and completions together."""
        if self._split is None:
            return self._encode_both(prompts, completions)
        found = self._encode_split(prompts, completions)
        rows = slice(None, None, _SAMPLED) if self._is_proven else slice(_FIRST)
        if self._encode_both(prompts[rows], completions[rows]) != (found[0][rows], found[1][rows]):
            self._split = None
            return self._encode_both(prompts, completions)
        self._is_proven = True
        return found

    def _encode_both(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[Ids], list[Ids]]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return self.encode(prompts), self.encode(texts)

    def _encode_split(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[Ids], list[Ids]]:
        """Encode what comes before the last special token of each prompt, and what follows with the completion."""
        assert self._split is not None
        places = [found.start(1) if (found := self._split.match(prompt)) else 0 for prompt in prompts]
        heads = [prompt[:at] for prompt, at in zip(prompts, places, strict=True)]
        headers = [prompt[at:] for prompt, at in zip(prompts, places, strict=True)]
        rests = [header + completion for header, completion in zip(headers, completions, strict=True)]
        before = self._encode_each_once(heads)
        after = self._raw(rests)
        if len(self._headers) > _MOST_HEADERS:
            self._headers.clear()
        if new := sorted({*headers}.difference(self._headers)):
            self._headers.update(zip(new, self._raw(new), strict=True))
        prompt_ids = [[*head, *self._headers[header]] for head, header in zip(before, headers, strict=True)]
        return prompt_ids, [[*head, *rest] for head, rest in zip(before, after, strict=True)]

    def _encode_each_once(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts of which many may be the same: the two sides of a pair share their prompt."""
        different = list(dict.fromkeys(texts))
        ids = dict(zip(different, self._raw(different), strict=True))
        return [ids[text] for text in texts]

    def _raw(self, texts: list[str]) -> list[Ids]:
        assert self._word_ids is not None
        return self._word_ids.encode(texts)


def _last_special(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that finds the last special token of a text; None if the tokenizer has none to split at."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = [str(token) for token in added]
    marks = [
        str(token)
        for token in added
        if token.special
        and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        # A longer added token may begin before the mark and end behind it.
        and not any(str(token) in text and str(token) != text for text in texts)
    ]
    if not marks or not type(tokenizer).__module__.startswith("transformers."):
        return None
    longest_first = sorted(map(re.escape, marks), key=len, reverse=True)
    return re.compile(f".*({'|'.join(longest_first)})", re.DOTALL)
