"""The ids of texts that are encoded word by word are those of the usual call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from offline_kto.kto_core.feedback import word_ids
from offline_kto.kto_core.feedback.word_ids import WordIds

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": None,
    "llama3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
MARKS = ["<|im_start|>", "<|im_end|>", "<tool_call>"]
SAID = "It's THE end, isn't it? We'LL see 12345 stones at http://a.b/c?d=e_f\n\n  def f(x):\r\n\treturn x  \n // HTMLParser café – ok"


def byte_level(pattern: str | None, **options: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAID] * 3, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=mark != "<tool_call>", normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


TOKENIZERS = {name: byte_level(pattern) for name, pattern in PATTERNS.items()}
WORD_IDS = {name: WordIds(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PIECES = [
    *MARKS,
    *SAID.split(" "),
    *("ß", "中", "🙂", "e\u0301"),
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'S",
    "'",
    "/",
    "\x00",
    "\x1c",
    "\x85",
    "\u00a0",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(max_codepoint=127), max_size=6))).map("".join)


@pytest.mark.parametrize("name", PATTERNS)
@given(texts=st.lists(TEXTS, max_size=4))
def test_the_ids_are_those_of_the_tokenizer(name: str, texts: list[str]) -> None:
    usual = [TOKENIZERS[name].backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert WORD_IDS[name].encode(texts) == usual


def test_control_characters_are_no_white_space() -> None:
    assert WORD_IDS["gpt2"]._cut("a\x1c!") == ["a", "\x1c!"]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_word_is_encoded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, asked = WordIds(TOKENIZERS[name]), []
    raw = ids._raw
    monkeypatch.setattr(ids, "_raw", lambda texts: asked.append(texts) or raw(texts))
    ascii_text = SAID.encode("ascii", "ignore").decode()
    ids.encode([ascii_text])
    ids.encode([ascii_text * 3, MARKS[0] + ascii_text, SAID])
    assert sorted(map(len, asked)) == sorted([len(asked[0]), 0, len(asked[2]), 1])
    assert asked[3] == [SAID]  # not ASCII
    assert len(asked[2]) <= 4  # where a text ends and another begins


def test_the_words_in_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_ids, "_MOST_WORDS", 10)
    monkeypatch.setattr(word_ids, "_CHARACTERS", 100)
    tokenizer = TOKENIZERS["llama3"]
    ids, most = WordIds(tokenizer), 0
    for number in range(20):
        texts = [f"word{number}x{i} and more " * 2 for i in range(8)]
        assert ids.encode(texts) == [tokenizer(text)["input_ids"] for text in texts]
        most = max(most, len(ids._ids))
    assert most < 60


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{L}++|\s+|[^\s\p{L}]+",  # possessive
        r"\p{L}+?|\s+|[^\s\p{L}]+",  # lazy
        r"(\p{L})+|\s+|[^\s\p{L}]+",  # a group
        r"\p{Greek}+|[\s\S]",  # a category that is not in the table
        r"[a-z&&a-c]+|[\s\S]",  # an intersection
        r"\w+|\W+",  # another meaning of a letter
    ],
)
def test_other_expressions_are_left_to_the_tokenizer(pattern: str) -> None:
    ids = WordIds(byte_level(pattern))
    assert ids._words is None
    assert ids.encode([SAID, "a b", ""]) == [byte_level(pattern)(text)["input_ids"] for text in (SAID, "a b", "")]


def test_a_tokenizer_whose_words_are_not_independent_is_used_as_it_is() -> None:
    def changed(name: str, value: object) -> PreTrainedTokenizerFast:
        tokenizer = byte_level(None)
        setattr(tokenizer.backend_tokenizer, name, value)
        return tokenizer

    dropping = byte_level(None)
    dropping.backend_tokenizer.model.dropout = 0.5
    spaced = byte_level(None)
    spaced.add_tokens([AddedToken("[a]", lstrip=True)])
    mixed = byte_level(None)
    mixed.add_tokens([AddedToken("[a]", normalized=True)])
    lower = changed("normalizer", normalizers.Lowercase())
    prefixed = changed("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
    split_in_words = changed("pre_tokenizer", pre_tokenizers.Whitespace())
    printed = changed("encode_special_tokens", True)
    for tokenizer in (dropping, spaced, mixed, lower, prefixed, split_in_words, printed):
        ids = WordIds(tokenizer)
        assert ids._words is None or ids._added is None
    for tokenizer in (spaced, mixed, lower, prefixed, printed):
        text = "The <|im_end|> [a] b"
        assert WordIds(tokenizer).encode([text]) == [
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ]


def test_a_word_that_would_be_cut_alone_is_left_to_the_tokenizer() -> None:
    tokenizer = byte_level(r"a(?!ab)|aa|[\s\S]")  # "aa" before "b" is one word, and alone it is two
    ids = WordIds(tokenizer)
    merged = ids._raw(["aab"])
    assert ids.encode(["aab"]) == ids.encode(["aab"]) == merged
    assert ids._ids["aa"] is None
