"""Random conversations through three templates: what is accepted is written whole, and what would be lost is refused.

What a template should write is said here in Python, besides the Jinja that is rendered.
"""

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import CHAT_TEMPLATE, tiny_tokenizer

from offline_kto.kto_core.errors import TokenizationError
from offline_kto.kto_core.feedback.chat_templates import ChatRenderer
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.findings import Findings
from offline_kto.kto_core.feedback.records import parse_record

Message = dict[str, Any]

# Trims, knows four roles, and of several calls writes the first, without the words beside it.
LLAMA = (
    "{% if tools %}{{ '<|start_header_id|>environment<|end_header_id|>\n\n' + tools | tojson + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": ' + call.name | tojson + ', \"parameters\": ' }}"
    "{{ call.arguments | tojson + '}<|eot_id|>' }}"
    "{% elif m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Keeps the reasoning behind the last question, folds results of tools into the user's turn, and knows four roles.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role in ('system', 'user') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if thought and loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls %}{% set c = c.function %}"
    "{{ '\n<tool_call>\n{\"name\": ' + c.name | tojson + ', \"arguments\": ' + c.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KNOWN = ("system", "user", "assistant", "tool")


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def functions(message: Message) -> list[tuple[str, Any]]:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return [(one["name"], one["arguments"]) for one in calls]


def chatml(messages: list[Message], tools: list[Any]) -> str:
    head = f"<|im_start|>tools\n{as_json(tools)}<|im_end|>\n" if tools else ""
    return head + "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)


def llama(messages: list[Message], tools: list[Any]) -> str:
    def turn(role: str, words: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{words}<|eot_id|>"

    text = turn("environment", as_json(tools)) if tools else ""
    for one in (one for one in messages if one["role"] in KNOWN):  # others are blank
        if called := functions(one):
            name, arguments = called[0]
            text += turn("assistant", f'{{"name": {as_json(name)}, "parameters": {as_json(arguments)}}}')
        elif one["role"] == "tool":
            text += turn("ipython", as_json(one["content"]))
        else:
            text += turn(one["role"], one["content"].strip())
    return text


def qwen(messages: list[Message], tools: list[Any]) -> str:
    lines = "".join("\n" + as_json(tool) for tool in tools)
    text = f"<|im_start|>system\n<tools>{lines}\n</tools><|im_end|>\n" if tools else ""
    last = max(i for i, one in enumerate(messages) if one["role"] == "user")
    for i, one in enumerate(messages):
        role, words = one["role"], one["content"]
        if role not in KNOWN:  # and blank
            continue
        if role == "tool":
            role, words = "user", f"<tool_response>\n{words}\n</tool_response>"
        if role == "assistant":
            thought, words = thought_and_words(one)
            words = f"<think>\n{thought}\n</think>\n\n{words}" if thought and i > last else words
            for name, arguments in functions(one):
                call = f'{{"name": {as_json(name)}, "arguments": {as_json(arguments)}}}'
                words += f"\n<tool_call>\n{call}\n</tool_call>"
        text += f"<|im_start|>{role}\n{words}<|im_end|>\n"
    return text


def thought_and_words(message: Message) -> tuple[str, str]:
    thought, found, words = message["content"].partition("</think>")
    if found:
        return thought.removeprefix("<think>").strip("\n"), words.lstrip("\n")
    return message.get("reasoning_content", "").strip("\n"), message["content"]


def chatml_loses(messages: list[Message], completion: list[Message]) -> bool:
    thought_only = not any(one["content"].strip() for one in completion)
    return thought_only or any(one.get("tool_calls") for one in messages)


def llama_loses(messages: list[Message], completion: list[Message]) -> bool:
    calls = [one for one in messages if one.get("tool_calls")]
    if any(len(one["tool_calls"]) > 1 or one["content"].strip() for one in calls):
        return True
    unknown = any(one["role"] not in KNOWN and one["content"].strip() for one in messages)
    return unknown or not any(one["content"].strip() or one.get("tool_calls") for one in completion)


def qwen_loses(messages: list[Message], completion: list[Message]) -> bool:
    return any(one["role"] not in KNOWN and one["content"].strip() for one in messages)


TEMPLATES: dict[str, Any] = {
    "chatml": (CHAT_TEMPLATE, chatml, "<|im_start|>assistant\n", chatml_loses),
    "llama": (LLAMA, llama, "<|start_header_id|>assistant<|end_header_id|>\n\n", llama_loses),
    "qwen": (QWEN, qwen, "<|im_start|>assistant\n", qwen_loses),
}
RENDERERS = {
    name: ChatRenderer(tiny_tokenizer(chat_template=template), now=None, findings=Findings())
    for name, (template, *_) in TEMPLATES.items()
}

# Texts that occur in the templates, or look like templates, and signs of many kinds.
ODD = (
    *("a", "1", "user", "assistant", "system", "name", "true", " ", "\n", ":", '"', "'", "\\", "{", "}", "%s", "%"),
    *("<|im_end|>", "<|im_start|>user\n", "<|eot_id|>", "{{ messages }}", "{% raw %}", "[INST]", "</s>", "<tool_call>"),
    *(
        "e\u0301",
        "\U0001f469\u200d\U0001f4bb",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u202e",
        "\u4f60\u597d",
        "\u00a0",
        "\ufeff",
        "\x00",
    ),
    *("ktomark0z", "ktomark1z", "Where is it?", '{"a": 1}', "\\n", "\\u00e9"),
)
WORDS = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=6)), max_size=6).map("".join)
SAID = WORDS.filter(lambda text: text.strip() != "")
NAMES = st.sampled_from(["find", "a", "user", "name", "im_start", "w\u00e9_2"])
LEAVES = st.one_of(WORDS, st.integers(-(10**12), 10**12), st.booleans(), st.none(), st.floats(-1e6, 1e6))
ARGUMENTS = st.dictionaries(
    SAID,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SAID, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


def call_of(name: str, arguments: object) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = st.lists(st.builds(call_of, NAMES, ARGUMENTS), min_size=1, max_size=2)


@st.composite
def answers(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(["words", "words", "calls", "calls and words", "reasoning", "think"]))
    if kind == "words":
        return {"role": "assistant", "content": draw(SAID)}
    if kind == "calls":
        return {"role": "assistant", "content": "", "tool_calls": draw(CALLS)}
    if kind == "calls and words":
        return {"role": "assistant", "content": draw(SAID), "tool_calls": draw(CALLS)}
    if kind == "reasoning":
        return {"role": "assistant", "content": draw(SAID), "reasoning_content": draw(SAID)}
    return {"role": "assistant", "content": f"<think>\n{draw(SAID)}\n</think>\n\n{draw(SAID)}"}


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], Message, list[Any]]:
    """Return (prompt, answer, tools)."""
    roles = st.sampled_from(["system", "narrator", "context"])
    messages: list[Message] = [{"role": draw(roles), "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [{"role": "user", "content": draw(WORDS)}, draw(answers())]
        if draw(st.booleans()):
            messages.append({"role": draw(st.sampled_from(["tool", "narrator"])), "content": draw(WORDS)})
    messages.append({"role": "user", "content": draw(SAID)})
    tools = draw(st.lists(NAMES, max_size=2, unique=True))
    # An end token of the answer is removed and counted; see test_tokenization.py.
    answer = draw(
        answers().filter(lambda one: not one["content"].rstrip().endswith(("<|im_end|>", "<|eot_id|>", "</s>")))
    )
    return messages, answer, [{"type": "function", "function": {"name": one}} for one in tools]


def rendered(template: str, messages: list[Message], tools: list[Any]) -> tuple[str, str]:
    record = {"messages": messages, "tools": tools, "label": True}
    (row,) = parse_record(record, "f.jsonl:7", FeedbackFields())
    return RENDERERS[template].render(row)


@pytest.mark.parametrize("template", TEMPLATES)
@given(conversation=conversations(), as_text=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_conversation_is_written_whole_or_refused(
    template: str, conversation: tuple[list[Message], Message, list[Any]], as_text: bool
) -> None:
    prompt, answer, tools = conversation
    _, written, header, loses = TEMPLATES[template]
    given_messages = [with_text(one) for one in (*prompt, answer)] if as_text else [*prompt, answer]
    if loses([*prompt, answer], [answer]):
        with pytest.raises(TokenizationError, match=r"^f\.jsonl:7: the chat template leaves (out|the completion out)"):
            rendered(template, given_messages, tools)
        return
    before = written(prompt, tools) + header
    assert rendered(template, given_messages, tools) == (before, written([*prompt, answer], tools)[len(before) :])


def with_text(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON text, as OpenAI writes them."""
    calls = [call_of(name, json.dumps(arguments)) for name, arguments in functions(message)]
    return {**message, "tool_calls": calls} if calls else message


PLAIN_WORDS = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), max_size=12)


@given(first=PLAIN_WORDS.filter(str.strip), answer=PLAIN_WORDS.filter(str.strip), call=st.tuples(NAMES, ARGUMENTS))
@settings(max_examples=100, deadline=None)
def test_the_rendered_text_is_read_back(first: str, answer: str, call: tuple[str, Any]) -> None:
    """Compare the text of a template with its row, if no words of the row look like marks of the template."""
    assume("<" not in as_json(call) and ">" not in as_json(call))
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer, "tool_calls": [call_of(*call)]},
    ]
    turns = re.findall(
        r"<\|im_start\|>(\w+)\n([^<]*)(?:<tool_call>\n([^<]*)\n</tool_call>)?<\|im_end\|>\n",
        "".join(rendered("qwen", messages, [])),
    )
    assert [(role, words) for role, words, _ in turns] == [("user", first), ("assistant", answer + "\n")]
    assert json.loads(turns[1][2]) == {"name": call[0], "arguments": call[1]}


@pytest.mark.parametrize("template", ["llama", "qwen"])
@given(first=ARGUMENTS, second=ARGUMENTS)
@settings(max_examples=100, deadline=None)
def test_different_calls_never_read_the_same(template: str, first: Any, second: Any) -> None:
    assume(json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True))
    ask = {"role": "user", "content": "Where?"}
    one, other = (
        rendered(template, [ask, {"role": "assistant", "content": "", "tool_calls": [call_of("find", each)]}], [])
        for each in (first, second)
    )
    assert one[0] == other[0]
    assert one[1] != other[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('{"a": 1, "a": 2}', '{"a": 2}'),
        ("[1]", "[1, 2]"),
        ("find", "found"),
        ('{"a": 1', '{"a": 1}'),
        ('{"a": "1"}', '{"a": 1}'),
        ('{"a": 1.0}', '{"a": 1}'),
        ('{"a": NaN}', '{"a": null}'),
    ],
)
@pytest.mark.parametrize("template", ["llama", "qwen"])
def test_texts_of_arguments_that_differ_never_read_the_same(template: str, first: str, second: str) -> None:
    ask = {"role": "user", "content": "Where?"}
    texts = {
        rendered(template, [ask, {"role": "assistant", "content": None, "tool_calls": [call_of("find", one)]}], [])
        for one in (first, second)
    }
    assert len(texts) == 2


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', json.dumps('{"city": "Paris"}'), {"city": "Paris"}])
def test_arguments_are_never_text_inside_of_json(arguments: Any) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [call_of("find", arguments)]}
    _, completion = rendered("qwen", [{"role": "user", "content": "Where?"}, answer], [])
    assert '"arguments": {"city": "Paris"}}' in completion


@pytest.mark.parametrize(
    ("first", "second"), [({"n": 1}, {"n": True}), ({"n": 1}, {"n": 1.0}), ('{"n": 1}', '{"n": 2}')]
)
def test_a_pair_of_calls_that_differ_only_in_arguments_is_no_pair_of_the_same(first: Any, second: Any) -> None:
    sides = ([{"role": "assistant", "content": None, "tool_calls": [call_of("find", one)]}] for one in (first, second))
    record = dict(zip(("chosen", "rejected"), sides, strict=True)) | {"prompt": [{"role": "user", "content": "Where?"}]}
    chosen, rejected = (RENDERERS["qwen"].render(row) for row in parse_record(record, "f.jsonl:7", FeedbackFields()))
    assert chosen[0] == rejected[0]
    assert chosen[1] != rejected[1]
