"""The mappings in docs/feedback.md make of each record what the page shows, and together have every key."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import Block, blocks

from offline_kto.kto_core.feedback.mapping import JudgedTurns, Mapping
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback

EXAMPLES = [block for block in blocks("docs/feedback.md") if block.name == "mapping"]


def shown(block: Block, mark: str) -> list[str]:
    return re.findall(rf"^# {mark}(.*)$", block.text, re.M)


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.value)
def test_a_mapping_of_the_page_makes_the_rows_that_it_shows(block: Block, tmp_path: Path) -> None:
    records, rows = shown(block, r"(?=\{)"), shown(block, "-> ")
    assert records
    assert rows
    data, mapping = tmp_path / "data.jsonl", tmp_path / "mapping.yaml"
    data.write_text("".join(f"{one}\n" for one in records), encoding="utf-8")
    mapping.write_text(block.text, encoding="utf-8")
    config = PrecomputeConfig(model="m", data=str(data), map=str(mapping), chat="never", one_class=True)
    feedback = Feedback(config, has_template=True)
    found, expected = [as_shown(one) for one in feedback.rows()], [json.loads(one) for one in rows]
    assert all({"prompt", "completion", "label"} <= one.keys() for one in expected)
    for one, row in zip(json.loads(json.dumps(found)), expected, strict=True):
        assert {name: one[name] for name in row} == row
    assert list(feedback.found.left_out.counts) == shown(block, "left out: ")


def as_shown(row: FeedbackRow) -> dict[str, Any]:
    """A row with all that the page may show of it."""
    masses = [row.desirable_mass, row.undesirable_mass]
    judged = {"masses": masses, "objectives": row.objectives, "weight": row.weight}
    return {"prompt": row.prompt, "completion": row.completion, "label": row.label, **judged}


def keys_of(value: Any) -> set[str]:
    """Return the keys of a mapping, those of its tables included."""
    if not isinstance(value, dict):
        return set()
    return set(value).union(*(keys_of(one) for one in value.values()))


def test_every_key_of_a_mapping_is_in_an_example() -> None:
    there = set().union(*(keys_of(yaml.safe_load(block.text)) for block in EXAMPLES))
    fields = {field.name.replace("_", "-") for kind in (Mapping, JudgedTurns) for field in dataclasses.fields(kind)}
    label = {"path", "scores", "value", "name", "up", "down", "else", "scale", "rating-scale", "votes", "labels"}
    pair = {"chosen", "rejected", "a", "b", "better", "a_when", "b_when"}
    assert (fields | label | pair | {"when", "say"}) - there == {"aside", "recognise", "refuse"}
