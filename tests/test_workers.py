"""Stage 1 with several workers: real child processes, killed with real signals."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
from feedback_files import chat_rows, write_rows
from models import save_tiny

import offline_kto.precompute.engines.child_process as process
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import CacheError, ConfigError, KTOError, ModelError
from offline_kto.kto_core.hashing import sequence_id
from offline_kto.kto_core.lock import only_writer
from offline_kto.precompute import worker
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import verify
from offline_kto.precompute.local_workers import LocalWorkers
from offline_kto.precompute.parts import ShardScores
from offline_kto.precompute.run import precompute
from offline_kto.precompute.worker import RefusedError

SCORE = "from offline_kto.precompute.cli import precompute; precompute()"

# Beginnings of a worker's program.
SLOWLY = (
    "import time; from offline_kto.kto_core.scoring.passes import ScoringPasses as P; real = P._forward\n"
    "def forward(*a):\n    time.sleep(0.05)\n    return real(*a)\nP._forward = forward\n"
)
SOON = "import offline_kto.precompute.parts as p; p.SECONDS_BETWEEN_PARTS = 0.0\n"


AT_ONCE = (
    "import os, signal; from offline_kto.kto_core.scoring.passes import ScoringPasses as P\n"
    "def forward(*a):\n    print('near its end', flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    "P._forward = forward\n"
)


def killed_in_the_middle(flag: Path) -> str:
    """The first of all workers that has written three parts kills itself."""
    return SOON + (
        "import os, signal; from offline_kto.precompute.parts import ShardScores as S; real = S.flush; made = []\n"
        "def flush(self):\n    real(self)\n    made.append(1)\n"
        f"    if len(made) > 2 and not os.path.exists({str(flag)!r}):\n"
        f"        open({str(flag)!r}, 'w').close()\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "S.flush = flush\n"
    )


@pytest.fixture
def workers_begin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts code before the program of each worker."""
    program = process._CHILD

    def begin(code: str) -> None:
        assert "{" not in code
        monkeypatch.setattr(process, "_CHILD", code + program)

    return begin


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, base: Path) -> PrecomputeConfig:
    """Scored by one process into `config.out`; many of its sequences are needed by several shards."""
    folder = tmp_path_factory.mktemp("workers")
    rows = chat_rows(40, seed=5)
    again = [{**row, "label": not row["label"]} for row in rows[::3]]
    data = write_rows(folder / "f.jsonl", [*rows, *again, *rows[1::4]])
    config = PrecomputeConfig(
        model=str(base), data=str(data), out=folder / "one", rows_per_shard=11, device="cpu", max_tokens=64
    )
    precompute(config)
    return config


def options(config: PrecomputeConfig, out: Path) -> list[object]:
    return [
        *("--model", config.model, "--data", config.data, "--out", out, "--device", "cpu"),
        *("--rows-per-shard", config.rows_per_shard, "--max-tokens", config.max_tokens),
    ]


def assert_same_bytes(config: PrecomputeConfig, out: Path) -> None:
    """Compare a cache with that of one process: every byte of every shard, and what the manifest says of the content."""
    one, other = read_manifest(config.out), read_manifest(out)
    assert other.fingerprint == one.fingerprint
    assert other.shards == one.shards
    for shard in one.shards:
        assert (out / shard["file"]).read_bytes() == (config.out / shard["file"]).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train"]


def sequences_of(config: PrecomputeConfig) -> list[set[str]]:
    """Return the sequences of each shard."""
    return [
        {
            sequence_id(np.array(row["prompt_ids"]), np.array(y))
            for row in pq.read_table(path).to_pylist()
            for y in (row["completion_ids"], *row["kl_completion_ids"])
        }
        for path in sorted(config.out.glob("train/*.parquet"))
    ]


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"local_workers" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_the_data_of_these_tests_need_sequences_in_several_shards(config: PrecomputeConfig) -> None:
    shards = sequences_of(config)
    assert len(shards) == 6
    assert sum(map(len, shards)) > len(set().union(*shards)) + 10


def test_two_workers_score_what_one_process_scores(
    config: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two"
    precompute(replace(config, out=out, workers=2))
    assert_same_bytes(config, out)
    verify(out)
    one, two = read_manifest(config.out).run, read_manifest(out).run
    for name in ("scored_sequences", "reused_sequences", "tokens"):  # each sequence once
        assert two[name] == one[name]
    assert "workers" not in one
    assert sum(worker["shards"] for worker in two["workers"]) == 6
    assert capsys.readouterr().out.count("lost ") == 0
    precompute(replace(config, out=out, workers=2))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(
    config: PrecomputeConfig,
    tmp_path: Path,
    workers_begin: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    workers_begin(killed_in_the_middle(tmp_path / "flag"))
    out = tmp_path / "two"
    precompute(replace(config, out=out, workers=2))
    printed = " ".join(capsys.readouterr().out.split())
    assert "lost the worker of shard" in printed
    assert "(SIGKILL: perhaps the system was out of memory); another takes it." in printed
    assert "Its log" not in printed  # which is empty
    assert_same_bytes(config, out)
    # What it had scored was in parts.
    assert read_manifest(out).run["scored_sequences"] < read_manifest(config.out).run["scored_sequences"]


@pytest.mark.slow
def test_a_shard_that_ends_its_workers_stops_the_run(
    config: PrecomputeConfig, tmp_path: Path, workers_begin: Callable[[str], None]
) -> None:
    workers_begin(AT_ONCE)
    with pytest.raises(ModelError, match=r"^shard \d was lost 3 times.*SIGKILL.* Its log: /") as caught:
        precompute(replace(config, out=tmp_path / "two", workers=2))
    assert Path(str(caught.value).split("Its log: ")[1]).exists()
    assert not (tmp_path / "two/manifest.json").exists()
    assert children(os.getpid()) == []


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_leader_that_is_stopped_leaves_a_cache_that_the_same_command_finishes(
    config: PrecomputeConfig, tmp_path: Path, by: signal.Signals
) -> None:
    out = tmp_path / "refs"
    before = f"import offline_kto.precompute.engines.child_process as p; p._CHILD = {SOON + SLOWLY!r} + p._CHILD\n"
    leader = forks.Fork(before + SCORE, *options(config, out), "--workers", 2)
    deadline = time.monotonic() + 200
    while len(list(out.glob("train/[!.]*.parquet"))) < 2:
        assert time.monotonic() < deadline
        assert leader.is_running()
        time.sleep(0.02)
    workers = children(leader.pids[0])
    assert len(workers) == 2
    leader.kill(by=by)
    done = leader.wait(100)
    assert done.returncode == (143 if by == signal.SIGTERM else -by)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if by == signal.SIGTERM:
        assert "kept  " in done.stdout
        assert "Traceback" not in done.stderr
    assert not (out / "manifest.json").exists()
    finished = len([*out.glob("train/[!.]*.parquet"), *out.glob(".done/*/[!.]*.parquet")])
    done = forks.run(SCORE, *options(config, out), "--workers", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{finished} of 6 shards are complete" in done.stdout
    assert_same_bytes(config, out)
    assert read_manifest(out).run["scored_sequences"] < read_manifest(config.out).run["scored_sequences"]


def test_workers_that_start_are_ended_at_once(
    config: PrecomputeConfig, tmp_path: Path, workers_begin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that imports its libraries does not notice that it is told to end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    workers_begin("import time; time.sleep(3600)\n")
    workers = LocalWorkers(config, str(tmp_path), [None, None])
    assert workers.grow(2, ()) == 2
    waited: list[float] = []
    end = process.ChildProcess.end
    monkeypatch.setattr(process.ChildProcess, "end", lambda child, seconds: (waited.append(seconds), end(child, 0.0)))
    workers.stop()
    assert waited[:2] == [0.0, 0.0]
    assert list(tmp_path.glob("*.log")) == []


def test_a_run_that_another_one_locks_out_is_told_before_the_feedback_is_read(
    config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline_kto.precompute.pipeline.make_plan", pytest.fail)
    with only_writer(tmp_path, CacheError), pytest.raises(CacheError, match=r"is writing here\. Wait for it"):
        precompute(replace(config, out=tmp_path))


@pytest.mark.slow
def test_what_a_worker_cannot_do_is_told_once(config: PrecomputeConfig, tmp_path: Path) -> None:
    failing = (
        "import torch; from offline_kto.kto_core.scoring.passes import ScoringPasses as P\n"
        "def forward(*a):\n    raise torch.OutOfMemoryError('simulated')\nP._forward = forward\n"
    )
    before = f"import offline_kto.precompute.engines.child_process as p; p._CHILD = {failing!r} + p._CHILD\n"
    done = forks.run(before + SCORE, *options(config, tmp_path / "refs"), "--workers", 2)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Out of memory on a single sequence" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_worker_with_another_library_is_refused_by_its_machine(
    config: PrecomputeConfig, tmp_path: Path, workers_begin: Callable[[str], None]
) -> None:
    workers_begin(
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '9.9.9' if name == 'transformers' else real(name)\n"
    )
    with pytest.raises(
        RefusedError, match=r"would compute other scores[^:]*:\n  transformers: .* in the plan, 9\.9\.9 here"
    ):
        precompute(replace(config, out=tmp_path / "refs", workers=2))


@pytest.mark.slow
def test_under_a_launcher_the_message_says_what_to_type(config: PrecomputeConfig, tmp_path: Path) -> None:
    launcher = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    command = ["--nproc_per_node", 3, "--standalone", "--no-python", sys.executable, "-c", SCORE]
    done: subprocess.CompletedProcess[str] = forks.run(
        launcher, *command, *options(config, tmp_path / "refs"), timeout=300
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Type the command without torchrun or accelerate" in errors[0]
    assert "--workers 3" in errors[0]
    assert "Interrupted" not in done.stderr  # of the other processes, which the launcher ends
    assert not (tmp_path / "refs").exists()


class TestParts:
    """`--plan-only`, `--part I/N`, then the command alone."""

    def test_parts_score_what_one_process_scores(
        self, config: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mine = replace(config, out=tmp_path / "refs")
        precompute(replace(mine, plan_only=True))
        printed = " ".join(capsys.readouterr().out.split())
        assert "planned 6 shards" in printed
        assert "--part 0/N" in printed
        # Two at once; neither locks the other out.
        first = forks.Fork(SCORE, *options(config, mine.out), "--part", "0/2")
        precompute(replace(mine, part="1/2"))
        assert "part 1 of 2 (counted from 0): 3 shards of 6, 0 done" in " ".join(capsys.readouterr().out.split())
        done = first.wait(300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not (mine.out / "manifest.json").exists()
        precompute(mine)
        assert read_manifest(mine.out).run["scored_sequences"] == 0
        assert_same_bytes(config, mine.out)

    def test_what_a_part_has_done_is_not_done_again(
        self, config: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mine = replace(config, out=tmp_path / "refs")
        precompute(replace(mine, plan_only=True))
        precompute(replace(mine, part="0/6"))
        capsys.readouterr()
        precompute(replace(mine, part="0/3"))  # shards 0 and 3
        assert "part 0 of 3 (counted from 0): 2 shards of 6, 1 done" in " ".join(capsys.readouterr().out.split())
        precompute(mine)  # the others are scored here
        assert_same_bytes(config, mine.out)
        precompute(replace(mine, part="0/3"))  # as a scheduler does that starts its jobs again
        assert "this part has nothing to do" in capsys.readouterr().out
        for name, theirs, other in (("seed", 0, 9), ("kl_partners", 1, 2), ("max_length", 1024, 512)):
            words = f"--{name.replace('_', '-')}: {theirs} in the cache, {other} here"
            with pytest.raises(ConfigError, match=words):
                precompute(replace(mine, part="0/3", **{name: other}))
        with pytest.raises(ConfigError, match="is not the feedback that was planned"):
            precompute(replace(mine, part="0/3", data=str(write_rows(tmp_path / "g.jsonl", chat_rows(4)))))
        copy = shutil.copytree(config.model, tmp_path / "copy")
        precompute(replace(mine, part="0/3", model=str(copy)))  # the same weights elsewhere
        other = save_tiny(tmp_path / "other", seed=7)
        with pytest.raises(
            ConfigError, match=r"was scored under .*, which has other weights than .*other\. Choose another"
        ):
            precompute(replace(mine, part="0/3", model=str(other)))
        assert_same_bytes(config, mine.out)

    def test_a_part_of_another_model_is_refused(self, config: PrecomputeConfig, tmp_path: Path) -> None:
        mine = replace(config, out=tmp_path / "refs")
        precompute(replace(mine, plan_only=True))
        other = save_tiny(tmp_path / "other", seed=7)
        with pytest.raises(RefusedError, match=r"reference\.weights_hash: .* in the plan, .* here"):
            precompute(replace(mine, model=str(other), part="0/2"))

    @pytest.fixture(scope="class")
    def planned(self, config: PrecomputeConfig, tmp_path_factory: pytest.TempPathFactory) -> PrecomputeConfig:
        """A plan that nobody has scored; do not write to its folder."""
        mine = replace(config, out=tmp_path_factory.mktemp("planned") / "refs")
        precompute(replace(mine, plan_only=True))
        return mine

    @pytest.mark.parametrize("part", ["1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "", "0.5/2"])
    def test_nonsense_is_refused(self, part: str) -> None:
        with pytest.raises(ConfigError, match="--part must be I/N with I from 0 to N - 1"):
            PrecomputeConfig(part=part)

    @pytest.mark.parametrize(
        "change",
        [{"plan_only": True}, {"overwrite": True}, {"workers": 2}, {"dry_run": True}, {"out": "s3://bucket/refs"}],
    )
    def test_a_part_with_options_that_are_not_its_own_is_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match="--part"):
            PrecomputeConfig(part="0/2", **change)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"kl_partners": 2}, "--kl-partners: 1 in the plan, 2 here"),
            ({"rows_per_shard": 5}, "--rows-per-shard: 11 in the plan, 5 here"),
            ({"limit": 8}, "--limit: not set in the plan, 8 here"),
            ({"max_length": 512}, "--max-length: 1024 in the plan, 512 here"),
        ],
    )
    def test_a_part_with_options_of_another_plan_is_refused(
        self, planned: PrecomputeConfig, change: dict[str, int], words: str
    ) -> None:
        with pytest.raises(
            ConfigError, match=f"--part 0/2: .* was planned with other options:\n  {words}\nGive every part"
        ):
            precompute(replace(planned, part="0/2", **change))  # type: ignore[arg-type]

    @pytest.mark.parametrize("is_longer", [True, False])
    def test_a_part_of_other_feedback_is_refused(
        self, planned: PrecomputeConfig, tmp_path: Path, is_longer: bool
    ) -> None:
        content = Path(planned.data).read_text()
        other = tmp_path / "f.jsonl"
        other.write_text(content + "\n" if is_longer else content.replace("true", "null"))
        with pytest.raises(ConfigError, match=r"f\.jsonl is not the feedback that was planned\. Plan again"):
            precompute(replace(planned, data=str(other), part="0/2"))

    def test_what_a_part_kept_is_told_and_used(
        self,
        planned: PrecomputeConfig,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        mine = replace(planned, out=Path(shutil.copytree(planned.out, tmp_path / "refs")), part="0/3")
        add = ShardScores.add

        def interrupted(self: ShardScores, *arguments: Any) -> None:
            add(self, *arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(ShardScores, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            precompute(mine)
        monkeypatch.undo()
        kept = re.search(r"^kept +0 shards of this part, and (\d+) sequences", capsys.readouterr().out, re.MULTILINE)
        assert kept is not None
        precompute(mine)
        assert f"known {kept[1]} sequences of these shards" in " ".join(capsys.readouterr().out.split())

    def test_a_part_that_is_being_scored_is_refused(
        self, config: PrecomputeConfig, planned: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two processes of one part would both score all of it."""
        mine = replace(planned, out=Path(shutil.copytree(planned.out, tmp_path / "refs")))
        write = worker.write_table

        def writes(*arguments: Any) -> None:
            monkeypatch.undo()
            with pytest.raises(CacheError, match=rf"process {os.getpid()} on .* is scoring --part 1/2\. Wait for it"):
                precompute(replace(mine, part="1/2"))
            precompute(replace(mine, part="0/2"))
            write(*arguments)

        monkeypatch.setattr(worker, "write_table", writes)
        precompute(replace(mine, part="1/2"))
        assert not list((mine.out / ".plan").glob(".*"))
        precompute(mine)
        assert_same_bytes(config, mine.out)

    def test_a_part_that_was_stopped_while_another_command_finished_leaves_nothing(
        self,
        planned: PrecomputeConfig,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As a process does that was stopped and continued by signals."""
        mine = replace(planned, out=Path(shutil.copytree(planned.out, tmp_path / "refs")))
        write = worker.write_table

        def stopped(*arguments: Any) -> None:
            monkeypatch.undo()
            precompute(mine)
            arguments[0].parent.mkdir(parents=True)  # the folder that it had made
            write(*arguments)

        monkeypatch.setattr(worker, "write_table", stopped)
        capsys.readouterr()
        precompute(replace(mine, part="1/2"))
        assert "another command has finished" in capsys.readouterr().out
        assert sorted(path.name for path in mine.out.iterdir()) == ["manifest.json", "train"]

    def test_a_damaged_file_of_a_part_is_named_when_it_is_scored_again(
        self, planned: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mine = replace(planned, out=Path(shutil.copytree(planned.out, tmp_path / "refs")))
        precompute(replace(mine, part="0/6"))
        (done,) = mine.out.glob(".done/*/*.parquet")
        content = bytearray(done.read_bytes())
        content[len(content) // 3] ^= 1
        done.write_bytes(content)
        capsys.readouterr()
        precompute(mine)
        assert f"damaged     {done}: cannot be used; its shard is scored again" in capsys.readouterr().out

    def test_without_a_plan_nothing_is_created(self, config: PrecomputeConfig, tmp_path: Path) -> None:
        with pytest.raises(KTOError, match=r"contains no plan\. Run the same command with --plan-only first"):
            precompute(replace(config, out=tmp_path / "refs", part="0/2"))
        assert not (tmp_path / "refs").exists()


def test_each_worker_sees_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers count the GPUs that this process sees."""
    environments: list[dict[str, str]] = []

    class Child:
        def __init__(self, module: str, function: str, *, environment: dict[str, str]) -> None:
            environments.append(environment)
            self.channel = mock.Mock()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("offline_kto.precompute.local_workers.ChildProcess", Child)
    config = PrecomputeConfig(model="base", data="rows.jsonl", out=tmp_path)
    workers = LocalWorkers(config, str(tmp_path), [[0, 1], [2, 3]])
    assert workers.grow(2, set()) == 2
    assert environments == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
