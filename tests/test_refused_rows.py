"""Rows that cannot be used: counted by reason, written to `--left-out`, and never half of a pair."""

import json
from pathlib import Path
from typing import Any

import pytest
from feedback_files import chat_rows, write_rows
from models import CHAT_TEMPLATE, tiny_tokenizer

from offline_kto.kto_core.errors import ConfigError, FeedbackError, KTOError, PairingError
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.plan import Plan, make_plan
from offline_kto.precompute.plan_page import describe

MADE_UP = "narrator"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer whose template writes no messages of the narrator."""
    known = f"{{% for message in messages if message['role'] != '{MADE_UP}' %}}"
    return tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("{% for message in messages %}", known))


def lost(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of which the template leaves out a message."""
    return {**row, "prompt": [{"role": MADE_UP, "content": "Once"}, *row["prompt"]]}


def config_of(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> PrecomputeConfig:
    data = write_rows(tmp_path / "f.jsonl", rows)
    more = {"left_out": tmp_path / "left.jsonl", **more}
    return PrecomputeConfig(model="m", data=str(data), out=tmp_path / "refs", **more)


def left_out(tmp_path: Path) -> list[tuple[str, str]]:
    lines = (tmp_path / "left.jsonl").read_text(encoding="utf-8").splitlines()
    return [(one["where"], one["reason"]) for one in map(json.loads, lines)]


def page(plan: Plan, config: PrecomputeConfig, tokenizer: Tokenizer) -> str:
    return " ".join("\n".join(describe(plan, plan.counts(), config, tokenizer)).split())


def test_a_row_that_is_skipped_counts_for_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = {"prompt": "Once", "completion": "upon", "label": True}
    rows = [*chat_rows(8), lost(chat_rows(1)[0]), text]
    config = config_of(tmp_path, rows, on_bad_row="skip")
    plan = make_plan(config, tokenizer)
    assert (plan.feedback.found.chat, plan.feedback.found.labels.total(), plan.read) == (9, 9, 9)
    shown = page(plan, config, tokenizer)
    assert "rows 10 records -> 9 rows, 9 kept" in shown
    assert "left out defective: 1" in shown
    assert "9 chat rows, 1 converted from text" in shown
    assert left_out(tmp_path) == [("f.jsonl:9", "defective")]


def test_only_skipped_rows_are_no_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = config_of(tmp_path, [lost(row) for row in chat_rows(3)], on_bad_row="skip")
    with pytest.raises(
        FeedbackError, match=r"no row can be used \(defective: 3\)\. The first is f\.jsonl:1: defective \(the chat"
    ):
        make_plan(config, tokenizer)
    assert len(left_out(tmp_path)) == 3


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("before", [0, 1023, 1024], ids=["first", "across two chunks", "in the second chunk"])
def test_a_pair_is_kept_whole_or_left_out_whole(tmp_path: Path, tokenizer: Tokenizer, side: str, before: int) -> None:
    """The completion of one side cannot be rendered: it calls a tool, which the template does not write."""
    call = {"function": {"name": "look_up", "arguments": {"word": "upon"}}}
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Once {number}"}],
            "chosen": [{"role": "assistant", "content": "upon"}],
            "rejected": [{"role": "assistant", "content": "a time"}],
        }
        for number in range(3)
    ]
    pairs[0][side] = [{"role": "assistant", "content": "see", "tool_calls": [call]}]
    config = config_of(tmp_path, [*chat_rows(before), *pairs], on_bad_row="skip")
    plan = make_plan(config, tokenizer)
    paired = [row.pair_id for row in plan.rows if row.pair_id is not None]
    assert len(plan.rows) == before + 4
    assert [paired.count(one) for one in paired] == [2] * 4
    assert left_out(tmp_path) == [(f"f.jsonl:{before + 1}", "defective")]


def test_a_pair_with_two_lost_sides_is_one_mistake(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pair = lost({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"})
    with pytest.raises(KTOError) as caught:
        make_plan(config_of(tmp_path, [*chat_rows(4), pair]), tokenizer)
    assert str(caught.value).count("f.jsonl:5: ") == 1
    assert "rows cannot be used" not in str(caught.value)


def test_all_mistakes_are_reported_in_the_order_of_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Mix mistakes of records, which are found first, with those of the template, some of which are a chunk later."""
    rows = chat_rows(2500)
    for number in (2, 2400):
        rows[number] = lost(rows[number])
    for number in (1, 9, 1500):
        rows[number] = {**rows[number], "tools": "none"}
    with pytest.raises(FeedbackError) as caught:
        make_plan(config_of(tmp_path, rows), tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("f.jsonl: 5 rows cannot be used:")
    assert [line.split(": ")[0] for line in lines[1:-1]] == [f"  f.jsonl:{n}" for n in (2, 3, 10, 1501, 2401)]


def test_what_is_left_out_is_written_where_the_run_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    unrated = {**chat_rows(1)[0], "label": None}
    rows = [*chat_rows(4), unrated, {**chat_rows(1)[0], "label": "perhaps"}]
    with pytest.raises(FeedbackError, match="perhaps"):
        make_plan(config_of(tmp_path, rows), tokenizer)
    assert left_out(tmp_path) == [("f.jsonl:5", "unrated")]
    (tmp_path / "left.jsonl").unlink()
    config = config_of(tmp_path, [unrated, *chat_rows(4)], prompt_field="prompt")
    with (tmp_path / "f.jsonl").open("a") as file:
        file.write('{"prompt": "a", "compl')
    with pytest.raises(FeedbackError, match=r"f\.jsonl:6"):
        make_plan(config, tokenizer)
    assert left_out(tmp_path) == [("f.jsonl:1", "unrated")]


def test_too_little_that_is_left_names_what_is_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat_rows(1)[0], {**chat_rows(1, seed=1)[0], "label": None}]
    with pytest.raises(
        PairingError, match=r"1 row is left.*\(Rows were left out \(unrated: 1\); the first is f\.jsonl:2\."
    ):
        make_plan(config_of(tmp_path, rows), tokenizer)


@pytest.mark.parametrize(("name", "what"), [("none/left.jsonl", "no such folder"), (".", "is a folder")])
def test_a_file_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, tokenizer: Tokenizer, name: str, what: str
) -> None:
    with pytest.raises(ConfigError, match=f"--left-out .*{what}"):
        make_plan(config_of(tmp_path, chat_rows(4), left_out=tmp_path / name), tokenizer)


def test_the_limit_counts_records(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A pair has two rows, and an unrated record has none."""
    pairs: list[dict[str, Any]] = [{"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(3)]
    rows = [{**chat_rows(1)[0], "label": None}, *pairs, {**chat_rows(1)[0], "label": "perhaps"}]
    config = config_of(tmp_path, rows, limit=3)
    plan = make_plan(config, tokenizer)
    assert (len(plan.rows), plan.feedback.found.records) == (4, 3)
    assert "rows 3 records -> 4 rows, 4 kept, dropped: none left out unrated: 1" in page(plan, config, tokenizer)


@pytest.mark.parametrize(
    "message",
    [
        {"type": ["human"], "content": "a"},
        {"role": "user", "content": [{"type": "tool_result", "content": 4}]},
        {"role": "user", "content": [{"type": "tool_result", "content": {"text": "a"}}]},
    ],
    ids=["no name of a type", "a number as the result of a tool", "an object as one"],
)
def test_a_message_of_no_known_form_is_refused_with_its_place(
    tmp_path: Path, tokenizer: Tokenizer, message: dict[str, Any]
) -> None:
    row = {"prompt": [message], "completion": "b", "label": True}
    with pytest.raises(FeedbackError, match=r"^f\.jsonl:5: "):
        make_plan(config_of(tmp_path, [*chat_rows(4), row]), tokenizer)


def jsonl(tmp_path: Path, lines: list[str], **more: Any) -> PrecomputeConfig:
    config = config_of(tmp_path, [], **more)
    Path(config.data).write_text("\n".join(lines), encoding="utf-8")
    return config


GOOD = [json.dumps(row) for row in chat_rows(4)]
BAD = {
    "truncated inside": '{"prompt": "a", "completion": "b", "la',
    "no object": "[1, 2]",
    "a key twice": '{"prompt": "a", "prompt": "b"}',
    "words": "Exported by me",
}


# A file that begins with "[" is an array.
@pytest.mark.parametrize(
    ("kind", "number"), [(kind, n) for kind in BAD for n in (1, 3, 5) if (kind, n) != ("no object", 1)]
)
def test_a_line_that_is_no_record_is_a_defective_row(
    kind: str, number: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [*GOOD[: number - 1], BAD[kind], *GOOD[number - 1 :]]
    config = jsonl(tmp_path, lines, on_bad_row="skip")
    plan = make_plan(config, tokenizer)
    assert "rows 5 records -> 4 rows, 4 kept" in page(plan, config, tokenizer)
    assert left_out(tmp_path) == [(f"f.jsonl:{number}", "defective")]
    with pytest.raises(FeedbackError, match=rf"f.jsonl:{number}: "):
        make_plan(jsonl(tmp_path, lines), tokenizer)


def test_all_bad_lines_are_reported_with_the_other_defects(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [GOOD[0], "words", json.dumps(lost(chat_rows(1)[0])), *GOOD[1:], GOOD[0][:-9]]
    with pytest.raises(FeedbackError) as caught:
        make_plan(jsonl(tmp_path, lines), tokenizer)
    first, *shown = str(caught.value).splitlines()
    assert first.endswith("f.jsonl: 3 rows cannot be used:")
    assert [line.strip().split(": ")[0] for line in shown[:3]] == ["f.jsonl:2", "f.jsonl:3", "f.jsonl:7"]
    assert "the file is cut off" in shown[2]


def test_a_file_without_any_record_is_of_another_format(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FeedbackError, match=r"^f\.jsonl:1: not valid JSON"):
        make_plan(jsonl(tmp_path, ["some", "words"], on_bad_row="skip"), tokenizer)


def test_prompts_that_are_too_long_are_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {**chat_rows(1)[0], "prompt": [{"role": "user", "content": "river " * 200}]}
    unrated = {**chat_rows(1)[0], "label": None}
    pair = {"prompt": "stone " * 200, "chosen": "a", "rejected": "b"}
    config = config_of(tmp_path, [unrated, long, *chat_rows(4), pair], max_length=128)
    plan = make_plan(config, tokenizer)
    assert plan.dropped == {"prompt_too_long": 3}
    places = [("f.jsonl:1", "unrated"), ("f.jsonl:2", "prompt too long")]
    assert left_out(tmp_path) == [*places, *[("f.jsonl:7", "prompt too long")] * 2]
    detail = json.loads((tmp_path / "left.jsonl").read_text().splitlines()[1])["detail"]
    assert detail.endswith("tokens, --max-length 128")
    shown = page(plan, config, tokenizer)
    assert "left out unrated: 1 (see" in shown
    assert "dropped: 3 prompt too long" in shown
