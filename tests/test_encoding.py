"""Texts are encoded once, and to the ids of the usual call."""

import pytest
from models import tiny_tokenizer
from tokenizers import AddedToken

from offline_kto.kto_core.feedback.encoding import _FIRST, _SAMPLED, Encoder

PROMPTS = [f"<|im_start|>user\nquestion {i // 2}<|im_end|>\n<|im_start|>assistant\n" for i in range(_FIRST + 40)]
COMPLETIONS = [f"answer {i}, red stone<|im_end|>\n" for i in range(_FIRST + 40)]


def usual(prompts: list[str], completions: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = tiny_tokenizer()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return tuple(
        [list(ids) for ids in tokenizer(one, add_special_tokens=False)["input_ids"]] for one in (prompts, texts)
    )


def test_the_ids_are_those_of_the_usual_call() -> None:
    encoder = Encoder(tiny_tokenizer())
    for _ in range(2):  # before and after the first rows were compared
        assert encoder.encode_sides(PROMPTS, COMPLETIONS) == usual(PROMPTS, COMPLETIONS)
    assert encoder._split is not None
    plain = ["no mark at all", ""], [" and more", "x"]
    assert encoder.encode_sides(*plain) == usual(*plain)


@pytest.mark.parametrize(("proven", "row"), [(False, _FIRST - 1), (True, _SAMPLED)])
def test_where_they_differ_the_usual_call_is_used(proven: bool, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny_tokenizer())
    if proven:
        encoder.encode_sides(PROMPTS, COMPLETIONS)
    split = encoder._encode_split

    def wrong(*sides: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        prompts, texts = split(*sides)
        texts[row] = [0, *texts[row]]
        return prompts, texts

    monkeypatch.setattr(encoder, "_encode_split", wrong)
    assert encoder.encode_sides(PROMPTS, COMPLETIONS) == usual(PROMPTS, COMPLETIONS)
    assert encoder._split is None


def test_no_text_is_split_at_a_mark_that_a_longer_token_contains() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("a<|im_start|>b", special=True)])
    encoder = Encoder(tokenizer)
    assert encoder._split is not None
    found = encoder._split.match("<|im_end|>a<|im_start|>")
    assert found is not None
    assert found[1] == "<|im_end|>"
