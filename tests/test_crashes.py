"""What a crash leaves behind: real kills at random moments and before every change to the disk, full disks, power cuts."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feedback_files import chat_rows, write_feedback, write_rows
from safetensors.torch import load_file

import offline_kto.kto_core.cache.manifest
import offline_kto.kto_core.durable_files
import offline_kto.precompute.store as precompute_store
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import CacheError, ConfigError, KTOError, TrainingError
from offline_kto.kto_core.lock import only_writer
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import verify
from offline_kto.precompute.out_folder import opened_out
from offline_kto.precompute.run import precompute
from offline_kto.precompute.store import Store
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train


def killed_runs(stage: str, config: Any, **orders: Any) -> dict[str, Any]:
    """Run a stage under fire (see killed_runs.py). Returns: `kills`, and the `folders` that they left behind."""
    defaults = asdict(type(config)())
    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items() if v != defaults[k]}
    text = json.dumps({"stage": stage, "options": options, **orders}, default=str)
    program = "import json, sys; from killed_runs import main; print(json.dumps(main(json.loads(sys.argv[1]))))"
    done = forks.run(program, text)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("train/*.parquet")) for row in pq.read_table(path).to_pylist()]


def assert_same_cache(one: Path, other: Path) -> None:
    """Both whole, with the same rows and the same scores, and nothing else in the folder."""
    verify(one)
    assert read_manifest(one).fingerprint == read_manifest(other).fingerprint
    shards = {f"train/{path.name}" for path in (other / "train").iterdir()}
    assert {str(path.relative_to(one)) for path in one.rglob("*")} == {"manifest.json", "train", *shards}
    for row, expected in zip(rows_of(one), rows_of(other), strict=True):
        for name in ("row_id", "label", "source", "kl_completion_ids"):
            assert row[name] == expected[name]
        np.testing.assert_allclose(row["ref_token_logps"], expected["ref_token_logps"], atol=1e-5)
        for scores, others in zip(row["ref_kl_token_logps"], expected["ref_kl_token_logps"], strict=True):
            np.testing.assert_allclose(scores, others, atol=1e-5)


@pytest.fixture
def scoring(base: Path, feedback: Path, tmp_path: Path) -> PrecomputeConfig:
    """Twenty rows in five shards."""
    return PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", rows_per_shard=4)


@pytest.fixture
def training(cache: Path, tmp_path: Path) -> TrainConfig:
    """Sixty updates with a checkpoint after every third one."""
    return TrainConfig(
        cache=cache,
        out=tmp_path / "run",
        batch_size=4,
        max_steps=60,
        learning_rate=3e-3,
        save_steps=3,
        resume=True,
        device="cpu",
    )


class TestKills:
    @pytest.mark.slow
    def test_ten_kills_change_no_score(self, base: Path, tmp_path: Path) -> None:
        data = write_feedback(tmp_path / "f.jsonl", 300, seed=3)
        config = PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "whole", rows_per_shard=2)
        precompute(config)
        config = replace(config, out=tmp_path / "killed", max_tokens=64)
        (config.out / ".merged").mkdir(parents=True)  # where a run with vLLM merges an adapter
        assert killed_runs("precompute", config, kills=10, seed=1, after=(0.05, 0.8)) == {"kills": 10}
        assert_same_cache(config.out, tmp_path / "whole")

    @pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_kill_before_a_change_to_the_disk_loses_no_score(self, scoring: PrecomputeConfig, every: int) -> None:
        """While a finished cache is updated: a row more, a label flipped."""
        scoring = replace(scoring, rows_per_shard=10)
        precompute(scoring)
        rows = chat_rows(21)
        rows[3]["label"] = not rows[3]["label"]
        data = write_rows(scoring.out.parent / "more.jsonl", rows)
        fresh = replace(scoring, data=str(data), out=scoring.out.parent / "fresh")
        precompute(fresh)
        again = replace(fresh, out=scoring.out.parent / "killed")
        found = killed_runs("precompute", again, begin_with=str(scoring.out), every=every)
        assert found["kills"] > 15 // every
        for folder in found["folders"]:
            assert_same_cache(Path(folder), fresh.out)

    @pytest.mark.slow
    def test_five_kills_change_no_weight_and_no_record(self, training: TrainConfig, tmp_path: Path) -> None:
        whole = train(replace(training, out=tmp_path / "whole"))
        assert killed_runs("train", training, kills=5, seed=1, after=(0.2, 0.8)) == {"kills": 5}
        assert_same_run(tmp_path / "run", whole)

    @pytest.mark.parametrize("every", [25, pytest.param(5, marks=pytest.mark.slow)])
    def test_a_kill_before_a_change_to_the_disk_loses_no_update(
        self, training: TrainConfig, tmp_path: Path, every: int
    ) -> None:
        """From one checkpoint to the next, the removal of the first, and the final model."""
        training = replace(training, max_steps=2, save_steps=1, training={"save_total_limit": 1})
        begun = train(replace(training, out=tmp_path / "begun", max_steps=1))
        whole = train(replace(training, out=shutil.copytree(begun, tmp_path / "whole")))
        found = killed_runs("train", training, begin_with=str(begun), every=every)
        assert found["kills"] > 50 // every
        for folder in found["folders"]:
            assert_same_run(Path(folder), whole)


def assert_same_run(one: Path, other: Path) -> None:
    """The same files, the same parameters bit for bit, and every step once in the metrics."""
    assert {str(p.relative_to(one)) for p in one.rglob("*")} == {str(p.relative_to(other)) for p in other.rglob("*")}
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    records, wanted = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)
    )
    assert [record["step"] for record in records] == [record["step"] for record in wanted]
    for record, expected_record in zip(records[:-1], wanted[:-1], strict=True):
        assert record["loss"] == expected_record["loss"]


@pytest.fixture
def largest_file(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[int], None]]:
    """Set the size beyond which the system refuses to write a file: a disk that is full, without filling one.

    (What is printed meanwhile stays in memory.)
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestFullDisk:
    def test_finished_shards_stay(
        self, scoring: PrecomputeConfig, largest_file: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[int] = []
        write = Store.write

        def then_full(store: Store, index: int, *arguments: Any) -> None:
            largest_file(1000 if len(written) == 2 else 10**9)
            write(store, index, *arguments)
            written.append(index)

        monkeypatch.setattr(Store, "write", then_full)
        with pytest.raises(CacheError, match=r"00002\.parquet: cannot be written: .*run again to continue"):
            precompute(scoring)
        assert {path.name for path in scoring.out.rglob("*")} == {"train", "00000.parquet", "00001.parquet"}
        largest_file(10**9)
        monkeypatch.undo()
        precompute(scoring)
        precompute(replace(scoring, out=scoring.out.parent / "fresh"))
        assert_same_cache(scoring.out, scoring.out.parent / "fresh")

    @pytest.mark.parametrize("size", [0, 30])
    def test_no_room_for_the_first_byte(
        self, scoring: PrecomputeConfig, largest_file: Callable[[int], None], size: int
    ) -> None:
        largest_file(size)
        with pytest.raises(CacheError, match="cannot be written"):
            precompute(scoring)
        largest_file(10**9)
        assert not scoring.out.exists()

    def test_no_room_for_the_manifest_of_an_update(
        self, scoring: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(scoring)
        data = write_rows(scoring.out.parent / "more.jsonl", chat_rows(21))
        full = OSError(errno.ENOSPC, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr(offline_kto.kto_core.cache.manifest, "write_json", Mock(side_effect=full))
            with pytest.raises(CacheError, match=r"manifest\.json: cannot be written: .*run again to continue"):
                precompute(replace(scoring, data=str(data)))
        with pytest.raises(CacheError, match="an unfinished cache"):
            read_manifest(scoring.out)
        precompute(replace(scoring, data=str(data)))
        assert read_manifest(scoring.out).run["scored_sequences"] == 0

    @pytest.mark.parametrize("size", [100, 2_000, 60_000])
    def test_the_checkpoint_before_stays(
        self, training: TrainConfig, largest_file: Callable[[int], None], size: int
    ) -> None:
        training = replace(training, max_steps=6)
        run = train(replace(training, max_steps=3))
        largest_file(size)
        with pytest.raises(TrainingError, match=r"cannot be written: .*--resume"):
            train(training)
        largest_file(10**9)
        assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-3"]
        assert not list(run.glob("_*")) + list(run.glob(".*"))
        whole = train(replace(training, out=run.parent / "whole"))
        assert_same_run(train(training), whole)


class Journal:
    """What a disk holds after a power cut: content that was flushed, under names whose folder was flushed since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed: set[int] = set()  # inodes
        self.unsafe: dict[Path, list[str]] = {}  # folder -> names changed since it was flushed
        self.lost: list[str] = []
        self.published: list[str] = []
        fsync, rename, unlink = os.fsync, os.replace, os.unlink

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            self.flushed.add(os.fstat(descriptor).st_ino)
            self.unsafe.pop(Path(os.readlink(f"/proc/self/fd/{descriptor}")), None)

        def renamed(source: Any, target: Any, **options: Any) -> None:
            source, target = Path(source), Path(target)
            files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
            self.lost += [f"{path} was not flushed" for path in files if path.stat().st_ino not in self.flushed]
            if target.name == "manifest.json" or target.name.startswith("checkpoint-"):
                waiting = {folder: names for folder, names in self.unsafe.items() if folder != target.parent}
                self.lost += [f"{folder}: {names} before {target.name}" for folder, names in waiting.items()]
                self.published.append(target.name)
            if "manifest.json" in self.unsafe.get(target.parents[1] if target.parent.name == "train" else target, []):
                self.lost.append(f"{target} changed while the old manifest could come back")
            rename(source, target, **options)
            self.unsafe.setdefault(target.parent, []).append(target.name)

        def removed(path: Any, **options: Any) -> None:
            unlink(path, **options)
            if Path(path).name == "manifest.json":
                self.unsafe.setdefault(Path(path).parent, []).append("manifest.json")

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "replace", renamed)
        monkeypatch.setattr(os, "rename", renamed)
        monkeypatch.setattr(os, "unlink", removed)


class TestPowerCuts:
    def test_the_manifest_never_reaches_the_disk_before_its_shards(
        self, scoring: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = Journal(monkeypatch)
        precompute(scoring)
        data = write_rows(scoring.out.parent / "more.jsonl", chat_rows(23))
        precompute(replace(scoring, data=str(data)))
        assert journal.published == ["manifest.json"] * 2
        assert journal.lost == []

    def test_a_checkpoint_never_reaches_the_disk_before_its_files_and_records(
        self, training: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = Journal(monkeypatch)
        run = train(replace(training, max_steps=6))
        assert journal.published == ["checkpoint-3", "checkpoint-6"]
        assert journal.lost == []
        assert (run / "metrics.jsonl").stat().st_ino in journal.flushed

    def test_the_journal_sees_what_is_not_flushed(
        self, scoring: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = Journal(monkeypatch)
        for module in (offline_kto.kto_core.durable_files, precompute_store):
            monkeypatch.setattr(module, "flush", lambda path: None)
        precompute(scoring)
        assert any("was not flushed" in line for line in journal.lost)
        assert any("before manifest.json" in line for line in journal.lost)


class TestPermissions:
    def test_a_folder_that_cannot_be_written(self, scoring: PrecomputeConfig, training: TrainConfig) -> None:
        """A place where even root cannot write."""
        with pytest.raises(CacheError, match=r"--out /proc/refs: cannot be written"):
            precompute(replace(scoring, out=Path("/proc/refs")))
        with pytest.raises(ConfigError, match=r"--out /proc/run: cannot be written"):
            train(replace(training, out=Path("/proc/run")))

    @pytest.mark.parametrize("error", [ConfigError, CacheError])
    def test_a_lock_that_cannot_be_made(self, error: type[KTOError]) -> None:
        with pytest.raises(error, match="/proc: cannot be written"), only_writer(Path("/proc"), error):
            pass


class TestOneWriter:
    def test_the_other_process_is_named(self, tmp_path: Path) -> None:
        second = contextlib.ExitStack()
        with (
            only_writer(tmp_path, CacheError),
            pytest.raises(CacheError, match=f"{os.getpid()} on {socket.gethostname()}"),
        ):
            second.enter_context(only_writer(tmp_path, CacheError))
        assert list(tmp_path.iterdir()) == []

    def test_a_process_that_is_refused_touches_nothing(self, tmp_path: Path) -> None:
        with opened_out(tmp_path / "refs") as (out, _):
            with pytest.raises(CacheError, match="is writing here"), opened_out(tmp_path / "refs"):
                pass
            assert (out / "train").is_dir()
        assert not out.exists()  # nothing was written

    def test_a_lock_is_not_written_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        (tmp_path / "refs").mkdir()
        (tmp_path / "refs" / ".lock").symlink_to(tmp_path / "mine")
        with pytest.raises(CacheError, match="cannot be written"), only_writer(tmp_path / "refs", CacheError):
            pass
        assert (tmp_path / "mine").read_text() == "mine"

    def test_a_lock_that_a_crash_left_does_not_block(self, tmp_path: Path) -> None:
        (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
        with only_writer(tmp_path, CacheError):
            assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"

    def test_a_lock_that_was_taken_away_under_the_waiting_one_counts_for_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between opening and locking the file, its holder removes it and a third process makes a new one."""
        (tmp_path / ".lock").write_text("")
        flock, calls = fcntl.flock, []

        def late(file: Any, operation: int) -> None:
            if not calls:
                (tmp_path / ".lock").unlink()
            calls.append(operation)
            flock(file, operation)

        monkeypatch.setattr(fcntl, "flock", late)
        with only_writer(tmp_path, CacheError):
            assert len(calls) == 2
            assert (tmp_path / ".lock").exists()

    def test_a_file_system_without_locks_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOTSUP, "not supported")))
        with only_writer(tmp_path, CacheError):
            assert "supports no locks" in capsys.readouterr().out
