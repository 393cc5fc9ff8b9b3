import re

import numpy as np
import pytest
from models import BOS, CHAT_TEMPLATE, EOS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from offline_kto.kto_core.errors import TokenizationError
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.tokenization import Tokenizing, tokenize_rows
from offline_kto.kto_core.hashing import chat_template_hash, tokenizer_hash

WHERE = "feedback.jsonl:17"


def text_row(prompt, completion):
    return FeedbackRow(WHERE, prompt, completion, label=True)


def chat_row(*turns, **more):
    """Turns are user, assistant, user, ...; the last one is the completion."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))
    return FeedbackRow(WHERE, messages[:-1], messages[-1:], label=True, **more)


def tokenize(row, tokenizer):
    (tokens,) = tokenize_rows([row], tokenizer)
    assert tokens.prompt_ids.dtype == tokens.completion_ids.dtype == np.int32
    return tokens


def decoded(tokens, tokenizer):
    return tuple(tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in tokens)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("closes", [False, True])
def test_the_chat_template_is_applied_once_with_one_bos_and_no_added_eos(bos, closes):
    tokenizer = tiny_tokenizer(bos=bos, closes=closes)
    tokens = tokenize(chat_row("hello", "hi", "world", "hello world"), tokenizer)
    start = BOS if bos else ""
    assert decoded(tokens, tokenizer) == (
        f"{start}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
        "<|im_start|>user\nworld<|im_end|>\n<|im_start|>assistant\n",
        "hello world<|im_end|>\n",
    )
    everything = [*tokens.prompt_ids, *tokens.completion_ids]
    assert everything.count(tokenizer.convert_tokens_to_ids(BOS)) == int(bos)
    assert everything.count(tokenizer.eos_token_id) == 0


def test_prompt_and_completion_together_are_the_whole_conversation():
    tokenizer = tiny_tokenizer(bos=True)
    row = chat_row("hello", "hi", "world", "hello world")
    tokens = tokenize(row, tokenizer)
    whole = tokenizer.apply_chat_template([*row.prompt, *row.completion], tokenize=False)
    assert [*tokens.prompt_ids, *tokens.completion_ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_tools_and_template_kwargs_reach_the_template():
    tokenizer = tiny_tokenizer()
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    tokens = tokenize(chat_row("hello", "hi", tools=(tool,), template_kwargs={"mood": "curt"}), tokenizer)
    prompt, completion = decoded(tokens, tokenizer)
    assert prompt.startswith("<|im_start|>tools\n[{")
    assert prompt.count("look_up") == 1
    assert "<|im_start|>mood\ncurt<|im_end|>" in prompt
    assert completion == "hi<|im_end|>\n"


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: .*no chat template.*give prompt and completion as text"):
        tokenize(chat_row("hello", "hi"), tiny_tokenizer(chat_template=None))


DROPS_THINKING = CHAT_TEMPLATE.replace(
    "message['content']",
    "(message['content'] if loop.last or message['role'] == 'user' else message['content'].split('</think>')[-1])",
)
OPENS_THINKING = CHAT_TEMPLATE.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}")


def test_the_template_that_drops_thinking_is_one_that_works_otherwise():
    tokenizer = tiny_tokenizer(chat_template=DROPS_THINKING)
    tokens = tokenize(chat_row("hello", "<think>hm</think>hi", "world", "hello world"), tokenizer)
    assert "hm" not in decoded(tokens, tokenizer)[0]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        pytest.param(OPENS_THINKING, ("hello", "hi"), id="generation prompt that the answer does not continue"),
        pytest.param(
            "{% if messages[-1]['role'] == 'assistant' %}closed{% else %}open{% endif %}" + CHAT_TEMPLATE,
            ("hello", "hi"),
            id="another beginning",
        ),
        pytest.param(
            CHAT_TEMPLATE.replace("message['content']", "(message['content'] if loop.last else '')"),
            ("hello", "hi"),
            id="earlier turns dropped",
        ),
    ],
)
def test_a_template_that_rewrites_the_prompt_is_refused(template, turns):
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: the chat template renders the prompt differently"):
        tokenize(chat_row(*turns), tiny_tokenizer(chat_template=template))


def test_a_refused_prompt_is_shown_where_it_changes():
    with pytest.raises(TokenizationError, match=r"'<think>' becomes 'hi<\|im_end\|>"):
        tokenize(chat_row("hello", "hi"), tiny_tokenizer(chat_template=OPENS_THINKING))


def test_what_the_template_itself_refuses_names_the_row():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: .*refuses this conversation: roles must alternate"):
        tokenize(chat_row("hello", "hi"), tiny_tokenizer(chat_template=template))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("completion", [" world", f" world{EOS}"])
def test_eos_ends_plain_text_once(bos, closes, completion):
    """Let the tokenizer add it, the text contain it, or neither."""
    tokenizer = tiny_tokenizer(bos=bos, closes=closes)
    tokens = tokenize(text_row("hello", completion), tokenizer)
    assert decoded(tokens, tokenizer) == ((BOS if bos else "") + "hello", f" world{EOS}")


@pytest.mark.parametrize("closes", [False, True])
def test_eos_that_the_prompt_itself_ends_with_stays(closes):
    """Some base models separate turns with EOS."""
    tokenizer = tiny_tokenizer(closes=closes)
    assert decoded(tokenize(text_row(f"hello{EOS}", " world"), tokenizer), tokenizer) == (f"hello{EOS}", f" world{EOS}")


def test_plain_text_needs_an_eos_token():
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: .*Set eos_token in tokenizer_config.json"):
        tokenize(text_row("hello", " world"), tiny_tokenizer(eos=False))


def test_a_conversation_needs_no_eos_token():
    tokenizer = tiny_tokenizer(eos=False)
    assert decoded(tokenize(chat_row("hello", "hi"), tokenizer), tokenizer)[1] == "hi<|im_end|>\n"


def test_an_empty_prompt_is_refused_where_nothing_stands_before_the_completion():
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: the prompt has no tokens"):
        tokenize(text_row("", "hello"), tiny_tokenizer())


def test_an_empty_prompt_with_bos_is_bos():
    tokenizer = tiny_tokenizer(bos=True)
    assert decoded(tokenize(text_row("", "hello"), tokenizer), tokenizer) == (BOS, f"hello{EOS}")


def test_a_template_that_leaves_no_completion_is_refused():
    template = "{% for message in messages[:1] %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: the completion has no tokens"):
        tokenize(chat_row("hello", "hi"), tiny_tokenizer(chat_template=template))


def test_a_tokenizer_that_merges_across_the_boundary_reads_the_two_apart():
    """ "hel" + "lo": together one token "hello", which has no place for the boundary."""
    tokenizer = tiny_tokenizer()
    together = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert len(together) == 1
    tokens = tokenize(text_row("hel", "lo"), tokenizer)
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hel", "lo")]
    assert [*tokens.prompt_ids] == apart[0]
    assert [*tokens.completion_ids] == [*apart[1], tokenizer.eos_token_id]


def test_a_merge_across_the_boundary_of_a_template_is_read_apart():
    """The newline after the generation prompt and the one that begins the answer."""
    merges = (("\u010a", "\u010a"),)  # "\u010a" is the byte-level alphabet's newline
    tokenizer = tiny_tokenizer(merges=merges)
    tokens = tokenize(chat_row("hello", "\nhi"), tokenizer)
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    assert decoded(tokens, tokenizer)[1] == "\nhi<|im_end|>\n"
    assert tokens.completion_ids[0] == tokenizer.convert_tokens_to_ids("\u010a")


def test_a_merge_across_the_boundary_costs_no_bos_and_keeps_one_eos():
    tokenizer = tiny_tokenizer(bos=True, closes=True)
    tokens = tokenize(text_row("hel", "lo"), tokenizer)
    assert decoded(tokens, tokenizer) == (f"{BOS}hel", f"lo{EOS}")


def sentencepiece_like_tokenizer(*, normalizes, scheme="first"):
    """Whatever is encoded gets a space in front, written as U+2581: by a normalizer (Llama 2) or later (newer ones)."""
    vocabulary = {token: i for i, token in enumerate(["\u2581", "\n", *"helo", "he", "ll", "hell", "hello"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]))
    if normalizes:
        space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(space)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(sentencepiece_like_tokenizer(normalizes=False), id="before the text"),
        pytest.param(sentencepiece_like_tokenizer(normalizes=False, scheme="always"), id="before every piece"),
        pytest.param(sentencepiece_like_tokenizer(normalizes=True), id="by a normalizer"),
    ],
)
def test_reading_the_two_apart_puts_no_space_between_them(tokenizer):
    """A model that is sampled after "hel" continues with "lo", not with " lo"."""
    tokens = tokenize(text_row("hel", "lo"), tokenizer)
    assert tokenizer.decode(np.concatenate(tokens)) == f"hello{EOS}"


def test_rows_of_both_kinds_keep_their_order():
    tokenizer = tiny_tokenizer(bos=True)
    rows = [text_row("hello", " one"), chat_row("hello", "two"), text_row("hel", "lo"), chat_row("hi", "four")]
    together = tokenize_rows(rows, tokenizer)
    for row, tokens in zip(rows, together, strict=True):
        alone = tokenize(row, tokenizer)
        assert [ids.tolist() for ids in tokens] == [ids.tolist() for ids in alone]
    endings = [decoded(tokens, tokenizer)[1] for tokens in together]
    assert endings == [f" one{EOS}", "two<|im_end|>\n", f"lo{EOS}", "four<|im_end|>\n"]


def test_the_failing_row_is_the_one_that_is_named():
    rows = [text_row("hello", " world"), FeedbackRow("feedback.jsonl:18", "", "x", label=False)]
    with pytest.raises(TokenizationError, match=r"^feedback.jsonl:18:"):
        tokenize_rows(rows, tiny_tokenizer())


def test_nothing_is_cut():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    tokens = tokenize(text_row("a" * 50, "b" * 70), tokenizer)
    assert (len(tokens.prompt_ids), len(tokens.completion_ids)) == (50, 71)


def test_the_tokenizer_is_not_changed():
    tokenizer = tiny_tokenizer(bos=True, closes=True)
    before = tokenizer_hash(tokenizer), chat_template_hash(tokenizer), tokenizer.backend_tokenizer.to_str()
    tokenize_rows([text_row("hel", "lo"), chat_row("hello", "hi", template_kwargs={"mood": "curt"})], tokenizer)
    assert (tokenizer_hash(tokenizer), chat_template_hash(tokenizer), tokenizer.backend_tokenizer.to_str()) == before


def test_the_row_is_not_changed():
    row = chat_row("hello", "hi", template_kwargs={"mood": "curt"})
    before = repr(row)
    tokenize(row, tiny_tokenizer())
    assert repr(row) == before
    assert re.search("curt", before)


RENDERED = f"{BOS}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n"])
def test_text_that_was_rendered_before_reads_as_the_conversation(end):
    """One BOS, and no EOS behind the one that is there."""
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.eos_token = "<|im_end|>"
    as_text = tokenize(text_row(RENDERED, "hi" + end), tokenizer)
    as_chat = tokenize(chat_row("hello", "hi"), tokenizer)
    assert as_text.prompt_ids.tolist() == as_chat.prompt_ids.tolist()
    size = len(as_text.completion_ids)
    assert as_text.completion_ids.tolist() == as_chat.completion_ids.tolist()[:size]
    assert size == len(as_chat.completion_ids) - end.count("<|im_end|>") + end.count("\n")


def word_tokenizer(words, **special):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="[UNK]", **special)


def test_the_share_of_unknown_tokens_is_said():
    tokenizing = Tokenizing(word_tokenizer(["hello", "world"]))
    tokenizing.tokenize([text_row("hello new", " world old world"), text_row("hello", " world")])
    tokenizing.check()
    assert tokenizing.warnings()[0].startswith(
        "28.57% of the tokens, in 1 of 2 rows, are unknown to the tokenizer ([UNK])"
    )


def test_a_tokenizer_that_knows_nothing_of_the_answers_is_refused():
    tokenizing = Tokenizing(word_tokenizer(["hello"]))
    tokenizing.tokenize([text_row("hello", " new"), text_row("hello", " old"), text_row("hello", " hello")])
    with pytest.raises(
        TokenizationError, match=rf"^{WHERE}: the tokenizer has no tokens for this completion, nor for 1 oth"
    ):
        tokenizing.check()


def test_one_unknown_answer_among_others_is_not_refused():
    tokenizing = Tokenizing(word_tokenizer(["hello"]))
    tokenizing.tokenize([text_row("hello", " new"), text_row("hello", " hello")])
    tokenizing.check()


def test_a_token_that_is_unknown_and_eos_is_no_unknown_one():
    """GPT-2's."""
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = EOS
    tokenizing = Tokenizing(tokenizer)
    tokenizing.tokenize([text_row(f"hello{EOS}", " world")])
    assert tokenizing.warnings() == []


def test_characters_without_a_token_are_said():
    tokenizer = sentencepiece_like_tokenizer(normalizes=False)
    tokenizing = Tokenizing(tokenizer)
    tokenizing.tokenize([text_row("hello", " hello"), text_row("hello", " hello xyz")])
    assert "loses characters of 1 row" in tokenizing.warnings()[0]


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_a_tokenizer_that_loses_the_spaces_is_refused(unknown):
    """Metaspace rules over a byte-level vocabulary, whose space is another sign."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=unknown)
    with pytest.raises(TokenizationError, match=rf"^{WHERE}: the tokenizer drops white space: .*becomes 'helloyou"):
        tokenize(text_row("hello you", " hello world"), fast)


ODD = "two  spaces\n\n\tDON'T caf\u00e9 cafe\u0301 \ufb01ne \u4f60\u597d \U0001f642 1,234.5 a\u00a0b\u200bc <s> x\r\n"


def trained(model, trainer, *, normalizer=None, pre_tokenizer=None, decoder=None, **special):
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([ODD, "hello world, this is a text about nothing"] * 3, trainer)
    if decoder:
        tokenizer.decoder = decoder
    tokens = (BOS, EOS, "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, **special) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE
    )


LETTERS = sorted(set(ODD))
BYTES = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False, "vocab_size": 400}
SIGNS = {
    "initial_alphabet": [*LETTERS, "\u2581"],
    "special_tokens": ["[UNK]"],
    "show_progress": False,
    "vocab_size": 200,
}
META = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def metaspace(scheme, split):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


RIGHT = {
    "byte-level": lambda: trained(
        BPE(), BpeTrainer(**BYTES), pre_tokenizer=pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel()
    ),
    "byte-level, lower case, NFC, strips": lambda: trained(
        BPE(),
        BpeTrainer(**BYTES),
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.ByteLevel(),
        decoder=decoders.ByteLevel(),
        lstrip=True,
        rstrip=True,
    ),
    "byte-level without a decoder": lambda: trained(
        BPE(), BpeTrainer(**BYTES), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    **{
        f"SentencePiece BPE, {scheme}, {split}": lambda scheme=scheme, split=split: trained(
            BPE(unk_token="[UNK]"), BpeTrainer(**SIGNS), pre_tokenizer=metaspace(scheme, split), decoder=META
        )
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "Unigram, NFKC": lambda: trained(
        Unigram(),
        UnigramTrainer(unk_token="[UNK]", **SIGNS),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=metaspace("always", True),
        decoder=decoders.Metaspace(),
    ),
    "WordPiece, lower case": lambda: trained(
        WordPiece(unk_token="[UNK]"),
        WordPieceTrainer(**SIGNS),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    ),
    "WordPiece with another's decoder": lambda: trained(
        WordPiece(unk_token="[UNK]"),
        WordPieceTrainer(**SIGNS),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.Fuse(),
    ),
    "bytes in Python": lambda: ByT5Tokenizer(bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_no_right_tokenizer_is_refused_or_accused(kind):
    tokenizing = Tokenizing(RIGHT[kind]())
    pieces = [ODD, *ODD.split(), "hello world, this is a text"]
    tokenizing.tokenize([make(piece + " a", " " + piece) for piece in pieces for make in (text_row, chat_row)])
    tokenizing.check()
    accused = [text for text in tokenizing.warnings() if "unknown" not in text and not text.startswith("messages of")]
    # That of bytes spells the template's <|im_end|> in letters.
    assert ["writes no special token" in text for text in accused] == [True] * (kind == "bytes in Python")


class Fails(PreTrainedTokenizerFast):
    error: BaseException = Exception("unk token not found")

    def __call__(self, text, **options):
        if "bad" in str(text):
            raise self.error
        return super().__call__(text, **options)


class Panic(BaseException):
    """What native code raises, which is no `Exception`."""


@pytest.mark.parametrize(
    "error", [Exception("none\nmore"), KeyError("x"), AssertionError(), RuntimeError("no"), Panic("at")]
)
def test_whatever_a_tokenizer_fails_with_names_the_row(error):
    tokenizer = Fails(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token=EOS)
    tokenizer.error = error
    rows = [text_row("hello", " world"), FeedbackRow("feedback.jsonl:18", "hello", " bad", label=False)]
    with pytest.raises(TokenizationError, match=r"^feedback.jsonl:18: the tokenizer \(Fails\) fails on this row: "):
        tokenize_rows(rows, tokenizer)


def test_a_stop_from_outside_is_no_failure():
    tokenizer = Fails(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token=EOS)
    tokenizer.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenize(text_row("bad", "x"), tokenizer)


def test_each_row_that_cannot_be_used_is_returned_with_its_reason():
    template = "{% for m in messages if m['role'] == 'odd' %}{{ raise_exception('no') }}{% endfor %}" + CHAT_TEMPLATE
    odd = FeedbackRow("f.jsonl:2", ({"role": "odd", "content": "x"},), chat_row("a", "b").completion, label=True)
    empty = FeedbackRow("f.jsonl:4", "", "hello", label=True)
    rows = [text_row("hello", " world"), odd, chat_row("hello", "hi"), empty, odd]
    tokenizer = tiny_tokenizer(chat_template=template)
    found = Tokenizing(tokenizer).tokenize(rows)
    assert [isinstance(one, TokenizationError) for one in found] == [False, True, False, True, True]
    assert [str(one).split(": ")[0] for one in found if isinstance(one, TokenizationError)] == [
        "f.jsonl:2",
        "f.jsonl:4",
        "f.jsonl:2",
    ]
    assert found[0].prompt_ids.tolist() == tokenize(rows[0], tokenizer).prompt_ids.tolist()
    assert found[2].completion_ids.tolist() == tokenize(rows[2], tokenizer).completion_ids.tolist()
    assert len(Tokenizing(tokenizer).tokenize([odd, odd])) == 2
    with pytest.raises(TokenizationError, match=r"^f\.jsonl:2: "):
        tokenize_rows(rows, tokenizer)


@pytest.mark.parametrize(
    ("row", "tokenizer"),
    [(chat_row("hello", "hi"), {"chat_template": None}), (text_row("hello", " world"), {"eos": False})],
    ids=["no template", "no EOS"],
)
def test_what_is_wrong_with_the_tokenizer_is_raised_at_once(row, tokenizer):
    with pytest.raises(TokenizationError):
        Tokenizing(tiny_tokenizer(**tokenizer)).tokenize([row])
