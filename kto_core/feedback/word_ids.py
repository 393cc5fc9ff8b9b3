"""Encode texts word by word, each word once.

A byte-level tokenizer cuts a text at its added tokens, and the rest into words with a regular expression. It encodes each
word without regard to the others. So the ids of a text are those of its words, and rows have few different words.

Only ASCII text is cut here: in it, Python's regular expressions and the tokenizer's have the same letters, digits and
white space, and Unicode normalization changes nothing. The tokenizer itself encodes every word, and all other texts.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from offline_kto.kto_core.library_types import Tokenizer, TokenizerBackend

Ids = list[int]

# Words that are kept.
_MOST_WORDS = 2**17
# Characters of the texts whose words are in memory at a time.
_CHARACTERS = 2**18

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # the default of `ByteLevel`
# The ASCII characters of Unicode's categories. Those without any have a character that ASCII text does not contain.
_CATEGORIES = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", **dict.fromkeys(("Lt", "Lm", "Lo", "M"), "\x80")}
_CATEGORY = rf"\\p\{{(?:{'|'.join(_CATEGORIES)})\}}"
_SET = rf"\[\^?(?:{_CATEGORY}|\\[sSrnt]|[^\[\]\\&])+\]"
# Expressions that mean the same in Python as in the tokenizer's library: no lazy or possessive quantifiers, no groups that
# `findall` would return.
_SAME_IN_PYTHON = re.compile(
    rf"(?:{_CATEGORY}|{_SET}|\\[sSrnt]|\(\?(?:i:|:|!)|[)|]|(?:[?*+]|\{{\d+(?:,\d*)?\}})(?![?+])|[^\\()\[\]{{}}|?*+.^$])+"
)


class WordIds:
    """Encodes texts with the tokenizer's backend, and ASCII texts from the ids of their words.

    Args:
        tokenizer: a `transformers` tokenizer with a backend; it is never changed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend: TokenizerBackend = tokenizer.backend_tokenizer
        self._words = _word_pattern(self._backend)
        self._added = None if self._words is None else _added_pattern(tokenizer)
        self._ids: dict[str, tuple[int, ...] | None] = {}  # None for a word that would be cut if it were alone

    def cuts(self, text: str) -> bool:
        """Return whether a text is cut into words here."""
        return self._words is not None and self._added is not None and text.isascii()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of texts, without BOS and EOS."""
        return [ids for some in _parts(texts) for ids in self._encode(some)]

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        words = [self._cut(text) if text.isascii() else None for text in texts]
        found = [None if some is None else self._joined(some) for some in words]
        if self._learn([some for some, ids in zip(words, found, strict=True) if some is not None and ids is None]):
            found = [
                self._joined(some) if ids is None and some is not None else ids
                for some, ids in zip(words, found, strict=True)
            ]
        whole = iter(self._raw([text for text, ids in zip(texts, found, strict=True) if ids is None]))
        return [next(whole) if ids is None else ids for ids in found]

    def _joined(self, words: Sequence[str]) -> Ids | None:
        """Return the ids of words; None if one of them is new, or would be cut in another way if it were alone."""
        try:
            return [*chain.from_iterable(map(self._ids.__getitem__, words))]  # type: ignore[arg-type]
        except (KeyError, TypeError):  # there is a None
            return None

    def _learn(self, texts: Sequence[Sequence[str]]) -> bool:
        """Encode the words of some texts that are new. Returns: whether there are any."""
        if len(self._ids) > _MOST_WORDS:
            self._ids.clear()
        new = [*set[str]().union(*texts).difference(self._ids)]
        for word, ids in zip(new, self._raw(new), strict=True):
            self._ids[word] = tuple(ids) if self._cut(word) == [word] else None
        return bool(new)

    def _cut(self, text: str) -> list[str] | None:
        """Return the words and added tokens of an ASCII text; None if it is not cut, or not completely."""
        if self._words is None or self._added is None:
            return None
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            words += (part,) if number % 2 else self._words.findall(part)
        return words if "".join(words) == text else None

    def _raw(self, texts: list[str]) -> list[Ids]:
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)] if texts else []


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts in parts of a limited number of characters; a longer text is alone."""
    start = size = 0
    for end, text in enumerate(texts):
        if size and size + len(text) > _CHARACTERS:
            yield texts[start:end]
            start, size = end, 0
        size += len(text)
    yield texts[start:]


def _word_pattern(backend: TokenizerBackend) -> re.Pattern[str] | None:
    """Return the expression by which a byte-level tokenizer cuts ASCII text into words; None if it is not known to be one."""
    if type(backend.model).__name__ != "BPE" or backend.model.dropout or not _keeps_ascii(backend.normalizer):
        return None
    match _settings(backend.pre_tokenizer):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _in_python(_GPT2)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str() as pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return _in_python(pattern)
    return None


def _keeps_ascii(normalizer: object) -> bool:
    """Return whether a normalizer changes no ASCII text."""
    return normalizer is None or type(normalizer).__name__ in ("NFC", "NFD", "NFKC", "NFKD")


def _settings(component: TokenizerBackend) -> object:
    """Return the settings of a part of a tokenizer as JSON; None for one that is written in Python."""
    try:
        return json.loads(component.__getstate__())
    except Exception:  # noqa: BLE001 - the library raises exceptions of any type
        return None


def _in_python(pattern: str) -> re.Pattern[str] | None:
    """Return a tokenizer's expression for ASCII text; None if it could mean something else in Python."""
    if _SAME_IN_PYTHON.fullmatch(pattern) is None:
        return None
    sets = re.sub(_SET, lambda found: re.sub(_CATEGORY, lambda one: _CATEGORIES[one[0][3:-1]], found[0]), pattern)
    try:
        return re.compile(re.sub(_CATEGORY, lambda one: f"[{_CATEGORIES[one[0][3:-1]]}]", sets), re.ASCII)
    except re.error:
        return None


def _added_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return an expression that finds added tokens; None if the tokenizer does not treat all of them alike."""
    backend = tokenizer.backend_tokenizer
    tokens = list(backend.get_added_tokens_decoder().values())
    if backend.encode_special_tokens or len({one.normalized for one in tokens}) > 1:
        return None
    if any(one.lstrip or one.rstrip or one.single_word for one in tokens):
        return None
    longest_first = sorted((re.escape(one.content) for one in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(longest_first) or '(?!)'})")
