"""The printed plan: its lines fit into 100 columns whatever the data are."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feedback_files import chat_rows, write_rows
from models import tiny_tokenizer

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.plan import make_plan
from offline_kto.precompute.plan_page import describe, warnings
from offline_kto.precompute.preview import columns_of, folded

USER, ASSISTANT, TOOL = ({"role": role, "content": f"said by {role}"} for role in ("user", "assistant", "tool"))
LONG = "A long answer with \\ and \n and \t and \x1b. " * 40
COLUMNS = {f"score of rater {number} in the second round": number for number in range(30)}


def texts(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {i // 2}", "completion": f"answer {i}", "label": i % 2 == 0, **more} for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}" if i else "good 0"} for i in range(count)]


def dify(count: int) -> list[dict[str, Any]]:
    cut = "x" * 500 + "..."
    ratings = ["like", "dislike", "", None]
    return [{"user_query": f"q{i}", "ai_response": cut, "feedback_rating": ratings[i % 4]} for i in range(count)]


RATED = [{**one, "rating": i % 5 + i / 1000} for i, one in enumerate(texts(40))]
TOOLS = [{**one, "completion": [ASSISTANT, TOOL, ASSISTANT]} for one in chat_rows(8)]
SYSTEM = [{**one, "system": "Be kind."} for one in texts(8)]
RENDERED = [{**one, "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"} for one in texts(4)]
RENDERED += [{**one, "prompt": f"<|im_start|>user\n{i}<|im_end|>"} for i, one in enumerate(texts(4))]

CHINESE = "\u4f60\u597d\uff0c\u4e16\u754c\u3002" * 60
EMOJI = "\U0001f44d\U0001f468\u200d\U0001f469\u2764\ufe0f " * 60
WIDE = [
    {**one, f"score {CHINESE[:9]}{i}": 1, "score_" + "x" * 150: 1} for i, one in enumerate(texts(8, completion=CHINESE))
]

KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "conversations": (chat_rows(8), {}),
    "text as chat": (texts(8), {}),
    "text": (texts(8), {"chat": "never"}),
    "rendered text": (RENDERED, {}),
    "pairs": (pairs(8), {}),
    "a recognised format": (dify(40), {}),
    "ratings": (RATED, {"label_field": "rating", "up": ">=3", "down": "<=2"}),
    "tool results": (TOOLS, {}),
    "a system column": (SYSTEM, {}),
    "unused columns": (texts(8, **COLUMNS), {}),
    "long answers": (texts(8, completion=LONG), {"max_length": 64}),
    "wide characters": (WIDE, {}),
    "emoji": (texts(8, system=EMOJI, completion="\U0001f44d" * 200), {"max_length": 4096}),
    "several forms": ([*texts(4), *pairs(4), *chat_rows(4)], {}),
    "one class": ([{**one, "label": True} for one in texts(8)], {"one_class": True}),
    "one prompt for most rows": (texts(2) + [{**one, "prompt": "the same"} for one in texts(30)], {}),
    "left out": (texts(8) + texts(9, label=None) + texts(3, completion=""), {"on_bad_row": "skip"}),
    "a single row that is rare": (texts(2) + [{**one, "label": True} for one in texts(60)], {"pairing": "rotate"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_line_of_a_plan_exceeds_100_columns(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    rows, options = KINDS[kind]
    write_rows(tmp_path / f"{'a long name ' * 9}.jsonl", rows)
    config = PrecomputeConfig(model="m", data=f"{'a long name ' * 9}.jsonl", **options)
    tokenizer = tiny_tokenizer()
    plan = make_plan(config, tokenizer)
    lines = describe(plan, plan.counts(), config, tokenizer)
    assert [line for line in lines if columns_of(line) > 100] == []
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("format      ")


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("abc", 3),
        ("\u4f60\u597d", 4),
        ("\uff21", 2),
        ("\U0001f44d\U0001f3fd", 4),
        ("e\u0301", 1),
        ("\u2764\ufe0f", 1),
        ("", 0),
    ],
)
def test_columns_of_a_terminal(text: str, columns: int) -> None:
    assert columns_of(text) == columns


@pytest.mark.parametrize(
    ("text", "lines", "marks"),
    [
        ("one two three", ["one two", "three"], False),
        ("one  two", ["one  two"], False),
        ("abcdefghijkl m", ["abcdefghij", "kl m"], False),
        ("\u4f60" * 7, ["\u4f60" * 5, "\u4f60" * 2], False),
        ("<|end|>\\n<|go|>x", ["<|end|>\\n", "<|go|>x"], True),
        ("abcdefg<|go|>", ["abcdefg", "<|go|>"], True),
        ("abcdefghi\\tjk", ["abcdefghi", "\\tjk"], True),
        ("abcd\\nefghij\\nk", ["abcd\\n", "efghij\\nk"], True),
        ("<" + "a" * 12 + ">", ["<" + "a" * 9, "aaa>"], True),
        ("", [""], True),
    ],
)
def test_lines_end_between_words_and_tokens(text: str, lines: list[str], marks: bool) -> None:
    assert folded(text, 10, at_marks=marks) == lines


def test_labels_of_pairs_say_which_answer_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"q{i}", "response_a": f"a{i}", "response_b": f"b{i}", "preferred": "AB"[i % 2]} for i in range(4)
    ]
    write_rows(tmp_path / "f.jsonl", rows)
    config = PrecomputeConfig(model="m", data="f.jsonl")
    tokenizer = tiny_tokenizer()
    plan = make_plan(config, tokenizer)
    shown = " ".join(" ".join(describe(plan, plan.counts(), config, tokenizer)).split())
    assert '(the first is better: "A" (2); the second is better: "B" (2))' in shown


def test_labels_of_rows_that_are_left_out_are_named_as_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = PrecomputeConfig(model="m", data="feedback.jsonl")
    tokenizer = tiny_tokenizer()
    shown = []
    for rows in (texts(8), [*texts(8), *texts(2, prompt="long " * 500)]):
        write_rows(tmp_path / "feedback.jsonl", rows)
        plan = make_plan(config, tokenizer)
        shown += [line for line in describe(plan, plan.counts(), config, tokenizer) if line.startswith("labels")]
    assert ["values as read: " in line for line in shown] == [False, True]


def test_one_of_each_is_singular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = {"prompt": "long " * 500, "completion": "x", "label": True}
    rows = [*texts(1), {"prompt": "other", "completion": "word " * 200, "label": False}, long]
    write_rows(tmp_path / "feedback.jsonl", rows)
    config = PrecomputeConfig(model="m", data="feedback.jsonl", max_length=128)
    tokenizer = tiny_tokenizer()
    plan = make_plan(config, tokenizer)
    shown = "\n".join(describe(plan, plan.counts(), config, tokenizer))
    assert "3 records -> 3 rows, 2 kept, dropped: 1 prompt too long" in shown
    assert "1 completion, 1 mismatched completion (--max-length 128)" in shown
    assert (
        re.search(r"\b1 (rows|records|completions|mismatched completions|sequences|tokens|more values)\b", shown)
        is None
    )


MATTER = (
    "subset",
    "fold",
    "Partition",
    "retrieved_context",
    "documents",
    "passages",
    "knowledge",
    "functions",
    "quality",
    "systemPrompt",
    "preamble",
    "persona",
    "is_test",
)
HARMLESS = (
    "id",
    "model",
    "name",
    "unfolded",
    "upgrade",
    "source",
    "conversation_id",
    "feedback_id",
    "feedback_date",
    "context.span_id",
    "system_fingerprint",
)


def warned(config: PrecomputeConfig) -> list[str]:
    """The columns that the plan warns of."""
    tokenizer = tiny_tokenizer()
    plan = make_plan(config, tokenizer)
    lines = " ".join(" ".join(describe(plan, plan.counts(), config, tokenizer)).split())
    found = re.search(r"unused columns whose names suggest that they matter: (.*?)\. Use a column", lines)
    return [] if found is None else found[1].split(", ")


CONTEXT = (
    *("sys_prompt", "developer_prompt", "Retrieved Chunks", "passage", "document", "reference", "earlier_turns"),
    *("thread", "prior", "input", "inputs", "attachment", "reasoning", "pre_prompt"),
    *("thinking", "thought", "prefill", "initial_reason_steps", "corrected_completion", "correction"),
)


@pytest.mark.parametrize("name", [*MATTER, *CONTEXT, "grade", "Tools used", "images_url"])
def test_unused_columns_that_matter_are_warned_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "feedback.jsonl", texts(8, **{name: "x"}, **dict.fromkeys(HARMLESS, "x")))
    assert warned(PrecomputeConfig(model="m", data="feedback.jsonl")) == [name]


def test_keys_inside_lists_that_matter_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = [{"text": "Why?", "name": "me", "context": "From a page.", "knowledge": ""}]
    rows = [{"inputs": inputs, "output": f"answer {i}", "n": i, "ok": i % 2} for i in range(4)]
    rows = [{**row, "inputs": [{**inputs[0], "text": f"Why {row['n']}?"}]} for row in rows]
    write_rows(tmp_path / "feedback.jsonl", rows)
    mapping = tmp_path / "m.yaml"
    config = PrecomputeConfig(model="m", data="feedback.jsonl", map="m.yaml")
    mapping.write_text("prompt: inputs[0].text\ncompletion: output\nlabel: ok\n")
    assert warned(config) == ["inputs[].context"]
    mapping.write_text("system: inputs[0].context\nprompt: inputs[0].text\ncompletion: output\nlabel: ok\n")
    assert warned(config) == []


def test_messages_with_documents_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = chat_rows(8)
    for row in rows:
        row["prompt"][0] |= {"documents": ["A page."], "name": "me"}
    write_rows(tmp_path / "feedback.jsonl", rows)
    assert warned(PrecomputeConfig(model="m", data="feedback.jsonl")) == ["prompt[].documents"]


def test_keys_of_messages_that_nothing_reads_are_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"files": ["a.pdf"], "error": "cut", "deleted": True, "hidden": False, "edited_content": "x", "weight": 0}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {**USER, "content": f"q{i}"},
                {**ASSISTANT, "name": "me", "comment": "c", "label": i % 2, **more},
            ]
        }
        for i in range(4)
    ]
    write_rows(tmp_path / "feedback.jsonl", rows)
    config = PrecomputeConfig(model="m", data="feedback.jsonl")
    unused = [*("comment", "deleted", "edited_content", "error", "files", "name", "weight")]
    tokenizer = tiny_tokenizer()
    feedback = make_plan(config, tokenizer).feedback
    assert feedback.unused_beside() == [f"messages[].{name}" for name in unused]
    assert warned(config) == [f"messages[].{name}" for name in unused if name not in ("name", "comment")]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message.name|d('') + message.content"
    )
    feedback = make_plan(config, tokenizer).feedback
    assert "messages[].name" not in feedback.unused_beside()
    write_rows(
        tmp_path / "feedback.jsonl", [{"messages": [one | {"weight": 1} for one in row["messages"]]} for row in rows]
    )
    assert "messages[].weight" not in warned(config)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["previous_messages", "thread"])
def test_a_column_of_messages_is_warned_of_whatever_its_name(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = texts(
        8, **{name: before if form != "csv" else json.dumps(before)}, notes=[{"text": "x"}] if form != "csv" else "x"
    )
    if form == "jsonl":
        write_rows(tmp_path / "f.jsonl", rows)
    elif form == "csv":
        with (tmp_path / "f.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    assert warned(PrecomputeConfig(model="m", data=f"f.{form}")) == [name]


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "files"])
def test_calls_and_files_that_nothing_reads_are_warned_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "f.jsonl", [{**one, name: ["x"]} for one in pairs(8)])
    assert warned(PrecomputeConfig(model="m", data="f.jsonl")) == [name]


def test_a_column_that_contradicts_the_label_has_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "feedback.jsonl", [{**one, "rating": 1 + 4 * (i % 3 == 0)} for i, one in enumerate(texts(8))])
    config = PrecomputeConfig(model="m", data="feedback.jsonl")
    tokenizer = tiny_tokenizer()
    plan = make_plan(config, tokenizer)
    (warning,) = [line for line in describe(plan, plan.counts(), config, tokenizer) if line.startswith("warning")]
    assert "'rating' contradicts the label that was read in 3 of 8 rows" in warning


def test_a_column_with_the_system_text_is_named_with_the_line_of_a_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "feedback.jsonl", texts(8, systemPrompt="Be brief."))
    config = PrecomputeConfig(model="m", data="feedback.jsonl")
    plan = make_plan(config, tiny_tokenizer())
    (said,) = (one for one in warnings(plan, plan.counts()) if "systemPrompt" in one)
    assert said.endswith("and as the system text or tools with --map FILE (`system: systemPrompt`).")


SHP = {
    "history": "q",
    "human_ref_A": "a",
    "human_ref_B": "b",
    "labels": 1,
    "score_A": 9,
    "score_B": 3,
    "score_ratio": 3.0,
}
WEBGPT = {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0}
PROMETHEUS = {
    "orig_instruction": "q",
    "orig_response": "a",
    "orig_score": 5,
    "instruction": "Judge.",
    "output": "Good.",
}


@pytest.mark.parametrize(("record", "key"), [(SHP, "history"), (WEBGPT, "question"), (PROMETHEUS, "orig_instruction")])
def test_columns_that_a_format_does_not_need_are_not_warned_of(
    record: dict[str, object], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "feedback.jsonl", [{**record, key: f"q{number}"} for number in range(8)])
    config = PrecomputeConfig(model="m", data="feedback.jsonl", one_class=True)
    assert warned(config) == []
    write_rows(tmp_path / "feedback.jsonl", [{**record, key: f"q{number}", "quality": 1} for number in range(8)])
    assert warned(config) == ["quality"]


def test_a_date_for_a_template_that_writes_none_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "feedback.jsonl", texts(8))
    config = PrecomputeConfig(model="m", data="feedback.jsonl", template_date="2024-07-26")
    plan = make_plan(config, tiny_tokenizer(), config.template_day)
    assert "--template-date has no effect: the chat template writes no date." in warnings(plan, plan.counts())
