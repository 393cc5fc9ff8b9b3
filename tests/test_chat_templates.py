"""Conversations under templates of every kind: what was judged is what is scored."""

import inspect
import json
from datetime import datetime
from typing import Any

import pytest
import transformers
from models import BOS, CHAT_TEMPLATE, tiny_tokenizer

from offline_kto.kto_core.errors import TokenizationError
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.records import FeedbackRow, parse_record
from offline_kto.kto_core.feedback.template_settings import NOT_FOR_DATA, with_settings
from offline_kto.kto_core.feedback.tokenization import Tokenizing

ASK = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "In Paris."}


def rows_of(**record: Any) -> list[FeedbackRow]:
    return parse_record({"label": True, **record}, "f.jsonl:7", FeedbackFields())


def texts(
    template: str, *, day: datetime | None = None, bos: bool = False, **record: Any
) -> tuple[str, str, list[str]]:
    """Prompt and completion as their ids decode, and the warnings."""
    tokenizer = tiny_tokenizer(chat_template=template, bos=bos)
    tokenizing = Tokenizing(tokenizer, now=day)
    (tokens,) = tokenizing.tokenize(rows_of(**record))
    if isinstance(tokens, TokenizationError):
        raise tokens
    prompt, completion = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in tokens)
    return prompt, completion, tokenizing.warnings()


ALWAYS_OPENS = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}")
LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}{{ 'ASSISTANT:' }}"
)
PLAIN = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}{{ '### assistant:\n' }}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ALWAYS_OPENS, "<|im_end|>\n"),
        (CHAT_TEMPLATE.replace("if add_generation_prompt", "if add_generation_prompt is defined"), "<|im_end|>\n"),
        (LLAMA_3, "<|eot_id|>"),
        (VICUNA, "</s>"),
        (PLAIN, "\n\n"),
        (CHAT_TEMPLATE + "{{ '<|im_start|>user\n' if messages[-1].role == 'assistant' }}", "<|im_end|>\n"),
    ],
)
def test_a_header_of_the_next_turn_is_cut_off(template: str, end: str) -> None:
    _, completion, warnings = texts(template, messages=[ASK, ANSWER])
    assert completion.lstrip() == "In Paris." + end
    assert "adds the header of the assistant's next turn after 1 completion" in warnings[0]


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}",
        "{{ '</s>' }}{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}",
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + '</s>' }}"
        "{% endfor %}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ],
)
def test_an_end_is_no_header(template: str) -> None:
    _, completion, warnings = texts(template, messages=[ASK, ANSWER])
    assert completion.startswith("In Paris.")
    assert completion[9:] in ("<|im_end|>\n", "</s>", "\n")
    assert [line for line in warnings if "writes no special token" not in line] == []


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASK, {"role": "assistant", "content": "Sure: "}], "completion": [ANSWER]},
        {"messages": [ASK, {"role": "assistant", "content": "Sure: "}, ANSWER]},
    ],
    ids=["prompt and completion", "messages"],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ALWAYS_OPENS], ids=["ChatML", "always opens"])
def test_a_prompt_that_ends_in_the_assistants_words_is_continued(record: dict[str, Any], template: str) -> None:
    prompt, completion, warnings = texts(template, **record)
    assert prompt == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nSure: "
    assert completion == "In Paris.<|im_end|>\n"
    assert warnings[0].startswith("1 prompt ends with an unfinished assistant's message")


def test_a_call_that_no_tool_has_answered_is_not_continued() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(TokenizationError, match=r"f\.jsonl:7: the prompt ends with a tool call"):
        texts(CHAT_TEMPLATE, prompt=[ASK, call], completion=[ANSWER])


CALLS = CHAT_TEMPLATE.replace(
    "message['content'] + '<|im_end|>\n'",
    "message['content'] }}{% for c in message.tool_calls %}{{ c.function.name + WRITTEN }}{% endfor %}{{ '<|im_end|>\n'",
)
TOJSON = CALLS.replace("WRITTEN", "(c.function.arguments | tojson)")
ITEMS = CALLS.replace(
    "c.function.name + WRITTEN }}",
    "c.function.name }}{% for k, v in c.function.arguments | items %}{{ '<' + k + '>' + v }}{% endfor %}{{ '' }}",
)
TEXT = CALLS.replace("WRITTEN", "' ' + c.function.arguments")


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "find", "arguments": arguments}}],
    }


@pytest.mark.parametrize(
    ("template", "written"),
    [(TOJSON, 'find{"city": "Paris"}'), (ITEMS, "find<city>Paris"), (TEXT, 'find {"city": "Paris"}')],
    ids=["tojson", "items", "text"],
)
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city":"Paris"}'], ids=["object", "text"])
def test_arguments_of_a_call_read_the_same_as_text_and_as_an_object(
    template: str, written: str, arguments: Any
) -> None:
    _, completion, warnings = texts(template, messages=[ASK, call(arguments)])
    assert completion.replace('{"city":"', '{"city": "') == written + "<|im_end|>\n"
    assert warnings == []


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, {"a": 1}, {"end": "start"}, '{"m": 1}'])
def test_a_call_that_the_template_leaves_out_is_refused(arguments: Any) -> None:
    with pytest.raises(TokenizationError, match=r"f\.jsonl:7: the chat template leaves the completion out: 'find'"):
        texts(CHAT_TEMPLATE, messages=[ASK, call(arguments)])


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city":"Paris"}'], ids=["object", "text"])
def test_a_call_that_the_template_leaves_out_of_a_prompt_is_refused(arguments: Any) -> None:
    found = {"role": "tool", "content": "Paris it is."}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    messages = [ASK, call(arguments), found, ANSWER]
    with pytest.raises(
        TokenizationError, match=r"leaves out the name of a tool call in the prompt: 'find'.*\(and 2 more"
    ):
        texts(CHAT_TEMPLATE, messages=messages, tools=tools)
    assert texts(TOJSON, messages=messages, tools=tools)[2] == []


def test_a_call_in_the_older_format_that_is_left_out_is_refused() -> None:
    older = {**ANSWER, "function_call": {"name": "find", "arguments": '{"city": "Lyon"}'}}
    with pytest.raises(TokenizationError, match="leaves out the name of a tool call in the completion: 'find'"):
        texts(CHAT_TEMPLATE, messages=[ASK, older])


def test_a_call_that_is_left_out_beside_text_is_refused() -> None:
    with pytest.raises(
        TokenizationError, match=r"^f\.jsonl:7: .* leaves out the name of a tool call in the completion"
    ):
        texts(CHAT_TEMPLATE, messages=[ASK, {**call({}), "content": "Let me see."}])


NAMES_ONLY = CALLS.replace("+ WRITTEN", "")


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Paris"},
        {"i": "i"},
        {"m": 1},
        {"end": True},
        {"start": None},
        {"user": [{"im": 2.5}]},
        '["find"]',
        "find",
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [NAMES_ONLY, CALLS.replace("WRITTEN", "(c.function.arguments | list | tojson)")])
def test_a_call_without_its_arguments_is_refused(template: str, arguments: Any) -> None:
    """Two calls that differ in them would read the same; words as short as these occur in the template as well."""
    if template == NAMES_ONLY or isinstance(arguments, dict):
        with pytest.raises(TokenizationError, match="leaves out the arguments of a tool call in the completion"):
            texts(template, messages=[ASK, call(arguments)])


@pytest.mark.parametrize(
    "written", ["c.function.arguments | tojson | tojson", "c.function.arguments | string | tojson"]
)
def test_arguments_that_are_encoded_twice_are_refused(written: str) -> None:
    """An object becomes JSON text inside JSON text, or the text of Python's dict."""
    template = CALLS.replace("WRITTEN", f"({written})")
    with pytest.raises(TokenizationError, match=r"encodes the arguments of tool calls twice|as Python does"):
        texts(template, messages=[ASK, call({"city": "Paris"})])


def test_a_template_that_prints_arguments_gets_them_as_text() -> None:
    prints = CALLS.replace("c.function.name + WRITTEN", "c.function.name }}{{ c.function.arguments")
    _, completion, warnings = texts(prints, messages=[ASK, call({"city": "Paris", "n": [1, None]})])
    assert (completion, warnings) == ('find{"city": "Paris", "n": [1, null]}<|im_end|>\n', [])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_said(name: str) -> None:
    _, _, warnings = texts(CHAT_TEMPLATE, messages=[ASK, {**ANSWER, name: "France, so"}])
    assert "leaves out the reasoning of 1 completion" in warnings[0]
    keeps = CHAT_TEMPLATE.replace("message['content']", f"(message.{name} or '') + message['content']")
    _, completion, warnings = texts(keeps, messages=[ASK, {**ANSWER, name: "France, so"}])
    assert completion == "France, soIn Paris.<|im_end|>\n"
    assert warnings == []


def test_thoughts_inside_of_the_content_that_are_left_out_are_said() -> None:
    drops = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    _, completion, warnings = texts(drops, messages=[ASK, {**ANSWER, "content": "<think>\nhm\n</think>\nIn Paris."}])
    assert completion == "\nIn Paris.<|im_end|>\n"
    assert "leaves out the reasoning of 1 completion" in warnings[0]


def test_a_thought_that_begins_in_the_prompt_is_not_left_out() -> None:
    opens = CHAT_TEMPLATE.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
    prompt, completion, warnings = texts(
        opens, messages=[ASK, {**ANSWER, "content": "<think>\nhm\n</think>\nIn Paris."}]
    )
    assert prompt.endswith("<think>\n")
    assert completion == "hm\n</think>\nIn Paris.<|im_end|>\n"
    assert warnings == []


def test_other_text_that_is_left_out_is_refused() -> None:
    cuts = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('\n')[0]")
    with pytest.raises(TokenizationError, match=r"^f\.jsonl:7: the chat template leaves the completion out: 'In Paris"):
        texts(cuts, messages=[ASK, {**ANSWER, "content": "In Paris.\nOr Rome."}])
    with pytest.raises(TokenizationError, match="leaves out a message of the role 'user': 'Where"):
        texts(cuts, messages=[{**ASK, "content": "Where?\nAnd when?"}, ANSWER])


SKIPS = "{% for message in messages if message['role'] in known %}"


@pytest.mark.parametrize("content", ["Be kind.", "a", "1", "user", "Where?", "<|im_start|>", "\n:\n"])
@pytest.mark.parametrize("role", ["system", "narrator", "tool"])
def test_a_message_that_the_template_leaves_out_is_refused(role: str, content: str) -> None:
    """Also where its words occur elsewhere."""
    known = "{% set known = ['user', 'assistant'] %}"
    skips = known + CHAT_TEMPLATE.replace("{% for message in messages %}", SKIPS)
    messages = [ASK, ANSWER, {"role": role, "content": content}, ASK, ANSWER]
    with pytest.raises(TokenizationError, match=rf"^f\.jsonl:7: .* leaves out a message of the role '{role}': "):
        texts(skips, messages=messages)
    marked = ["messages of 1 row contain special tokens"] * (content == "<|im_start|>")
    assert [warning[:40] for warning in texts(CHAT_TEMPLATE, messages=messages)[2]] == marked


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    ignores = CHAT_TEMPLATE.replace("{% if tools %}", "{% if false %}")
    tools = [{"type": "function", "function": {"name": "Where"}}]
    for one in (tools, [tools[0]["function"]]):
        with pytest.raises(TokenizationError, match="leaves out one of the 'tools': 'Where'"):
            texts(ignores, messages=[ASK, ANSWER], tools=one)
        assert texts(CHAT_TEMPLATE, messages=[ASK, ANSWER], tools=one)[2] == []


def test_settings_that_the_template_does_not_read_are_said() -> None:
    _, _, warnings = texts(CHAT_TEMPLATE, messages=[ASK, ANSWER], chat_template_kwargs={"enable_thinkin": False})
    assert [w.split(" of 1 ")[0] for w in warnings] == ["the chat template reads none of some 'chat_template_kwargs'"]


FOLDS = (
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if PLACE and messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim + '\n\n' }}{% endif %}"
    "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "place", ["loop.first", "loop.index == 1", "loop.index == messages | length - messages | length % 2 - 1"]
)
def test_a_system_message_may_stand_in_the_users_turn(place: str) -> None:
    """In the first one (Gemma) or in the last one (Mistral)."""
    system = {"role": "system", "content": " a "}
    messages = [system, {**ASK, "content": " b "}, ANSWER, {**ASK, "content": "c"}, {**ANSWER, "content": " d"}]
    prompt, completion, warnings = texts(FOLDS.replace("PLACE", place), messages=messages)
    assert "\na\n\n" in prompt
    assert (completion, warnings) == ("d<|im_end|>\n", [])


DEVELOPER = {"role": "developer", "content": "Be kind."}


@pytest.mark.parametrize(
    "unknown",
    [
        "{% set known = ['system', 'user', 'assistant'] %}"
        + CHAT_TEMPLATE.replace("{% for message in messages %}", SKIPS),
        "{% for m in messages if m['role'] == 'developer' %}{{ raise_exception('role?') }}{% endfor %}" + CHAT_TEMPLATE,
        CHAT_TEMPLATE,
    ],
    ids=["left out", "refused", "any role is written"],
)
def test_a_developer_becomes_the_system_where_the_template_knows_none(unknown: str) -> None:
    assert texts(unknown, messages=[DEVELOPER, ASK, ANSWER]) == texts(
        unknown, messages=[{**DEVELOPER, "role": "system"}, ASK, ANSWER]
    )
    with pytest.raises(TokenizationError, match=r"^f\.jsonl:7: .* no role 'developer'.* Join the two"):
        texts(unknown, messages=[{"role": "system", "content": "Be brief."}, DEVELOPER, ASK, ANSWER])


def test_a_template_that_names_the_developer_writes_it() -> None:
    named = "{# roles: system, developer, user, assistant #}" + CHAT_TEMPLATE
    assert "<|im_start|>developer\nBe kind." in texts(named, messages=[DEVELOPER, ASK, ANSWER])[0]


def test_earlier_thoughts_may_be_left_out() -> None:
    drops = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    earlier = {"role": "assistant", "content": "<think>hm</think>Hello."}
    assert texts(drops, messages=[ASK, earlier, ASK, ANSWER])[2] == []


def test_a_template_that_takes_parts_gets_parts() -> None:
    parts = CHAT_TEMPLATE.replace(
        "message['content'] + ",
        "'' }}{% for p in message['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{{ ",
    )
    prompt, completion, warnings = texts(parts, messages=[ASK, ANSWER])
    assert (prompt, completion, warnings) == (
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
        "In Paris.<|im_end|>\n",
        [],
    )


def test_parts_are_never_printed_as_they_are() -> None:
    refuses = "{% if messages[0]['content'] is string %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    with pytest.raises(TokenizationError, match="refuses this conversation: no"):
        texts(refuses, messages=[ASK, ANSWER])


THINKS = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n' }}",
    "<|im_start|>assistant\n' }}{% if enable_thinking is not defined or enable_thinking %}{{ '<think>' }}{% endif %}",
)
REFUSES = "{% if not keep_it_all %}{{ raise_exception('cannot do') }}{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "setting"), [(THINKS, "enable_thinking=false"), (REFUSES, "keep_it_all=true")], ids=["known", "found"]
)
def test_a_refusal_names_the_setting_that_works(template: str, setting: str) -> None:
    with pytest.raises(TokenizationError, match=f"It can be rendered with --chat-template-kwargs {setting} ") as raised:
        texts(template, messages=[ASK, ANSWER])
    name, value = str(raised.value).split("--chat-template-kwargs ")[1].split(" ")[0].split("=")
    settings = {name: json.loads(value)}
    prompt, completion, _ = texts(template, messages=[ASK, ANSWER], chat_template_kwargs=settings)
    assert (prompt, completion) == texts(CHAT_TEMPLATE, messages=[ASK, ANSWER])[:2]
    assert texts(with_settings(template, settings), messages=[ASK, ANSWER])[:2] == (prompt, completion)


def test_settings_for_all_rows_leave_a_rows_own() -> None:
    mood = with_settings(CHAT_TEMPLATE, {"mood": "kind \"'{%\u00e9\n"})
    assert "mood\nkind \"'{%\u00e9\n<|im_end|>" in texts(mood, messages=[ASK, ANSWER])[0]
    own = texts(mood, messages=[ASK, ANSWER], chat_template_kwargs={"mood": "curt"})[0]
    assert own == texts(CHAT_TEMPLATE, messages=[ASK, ANSWER], chat_template_kwargs={"mood": "curt"})[0]


def test_settings_of_every_json_kind_reach_the_template() -> None:
    value = {"a": [1, 2.5, True, None, "x"], "b": {}}
    template = with_settings("{{ value | tojson }}\n" + CHAT_TEMPLATE, {"value": value})
    assert texts(template, messages=[ASK, ANSWER])[0].startswith(json.dumps(value) + "\n<|im_start|>user")


DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
DAY = datetime(2024, 7, 26)


def test_a_template_with_the_date_is_rendered_for_the_day_that_is_given() -> None:
    prompt, _, _ = texts(DATED, messages=[ASK, ANSWER], day=datetime(2024, 7, 26))
    assert prompt.startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% if strftime_now is defined %}{{ strftime_now(format='%Y-%m-%d') }}{% else %}none{% endif %}",
            "2024-07-06",
        ),
        ("{{ strftime_now('%d') | int + 1 }} {{ strftime_now('%B')[:3] }}, {{ strftime_now('%-d%%') }}", "7 Jul, 6%"),
        ("{% set form = '%' ~ 'Y' %}{% macro today() %}{{ strftime_now(form) }}{% endmacro %}{{ today() }}", "2024"),
        ("{% for f in ['%d', '%m'] %}{{ strftime_now(f) }}.{% endfor %}{{ strftime_now('%d') }}", "06.07.06"),
        ("\n{{ strftime_now('%y') }}", "\n24"),
        ("  {% if true %}{{ strftime_now('%y') }}{% endif %}", "24"),
    ],
)
def test_a_template_may_work_with_the_date(template: str, expected: str) -> None:
    """The definition of `strftime_now` before the template leaves its line breaks and spaces alone."""
    prompt, _, _ = texts(template + CHAT_TEMPLATE, messages=[ASK, ANSWER], day=datetime(2024, 7, 6))
    assert prompt.startswith(f"{expected}<|im_start|>")
    own = tiny_tokenizer(chat_template=template + CHAT_TEMPLATE)
    today, _, _ = texts(template + CHAT_TEMPLATE, messages=[ASK, ANSWER])
    assert today == own.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)


def test_the_template_for_tools_is_rendered_for_the_day_too() -> None:
    tokenizer = tiny_tokenizer(chat_template={"default": CHAT_TEMPLATE, "tool_use": DATED})
    tokenizing = Tokenizing(tokenizer, now=datetime(2024, 7, 26))
    tokenizing.tokenize(rows_of(messages=[ASK, ANSWER]))
    assert not tokenizing.dated
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    ((prompt, _),) = tokenizing.tokenize(rows_of(messages=[ASK, ANSWER], tools=[tool]))
    assert tokenizer.decode(prompt).startswith("26 Jul 2024<|im_start|>tools")


def test_a_template_s_own_refusal_is_shown_beside_the_date() -> None:
    with pytest.raises(TokenizationError, match="refuses this conversation: not on 26"):
        texts(DATED + "{{ raise_exception('not on ' ~ strftime_now('%d')) }}", messages=[ASK, ANSWER], day=DAY)


def test_a_record_sets_no_parameter_of_the_library() -> None:
    """A parameter that a newer version of transformers adds would change what is rendered, or how."""
    parameters = inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters
    assert {*parameters} - {"self", "kwargs", "documents"} <= NOT_FOR_DATA


@pytest.mark.parametrize(("template", "dated"), [(DATED, True), (CHAT_TEMPLATE, False)])
def test_what_depends_on_the_day_is_known(template: str, dated: bool) -> None:
    tokenizing = Tokenizing(tiny_tokenizer(chat_template=template))
    tokenizing.tokenize(rows_of(messages=[ASK, ANSWER]))
    assert tokenizing.dated is dated


def test_a_template_that_writes_bos_twice_is_said() -> None:
    prompt, _, warnings = texts("{{ bos_token }}" + CHAT_TEMPLATE, messages=[ASK, ANSWER], bos=True)
    assert prompt.startswith(BOS + BOS)
    assert "1 row begins with two BOS tokens" in warnings[0]


@pytest.mark.parametrize(
    ("template", "open_ended"),
    [(CHAT_TEMPLATE, False), (VICUNA, False), (PLAIN, True), (CHAT_TEMPLATE.replace("<|im_end|>", ""), True)],
)
def test_a_template_that_ends_no_turn_is_said(template: str, open_ended: bool) -> None:
    """The model would never learn to stop."""
    _, completion, warnings = texts(template, messages=[ASK, ANSWER])
    assert ("<" not in completion) == open_ended
    assert any("writes no special token after 1 completion" in line for line in warnings) == open_ended
