import copy
import hashlib
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.labels import LABEL_WORDS, LabelRule, has_no_value
from offline_kto.kto_core.feedback.left_out import EMPTY, MEDIA, NO_PROMPT, SAME_ANSWERS, UNRATED, LeftOut
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.rating_threshold import resolve_threshold
from offline_kto.kto_core.feedback.records import FeedbackRow, parse_record

WHERE = "feedback.jsonl:17"
THUMB_UP, THUMB_DOWN = "\U0001f44d", "\U0001f44e"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def fields_of(prompt=None, completion=None, label=None, rating_threshold=None, **more):
    paths = {"prompt": prompt, "completion": completion, "label": label}
    rule = LabelRule() if rating_threshold is None else LabelRule.at_least(rating_threshold)
    return FeedbackFields(**{name: text and Path(text, name) for name, text in paths.items()}, rule=rule, **more)


def parse(record, **fields):
    return parse_record(record, WHERE, fields_of(**fields))


def parse_label(value, where, field):
    return LabelRule().verdict(value, where, field)


def one(record, **fields):
    (row,) = parse(record, **fields)
    return row


def pair(record, **fields):
    chosen, rejected = parse(record, **fields)
    assert (chosen.label, rejected.label) == (True, False)
    assert chosen.prompt == rejected.prompt
    assert chosen.pair_id == rejected.pair_id
    assert re.fullmatch("[0-9a-f]{32}", chosen.pair_id)
    return chosen.prompt, chosen.completion, rejected.completion


def refusal(record, **fields):
    with pytest.raises(FeedbackError) as caught:
        parse(record, **fields)
    message = str(caught.value)
    assert message.startswith(WHERE + ": ")
    assert "\n" not in message
    return message


def left_out(record, **fields):
    with pytest.raises(LeftOut) as caught:
        parse(record, **fields)
    return caught.value.reason


# Labels


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", " True\n", "1", "1.0", "GOOD", "Desirable", "up", [True]])
def test_label_desirable(value):
    assert parse_label(value, WHERE, "label") is True


@pytest.mark.parametrize("value", [False, 0, 0.0, -0.0, "FALSE", "0", "0.0", "bad", "undesirable", "no", [0, 0]])
def test_label_undesirable(value):
    assert parse_label(value, WHERE, "label") is False


PAIRS = """true/false 1/0 1.0/0.0 yes/no y/n good/bad desirable/undesirable chosen/rejected up/down upvote/downvote
upvoted/downvoted thumbs_up/thumbs_down thumbsUp/thumbsDown Thumbs-Up/Thumbs-Down thumb_up/thumb_down :thumbsup:/:thumbsdown:
like/dislike liked/disliked positive/negative accepted/rejected accept/reject pass/fail passed/failed correct/incorrect
helpful/unhelpful WAHR/FALSCH"""


@pytest.mark.parametrize("words", PAIRS.split())
def test_label_words(words):
    for word, label in zip(words.split("/"), (True, False), strict=True):
        for spelling in (word, word.upper(), f" {word.title()} ", word.replace("_", " ")):
            assert parse_label(spelling, WHERE, "label") is label


def test_thumbs_of_every_skin_are_labels():
    for selector in ("", "\ufe0f", "\ufe0e", *map(chr, range(0x1F3FB, 0x1F400))):
        assert parse_label(THUMB_UP + selector, WHERE, "label") is True
        assert parse_label(THUMB_DOWN + selector, WHERE, "label") is False


NUMBERS = [math.inf, 2, -1, 0.5, 4, 10**400]
WORDS = ["maybe", "up!", "2", "-1", "+1", "t", "true false", "4.0"]
SIGNS = ["\ufe0f", THUMB_UP + THUMB_UP]
OTHERS = [{"label": True}, b"true", [4]]
UNRATED_VALUES = [None, [], {}, (), "", " ", "None", "nan", "NULL", "N/A", math.nan, [None]]


@pytest.mark.parametrize("value", [*NUMBERS, *WORDS, *SIGNS, *OTHERS])
def test_label_refuses_everything_else(value):
    with pytest.raises(FeedbackError, match=r"^feedback.jsonl:17: 'thumb' is .*, which is neither up nor down\.$"):
        parse_label(value, WHERE, "thumb")


@pytest.mark.parametrize("value", UNRATED_VALUES)
def test_values_that_say_nothing_are_left_out(value):
    with pytest.raises(LeftOut, match=UNRATED):
        parse_label(value, WHERE, "thumb")


def meaning(value):
    """Slow second opinion: written from the rule, not from the code."""
    if isinstance(value, list):
        found = {meaning(one) for one in value if not has_no_value(one)}
        return found.pop() if len(found) == 1 else None
    if isinstance(value, str):
        return next((label for word, label in LABEL_WORDS.items() if value.strip().lower() == word), None)
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@given(json_values | st.sampled_from(sorted(LABEL_WORDS)) | st.sampled_from(["tru", "goodbad", "10", "no!"]))
def test_parse_label_returns_for_labels_and_for_nothing_else(value):
    if meaning(value) is not None:
        assert parse_label(value, WHERE, "label") is meaning(value)
    else:
        with pytest.raises((FeedbackError, LeftOut)):
            parse_label(value, WHERE, "label")


# Prompt, completion, label


def test_plain_text_is_kept_as_it_is():
    row = one({"prompt": " 2+2=", "completion": " 4\n", "label": "good", "id": 7})
    assert row == FeedbackRow(WHERE, " 2+2=", " 4\n", True, form="prompt + completion")
    assert (row.pair_id, row.tools, row.template_kwargs) == (None, None, {})


@pytest.mark.parametrize(
    "record",
    [
        *({"prompt": text, "completion": "x", "label": 0} for text in ("", " ", "\n", None)),
        {"prompt": [user("")], "completion": "x", "label": 0},
        {"prompt": [system("s"), user(" ")], "completion": "x", "label": 0},
        {"messages": [user("q"), assistant("a"), user(""), assistant("x")], "label": 0},
        {"messages": [user(""), {**assistant("x"), "label": 0}]},
        {"instruction": "", "input": "", "output": "x", "label": 0},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_prompt_is_left_out(record, chat):
    assert left_out(record, chat=chat) == NO_PROMPT


@pytest.mark.parametrize(
    "messages",
    [
        [user("q"), {"role": "assistant", "content": None}],
        [user("q"), {"role": "assistant", "content": None, "tool_calls": []}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}],
        [user("q"), {"role": "assistant", "content": None, "id": "2"}],
    ],
)
def test_an_answer_of_messages_that_is_null_is_left_out(messages):
    assert left_out({"messages": messages, "label": True}) == EMPTY


@pytest.mark.parametrize(
    ("record", "option"),
    [
        ({"messages": [user("1?"), assistant("m")], "prompt": "1?", "completion": "one"}, "--completion-field"),
        ({"messages": [user("1?"), assistant("m")], "question": "1?", "answer": "one"}, "--completion-field"),
        ({"messages": [user("2?"), assistant("one")], "prompt": "1?", "completion": "one"}, "--prompt-field"),
        ({"messages": [user("2?")], "prompt": "1?", "completion": "one"}, "--prompt-field"),
        ({"conversations": [{"from": "human", "value": "2?"}], "prompt": "1?", "completion": "one"}, "--prompt-field"),
        ({"instruction": "2?", "prompt": "1?", "completion": "one"}, "--prompt-field"),
        ({"instruction": "2?", "prompt": "1?", "chosen": "one", "rejected": "two"}, "--prompt-field"),
    ],
)
def test_a_second_prompt_or_answer_is_refused(record, option):
    message = refusal(record if "chosen" in record else {**record, "label": True})
    assert "only one of them can be read" in message
    assert option in message


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [user("1?"), assistant("one")]},
        {"messages": [user("1?")]},
        {"messages": [system("s"), user("1?"), assistant("one ")]},
        {"instruction": "1?"},
        {"instruction": ""},
        {"messages": []},
    ],
)
def test_a_prompt_or_an_answer_that_is_repeated_is_read(more):
    row = one({"prompt": "1?", "completion": "one", "label": True, **more})
    assert (row.prompt, row.completion) == ("1?", "one")


def test_conversation_sides():
    row = one({"prompt": [system("s"), user("q")], "completion": [assistant("a")], "label": False})
    expected = FeedbackRow(WHERE, (system("s"), user("q")), (assistant("a"),), False, form="prompt + completion")
    assert row == expected


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [([user("q")], "a"), ("q", [assistant("a")]), ("q", assistant("a")), (user("q"), "a")],
)
def test_text_beside_messages_becomes_a_message(prompt, completion):
    row = one({"prompt": prompt, "completion": completion, "label": True})
    assert (row.prompt, row.completion) == ((user("q"),), (assistant("a"),))


def test_completion_that_repeats_the_prompt_is_cut():
    row = one({"prompt": "q", "completion": [user("q"), assistant("a")], "label": True})
    assert (row.prompt, row.completion) == ((user("q"),), (assistant("a"),))


def test_completion_of_several_messages_with_a_tool_in_between():
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    context = (call, {"role": "tool", "content": "3"})  # what a tool says is not learned
    for prompt in ([user("q")], "q"):
        begin = [] if isinstance(prompt, list) else [user("q")]
        row = one({"prompt": prompt, "completion": [*begin, *context, assistant("It is 3.")], "label": True})
        assert row.prompt == (user("q"), *context)
        assert row.completion == (assistant("It is 3."),)
        assert row.moved_results


@pytest.mark.parametrize(
    "completion",
    [
        [user("q"), assistant("a")],  # not the prompt
        [assistant("a"), user("b"), assistant("c")],
        [assistant("a"), system("b"), assistant("c")],
        [assistant("a"), user("b")],
        [{"role": "tool", "content": "x"}],
        [{"role": "narrator", "content": "x"}],
    ],
)
def test_completion_with_other_speakers_is_refused(completion):
    refusal({"prompt": [user("other")], "completion": completion, "label": True})


def test_prompt_repeated_without_an_answer_is_refused():
    assert "has no answer" in refusal({"prompt": "q", "completion": [user("q")], "label": True})
    assert "has no answer" in refusal({"prompt": [user("q")], "completion": [user("q")], "label": True})


@pytest.mark.parametrize("completion", ["", "  \n\t", [assistant("")], [assistant(" ")], assistant(""), None, math.nan])
def test_empty_completion_is_left_out(completion):
    assert left_out({"prompt": "q", "completion": completion, "label": False}) == EMPTY


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("value", ["", None, math.nan, [assistant("")]])
def test_pair_with_an_empty_side_is_left_out(side, value):
    assert left_out({"prompt": "q", "chosen": "a", "rejected": "b", side: value}) == EMPTY


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": None, "label": True},
        {"prompt": "q", "completion": None, "chosen": "a", "rejected": None},
        {"instruction": "q", "output": None, "label": True},
        {"messages": None, "label": True},
    ],
)
def test_an_empty_cell_of_an_answer_is_left_out(record):
    """Readers of CSV and Parquet return None for it."""
    assert left_out(record) == EMPTY


def test_an_empty_cell_under_a_name_of_the_users_is_left_out():
    assert left_out({"question": "q", "answer": None, "label": True}, prompt="question", completion="answer") == EMPTY


def test_empty_completion_with_tool_calls_is_fine():
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    for content in ({}, {"content": None}, {"content": ""}):
        row = one({"prompt": "q", "completion": [{"role": "assistant", "tool_calls": calls, **content}], "label": 1})
        called = [{"type": "function", "function": {"name": "f", "arguments": {}}}]  # as an object, for the template
        assert row.completion == (assistant("", tool_calls=called),)
    assert "content" in refusal({"prompt": "q", "completion": [{"role": "assistant", "tool_calls": []}], "label": 1})


def test_missing_prompt_names_the_option():
    message = refusal({"asked": "q", "completion": "a", "label": True})
    assert "no 'prompt'" in message
    assert "--prompt-field" in message
    assert '"asked"' in message


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "instruction"])
@pytest.mark.parametrize("completion", ["completion", "response", "answer"])
def test_usual_names_of_prompts_and_completions(prompt, completion):
    row = one({prompt: "q", completion: "a", "label": True}, chat_template=False)
    assert (row.prompt, row.completion, row.form) == ("q", "a", f"{prompt} + {completion}")


def test_two_usual_names_are_ambiguous():
    assert "--prompt-field" in refusal({"question": "q", "query": "p", "answer": "a", "label": True})
    assert "--completion-field" in refusal({"question": "q", "response": "b", "answer": "a", "label": True})


def test_messages_with_a_list_for_each_key():
    talk = {"role": ["user", "assistant"], "content": ["q", "a"]}
    shared = {"from": ["human", "gpt"], "value": ["q", "a"]}
    for record in ({"messages": talk, "label": True}, {"conversations": shared, "label": True}):
        row = one(record)
        assert (row.prompt, row.completion) == ((user("q"),), (assistant("a"),))
    for column in ("prompt", "completion"):
        sides = {
            "prompt": {"role": ["user"], "content": ["q"]},
            "completion": {"role": ["assistant"], "content": ["a"]},
        }
        row = one({"prompt": [user("q")], "completion": [assistant("a")], "label": True, column: sides[column]})
        assert (row.prompt, row.completion) == ((user("q"),), (assistant("a"),))
    judged = one({"messages": {**talk, "label": [None, False]}})
    assert (judged.prompt, judged.label) == ((user("q"),), False)


@pytest.mark.parametrize("column", ["output", "reply", "generated_text"])
def test_an_answer_beside_the_messages_is_pointed_out(column):
    record = {"messages": [user("q")], column: "a", "label": True}
    assert f"--completion-field {column}" in refusal(record)
    row = one(record, completion=column)
    assert (row.prompt, row.completion) == ((user("q"),), (assistant("a"),))


def test_an_unknown_role_of_the_answer_is_named_as_such():
    message = refusal({"messages": [user("q"), {"role": "agent", "content": "a"}], "label": True})
    assert '"agent", which is not a known role' in message
    assert "after the answer" not in message


@pytest.mark.parametrize(
    ("said", "results"),
    [
        ("<tool_response>\nrain\n</tool_response>", ["rain"]),
        ('<tool_response>{"a": "<b>"}</tool_response>\n', ['{"a": "<b>"}']),
        ("<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>", ["1", "2"]),
        ("as <tool_response>1</tool_response>", ["as <tool_response>1</tool_response>"]),
        ("<tool_response>1", ["<tool_response>1"]),
        ("<tool_response><tool_response>1</tool_response></tool_response>",) * 2,
    ],
)
@pytest.mark.parametrize(
    "keys", [("role", "content", "tool"), ("from", "value", "tool"), ("from", "value", "observation")]
)
def test_results_of_tools_are_not_wrapped_twice(said, results, keys):
    who, what, name = keys
    spoken = [("user", "q"), ("assistant", "<tool_call>{}</tool_call>"), (name, said), ("assistant", "a")]
    messages = [{who: role, what: text} for role, text in spoken]
    prompt = one({"messages": messages, "label": True}).prompt
    expected = [results] if isinstance(results, str) else results
    assert [message["content"] for message in prompt[2:]] == expected
    assert {message["role"] for message in prompt[2:]} == {"tool"}


@pytest.mark.parametrize(
    "earlier",
    [
        [user("p"), assistant("b"), user(" q ")],
        [["p", "b"], ["q", ""]],
        [["p", "b"], ["q", None]],
        [{"from": "human", "value": "p"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "q"}],
    ],
)
@pytest.mark.parametrize("names", [("prompt", "completion"), ("query", "response"), ("instruction", "output")])
def test_a_history_that_ends_with_the_question_asks_it_once(earlier, names):
    record = {names[0]: "q", names[1]: "a", "history": earlier, "label": True}
    assert one(record).prompt == (user("p"), assistant("b"), user("q"))
    # Another last question is asked before it.
    assert one({**record, names[0]: "r"}).prompt[-1] == user("r")
    assert user("p") in one({**record, names[0]: "r"}).prompt


def test_history_beside_query_and_response():
    record = {"query": "q", "response": "a", "history": [["p", "b"]], "system": "s", "label": True}
    row = one(record, chat=True)
    assert row.prompt == (system("s"), user("p"), assistant("b"), user("q"))
    assert row.completion == (assistant("a"),)
    assert "history" in refusal({**record, "query": [user("q")]})


@pytest.mark.parametrize("value", [3, 1.5, True, [], [3], ["q"], [[]], [{}], {}, {"role": 1}])
def test_prompts_and_completions_of_other_types(value):
    refusal({"prompt": value, "completion": "a", "label": True})
    refusal({"prompt": "q", "completion": value, "label": True})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "x"},
        {"role": 3, "content": "x"},
        {"role": None, "content": "x"},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": "user", "content": {"text": "x"}},
        {"role": "user", "content": [3]},
        {"role": "user", "content": [{"type": "text"}]},
    ],
)
def test_messages_need_a_role_and_a_content(message):
    refusal({"messages": [message, assistant("a")], "label": True})


def test_text_parts_are_joined_and_images_left_out():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    assert one({"messages": [{"role": "user", "content": parts}, assistant("c")], "label": 1}).prompt == (user("ab"),)
    parts = [*parts, {"type": "image_url", "image_url": {"url": "x" * 1000}}]
    assert left_out({"messages": [{"role": "user", "content": parts}, assistant("c")], "label": 1}) == MEDIA
    assert left_out({"prompt": "q", "completion": "a", "label": True, "images": ["x.png"]}) == MEDIA
    assert one({"prompt": "q", "completion": "a", "label": True, "images": []}).label is True


def test_unknown_roles_and_other_keys_are_kept_and_nulls_dropped():
    odd = {"role": "ipython", "content": "1", "name": "n", "thinking": None}
    row = one({"messages": [user("q"), odd, assistant("a", weight=1)], "label": 1})
    assert row.prompt == (user("q"), {"role": "ipython", "content": "1", "name": "n"})
    assert row.completion == (assistant("a", weight=1),)


# Messages and ShareGPT


def test_messages_end_with_the_completion():
    row = one({"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": False})
    assert row.prompt == (user("a"), assistant("b"), user("c"))
    assert row.completion == (assistant("d"),)


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("turns", [[user("a")], [assistant("a"), user("b")], [assistant("a")], [], "text", 3])
def test_conversations_that_do_not_end_in_an_answer(key, turns):
    assert key in refusal({key: turns, "label": True})


@pytest.mark.parametrize("speaker", ["gpt", "assistant", "chatgpt", "bing", "bard", "model", "GPT"])
def test_sharegpt_roles(speaker):
    turns = [
        ("system", "s"),
        ("human", "a"),
        (speaker, "b"),
        ("observation", "c"),
        ("user", "d"),
        (speaker, "e"),
    ]
    expected = [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d")]
    for role, content in (("from", "value"), ("role", "content")):
        row = one({"conversations": [{role: who, content: text} for who, text in turns], "kto_tag": True})
        assert [(m["role"], m["content"]) for m in row.prompt] == expected
        assert row.completion == (assistant("e"),)


def test_sharegpt_tool_roles_and_strangers():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [{"from": name, "value": "x"} for name in ["human", "tool", "function_response"]]
    turns += [{"from": "function_call", "value": json.dumps(call)}, {"from": "gpt", "value": "x"}]
    row = one({"conversations": turns, "label": False})
    assert [m["role"] for m in row.prompt] == ["user", "tool", "tool", "assistant"]
    assert row.prompt[-1] == assistant("", tool_calls=[{"type": "function", "function": call}])
    turns[3]["value"] = "x"
    assert "function_call" in refusal({"conversations": turns, "label": False})


@pytest.mark.parametrize("role", ["human", "Human", "USER", "prompter"])
def test_role_names_are_translated_everywhere(role):
    turns = [{"role": role, "content": "x"}, assistant("a")]
    assert one({"messages": turns, "label": True}).prompt[0]["role"] == "user"
    assert one({"prompt": turns[:1], "completion": "a", "label": True}).prompt[0]["role"] == "user"


def test_system_column_leads_a_conversation():
    turns = [user("q"), assistant("a")]
    assert one({"conversations": turns, "system": "s", "label": True}).prompt == (system("s"), user("q"))
    assert one({"conversations": turns, "system": "", "label": True}).prompt == (user("q"),)
    own = [system("s"), *turns]
    assert one({"messages": own, "system": "s", "label": True}).prompt == (system("s"), user("q"))
    assert "system" in refusal({"messages": own, "system": "other", "label": True})
    beside = {"prompt": "q", "completion": "a", "system": "s", "label": True}
    assert "system" in refusal(beside)
    assert one(beside, chat=True).prompt == (system("s"), user("q"))


# Labels of a record


def test_kto_tag_and_label_must_agree():
    record = {"prompt": "q", "completion": "a", "label": True}
    assert one({**record, "kto_tag": "yes"}).label is True
    assert one({**record, "kto_tag": None}).label is True
    assert "contradict" in refusal({**record, "kto_tag": False})


def test_missing_label_is_left_out():
    assert left_out({"prompt": "q", "completion": "a", "label": None, "liked": True}) == UNRATED


def test_an_empty_label_is_left_out_and_named():
    with pytest.raises(LeftOut, match="'label' is empty;") as caught:
        parse({"prompt": "q", "completion": "a", "label": None})
    assert caught.value.reason == UNRATED
    assert left_out({"prompt": "q", "completion": "a", "liked": None}, label="liked") == UNRATED


def test_label_field_replaces_the_usual_names():
    record = {"prompt": "q", "completion": "a", "label": True, "liked": False}
    assert one(record, label="liked").label is False
    assert left_out(record, label="lkied") == UNRATED


def test_field_options():
    record = {"question": "q", "answer": "a", "good": 1, "messages": [user("x"), assistant("y")]}
    row = one(record, prompt="question", completion="answer", label="good")
    assert (row.prompt, row.completion, row.label) == ("q", "a", True)
    assert "--completion-field" in refusal(record, label="good")
    del record["question"], record["answer"]
    assert one(record, label="good").completion == (assistant("y"),)
    assert "--completion-field" in refusal({"question": "q", "good": 1}, prompt="question", completion="answer")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": "x", "label": True},
        {"prompt": "q", "label": True},
        {"prompt": "q", "chosen": "a", "label": True},
        {"prompt": "q", "rejected": "a"},
        {"instruction": "q", "label": True},
        {"prompt": None, "completion": None, "label": None},
    ],
)
def test_unknown_formats(record):
    assert "found" in refusal(record)


def test_formats_are_recognised_record_by_record():
    nothing = dict.fromkeys(["prompt", "completion", "messages", "chosen", "rejected", "instruction", "output"])
    assert one({**nothing, "prompt": "q", "completion": "a", "label": True}).completion == "a"
    assert one({**nothing, "messages": [user("q"), assistant("a")], "label": True}).prompt == (user("q"),)
    assert one({**nothing, "instruction": "q", "output": "a", "label": True}, chat_template=False).prompt == "q"
    assert pair({**nothing, "prompt": "q", "chosen": "a", "rejected": "b"}) == ("q", "a", "b")


# Ratings


def rated(rating, **more):
    return {"prompt": "q", "completion": "a", "rating": rating, **more}


@pytest.mark.parametrize(
    ("rating", "label"), [(5, True), (4, True), (4.0, True), ("4", True), (3.9, False), ("-1e1", False)]
)
def test_rating_at_the_threshold_is_desirable(rating, label):
    assert one(rated(rating), rating_threshold=4.0).label is label


def test_rating_wins_over_a_label_only_with_a_threshold():
    assert one(rated(5, label=False), rating_threshold=4.0).label is True
    assert one(rated(5, label=False)).label is False


def test_rating_without_threshold_or_label():
    assert "there is a rating, 4, but no label" in refusal(rated(4))


@pytest.mark.parametrize("rating", [True, "good", "1_0", "inf", math.inf, [4, "x"], {"x": 4}, 10**400])
def test_what_is_no_rating(rating):
    assert "rating" in refusal(rated(rating, label=True), rating_threshold=4.0)


@pytest.mark.parametrize("rating", [None, "", "nan", "N/A", math.nan, [], {}])
def test_no_rating_is_left_out(rating):
    assert left_out(rated(rating, label=True), rating_threshold=4.0) == UNRATED


def test_label_field_names_the_rating():
    assert one({"prompt": "q", "completion": "a", "stars": "3.5"}, label="stars", rating_threshold=3).label is True


def test_ratings_do_not_touch_pairs():
    assert pair({"prompt": "q", "chosen": "a", "rejected": "b"}, rating_threshold=4.0)[0] == "q"


def test_resolve_threshold_number_reads_no_record():
    def never():
        raise AssertionError("read")
        yield

    assert resolve_threshold(" 3.5 ", never()) == 3.5


@pytest.mark.parametrize("text", ["", "nan", "inf", "mean", "4 stars", "1e999"])
def test_resolve_threshold_refuses_other_text(text):
    with pytest.raises(ConfigError, match="--rating-threshold"):
        resolve_threshold(text, [])


def test_resolve_threshold_median():
    ratings = [1, "5", 4.0, 2, None]
    records = [(f"f:{i}", rated(rating)) for i, rating in enumerate(ratings)]
    records.append(("f:9", {"prompt": "q", "chosen": "a", "rejected": "b", "rating": 100}))
    assert resolve_threshold("Median", records) == 3.0
    stars = [("f:1", {"stars": 7})]
    assert resolve_threshold("median", stars, Path("stars", "--label-field")) == 7.0
    with pytest.raises(ConfigError, match=r"no record has a 'rating'\."):
        resolve_threshold("median", stars)
    with pytest.raises(FeedbackError, match=r"^f:2: 'rating' must be a number"):
        resolve_threshold("median", [("f:1", rated(1)), ("f:2", rated("five"))])


# Alpaca

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "kto_tag": True}


def test_alpaca_as_a_conversation():
    row = one({**ALPACA, "system": "s", "history": [["a", "b"], ("c", "d")]})
    history = (user("a"), assistant("b"), user("c"), assistant("d"))
    assert row.prompt == (system("s"), *history, user("Add.\n1 2"))
    assert row.completion == (assistant("3"),)


def test_alpaca_as_text():
    row = one({**ALPACA, "system": "s", "history": [["a", "b"]]}, chat_template=False)
    assert (row.prompt, row.completion) == ("s\n\na\n\nb\n\nAdd.\n\n1 2", "3")
    assert one(ALPACA, chat_template=False).prompt == "Add.\n\n1 2"


@pytest.mark.parametrize("more", [{"input": ""}, {"input": None}, {"input": "", "system": "", "history": []}])
def test_alpaca_without_input(more):
    assert one({**ALPACA, **more}).prompt == (user("Add."),)
    assert one({**ALPACA, **more}, chat_template=False).prompt == "Add."


@pytest.mark.parametrize(
    "more",
    [
        {"input": 3},
        {"system": 1},
        {"history": "x"},
        {"history": [["a"]]},
        {"history": [[1, 2]]},
    ],
)
def test_alpaca_refusals(more):
    refusal({**ALPACA, **more})


def test_alpaca_pair():
    record = {"instruction": "q", "system": "s", "chosen": "a", "rejected": "b"}
    assert pair(record) == ((system("s"), user("q")), (assistant("a"),), (assistant("b"),))
    assert pair(record, chat_template=False) == ("s\n\nq", "a", "b")


# Pairs


def test_pair_of_text_and_its_id():
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert pair(record) == ("q", "a", "b")
    ids = {parse(other)[0].pair_id for other in (record, {**record, "note": 1}, dict(reversed(record.items())))}
    assert ids == {parse_record(record, "elsewhere:1", FeedbackFields())[0].pair_id}
    assert parse({**record, "chosen": "c"})[0].pair_id not in ids
    assert parse({**record, "chosen": "b", "rejected": "a"})[0].pair_id not in ids
    assert parse({**record, "prompt": "r"})[0].pair_id not in ids


def test_pair_id_hashes_the_canonical_content():
    canonical = '["q\u00e9","a","b"]'.encode()
    expected = hashlib.sha256(canonical).hexdigest()[:32]
    assert parse({"prompt": "q\u00e9", "chosen": "a", "rejected": "b"})[0].pair_id == expected


def test_pair_of_messages_with_and_without_the_prompt():
    expected = ((user("q"),), (assistant("a"),), (assistant("b"),))
    whole = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    bare = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    ids = set()
    for prompt in ({"prompt": "q"}, {"prompt": [user("q")]}):
        for record in (whole, bare, {"chosen": "a", "rejected": [assistant("b")]}):
            assert pair({**prompt, **record}) == expected
            ids.add(parse({**prompt, **record})[0].pair_id)
    assert pair(whole) == expected
    assert len(ids | {parse(whole)[0].pair_id}) == 1


def test_pair_with_text_prompt_inside_a_longer_conversation():
    begin = [system("s"), user("q"), assistant("x"), user("y")]
    record = {"prompt": "q", "chosen": [*begin, assistant("a")], "rejected": [*begin, assistant("b")]}
    assert pair(record) == (tuple(begin), (assistant("a"),), (assistant("b"),))
    assert "does not repeat the prompt" in refusal({**record, "prompt": "other"})
    record["rejected"] = [user("q"), assistant("b")]
    assert "different prompts" in refusal(record)


def test_pair_ignores_a_messages_column_that_repeats_chosen():
    whole = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert pair({**whole, "prompt": "q", "messages": whole["chosen"]})[0] == (user("q"),)
    assert pair({**whole, "messages": whole["chosen"]})[0] == (user("q"),)


def test_pair_with_sharegpt_prompt():
    record = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    assert pair(record) == ((user("q"),), (assistant("a"),), (assistant("b"),))


def test_pair_of_messages_with_a_shared_beginning():
    begin = [system("s"), user("q"), assistant("x"), user("y")]
    record = {"chosen": [*begin, assistant("a")], "rejected": [*begin, assistant("b")]}
    assert pair(record) == (tuple(begin), (assistant("a"),), (assistant("b"),))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (
            [user("q"), assistant("a"), user("r"), assistant("c")],
            [user("q"), assistant("b"), user("r"), assistant("c")],
        ),
        ([user("q"), assistant("a")], [user("q"), assistant("a"), user("r"), assistant("b")]),
        ([user("q"), assistant("a")], [user("r"), assistant("b")]),
        ([assistant("a")], [assistant("b")]),
        ([user("q"), user("a")], [user("q"), assistant("b")]),
        ([user("q"), assistant("a")], [user("q")]),
        ([user("q"), assistant("a")], "b"),
    ],
)
def test_pairs_without_a_usable_beginning(chosen, rejected):
    refusal({"chosen": chosen, "rejected": rejected})
    refusal({"chosen": rejected, "rejected": chosen})


def test_pair_where_one_side_goes_on_names_that_side():
    first = [user("q"), assistant("a")]
    message = refusal({"chosen": first, "rejected": [*first, user("r"), assistant("b")]})
    assert "after the 1 messages" in message
    assert "'rejected' must contain one message of the assistant" in message


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"


def test_pair_of_text_turns():
    assert pair({"chosen": HH + " Yes.", "rejected": HH + " Yet."}) == (HH, " Yes.", " Yet.")
    # A marker that only one side has belongs to its answer.
    odd = " Yes.\n\nAssistant: More."
    assert pair({"chosen": HH + odd, "rejected": HH + " No."}) == (HH, odd, " No.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "part"),
    [
        ("The sky is blue.", "The sky is green.", "Add a prompt"),
        (HH + " a", "\n\nHuman: other\n\nAssistant: b", "Add a prompt"),
        (HH + " a\n\nHuman: x\n\nAssistant: b", HH + " c", "'chosen' continues"),
        (HH + " a", HH + " c\n\nHuman: x\n\nAssistant: b", "'rejected' continues"),
    ],
)
def test_text_pairs_without_a_usable_beginning(chosen, rejected, part):
    assert part in refusal({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [(HH + " a", HH, EMPTY), (HH + " ", HH + " a", EMPTY), (HH + " a", HH + " a", SAME_ANSWERS)],
)
def test_text_pairs_that_say_nothing_are_left_out(chosen, rejected, reason):
    assert left_out({"chosen": chosen, "rejected": rejected}) == reason


@given(st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", "\n\n"]), max_size=8), st.data())
def test_shared_text_is_the_last_shared_marker(begin, data):
    tails = st.lists(st.sampled_from([" a", " b", "\n\nAssistant:", "\n\nHuman:", "\n\nAss"]), max_size=4)
    chosen, rejected = ("".join(begin + data.draw(tails)) for _ in range(2))
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    cut = chosen[:same].rfind("\n\nAssistant:") + len("\n\nAssistant:")
    try:
        rows = parse({"chosen": chosen, "rejected": rejected})
    except (FeedbackError, LeftOut):
        tails_ = chosen[cut:], rejected[cut:]
        usable = "\n\nAssistant:" in chosen[:same] and all(t.strip() and "\n\nHuman:" not in t for t in tails_)
        assert not usable or chosen == rejected
    else:
        assert [(r.prompt, r.completion) for r in rows] == [
            (chosen[:cut], chosen[cut:]),
            (chosen[:cut], rejected[cut:]),
        ]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": [assistant("a")]},
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": "a"},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
    ],
)
def test_pairs_of_one_answer_are_left_out(record):
    assert left_out(record) == SAME_ANSWERS


def test_completion_beside_a_pair_is_ambiguous():
    record = {"prompt": "q", "completion": "c", "label": True, "chosen": "a", "rejected": "b"}
    assert "--completion-field completion" in refusal(record)
    assert one(record, completion="completion").completion == "c"


def test_pair_with_a_named_prompt_and_empty_side():
    assert pair({"question": "q", "chosen": "a", "rejected": "b"}, prompt="question")[0] == "q"
    assert left_out({"prompt": "q", "chosen": "a", "rejected": ""}) == EMPTY


# Tools and template arguments

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools(tools):
    row = one({"messages": [user("q"), assistant("a")], "label": 1, "tools": tools})
    assert row.tools == (TOOL,)


@pytest.mark.parametrize("key", ["input_schema", "inputSchema"])
def test_tools_of_anthropic_s_are_converted(key):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    given = {"name": "w", "description": "d", key: schema, "cache_control": {"type": "ephemeral"}}
    served = {"type": "web_search_20250305", "name": "web_search"}
    row = one({"messages": [user("q"), assistant("a")], "label": 1, "tools": [given, TOOL, served]})
    converted = {"type": "function", "function": {"name": "w", "description": "d", "parameters": schema}}
    assert row.tools == (converted, TOOL, served)


def test_results_of_the_last_message_s_own_calls_are_left_away():
    called = {"type": "tool-w", "toolCallId": "c", "state": "output-available", "input": {"a": 1}, "output": "rain"}
    last = {"role": "assistant", "parts": [{"type": "text", "text": "Let me see."}, called]}
    row = one({"messages": [{"role": "user", "parts": [{"type": "text", "text": "q"}]}, last], "label": True})
    assert [message["role"] for message in row.prompt] == ["user"]
    (answer,) = row.completion
    assert answer["content"] == "Let me see."
    assert [call["function"]["name"] for call in answer["tool_calls"]] == ["w"]
    (spoken, *_) = last["parts"]
    again = {**last, "parts": [spoken, called, {"type": "text", "text": "Rain."}]}
    row = one({"messages": [user("q"), again], "label": True})
    assert [message["role"] for message in row.prompt] == ["user", "assistant", "tool"]
    assert [message["content"] for message in row.completion] == ["Rain."]
    result = {"role": "tool", "content": "rain", "tool_call_id": "c"}  # a message of its own, which may be judged
    assert "Remove the messages after the answer" in refusal({"messages": [user("q"), last, result], "label": True})


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools):
    assert one({"prompt": "q", "completion": "a", "label": 1, "tools": tools}).tools is None


@pytest.mark.parametrize("tools", [3, "x", "{}", {}, [3], "[3]", {"a": 1}])
def test_what_are_no_tools(tools):
    assert "'tools'" in refusal({"messages": [user("q"), assistant("a")], "label": 1, "tools": tools})


def test_tools_beside_plain_text():
    assert "'tools'" in refusal({"prompt": "q", "completion": "a", "label": 1, "tools": [TOOL]})


@pytest.mark.parametrize("kwargs", [{"thinking": False, "effort": None}, '{"thinking": false}'])
def test_template_kwargs(kwargs):
    row = one({"messages": [user("q"), assistant("a")], "label": 1, "chat_template_kwargs": kwargs})
    assert row.template_kwargs == {"thinking": False}


@pytest.mark.parametrize("kwargs", [3, "x", [], "[]"])
def test_what_are_no_template_kwargs(kwargs):
    refusal({"messages": [user("q"), assistant("a")], "label": 1, "chat_template_kwargs": kwargs})


# All records


def test_lone_surrogates_are_refused_before_a_tokenizer_meets_them():
    record = json.loads('{"prompt": "q", "completion": "well \\ud83d", "label": true}')
    message = refusal(record)
    assert "surrogate" in message
    assert message.isascii()
    turns = {"messages": [user("q"), assistant("a")], "label": True}
    refusal({**turns, "tools": [{"name": "\ud83d"}]})
    refusal({**turns, "chat_template_kwargs": {"x": "\ud83d"}})
    refusal({"messages": [user("q"), assistant("a", name="\ud83d")], "label": True})


def test_values_outside_of_json_and_deep_nesting_are_refused():
    refusal({"messages": [user("q"), assistant("a", seen={1, 2})], "label": True})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested" in refusal({"messages": [user("q"), assistant("a", extra=deep)], "label": True})
    calls = [{"function": {"name": "f", "arguments": {"a": deep}}}]
    assert "nested" in refusal({"prompt": "q", "completion": "a", "tool_calls": calls, "label": True})
    while deep:  # let go of it level by level
        deep = deep.pop()


def test_rows_share_nothing_with_the_record():
    record = {
        "messages": [user("q"), assistant("a", tool_calls=[{"function": {"name": "f"}}])],
        "tools": [copy.deepcopy(TOOL)],
        "chat_template_kwargs": {"x": [1]},
        "label": True,
    }
    before = copy.deepcopy(record)
    row = one(record)
    assert record == before
    record["messages"][1]["tool_calls"][0]["function"]["name"] = "g"
    record["tools"][0]["function"]["name"] = "g"
    record["chat_template_kwargs"]["x"].append(2)
    assert row == one(before)


def test_echoed_values_are_short_and_harmless():
    message = refusal({"prompt": "q", "completion": "a", "label": "\u202e\x1b[31m\n" + "x" * 10_000})
    assert len(message) < 220
    assert "\\u202e\\u001b" in message
    assert quoted("caf\u00e9") == '"caf\u00e9"'
    assert quoted(object()) == "a value of type object"


KEYS = [
    "prompt",
    "completion",
    "label",
    "kto_tag",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
]
KEYS += [
    "system",
    "history",
    "chosen",
    "rejected",
    "rating",
    "tools",
    "chat_template_kwargs",
    "images",
    "other",
]
texts = st.sampled_from(["", " ", "a", "b", HH + " a", HH + " b", "true", "4", "[]", "{}"])
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "x"]) | st.integers()
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": roles,
        "from": roles,
        "content": texts | json_values,
        "value": texts,
        "tool_calls": json_values | st.just([{"id": 1}]),
    },
)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from("ab")), max_size=3).map(
    lambda pairs: [{"role": role, "content": text} for role, text in pairs]
)
columns = json_values | texts | turns | st.lists(messages, max_size=3) | messages
records = st.dictionaries(st.sampled_from(KEYS), columns, max_size=7)
options = st.builds(
    fields_of,
    prompt=st.sampled_from([None, "input"]),
    completion=st.sampled_from([None, "output"]),
    label=st.sampled_from([None, "other"]),
    rating_threshold=st.sampled_from([None, 3.0]),
    chat_template=st.booleans(),
)


def rows_or_refusal(record, fields):
    try:
        return parse_record(record, WHERE, fields), None
    except FeedbackError as error:
        return [], str(error)
    except LeftOut:
        return [], None


@given(records, options)
def test_parse_record_returns_good_rows_or_raises_feedback_error(record, fields):
    before = json.dumps(record)
    rows, message = rows_or_refusal(record, fields)
    assert json.dumps(record) == before
    assert rows == rows_or_refusal(json.loads(before), fields)[0]
    assert message is None or (message.startswith(WHERE + ": ") and message.isprintable())
    for row in rows:
        assert type(row.prompt) is type(row.completion)
        assert row.label is True or row.label is False
        said = row.completion if isinstance(row.completion, str) else row.completion[-1]["content"]
        assert said.strip() or row.completion[-1]["tool_calls"]
        for message in () if isinstance(row.prompt, str) else row.prompt + row.completion:
            assert isinstance(message["role"], str)
            assert isinstance(message["content"], str)
    assert [row.label for row in rows if row.pair_id] in ([], [True, False])


@given(*[st.text().filter(lambda text: text.strip())] * 2, st.booleans())
def test_any_text_comes_through_unchanged(prompt, completion, label):
    row = one({"prompt": prompt, "completion": completion, "label": label})
    assert (row.prompt, row.completion, row.label) == (prompt, completion, label)


@pytest.mark.parametrize(
    ("record", "names", "option"),
    [
        ({"prompt": "q", "completion": "a", "response": "b"}, ["completion", "response"], "--completion-field"),
        ({"prompt": "q", "question": "p", "completion": "a"}, ["prompt", "question"], "--prompt-field"),
        ({"instruction": "q", "output": "a", "response": "b"}, ["response", "output"], "--completion-field"),
        (
            {"messages": [user("q"), assistant("a")], "conversations": [user("q"), assistant("b")]},
            ["messages", "conversations"],
            "remove",
        ),
    ],
)
def test_two_answers_or_prompts_that_differ_are_refused(record, names, option):
    message = refusal({**record, "label": 1})
    assert [word for word in (*map(repr, names), option) if word not in message] == []
    same = dict.fromkeys(names, record[names[0]])
    assert one({**record, **same, "label": 1}).label is True


@pytest.mark.parametrize(
    "beside", [{"winner": "rejected"}, {"winner": " Rejected"}, {"margin": -2}, {"margin": "-0.5"}]
)
def test_a_pair_whose_rejected_side_is_better_is_refused(beside):
    (name,) = beside
    assert f"'{name}'" in refusal({"prompt": "q", "chosen": "a", "rejected": "b", **beside})


@pytest.mark.parametrize("beside", [{"winner": "chosen"}, {"winner": "model_a"}, {"margin": 2}, {"margin": 0}])
def test_a_pair_whose_chosen_side_is_better_is_kept(beside):
    assert pair({"prompt": "q", "chosen": "a", "rejected": "b", **beside}) == ("q", "a", "b")


def test_a_conversation_in_place_of_the_answer_is_a_matter_of_columns():
    message = refusal({"prompt": [user("q"), assistant("a")], "completion": [user("q"), assistant("a")], "label": 1})
    assert "--completion-field" in message


# Text that was meant to be messages


@pytest.mark.parametrize(
    "text",
    [
        "({'role': 'user', 'content': 'a'},)",
        "[HumanMessage(content='a'), AIMessage(content='b')]",
        "ChatCompletionMessage(content='a', role='assistant')",
        "OrderedDict([('role', 'user'), ('content', 'a')])",
        "OrderedDict({'role': 'user'})",
        """b'[{"role": "user", "content": "a"}]'""",
        "content='a' additional_kwargs={} response_metadata={}",
        "content='a' response_metadata={}",
        '[{"role": "user", "content": "cut o',
        '[{"from": "human", "value": "cut o',
        '{"messages": [{"role": "user", "content": "cut o',
        '[{"role": "user", "msg": "a"}]',
        json.dumps(json.dumps([user("a")])),
        "\ufeff" + json.dumps([user("a")]),
        "'" + json.dumps([user("a")]),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_text_that_was_meant_to_be_messages_is_refused(column, text):
    record = {"prompt": "p", "completion": "c", "label": True, column: text}
    assert f"'{column}'" in refusal(record)


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "engineer", "name": "Ada"}',
        '[{"from": "Paris", "to": "Lon',
        '"quoted" text',
        "content='a'",
        "Message(body) is a call",
        '{"role": "user", "permissions": []}',
        "b'bytes'",
    ],
)
def test_other_text_stays_text(text):
    assert one({"prompt": "p", "completion": text, "label": True}).completion == text


def test_messages_in_a_text_may_have_space_around_them():
    messages = [user("a"), assistant("b"), user("c")]
    assert one({"prompt": f"\n  {json.dumps(messages)}\n", "completion": "c", "label": True}).prompt == tuple(messages)


@pytest.mark.parametrize("key", ["images", "image_url", "attachments", "experimental_attachments", "audio"])
def test_a_message_with_media_beside_its_text_is_left_out(key):
    messages = [{**user("what is this"), key: ["iVBOR"]}, assistant("a cat")]
    assert left_out({"messages": messages, "label": True}) == MEDIA
    messages[0][key] = []
    assert one({"messages": messages, "label": True}).completion[0]["content"] == "a cat"


@pytest.mark.parametrize("encode", [list, json.dumps])
def test_parts_of_text_are_an_answer(encode):
    parts = encode([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert one({"prompt": "p", "completion": parts, "label": True}).completion == "ab"
    assert one({"prompt": [user("p")], "completion": parts, "label": True}).completion == (assistant("ab"),)


# Two answers or prompts in one record


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"response": "x"}, "--completion-field"),
        ({"answer": "x"}, "--completion-field"),
        ({"question": "x"}, "--prompt-field"),
        ({"chosen": "x"}, "--completion-field"),
        ({"instruction": "p", "output": "x"}, "--completion-field"),
    ],
)
def test_a_second_answer_or_prompt_is_refused(more, option):
    record = {"prompt": "p", "completion": "c", "label": True}
    message = refusal({**record, **more})
    assert "differ" in message
    assert option in message
    other = list(more)[-1]
    same = record["completion" if option == "--completion-field" else "prompt"]
    assert one({**record, **more, other: f"{same} "}).completion == "c"
    assert one({**record, **more}, completion="completion", prompt="prompt").completion == "c"


def test_two_conversations_that_differ_are_refused():
    talk = [user("p"), assistant("c")]
    assert "differ" in refusal({"messages": talk, "conversations": [user("p"), assistant("x")], "label": True})
    assert one({"messages": talk, "conversations": talk, "label": True}).completion == (assistant("c"),)


CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}


@pytest.mark.parametrize("calls", [[CALL], CALL, json.dumps([CALL])])
@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"prompt": "w2?", "completion": "calling"}, "calling"),
        ({"question": "w2?", "answer": None}, ""),
        ({"prompt": "w2?", "response": ""}, ""),
        ({"instruction": "w2?", "output": "calling"}, "calling"),
    ],
)
def test_tool_calls_beside_an_answer_belong_to_it(record, content, calls):
    row = one({**record, "tool_calls": calls, "label": True})
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert (row.prompt, row.completion) == (({"role": "user", "content": "w2?"},), (answer,))
    assert row.form.endswith(" + tool_calls")


def test_a_function_call_beside_a_named_answer_belongs_to_it():
    record = {"prompt": "w2?", "said": None, "function_call": {"name": "find", "arguments": "{}"}, "label": True}
    row = one(record, completion="said")
    function = {"name": "find", "arguments": {}}
    assert row.completion == (
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
    )


@pytest.mark.parametrize("calls", [[], "[]", 3, ["find"], None])
def test_what_is_no_tool_call_is_no_part_of_the_answer(calls):
    row = one({"prompt": "w2?", "completion": "a", "tool_calls": calls, "label": True})
    assert (row.prompt, row.completion, row.form) == ("w2?", "a", "prompt + completion")


def test_tool_calls_beside_an_answer_of_messages_are_refused_unless_it_has_calls():
    answer = {"role": "assistant", "content": "a"}
    record = {"prompt": "w2?", "completion": [answer], "tool_calls": [CALL], "label": True}
    with pytest.raises(FeedbackError, match=r"'tool_calls' is beside the messages of 'completion'"):
        one(record)
    answer["tool_calls"] = [CALL]
    assert one(record).completion == (answer,)
