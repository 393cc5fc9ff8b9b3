"""Plain conversations are rendered as the usual call renders them."""

import pytest
from models import tiny_tokenizer

from offline_kto.kto_core.feedback.plain_rendering import _FIRST, _NO_TOOLS, _SAMPLED, PlainRendering

MESSAGES = [{"role": "user", "content": " ask "}, {"role": "assistant", "content": "answer\n"}]


def usual(messages: list[dict[str, str]], **options: bool) -> str:
    return str(tiny_tokenizer().apply_chat_template(messages, tokenize=False, **options))


@pytest.mark.parametrize("asks", [True, False])
def test_the_text_is_that_of_the_usual_call(asks: bool) -> None:
    plain = PlainRendering(tiny_tokenizer(), usual)
    for _ in range(_FIRST + 1):  # the last is not compared
        assert plain.takes(MESSAGES, _NO_TOOLS)
        assert plain.render(MESSAGES, add_generation_prompt=asks) == usual(MESSAGES, add_generation_prompt=asks)


@pytest.mark.parametrize("call", [1, _SAMPLED])
def test_where_they_differ_the_usual_call_is_used(call: int) -> None:
    calls = 0

    def other(messages: list[dict[str, str]], **options: bool) -> str:
        nonlocal calls
        calls += 1
        return "other" if calls == min(call, _FIRST + 1) else usual(messages, **options)

    plain = PlainRendering(tiny_tokenizer(), other)
    texts = [plain.render(MESSAGES, add_generation_prompt=False) for _ in range(call)]
    assert texts == [*[usual(MESSAGES)] * (call - 1), "other"]
    assert not plain.takes(MESSAGES, _NO_TOOLS)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ({"role": "user", "content": "x", "name": "n"}, _NO_TOOLS),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, _NO_TOOLS),
        ({"role": "user", "content": "x"}, {"tools": [{"name": "f"}]}),
        ({"role": "user", "content": "x"}, {"tools": None, "enable_thinking": False}),
        ({"role": "user", "content": "x"}, {"tools": None, "continue_final_message": True}),
    ],
)
def test_other_conversations_are_left_to_the_usual_call(message: dict[str, object], options: dict[str, object]) -> None:
    assert not PlainRendering(tiny_tokenizer(), usual).takes([message], options)


def test_a_tokenizer_that_renders_in_its_own_way_is_left_to_the_usual_call() -> None:
    tokenizer = tiny_tokenizer()

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *args: object, **options: object) -> str:
            return "own"

    tokenizer.__class__ = Own
    assert not PlainRendering(tokenizer, usual).takes(MESSAGES, _NO_TOOLS)


@pytest.mark.parametrize("template", [None, "{% if %}", {"default": "x", "tool_use": "y"}, "{{ strftime_now('%Y') }}"])
def test_a_template_that_cannot_be_compiled_or_chosen_is_left_to_the_usual_call(template: object) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert not PlainRendering(tokenizer, usual).takes(MESSAGES, _NO_TOOLS)
