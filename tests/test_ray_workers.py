"""Workers on a real Ray cluster of three nodes on this machine: a head without CPUs, and two nodes of one CPU each."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_engines import refused, waiting

from offline_kto.kto_core.errors import CacheError, ConfigError, ModelError
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.leader import Leader
from offline_kto.precompute.ray_workers import Opener, RayWorkers, _room, check_cluster
from offline_kto.precompute.run import precompute
from offline_kto.precompute.worker import RefusedError
from offline_kto.precompute.workers import Answer, Answered, Event, Ready, Task

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Nodes:
    """A cluster whose nodes are added from the main thread: a raylet ends with the thread that started it."""

    def __init__(self, **of_head: Any) -> None:
        from ray.cluster_utils import Cluster

        head = {**self.size(0), "include_dashboard": False, **of_head}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.all = [self.add() for _ in range(2)]

    @staticmethod
    def size(cpus: int) -> dict[str, int]:
        return {"num_cpus": cpus, "object_store_memory": 100 * 2**20}

    def add(self) -> Any:
        return self.cluster.add_node(**self.size(1))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        made = Nodes()
        yield made
        made.cluster.shutdown()
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


class Watched(Progress):
    """Remembers the most that it ever showed."""

    most = 0

    def add(self, count: int) -> None:
        super().add(count)
        self.most = max(self.most, self.done)


class Run:
    """A leader's run over some shards, with what happened in it."""

    def __init__(self, nodes: Nodes, opener: Opener, shards: int, *, most: int = 8) -> None:
        self.workers = RayWorkers(nodes.cluster.address, opener, gpus=0)
        self.finished: list[int] = []
        self.seconds = 0.0
        self._shards, self._most = shards, most
        self._on_finish: dict[int, Any] = {}

    def after(self, finished: int, act: Any) -> None:
        """Do something once so many shards are finished."""
        self._on_finish[finished] = act

    def run(self) -> Leader:
        with Watched("scoring", 20 * self._shards, "tokens") as progress:
            leader = Leader(
                self.workers,
                range(self._shards),
                "out",
                most=self._most,
                prepare=lambda index: set(),
                finish=self._finish,
                keep=lambda: None,
                tokens_of=lambda index: 20,
                progress=progress,
            )
            try:
                leader.run()
            finally:
                self.workers.stop()
        self.seconds, self.done, self.most_done = leader.seconds, progress.done, progress.most
        return leader

    def _finish(self, index: int, answer: Answer) -> None:
        self.finished.append(index)
        if act := self._on_finish.pop(len(self.finished), None):
            act()


def processes(folder: Path) -> set[int]:
    return {int(path.suffix[1:]) for path in folder.iterdir() if path.suffix != ".stopped"}


def begun(folder: Path) -> int:
    return len(list(folder.iterdir()))


def begun_by(process: int, folder: Path) -> int:
    return len(list(folder.glob(f"*.{process}")))


def test_workers_take_every_shard_once_and_report_tokens(nodes: Nodes, tmp_path: Path) -> None:
    run = Run(nodes, waiting(tmp_path), 8)
    leader = run.run()
    assert sorted(run.finished) == list(range(8))
    assert len(processes(tmp_path)) == 2
    assert begun(tmp_path) == 8
    assert run.done == run.most_done == 8 * 20
    assert sum(one["shards"] for one in leader.worker_fields()) == 8
    # 8 shards of a second: one worker alone would take 8 s.
    assert 4.0 <= run.seconds < 8.0


def test_the_number_of_workers_can_be_limited(nodes: Nodes, tmp_path: Path) -> None:
    Run(nodes, waiting(tmp_path, steps=4), 4, most=1).run()
    assert len(processes(tmp_path)) == 1


def test_the_shard_of_a_killed_worker_is_taken_by_another(
    nodes: Nodes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(nodes, waiting(tmp_path), 8)

    def kill_within_a_shard() -> None:
        victim = max(processes(tmp_path))
        before = begun_by(victim, tmp_path)
        while begun_by(victim, tmp_path) == before:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)

    run.after(2, threading.Thread(target=kill_within_a_shard).start)
    run.run()
    assert sorted(run.finished) == list(range(8))
    assert begun(tmp_path) == 9
    printed = "".join(capfd.readouterr())
    assert "raylet" not in printed, printed


def test_a_removed_node_is_left_and_an_added_one_used(
    nodes: Nodes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(nodes, waiting(tmp_path), 40)

    def remove() -> None:
        nodes.cluster.remove_node(nodes.all.pop(), allow_graceful=False)

    run.after(3, remove)
    run.after(6, lambda: nodes.all.append(nodes.add()))
    run.run()
    assert sorted(run.finished) == list(range(40))
    assert begun(tmp_path) in (40, 41)  # The node may have been between two shards.
    assert len(processes(tmp_path)) == 3
    printed = "".join(capfd.readouterr())
    assert "its node is gone" in printed
    assert "raylet" not in printed, printed


def test_a_shard_that_kills_its_workers_stops_the_run(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shard 1 was lost 3 times"):
        Run(nodes, waiting(tmp_path, steps=6, deadly=1), 12).run()
    assert len([path for path in tmp_path.iterdir() if path.stem == "1"]) == 3


def test_an_error_of_a_worker_is_told_once(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        Run(nodes, waiting(tmp_path, steps=400, broken=0), 6).run()
    assert str(caught.value) == "out: shard 0 cannot be written."
    # The other worker was asked to stop, and could write its scores.
    assert [path.suffix for path in tmp_path.iterdir()].count(".stopped") == 1


def test_workers_that_are_refused_by_all_nodes_end_the_run(nodes: Nodes) -> None:
    with pytest.raises(RefusedError, match="another model"):
        Run(nodes, refused, 2).run()


def test_the_handler_of_sigterm_is_ours_and_output_is_ours_again(nodes: Nodes, tmp_path: Path) -> None:
    def handler(number: int, frame: object) -> None: ...

    before, streams = signal.signal(signal.SIGTERM, handler), (sys.stdout, sys.stderr)
    try:
        workers = RayWorkers(nodes.cluster.address, waiting(tmp_path), gpus=0)
        try:
            assert signal.getsignal(signal.SIGTERM) is handler
            assert workers.log.exists()
        finally:
            workers.stop()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert not workers.log.exists()
        assert (sys.stdout, sys.stderr) == streams
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_that_died_between_shards_is_reported_when_it_is_given_one(nodes: Nodes, tmp_path: Path) -> None:
    workers = RayWorkers(nodes.cluster.address, waiting(tmp_path, steps=2), gpus=0)
    try:
        assert workers.grow(1, ()) == 1
        name = until(workers, Ready).worker
        workers.submit(name, Task(0, "out"))
        until(workers, Answered)
        os.kill(processes(tmp_path).pop(), signal.SIGKILL)
        workers.submit(name, Task(1, "out"))
        lost = next(iter(workers.wait(20.0)))
        assert (lost.worker, lost.is_node_alive) == (name, True)
        assert workers.grow(0, ()) == 0
    finally:
        workers.stop()


def until(workers: RayWorkers, kind: type[Event]) -> Any:
    """Wait for an event of a kind."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        for event in workers.wait(1.0):
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__} came")


def test_a_cache_from_a_cluster_equals_that_of_one_process(
    nodes: Nodes, base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "one", rows_per_shard=5, device="cpu")
    precompute(one)
    precompute(dataclasses.replace(one, out=tmp_path / "many", cluster=nodes.cluster.address))
    shards = sorted(path.name for path in (tmp_path / "one/train").iterdir())
    assert len(shards) >= 4
    for name in shards:
        assert (tmp_path / "many/train" / name).read_bytes() == (tmp_path / "one/train" / name).read_bytes()
    found = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "many")]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    assert sum(one["shards"] for one in found[1]["run"]["workers"]) == len(shards)


def test_a_killed_command_continues_with_the_shards_that_are_left(
    nodes: Nodes, base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = {"model": str(base), "data": str(feedback), "rows_per_shard": 1, "device": "cpu"}
    program = "from offline_kto.precompute.cli import precompute; precompute()"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    out = tmp_path / "many"
    command = [sys.executable, "-c", program, *words, f"--out={out}", f"--cluster={nodes.cluster.address}"]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as killed:
        while killed.poll() is None and not list(out.glob("train/*.parquet")):
            time.sleep(0.002)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL, log.read_text()
    assert not (out / "manifest.json").exists()
    precompute(PrecomputeConfig(**given, out=tmp_path / "one"))
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True)
    assert "resuming " in log.read_text()
    shards = sorted((tmp_path / "one/train").iterdir())
    assert len(shards) == 20
    for shard in shards:
        assert (out / "train" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1:1", "refused"), ("no-such-host.invalid:1", "")])
def test_an_address_without_a_cluster_is_refused(address: str, why: str) -> None:
    pytest.importorskip("ray")
    streams = sys.stdout, sys.stderr
    with pytest.raises(ConfigError, match=f"--cluster {address}: no Ray cluster can be reached there: .*{why}"):
        RayWorkers(address, waiting(Path()), gpus=0)
    assert (sys.stdout, sys.stderr) == streams
    with pytest.raises(ConfigError, match=f"--cluster {address}: .*{why}.*[.] Start one with"):
        check_cluster(address)  # what kto-precompute does before it reads the feedback


def test_workers_fit_by_gpus_or_by_cpus() -> None:
    node = {"CPU": 6.0, "GPU": 8.0}
    assert [_room(node, gpus) for gpus in (0, 1, 2, 3)] == [6, 8, 4, 2]
    assert _room({"CPU": 6.0}, 1) == 0
