"""The places of rows in the feedback: as error messages name them, in the cache, and no part of any score."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feedback_files import chat_rows, write_feedback, write_rows
from hypothesis import given
from hypothesis import strategies as st
from test_shards import make_row

from offline_kto.kto_core.cache.manifest import Manifest, read_manifest, write_manifest
from offline_kto.kto_core.cache.places import LONGEST_PLACE, files_of, place_of
from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.shards import open_shard, read_metadata, write_shard
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import head
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.run.train_run import train


def places_in(cache: Path) -> list[str]:
    tables = [pq.read_table(path) for path in sorted((cache / "train").glob("*.parquet"))]
    return [place for table in tables for place in table.column("place").to_pylist()]


def as_of_before(cache: Path, out: Path) -> Path:
    """Write the cache that a version without places would have written."""
    manifest = read_manifest(cache)
    (out / "train").mkdir(parents=True)
    shards = []
    for shard in manifest.shards:
        path = out / shard["file"]
        table = pq.read_table(cache / shard["file"]).drop_columns(["place"])
        footer = {**(read_metadata(cache / shard["file"]) or {}), "key": f"of before {path.name}"}
        table = table.replace_schema_metadata({b"kto": json.dumps(footer)})
        pq.write_table(table, path, row_group_size=64, compression="zstd")
        shards.append({**shard, "bytes": path.stat().st_size, "sha256": file_hash(path)})
    sections: dict[str, Any] = {
        name: getattr(manifest, name)
        for name in ("reference", "tokenizer", "tokenization", "pairing", "scorer", "data", "run")
    }
    sections["data"] = {name: value for name, value in manifest.data.items() if name != "places_hash"}
    write_manifest(out, sections, shards, manifest.fingerprint)  # type: ignore[arg-type]
    return out


@pytest.fixture
def config(base: Path, tmp_path: Path) -> PrecomputeConfig:
    data = write_feedback(tmp_path / "feedback.jsonl", 12)
    return PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", rows_per_shard=5, max_length=256)


ROWS = [{"prompt": f"ask {i}", "completion": f" say {i}", "label": i % 2 == 0} for i in range(4)]
LINES = [json.dumps(row) for row in ROWS]


class TestFormats:
    def made(self, base: Path, data: Path) -> list[str]:
        out = data.parent / f"{data.name}-refs"
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=out))
        return places_in(out)

    def test_json_lines_with_blank_lines(self, base: Path, tmp_path: Path) -> None:
        path = tmp_path / "f.jsonl"
        path.write_text("\n" + LINES[0] + "\n\n\n" + LINES[1] + "\n" + LINES[2] + "\n \n" + LINES[3])
        assert self.made(base, path) == ["f.jsonl:2", "f.jsonl:5", "f.jsonl:6", "f.jsonl:8"]

    def test_cells_of_several_lines(self, base: Path, tmp_path: Path) -> None:
        path = tmp_path / "f.csv"
        rows = "\n".join(f'"ask {i}\nmore","say {i}",{i % 2}' for i in range(3))
        path.write_text(f"prompt,completion,label\n{rows}\n")
        assert self.made(base, path) == ["f.csv:2", "f.csv:4", "f.csv:6"]

    def test_an_array_with_several_records_on_a_line(self, base: Path, tmp_path: Path) -> None:
        path = tmp_path / "f.json.gz"
        path.write_bytes(gzip.compress(f"[\n{LINES[0]}, {LINES[1]},\n{LINES[2]},\n{LINES[3]}]".encode()))
        found = self.made(base, path)
        assert found == ["f.json.gz:2", "f.json.gz:2 (record 2)", "f.json.gz:3", "f.json.gz:4"]

    def test_rows_of_parquet(self, base: Path, tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet")
        assert self.made(base, tmp_path / "f.parquet") == [f"f.parquet: row {i}" for i in (1, 2, 3, 4)]

    def test_files_of_a_folder(self, base: Path, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        write_rows(folder / "train-00000.jsonl", ROWS[:3])
        write_rows(folder / "train-00001.jsonl", ROWS[3:])
        found = self.made(base, folder)
        assert found == [*(f"train-00000.jsonl:{i}" for i in (1, 2, 3)), "train-00001.jsonl:1"]
        rows = CacheRows(tmp_path / "data-refs")
        names, numbers = rows.source_files(np.array([3, 0])) or ([], np.empty(0))
        assert [names[number] for number in numbers] == ["train-00001.jsonl", "train-00000.jsonl"]

    def test_both_rows_of_a_pair(self, base: Path, tmp_path: Path) -> None:
        pairs = [{"prompt": f"ask {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(3)]
        found = self.made(base, write_rows(tmp_path / "f.jsonl", pairs))
        assert found == [f"f.jsonl:{i}" for i in (1, 1, 2, 2, 3, 3)]

    def test_each_judged_turn_of_a_conversation(self, base: Path, tmp_path: Path) -> None:
        def turn(i: int) -> list[dict[str, Any]]:
            return [
                {"role": "user", "content": f"ask {i}"},
                {"role": "assistant", "content": f"say {i}", "label": i % 2 == 0},
            ]

        rows = [{"messages": [*turn(i), *turn(i + 1)]} for i in (0, 2)]
        assert self.made(base, write_rows(tmp_path / "f.jsonl", rows)) == [f"f.jsonl:{i}" for i in (1, 1, 2, 2)]


class TestNames:
    @pytest.mark.parametrize(
        ("where", "place"),
        [
            ("feedback.jsonl:12", "feedback.jsonl:12"),
            ("sub/feedback.jsonl:12", "sub/feedback.jsonl:12"),
            ("../../home/me/f.jsonl:3", "f.jsonl:3"),
            ("/home/me/f.jsonl:3", "f.jsonl:3"),
            ("a\nb\udcff.csv:3", "a\\nb\\udcff.csv:3"),
        ],
    )
    def test_they_are_printable_and_name_no_folder_outside(self, where: str, place: str) -> None:
        assert place_of(where) == place

    @given(st.text(max_size=600))
    def test_any_name_fits_into_a_cache(self, name: str) -> None:
        found = place_of(f"{name}:1234567")
        assert len(found) <= LONGEST_PLACE
        assert found.isprintable()
        assert found.endswith(":1234567")

    def test_the_file_in_a_place(self) -> None:
        places = ["a.jsonl:12", "a:3.json:2 (record 4)", "b.parquet: row 7", "owner/name: row 1", "odd"]
        assert files_of(pa.array(places)).to_pylist() == ["a.jsonl", "a:3.json", "b.parquet", "owner/name", "odd"]


class TestCache:
    def test_they_are_no_part_of_a_score_nor_of_a_label(self, config: PrecomputeConfig) -> None:
        precompute(config)
        before = read_manifest(config.out)
        data = Path(config.data)
        data.write_text("\n\n" + data.read_text())
        precompute(config)
        after = read_manifest(config.out)
        assert after.rows_identity == before.rows_identity
        assert after.data["places_hash"] != before.data["places_hash"]
        assert (after.run["scored_sequences"], after.run["tokens"]) == (0, 0)
        assert places_in(config.out) == [f"feedback.jsonl:{i}" for i in range(3, 15)]

    def test_another_order_reuses_all_scores(self, config: PrecomputeConfig) -> None:
        precompute(config)
        lines = Path(config.data).read_text().splitlines()
        Path(config.data).write_text("\n".join(reversed(lines)))
        precompute(config)
        assert read_manifest(config.out).run["scored_sequences"] == 0
        assert places_in(config.out) == [f"feedback.jsonl:{i}" for i in range(1, 13)]

    def test_the_same_places_are_nothing_to_do(self, config: PrecomputeConfig) -> None:
        precompute(config)
        before = (config.out / "manifest.json").stat().st_mtime_ns
        precompute(config)
        assert (config.out / "manifest.json").stat().st_mtime_ns == before

    def test_a_cache_of_before_stays_as_it_is_until_it_is_overwritten(
        self, config: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        precompute(config)
        old = as_of_before(config.out, tmp_path / "old")
        files = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
        verify_cache(old, read_manifest(old))
        precompute(replace(config, out=old))
        assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == files
        assert CacheRows(old).places(np.array([7, 0])) == ["record 7", "record 0"]
        assert CacheRows(old).source_files(np.array([0])) is None
        assert "feedback.jsonl" not in "".join(head(old, rows=3, model=None))
        precompute(replace(config, out=old, overwrite=True))
        assert read_manifest(old).run["scored_sequences"] == 0
        assert places_in(old) == places_in(config.out)
        assert "feedback.jsonl:3" in "".join(head(old, rows=3, model=None))

    def test_training_is_bit_for_bit_that_on_a_cache_of_before(self, config: PrecomputeConfig, tmp_path: Path) -> None:
        precompute(config)
        old = as_of_before(config.out, tmp_path / "old")
        runs = [
            train(
                TrainConfig(
                    cache=cache,
                    out=tmp_path / f"run{number}",
                    max_steps=3,
                    batch_size=4,
                    learning_rate=1e-3,
                    device="cpu",
                )
            )
            for number, cache in enumerate((old, config.out))
        ]
        one, other = ((run / "model.safetensors").read_bytes() for run in runs)
        assert one == other

    def test_places_of_rows_that_max_length_keeps(self, config: PrecomputeConfig) -> None:
        precompute(config)
        rows = CacheRows(config.out)
        prompts = [len(rows[i].matched.prompt_ids) for i in range(len(rows))]
        fewer = CacheRows(config.out, max_length=max(prompts))
        kept = [i for i, length in enumerate(prompts) if length < max(prompts)]
        assert 0 < len(fewer) == len(kept) < len(rows)
        assert fewer.places(np.arange(len(fewer))) == [f"feedback.jsonl:{i + 1}" for i in kept]

    def test_the_manifest_and_the_shards_agree(self, config: PrecomputeConfig) -> None:
        precompute(config)
        manifest = read_manifest(config.out)
        data = {name: value for name, value in manifest.data.items() if name != "places_hash"}
        with pytest.raises(CacheError, match="has places and the manifest lists none"):
            verify_cache(config.out, Manifest(**{**manifest.__dict__, "data": data}))


class TestRules:
    def table(self, tmp_path: Path, place: object = "f.jsonl:1") -> pa.Table:
        write_shard(tmp_path / "00000.parquet", [{**make_row(i), "place": f"f:{i}"} for i in range(3)], {})
        table = open_shard(tmp_path / "00000.parquet").read()
        values = pa.array(["f:0", place, "f:2"])
        return table.set_column(table.schema.get_field_index("place"), "place", values)

    @pytest.mark.parametrize(
        ("place", "words"),
        [
            (None, "column 'place' has 1 missing value"),
            ("x" * 257, "a place of 257 characters; the longest has 256"),
        ],
    )
    def test_a_broken_rule_is_named(self, tmp_path: Path, place: object, words: str) -> None:
        check_table(self.table(tmp_path), "x")
        with pytest.raises(CacheError, match=f"^x: .*{words}"):
            check_table(self.table(tmp_path, place), "x")

    def test_another_type_is_refused(self, tmp_path: Path) -> None:
        table = self.table(tmp_path)
        numbers = table.set_column(table.schema.get_field_index("place"), "place", pa.array([1, 2, 3]))
        pq.write_table(numbers, tmp_path / "00001.parquet")
        with pytest.raises(CacheError, match="column 'place' should be string, found int64"):
            open_shard(tmp_path / "00001.parquet")

    def test_all_rows_of_a_shard_have_one(self, tmp_path: Path) -> None:
        with pytest.raises(CacheError, match="some of its rows have no place"):
            write_shard(tmp_path / "00000.parquet", [{**make_row(0), "place": "f:1"}, make_row(1)], {})


def test_a_place_costs_few_bytes(tmp_path: Path) -> None:
    """At most 16 a row, of the thousands that a row has."""
    rows = [make_row(i) for i in range(2000)]
    sizes = []
    for placed in (False, True):
        path = tmp_path / f"{placed}.parquet"
        write_shard(
            path,
            [{**row, "place": f"feedback-2026.jsonl:{1000 + 3 * i}"} if placed else row for i, row in enumerate(rows)],
            {},
        )
        sizes.append(path.stat().st_size)
    assert 0 < sizes[1] - sizes[0] < 16 * len(rows)


def test_chat_rows_are_placed(cache: Path) -> None:
    assert places_in(cache) == [f"feedback.jsonl:{i + 1}" for i in range(len(chat_rows(20)))]
