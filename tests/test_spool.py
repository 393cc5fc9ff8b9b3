"""The plan on disk: equal to one in memory, in any order of reading, and gone when it is not needed."""

import os
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feedback_files import chat_rows, write_rows
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_tokenizer
from naive_plan import naive_counts, naive_key, naive_labels_hash, naive_settled, naive_shard

from offline_kto.kto_core.cache.row_schema import schema_of
from offline_kto.kto_core.errors import CacheError, FeedbackError
from offline_kto.kto_core.hashing import hex_ids, ids_id, json_hash, sequence_id
from offline_kto.kto_core.judgements import Judgement, Masses, mass_columns
from offline_kto.precompute import spool, spool_folder
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.needs import Need
from offline_kto.precompute.plan import Plan, make_plan, shard_rows
from offline_kto.precompute.plan_files import read_plan_file, write_plan_file
from offline_kto.precompute.shard_tables import scored_table, shard_key, unscored_table
from offline_kto.precompute.spool import PlannedRow, PlannedRows, Spool

MAX_LENGTH = 12
_IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=MAX_LENGTH - 1)
_MASSES = st.builds(Masses, *[st.floats(0, 1e6)] * 2)
_OBJECTIVES = st.dictionaries(st.sampled_from("abc"), _MASSES)
_JUDGEMENTS = st.one_of(
    st.booleans().map(Judgement.of_label), st.builds(Judgement, _MASSES), st.builds(Judgement, _MASSES, _OBJECTIVES)
)


def row(prompt: list[int], completion: list[int], judgement: Judgement, **more: Any) -> PlannedRow:
    x, y = (np.array(ids, dtype=np.int32) for ids in (prompt, completion))
    cut = y[: MAX_LENGTH - len(x)]
    found = {"source": 0, "pair_id": None, "label": judgement.masses.label, "place": "f.jsonl:1", **more}
    return PlannedRow(
        **found,
        row_id=sequence_id(x, cut),
        prompt_id=ids_id(x),
        prompt_ids=x,
        full_completion_ids=y,
        completion_ids=cut,
        judgement=judgement,
    )


ROWS = st.lists(
    st.builds(
        row,
        _IDS,
        _IDS,
        _JUDGEMENTS,
        source=st.integers(0, 2**40),
        pair_id=st.none() | st.text(st.characters(codec="utf-8"), max_size=9),
        label=st.booleans(),
        place=st.text(st.characters(codec="utf-8"), max_size=9),
    ),
    min_size=1,
    max_size=12,
)


def written(rows: list[PlannedRow], factors: np.ndarray | None = None) -> PlannedRows:
    with Spool(Path(tempfile.gettempdir()), MAX_LENGTH) as opened:
        for one in rows:
            opened.add(one)
        assert len(opened) == len(rows)
        return opened.finish(factors)


def same(one: PlannedRow, other: PlannedRow) -> bool:
    names = {field.name for field in fields(PlannedRow)} - {"judgement"}
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names) and (
        one.prompt_ids.dtype == one.full_completion_ids.dtype == one.completion_ids.dtype == np.int32
    )


@given(rows=ROWS, batch=st.integers(1, 5), weighted=st.booleans(), data=st.data())
def test_rows_are_read_as_they_were_written(
    rows: list[PlannedRow], batch: int, weighted: bool, data: st.DataObject
) -> None:
    factors = [data.draw(st.floats(0.1, 10)) if weighted else 1.0 for _ in rows]
    expected = naive_settled([one.judgement for one in rows], factors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_ROWS", batch)
        patch.setattr(spool, "_TOKENS", 40)
        found = written(rows, np.array(factors) if weighted else None)
    assert len(found) == len(rows)
    for number in data.draw(st.permutations(range(len(rows)))):
        assert same(found[number], rows[number])
        assert found[number - len(rows)].source == rows[number].source
        assert found[number].judgement == expected[number]
    assert all(map(same, found, rows))
    assert [one.source for one in found[1:]] == [one.source for one in rows[1:]]
    with pytest.raises(IndexError):
        found[len(rows)]
    assert hex_ids(found.ids("row_id")) == [one.row_id for one in rows]
    assert hex_ids(found.ids("completion_id")) == [ids_id(one.full_completion_ids) for one in rows]
    assert found.largest_id == max(max(*one.prompt_ids, *one.full_completion_ids) for one in rows)
    assert found.lengths.tolist() == [len(one.completion_ids) for one in rows]
    assert found.judgements.mass_columns() == mass_columns(expected)


@pytest.mark.slow
def test_only_what_is_small_stays_in_memory() -> None:
    rng = np.random.default_rng(0)
    one_bit = Judgement.of_label(True)
    tracemalloc.start()
    try:
        with Spool(Path(tempfile.gettempdir()), 1024) as opened:
            for source in range(20_000):
                ids = rng.integers(0, 2**31, size=100).astype(np.int32)
                name = f"{source:032x}"
                opened.add(
                    PlannedRow(source, name, name, None, True, ids, ids, ids, one_bit, f"feedback.jsonl:{source}")
                )
            rows = opened.finish(None)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows[19_999].place == "feedback.jsonl:19999"
    assert kept < 60 * len(rows)
    assert most < 400 * len(rows)  # the rows of one batch are objects; all of them would take 1.7 KB each


# The plan over it


def rows_with(*more: dict[str, Any], count: int = 60) -> list[dict[str, Any]]:
    rows = chat_rows(count, longest=30)
    return [{**one, **more[number % len(more)]} for number, one in enumerate(rows)]


def unlabelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if name != "label"} for one in rows]


VOTES = ({"labels": [1, 1, 0]}, {"labels": [0, 0, None]}, {"up": 1, "down": 1})
OBJECTIVES = ({"labels": {"b": 1, "a": 0}, "weight": 2}, {"labels": {"a": 0}, "weight": 1}, {"label": 1, "weight": 0.1})
PLANS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one bit": (rows_with({}), {}),
    "truncated": (rows_with({}), {"max_length": 150, "kl_partners": 3}),
    "repeated with both labels": (rows_with({}, {"label": True}) + rows_with({"label": False}, count=9), {}),
    "rotated": (rows_with({}), {"pairing": "rotate", "pairing_block": 8, "kl_partners": 2}),
    "votes": (unlabelled(rows_with(*VOTES)), {}),
    "weights": (rows_with({"weight": 3}, {"weight": 0.1}), {}),
    "objectives": (unlabelled(rows_with(*OBJECTIVES)), {"kl_partners": 2}),
    "pairs": ([{"prompt": f"ask {i % 9}", "chosen": f"a{i}", "rejected": f"no {i}"} for i in range(20)], {}),
}


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    def planned(rows: list[dict[str, Any]], **options: Any) -> Plan:
        path = write_rows(tmp_path / "f.jsonl", rows)
        return make_plan(
            PrecomputeConfig(model="m", data=str(path), out=tmp_path / "refs", **options), tiny_tokenizer()
        )

    return planned


@pytest.mark.parametrize("kind", PLANS)
def test_counts_and_hashes_equal_those_of_rows_in_memory(
    kind: str, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_ROWS", 7)
    rows, options = PLANS[kind]
    plan = plan_of(rows, **options)
    counts, expected = plan.counts(), naive_counts(plan)
    assert {name: getattr(counts, name) for name in expected} == expected
    assert plan.labels_and_places_hash() == (
        naive_labels_hash([*plan.rows]),
        json_hash([one.place for one in plan.rows]),
    )
    ids = [[sequence_id(*one) for one in plan.sequences(i)] for i in range(len(plan.rows))]
    assert [hex_ids(one) for one in plan.sequence_ids] == ids
    assert [one.row_id for one in plan.rows] == [own for own, *_ in ids]
    lengths = [[len(completion) for _, completion in plan.sequences(i)] for i in range(len(plan.rows))]
    assert plan.completion_lengths.tolist() == lengths


@pytest.mark.parametrize("kind", PLANS)
def test_shards_equal_those_made_row_by_row(
    kind: str, plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full as they are written, and without some scores through a plan file. Shards begin and end within batches."""
    monkeypatch.setattr(spool, "_ROWS", 7)
    rows, options = PLANS[kind]
    plan, random = plan_of(rows, **options), np.random.default_rng(0)
    for shard in shard_rows(plan, 11):
        sequences = [one for index in shard for one in plan.sequences(index)]
        scores = [-random.random(len(completion), dtype=np.float32) for _, completion in sequences]
        table = scored_table(unscored_table(plan, shard), scores)
        expected = naive_shard(plan, shard, scores)
        assert table.equals(pa.Table.from_pylist(expected, schema=schema_of(expected, "expected")))
        assert shard_key(plan, shard) == naive_key(plan, shard)

        has_score, in_company = random.random((2, len(scores))) < 0.5
        known = [one if has else None for one, has in zip(scores, has_score.tolist(), strict=True)]
        path = tmp_path / ".plan/00000.parquet"
        write_plan_file(path, unscored_table(plan, shard), Need(in_company, known, set()), {"key": "k"})
        found = read_plan_file(path)
        assert found.metadata == {"key": "k"}
        names = [sequence_id(*one) for one in sequences]
        assert found.ids == names
        assert {name: one.tolist() for name, one in found.scores.items()} == {
            name: one.tolist() for name, one in zip(names, known, strict=True) if one is not None
        }
        members = [one for one, is_in in zip(sequences, in_company.tolist(), strict=True) if is_in]
        company = {sequence_id(*one): one for one in members}
        assert list(found.company) == list(company)
        for name, pair in found.company.items():
            assert [one.tolist() for one in pair] == [one.tolist() for one in company[name]]
        assert scored_table(found.table, scores).equals(table)


# The file


def test_no_file_is_left(plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    plan = plan_of(rows_with({}))
    assert not list(temporary.iterdir())
    assert plan.rows[3].row_id
    with pytest.raises(FeedbackError):
        plan_of([*rows_with({}), {"prompt": 3}])
    assert not list(temporary.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "f.jsonl"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"))  # noqa: SIM115
    words = (
        rf"{tmp_path}: cannot be written: .*No space left.* Free space, or name a folder on another disk with TMPDIR"
    )
    with pytest.raises(CacheError, match=words):
        plan_of(rows_with({}))


def test_the_folder_has_room_for_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, beside = tmp_path / "temporary", tmp_path / "caches"
    temporary.mkdir()
    beside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    free = {temporary: 100, beside: 1000}
    monkeypatch.setattr(spool_folder, "_free", free.__getitem__)

    def chosen(data_bytes: int, out: Path | str = beside / "new" / "refs") -> Path:
        return spool_folder.spool_folders(out, data_bytes)[0]

    assert (chosen(25), chosen(26), chosen(10**9)) == (temporary, beside, beside)
    assert chosen(10**9, "s3://bucket/refs") == temporary
    monkeypatch.setattr(spool_folder, "_is_in_memory", temporary.__eq__)
    assert chosen(1) == beside
    beside.chmod(0o500)
    if not os.access(beside, os.W_OK):  # root may write anywhere
        assert chosen(1) == temporary


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="needs Linux")
def test_folders_in_memory_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("disk / ext4 rw 0 0\nshm /dev/shm tmpfs rw 0 0\nnested /dev/shm/disk xfs rw 0 0\n")
    real = open
    monkeypatch.setattr(
        "builtins.open",
        lambda name, *rest, **more: real(mounts if name == "/proc/self/mounts" else name, *rest, **more),
    )
    kinds = [
        spool_folder._is_in_memory(Path(path)) for path in ("/", "/dev", "/dev/shm", "/dev/shm/a", "/dev/shm/disk/a")
    ]
    assert kinds == [False, False, True, True, False]
