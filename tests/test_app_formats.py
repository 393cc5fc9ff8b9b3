"""Exports of applications become the rows that app_exports.py says, in any container."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app_exports import CASES as APP_CASES
from app_exports import (
    DIFY,
    DIFY_JSON,
    GRADIO_CHAT,
    HELLO,
    LANGFUSE,
    LANGFUSE_TWO,
    NATIVE,
    OPENAI_PREFERENCE,
    PHOENIX,
    STORED,
    STREAMLIT,
    TOOLS,
    UNRATED,
    ZERO,
    Case,
    libre,
    message,
    openwebui,
    row,
    span,
    trace,
)
from app_exports import REFUSED as APP_REFUSED
from join_exports import JOIN_CASES, ai_chat, dify, flowise
from tool_exports import ASKED_HI, OBSERVATION, SAID_HELLO, TOOL_CASES, TOOL_REFUSED, blob_trace

from offline_kto.kto_core.errors import KTOError
from offline_kto.kto_core.feedback.presets import presets
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.records.sources import read_records

CASES = {**APP_CASES, **TOOL_CASES, **JOIN_CASES}
REFUSED = {**APP_REFUSED, **TOOL_REFUSED}


def in_short(turns: Any) -> str:
    if isinstance(turns, str):
        return turns
    return " | ".join(
        f"{one['role']}: {one['content']}"
        + "".join(f" CALL {c['function']['name']}" for c in one.get("tool_calls", ()))
        for one in turns
    )


def read(path: Path, **options: Any) -> tuple[list[tuple[str, str, bool]], dict[str, int], str, Feedback]:
    config = PrecomputeConfig(model="m", data=str(path), one_class=True, **{"votes": "unanimous", **options})
    feedback = Feedback(config, has_template=True)
    rows = []
    for one in feedback.rows():
        feedback.keep(one)
        rows.append((in_short(one.prompt), in_short(one.completion), one.label))
    feedback.finish()
    return rows, dict(feedback.found.left_out.counts), feedback.mapping.name if feedback.mapping else "", feedback


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(KTOError) as caught:
        read(path, **options)
    return str(caught.value)


def write(path: Path, records: Any) -> Path:
    """Write records as their file's name says; in CSV, lists and objects are JSON text."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    if kind == "csv":
        keys = list(dict.fromkeys(key for one in records for key in one))
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(keys)
            writer.writerows([[_cell(one.get(key)) for key in keys] for one in records])
        return path
    text = json.dumps(records, indent=1) if kind == "json" else "".join(json.dumps(one) + "\n" for one in records)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def _cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "strings.jsonl", "strings.parquet"])
def test_a_file_becomes_its_rows_in_any_container(tmp_path: Path, name: str, form: str) -> None:
    case = CASES[name]
    records = [case.records] if case.document and form != "json" else case.records
    if form.startswith("strings"):  # lists and objects are JSON text
        keys = dict.fromkeys(key for one in records for key in one)
        records = [{key: None if one.get(key) is None else _cell(one[key]) for key in keys} for one in records]
    path = write(tmp_path / f"file.{form}", records)
    rows, left_out, name_of_format, found = read(path, **case.options)
    assert rows == case.rows
    assert not [note for note in found.notes() if "contradicts" in note]
    assert left_out == case.left_out
    assert name_of_format == presets()[case.preset].name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.document])
@pytest.mark.parametrize("orient", ["columns", "split", "index"])
def test_a_table_of_pandas_is_read_as_its_records(tmp_path: Path, name: str, orient: str) -> None:
    case = CASES[name]
    keys = dict.fromkeys(key for one in case.records for key in one)
    rows = {str(number): {key: one.get(key) for key in keys} for number, one in enumerate(case.records)}
    document: dict[str, Any] = {
        "columns": {key: {number: one[key] for number, one in rows.items()} for key in keys},
        "split": {"columns": [*keys], "index": [*rows], "data": [[*one.values()] for one in rows.values()]},
        "index": rows,
    }[orient]
    (tmp_path / "file.json").write_text(json.dumps(document), encoding="utf-8")
    named = [] if presets()[case.preset].records else [{**case.options, "map": case.preset}]
    for options in (case.options, *named):
        found, left_out, name_of_format, feedback = read(tmp_path / "file.json", **options)
        assert found == case.rows
        assert left_out == case.left_out
        assert name_of_format == presets()[case.preset].name
    assert f"as a table of pandas ({orient})" in feedback.found.notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "ARGILLA_FLAT",
        "ARGILLA_OLD",
        "KTO_MIX",
        "PHOENIX",
        "LANGSMITH_TABLE",
        "DIFY",
        "STREAMLIT",
        "BEDROCK",
        "STORED",
        "EVALS",
        "OPENAI_PREFERENCE",
    ],
)
def test_nested_columns_of_parquet(tmp_path: Path, name: str) -> None:
    rows, left_out, _, _ = read(write(tmp_path / "file.parquet", CASES[name].records), **CASES[name].options)
    assert (rows, left_out) == (CASES[name].rows, CASES[name].left_out)


@pytest.mark.parametrize("name", [*CASES, *REFUSED, *NATIVE])
def test_each_file_is_recognised_as_one_format(tmp_path: Path, name: str) -> None:
    """Also among the formats that are tried later: the order must not matter."""
    if name in CASES:
        records, expected = CASES[name].records, {CASES[name].preset}
    elif name in REFUSED:
        records, expected = REFUSED[name][0], {name}
    else:
        records, expected = [NATIVE[name]], set()
    path = write(tmp_path / "file.json", records)
    found = set()
    for where, record in read_records(str(path)):
        for preset, mapping in presets().items():
            try:
                fits = mapping.recognise is not None and mapping.recognise.find(record, where) is True
            except KTOError:
                fits = False
            found |= {preset} if fits else set()
    assert found == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_a_lead(tmp_path: Path, name: str) -> None:
    records, words = REFUSED[name]
    message = refusal(write(tmp_path / "file.json", records))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", NATIVE)
def test_native_files_need_no_mapping(tmp_path: Path, name: str) -> None:
    feedback = Feedback(
        PrecomputeConfig(model="m", data=str(write(tmp_path / "f.json", [NATIVE[name]]))), has_template=True
    )
    assert feedback.mapping is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "LANGFUSE_TWO",
            {"thumb": ["1 (1 time)", "0 (1 time)"], "judge": ["0.8 (1 time)", "0.9 (1 time)", "0.1 (1 time)"]},
        ),
        ("LABEL_STUDIO_MIN", {"thumb": ['"Thumbs up" (1 time)'], "rating": ["5 (1 time)", "1 (1 time)"]}),
    ],
)
@pytest.mark.parametrize("form", ["json", "csv"])
def test_all_scores_of_the_file_are_listed(
    tmp_path: Path, name: str, expected: dict[str, list[str]], form: str
) -> None:
    path = write(tmp_path / f"f.{form}", CASES[name].records)
    lines = refusal(path).splitlines()
    for score, values in expected.items():
        (line,) = [line for line in lines if line.startswith(f"  {score}: ")]
        assert [value for value in values if value not in line] == []
    assert "--label-field" in lines[-1]


def test_scores_of_different_records_are_listed_too(tmp_path: Path) -> None:
    """One score in each record is no reason to mix them."""
    path = write(tmp_path / "f.jsonl", [trace("1", "a", "b", thumb=[1]), trace("2", "c", "d", judge=[0])])
    message = refusal(path, on_bad_row="skip")
    assert "thumb: 1 (1 time)" in message
    assert "judge: 0 (1 time)" in message


def test_a_score_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "f.jsonl", LANGFUSE.records), label_field="thumbs")
    assert '"thumbs"' in message
    assert "thumb: 1 " in message


def test_up_and_down_count_in_a_recognised_format(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", LANGFUSE_TWO.records)
    rows, left_out, _, found = read(path, label_field="judge", up=">=0.9", down="<0.5")
    assert rows == [row("c?", "d", True), row("e?", "f", False)]
    assert not found.notes()  # the other score may judge something else
    assert left_out == {"between up and down": 1}
    path = write(tmp_path / "g.jsonl", OPENAI_PREFERENCE.records)
    assert "--map" in refusal(path, up="1")  # pairs have no label that it could change


def test_runs_do_not_share_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", LANGFUSE.records)
    read(path)
    other = write(tmp_path / "g.jsonl", [trace("1", "a", "b", judge=[1])])
    assert read(other)[0] == [row("a", "b", True)]


def test_gradio_names_one_column_more_than_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["conversation", "index", "value", "flag", "timestamp"])
        writer.writerows([list(one.values()) for one in GRADIO_CHAT.records])
    rows, left_out, _, _ = read(path)
    assert (rows, left_out) == (GRADIO_CHAT.rows, GRADIO_CHAT.left_out)


@pytest.mark.parametrize("case", [DIFY, DIFY_JSON])
def test_dify_s_cut_answers_are_pointed_out(tmp_path: Path, case: Case) -> None:
    (note,) = read(write(tmp_path / "f.json", case.records))[3].notes()
    assert note.startswith("1 of the answers end in")


def test_steps_of_chainlit_s_tools_are_pointed_out(tmp_path: Path) -> None:
    (thread,) = CASES["CHAINLIT"].records
    talk = [step for step in thread["steps"] if step["type"] != "tool"]
    assert not read(write(tmp_path / "f.json", [{**thread, "steps": talk}]))[3].notes()
    for kind in ("tool", "retrieval", "rerank"):
        step = {"id": "t", "type": kind, "name": "search", "input": "q", "output": "found"}
        one = {**thread, "steps": [talk[0], step, *talk[1:]]}
        (note,) = read(write(tmp_path / "f.json", [one, {**thread, "steps": talk}]))[3].notes()
        assert note.startswith("1 ")
        assert "steps of tools or retrieval" in note
    one["steps"][1] |= {"input": "", "output": ""}
    assert not read(write(tmp_path / "f.json", [one]))[3].notes()


@pytest.mark.parametrize(
    ("first", "second", "late"),
    [
        ("NATIVE", "OPEN_WEBUI", 2100),
        ("NATIVE", "LANGFUSE", 2100),
        ("NATIVE", "LANGFUSE", 0),
        ("LANGFUSE", "NATIVE", 2100),
        ("LANGFUSE", "OPEN_WEBUI", 0),
    ],
)
def test_records_of_several_formats_are_named_as_such(tmp_path: Path, first: str, second: str, late: int) -> None:
    native = [{"prompt": "q", "completion": "a", "label": one} for one in (True, False)]
    parts = [native if name == "NATIVE" else CASES[name].records for name in (first, second)]
    parts[0] = [*parts[0], *[parts[0][-1]] * late]
    message = refusal(write(tmp_path / "f.jsonl", [*parts[0], *parts[1]]))
    assert "the records have several formats" in message
    for name, place in ((first, 1), (second, len(parts[0]) + 1)):
        shown = "prompt and completion" if name == "NATIVE" else presets()[CASES[name].preset].name
        assert re.search(rf"{re.escape(shown)}[^:;]*: [0-9,]+ records \(first: f.jsonl:{place}\)", message)


def test_native_formats_may_be_mixed(tmp_path: Path) -> None:
    records = [
        {"prompt": "q", "completion": "a", "label": "so-so"},
        {"messages": [{"role": "user", "content": "q"}], "label": 1},
    ]
    assert "several formats" not in refusal(write(tmp_path / "f.jsonl", records))


def test_chats_of_chat_ui_from_before_its_trees_are_lists(tmp_path: Path) -> None:
    def said(name: str, who: str, text: str, **more: Any) -> dict[str, Any]:
        return {"id": name, "from": who, "content": text, "createdAt": "2023", **more}

    talk = [said("a", "user", "Hi"), said("b", "assistant", "Hello", score=1)]
    more = [said("c", "user", "Tea?"), said("d", "assistant", "Mud", score=-1)]
    rows, left_out, name, _ = read(write(tmp_path / "f.jsonl", [{"messages": [*talk, *more], "preprompt": "Be kind."}]))
    begun = "system: Be kind. | user: Hi"
    assert rows == [
        (begun, "assistant: Hello", True),
        (f"{begun} | assistant: Hello | user: Tea?", "assistant: Mud", False),
    ]
    assert (left_out, name) == ({}, "chat-ui conversations")
    # Two answers to one message are no list.
    records = [{"messages": [*talk, said("d", "assistant", "Mud", score=-1)]}]
    assert "nothing comes before" in refusal(write(tmp_path / "f.jsonl", records))


def test_a_judged_turn_without_anything_before_it_is_refused(tmp_path: Path) -> None:
    (thread,) = CASES["CHAINLIT"].records
    greeted = {**thread, "steps": [thread["steps"][2], *thread["steps"]]}
    assert "message 1 is judged, but nothing comes before it" in refusal(write(tmp_path / "f.json", [greeted]))


def test_steps_of_chainlit_are_in_the_order_of_their_times(tmp_path: Path) -> None:
    (thread,) = CASES["CHAINLIT"].records
    steps = [{**one, "createdAt": f"2026-01-01T00:00:{n:02}.000Z"} for n, one in enumerate(thread["steps"])]
    path = write(tmp_path / "f.json", [{**thread, "steps": steps[::-1]}])
    assert read(path)[0] == CASES["CHAINLIT"].rows


def test_joined_rows_keep_the_order_of_the_file(tmp_path: Path) -> None:
    records = [
        {"chat": chat, "who": who, "text": f"{who}{chat}{i}", "ok": ok}
        for i, (chat, who, ok) in enumerate([(1, "user", None), (2, "user", None), (1, "bot", "yes"), (2, "bot", "no")])
    ]
    mapping = tmp_path / "m.yaml"
    mapping.write_text("join: chat\nturns: {messages: rows, role: who, label: ok}\n")
    path = write(tmp_path / "f.csv", records)
    rows, left_out, _, feedback = read(path, map=str(mapping))
    assert rows == [row("user10", "bot12", True), row("user21", "bot23", False)]
    assert (left_out, feedback.found.records) == ({}, 4)
    path = write(tmp_path / "g.jsonl", [*records, {"who": "user", "text": "x"}])
    assert "g.jsonl:5" in refusal(path, map=str(mapping))


def test_a_turn_that_is_its_own_ancestor_is_refused(tmp_path: Path) -> None:
    looped = openwebui(1, "a", message("q", "a", "user", "x"), message("a", "q", "assistant", "y"))
    assert "its own ancestor" in refusal(write(tmp_path / "f.json", [looped]))


@pytest.mark.parametrize(
    "question", ["And 3?", {"role": "user", "content": "And 3?"}, [{"role": "user", "content": "And 3?"}]]
)
@pytest.mark.parametrize("asked", [{"role": "user", "content": "And 3?"}, {"type": "human", "content": "And 3? "}])
def test_a_history_that_ends_with_the_question_asks_it_once(tmp_path: Path, question: object, asked: object) -> None:
    records = [trace("4", {"input": question, "chat_history": [*HELLO, asked]}, {"output": "six"}, thumb=[True])]
    path = write(tmp_path / "f.jsonl", records)
    assert read(path)[0] == [("system: Be kind. | user: Hello? | user: And 3?", "assistant: six", True)]


def test_printed_python_is_not_taken_for_an_unrated_row(tmp_path: Path) -> None:
    for name in ("LANGSMITH", "MLFLOW", "ARGILLA_FLAT", "LABEL_STUDIO", "EVALS", "BEDROCK", "OPEN_WEBUI"):
        records = [{key: str(value) for key, value in one.items() if value is not None} for one in CASES[name].records]
        assert "Python prints" in refusal(write(tmp_path / "f.csv", records)), name


def test_an_answer_among_unknown_keys_is_not_guessed(tmp_path: Path) -> None:
    for output in ({"city": "Rome", "people": 3}, {"city": "Rome"}, {"answer": "a", "result": "b"}):
        message = refusal(write(tmp_path / "f.jsonl", [trace("1", "Where?", output, thumb=[1])]))
        assert "it is not clear which of the keys" in message
        assert "--map" in message
    message = refusal(write(tmp_path / "f.jsonl", [trace("1", {"choices": 1, "a": 2}, "b", thumb=[1])]))
    assert "has the question" in message


def test_tools_come_along(tmp_path: Path) -> None:
    records = [trace("1", {"messages": HELLO, "tools": TOOLS}, {"role": "assistant", "content": "Hi"}, thumb=[1])]
    feedback = Feedback(PrecomputeConfig(model="m", data=str(write(tmp_path / "f.jsonl", records))), has_template=True)
    (found,) = feedback.rows()
    assert found.tools == tuple(TOOLS)


def test_a_format_is_recognised_where_the_first_thousand_are_unrated(tmp_path: Path) -> None:
    unrated, rated = STREAMLIT.records[0], STREAMLIT.records[1:]
    rows, left_out, _, _ = read(write(tmp_path / "f.jsonl", [unrated] * 1500 + rated))
    assert (rows, left_out) == (STREAMLIT.rows, {UNRATED: 1500})


def test_flattened_feedback_of_langsmith(tmp_path: Path) -> None:
    records = [
        {
            "id": "1",
            "inputs.question": "A?",
            "outputs.answer": "a",
            "feedback_stats.user.n": 1,
            "feedback_stats.user.avg": 1.0,
        },
        {
            "id": "2",
            "inputs.question": "B?",
            "outputs.answer": "b",
            "feedback_stats.user.n": 1,
            "feedback_stats.user.avg": 0.0,
        },
        {
            "id": "3",
            "inputs.question": "C?",
            "outputs.answer": "c",
            "feedback_stats.user.n": None,
            "feedback_stats.user.avg": None,
        },
    ]
    rows, left_out, _, _ = read(write(tmp_path / "f.csv", records))
    assert (rows, left_out) == ([row("A?", "a", True), row("B?", "b", False)], {UNRATED: 1})


def test_a_tool_call_of_phoenix_survives(tmp_path: Path) -> None:
    call = {
        "tool_call.id": "1",
        "tool_call.function.name": "weather",
        "tool_call.function.arguments": '{"city": "Rome"}',
    }
    answer = [{"message.role": "assistant", "message.tool_calls": [call]}]
    record = {**span([{"message.role": "user", "message.content": "Rain?"}], "raw", "thumbs-up", 1.0)}
    rows, _, _, _ = read(write(tmp_path / "f.parquet", [{**record, "attributes.llm.output_messages": answer}]))
    assert rows == [("user: Rain?", "assistant:  CALL weather", True)]


def test_an_open_webui_message_of_the_user_cannot_be_judged(tmp_path: Path) -> None:
    judged = openwebui(1, "q", message("q", None, "user", "x"), message("a", "q", "assistant", "y"))
    assert "not the assistant's" in refusal(write(tmp_path / "f.json", [judged]))


def test_a_named_path_counts_where_no_score_has_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{**STORED.records[0], "metadata": {"helpful": "yes", "rating": "down"}}])
    assert read(path, label_field="metadata.helpful")[0] == [row("Tea?", "Hello", True)]


def test_what_either_side_may_be_called_is_the_other_side_s(tmp_path: Path) -> None:
    feedback = {"type": "thumbs", "score": "\U0001f44d", "text": None}
    for asked, answered in (("message", "response"), ("text", "answer"), ("question", "text"), ("prompt", "content")):
        path = write(tmp_path / f"{asked}.jsonl", [{asked: "Q?", answered: "A.", "feedback": feedback}])
        assert read(path)[0] == [row("Q?", "A.", True)]


def test_librechat_s_messages_as_mongoexport_writes_csv(tmp_path: Path) -> None:
    records = [
        {**libre("m1", ZERO, True, "Rome?"), "feedback.rating": None},
        {**libre("m2", "m1", False, "The Forum."), "feedback.rating": "thumbsUp"},
    ]
    assert read(write(tmp_path / "f.csv", records))[0] == [row("Rome?", "The Forum.", True)]


def test_a_column_with_a_dot_in_its_name_is_named_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [one for one in PHOENIX.records if one["result.label"] is not None])
    rows = read(path, label_field="result.score")[0]
    assert rows == [one for one in PHOENIX.rows if one[1] != "assistant: only"]


def test_an_export_that_nobody_rated_says_where_the_feedback_would_be(tmp_path: Path) -> None:
    records = [libre("m1", ZERO, True, "Rome?"), libre("m2", "m1", False, "The Forum.")]
    message = refusal(write(tmp_path / "f.jsonl", records))
    assert "unrated: 1" in message
    assert "feedback.rating" in message
    assert "isCreatedByUser" not in message


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("LANGFUSE_TWO", {"judge"}),
        ("LANGSMITH_TABLE", set()),
        ("ARGILLA_FLAT", set()),
        ("ARGILLA_NESTED", set()),
        ("LABEL_STUDIO_MIN", {"rating"}),
        ("LABEL_STUDIO_STARS", {"thumb"}),
        ("GRADIO_FLAGS", set()),
        ("PHOENIX", set()),
        ("ONYX", set()),
        ("DIFY_MESSAGES", set()),
        ("OPIK", set()),
        ("OPIK_COLUMNS", set()),
        ("HELICONE", {"response_id", "response_status", "request_id"}),
        ("ANYTHINGLLM_DB", {"workspaceId", "include"}),
        ("CHAT_UI", {"model", "rootMessageId"}),
    ],
)
@pytest.mark.parametrize("form", ["json", "csv"])
def test_columns_that_a_function_chose_count_as_used(tmp_path: Path, name: str, unused: set[str], form: str) -> None:
    case = CASES[name]
    feedback = read(write(tmp_path / f"f.{form}", case.records), **case.options)[3]
    found = set(feedback.unused_columns()) - _BESIDE_THE_FEEDBACK
    assert found == unused


# Columns of the exports with ids, times, models and costs.
_BESIDE_THE_FEEDBACK = {
    *("id", "timestamp", "name", "sessionId", "metadata", "tags", "latency", "totalCost", "comments", "environment"),
    *("traceId", "type", "modelParameters", "error", "reference.text", "status", "_server_id", "source", "vectors"),
    *("suggestions", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "username", "span_kind"),
    *("context.span_id", "attributes.llm.model_name", "annotator_kind", "start_time"),
}


def test_a_split_that_was_used_is_not_unused(tmp_path: Path) -> None:
    records = [{"prompt": "q", "completion": "a", "label": 1, "split": one} for one in ("train", "test")]
    feedback = read(write(tmp_path / "f.jsonl", records))[3]
    assert feedback.unused_columns() == []
    assert read(write(tmp_path / "f.jsonl", records), split="all")[3].unused_columns() == []


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_keys_beside_those_that_are_read_are_named(tmp_path: Path, form: str) -> None:
    body = {"system": "Be kind.", "messages": HELLO}
    records = [{"input": {"body": body, "tools": TOOLS, "id": 7}, "out": "a", "label": 1}]
    options = {"prompt_field": "input.body.messages", "completion_field": "out"}
    feedback = read(write(tmp_path / f"f.{form}", records), **options)[3]
    assert sorted(feedback.unused_beside()) == ["input.body.system", "input.tools"]
    records = [trace("1", {"question": "q", "context": "c"}, "b", thumb=[1])]
    assert read(write(tmp_path / f"g.{form}", records))[3].unused_beside() == ["input.context"]


def test_a_native_format_uses_its_own_columns_only(tmp_path: Path) -> None:
    records = [{"prompt": "q", "completion": "a", "label": 1, "rating": 5, "messages": [], "output": "y"}]
    feedback = read(write(tmp_path / "f.jsonl", records))[3]
    assert set(feedback.unused_columns()) == {"rating", "messages", "output"}


def test_a_path_of_a_mapping_without_a_value_in_any_record_is_named(tmp_path: Path) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text("prompt: q\ncompletion: a\nlabel: v\nsystem: System\n")
    path = write(tmp_path / "f.jsonl", [{"q": "q", "a": "a", "v": "up", "sys": "S"}])
    notes = read(path, map=str(mapping))[3].notes()
    assert [note for note in notes if 'system: nothing at "System" in any record' in note]
    path = write(tmp_path / "f.jsonl", [{"q": "q", "a": "a", "v": "up", "System": "S"}])
    assert read(path, map=str(mapping))[3].notes() == []


def test_values_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    contradictory = {**DIFY.records[1], "feedback_rating": "\U0001f44e"}
    assert "contradict" in refusal(write(tmp_path / "f.jsonl", [contradictory]))
    judged = span([{"message.role": "user", "message.content": "Hi"}], "Hello", "thumbs-down", 1.0)
    assert "contradict" in refusal(write(tmp_path / "g.jsonl", [judged]))


@pytest.mark.parametrize("value", ["so so", [{"value": "up"}]])
def test_errors_about_labels_name_keys_in_place_of_a_preset_s_expression(tmp_path: Path, value: Any) -> None:
    records = [{**DIFY.records[1], "feedback_rating": value, "feedback_rating_raw": value}]
    message = refusal(write(tmp_path / "f.jsonl", records))
    assert "'feedback_rating, feedback_rating_raw" in message
    assert "agreed(" not in message
    unrated = [{**DIFY.records[1], "feedback_rating": "", "feedback_rating_raw": None}]
    message = refusal(write(tmp_path / "g.jsonl", unrated))
    assert 'the feedback is read from "feedback_rating, feedback_rating_raw"' in message


def test_an_arena_battle_with_two_winners_is_a_tie(tmp_path: Path) -> None:
    battle = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]', "winner_tie": 0}
    records = [{**battle, "winner_model_a": a, "winner_model_b": b} for a, b in ((1, 1), (0, 1))]
    rows, left_out, _, _ = read(write(tmp_path / "f.csv", records))
    assert (rows, left_out) == ([row("q", "b", True), row("q", "a", False)], {"tie": 1})


@pytest.mark.parametrize(
    "reasoning",
    [
        '<details type="reasoning" done="true">\n<details>why</details> so\n</details>\n',
        '<details type="reasoning" done="true">plain</details>\n',
    ],
)
def test_reasoning_of_open_webui_is_stripped_with_what_is_inside(tmp_path: Path, reasoning: str) -> None:
    shown = reasoning + "Green <details>kept</details>."
    records = [openwebui(1, "a", message("q", None, "user", "Tea?"), message("a", "q", "assistant", shown))]
    assert read(write(tmp_path / "f.json", records))[0] == [row("Tea?", "Green <details>kept</details>.", True)]


def test_an_answer_of_open_webui_that_never_ended_is_left_out(tmp_path: Path) -> None:
    thinking = message("a", "q", "assistant", '<details type="reasoning" done="false">\n<details>x</details> hm')
    stopped = message("a", "q", "assistant", "Gre", done=False)
    records = [openwebui(1, "a", message("q", None, "user", "Tea?"), one) for one in (thinking, stopped)]
    done = message("a", "q", "assistant", "Green", done=True)
    records.append(openwebui(1, "a", message("q", None, "user", "Tea?"), done))
    rows, left_out, _, _ = read(write(tmp_path / "f.json", records))
    assert (rows, left_out) == ([row("Tea?", "Green", True)], {"empty answer": 1, "failed call": 1})


def test_mlflow_s_texts_are_json(tmp_path: Path) -> None:
    record = {**CASES["MLFLOW"].records[1], "request": '"Tea?"', "response": '"\\"Green\\", she said"'}
    assert read(write(tmp_path / "f.jsonl", [record]))[0] == [row("Tea?", '"Green", she said', True)]


def test_annotators_of_label_studio_who_disagree_about_a_task_are_left_out(tmp_path: Path) -> None:
    task = {"prompt": "Hi", "response": "Hello", "annotator": 1, "annotation_id": 9}
    marks = [(1, "Thumbs up"), (2, "Thumbs up"), (1, "Thumbs down"), (2, "Thumbs up")]
    records = [{**task, "id": number, "thumb": mark, "annotator": i} for i, (number, mark) in enumerate(marks)]
    for form in ("json", "csv"):
        rows, left_out, _, _ = read(write(tmp_path / f"f.{form}", records), label_field="thumb")
        assert (rows, left_out) == ([row("Hi", "Hello", True)], {"raters disagree": 1})


def test_responses_of_argilla_1(tmp_path: Path) -> None:
    def rated(*values: tuple[str, str]) -> dict[str, Any]:
        responses = [{"values": {"ok": {"value": one}}, "status": status} for one, status in values]
        return {"fields": {"prompt": "Q?", "response": "a"}, "responses": responses}

    records = [rated(("yes", "submitted")), rated(("no", "submitted"), ("yes", "draft")), rated(("no", "discarded"))]
    rows, left_out, _, _ = read(write(tmp_path / "f.jsonl", records))
    assert (rows, left_out) == ([row("Q?", "a", True), row("Q?", "a", False)], {UNRATED: 1})


def test_a_judged_turn_of_another_role_is_not_lost(tmp_path: Path) -> None:
    def log(role: str) -> Path:
        turns = [{"by": "me", "said": "hi"}, {"by": role, "said": "x", "v": "up"}]
        return write(tmp_path / f"{role}.jsonl", [{"log": [*turns, {"by": "bot", "said": "y", "v": "down"}]}])

    mapping = tmp_path / "m.yaml"
    mapping.write_text("turns: {messages: log, role: by, roles: {me: user}, text: said, label: v}\n")
    message = refusal(log("bot-v2"), map=str(mapping))
    assert "bot-v2" in message
    assert "roles" in message
    rows, left_out, _, _ = read(log("user"), map=str(mapping))
    assert (len(rows), left_out) == (1, {"judged turn of another role": 1})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (":::thinking\nhm, tea\n:::\nGreen", "Green"),
        ("Write\n:::thinking\nx\n:::", "Write\n:::thinking\nx\n:::"),  # only at the beginning
    ],
)
def test_reasoning_in_the_text_of_librechat_is_stripped(tmp_path: Path, text: str, answer: str) -> None:
    records = [libre("m1", ZERO, True, "Tea?"), libre("m2", "m1", False, text, feedback={"rating": "thumbsUp"})]
    for form in ("jsonl", "csv"):
        assert read(write(tmp_path / f"f.{form}", records))[0] == [row("Tea?", answer, True)]


def test_an_answer_of_librechat_that_was_stopped_is_left_out(tmp_path: Path) -> None:
    up = {"rating": "thumbsUp"}
    records = [
        libre("m1", ZERO, True, "Tea?", unfinished=False),
        libre("m2", "m1", False, "Gre", feedback=up, unfinished=True),
        libre("m3", "m1", False, "Green", feedback=up, unfinished=False),
    ]
    for form in ("jsonl", "csv"):
        rows, left_out, _, _ = read(write(tmp_path / f"f.{form}", records))
        assert (rows, left_out) == ([row("Tea?", "Green", True)], {"failed call": 1})


def test_thoughts_that_gradio_shows_are_not_an_earlier_answer(tmp_path: Path) -> None:
    thought = {"role": "assistant", "metadata": {"title": "Thinking"}, "content": "hm"}
    chat = [{"role": "user", "metadata": None, "content": "Hi"}, thought, {"role": "assistant", "content": "Hello"}]
    record = {"conversation": json.dumps(chat), "index": "2", "flag": "Like", "username": "", "timestamp": "2026"}
    assert "thoughts or tools as messages" in refusal(write(tmp_path / "log.csv", [record]))


def test_traces_without_scores_say_that_they_are_missing(tmp_path: Path) -> None:
    for name, record in (("traces", blob_trace()), ("observations", OBSERVATION)):
        for form in ("jsonl", "csv"):
            message = refusal(write(tmp_path / f"{name}.{form}", [record]))
            assert "no record has a score" in message
            assert "join the file of the scores" in message
            assert "project_id" not in message


def test_several_scores_of_a_tracing_tool_are_listed(tmp_path: Path) -> None:
    braintrust = {**TOOL_CASES["BRAINTRUST"].records[0], "scores": {"thumbs": 1, "Factuality": 0.6}}
    opik = {**TOOL_CASES["OPIK_COLUMNS"].records[0], "feedback_scores.Factuality": 0.6}
    for number, record in enumerate((braintrust, opik)):
        message = refusal(write(tmp_path / f"{number}.jsonl", [record]))
        assert "Factuality: 0.6 (1 time)" in message
        assert "reason" not in message


def test_an_open_webui_of_2023_has_the_rating_at_the_message(tmp_path: Path) -> None:
    answers = {name: message(name, "q", "assistant", name, rating=rating) for name, rating in (("a", 1), ("b", -1))}
    record = {"title": "t", "chat": {"history": {"messages": {"q": message("q", None, "user", "Tea?"), **answers}}}}
    assert read(write(tmp_path / "f.json", [record]))[0] == [row("Tea?", "a", True), row("Tea?", "b", False)]


def ai_sdk(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]},
            {"id": "2", "role": "assistant", "parts": [{"type": "step-start"}, *parts], **more},
        ],
        "label": True,
    }


HELLO_PART = {"type": "text", "text": "Hello"}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_messages_of_the_ai_sdk(tmp_path: Path, form: str) -> None:
    reasoned = ai_sdk({"type": "reasoning", "text": "hm"}, HELLO_PART, {"type": "source-url", "url": "x"})
    feedback = read(write(tmp_path / f"f.{form}", [reasoned]))[3]
    assert feedback.found.records == 1
    (found,) = Feedback(feedback._config, has_template=True).rows()
    assert [(one["role"], one["content"]) for one in found.prompt if not isinstance(one, str)] == [("user", "Hi")]
    (said,) = (one for one in found.completion if not isinstance(one, str))
    assert (said["content"], said["reasoning_content"]) == ("Hello", "hm")


@pytest.mark.parametrize(
    "part",
    [
        {
            "type": "tool-rain",
            "toolCallId": "t",
            "state": "output-available",
            "input": {"city": "Rome"},
            "output": {"t": 2},
        },
        {"type": "dynamic-tool", "toolName": "rain", "toolCallId": "t", "input": {"city": "Rome"}, "output": {"t": 2}},
        {
            "type": "tool-invocation",
            "toolInvocation": {"toolCallId": "t", "toolName": "rain", "args": {"city": "Rome"}, "result": {"t": 2}},
        },
    ],
)
def test_tools_of_the_ai_sdk_survive(tmp_path: Path, part: dict[str, Any]) -> None:
    repeated = ai_sdk(part, HELLO_PART, content="Hello", toolInvocations=[{"toolName": "rain"}])
    for number, record in enumerate((ai_sdk(part, HELLO_PART), repeated)):
        rows, _, _, _ = read(write(tmp_path / f"{number}.jsonl", [record]))
        assert rows == [('user: Hi | assistant:  CALL rain | tool: {"t": 2}', "assistant: Hello", True)]
    unanswered = {key: item for key, item in part.items() if key != "output"}
    if "toolInvocation" not in part:
        rows, _, _, _ = read(write(tmp_path / "f.jsonl", [ai_sdk(unanswered)]))
        assert rows == [("user: Hi", "assistant:  CALL rain", True)]


def test_files_of_the_ai_sdk_are_media(tmp_path: Path) -> None:
    image = {"type": "file", "mediaType": "image/png", "url": "x"}
    rows, left_out, _, _ = read(write(tmp_path / "f.jsonl", [ai_sdk(image, HELLO_PART), ai_sdk(HELLO_PART)]))
    assert (rows, left_out) == ([row("Hi", "Hello", True)], {"images, audio or other media": 1})


def test_messages_and_an_answer_of_one_object_must_agree(tmp_path: Path) -> None:
    asked, chat = {"messages": ASKED_HI}, [*ASKED_HI, SAID_HELLO]
    for number, outputs in enumerate(({"messages": chat, "answer": "Hello"}, {"messages": chat, "result": {"a": 1}})):
        path = write(tmp_path / f"{number}.jsonl", [trace("1", asked, outputs, thumb=[1])])
        assert read(path)[0] == [row("Hi", "Hello", True)]
    path = write(tmp_path / "f.jsonl", [trace("1", asked, {"messages": chat, "answer": "Bye"}, thumb=[1])])
    assert "'messages', 'answer'" in refusal(path)
    response = {"value": "good", "user_id": "u", "status": "submitted"}
    for fields, prompt in ((chat, None), ([*chat, *ASKED_HI], "user: Hi | assistant: Hello | user: Hi")):
        record = {"fields": {"chat": fields, "response": "Hey"}, "responses": {"q": [response]}, "status": "completed"}
        path = write(tmp_path / "g.jsonl", [record])
        if prompt is None:
            assert "'chat', 'response'" in refusal(path)
        else:
            assert read(path)[0] == [row(prompt, "Hey", True)]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_media_and_parts_of_mapped_turns_are_not_lost(tmp_path: Path, form: str) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text("join: chat\nturns: {messages: rows, label: ok}\n")
    records = [
        {"chat": 1, "role": "user", "content": "Which?", "images": ["cat.png"]},
        {"chat": 1, "role": "assistant", "content": "A cat", "ok": "yes"},
        {"chat": 2, "role": "user", "parts": [{"type": "text", "text": "Hi"}], "images": []},
        {"chat": 2, "role": "assistant", "content": [{"type": "text", "text": "Hello"}], "ok": "no"},
    ]
    rows, left_out, _, _ = read(write(tmp_path / f"f.{form}", records), map=str(mapping))
    assert (rows, left_out) == ([row("Hi", "Hello", False)], {"images, audio or other media": 1})


def test_parts_of_joined_messages_are_used(tmp_path: Path) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text("join: chat\nturns: {messages: rows, label: ok}\n")
    said = [("user", "Hi"), ("assistant", "Hello")]
    records = [{"chat": 2, "role": role, "parts": [{"type": "text", "text": text}], "ok": "no"} for role, text in said]
    rows, _, _, feedback = read(write(tmp_path / "f.jsonl", records), map=str(mapping))
    assert (rows, feedback.unused_columns()) == ([row("Hi", "Hello", False)], [])


@pytest.mark.parametrize(
    "more",
    [
        {"session_id": "x", "turn": 1},
        {"sessionId": "x", "turn_index": 1},
        {"dialogue_id": "x"},
        {"dialogId": "x"},
    ],
)
def test_turns_of_a_session_are_pointed_out_if_they_are_counted(tmp_path: Path, more: dict[str, Any]) -> None:
    records = [{"query": q, "answer": "a", "label": 1, **more} for q in "qr"]
    (note,) = read(write(tmp_path / "f.jsonl", records))[3].notes()
    assert note.startswith(f"2 records share a {next(iter(more))}")
    without = [{"query": q, "answer": "a", "label": 1, "session_id": "x"} for q in "qr"]
    assert read(write(tmp_path / "g.jsonl", without))[3].notes() == []


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_turns_of_one_conversation_in_rows_of_their_own_are_pointed_out(tmp_path: Path, form: str) -> None:
    """Their prompts lack the turns before, which nothing else would show."""
    asked = [
        {"query": q, "answer": "a", "label": 1, "conversation_id": c} for q, c in (("q", "x"), ("r", "x"), ("s", "y"))
    ]
    (note,) = read(write(tmp_path / f"f.{form}", asked))[3].notes()
    assert note.startswith("2 records share a conversation_id")
    alone = [one for one in asked if one["query"] != "r"]
    assert read(write(tmp_path / f"g.{form}", alone))[3].notes() == []
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    records = [{"prompt": history, "completion": "b", "label": 1, "conversation_id": "x"}] * 2
    assert read(write(tmp_path / f"h.{form}", records))[3].notes() == []


def test_messages_that_end_with_the_answer_are_prompt_and_answer(tmp_path: Path) -> None:
    chat = [*ASKED_HI, SAID_HELLO]
    judged = {"from_name": "thumb", "type": "choices", "value": {"choices": ["Good"]}}
    response = {"value": "good", "user_id": "u", "status": "submitted"}
    for record in (
        {"id": "1", "fields": {"chat": chat}, "responses": {"quality": [response]}, "status": "completed"},
        {"id": 1, "data": {"messages": chat}, "annotations": [{"was_cancelled": False, "result": [judged]}]},
        {"messages": chat, "feedback": {"type": "thumbs", "score": "\U0001f44d", "text": None}},
    ):
        for form in ("jsonl", "csv"):
            assert read(write(tmp_path / f"f.{form}", [record]))[0] == [row("Hi", "Hello", True)]


RESPONSES = [
    *ASKED_HI,
    {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
    {"type": "function_call", "id": "f", "call_id": "1", "name": "rain", "arguments": '{"city": "Rome"}'},
    {"type": "function_call_output", "call_id": "1", "output": "wet"},
]
YES = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes", "annotations": []}]}


@pytest.mark.parametrize("form", ["jsonl", "csv", "strings.parquet"])
def test_items_of_the_responses_api(tmp_path: Path, form: str) -> None:
    expected = [("user: Hi | assistant:  CALL rain | tool: wet", "assistant: Yes", True)]
    for number, record in enumerate(
        (
            {"messages": [*RESPONSES, YES], "label": True},
            trace("1", {"input": RESPONSES}, {"output": [RESPONSES[1], YES]}, thumb=[1]),
        )
    ):
        cells = {key: _cell(value) for key, value in record.items()} if form.startswith("strings") else record
        assert read(write(tmp_path / f"{number}.{form}", [cells]))[0] == expected
    message = refusal(write(tmp_path / "f.jsonl", [{"prompt": "q", "completion": [RESPONSES[1]], "label": True}]))
    assert "only reasoning" in message


def test_pairs_of_a_chatbot_are_not_an_answer_of_gradio(tmp_path: Path) -> None:
    pairs = json.dumps([["Hi", "Hello"], ["Ho", "Nope"]])
    record = {"message": "Hi", "chatbot": pairs, "flag": "Like", "username": "", "timestamp": "2026"}
    assert "--map FILE" in refusal(write(tmp_path / "log.csv", [record]))


PER_TURN = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "vote": "up", "feedback": {"rating": "thumbsUp"}},
    {"role": "user", "content": "Tea?"},
    {"role": "assistant", "content": "Mud", "vote": "down", "feedback": {"rating": "thumbsDown"}},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes"},
]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "strings.parquet"])
@pytest.mark.parametrize("key", ["vote", "feedback.rating"])
def test_a_key_of_messages_can_be_named_as_the_label(tmp_path: Path, form: str, key: str) -> None:
    records: list[dict[str, Any]] = [{"id": 1, "messages": PER_TURN}, {"id": 2, "messages": PER_TURN[:1]}]
    if form.startswith("strings"):
        records = [{name: _cell(value) for name, value in one.items()} for one in records]
    path = write(tmp_path / f"f.{form}", records)
    assert f"--label-field {key.partition('.')[0]}" in refusal(path)
    rows, left_out, _, _ = read(path, label_field=key)
    assert rows == [row("Hi", "Hello", True), row("user: Hi | assistant: Hello | user: Tea?", "Mud", False)]
    assert left_out == {UNRATED: 1}


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_named_column_of_the_record_counts_before_labels_of_messages(tmp_path: Path, form: str) -> None:
    messages = [*ASKED_HI, {**SAID_HELLO, "rating": 1}]
    path = write(tmp_path / f"f.{form}", [{"id": 1, "messages": messages, "outcome": "bad"}])
    assert read(path, label_field="outcome")[0] == [row("Hi", "Hello", False)]
    path = write(tmp_path / f"g.{form}", [{"id": 1, "messages": messages, "label": "bad"}])
    assert "rating of messages" in refusal(path)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_unrated_record_with_a_defect_is_unrated(tmp_path: Path, form: str) -> None:
    records = [
        {"id": 1, "messages": ASKED_HI, "label": None},
        {"id": 2, "messages": [*ASKED_HI, SAID_HELLO], "label": 1},
    ]
    rows, left_out, _, _ = read(write(tmp_path / f"f.{form}", records))
    assert (rows, left_out) == ([row("Hi", "Hello", True)], {UNRATED: 1})
    rated = [{**records[0], "label": 0}, records[1]]
    assert "must have the role" in refusal(write(tmp_path / f"g.{form}", rated))


def test_a_list_inside_of_the_only_record_is_named_if_its_items_are_no_records(tmp_path: Path) -> None:
    chat = {"id": "c", "dialog": "d", "turns": [{"speaker": "me", "said": "Hi"}, {"speaker": "bot", "said": "Hello"}]}
    message = refusal(write(tmp_path / "f.json", chat))
    assert 'read under "turns"' in message
    assert "--map FILE" in message


CALLED = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Rome"}'}}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "", "toolCalls": [CALLED]},
        {"role": "assistant", "content": None, "functionCall": {"name": "rain", "arguments": "{}"}},
        {
            "role": "assistant",
            "content": "",
            "toolInvocations": [{"toolName": "rain", "state": "call", "args": {"x": 1}}],
        },
    ],
)
def test_calls_are_not_lost_where_keys_are_written_otherwise(tmp_path: Path, answer: dict[str, Any], form: str) -> None:
    path = write(tmp_path / f"f.{form}", [{"id": 1, "messages": [*ASKED_HI, answer], "label": True}])
    assert read(path)[0] == [("user: Hi", "assistant:  CALL rain", True)]
    mapping = tmp_path / "m.yaml"
    mapping.write_text("turns: {messages: messages, label: vote}\n")
    judged = {**answer, "vote": "up", "reasoning_content": "hm"}
    path = write(tmp_path / f"g.{form}", [{"id": 1, "messages": [*ASKED_HI, judged]}])
    config = PrecomputeConfig(model="m", data=str(path), map=str(mapping), one_class=True)
    (found,) = Feedback(config, has_template=True).rows()
    assert in_short(found.completion) == "assistant:  CALL rain"
    assert "hm" in [one.get("reasoning_content") for one in found.completion if not isinstance(one, str)]


def test_results_of_an_assistant_s_function_in_librechat_are_kept(tmp_path: Path) -> None:
    function = {"name": "rain", "arguments": "{}", "output": "wet"}
    content = [
        {"type": "tool_call", "tool_call": {"type": "function", "id": "1", "function": function}},
        {"type": "text", "text": {"value": "Yes", "annotations": []}},
    ]
    up = {"rating": "thumbsUp"}
    records = [libre("m1", ZERO, True, "Rain?"), libre("m2", "m1", False, "", content=content, feedback=up)]
    assert read(write(tmp_path / "f.jsonl", records))[0] == [
        ("user: Rain? | assistant:  CALL rain | tool: wet", "assistant: Yes", True)
    ]


def test_choices_as_the_whole_output(tmp_path: Path) -> None:
    choice = {"index": 0, "finish_reason": "stop", "message": SAID_HELLO}
    one = {**TOOL_CASES["BRAINTRUST"].records[0], "output": [choice]}
    for form in ("jsonl", "csv"):
        assert read(write(tmp_path / f"f.{form}", [one]))[0] == [row("Hi", "Hello", True)]
    message = refusal(write(tmp_path / "g.jsonl", [{**one, "output": [choice, {**choice, "index": 1}]}]))
    assert "several choices" in message


def test_files_that_resemble_an_application_s_are_read_as_what_they_are(tmp_path: Path) -> None:
    plain = [{"prompt": "Hi", "response": "Hello", "feedbackScore": "up"}]
    assert read(write(tmp_path / "a.jsonl", plain), label_field="feedbackScore")[0] == [row("Hi", "Hello", True)]
    turns = [{"id": "1", "from": "user", "content": "Hi", "createdAt": "x"}, {"from": "assistant", "content": "Hello"}]
    assert read(write(tmp_path / "b.jsonl", [{"messages": turns, "label": True}]))[0] == [row("Hi", "Hello", True)]
    steps = [{"prompt": "Hi", "completion": "Hello", "label": 1, "steps": [{"type": "thought", "output": "hm"}]}]
    assert read(write(tmp_path / "c.jsonl", steps))[0] == [row("Hi", "Hello", True)]


TREE_IDS = [("id", "parentId"), ("id", "parent_id"), ("message_id", "parent_message_id"), ("uuid", "parent")]


def tree(key: str, parent: str, *nodes: tuple[str, str | None, str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: name, parent: before, "role": role, "content": text, **more} for name, before, role, text, more in nodes
    ]


def proposed_mapping(message: str, folder: Path) -> str:
    (folder / "m.yaml").write_text(message.split("`")[1], encoding="utf-8")
    return str(folder / "m.yaml")


@pytest.mark.parametrize(("key", "parent"), TREE_IDS)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("judged", ["message", "record", "siblings"])
def test_a_tree_of_messages_is_not_read_as_a_list(
    tmp_path: Path, key: str, parent: str, form: str, judged: str
) -> None:
    up = {"feedback": "up"} if judged != "record" else {}
    nodes = [("1", None, "user", "draft", {}), ("2", "1", "assistant", "a1", {})]
    if judged == "siblings":
        nodes += [("3", "1", "assistant", "a2", up)]
        expected = [("user: draft", "assistant: a2", True)]
    else:
        nodes += [("3", None, "user", "edited", {}), ("4", "3", "assistant", "a2", up)]
        expected = [("user: edited", "assistant: a2", True)]
    record = {"n": 1, "messages": tree(key, parent, *nodes), **({"label": True} if judged == "record" else {})}
    path = write(tmp_path / f"f.{form}", [record])
    message = refusal(path)
    assert f"message 3 of 'messages' does not belong to the message before it: by '{parent}'" in message
    assert read(path, map=proposed_mapping(message, tmp_path))[0] == expected


@pytest.mark.parametrize(("key", "parent"), TREE_IDS)
def test_a_chain_of_messages_with_parents_is_read(tmp_path: Path, key: str, parent: str) -> None:
    nodes = [("1", "root", "user", "q", {}), ("2", "1", "assistant", "a", {}), ("3", "2", "user", "r", {})]
    nodes = [("0", None, "system", "s", {}), *nodes, ("4", "3", "assistant", "b", {"feedback": "up"})]
    expected = [("system: s | user: q | assistant: a | user: r", "assistant: b", True)]
    assert read(write(tmp_path / "f.jsonl", [{"messages": tree(key, parent, *nodes)}]))[0] == expected
    unset = [(name, None, role, text, more) for name, _, role, text, more in nodes]
    assert read(write(tmp_path / "f.jsonl", [{"messages": tree(key, parent, *unset)}]))[0] == expected


def test_a_tree_in_a_recognised_conversation_is_refused(tmp_path: Path) -> None:
    nodes = [("1", None, "user", "q", {}), ("2", "1", "assistant", "a", {}), ("3", "1", "assistant", "b", {})]
    path = write(tmp_path / "f.jsonl", [{"messages": tree("id", "parent_id", *nodes), "reward": 1}])
    assert "tree" in refusal(path)


def test_the_parts_of_joined_messages_count_as_read(tmp_path: Path) -> None:
    case = (
        CASES["ai_chatbot"]
        if "ai_chatbot" in CASES
        else next(one for one in CASES.values() if one.preset == "ai_chatbot")
    )
    unused = read(write(tmp_path / "f.jsonl", case.records), **case.options)[3].unused_columns()
    assert "parts" not in unused


@pytest.mark.parametrize("write_one", [flowise, ai_chat])
@pytest.mark.parametrize("form", ["json", "csv"])
def test_joined_messages_whose_order_is_not_clear_are_refused(tmp_path: Path, write_one: Any, form: str) -> None:
    records = [write_one(at, role, "x") for at, role in (("2/1/2026 9:00", "user"), ("1/31/2026 9:00", "assistant"))]
    message = refusal(write(tmp_path / f"f.{form}", records))
    words = ("created", '"2/1/2026 9:00"', "two dates", "Write times as")
    assert [word for word in words if word not in message] == []


def test_counts_of_langsmith_that_are_none_are_refused(tmp_path: Path) -> None:
    records = [{**CASES["LANGSMITH_COUNTS"].records[0], "feedback_stats": {"thumb": {"values": {"up": 0.5}}}}]
    message = refusal(write(tmp_path / "f.json", records))
    assert '"up" is 0.5' in message
    assert "number of votes" in message


def test_messages_of_dify_without_a_parent_and_a_time_are_refused(tmp_path: Path) -> None:
    records = [dify("c", None, ZERO, asked, said, "like") for asked, said in (("Hi", "Yo"), ("Tea?", "Mud"))]
    message = refusal(write(tmp_path / "f.json", records))
    assert "'created_at', which is missing" in message


def test_a_task_of_label_studio_whose_prompt_is_not_clear_is_refused(tmp_path: Path) -> None:
    records = [{**one, "question": "Or this?"} for one in CASES["LABEL_STUDIO_PROJECTS"].records]
    assert "it is not clear which of the keys 'prompt', 'question'" in refusal(write(tmp_path / "f.csv", records))


@pytest.mark.parametrize("form", ["json", "csv"])
def test_scores_of_langfuse_that_judge_something_else_are_named(tmp_path: Path, form: str) -> None:
    records = CASES["LANGFUSE_SCORES"].records
    (note,) = read(write(tmp_path / f"f.{form}", records))[3].notes()
    assert note.startswith("4 records have scores of one of their observations, or of their session")
    message = refusal(write(tmp_path / f"g.{form}", records[2:3]))
    assert [word for word in ('observationId "o"', "export the observations") if word not in message] == []


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("LANGFUSE_SCORES", "jsonl"),
        *((name, form) for name in ("LANGSMITH", "OPEN_WEBUI", "MLFLOW") for form in ("jsonl", "csv")),
    ],
)
def test_a_record_of_another_format_is_not_called_unrated(tmp_path: Path, name: str, form: str) -> None:
    case = CASES[name]
    records = [*case.records, {"prompt": "plain", "completion": "row", "label": True}]
    options = {"label_field": "thumb", **case.options} if name == "LANGFUSE_SCORES" else case.options
    rows, left_out, _, feedback = read(write(tmp_path / f"f.{form}", records), **options)
    assert rows == case.rows
    assert left_out == {**case.left_out, "another format": 1}
    assert '"prompt"' in feedback.found.left_out.rows[-1][2]


@pytest.mark.parametrize("before", ["", "summary.weave."])
@pytest.mark.parametrize(
    ("column", "verdicts"),
    [
        ("[wandb.reaction.1].payload.emoji", ["\U0001f44d", "\U0001f44e"]),
        ("[wandb.reaction.1].payload.alias", [":+1:", ":-1:"]),
        ("[wandb.reaction.1].payload.alias", [":thumbs_up:", ":thumbs_down:"]),
        ("[wandb.annotation.thumbs].payload.value", ["True", "False"]),
    ],
)
def test_each_column_of_weave_with_a_verdict_is_read(
    tmp_path: Path, before: str, column: str, verdicts: list[str]
) -> None:
    name = f"{before}feedback.{column}"
    records = [{"id": str(i), "inputs.question": f"{i}?", "output": "x", name: one} for i, one in enumerate(verdicts)]
    rows, _, used, _ = read(write(tmp_path / "f.csv", records))
    assert used == "Weave calls (CSV)"
    assert [label for *_, label in rows] == [True, False]


@pytest.mark.parametrize("words", [("t", "f"), ("true", "false"), ("1", "0"), (True, False)])
def test_votes_of_the_chatbot_as_postgres_writes_them(tmp_path: Path, words: tuple[object, object]) -> None:
    up, down = words
    said = {"chatId": "c", "attachments": []}
    turns = [("user", "1?", None), ("assistant", "one", up), ("user", "2?", None), ("assistant", "two", down)]
    records = [
        {
            "id": str(n),
            **said,
            "role": role,
            "parts": [{"type": "text", "text": text}],
            "createdAt": n,
            "isUpvoted": vote,
        }
        for n, (role, text, vote) in enumerate(turns)
    ]
    rows, _, used, _ = read(write(tmp_path / "f.csv", records))
    assert used == "AI SDK chatbot messages"
    assert [label for *_, label in rows] == [True, False]


def test_a_thumb_that_the_details_of_open_webui_contradict_is_warned_of(tmp_path: Path) -> None:
    asked = message("q", None, "user", "1?")
    records = [openwebui(thumb, "a", asked, message("a", "q", "assistant", "x")) for thumb in (1, 1, 1, -1, -1, 1)]
    for record, rating in zip(records, (10, 6, 2, 1, 9, None), strict=True):
        record["data"]["details"] = None if rating is None else {"rating": rating}
    rows, *_, feedback = read(write(tmp_path / "f.json", records))
    assert [label for *_, label in rows] == [True, True, True, False, False, True]
    (note,) = [note for note in feedback.notes() if "data.details.rating" in note]
    assert note.startswith("2 records have a thumb that 'data.details.rating' contradicts")
