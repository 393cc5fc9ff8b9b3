"""Messages are read as other programs write them, in every place where a file has messages."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from app_exports import message, openwebui, trace
from test_app_formats import in_short, read, refusal, write

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.left_out import LeftOut
from offline_kto.kto_core.feedback.messages import as_turns
from offline_kto.precompute.feedback.used_columns import matters_beside
from offline_kto.precompute.records.sources import warnings_about

PAIRS = [["system", "Be kind."], ["human", "Hi"]]
ASKED = "system: Be kind. | user: Hi"
THUMB = {"thumb": {"n": 1, "avg": 1.0}}


def run(inputs: Any, outputs: Any = None) -> dict[str, Any]:
    outputs = outputs or {"output": "Hello"}
    return {"id": "r", "run_type": "chain", "inputs": inputs, "outputs": outputs, "feedback_stats": THUMB}


PAIRED: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": [*PAIRS, ["ai", "Hello"]], "label": True}, ASKED),
    "prompt": ({"prompt": PAIRS, "completion": "Hello", "label": True}, ASKED),
    "pair": ({"prompt": PAIRS, "chosen": [["ai", "Hello"]], "rejected": "Bye"}, ASKED),
    "history": (
        {"prompt": "Hi", "history": [["human", "Tea?"], ["ai", "Mud"]], "completion": "Hello", "label": True},
        "",
    ),
    "judged": ({"messages": [*PAIRS, ["ai", "Hello"]], "labels": [True]}, ASKED),
    "langsmith": (run({"messages": PAIRS}), ASKED),
    "langsmith, a batch": (run({"messages": [PAIRS]}), ASKED),
    "langsmith, an answer": (run({"messages": PAIRS}, {"messages": [*PAIRS, ["ai", "Hello"]]}), ASKED),
    "langsmith, a history": (run({"question": "Hi", "chat_history": [["human", "Tea?"], ["ai", "Mud"]]}), ""),
    "langsmith, a history of questions": (run({"question": "Hi", "chat_history": [["Tea?", "Mud"]]}), ""),
    "langfuse": (trace("1", PAIRS, "Hello", thumb=[1]), ASKED),
    "openrlhf": ({"instruction": PAIRS, "response": "Hello", "score": 1}, ASKED),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_pairs_of_role_and_text_are_messages(tmp_path: Path, name: str, form: str) -> None:
    record, asked = PAIRED[name]
    rows, _, _, _ = read(write(tmp_path / f"f.{form}", [record]))
    prompt, completion, label = rows[0]
    assert prompt == (asked or "user: Tea? | assistant: Mud | user: Hi")
    assert (completion, label) == ("assistant: Hello", True)


def test_pairs_of_role_and_parts_are_messages() -> None:
    turns = as_turns([("human", [{"type": "text", "text": "Hi"}]), ("ai", "Hello")], "f:1", "messages")
    assert in_short(turns) == "user: Hi | assistant: Hello"


@pytest.mark.parametrize("value", [["human", "Hi"], [["wizard", "Hi"]], [["human", "Hi", "Ho"]], [["human", None]]])
def test_other_pairs_are_no_messages(value: Any) -> None:
    with pytest.raises(FeedbackError, match="must look like"):
        as_turns(value, "f:1", "messages")


@pytest.mark.parametrize("text", ["[('human', 'Hi'), ('ai', 'Hello')]", "[['system', 'x'], ['human', 'Hi']]"])
def test_pairs_as_python_prints_them_are_refused(text: str) -> None:
    with pytest.raises(FeedbackError, match="as Python prints them"):
        as_turns(text, "f:1", "prompt")


def test_a_table_of_one_column_with_printed_messages_says_how_to_write_it(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "feedback": "up"}]
    path = tmp_path / "f.csv"
    for printed in (str(said), str([("human", "Hi"), ("ai", "Hello")])):
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([["messages"], [printed]])
        assert "json.dumps" in refusal(path)


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown messages": (run({"messages": [["wizard", "x"]]}), "message 1 of 'inputs.messages'"),
    "no question": (run({"args": {"a": 1, "b": 2}, "foo": ""}), '"inputs.args"'),
    "a history of text": (run({"question": "x", "history": "Human: x"}), "'history' must be a list of messages or of"),
    "an answer without a role": (run({"question": "x"}, {"answer": [{"text": 1}]}), "'outputs.answer'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_keys_and_not_the_expression(tmp_path: Path, name: str) -> None:
    record, words = REFUSED[name]
    message = refusal(write(tmp_path / "f.jsonl", [record]))
    assert words in message
    assert "asked(" not in message
    assert "answered(" not in message


def test_the_key_of_joined_records_is_not_shown_as_an_expression(tmp_path: Path) -> None:
    record = {"annotation_id": 1, "annotator": 1, "id": 1, "a": 1, "b": 2, "rating": 1}
    message = refusal(write(tmp_path / "f.jsonl", [record]))
    assert "labelstudio_min" in message
    assert "without(" not in message


SYSTEM = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]


@pytest.mark.parametrize(
    "record",
    [
        {"system": SYSTEM, "prompt": "Hi", "completion": "Hello", "label": True},
        {
            "system": SYSTEM,
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "label": 1,
        },
        {"system": SYSTEM, "instruction": "Hi", "output": "Hello", "label": True},
        trace("1", {"system": SYSTEM, "messages": [{"role": "user", "content": "Hi"}]}, "Hello", thumb=[1]),
    ],
    ids=["prompt", "messages", "alpaca", "langfuse"],
)
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_system_text_of_parts_is_joined(tmp_path: Path, record: dict[str, Any], form: str) -> None:
    rows, _, _, _ = read(write(tmp_path / f"f.{form}", [record]))
    assert rows == [(ASKED, "assistant: Hello", True)]


def item(text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": "i",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text}],
    }


CALL = {"type": "function_call", "id": "i", "call_id": "c", "name": "weather", "arguments": '{"city": "Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "rain"}]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "output_text", "text": "hm"}]}
SHOWN = '<details type="tool_calls" done="true">\n</details>\nIt rains.'


def open_webui(content: str | None, *output: dict[str, Any]) -> dict[str, Any]:
    return openwebui(
        1,
        "a",
        message("q", None, "user", "Weather?"),
        message("a", "q", "assistant", content, output=list(output), done=True),
    )


@pytest.mark.parametrize(
    ("content", "output", "prompt", "completion"),
    [
        ("", [THOUGHT, item("It rains.")], "", "It rains."),
        (None, [item("It rains."), item("Bye.")], "", "It rains.\nBye."),
        ("It rains.", [item("It snows.")], "", "It rains."),  # edited by the user
        (
            SHOWN,
            [THOUGHT, item("I look."), CALL, RESULT, item("It rains.")],
            " | assistant: I look. CALL weather | tool: rain",
            "It rains.",
        ),
        ("", [CALL, RESULT, item("It rains.")], " | assistant:  CALL weather | tool: rain", "It rains."),
    ],
)
def test_output_items_of_open_webui(
    tmp_path: Path, content: str | None, output: list[Any], prompt: str, completion: str
) -> None:
    rows, left_out, _, _ = read(write(tmp_path / "f.json", [open_webui(content, *output)]))
    assert rows == [(f"user: Weather?{prompt}", f"assistant: {completion}", True)]
    assert left_out == {}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (open_webui(SHOWN), "tool calls written as HTML"),
        (open_webui("", {"type": "open_webui:code_interpreter", "code": "1"}, item("x")), "steps of Open WebUI's own"),
        (open_webui(""), "empty answer"),
    ],
)
def test_what_open_webui_did_beside_the_model_is_left_out(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    rows, left_out, _, _ = read(write(tmp_path / "f.json", [open_webui("Yes."), record]))
    assert len(rows) == 1
    assert left_out == {reason: 1}


def ui(*parts: dict[str, Any]) -> dict[str, Any]:
    said = [{"role": "user", "content": "", "parts": [{"type": "text", "text": "Hi"}, *parts]}]
    answer = [{"type": "text", "text": "Hello"}, {"type": "data-chart", "id": "d", "data": {"a": 1}}]
    return {"messages": [*said, {"role": "assistant", "content": "", "parts": answer}], "label": True}


def test_data_of_an_application_is_no_text_and_named_if_the_user_sent_it(tmp_path: Path) -> None:
    for records, named in (([ui()], []), ([ui(), ui({"type": "data-doc", "data": "x"})], ["messages[].data-doc"])):
        rows, _, _, feedback = read(write(tmp_path / "f.jsonl", records))
        assert rows == [("user: Hi", "assistant: Hello", True)] * len(records)
        assert [name for name in feedback.unused_beside() if matters_beside(name)] == named


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_langfuse_with_the_prompt_of_its_prompt_management(tmp_path: Path, form: str) -> None:
    record = {**trace("1", "Hi", "Hello", thumb=[1]), "promptName": "qa", "promptVersion": 3, "prompt": "qa"}
    rows, _, name, _ = read(write(tmp_path / f"f.{form}", [record]))
    assert rows == [("Hi", "Hello", True)] or rows == [("user: Hi", "assistant: Hello", True)]
    assert name == "Langfuse export"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"Prompt": "q", "Completion": "a", "Label": "yes"},
            'Rename "Prompt" to "prompt", "Completion" to "completion", "Label" to "label", or pass --prompt-field Prompt '
            "--completion-field Completion --label-field Label.",
        ),
        ({"Messages": "[]", "Label": "yes"}, 'Rename "Messages" to "messages", "Label" to "label".'),
        ({"Instruction": "q", "output": "a", "label": True}, 'Rename "Instruction" to "instruction".'),
    ],
)
def test_columns_in_another_case_are_pointed_out(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    assert words in refusal(write(tmp_path / "f.csv", [record]))


def test_the_split_that_is_read_is_named_in_full(tmp_path: Path) -> None:
    for name in ("train_prefs", "test_prefs"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "label": True}) + "\n")
    assert warnings_about(str(tmp_path)) == [
        f'{tmp_path}: the split "train_prefs" is read; --split chooses another: "test_prefs".'
    ]


USED = {"city": "Oslo"}
TEXT = {"type": "text", "text": "I look."}
CALLED = "assistant: I look. CALL w | tool: rain | assistant: It rains."


def calling(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts), **more}


LAST = {"role": "assistant", "content": "It rains."}
LANGCHAIN_CALL = {"name": "w", "args": USED, "id": "c", "type": "tool_call"}
# Messages after the user's, as programs write a call of a tool and its result.
CALLING: dict[str, list[dict[str, Any]]] = {
    "ai sdk, model messages": [
        calling(TEXT, {"type": "tool-call", "toolCallId": "c", "toolName": "w", "input": USED}),
        {
            "role": "tool",
            "content": [{"type": "tool-result", "toolCallId": "c", "output": {"type": "text", "value": "rain"}}],
        },
        LAST,
    ],
    "ai sdk 4, core messages": [
        calling(TEXT, {"type": "tool-call", "toolCallId": "c", "toolName": "w", "args": USED}),
        {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c", "result": "rain"}]},
        LAST,
    ],
    "langchain, anthropic": [
        {
            "type": "ai",
            "content": [TEXT, {"type": "tool_use", "id": "c", "name": "w", "input": {}, "partial_json": "{}"}],
            "tool_calls": [LANGCHAIN_CALL],
        },
        {"type": "tool", "content": "rain", "tool_call_id": "c"},
        {"type": "ai", "content": "It rains."},
    ],
    "langchain, content blocks": [
        {"type": "ai", "content": [TEXT, LANGCHAIN_CALL]},
        {"type": "tool", "content": "rain", "tool_call_id": "c"},
        {"type": "ai", "content": "It rains."},
    ],
    "bedrock": [
        calling({"text": "I look."}, {"toolUse": {"toolUseId": "c", "name": "w", "input": USED}}),
        {"role": "user", "content": [{"toolResult": {"toolUseId": "c", "content": [{"text": "rain"}]}}]},
        LAST,
    ],
    "responses": [
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c", "name": "w", "arguments": json.dumps(USED)},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
    ],
}


@pytest.mark.parametrize("name", CALLING)
def test_calls_of_tools_and_their_results(name: str) -> None:
    turns = as_turns([{"role": "user", "content": "Weather?"}, *CALLING[name]], "f:1", "messages")
    assert in_short(turns) == f"user: Weather? | {CALLED}"
    calls = [call for one in turns for call in one.get("tool_calls", ())]
    assert calls == [{"id": "c", "type": "function", "function": {"name": "w", "arguments": USED}}]
    assert [one.get("tool_call_id") for one in turns if one["role"] == "tool"] == ["c"]


def test_calls_and_results_of_gemini_have_no_ids() -> None:
    asked = {"role": "user", "parts": [{"text": "Weather?"}]}
    call = {"role": "model", "parts": [{"functionCall": {"name": "w", "args": USED}}]}
    result = {"role": "user", "parts": [{"functionResponse": {"name": "w", "response": {"sky": "rain"}}}]}
    turns = as_turns([asked, call, result, {"role": "model", "parts": [{"text": "It rains."}]}], "f:1", "contents")
    assert in_short(turns) == 'user: Weather? | assistant:  CALL w | tool: {"sky": "rain"} | assistant: It rains.'


def test_parallel_calls_of_an_output_are_one_message() -> None:
    calls = [{**CALL, "call_id": name, "name": name} for name in "ab"]
    results = [{**RESULT, "call_id": name, "output": name} for name in "ab"]
    turns = as_turns([item("I look."), *calls, *results, item("It rains.")], "f:1", "output")
    assert in_short(turns) == "assistant: I look. CALL a CALL b | tool: a | tool: b | assistant: It rains."


def test_a_result_without_its_call_is_kept() -> None:
    turns = as_turns([{"role": "user", "content": "Hi"}, RESULT, item("It rains.")], "f:1", "messages")
    assert in_short(turns) == "user: Hi | tool: rain | assistant: It rains."


@pytest.mark.parametrize(
    "message",
    [
        {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "Yes."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "Yes."},
            ],
        },
        {"role": "assistant", "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Yes."}]},
        {"role": "assistant", "content": [{"reasoningContent": {"reasoningText": {"text": "hm"}}}, {"text": "Yes."}]},
        {"type": "ai", "content": "Yes.", "additional_kwargs": {"reasoning_content": "hm"}},
    ],
    ids=["gemini", "mistral", "langchain", "bedrock", "deepseek"],
)
def test_reasoning_is_no_part_of_the_text(message: dict[str, Any]) -> None:
    assert as_turns([message], "f:1", "m") == ({"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},)


@pytest.mark.parametrize("key", ["inlineData", "inline_data", "fileData", "file_data", "image", "document"])
def test_media_of_gemini_and_bedrock_are_left_out(key: str) -> None:
    with pytest.raises(LeftOut, match="media"):
        as_turns(
            [{"role": "user", "content": [{key: {"mimeType": "image/png", "data": "x"}}, {"text": "What?"}]}],
            "f:1",
            "m",
        )


def test_a_denied_call_of_the_ai_sdk_has_a_result() -> None:
    call = {
        "type": "tool-w",
        "toolCallId": "c",
        "state": "output-denied",
        "input": USED,
        "approval": {"id": "a", "approved": False},
    }
    turns = as_turns([{"role": "assistant", "parts": [call, {"type": "text", "text": "Sorry."}]}], "f:1", "m")
    assert in_short(turns) == "assistant:  CALL w | tool: Tool execution denied. | assistant: Sorry."


def test_an_item_that_is_not_read_is_named_by_its_type() -> None:
    with pytest.raises(FeedbackError, match='its type "web_search_call", which is not read'):
        as_turns([{"role": "user", "content": "Hi"}, {"type": "web_search_call", "status": "completed"}], "f:1", "m")


GEMINI = {
    "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
    "systemInstruction": {"parts": [{"text": "Be kind."}]},
}
CANDIDATES = {"candidates": [{"content": {"role": "model", "parts": [{"text": "Hello"}]}, "finishReason": "STOP"}]}
AI_CALL = {"toolCallId": "c", "toolName": "w", "input": USED}


@pytest.mark.parametrize(
    ("asked", "answered", "row"),
    [
        (GEMINI, CANDIDATES, (ASKED, "assistant: Hello", True)),
        ("Hi", {"text": "Hello", "toolCalls": [AI_CALL]}, ("user: Hi", "assistant: Hello CALL w", True)),
        (
            "Hi",
            {"text": "", "toolCalls": [AI_CALL], "finishReason": "tool-calls"},
            ("user: Hi", "assistant:  CALL w", True),
        ),
        ("Hi", {"answer": "Hello", "candidates": ["a", "b"]}, ("user: Hi", "assistant: Hello", True)),
        ({"question": "Hi", "contents": ["a"]}, "Hello", ("user: Hi", "assistant: Hello", True)),
    ],
    ids=["gemini", "text and calls", "calls", "candidates of another kind", "contents of another kind"],
)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_calls_logged_in_the_words_of_an_api(tmp_path: Path, asked: Any, answered: Any, row: Any, form: str) -> None:
    rows, _, _, feedback = read(write(tmp_path / f"f.{form}", [trace("1", asked, answered, thumb=[1])]))
    assert rows == [row]
    if "toolCalls" in answered:
        assert "output.toolCalls" not in feedback.unused_beside()


def chat_message(name: str, role: str, parts: list[Any], second: int, vote: bool | None = None) -> dict[str, Any]:
    at = f"2026-01-01T00:00:0{second}Z"
    return {
        "id": name,
        "chatId": "c",
        "role": role,
        "parts": parts,
        "attachments": [],
        "createdAt": at,
        "isUpvoted": vote,
    }


@pytest.mark.parametrize("form", ["json", "csv"])
def test_an_answer_that_ends_with_a_result_ends_with_its_call(tmp_path: Path, form: str) -> None:
    call = {
        "type": "tool-createDocument",
        "toolCallId": "c",
        "state": "output-available",
        "input": USED,
        "output": {"id": 1},
    }
    records = [
        chat_message("q", "user", [{"type": "text", "text": "Write"}], 0),
        chat_message("a", "assistant", [call], 1, True),
        chat_message("r", "user", [{"type": "text", "text": "More"}], 2),
        chat_message("b", "assistant", [{"type": "text", "text": "Done."}], 3, False),
    ]
    rows, _, _, _ = read(write(tmp_path / f"f.{form}", records))
    said = "assistant:  CALL createDocument"
    assert rows == [
        ("user: Write", said, True),
        (f'user: Write | {said} | tool: {{"id": 1}} | user: More', "assistant: Done.", False),
    ]


def test_errors_about_joined_messages_show_no_expression(tmp_path: Path) -> None:
    records = [
        chat_message("q", "user", [{"type": "file", "url": "u", "mediaType": "image/png"}], 0),
        chat_message("a", "assistant", [{"type": "text", "text": "A cat."}], 1, True),
    ]
    _, left_out, _, feedback = read(write(tmp_path / "f.json", [*records, *two_turns()]), left_out=tmp_path / "out")
    assert left_out == {"images, audio or other media": 1}
    assert "sort_by" not in str(feedback.found.left_out.rows)


def two_turns() -> list[dict[str, Any]]:
    said = [("q", "user", "Hi", None), ("a", "assistant", "Hello", True)]
    made = [chat_message(name, role, [{"type": "text", "text": text}], 0, vote) for name, role, text, vote in said]
    return [{**one, "chatId": "d", "createdAt": f"2026-01-01T00:00:0{number}Z"} for number, one in enumerate(made)]


def test_tools_that_dify_called_are_warned_of(tmp_path: Path) -> None:
    def turn(name: str, before: str | None, **more: Any) -> dict[str, Any]:
        beside = {"conversation_id": "c", "parent_message_id": before, "created_at": 1, "feedback": {"rating": "like"}}
        return {"id": name, "query": "Hi", "answer": name, "message_files": [], **beside, **more}

    for thoughts, warned in (([], 0), ([{"thought": "x", "tool": ""}], 0), ([{"tool": "w", "observation": "rain"}], 1)):
        path = write(tmp_path / "f.json", [turn("a", None), turn("b", "a", agent_thoughts=thoughts)])
        notes = read(path)[3].notes()
        assert sum("agent_thoughts" in one for one in notes) == warned


def test_tools_of_chat_ui_are_not_in_its_messages(tmp_path: Path) -> None:
    def said(name: str, who: str, before: list[str], **more: Any) -> dict[str, Any]:
        return {"id": name, "from": who, "content": name, "ancestors": before, "children": [], **more}

    tool = [{"type": "status"}, {"type": "tool", "subtype": "call"}]
    messages = [
        said("q", "user", []),
        said("a", "assistant", ["q"], score=1, updates=tool[:1]),
        said("b", "assistant", ["q"], score=-1, updates=tool),
    ]
    rows, left_out, _, _ = read(write(tmp_path / "f.json", [{"_id": "c", "messages": messages}]))
    assert rows == [("user: q", "assistant: a", True)]
    assert left_out == {"tool calls that are not in the messages": 1}


def test_nested_messages_of_openinference(tmp_path: Path) -> None:
    call = {"tool_call": {"id": "c", "function": {"name": "w", "arguments": json.dumps(USED)}}}
    record = {
        "context.span_id": "s",
        "annotation_name": "thumbs",
        "result.label": "good",
        "attributes.llm.input_messages": [
            {"message": {"role": "user", "contents": [{"message_content": {"type": "text", "text": "Weather?"}}]}}
        ],
        "attributes.llm.output_messages": [
            {"message": {"role": "assistant", "content": "I look.", "tool_calls": [call]}}
        ],
    }
    for form in ("jsonl", "csv", "parquet"):
        rows, _, _, _ = read(write(tmp_path / f"f.{form}", [record]))
        assert rows == [("user: Weather?", "assistant: I look. CALL w", True)]


def test_a_logged_answer_that_is_a_list_of_calls(tmp_path: Path) -> None:
    answer = [{"id": "c", "type": "function", "function": {"name": "w", "arguments": json.dumps(USED)}}]
    rows, _, _, _ = read(write(tmp_path / "f.jsonl", [trace("1", "Hi", answer, thumb=[1])]))
    assert rows == [("user: Hi", "assistant:  CALL w", True)]


def test_inputs_below_one_name_of_mlflow(tmp_path: Path) -> None:
    asked = json.dumps({"request": {"input": [{"role": "user", "content": "Hi"}]}})
    answered = json.dumps({"output": [{**item("Hello"), "id": "m"}]})
    attributes = {"mlflow.spanInputs": asked, "mlflow.spanOutputs": answered}
    assessment = {"assessment_name": "thumb", "feedback": {"value": True}}
    record = {
        "info": {"assessments": [assessment]},
        "data": {"spans": [{"parent_span_id": None, "attributes": attributes}]},
    }
    rows, _, _, _ = read(write(tmp_path / "f.jsonl", [record]))
    assert rows == [("user: Hi", "assistant: Hello", True)]


@pytest.mark.parametrize(
    "output",
    [
        [{**CALL, "call_id": {}}, item("x")],
        [{**CALL, "call_id": ["c"]}, item("x")],
        [CALL, {**item("x"), "content": 1}],
    ],
)
def test_damaged_outputs_are_refused(output: list[Any]) -> None:
    with pytest.raises(FeedbackError, match="'m'"):
        as_turns([{"role": "user", "content": "Hi"}, *output], "f:1", "m")


def test_ids_of_dify_that_are_lists_are_refused(tmp_path: Path) -> None:
    record = {
        "id": [],
        "conversation_id": "c",
        "parent_message_id": None,
        "query": "q",
        "answer": "a",
        "feedback": None,
    }
    assert "ids are text" in refusal(write(tmp_path / "f.jsonl", [record, record]))


def test_a_correction_of_langfuse_is_no_score(tmp_path: Path) -> None:
    scores = [{"name": "thumb", "value": 1}, {"name": "output", "value": 0, "dataType": "CORRECTION"}]
    record = {**trace("1", "Hi", "Hello"), "scores": scores}
    rows, _, _, _ = read(write(tmp_path / "f.jsonl", [record]))
    assert rows == [("user: Hi", "assistant: Hello", True)]
