"""What makes large caches cheap changes nothing: remembered verification, ids as numbers, rows that are read ahead."""

import errno
import gc
import hashlib
import json
import os
import shutil
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from offline_kto.kto_core.cache import shards, verification, verified_shards
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.cache.repeats import Repeats, count_repeats
from offline_kto.kto_core.cache.verified_shards import state_of
from offline_kto.kto_core.equal_ids import EqualIds
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data import cache_rows, row_reader, shard_files, verified_file
from offline_kto.train.data.batches import BatchLoader, EpochBatches, split_by_prompt, strata_of, units_of
from offline_kto.train.data.cache_rows import CacheRows, RowKey, TrainingRow
from offline_kto.train.data.held_out import HeldOutRows, held_out_prompts
from offline_kto.train.data.repeated_rows import contradictions, repeated_rows
from offline_kto.train.data.row_ids import RowIds, as_ids, id_array_of
from offline_kto.train.data.shard_files import ShardFiles
from offline_kto.train.data.verified_file import VerifiedFile
from offline_kto.train.run.inputs import KeptMaterials
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.accumulators import RowLogratios
from offline_kto.train.trainer.kto_trainer import KTOTrainer

ROWS = 20


@pytest.fixture(scope="module")
def whole(base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three shards with row groups of three rows, and two mismatched completions of each row."""
    folder = tmp_path_factory.mktemp("groups") / "refs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_ROWS_PER_GROUP", 3)
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=folder, rows_per_shard=7, kl_partners=2))
    return folder


@pytest.fixture
def refs(whole: Path, tmp_path: Path) -> Path:
    """Copy the cache, and let its files be old enough to be remembered."""
    return Path(shutil.copytree(whole, tmp_path / "refs"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_shards, "_SETTLED", 0)


def flip(path: Path, at: int) -> None:
    """Change a byte in place, and set the times back as far as a program can."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class Watched:
    """Counts how often shards are hashed and decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed: list[str] = []
        self.decoded: list[str] = []
        hashing, checking = verification.file_hash, verification.check_table

        def file_hash(path: Path) -> str:
            self.hashed.append(path.name)
            return hashing(path)

        def check_table(table: pa.Table, where: str, **rules: Any) -> int:
            self.decoded.append(Path(where).name)
            return checking(table, where, **rules)

        monkeypatch.setattr(verification, "file_hash", file_hash)
        monkeypatch.setattr(verification, "check_table", check_table)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


# An id as kto-precompute writes them.
PROMPT = "0123456789abcdef" * 2


def id_column(texts: list[Any]) -> pa.ChunkedArray:
    """Return texts as a column of ids, one chunk."""
    return pa.chunked_array([as_ids(pa.array(texts, pa.string()))])


NAMES = ["00000.parquet", "00001.parquet", "00002.parquet"]


class TestVerification:
    def test_known_content_is_hashed_and_not_decoded(self, refs: Path, watched: Watched) -> None:
        first = CacheRows(refs)
        assert (sorted(watched.hashed), sorted(set(watched.decoded))) == (NAMES, NAMES)
        watched.hashed.clear(), watched.decoded.clear()
        again = CacheRows(refs)
        assert (sorted(watched.hashed), watched.decoded) == (NAMES, [])
        assert again.labels.tolist() == first.labels.tolist()
        assert again.largest_id == first.largest_id > 0

    def test_unchanged_files_are_not_read_where_that_is_asked_for(
        self, refs: Path, settled: None, watched: Watched
    ) -> None:
        first = CacheRows(refs, trust_unchanged=True)  # nothing is remembered yet
        assert sorted(watched.hashed) == NAMES
        watched.hashed.clear()
        again = CacheRows(refs, trust_unchanged=True)
        assert watched.hashed == []
        assert [again[i].row_id for i in range(ROWS)] == [first[i].row_id for i in range(ROWS)]
        os.utime(refs / "train" / NAMES[1])
        CacheRows(refs, trust_unchanged=True)
        assert watched.hashed == [NAMES[1]]

    @pytest.mark.parametrize("trust", [False, True])
    def test_a_changed_byte_is_found_although_the_times_were_set_back(
        self, refs: Path, settled: None, trust: bool
    ) -> None:
        CacheRows(refs)
        flip(refs / "train" / NAMES[1], 900)
        with pytest.raises(CacheError, match=r"00001\.parquet: .*sha256 differs"):
            CacheRows(refs, trust_unchanged=trust)

    @pytest.mark.parametrize("trust", [False, True])
    def test_another_file_in_its_place_is_found(self, refs: Path, settled: None, trust: bool) -> None:
        CacheRows(refs)
        path, copy = refs / "train" / NAMES[1], refs / "copy"
        shutil.copy2(path, copy)
        flip(copy, 900)
        copy.replace(path)
        with pytest.raises(CacheError, match=r"00001\.parquet: .*sha256 differs"):
            CacheRows(refs, trust_unchanged=trust)

    def test_damage_that_no_metadata_show_is_found_unless_files_are_trusted(
        self, refs: Path, settled: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Expect what the documentation says of a disk that returns other bytes by itself."""
        CacheRows(refs)
        states = {found.st_ino: state_of(found) for found in (path.stat() for path in (refs / "train").iterdir())}
        flip(refs / "train" / NAMES[1], 900)
        monkeypatch.setattr(verified_shards, "state_of", lambda found: states[found.st_ino])
        assert len(CacheRows(refs, trust_unchanged=True)) == ROWS
        with pytest.raises(CacheError, match="sha256 differs"):
            CacheRows(refs)

    def test_files_that_may_change_within_one_tick_are_read_again(self, refs: Path, watched: Watched) -> None:
        CacheRows(refs)
        watched.hashed.clear()
        CacheRows(refs, trust_unchanged=True)
        assert sorted(watched.hashed) == NAMES

    def test_the_first_error_in_the_order_of_the_shards_is_told(self, refs: Path) -> None:
        for name in NAMES[1:]:
            flip(refs / "train" / name, 900)
        with pytest.raises(CacheError, match=r"00001\.parquet"):
            CacheRows(refs)

    @pytest.mark.parametrize("name", ["shards", "row_rules", "row_schema", "arrow_lists"])
    def test_contents_are_checked_again_by_other_code(
        self, name: str, refs: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        CacheRows(refs)
        watched.decoded.clear()
        monkeypatch.setattr(
            verified_shards, "file_hash", lambda path: f"other {path.stem}" if path.stem == name else file_hash(path)
        )
        CacheRows(refs)
        assert sorted(set(watched.decoded)) == NAMES

    def test_rules_of_another_manifest_are_checked(self, refs: Path, watched: Watched) -> None:
        """The content is known, but it was compared with a larger vocabulary."""
        largest = CacheRows(refs).largest_id
        manifest = read_manifest(refs)
        narrow: Any = {**manifest.reference, "vocabulary": largest}
        changed = type(manifest)(**{**manifest.__dict__, "reference": narrow})
        known = verified_shards.VerifiedShards(refs, changed, share=(0, 1), trust_unchanged=True)
        with pytest.raises(CacheError, match="outside the vocabulary"):
            verification.verify_cache(refs, changed, known=known)

    @pytest.mark.parametrize("unknown", [[0], [1], [0, 2]])
    def test_labels_of_known_and_of_unknown_shards_are_hashed_in_their_order(
        self, refs: Path, unknown: list[int], watched: Watched
    ) -> None:
        """Those of unknown shards are taken from the rows that are checked, the others from their files."""
        CacheRows(refs)
        manifest = read_manifest(refs)
        assert manifest.data["labels_hash"]
        watched.decoded.clear()
        known = verified_shards.VerifiedShards(refs, manifest, share=(0, 1), trust_unchanged=False)
        known._found = {
            shard["sha256"]: known._found[shard["sha256"]]
            for number, shard in enumerate(manifest.shards)
            if number not in unknown
        }
        verification.verify_cache(refs, manifest, known=known)
        assert sorted(set(watched.decoded)) == [NAMES[number] for number in unknown]

    def memory(self) -> Path:
        (path,) = (verified_shards.own_files() / "verified").iterdir()
        return path

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(b"\xff{"),
            lambda path: path.write_text("[]"),
            lambda path: path.write_text('{"sha256": 3, "shards": {"a": {}}}'),
            lambda path: path.write_text(path.read_text()[:-40]),
            lambda path: path.write_text(path.read_text().replace('"largest_id": ', '"largest_id": 1', 1)),
            lambda path: (path.unlink(), path.mkdir()),
        ],
    )
    def test_a_damaged_memory_is_ignored(self, damage: Any, refs: Path, settled: None, watched: Watched) -> None:
        before = CacheRows(refs)
        damage(self.memory())
        watched.decoded.clear()
        after = CacheRows(refs, trust_unchanged=True)
        assert sorted(set(watched.decoded)) == NAMES
        assert (after.labels.tolist(), after.largest_id) == (before.labels.tolist(), before.largest_id)

    def test_a_folder_that_cannot_be_written_is_no_error(
        self, refs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: Watched
    ) -> None:
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", Path("/proc/nothing")):
            monkeypatch.setattr(verified_shards, "own_files", lambda folder=folder: folder)
            assert len(CacheRows(refs)) == ROWS
            assert len(CacheRows(refs, trust_unchanged=True)) == ROWS
        assert Counter(watched.hashed) == dict.fromkeys(NAMES, 4)

    def test_old_memories_are_removed(self, refs: Path) -> None:
        CacheRows(refs)
        old, others = self.memory().with_name("old.json"), self.memory().with_name("others.json")
        for path in (old, others):
            path.write_text("{}")
        os.utime(old, (0, time.time() - 91 * 86_400))
        shutil.copytree(refs, refs.parent / "other")
        CacheRows(refs.parent / "other")
        assert not old.exists()
        assert others.exists()

    def test_a_sweep_verifies_once(self, refs: Path, settled: None, watched: Watched) -> None:
        config = TrainConfig(cache=refs, device="cpu")
        KeptMaterials().verified_data(config)
        assert sorted(watched.hashed) == NAMES
        materials = KeptMaterials()
        for length in (None, 90):
            materials.data(TrainConfig(cache=refs, max_length=length, device="cpu"))
        assert sorted(watched.hashed) == NAMES


class TestIds:
    @given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=30))
    def test_repeats_are_those_of_a_naive_count(self, rows: list[tuple[int, bool]]) -> None:
        labels = defaultdict(list)
        for number, label in rows:
            labels[number].append(label)
        naive = Repeats(
            sum(len(found) > 1 and len(set(found)) == 1 for found in labels.values()),
            sum(len(set(found)) == 2 for found in labels.values()),
        )
        of_rows = np.array([label for _, label in rows], dtype=bool)
        for texts in ([f"{number:032x}" for number, _ in rows], ["x" * number for number, _ in rows]):
            ids = id_array_of(id_column(texts))
            assert count_repeats(EqualIds.of(ids), of_rows) == naive

    @given(st.lists(st.sampled_from(["a", "b", "ccc", None]), max_size=12), st.integers(0, 12))
    def test_ids_read_as_the_texts_they_are(self, texts: list[str | None], cut: int) -> None:
        texts = [PROMPT if text == "b" else text for text in texts]
        ids = RowIds(pa.chunked_array([id_column(texts[:cut]).chunk(0), id_column(texts[cut:]).chunk(0)]))
        present = [text for text in texts if text is not None]
        assert len(ids.distinct) == len(set(present))
        assert [code < 0 for code in ids.codes] == [text is None for text in texts]
        known = list(ids.texts())
        assert known == sorted(known)
        for text, code in zip(texts, ids.codes.tolist(), strict=True):
            assert [i for i, other in enumerate(texts) if other == text] == np.flatnonzero(ids.codes == code).tolist()
            assert text != PROMPT or known[code] == PROMPT
        among = ids.among(id_array_of(id_column(["x", "a", PROMPT])))
        assert among.tolist() == [text in ("a", PROMPT) for text in texts]
        assert ids.shared_with(RowIds(id_column(["x", "a", PROMPT]))) == len({"a", PROMPT} & set(present))

    @given(st.lists(st.sampled_from([PROMPT, PROMPT.upper(), PROMPT[:-1] + " ", "x" * 32, PROMPT[:-2], "", "äöü"])))
    def test_different_texts_have_different_ids(self, texts: list[str]) -> None:
        """An id in capitals is another text than the same in small letters."""
        ids = id_array_of(id_column(texts))
        assert len({one.tobytes() for one in ids}) == len(set(texts))

    @given(
        st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans(), st.booleans()), max_size=24),
    )
    def test_pairs_are_those_of_a_naive_search(self, rows: list[tuple[str | None, bool, bool]]) -> None:
        class Pairs:
            pair_ids = RowIds(id_column([name for name, _, _ in rows]))
            labels = np.array([label for _, label, _ in rows], dtype=bool)

        cache: Any = Pairs()
        chosen = [i for i, (_, _, kept) in enumerate(rows) if kept]
        sides: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for i in chosen:
            name, label, _ = rows[i]
            if name is not None:
                sides[name][0 if label else 1].append(i)
        naive = sorted((pair for good, bad in sides.values() for pair in zip(good, bad, strict=False)), key=min)
        assert units_of(cache, np.array(chosen, dtype=np.int32), 2).tolist() == [list(pair) for pair in naive]

    @pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
    def test_prompts_are_held_out_by_their_keyed_hash(self, whole: Path, fraction: float) -> None:
        rows = CacheRows(whole)
        for seed in range(5):
            of_rows = rows.column("prompt_id").to_pylist()
            prompts = sorted(set(of_rows), key=lambda p: hashlib.blake2b(f"{seed}/{p}".encode()).digest())
            held = set(prompts[: held_out_prompts(fraction, len(prompts))])
            trained, held_out = split_by_prompt(rows, fraction, seed)
            assert held_out.tolist() == [i for i, prompt in enumerate(of_rows) if prompt in held]
            assert sorted([*trained, *held_out]) == list(range(ROWS))

    def test_counts_of_the_manifest_are_those_of_the_rows(self, base: Path, tmp_path: Path) -> None:
        rows = [{"prompt": f"question {i}", "completion": "yes", "label": i % 2 == 0} for i in range(6)]
        rows += [rows[0], {**rows[1], "label": True}, {**rows[2], "label": False}]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs"))
        manifest = read_manifest(tmp_path / "refs")
        assert (manifest.data["duplicates"], manifest.data["contradictions"]) == (1, 2)
        cache = CacheRows(tmp_path / "refs")
        found = repeated_rows(cache, most=9)
        assert (found.duplicates.total, found.contradictions.total) == (1, 2) == cache.repeats
        del cache.manifest.data["contradictions"]  # a cache of before
        assert cache.repeats is None
        assert contradictions(cache) == 2


def waiting_bytes(rows: CacheRows, *, every: bool) -> list[int]:
    """Return the bytes of the rows that wait after each batch of an epoch, or with `every` of one batch of all rows."""
    found = []
    batches = EpochBatches([np.arange(ROWS)[:, None]], ROWS if every else 2, shuffle=True, seed=1)
    for _ in BatchLoader(rows, batches):
        found.append(sum(one.decoded.nbytes for one in rows._reader._waiting.values()))
    return found


class TestReading:
    @pytest.fixture
    def expected(self, whole: Path) -> list[dict[str, Any]]:
        paths = sorted((whole / "train").iterdir())
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    @pytest.mark.parametrize(("of_block", "blocks"), [(64, 3), (2, 5), (1, 8)])
    @pytest.mark.parametrize("memory", [0, 2000, 2**30])
    def test_batches_are_the_rows_of_the_files(
        self,
        whole: Path,
        expected: list[dict[str, Any]],
        memory: int,
        of_block: int,
        blocks: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(row_reader, "_BYTES_AHEAD", memory)
        monkeypatch.setattr(shard_files, "_GROUPS_OF_BLOCK", of_block)
        rows = CacheRows(whole)
        assert rows._files.block_count == blocks
        decoded: list[int] = []
        pieces = ShardFiles.pieces

        def counted(files: ShardFiles, groups: np.ndarray, columns: list[str], *, most_bytes: int) -> Any:
            for some, table in pieces(files, groups, columns, most_bytes=most_bytes):
                decoded.extend(some.tolist())
                yield some, table

        monkeypatch.setattr(ShardFiles, "pieces", counted)
        batches = EpochBatches([np.arange(ROWS)[:, None]], 3, shuffle=True, seed=0)
        for epoch in range(3):
            batches.set_epoch(epoch)
            decoded.clear()
            found = [row for batch in BatchLoader(rows, batches) for row in batch]
            assert sorted(row.index for row in found) == list(range(ROWS))
            for row in found:
                wanted, partner = expected[row.index], epoch % 2
                assert (row.row_id, row.label) == (wanted["row_id"], wanted["label"])
                assert row.matched.prompt_ids.tolist() == row.mismatched.prompt_ids.tolist() == wanted["prompt_ids"]
                assert row.matched.completion_ids.tolist() == wanted["completion_ids"]
                assert row.matched.ref_token_logps.tolist() == wanted["ref_token_logps"]
                assert row.matched.ref_logps == wanted["ref_logps"]
                assert row.mismatched.completion_ids.tolist() == wanted["kl_completion_ids"][partner]
                assert row.mismatched.ref_token_logps.tolist() == wanted["ref_kl_token_logps"][partner]
                assert row.mismatched.ref_logps == wanted["ref_kl_logps"][partner]
            groups = rows._files.group_count
            assert len(decoded) == groups if memory == 2**30 else len(decoded) > groups
            assert rows._reader._waiting == {}

    def test_memory_for_coming_rows_is_bounded(self, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Check that as many rows wait as fit, up to chance: a block may have more than its share of the next rows."""
        size = max(waiting_bytes(CacheRows(whole), every=True)) / ROWS
        monkeypatch.setattr(row_reader, "_BYTES_AHEAD", 6 * size)
        monkeypatch.setattr(row_reader, "_LARGE_ROW", size)
        most = max(waiting_bytes(CacheRows(whole), every=False))
        assert 2 * size <= most <= 12 * size

    def test_rows_out_of_order_disturb_nothing(self, whole: Path, expected: list[dict[str, Any]]) -> None:
        """An evaluation reads rows of the cache in the middle of an epoch, with their first mismatched completion."""
        rows = CacheRows(whole)
        batches = EpochBatches([np.arange(ROWS)[:, None]], 4, shuffle=True, seed=0)
        batches.set_epoch(1)
        found = []
        for batch in BatchLoader(rows, batches):
            found += batch
            for i in range(ROWS):
                assert rows[i].mismatched.completion_ids.tolist() == expected[i]["kl_completion_ids"][0]
        for row in found:
            assert row.mismatched.completion_ids.tolist() == expected[row.index]["kl_completion_ids"][1]

    def test_rows_that_are_read_together_keep_no_other_row_in_memory(
        self, whole: Path, expected: list[dict[str, Any]]
    ) -> None:
        """Held-out rows are scored by the thousand, each from another row group: whole groups would fill the memory."""
        rows = CacheRows(whole)
        chosen = np.array([18, 0, 3, 12, 15, 7])  # one of each group

        def held(read: Callable[[], list[TrainingRow]]) -> tuple[list[TrainingRow], int]:
            before = pa.total_allocated_bytes()
            found = read()
            rows._reader._groups.clear()
            return found, pa.total_allocated_bytes() - before

        found, alone = held(lambda: rows.together(chosen))
        groups = held(lambda: [rows[RowKey(i, 0)] for i in chosen.tolist()])[1]
        for row, index in zip(found, chosen.tolist(), strict=True):
            wanted = expected[index]
            assert (row.index, row.row_id, row.label) == (index, wanted["row_id"], wanted["label"])
            assert row.matched.completion_ids.tolist() == wanted["completion_ids"]
            assert row.mismatched.ref_token_logps.tolist() == wanted["ref_kl_token_logps"][0]
        assert alone < 0.6 * groups
        assert [row.index for row in rows.together(np.array([4, 4]))] == [4, 4]

    def test_few_footers_stay_in_memory(
        self, whole: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("offline_kto.train.data.shard_files._BYTES_OF_FOOTERS", 1)
        rows = CacheRows(whole)
        for i in (0, 19, 8, 1, 18):
            assert rows[i].row_id == expected[i]["row_id"]
            assert len(rows._files._footers._files) == 1


def test_prompts_are_split_without_an_object_for_each(whole: Path) -> None:
    """Compare the peak of a split of many prompts with that of few."""

    def peak(count: int) -> int:
        column = id_column([f"{number:032x}" for number in range(count)])
        rows = SimpleNamespace(prompt_ids=RowIds(column), positions=np.arange(count, dtype=np.int32))
        split_by_prompt(rows, 0.1, 0)  # type: ignore[arg-type]
        tracemalloc.start()
        split_by_prompt(rows, 0.1, 0)  # type: ignore[arg-type]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert (peak(40_000) - peak(20_000)) / 20_000 < 64


def test_a_row_takes_few_bytes_of_memory(whole: Path, tmp_path: Path) -> None:
    """Compare an opened run of few rows with one of many: positions, labels and the order of an epoch, but no objects."""

    def opened(copies: int) -> int:
        folder = tmp_path / str(copies)
        shutil.copytree(whole, folder)
        rows = CacheRows(folder)
        of_cache = len(rows)
        rows.labels = np.tile(rows.labels, copies)
        rows._fitting = np.tile(rows._fitting, copies)
        strata = strata_of(rows, units_of(rows, rows.positions, 1), balance=True)
        gc.collect()
        tracemalloc.start()
        held = HeldOutRows(rows, rows.positions)
        batches = EpochBatches(strata, 32, shuffle=True, seed=0)
        seen = RowLogratios(len(rows))
        orders: list[np.ndarray] = []
        batches.on_order = lambda order, partner: orders.append(order)
        iterator = iter(batches)
        next(iterator)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(held.indices) == len(seen.steps) == len(orders[0]) == copies * of_cache
        return taken

    few, many = opened(100), opened(1000)
    assert (many - few) / (900 * ROWS) < 24


class TestFilesThatChangeDuringARun:
    @pytest.fixture(params=[False, True], ids=["read", "mapped"])
    def rows(self, refs: Path, request: pytest.FixtureRequest) -> CacheRows:
        return CacheRows(refs, mapped=request.param)

    def test_a_touched_file_is_hashed_once_and_read_on(self, refs: Path, rows: CacheRows) -> None:
        expected = rows[8].row_id
        os.utime(refs / "train" / NAMES[1])
        hashed: list[VerifiedFile] = []
        with pytest.MonkeyPatch.context() as patch:
            of_file = VerifiedFile._hash
            patch.setattr(VerifiedFile, "_hash", lambda self: hashed.append(self) or of_file(self))
            assert [rows[at].row_id for at in (8, 12, 8)] == [expected, rows[12].row_id, expected]
        assert len(hashed) == 1

    @pytest.mark.parametrize("change", ["byte", "truncated", "another shard", "footer"])
    def test_a_file_that_is_written_in_place_ends_the_run(self, refs: Path, rows: CacheRows, change: str) -> None:
        path = refs / "train" / NAMES[1]
        content = path.read_bytes()
        if change == "byte":
            flip(path, 900)
        else:
            contents = {
                "truncated": content[: len(content) // 2],
                "another shard": (refs / "train" / NAMES[0]).read_bytes(),
                "footer": content[:-20] + bytes(20),
            }
            path.write_bytes(contents[change])
        assert rows[0].row_id  # of another shard
        with pytest.raises(
            CacheError, match=r"00001\.parquet: its content changed after it was verified.*Run the same"
        ):
            rows[8]
        with pytest.raises(CacheError, match=r"00001\.parquet: its content changed"):
            rows.column("prompt_id")
        path.write_bytes(content)
        assert rows[8].row_id

    def test_a_change_while_row_groups_are_read(
        self, refs: Path, rows: CacheRows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed(path: Path, *args: Any, **options: Any) -> Any:
            flip(path, 900)
            yield from shards.read_groups(path, *args, **options)

        assert rows[7].row_id  # its footer is in memory
        monkeypatch.setattr(verified_file, "read_groups", changed)
        with pytest.raises(CacheError, match=r"00001\.parquet: its content changed"):
            rows[13]

    def test_a_change_between_verification_and_opening(self, refs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opening = cache_rows.VerifiedFile

        def replaced(path: Path, *args: Any, **options: Any) -> VerifiedFile:
            if path.name == NAMES[1]:
                shutil.copyfile(refs / "train" / NAMES[0], path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
            return opening(path, *args, **options)

        monkeypatch.setattr(cache_rows, "VerifiedFile", replaced)
        rows = CacheRows(refs)
        with pytest.raises(CacheError, match=r"00001\.parquet: its content changed after it was verified"):
            rows[8]

    def test_a_file_that_was_removed_or_replaced_is_read_on(self, refs: Path, rows: CacheRows) -> None:
        expected = [rows[at].row_id for at in range(7, 14)]
        (refs / "train" / NAMES[1]).unlink()
        assert [rows[at].row_id for at in range(7, 14)] == expected
        shutil.copyfile(refs / "train" / NAMES[0], refs / "train" / NAMES[1])
        assert [rows[at].row_id for at in range(7, 14)] == expected

    def test_a_file_that_is_gone_before_it_is_opened_is_named(
        self, refs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache_rows, "allow_open_files", lambda count: (refs / "train" / NAMES[1]).unlink())
        with pytest.raises(CacheError, match=r"00001\.parquet: cannot be read .*Check that the file is there"):
            CacheRows(refs)

    @pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
    def test_an_error_of_the_system_names_the_file(
        self, refs: Path, error: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that fails, and a network mount that forgot the file: at a read, at its metadata, and in verification."""
        rows = CacheRows(refs)
        words = rf"0000[01]\.parquet: cannot be read .*{os.strerror(error)}.*disk or mount"

        def fails(*args: object, **options: object) -> Any:
            raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            patch.setattr(verified_file.os, "fstat", fails)
            with pytest.raises(CacheError, match=words):
                rows[8]
        for name in ("ParquetFile", "read_row_groups"):
            with monkeypatch.context() as patch:
                patch.setattr(*((pq, name) if name == "ParquetFile" else (pq.ParquetFile, name)), fails)
                with pytest.raises(CacheError, match=words):
                    rows.column("prompt_id")
        with monkeypatch.context() as patch:
            patch.setattr(verification, "file_hash", fails)
            with pytest.raises(CacheError, match=words):
                CacheRows(refs)

    def test_pages_are_compared_with_their_checksums(self, refs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk may return other bytes for a file that nobody wrote to, whose metadata then say nothing."""
        rows = CacheRows(refs)
        path = refs / "train" / NAMES[1]
        column = pq.ParquetFile(path).metadata.row_group(0).column(4)
        monkeypatch.setattr(VerifiedFile, "_check", lambda self: None)
        flip(path, column.data_page_offset + column.total_compressed_size // 2)
        with pytest.raises(CacheError, match=r"00001\.parquet: damaged content .*(?i:crc|checksum)"):
            rows[7]

    @pytest.mark.slow
    def test_a_run_whose_shard_changes_is_resumed_once_it_is_restored(
        self, refs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It ends at the first read of the shard, here the evaluation after update 4, and becomes the run of a quiet disk."""
        options = {"batch_size": 4, "max_steps": 6, "learning_rate": 3e-3, "eval_fraction": 0.4, "eval_steps": 2}
        config = TrainConfig(cache=refs, out=tmp_path / "run", device="cpu", save_steps=2, **options)  # type: ignore[arg-type]
        train(replace(config, out=tmp_path / "quiet"))
        path = refs / "train" / NAMES[1]
        content = path.read_bytes()
        step = KTOTrainer.training_step

        def stepping(trainer: KTOTrainer, *arguments: Any, **more: Any) -> Any:
            if trainer.state.global_step == 3:
                path.write_bytes((refs / "train" / NAMES[0]).read_bytes())
            return step(trainer, *arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(KTOTrainer, "training_step", stepping)
            with pytest.raises(CacheError, match=r"00001\.parquet: its content changed .*--resume"):
                train(config)
        with pytest.raises(CacheError, match=r"00001\.parquet"):
            train(replace(config, resume=True))
        path.write_bytes(content)
        train(replace(config, resume=True))
        found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "quiet"))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
