"""Caches behind a URL: written to and read from a real S3 server, and fsspec's memory store for what is hard to time."""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forks
import fsspec
import numpy as np
import pytest
from feedback_files import chat_rows, write_feedback, write_rows
from moto.server import ThreadedMotoServer
from test_crashes import assert_same_cache, killed_runs
from test_precompute import count_scored

import offline_kto.kto_core.cache.remote_lock
import offline_kto.kto_core.cache.remote_shards
import offline_kto.kto_core.durable_files
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.cache.remote_cache import begun_downloads, local_copy, remote_manifest
from offline_kto.kto_core.cache.remote_folder import Remote
from offline_kto.kto_core.cache.remote_lock import RemoteLock
from offline_kto.kto_core.errors import CacheError, ConfigError, PairingError
from offline_kto.kto_core.locations import to_location
from offline_kto.kto_core.options import resolve
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import head, info, verify
from offline_kto.precompute.run import precompute
from offline_kto.precompute.store import Store
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train

URL = "memory://team/refs"
SECRET = "a-very-secret-key"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads go here; locks are watched for half a second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(offline_kto.kto_core.cache.remote_lock, "REFRESH_SECONDS", 0.1)
    monkeypatch.setattr(offline_kto.kto_core.cache.remote_lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(offline_kto.kto_core.cache.remote_shards, "_SECONDS_BETWEEN", 0.01)
    return tmp_path / "home"


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    with contextlib.suppress(FileNotFoundError):
        files.rm("/team", recursive=True)


@pytest.fixture
def config(base: Path, feedback: Path) -> PrecomputeConfig:
    return PrecomputeConfig(model=str(base), data=str(feedback), out=URL, rows_per_shard=4)


def names(files: Any, root: str = "/team/refs") -> set[str]:
    return {path.removeprefix(root).lstrip("/") for path in files.find(root)}


def shards(count: int) -> set[str]:
    return {f"train/{i:05d}.parquet" for i in range(count)}


def noted(name: str, changes: list[tuple[str, str]]) -> Any:
    """A method of `Remote` that also writes down what it changes."""
    change = getattr(Remote, name)

    def noting(self: Remote, *paths: Any) -> None:
        changes.append((name, str(paths[-1])))
        change(self, *paths)

    return noting


def fetch(files: Any, root: str, folder: Path) -> Path:
    """A copy of a remote folder."""
    for name in names(files, root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{root}/{name}", str(folder / name))
    return folder


class TestWriting:
    def test_a_remote_cache_is_the_local_one(self, config: PrecomputeConfig, tmp_path: Path, memory: Any) -> None:
        precompute(config)
        assert names(memory) == {"manifest.json", *shards(5)}
        precompute(replace(config, out=tmp_path / "local"))
        assert_same_cache(fetch(memory, "/team/refs", tmp_path / "fetched"), tmp_path / "local")

    @pytest.mark.slow
    def test_workers_write_the_same_cache(
        self, config: PrecomputeConfig, tmp_path: Path, memory: Any, home: Path
    ) -> None:
        config = replace(config, device="cpu")
        precompute(replace(config, workers=2))
        assert names(memory) == {"manifest.json", *shards(5)}
        precompute(replace(config, out=tmp_path / "local"))
        assert_same_cache(fetch(memory, "/team/refs", tmp_path / "fetched"), tmp_path / "local")
        assert [path for path in home.rglob("*") if path.is_file()] == []

    def test_nothing_stays_on_this_machine(self, config: PrecomputeConfig, home: Path, memory: Any) -> None:
        precompute(config)
        assert [path for path in home.rglob("*") if path.is_file()] == []

    def test_the_same_data_again_write_nothing(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(config)
        before = {name: memory.cat_file(f"/team/refs/{name}") for name in names(memory)}
        calls = count_scored(monkeypatch)
        precompute(config)
        assert calls == []
        assert {name: memory.cat_file(f"/team/refs/{name}") for name in names(memory)} == before

    def test_changed_data_cost_what_is_new_and_the_old_manifest_goes_first(
        self, config: PrecomputeConfig, tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(config)
        data = write_rows(tmp_path / "more.jsonl", chat_rows(22))
        changes: list[tuple[str, str]] = []
        for name in ("upload", "copy", "remove"):
            monkeypatch.setattr(Remote, name, noted(name, changes))
        config = replace(config, data=str(data))
        precompute(config)
        changes = [change for change in changes if change[1] != ".lock"]  # a slow machine refreshes it, too
        place = changes.index(("remove", "manifest.json"))
        assert all(name.startswith(".next/") for _, name in changes[:place])
        assert {name for what, name in changes[place:] if what == "copy"} == shards(6)  # not uploaded twice
        assert changes[-1] == ("upload", "manifest.json")
        precompute(replace(config, out=tmp_path / "local"))
        assert_same_cache(fetch(memory, "/team/refs", tmp_path / "fetched"), tmp_path / "local")

    def test_what_was_finished_survives_this_machine(
        self, config: PrecomputeConfig, memory: Any, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Stopped after three shards, and gone on with from another machine."""
        write = Store.write

        def stopping(store: Store, index: int, *arguments: Any) -> None:
            if index == 3:
                raise KeyboardInterrupt
            write(store, index, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", stopping)
            with pytest.raises(KeyboardInterrupt):
                precompute(config)
        of_the_fourth = {name for name in names(memory) if name.startswith(".parts/")}
        assert len(of_the_fourth) == 1
        assert names(memory) - of_the_fourth == shards(3)
        with pytest.raises(CacheError, match="memory://team/refs: an unfinished cache"):
            verify(URL)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
        calls = count_scored(monkeypatch)
        precompute(config)
        whole = read_manifest(local_copy(URL)).run
        assert whole["reused_sequences"] > 0
        assert sum(calls) == whole["scored_sequences"]
        assert not of_the_fourth & names(memory)

    def test_a_store_that_fails_loses_no_score(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The shard that could not be sent is still here, and its scores are used."""
        upload = Remote.upload

        def failing(self: Remote, path: Path, name: str) -> None:
            if name.endswith("00002.parquet"):
                with self._asking():
                    raise ConnectionResetError("the other side is gone")
            upload(self, path, name)

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "upload", failing)
            with pytest.raises(CacheError, match="memory://team/refs: ConnectionResetError: the other side is gone"):
                precompute(config)
        calls = count_scored(monkeypatch)
        precompute(config)
        run = read_manifest(local_copy(URL)).run
        assert sum(calls) == run["scored_sequences"]
        # Twelve rows were scored, most of them with a completion of another row.
        assert run["reused_sequences"] >= 24
        assert names(memory) == {"manifest.json", *shards(5)}

    def test_something_else_there_is_not_touched(self, config: PrecomputeConfig, memory: Any) -> None:
        memory.pipe_file("/team/refs/thesis.docx", b"years of work")
        with pytest.raises(CacheError, match=r"memory://team/refs: contains thesis\.docx.*Choose an empty folder"):
            precompute(config)
        assert names(memory) == {"thesis.docx"}

    def test_another_reference_is_refused_there_too(
        self, config: PrecomputeConfig, memory: Any, tmp_path: Path
    ) -> None:
        precompute(config)
        with pytest.raises(CacheError) as refused:
            precompute(replace(config, max_length=64))
        assert "memory://team/refs: contains a cache with other settings" in str(refused.value)
        assert str(tmp_path) not in str(refused.value)

    def test_a_dry_run_writes_nothing(self, config: PrecomputeConfig, memory: Any) -> None:
        precompute(replace(config, dry_run=True))
        assert names(memory) == set()


class TestReading:
    def test_training_from_a_url_is_training_from_a_folder(
        self, config: PrecomputeConfig, tmp_path: Path, memory: Any
    ) -> None:
        precompute(config)
        precompute(replace(config, out=tmp_path / "local"))
        options = TrainConfig(cache=URL, out=tmp_path / "remote", max_steps=2, batch_size=8, device="cpu", save_steps=0)
        train(options)
        train(replace(options, cache=tmp_path / "local", out=tmp_path / "run", eval_cache=URL))
        losses = [
            [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
            for run in (tmp_path / "remote", tmp_path / "run")
        ]
        np.testing.assert_allclose(*losses, atol=1e-6)
        assert f"cache: {URL}" in (tmp_path / "remote/config.yaml").read_text()

    def test_a_second_run_fetches_nothing(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(config)
        folder = local_copy(URL)
        monkeypatch.setattr(Remote, "download", lambda *arguments, **options: pytest.fail("fetched again"))
        assert local_copy(URL) == folder

    @pytest.mark.parametrize("damage", ["flipped", "cut off", "missing"])
    def test_a_damaged_download_is_fetched_again(self, damage: str, config: PrecomputeConfig, memory: Any) -> None:
        precompute(config)
        shard = local_copy(URL) / "train/00001.parquet"
        content = shard.read_bytes()
        if damage == "missing":
            shard.unlink()
        else:
            shard.write_bytes(bytes([content[0] ^ 1]) + content[1:] if damage == "flipped" else content[:100])
        verify(URL)
        assert shard.read_bytes() == content

    def test_verify_looks_at_the_remote_files_themselves(self, config: PrecomputeConfig, memory: Any) -> None:
        precompute(config)
        verify(URL)
        path = "/team/refs/train/00001.parquet"
        content = memory.cat_file(path)
        memory.pipe_file(path, content[:-9] + b"x" + content[-8:])
        local_copy(URL)  # what training reads is what was verified
        with pytest.raises(CacheError, match=r"memory://team/refs/train/00001\.parquet: "):
            verify(URL)

    def test_a_shard_that_is_not_in_the_manifest_is_named(self, config: PrecomputeConfig, memory: Any) -> None:
        precompute(config)
        memory.pipe_file("/team/refs/train/zz.parquet", memory.cat_file("/team/refs/train/00000.parquet"))
        with pytest.raises(CacheError, match=r"refs/train/zz\.parquet: in the folder, but not in the manifest"):
            verify(URL)

    def test_a_user_without_a_home_is_told_what_to_set(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(config)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
        for use in (verify, lambda url: precompute(replace(config, limit=8))):
            with pytest.raises(CacheError, match="Set XDG_CACHE_HOME to another"):
                use(URL)

    def test_a_full_disk_here_is_not_blamed_on_the_store(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(config)
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(offline_kto.kto_core.durable_files, "flush", Mock(side_effect=full))
        for use in (verify, lambda url: precompute(replace(config, limit=8))):
            with pytest.raises(CacheError, match=r"local folder .* No space left on device.*XDG_CACHE_HOME"):
                use(URL)

    @pytest.mark.parametrize("size", [0, 100, None])
    def test_a_damaged_remote_is_refused_by_its_url(
        self, size: int | None, config: PrecomputeConfig, memory: Any, tmp_path: Path
    ) -> None:
        precompute(config)
        path = "/team/refs/train/00001.parquet"
        content = memory.cat_file(path)
        memory.pipe_file(path, content[:size] if size is not None else content[:-9] + b"x" + content[-8:])
        for use in (verify, lambda cache: train(TrainConfig(cache=cache, out=tmp_path / "run", device="cpu"))):
            with pytest.raises(CacheError, match=r"memory://team/refs/train/00001\.parquet: ") as refused:
                use(URL)
            assert str(tmp_path) not in str(refused.value)

    def test_what_changed_there_is_seen_at_once(self, config: PrecomputeConfig, memory: Any, tmp_path: Path) -> None:
        precompute(config)
        first = local_copy(URL)
        precompute(replace(config, data=str(write_feedback(tmp_path / "more.jsonl", 23))))
        assert read_manifest(local_copy(URL)).rows == 23
        assert read_manifest(first).rows == 20

    def test_it_can_be_looked_into(
        self, config: PrecomputeConfig, memory: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        precompute(config)
        capsys.readouterr()
        print(*info(URL), *head(URL, rows=1, model=None), sep="\n")
        printed = capsys.readouterr().out
        assert "20 (10 desirable, 10 undesirable)" in printed
        assert "y'  (" in printed

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            (URL, r"memory://team/refs: not a reference cache \(no manifest.json\)"),
            ("s3://", "s3://: names no folder"),
            ("nosuch://team/refs", "nosuch://team/refs: .*nosuch"),
            ("s3://key:secret@bucket/refs", "^s3://bucket/refs: remove the credentials from the URL"),
            ("https://host/refs?signature=abc", "^https://host/refs: remove the credentials from the URL"),
        ],
    )
    def test_what_is_no_cache_is_refused(self, url: str, words: str, memory: Any) -> None:
        for use in (verify, local_copy):
            with pytest.raises(CacheError, match=words) as refused:
                use(url)
            assert "secret" not in str(refused.value)
            assert "abc" not in str(refused.value)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(CacheError, match=r"s3://bucket/refs: .*pip install 's3fs'"):
            local_copy("s3://bucket/refs")

    def test_a_name_that_leaves_the_folder_is_not_fetched(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Remote, "files", lambda self: {"train/../../../train/x.parquet": 1})
        with pytest.raises(CacheError, match="is outside the cache folder"):
            precompute(config)


class TestDownloads:
    """Several shards at a time, each verified before it gets its name."""

    @pytest.fixture
    def precomputed(self, config: PrecomputeConfig, memory: Any) -> Any:
        precompute(config)
        return memory

    def test_shards_come_together_and_each_once(self, precomputed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Four processes of a machine, and the background download of one of them, share one copy."""
        together = threading.Barrier(5)  # a download that waits for another one would never pass
        asked: list[str] = []

        def waiting(self: Remote, name: str, path: Path, **options: Any) -> None:
            asked.append(name)
            together.wait(timeout=30)
            download(self, name, path, **options)

        download = Remote.download
        monkeypatch.setattr(Remote, "download", waiting)
        with begun_downloads(URL, None), ThreadPoolExecutor(4) as pool:
            folders = [task.result() for task in [pool.submit(local_copy, URL) for _ in range(4)]]
        assert len({*folders}) == 1
        assert sorted(asked) == sorted(shards(5))
        assert {path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*.parquet")} == shards(5)

    def test_one_that_breaks_off_is_tried_again(self, precomputed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        failing = broken(monkeypatch, "train/00002.parquet", times=2)
        read_manifest(local_copy(URL))
        assert failing.count("train/00002.parquet") == 3

    def test_one_that_never_comes_is_named_and_the_others_stay(
        self, precomputed: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing = broken(monkeypatch, "train/00004.parquet", times=99)
        with pytest.raises(CacheError, match=r"^memory://team/refs/train/00004\.parquet: ConnectionResetError: gone"):
            local_copy(URL)
        assert failing.count("train/00004.parquet") == 3
        there = {path.name for path in home.rglob("*") if path.is_file() and path.name != ".lock"}
        assert there == {f"{i:05d}.parquet" for i in range(4)}  # no part of the fifth, and no manifest

    def test_a_missing_one_is_not_asked_for_again(self, precomputed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = broken(monkeypatch, "none", times=0)
        precomputed.rm("/team/refs/train/00001.parquet")
        with pytest.raises(CacheError, match=r"^memory://team/refs/train/00001\.parquet: FileNotFoundError"):
            local_copy(URL)
        assert asked.count("train/00001.parquet") == 1

    def test_damage_on_the_way_is_found_before_the_file_has_its_name(
        self, precomputed: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = "/team/refs/train/00001.parquet"
        content = precomputed.cat_file(path)
        precomputed.pipe_file(path, content[:-9] + b"x" + content[-8:])
        with pytest.raises(CacheError, match=r"refs/train/00001\.parquet: its content changed .*sha256 differs"):
            local_copy(URL)
        assert not [*home.rglob("00001.parquet*")]
        assert not [*home.rglob(".0*")]

    def test_a_cache_that_is_updated_meanwhile(
        self, precomputed: Any, config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = precomputed.cat_file("/team/refs/manifest.json")
        precompute(replace(config, data=str(write_feedback(tmp_path / "other.jsonl", 20, seed=5))))
        read, first = Remote.read, [manifest]
        monkeypatch.setattr(Remote, "read", lambda self, name: first.pop() if first else read(self, name))
        with pytest.raises(CacheError, match=r"memory://team/refs: was updated while it was read\. Start again"):
            local_copy(URL)

    def test_an_interrupt_ends_at_once_and_leaves_no_parts(
        self, precomputed: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Let a store send byte after byte, for ever."""

        def trickling(files: Any, path: str, target: str, callback: Any) -> None:
            with open(target, "wb") as file:
                while True:
                    file.write(b"x")
                    callback.relative_update(1)
                    time.sleep(0.01)

        monkeypatch.setattr(type(precomputed), "get_file", trickling)
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()  # as Ctrl-C, to the process
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt), begun_downloads(URL):
            local_copy(URL)
        assert time.monotonic() - started < 5
        assert [path for path in home.rglob("*") if path.is_file()] == []

    def test_what_a_killed_process_left_is_removed(self, precomputed: Any) -> None:
        folder = local_copy(URL)
        left = folder / "train/.00003.parquet.4711.tmp"
        left.write_bytes(b"half")
        local_copy(URL)
        assert not left.exists()

    def test_a_sweep_reads_the_manifest_alone(self, precomputed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Remote, "download", lambda *arguments, **options: pytest.fail("downloaded"))
        assert remote_manifest(URL).rows == 20
        with pytest.raises(CacheError, match=r"memory://team/none: not a reference cache"):
            remote_manifest("memory://team/none")


def broken(monkeypatch: pytest.MonkeyPatch, name: str, *, times: int) -> list[str]:
    """Let the first downloads of a file fail halfway. Returns: the names that are asked for."""
    asked: list[str] = []
    files = type(fsspec.filesystem("memory"))
    get_file = files.get_file

    def getting(self: Any, path: str, target: str, callback: Any) -> None:
        asked.append(path.removeprefix("/team/refs/"))
        if asked[-1] == name and asked.count(name) <= times:
            Path(target).write_bytes(b"half")
            callback.relative_update(4)
            raise ConnectionResetError("gone")
        get_file(self, path, target, callback=callback)

    monkeypatch.setattr(files, "get_file", getting)
    return asked


class TestOneWriter:
    def test_the_other_one_is_named(self, memory: Any) -> None:
        with RemoteLock(Remote(URL)), pytest.raises(CacheError, match=rf"process {os.getpid()} on .* is writing here"):
            RemoteLock(Remote(URL)).__enter__()
        assert names(memory) == set()

    def test_it_is_named_before_the_feedback_is_read(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("offline_kto.precompute.pipeline.make_plan", pytest.fail)
        with RemoteLock(Remote(URL)), pytest.raises(CacheError, match=rf"process {os.getpid()} on .* is writing here"):
            precompute(config)

    def test_a_lock_whose_owner_died_is_taken_over(self, memory: Any, capsys: pytest.CaptureFixture[str]) -> None:
        memory.pipe_file("/team/refs/.lock", json.dumps({"holder": "process 7 on \x1b[2Jmars", "token": "x"}).encode())
        with RemoteLock(Remote(URL)):
            assert names(memory) == {".lock"}
        assert "process 7 on \\x1b[2Jmars has ended; continuing" in capsys.readouterr().out
        assert names(memory) == set()

    def test_a_lock_that_is_let_go_meanwhile_is_free(self, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter([b"{}", None])
        read = Remote.read
        monkeypatch.setattr(Remote, "read", lambda self, name: next(answers, b"") or read(self, name))
        with RemoteLock(Remote(URL)):
            assert names(memory) == {".lock"}

    def test_a_writer_that_lost_its_lock_writes_no_more(
        self, config: PrecomputeConfig, memory: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Let another machine take the lock of a writer that seemed dead, as one that slept does."""
        write = Store.write

        def overtaken(store: Store, index: int, *arguments: Any) -> None:
            if index == 2:
                memory.pipe_file("/team/refs/.lock", json.dumps({"holder": "process 7 on mars", "token": "x"}).encode())
            write(store, index, *arguments)

        monkeypatch.setattr(Store, "write", overtaken)
        with pytest.raises(CacheError, match="memory://team/refs: process 7 on mars is writing here"):
            precompute(config)
        assert names(memory) == {".lock", *shards(2)}


class TestS3:
    """moto's server, over HTTP, with credentials from the environment."""

    @pytest.fixture
    def bucket(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.makedirs("bucket", exist_ok=True)
        yield files
        files.rm("bucket", recursive=True)
        server.stop()

    def test_the_three_commands(self, bucket: Any, base: Path, feedback: Path, tmp_path: Path) -> None:
        url = "s3://bucket/team/refs"
        scoring = [
            "offline_kto.precompute.cli import precompute",
            "--model",
            str(base),
            "--data",
            str(feedback),
            "--out",
            url,
        ]
        training = [
            "offline_kto.train.cli import train",
            "--cache",
            url,
            "--out",
            str(tmp_path / "run"),
            "--max-steps",
            "2",
        ]
        looking = ["offline_kto.precompute.cli import cache", "verify", url]
        said = ""
        for imported, *arguments in (scoring, looking, training):
            code = f"from {imported}; {imported.split()[-1]}()"
            done = forks.run(code, *arguments)
            assert done.returncode == 0, done.stderr[-3000:]
            said += done.stdout + done.stderr
        assert "20 rows in 1 shard, all match the manifest" in said
        assert names(bucket, "bucket/team/refs") == {"manifest.json", "train/00000.parquet"}
        written = [bucket.cat_file(path) for path in bucket.find("bucket")]
        written += [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
        for text in [said.encode(), *written]:
            assert SECRET.encode() not in text
            assert b"AKIAEXAMPLE" not in text

    @pytest.mark.slow
    def test_killed_writers_lose_nothing(self, bucket: Any, base: Path, tmp_path: Path) -> None:
        data = write_feedback(tmp_path / "f.jsonl", 60, seed=3)
        config = PrecomputeConfig(model=str(base), data=str(data), out="s3://bucket/refs", rows_per_shard=1)
        assert killed_runs("precompute", config, kills=3, seed=2, after=(1.2, 1.8), stale_after=0.6) == {"kills": 3}
        assert names(bucket, "bucket/refs") == {"manifest.json", *shards(60)}
        precompute(replace(config, out=tmp_path / "local"))
        assert_same_cache(fetch(bucket, "bucket/refs", tmp_path / "fetched"), tmp_path / "local")

    @pytest.mark.parametrize("url", ["s3://no-such-bucket/refs", "s3://bucket/refs"])
    def test_a_store_that_cannot_be_used_is_one_message(
        self, url: str, bucket: Any, config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("offline_kto.precompute.pipeline.make_plan", pytest.fail)  # it is told before
        if url == "s3://bucket/refs":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(CacheError, match=f"{url}: .*") as refused:
            precompute(replace(config, out=url))
        assert SECRET not in str(refused.value)


def test_locations_in_options(tmp_path: Path) -> None:
    """A URL keeps its slashes, in YAML and on the command line; a local URL is a path."""
    assert to_location("s3://bucket//refs/") == "s3://bucket//refs/"
    assert to_location("file:///tmp/refs") == Path("/tmp/refs")
    assert to_location("refs/") == Path("refs")
    (tmp_path / "c.yaml").write_text("cache: s3://bucket/refs\neval_cache: refs/held\n")
    config = resolve(TrainConfig, {}, yaml_path=tmp_path / "c.yaml")
    assert (config.cache, config.eval_cache) == ("s3://bucket/refs", tmp_path / "refs/held")
    (tmp_path / "c.yaml").write_text("cache: 3\n")
    with pytest.raises(ConfigError, match="expected a path or text"):
        resolve(TrainConfig, {}, yaml_path=tmp_path / "c.yaml")


def test_one_prompt_only_is_refused_before_anything_is_written(
    config: PrecomputeConfig, memory: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "the same", "completion": f"answer {i}", "label": True} for i in range(4)]
    with pytest.raises(PairingError):
        precompute(replace(config, data=str(write_rows(tmp_path / "f.jsonl", rows)), one_class=True))
    assert names(memory) == set()
