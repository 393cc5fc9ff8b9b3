"""Messages that are stored newest first are refused: an answer would get later messages as its prompt."""

from pathlib import Path
from typing import Any

import pytest
from test_app_formats import read, refusal, write

TEXTS = [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two")]
ISO = [f"2025-01-01T10:0{number}:00Z" for number in range(4)]


def timed(key: str, times: list[Any], **judged: Any) -> list[dict[str, Any]]:
    """Return the conversation, oldest first, with a verdict on its first answer."""
    found = [{"role": role, "content": text, key: at} for (role, text), at in zip(TEXTS, times, strict=True)]
    found[1] |= judged
    return found


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("key", "times"), [("created_at", ISO), ("timestamp", [1, 2, 3, 4]), ("ts", list("1234"))])
def test_messages_stored_newest_first_are_refused(tmp_path: Path, form: str, key: str, times: list[Any]) -> None:
    right = timed(key, times, feedback="up")
    other = [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "four", "feedback": "down"}]
    rows, *_ = read(write(tmp_path / f"f.{form}", [{"messages": right}, {"messages": other}]))
    assert rows == [("user: 1?", "assistant: one", True), ("user: 3?", "assistant: four", False)]
    said = refusal(write(tmp_path / f"g.{form}", [{"messages": right[::-1]}, {"messages": other}]))
    assert f"'messages' are stored newest first: '{key}' falls from" in said
    assert f"Sort the messages by '{key}', oldest first." in said


@pytest.mark.parametrize("column", ["messages", "conversation", "prompt", "chosen"])
def test_each_place_of_messages_is_checked(tmp_path: Path, column: str) -> None:
    falling = timed("created_at", ISO)[::-1]
    record = {
        "messages": {"messages": falling[:-1], "label": True},
        "conversation": {"conversation": falling[:-1], "label": True},
        "prompt": {"prompt": falling, "completion": "four", "label": True},
        "chosen": {"chosen": falling[:-1], "rejected": [*falling[:-2], {"role": "assistant", "content": "x"}]},
    }[column]
    assert f"'{column}' are stored newest first" in refusal(write(tmp_path / "f.jsonl", [record]))


def test_turns_of_a_mapping_are_checked_unless_they_are_a_tree(tmp_path: Path) -> None:
    mapping = tmp_path / "m.yaml"
    listed = "turns:\n  messages: items\n  role: role\n  text: content\n  label: feedback\n"
    falling = timed("created_at", ISO, feedback="up")[::-1]
    data = write(tmp_path / "f.jsonl", [{"items": falling}])
    mapping.write_text(listed)
    assert "'items' are stored newest first" in refusal(data, map=str(mapping))
    mapping.write_text(f"{listed}  id: id\n  parent: parent\n")
    tree = [{**one, "id": str(number), "parent": str(number + 1)} for number, one in enumerate(falling)]
    tree[-1]["parent"] = None
    rows, *_ = read(write(tmp_path / "f.jsonl", [{"items": tree}]), map=str(mapping))
    assert rows == [("user: 1?", "assistant: one", True)]


@pytest.mark.parametrize(
    "times",
    [[2, 1, 4, 3], [4, 4, 4, 4], [4, 3, 2, None], [4, "x", 2, 1], ISO],
    ids=["clocks that differ", "one time", "a time is missing", "no order", "oldest first"],
)
def test_other_times_are_no_reason_to_refuse(tmp_path: Path, times: list[Any]) -> None:
    rows, *_ = read(write(tmp_path / "f.jsonl", [{"messages": timed("time", times), "label": True}]))
    assert rows[0][1] == "assistant: two"


def test_two_messages_may_have_the_times_of_two_clocks(tmp_path: Path) -> None:
    rows, *_ = read(write(tmp_path / "f.jsonl", [{"messages": timed("time", [2, 1, 3, 4])[:2], "label": True}]))
    assert rows[0][0] == "user: 1?"
