"""Feedback that is read in parts gives the plan of one process, byte for byte; parts outlive an interruption."""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import app_exports
import pytest
import tool_exports
from feedback_files import chat_rows
from hypothesis import given
from hypothesis import strategies as st
from models import CHAT_TEMPLATE, tiny_tokenizer

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.errors import CacheError, KTOError
from offline_kto.kto_core.typed_json import from_json, to_json
from offline_kto.precompute import parallel_reading, part_workers
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines import child_process
from offline_kto.precompute.feedback import agreement, contradictions, suspicions, used_columns
from offline_kto.precompute.feedback.agreement import Agreement
from offline_kto.precompute.part_files import PartFiles
from offline_kto.precompute.plan import make_plan
from offline_kto.precompute.plan_page import describe
from offline_kto.precompute.records import line_ranges
from offline_kto.precompute.records.sources import divided, read_range, read_records
from offline_kto.precompute.run import precompute

DAY = datetime(2026, 1, 31, 12)
DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE


tokenizer_with = functools.cache(tiny_tokenizer)


def jsonl(rows: list[Any]) -> bytes:
    """Return lines: of bytes as they are, of anything else as JSON."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def texts(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row of text for each, with these columns besides."""
    return [{"prompt": f"ask {i % 7}", "completion": f"said {i}", **more} for i, more in enumerate(values)]


def labels(count: int = 24) -> list[dict[str, Any]]:
    return [{"label": i % 3 > 0} for i in range(count)]


def among(rows: list[Any], every: int, *others: Any) -> list[Any]:
    """Return rows with another one after each few."""
    other = itertools.cycle(others)
    return [one for i, row in enumerate(rows) for one in ([row, next(other)] if i % every == every - 1 else [row])]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
TOOL = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)
MIXED = [
    {"prompt": "a", "completion": "b", "label": "up!"},
    {"prompt": 3, "completion": "b", "label": True},
    {"question": "no answer"},
    b"{not JSON",
    b"[1, 2]",
    {},
    {"prompt": "", "completion": ""},
]

# Name: content, options, arguments of the tokenizer.
KINDS: dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]] = {
    "chat": (jsonl(chat_rows(30)), {}, {}),
    "text": (jsonl(texts(labels())), {}, {}),
    "text without a template": (jsonl(texts(labels())), {}, {"chat_template": None}),
    "no end": (jsonl(texts(labels()))[:-1], {}, {}),
    "byte order marks and blank lines": (
        b"\xef\xbb\xbf" + jsonl(among(texts(labels()), 2, b"", b" \t", b"\r")) + b"\n\n \n",
        {},
        {},
    ),
    "carriage returns": (jsonl(texts(labels())).replace(b"\n", b"\r\n"), {}, {}),
    "separators of lines in strings": (
        "".join(
            json.dumps(row, ensure_ascii=False) + "\n"
            for row in texts([{"x": "a\u2028b\x85c", **one} for one in labels()])
        ).encode(),
        {},
        {},
    ),
    "pairs": (
        jsonl([{"prompt": f"ask {i % 5}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]),
        {},
        {},
    ),
    "ties among pairs": (
        jsonl(
            [
                {"prompt": f"ask {i % 5}", "chosen": f"yes {i}", "rejected": f"{'yes' if i % 4 else 'no'} {i}"}
                for i in range(40)
            ]
        ),
        {},
        {},
    ),
    "votes": (jsonl(texts([{"up": i % 4, "down": (i * 3) % 5} for i in range(30)])), {}, {}),
    "one number of votes": (
        jsonl(texts([{"up": 2} if i % 5 else {"up": 1, "down": 2} for i in range(30)])),
        {"on_bad_row": "skip"},
        {},
    ),
    "one number of votes beside a label": (
        jsonl(texts([{"up": 2, "label": i % 2} if i < 28 else {"up": 1, "down": 2} for i in range(30)])),
        {},
        {},
    ),
    "never the other number": (jsonl(texts([{"up": i} for i in range(12)])), {}, {}),
    "raters": (jsonl(texts([{"labels": [i % 2, i % 3 > 0, True][: 1 + i % 3]} for i in range(40)])), {}, {}),
    "unanimous raters": (
        jsonl(texts([{"labels": [i % 2, i % 3 > 0, True][: 1 + i % 3]} for i in range(40)])),
        {"votes": "unanimous"},
        {},
    ),
    "graded": (
        jsonl(texts([{"stars": i % 5 + 1} for i in range(30)])),
        {"label_field": "stars", "rating_scale": "1:5"},
        {},
    ),
    "off the scale": (
        jsonl(texts([{"stars": i % 6 + 1} for i in range(30)])),
        {"label_field": "stars", "rating_scale": "1:5"},
        {},
    ),
    "median": (jsonl(texts([{"rating": i * i % 11} for i in range(30)])), {"rating_threshold": "median"}, {}),
    "up and down": (
        jsonl(texts([{"stars": i % 5 + 1} for i in range(30)])),
        {"label_field": "stars", "up": ">=4", "down": "<=2"},
        {},
    ),
    "up that is down": (
        jsonl(texts([{"stars": i % 5 + 1} for i in range(30)])),
        {"label_field": "stars", "up": ">=2", "down": "<=2"},
        {},
    ),
    "compared columns": (
        jsonl(texts([{"rating" if i % 9 else "label": i % 5 + 1} for i in range(30)])),
        {"up": ">=4", "down": "<=2"},
        {},
    ),
    "ratings without labels": (jsonl(texts([{"rating": i % 5 + 1} for i in range(20)])), {}, {}),
    "objectives": (
        jsonl(
            texts(
                [
                    {"labels": {"kind": i % 2 > 0, "true": [1, i % 3 > 1], "odd": None if i % 3 else 1}}
                    for i in range(30)
                ]
            )
        ),
        {},
        {},
    ),
    "weights": (jsonl(texts([{"label": i % 2, "weight": 1 + i % 7 / 8} for i in range(30)])), {}, {}),
    "missing weights": (
        jsonl(texts([{"label": i % 2, **({"weight": i % 7} if i % 9 else {})} for i in range(30)])),
        {},
        {},
    ),
    "tools": (
        jsonl(
            [
                {
                    "messages": [
                        {"role": "user", "content": f"do {i}"},
                        CALL if i % 2 else {"role": "assistant", "content": f"no {i}"},
                    ],
                    "tools": TOOL,
                    "label": i % 3 > 0,
                }
                for i in range(20)
            ]
        ),
        {},
        {"chat_template": TOOLS_TEMPLATE},
    ),
    "tools that the template leaves out": (
        jsonl(
            among(
                chat_rows(20),
                6,
                {"messages": [{"role": "user", "content": "do"}, CALL], "tools": TOOL, "label": True},
            )
        ),
        {"on_bad_row": "skip"},
        {},
    ),
    "unknown roles": (
        jsonl(
            [
                {
                    "messages": [
                        {"role": f"role{i * 7 % 15}", "content": "x"},
                        {"role": "user", "content": f"{i}"},
                        {"role": "assistant", "content": f"a{i}"},
                    ],
                    "label": i % 2,
                }
                for i in range(30)
            ]
        ),
        {},
        {},
    ),
    "bad rows": (jsonl(among(texts(labels(40)), 3, *MIXED)), {}, {}),
    "bad rows left out": (jsonl(among(texts(labels(40)), 3, *MIXED[1:])), {"on_bad_row": "skip"}, {}),
    "unknown labels": (jsonl(texts([{"label": f"word {i % 9}" if i % 4 else "good"} for i in range(40)])), {}, {}),
    "labels of two columns": (
        jsonl(texts([{"label" if i % 2 else "kto_tag": f"w{i % 3}"} for i in range(10)])),
        {},
        {},
    ),
    "nothing but labels that are unknown": (
        jsonl(texts([{"label": "?"} for i in range(10)])),
        {"on_bad_row": "skip"},
        {},
    ),
    "no line is a record": (jsonl([b"some", b"words"] * 9), {"on_bad_row": "skip"}, {}),
    "nothing": (b"\n" * 40, {}, {}),
    "not UTF-8": (
        jsonl(among(texts(labels()), 9, {"prompt": 3}))[:-90] + b"\xff\n" + jsonl(texts(labels(5))),
        {"on_bad_row": "skip"},
        {},
    ),
    "left out for many reasons": (
        jsonl(
            texts(
                [
                    {"label": (None, True, False, "n/a")[i % 4], **({"completion": ""} if i % 7 == 6 else {})}
                    for i in range(40)
                ]
            )
        ),
        {},
        {},
    ),
    "unrated": (jsonl(texts([{"label": None, "rank": i} for i in range(20)])), {}, {}),
    "one class": (jsonl(texts([{"label": True}] * 12)), {}, {}),
    "one class on purpose": (jsonl(texts([{"label": True}] * 12)), {"one_class": True}, {}),
    "missing values": (
        jsonl(
            among(
                texts(labels()),
                4,
                {"prompt": "q", "completion": "NaN", "label": 1},
                {"instruction": "i", "input": "null", "output": "o", "label": 0},
            )
        ),
        {},
        {},
    ),
    "contradictions": (
        jsonl(
            texts(
                [{"label": i % 2, "stars": i % 5 + 1, "thumbs_up": i % 3 > 0, "score": i * 7 % 31} for i in range(60)]
            )
        ),
        {},
        {},
    ),
    "conversations": (
        jsonl(
            texts(
                [
                    {"label": i % 2, "conversation_id": f"c{i % 11}" if i % 3 else i % 4, "deleted": i % 10 == 3}
                    for i in range(30)
                ]
            )
        ),
        {},
        {},
    ),
    "splits": (jsonl(texts([{"label": i % 2, "split": ("train", "test", "dev")[i % 3]} for i in range(30)])), {}, {}),
    "another split": (
        jsonl(texts([{"label": i % 2, "split": ("train", "test")[i % 2]} for i in range(30)])),
        {"split": "test"},
        {},
    ),
    "no such split": (jsonl(texts(labels())), {"split": "test"}, {}),
    "keys beside": (
        jsonl(
            [
                {
                    "input": {"question": f"q{i}", ("context", "x", "history")[i % 3]: "c"},
                    "completion": f"{i}",
                    "label": i % 2,
                }
                for i in range(30)
            ]
        ),
        {"prompt_field": "input.question"},
        {},
    ),
    "long prompts": (
        jsonl(texts([{"label": i % 2, "prompt": "word " * (i % 9)} for i in range(30)])),
        {"max_length": 24},
        {},
    ),
    "all prompts too long": (jsonl(texts(labels())), {"max_length": 2}, {}),
    "date": (jsonl(chat_rows(12)), {}, {"chat_template": DATED}),
    "no end of sequence": (jsonl(texts(labels())), {}, {"eos": False, "chat_template": None}),
    "no template": (jsonl(among(texts(labels()), 8, chat_rows(1)[0])), {}, {"chat_template": None}),
    "no effect": (jsonl(texts([{"up": i % 3, "down": 1} for i in range(20)])), {"up": "good", "down": "bad"}, {}),
    "same prompts": (
        jsonl(
            [{"prompt": "q", "completion": f"{i}", "label": i % 2} for i in range(9)]
            + [{"prompt": "q", "completion": "x", "label": None}]
        ),
        {},
        {},
    ),
    **{
        f"export {name}": (jsonl(case.records * 3), {"one_class": True, "on_bad_row": "skip", **case.options}, {})
        for name, case in {**app_exports.CASES, **tool_exports.TOOL_CASES}.items()
        if not case.document
    },
    **{
        f"refused {name}": (jsonl(records * 3), {}, {})
        for name, (records, _) in {**app_exports.REFUSED, **tool_exports.TOOL_REFUSED}.items()
        if isinstance(records, list)
    },
}


def outcome(path: Path, tokenizer: Any, **options: Any) -> list[Any]:
    """Return all that can be seen of a plan, or its error, and the file of rows that were left out."""
    left_out = path.with_name("left-out.jsonl")
    left_out.unlink(missing_ok=True)
    config = PrecomputeConfig(model="m", data=str(path), left_out=left_out, out=path.parent / "refs", **options)
    found: list[Any]
    try:
        plan = make_plan(config, tokenizer, DAY)
    except KTOError as error:
        found = [str(error)]
    else:
        counts = plan.counts()
        rows = [
            [one.tolist() if hasattr(one, "tolist") else one for one in map(row.__getattribute__, ROW)]
            for row in plan.rows
        ]
        found = [describe(plan, counts, config, tokenizer), counts, plan.labels_and_places_hash(), plan.rendered_on]
        found += [rows, plan.sequence_ids.tolist(), plan.rows.judgements.masses.tolist(), plan.files, plan.dropped]
    return [*found, left_out.read_bytes() if left_out.exists() else None]


ROW = ("source", "row_id", "pair_id", "label", "prompt_ids", "full_completion_ids", "completion_ids", "place")


@pytest.fixture
def parts_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """Set the least bytes of a part, and small limits for what is counted."""
    monkeypatch.setattr(used_columns, "_LOOKED_AT", 5)
    monkeypatch.setattr(suspicions, "_MOST_ROLES", 4)
    monkeypatch.setattr(contradictions, "_MOST_VALUES", 6)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def set_bytes(size: int) -> None:
        monkeypatch.setattr(parallel_reading, "_part_bytes", lambda *_: size)

    return set_bytes


OF_FORMATS = [kind for kind in KINDS if kind.startswith(("export", "refused"))]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind in OF_FORMATS and kind not in OF_FORMATS[::5]))
        for kind in KINDS
    ],
)
def test_parts_give_the_plan_of_one_process(kind: str, tmp_path: Path, parts_of: Callable[[int], None]) -> None:
    content, options, tokenizer_options = KINDS[kind]
    tokenizer = tokenizer_with(**tokenizer_options)
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(content)
    expected = outcome(path, tokenizer, **options, read_workers=1)
    for size in (1,) if kind in OF_FORMATS else (1, 300, 1500):
        parts_of(size)
        assert outcome(path, tokenizer, **options, read_workers=2) == expected
    assert not list((tmp_path / "temporary").iterdir())


def test_a_folder_of_files_is_read_in_parts(tmp_path: Path, parts_of: Callable[[int], None]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"train-{number}.jsonl").write_bytes(jsonl(texts(labels(9))))
    expected = outcome(folder, tiny_tokenizer(), read_workers=1)
    parts_of(200)
    assert outcome(folder, tiny_tokenizer(), read_workers=2) == expected
    (folder / "train-1.jsonl").write_bytes(jsonl([b"some", b"words"]))
    failed = outcome(folder, tiny_tokenizer(), read_workers=1)
    assert outcome(folder, tiny_tokenizer(), read_workers=2) == failed
    assert "train-1.jsonl:1" in failed[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.json", b"[]"),
        ("f.jsonl", b"[\n{}\n]"),
        ("f.jsonl", b'{\n"prompt": 3\n}'),
        ("f.csv", b"a,b\n1,2\n"),
        ("f.jsonl.gz", b"\x1f\x8b"),
    ],
)
def test_other_files_are_not_divided(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert divided(str(tmp_path / name), "train", 1) is None


_LINES = st.lists(
    st.sampled_from([b"", b" ", b"{}", b'{"a": 1}', b"x" * 9, b"\r", "\u2028\x85".encode(), b'{"b": [1, 2, 3, 4, 5]}'])
)


@given(lines=_LINES, end=st.booleans(), size=st.integers(1, 40), piece=st.integers(1, 20))
def test_every_line_is_in_one_part(lines: list[bytes], end: bool, size: int, piece: int) -> None:
    content = b"\n".join(lines) + b"\n" * end
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(line_ranges, "_PIECE", piece)
        path = Path(folder) / "f.jsonl"
        path.write_bytes(content)
        ranges = list(line_ranges.line_ranges(path, "f.jsonl", size))
        assert b"".join(content[one.start : one.end] for one in ranges) == content
        assert [one.start for one in ranges] == [0, *(one.end for one in ranges)][: len(ranges)]
        for one in ranges:
            assert one.before == content[: one.start].count(b"\n")
        for one in ranges[:-1]:
            part = content[one.start : one.end]
            assert len(part) >= size
            assert part.endswith(b"\n")
            assert part[:-1].rpartition(b"\n")[2].strip()
        seen: list[Any] = []
        parted = [item for one in ranges for item in read_range(one, lambda *bad: seen.append(str(bad)))]
        if parted:
            bad: list[Any] = []
            assert parted == list(read_records(str(path), on_bad=lambda *one: bad.append(str(one))))
            assert seen == bad


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(jsonl(texts(labels())))
    ranges = divided(str(path), "train", 100)
    assert ranges is not None
    assert len(ranges) > 3
    path.write_bytes(jsonl(texts(labels(20))))
    with pytest.raises(KTOError, match=r"f\.jsonl: the file changed while it was read"):
        list(read_range(ranges[0], print))


def test_the_sample_of_votes_is_that_of_one_process() -> None:
    rng = random.Random(0)
    for _ in range(200):
        rows = [((1.0, rng.randint(0, 4)), (0.0, rng.randint(1, 4))) for _ in range(rng.randint(1, 30))]
        whole, merged = Agreement(most_votes=25), Agreement(most_votes=25)
        for row in rows:
            whole.add(row)
        cuts = sorted(rng.choices(range(len(rows) + 1), k=2))
        for start, stop in itertools.pairwise([0, *cuts, len(rows)]):
            part = Agreement(most_votes=sys.maxsize)
            for row in rows[start:stop]:
                part.add(row)
            merged.merge(from_json(Agreement, json.loads(json.dumps(to_json(part)))))
        assert merged == whole
    assert agreement.MOST_VOTES > 25


# Processes


def config_of(tmp_path: Path, base: Path, rows: list[Any], **options: Any) -> PrecomputeConfig:
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(jsonl(rows))
    return PrecomputeConfig(model=str(base), data=str(path), out=tmp_path / "refs", read_workers=2, **options)


def plan_with_workers(config: PrecomputeConfig, base: Path, day: datetime | None = DAY) -> Any:
    import transformers

    return make_plan(config, transformers.AutoTokenizer.from_pretrained(base), day, folder=base)


def test_processes_give_the_plan_of_one(tmp_path: Path, base: Path, parts_of: Callable[[int], None]) -> None:
    parts_of(500)
    config = config_of(tmp_path, base, chat_rows(40))
    found = plan_with_workers(config, base)
    expected = plan_with_workers(dataclasses.replace(config, read_workers=1), base)
    assert found.counts() == expected.counts()
    assert found.labels_and_places_hash() == expected.labels_and_places_hash()
    assert not list((tmp_path / "temporary").glob("kto-*"))


@pytest.mark.parametrize("workers", [pytest.param(1, id="here"), pytest.param(2, id="workers", marks=pytest.mark.slow)])
def test_the_cache_is_that_of_one_process(
    tmp_path: Path, base: Path, parts_of: Callable[[int], None], workers: int
) -> None:
    """Shards, and the plan files of workers, gather their tokens from the files of several parts."""
    parts_of(700)
    in_parts = config_of(tmp_path, base, chat_rows(40), kl_partners=2, rows_per_shard=9, workers=workers)
    config = dataclasses.replace(in_parts, out=tmp_path / "whole", read_workers=1, workers=1)
    precompute(config)
    precompute(in_parts)
    for path in sorted(config.out.glob("train/*.parquet")):
        assert (in_parts.out / "train" / path.name).read_bytes() == path.read_bytes()
    assert read_manifest(in_parts.out).fingerprint == read_manifest(config.out).fingerprint


def test_a_lost_process_is_an_error_with_its_log(
    tmp_path: Path, base: Path, parts_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts_of(500)
    real = part_workers.PartWorkers._hear

    def killing(self: Any, child: Any) -> int:
        number = real(self, child)
        for one in self._children.values():
            os.kill(one.pid, signal.SIGKILL)
        return number

    monkeypatch.setattr(part_workers.PartWorkers, "_hear", killing)
    monkeypatch.setattr(child_process, "_CHILD", "print('libraries say much', flush=True)\n" + child_process._CHILD)
    with pytest.raises(CacheError, match=r"has ended \(SIGKILL.*read-workers 1.*Its log: ") as error:
        plan_with_workers(config_of(tmp_path, base, chat_rows(40)), base)
    Path(str(error.value).rpartition("log: ")[2]).unlink()
    left = list((tmp_path / "temporary").glob("kto-reading-*/[0-9]*.json"))
    assert left  # for the same command
    assert "The same command continues with the parts that are left" in str(error.value)
    monkeypatch.undo()


def test_a_process_that_is_lost_before_any_part_is_read(
    tmp_path: Path, base: Path, parts_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts_of(500)
    monkeypatch.setattr(child_process, "_CHILD", "raise SystemExit({module!r} == {function!r})")
    with pytest.raises(
        CacheError, match=r"has ended \(by itself\)\. The same command starts again; --read-workers 1"
    ) as error:
        plan_with_workers(config_of(tmp_path, base, chat_rows(40)), base)
    assert "Its log" not in str(error.value)  # which is empty
    assert not list((tmp_path / "temporary").glob("*.log"))


def test_one_process_in_spite_of_an_option_is_told(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, base, chat_rows(40))
    packed = tmp_path / "feedback.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(config.data).read_bytes()))
    for data, limit, why in (
        (str(packed), None, "only plain JSON Lines can be divided"),
        (config.data, None, "it is too small to be divided"),
        (config.data, 20, "--limit 20 stops at a record"),
    ):
        with shown_lines():
            plan_with_workers(dataclasses.replace(config, data=data, limit=limit), base)
        assert f"reading     in one process, although --read-workers is 2: {why}\n" in capsys.readouterr().out


_COMMAND = """
import json, sys
from datetime import datetime
from pathlib import Path
import transformers
from offline_kto.precompute import parallel_reading
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.plan import make_plan
data, base, out, stop = sys.argv[1:]
parallel_reading._part_bytes = lambda *_: 400
hear, heard = parallel_reading.PartWorkers._hear, []
def hearing(self, child):
    heard.append(child)
    if str(len(heard)) == stop:
        print("reached", flush=True)
        sys.stdin.read()
    return hear(self, child)
parallel_reading.PartWorkers._hear = hearing
missing = parallel_reading.PartWorkers.read
def reading(self, parts):
    print("missing", len(parts), flush=True)
    return missing(self, parts)
parallel_reading.PartWorkers.read = reading
config = PrecomputeConfig(model=base, data=data, out=Path(out), read_workers=2)
plan = make_plan(config, transformers.AutoTokenizer.from_pretrained(base), folder=Path(base))
print("plan", plan.counts().rows_hash, *plan.labels_and_places_hash(), flush=True)
"""


@pytest.mark.slow
def test_a_killed_command_continues_with_the_parts_that_are_left(tmp_path: Path, base: Path) -> None:
    data = tmp_path / "feedback.jsonl"
    data.write_bytes(jsonl(chat_rows(40)))
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def started(stop: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", _COMMAND, str(data), str(base), str(tmp_path / "refs"), stop]
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )

    with started("4") as first:
        assert first.stdout is not None
        read = [first.stdout.readline(), first.stdout.readline()]
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        first.kill()
    assert read[1] == "reached\n"
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [child for child in children if Path(f"/proc/{child}").exists()] == []
    done = len(list(temporary.glob("kto-reading-*/*.json"))) - 1  # run.json
    assert 0 < done < int(read[0].split()[1])
    with started("never") as again:
        said, _ = again.communicate()
    lines = said.splitlines()
    assert lines[0] == f"missing {int(read[0].split()[1]) - done}"
    expected = plan_with_workers(
        PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", read_workers=1), base
    )
    assert lines[1].split() == ["plan", expected.counts().rows_hash, *expected.labels_and_places_hash()]
    assert not list(temporary.glob("kto-reading-*"))


def test_a_damaged_part_is_not_used_for_ever(
    tmp_path: Path, parts_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts_of(300)
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(jsonl(texts(labels())))
    expected = outcome(path, tiny_tokenizer(), read_workers=2)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("offline_kto.precompute.plan._pair", interrupted)
        with pytest.raises(KeyboardInterrupt):
            outcome(path, tiny_tokenizer(), read_workers=2)
    kept = next((tmp_path / "temporary").glob("kto-reading-*"))
    (kept / "00001.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        outcome(path, tiny_tokenizer(), read_workers=2)
    assert outcome(path, tiny_tokenizer(), read_workers=2) == expected


def test_another_command_reads_its_own_parts(tmp_path: Path) -> None:
    with (
        PartFiles.opened([tmp_path], "a" * 40, DAY) as parts,
        PartFiles.opened([tmp_path], "a" * 40, DAY) as same,
        PartFiles.opened([tmp_path], "b" * 40, DAY) as other,
    ):
        assert len({parts.folder, same.folder, other.folder}) == 3
    with PartFiles.opened([tmp_path], "a" * 40, datetime(2030, 1, 1)) as again:
        assert (again.folder, again.day) == (parts.folder, DAY)
    os.utime(parts.folder, (0, 0))
    with PartFiles.opened([tmp_path], "c" * 40, DAY):
        assert not parts.folder.exists()
        assert other.folder.exists()


def test_parts_need_no_torch() -> None:
    program = "import sys, offline_kto.precompute.part_workers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[1])
