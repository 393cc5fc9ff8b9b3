"""Masses and objectives in the shards, the manifest and the checks of a cache."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_manifest import sections
from test_shards import make_row

from offline_kto.kto_core.cache.manifest import checksum, fingerprint, identity_of, read_manifest, write_manifest
from offline_kto.kto_core.cache.manifest_fields import JUDGEMENT_CHECKS, JudgementFields, OptionalEntries
from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.shards import open_shard, shard_name, write_shard
from offline_kto.kto_core.cache.table_rows import Rows
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.judgements import Judgement, Masses, mass_columns
from offline_kto.precompute import reading
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import head, info
from offline_kto.precompute.run import precompute
from offline_kto.precompute.spool import PlannedRow

BOTH = ["desirable_mass", "undesirable_mass"]
ALL = [*BOTH, "objectives"]


def judged_row(number: int, *, objectives: bool = True) -> dict[str, Any]:
    """A row with two votes for it or against it, and one of the other kind."""
    more, less = (2.0, 1.0) if number % 2 == 0 else (1.0, 2.0)
    row = {**make_row(number), "desirable_mass": more, "undesirable_mass": less}
    if objectives:
        row["objectives"] = {
            "helpful": {"desirable": more, "undesirable": less},
            "harmless": {"desirable": 0.0, "undesirable": 0.0},
        }
    return row


ROWS = [judged_row(i) for i in range(100)]


def written(path: Path, rows: list[dict[str, Any]]) -> pa.Table:
    write_shard(path, rows, {})
    return open_shard(path).read()


def test_judgements_need_columns_only_where_a_label_does_not_say_the_same() -> None:
    one = [Judgement.of_label(True), Judgement.of_label(False), Judgement(Masses(1.0, 0.0))]
    assert mass_columns(one) == []
    assert mass_columns([*one, Judgement(Masses(0.5, 0.5))]) == BOTH
    assert mass_columns([Judgement(Masses(2.0, 0.0)), *one]) == BOTH
    assert mass_columns([*one, Judgement(Masses(1.0, 0.0), {"helpful": Masses(1.0, 0.0)})]) == ALL


@pytest.mark.parametrize("objectives", [False, True])
def test_masses_come_back_as_they_were_written(tmp_path: Path, objectives: bool) -> None:
    rows = [judged_row(i, objectives=objectives) for i in range(100)]
    table = written(tmp_path / "00000.parquet", rows)
    for name in ALL if objectives else BOTH:
        assert [row[name] for row in Rows(table)] == [row[name] for row in rows]  # type: ignore[literal-required]


def test_rows_of_one_bit_make_the_shard_that_they_always_made(tmp_path: Path) -> None:
    names = written(tmp_path / "00000.parquet", [make_row(i) for i in range(100)]).schema.names
    assert not {*names} & {*ALL}


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize(
    "other",
    [without(ROWS[1], *ALL), without(ROWS[1], "objectives"), {**ROWS[1], "objectives": {"honest": {}}}],
    ids=["no masses", "no objectives", "other objectives"],
)
def test_the_rows_of_a_shard_have_the_same_columns(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match=r"^00000.parquet: some of its rows have masses or objectives"):
        write_shard(tmp_path / "00000.parquet", [ROWS[0], other], {})


BROKEN = {
    "a missing mass": ({"desirable_mass": None}, "column 'desirable_mass' has 1 missing value"),
    "a negative mass": (
        {"undesirable_mass": -1.0},
        "undesirable_mass of row 4 is -1; a mass is finite and not negative",
    ),
    "NaN": ({"desirable_mass": float("nan")}, "desirable_mass of row 4 is nan"),
    "infinity": ({"desirable_mass": float("inf")}, "desirable_mass of row 4 is inf"),
    "no mass at all": (
        {"desirable_mass": 0.0, "undesirable_mass": 0.0},
        "row 4 has a desirable and an undesirable mass of 0",
    ),
    "another label": ({"label": False}, "label of row 4 does not agree with its masses, 2 desirable and 1 undesirable"),
    "a negative objective": (
        {"objectives": {**ROWS[4]["objectives"], "harmless": {"desirable": 0.0, "undesirable": -0.5}}},
        "objectives.harmless.undesirable of row 4 is -0.5",
    ),
    "a missing objective": (
        {"objectives": {**ROWS[4]["objectives"], "helpful": None}},
        "column 'objectives.helpful.desirable' has 1 missing value",
    ),
    "missing objectives": ({"objectives": None}, "objectives"),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_of_the_masses_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    schema = written(tmp_path / "00000.parquet", ROWS[:8]).schema
    plain = written(tmp_path / "00000.parquet", ROWS[:8]).to_pylist()
    plain[4].update(change)
    with pytest.raises(CacheError, match=f"^x: .*{words}"):
        check_table(pa.Table.from_pylist(plain, schema=schema), "x")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("desirable_mass", [1] * 8, "column 'desirable_mass' should be double, found int64"),
        ("objectives", [{"helpful": 1.0}] * 8, "column 'objectives' should have a desirable and an undesirable mass"),
        ("objectives", [1.0] * 8, "column 'objectives' should have"),
    ],
)
def test_columns_of_another_type_are_refused(tmp_path: Path, name: str, values: list[Any], words: str) -> None:
    path = tmp_path / "00000.parquet"
    table = written(path, ROWS[:8])
    pq.write_table(table.set_column(table.schema.names.index(name), name, pa.array(values)), path)
    with pytest.raises(CacheError, match=words):
        open_shard(path)
    pq.write_table(table.drop_columns(["undesirable_mass"]), path)
    with pytest.raises(
        CacheError, match="has the column 'desirable_mass', but not desirable_mass and undesirable_mass"
    ):
        open_shard(path)


OPTIONAL: OptionalEntries = {
    "columns": ALL,
    "judgements": {
        "votes": "share",
        "rating_scale": [1, 5],
        "weights": True,
        "objectives": ["helpful", "harmless"],
    },
}


def make_cache(folder: Path, shards: list[list[dict[str, Any]]], optional: OptionalEntries) -> Path:
    """Write a complete cache of shards with the given rows."""
    (folder / "train").mkdir(parents=True)
    entries, rows = [], [row for shard in shards for row in shard]
    for number, shard in enumerate(shards):
        path = folder / shard_name(number)
        write_shard(path, shard, {"number": number})
        data = path.read_bytes()
        entries.append({"file": shard_name(number), "rows": len(shard), "bytes": len(data), "sha256": sha256(data)})
    parts = sections(len(rows))
    parts["data"]["desirable"] = sum(row["label"] for row in rows)
    parts["data"]["undesirable"] = len(rows) - parts["data"]["desirable"]
    mark = fingerprint(identity_of(parts), parts["pairing"], "r" * 64)
    write_manifest(folder, parts, entries, mark, optional=optional)
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_manifest_says_which_columns_there_are(tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "refs", [ROWS[:20], ROWS[20:40]], OPTIONAL)
    manifest = read_manifest(folder)
    assert (manifest.columns, manifest.judgements) == (ALL, OPTIONAL["judgements"])
    assert manifest.objectives == ["helpful", "harmless"]
    assert len(verify_cache(folder, manifest).labels) == 40
    plain = make_cache(tmp_path / "plain", [[make_row(i) for i in range(20)]], {})
    assert (read_manifest(plain).columns, read_manifest(plain).judgements) == ([], {})
    assert not {"columns", "judgements"} & json.loads((plain / "manifest.json").read_bytes()).keys()


@pytest.mark.parametrize(
    ("rows", "optional"),
    [
        ([without(row, *ALL) for row in ROWS[20:40]], OPTIONAL),
        ([without(row, "objectives") for row in ROWS[20:40]], OPTIONAL),
        (ROWS[20:40], {}),
        (ROWS[20:40], {"columns": BOTH, "judgements": {}}),
        (ROWS[20:40], {**OPTIONAL, "judgements": {"objectives": ["helpful", "honest"]}}),
    ],
    ids=["no masses", "no objectives", "an older manifest", "a manifest without objectives", "other objectives"],
)
def test_shards_with_other_columns_than_the_manifest_lists_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], optional: OptionalEntries
) -> None:
    folder = make_cache(tmp_path / "refs", [ROWS[:20], rows], optional)
    with pytest.raises(CacheError, match="its masses or objectives are not those that the manifest lists"):
        verify_cache(folder, read_manifest(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": ["colour"]}, "columns is "),
        ({"columns": None}, "columns is none"),
        ({"judgements": None}, "section 'judgements' is missing or damaged"),
        ({"judgements": {}}, "columns and judgements.objectives do not agree"),
        ({"columns": BOTH}, "columns and judgements.objectives do not agree"),
        ({"judgements": {**OPTIONAL["judgements"], "votes": "most"}}, "judgements.votes is most: damaged"),
        ({"judgements": {**OPTIONAL["judgements"], "rating_scale": [5, 1]}}, "judgements.rating_scale is "),
        ({"judgements": {**OPTIONAL["judgements"], "rating_scale": [1, "5"]}}, "judgements.rating_scale is "),
        ({"judgements": {**OPTIONAL["judgements"], "weights": 1}}, "judgements.weights is 1"),
        ({"judgements": {**OPTIONAL["judgements"], "objectives": []}}, "judgements.objectives is "),
        ({"judgements": {**OPTIONAL["judgements"], "objectives": ["a", "a"]}}, "judgements.objectives is "),
        ({"judgements": {**OPTIONAL["judgements"], "objectives": ["\x1b[31m"]}}, "judgements.objectives is "),
    ],
)
def test_damaged_entries_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = make_cache(tmp_path / "refs", [ROWS[:20]], OPTIONAL) / "manifest.json"
    content = {**json.loads(path.read_bytes()), **change}
    content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=words) as caught:
        read_manifest(tmp_path / "refs")
    assert str(caught.value).isprintable()


def test_checks_are_of_declared_fields() -> None:
    assert JUDGEMENT_CHECKS.keys() == JudgementFields.__annotations__.keys()


def test_masses_cost_no_forward_pass(
    base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither new ones nor changed ones, nor their removal; each gives the cache that it alone would give."""
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", max_length=256)
    precompute(config)
    plain = read_manifest(config.out)
    real = reading._planned

    def judged_by(share: float) -> None:
        def planned(row: FeedbackRow, *rest: Any) -> PlannedRow:
            share_for = share if row.label else 1 - share
            masses = Masses(share_for, 1 - share_for)
            return replace(
                real(row, *rest), judgement=Judgement(masses, {"helpful": masses, "honest": Masses(0.0, 0.0)})
            )

        monkeypatch.setattr(reading, "_planned", planned)

    hashes = {plain.data["labels_hash"]}
    for share in (0.75, 1.0):
        judged_by(share)
        precompute(config)
        manifest = read_manifest(config.out)
        assert (manifest.columns, manifest.objectives) == (ALL, ["helpful", "honest"])
        assert manifest.fingerprint == plain.fingerprint
        assert manifest.run["scored_sequences"] == 0
        assert len(verify_cache(config.out, manifest).labels) == 20
        assert {row["desirable_mass"] for row in shard_rows(config.out)} == {share, 1 - share}
        assert all(row["objectives"]["honest"] == {"desirable": 0, "undesirable": 0} for row in shard_rows(config.out))
        assert "judgements  objectives helpful, honest" in info(config.out)
        assert f"({share:g} for, {1 - share:g} against)" in "".join(head(config.out, rows=20, model=None))
        hashes.add(manifest.data["labels_hash"])
    assert len(hashes) == 3
    monkeypatch.setattr(reading, "_planned", real)
    precompute(config)
    again = read_manifest(config.out)
    assert again.shards == plain.shards
    assert (again.columns, again.data, again.run["scored_sequences"]) == ([], plain.data, 0)


def shard_rows(cache: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(cache / shard_name(0)).to_pylist()
    return rows
