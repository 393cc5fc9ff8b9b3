"""Sweeps: real processes, one policy in memory, killed and gone on with, shared by two sweepers."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import forks
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from feedback_files import write_feedback, write_rows
from safetensors.torch import load_file

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import CacheError, ConfigError, TrainingError
from offline_kto.kto_core.options import resolve
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.cli import sweep as kto_sweep
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.held_out import check_fraction
from offline_kto.train.run.inputs import KeptMaterials
from offline_kto.train.run.train_run import train
from offline_kto.train.run.training_run import TrainingRun
from offline_kto.train.run_files import read_run_record
from offline_kto.train.sweep import worker as sweep_worker
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.messages import Ended, Stop
from offline_kto.train.sweep.results import Results
from offline_kto.train.sweep.space import Trials
from offline_kto.train.sweep.study import Study, Trial
from offline_kto.train.sweep.sweep import sweep
from offline_kto.train.trainer.saving import unfinished

TRAIN = {"batch_size": 8, "max_steps": 3, "learning_rate": 3e-3, "eval_fraction": 0.3, "device": "cpu"}


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> SweepConfig:
    """A grid of six."""
    space = {"beta": [0.05, 0.1, 0.3], "learning_rate": [1e-3, 3e-3]}
    settings = {name: value for name, value in TRAIN.items() if name not in space}
    return SweepConfig(cache=cache, out=tmp_path / "sweep", search="grid", space=space, train=settings)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_yaml(path: Path, config: SweepConfig, **more: Any) -> Path:
    values = {"search": config.search, "metric": config.metric, "space": config.space, "train": config.train, **more}
    path.write_text(yaml.safe_dump(values))
    return path


class TestWhatItFinds:
    @pytest.fixture(scope="class")
    def done(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepConfig, Path]:
        folder = tmp_path_factory.mktemp("done")
        space = {"beta": [0.05, 0.1, 0.3], "learning_rate": [1e-3, 3e-3]}
        settings = {name: value for name, value in TRAIN.items() if name not in space}
        config = SweepConfig(cache=cache, out=folder / "sweep", search="grid", space=space, train=settings)
        before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.rglob("*") if path.is_file()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("offline_kto.train.sweep.workers.START", "forkserver")
            sweep(config)
        after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.rglob("*") if path.is_file()}
        assert after == before
        return config, folder / "sweep"

    def test_every_trial_is_the_run_that_kto_train_makes(self, done: tuple[SweepConfig, Path], tmp_path: Path) -> None:
        config, folder = done
        rows = rows_of(folder)
        assert [(row["trial"], row["state"]) for row in rows] == [(str(i), "complete") for i in range(6)]
        assert [(row["beta"], row["learning_rate"]) for row in rows] == [
            (str(beta), str(rate)) for beta in (0.05, 0.1, 0.3) for rate in (0.001, 0.003)
        ]
        for number in (0, 5):  # the first one after loading, and the last one after five others
            alone = train(
                TrainConfig(
                    **{**config.train, **Trials.of(config).point(number)},
                    cache=config.cache,
                    out=tmp_path / str(number),
                    save_steps=0,
                )
            )
            said = json.loads((alone / "evaluation.json").read_text())["metrics"]
            for name, metric in said.items():
                assert float(rows[number][f"eval/{name}"]) == metric["value"], name

    def test_the_best_one_is_named_and_loads(self, done: tuple[SweepConfig, Path], tmp_path: Path) -> None:
        _, folder = done
        rows = rows_of(folder)
        best = min(rows, key=lambda row: float(row["eval/loss"]))
        options = resolve(TrainConfig, {"out": tmp_path / "again"}, yaml_path=folder / "best.yaml")
        assert (options.beta, options.learning_rate) == (float(best["beta"]), float(best["learning_rate"]))
        assert (folder / "best.yaml").read_text().startswith(f"# Trial {best['trial']} of ")
        again = train(options)
        first, second = (load_file(one / "model.safetensors") for one in (folder / "best", again))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name])
        assert json.loads((folder / "best/run.json").read_text())["trial"] == int(best["trial"])
        assert (folder / "best/suspects.csv").read_bytes() == (again / "suspects.csv").read_bytes()
        assert not list((folder / "trials").glob("*/model"))

    def test_what_it_says(self, done: tuple[SweepConfig, Path]) -> None:
        _, folder = done
        state = json.loads((folder / "sweep.json").read_text())
        assert state["direction"] == "minimize"
        assert len(state["trials"]) == state["planned"] == 6
        assert set(state["importance"]) == {"beta", "learning_rate"}
        assert "What mattered" in (folder / "report.html").read_text()
        assert {path.name for path in (folder / "trials/0003").iterdir()} >= {"metrics.jsonl", "config.yaml", "log.txt"}

    def test_the_same_command_does_nothing_more(
        self, done: tuple[SweepConfig, Path], capfd: pytest.CaptureFixture[str]
    ) -> None:
        config, folder = done
        before = (folder / "results.csv").read_bytes()
        sweep(config)
        assert (folder / "results.csv").read_bytes() == before
        said = capfd.readouterr()
        assert "6 trials done, 0 to go" in said.out
        assert not said.err  # of the worker that was started and is not needed
        assert (folder / "best/model.safetensors").exists()


@pytest.mark.slow
def test_no_reference_and_one_load(config: SweepConfig) -> None:
    """In the worker's process: what it imported, and how often it read a model."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import offline_kto.train.run.inputs, offline_kto.train.model.policy\n"
        "from offline_kto.train.data.training_data import TrainingData\n"
        "from offline_kto.train.sweep.worker import Worker\n"
        "from offline_kto.train.sweep.config import SweepConfig\n"
        "from offline_kto.train.sweep.space import Trials\n"
        "class Pipe:\n"
        "    def send(self, message): self.last = message\n"
        "    def recv(self): return 'drop'\n"
        f"config = SweepConfig(cache=Path({str(config.cache)!r}), search='grid', space={config.space!r}, train={config.train!r})\n"
        "trials = Trials.of(config)\n"
        "worker = Worker(Pipe(), TrainingData.open(trials.config({})).identity())\n"
        "for number in range(trials.count):\n"
        f"    worker.run(number, trials.config(trials.point(number)), Path({str(config.out)!r}) / str(number))\n"
        "    assert worker.pipe.last.state == 'complete', worker.pipe.last\n"
        "assert worker.materials.loads == 1\n"
        "assert '.parquet\\n' in Path('/proc/self/maps').read_text()\n"
        "stage_1 = [name for name in sys.modules if name.startswith('offline_kto.precompute')]\n"
        "assert not stage_1 + [name for name in ('vllm', 'optuna') if name in sys.modules], stage_1\n"
    )
    ran = forks.run(forks.AS_IF_FRESH + program)
    assert ran.returncode == 0, ran.stderr


class TestMaterials:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param([{}, {}], marks=pytest.mark.slow),
            pytest.param([{"lora_rank": 2}, {"lora_rank": 4}, {"lora_rank": 2}], marks=pytest.mark.slow),
            [{}, {"lora_rank": 2}, {}],
        ],
        ids=["weights", "adapters", "both"],
    )
    def test_a_policy_is_put_back_to_its_first_state(
        self, options: list[dict[str, Any]], cache: Path, tmp_path: Path
    ) -> None:
        materials = KeptMaterials()
        for number, one in enumerate(options):
            config = TrainConfig(cache=cache, save_steps=0, seed=number, **{**TRAIN, **one})
            run = TrainingRun.set_up(config, tmp_path / str(number), materials.data(config), materials)
            (tmp_path / str(number)).mkdir(exist_ok=True)
            run.train()
            run.save_model(tmp_path / str(number))
            materials.take_back()
            alone = train(replace(config, out=tmp_path / f"alone-{number}"))
            name = "adapter_model.safetensors" if config.lora_rank else "model.safetensors"
            first, second = load_file(tmp_path / str(number) / name), load_file(alone / name)
            assert first.keys() == second.keys()
            for key in first:
                assert torch.equal(first[key], second[key]), key
        # Between training all weights and adapters the model is read anew: its frozen form is another one.
        assert materials.loads == (3 if len({bool(one) for one in options}) > 1 else 1)


@pytest.mark.parametrize("problem", ["the trial", "its checkpoint", "its log"])
def test_a_full_disk_ends_the_sweep_and_fails_no_trial(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def set_up(*arguments: Any) -> None:
        if problem == "the trial":
            raise full
        with unfinished(tmp_path / "0000", "checkpoint", main=True):
            raise full

    said: list[Any] = []
    pipe = cast(Any, SimpleNamespace(send=said.append, recv=lambda: "drop"))
    monkeypatch.setattr(KeptMaterials, "data", lambda *_: None)
    monkeypatch.setattr(sweep_worker, "print_data", lambda *_: None)
    monkeypatch.setattr(TrainingRun, "set_up", set_up)
    if problem == "its log":
        monkeypatch.setattr(sweep_worker, "log_into", lambda path: (_ for _ in ()).throw(full))
    sweep_worker.Worker(pipe, {}).run(0, TrainConfig(), tmp_path / "0000")
    assert [type(message) for message in said] == [Stop]
    assert re.search(r"0000: cannot be written: .*No space left .*run the same command to continue", said[0].reason)


def test_a_cache_that_cannot_be_read_any_more_ends_the_sweep_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would not make a trial again that is recorded as failed."""

    def opened(*_: Any) -> None:
        raise CacheError("refs/train/00003.parquet: its content changed after it was verified")

    said: list[Any] = []
    pipe = cast(Any, SimpleNamespace(send=said.append, recv=lambda: "drop"))
    monkeypatch.setattr(KeptMaterials, "data", opened)
    sweep_worker.Worker(pipe, {}).run(0, TrainConfig(), tmp_path / "0000")
    assert said == [Stop("refs/train/00003.parquet: its content changed after it was verified")]


def test_a_run_that_cannot_begin_leaves_the_policy_as_it_was(cache: Path, tmp_path: Path) -> None:
    materials = KeptMaterials()
    config = TrainConfig(cache=cache, save_steps=0, lora_rank=2, **TRAIN)
    for wrong in ({"lora_targets": "nowhere"}, {"training": {"optim": "no_such_optimizer"}}):
        with pytest.raises(ConfigError):
            TrainingRun.set_up(replace(config, **wrong), tmp_path / "wrong", materials.data(config), materials)
        materials.take_back()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "offline_kto.train.run.training_run.check_vocabulary", lambda *_: 1 / 0
        )  # with adapters on the model already
        with pytest.raises(ZeroDivisionError):
            TrainingRun.set_up(config, tmp_path / "wrong", materials.data(config), materials)
        materials.take_back()
    (tmp_path / "right").mkdir()
    run = TrainingRun.set_up(config, tmp_path / "right", materials.data(config), materials)
    run.train()
    run.save_model(tmp_path / "right")
    alone = train(replace(config, out=tmp_path / "alone"))
    first, second = (load_file(one / "adapter_model.safetensors") for one in (tmp_path / "right", alone))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])


def begun(config: SweepConfig, trials: Trials, url: str, identity: dict[str, Any]) -> Study:
    """A study that a sweep has begun."""
    study = Study(config, trials, url, identity)
    study.begin()
    return study


# Workers are forked from the sweep, which has imported their libraries and used none of them.
KTO_SWEEP = """
from offline_kto.train.cli import sweep
from offline_kto.train.sweep import workers
workers.START = "fork"
sweep()
"""


class Started:
    """A sweep in a process of its own, and what it prints."""

    def __init__(self, config: SweepConfig, path: Path, *more: str) -> None:
        self.fork = forks.Fork(KTO_SWEEP, "--cache", config.cache, "--config", path, "--out", config.out, *more)
        (self.pid,) = self.fork.pids

    def ends_with(self, code: int) -> str:
        """Wait for the end. Returns: what was printed."""
        done = self.fork.wait()
        assert done.returncode == code, done
        return done.stdout + done.stderr


def children_of(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(status.parent.name))
    return found


def wait_until(said: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def complete(folder: Path) -> int:
    return sum(row["state"] == "complete" for row in rows_of(folder)) if (folder / "results.csv").exists() else 0


class TestKills:
    @pytest.mark.slow
    def test_killed_and_started_again_it_has_the_same_rows(self, config: SweepConfig, tmp_path: Path) -> None:
        """With tpe, which draws by what is known so far; of a grid, each trial's number says all."""
        space = {**config.space, "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
        config = replace(config, search="tpe", space=space, train={**config.train, "max_steps": 5})
        path = write_yaml(tmp_path / "sweep.yaml", config, trials=4)
        undisturbed = replace(config, out=tmp_path / "undisturbed")
        other = Started(undisturbed, path)
        assert config.out is not None
        assert undisturbed.out is not None
        started = Started(config, path)
        wait_until(lambda: complete(config.out) >= 1)  # type: ignore[arg-type]
        workers = children_of(started.pid)
        assert workers
        started.fork.kill()  # while the next trial runs
        started.ends_with(-signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{one}").exists() for one in workers), 10)
        assert complete(config.out) < 4
        Started(config, path).ends_with(0)
        other.ends_with(0)
        assert (config.out / "results.csv").read_bytes() == (undisturbed.out / "results.csv").read_bytes()
        first, second = (load_file(folder / "best/model.safetensors") for folder in (config.out, undisturbed.out))
        for name in first:
            assert torch.equal(first[name], second[name])

    @pytest.mark.slow
    def test_a_worker_that_is_killed_fails_its_trial_alone(self, config: SweepConfig, tmp_path: Path) -> None:
        config = replace(config, train={**config.train, "max_steps": 40})
        path = write_yaml(tmp_path / "sweep.yaml", config, trials=3)
        assert config.out is not None
        started = Started(config, path)
        wait_until(lambda: complete(config.out) >= 1)  # type: ignore[arg-type]
        wait_until(lambda: (config.out / "trials/0001/metrics.jsonl").exists())  # type: ignore[operator]
        for worker in children_of(started.pid):
            if b"resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_bytes():
                os.kill(worker, signal.SIGKILL)
        out = started.ends_with(0)
        states = [row["state"] for row in rows_of(config.out)]
        assert states.count("failed") == 1
        assert states.count("complete") == 2
        failed = next(row for row in rows_of(config.out) if row["state"] == "failed")
        assert "its process ended (signal 9" in failed["reason"]
        assert f"trial {failed['trial']}" in out

    @pytest.mark.slow
    def test_interrupted_by_hand_it_says_how_to_go_on(self, config: SweepConfig, tmp_path: Path) -> None:
        config = replace(config, train={**config.train, "max_steps": 40})
        path = write_yaml(tmp_path / "sweep.yaml", config)
        started = Started(config, path)
        wait_until(lambda: complete(config.out) >= 1)  # type: ignore[arg-type]
        started.fork.kill(by=signal.SIGTERM)  # as Ctrl-C, which shells let background jobs ignore
        out = started.ends_with(143)
        assert "Interrupted. Finished work is kept; run the same command" in out
        assert "Traceback" not in out

    @pytest.mark.slow
    def test_two_sweepers_share_one_storage(self, config: SweepConfig, tmp_path: Path) -> None:
        config = replace(config, train={**config.train, "max_steps": 20})
        path = write_yaml(tmp_path / "sweep.yaml", config)
        storage = f"sqlite:///{tmp_path}/shared.db"
        both = [replace(config, out=tmp_path / name) for name in ("one", "two")]
        for started in [Started(one, path, "--storage", storage) for one in both]:
            started.ends_with(0)
        tables = [rows_of(one.out) for one in both]  # type: ignore[arg-type]
        assert tables[0] == tables[1]
        assert [row["state"] for row in tables[0]] == ["complete"] * 6
        made = [{path.name for path in (one.out / "trials").iterdir()} for one in both if one.out is not None]
        assert made[0] | made[1] == {f"{i:04d}" for i in range(6)}
        assert made[0] & made[1] == set()
        assert made[0]
        assert made[1]
        first, second = (load_file(one.out / "best/model.safetensors") for one in both if one.out is not None)
        assert all(torch.equal(first[name], second[name]) for name in first)

        trial = f"{read_run_record(both[0].out / 'best')['trial']:04d}"  # type: ignore[operator]
        maker, other = both if trial in made[0] else reversed(both)
        assert maker.out is not None
        assert other.out is not None
        shutil.rmtree(other.out / "best")
        (maker.out / "best").rename(maker.out / "trials" / trial / "model")  # as if it had been killed before the end
        assert "best model" not in Started(other, path, "--storage", storage).ends_with(0)
        assert (other.out / "best/model.safetensors").exists()


@pytest.mark.usefixtures("warm_workers")
class TestTrialsThatFail:
    def test_one_that_cannot_be_trained_is_on_record(self, config: SweepConfig) -> None:
        """No pairs in this cache: dpo is refused, the rest goes on."""
        out = sweep(replace(config, space={"loss": ["kto", "dpo", "apo_zero"]}))
        assert [row["state"] for row in rows_of(out)] == ["complete", "failed", "complete"]
        assert "--loss dpo compares two completions" in rows_of(out)[1]["reason"]
        assert "Error: " in (out / "trials/0001/log.txt").read_text()

    def test_values_that_do_not_go_together(self, config: SweepConfig) -> None:
        out = sweep(
            replace(
                config,
                space={"loss": ["kto", "dpo"], "batch_size": [7, 8]},
                train={name: value for name, value in config.train.items() if name != "batch_size"},
            )
        )
        rows = rows_of(out)
        assert [row["state"] for row in rows] == ["complete", "complete", "failed", "failed"]
        assert "give an even number, not 7" in rows[2]["reason"]

    def test_all_of_them(self, config: SweepConfig) -> None:
        with pytest.raises(TrainingError, match=r"no trial completed\. The first one: .*--loss dpo"):
            sweep(replace(config, space={"loss": ["dpo", "ipo"]}))
        assert config.out is not None
        assert [row["state"] for row in rows_of(config.out)] == ["failed", "failed"]
        assert (config.out / "report.html").exists()

    def test_a_learning_rate_that_explodes(self, config: SweepConfig) -> None:
        heavy = {"desirable_weight": 1e18, "undesirable_weight": 1e18, "training": {"optim": "sgd", "max_grad_norm": 0}}
        settings = {**config.train, **heavy, "max_steps": 6}
        out = sweep(replace(config, space={"learning_rate": [1e-21, 1.0]}, train=settings))
        rows = rows_of(out)
        assert rows[0]["state"] == "complete"
        assert rows[1]["state"] == "failed"
        assert "not finite" in rows[1]["reason"]

    def test_what_no_trial_can_be_trained_with_ends_the_sweep_before_its_first(self, config: SweepConfig) -> None:
        with pytest.raises(TrainingError, match=r"training: unknown key 'optimm'\. Did you mean 'optim'"):
            sweep(replace(config, train={**config.train, "training": {"optimm": "sgd"}}))
        assert config.out is not None
        assert not (config.out / "trials").exists()

    def test_what_is_odd_about_the_data_is_told(
        self, base: Path, config: SweepConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"prompt": f"p {i}", "completion": f"c {i}", "label": True} for i in range(20)]
        data = write_rows(tmp_path / "good.jsonl", rows)
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "good", one_class=True))
        capsys.readouterr()
        out = sweep(replace(config, cache=tmp_path / "good", space={"loss": ["kto", "dpo"]}))
        said = capsys.readouterr().out
        assert "warning     every training row is desirable" in said
        assert "scored      20 rows of 20, dropped: none; cut at 1024 tokens: 0 completions, 0 mismatched" in said
        assert re.search(r"^rows        \d+ to train on, \d+ held out$", said, re.MULTILINE)
        assert "warning     every trial with loss dpo will fail: " in said
        assert "updates     3 in each trial" in said
        assert "time        unknown until the first trial ends" in said
        sweep(replace(config, cache=tmp_path / "good", space={"loss": ["kto", "dpo"]}, out=out))
        assert "time        none" in capsys.readouterr().out
        warnings = json.loads((out / "sweep.json").read_text())["warnings"]
        assert [line[:20] for line in warnings] == ["every trial with los", "every training row i"]
        assert "Every training row is desirable" in (out / "report.html").read_text()
        sweep(replace(config, cache=tmp_path / "good", space={"loss": ["kto", "dpo"]}))  # nothing is left to do
        assert json.loads((out / "sweep.json").read_text())["warnings"] == warnings

    def test_a_damaged_cache_ends_the_sweep_before_its_first_trial(self, config: SweepConfig, tmp_path: Path) -> None:
        shutil.copytree(config.cache, tmp_path / "damaged")
        shard = next((tmp_path / "damaged").rglob("*.parquet"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(bytes(content))
        with pytest.raises(TrainingError, match="sha256 differs"):
            sweep(replace(config, cache=tmp_path / "damaged"))
        assert config.out is not None
        assert not (config.out / "results.csv").exists()


def drawn(config: SweepConfig, url: str, *, at_once: int = 1) -> list[dict[str, Any]]:
    """Return what each trial of a search would try, where smaller betas are better; `at_once` sweepers take turns."""
    trials = Trials.of(config)
    studies = [begun(config, trials, url, {"space": config.space}) for _ in range(at_once)]
    while not studies[0].is_done():
        for study in studies:
            trial = study.next()
            if trial is not None:
                study.tell(trial, "complete", trial.params["beta"], {})
    return [record.params for record in studies[0].records()]


SPACE = {"beta": {"low": 0.01, "high": 0.5, "log": True}, "batch_size": {"low": 4, "high": 8}, "warmup": [0, 1]}


class TestStudy:
    @pytest.mark.parametrize("search", [pytest.param("random", marks=pytest.mark.slow), "tpe"])
    def test_draws_depend_on_the_trial_and_what_is_known(
        self, search: str, config: SweepConfig, tmp_path: Path
    ) -> None:
        urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two", "three")]
        config = replace(config, search=search, space=SPACE, train={}, trials=15)
        whole = drawn(config, urls[0])
        assert drawn(replace(config, trials=4), urls[1]) == whole[:4]
        assert drawn(config, urls[1]) == whole  # goes on
        other = drawn(replace(config, seed=1, trials=5), urls[2])
        betas = [params["beta"] for params in whole]
        assert len(set(betas)) == 15
        assert {params["beta"] for params in other}.isdisjoint(betas)
        assert all(0.01 <= p["beta"] <= 0.5 and p["batch_size"] in range(4, 9) and p["warmup"] in (0, 1) for p in whole)
        if search == "tpe":
            assert sum(betas[10:]) / 5 < sum(betas[:10]) / 10  # it has learned

    @pytest.mark.parametrize("search", [pytest.param("random", marks=pytest.mark.slow), "tpe"])
    def test_nothing_is_tried_twice(self, search: str, config: SweepConfig, tmp_path: Path) -> None:
        """A space of twelve, of which one was tried by a sweeper that is gone."""
        space = {"beta": [0.05, 0.1, 0.3], "batch_size": {"low": 3, "high": 6}}
        train = {name: value for name, value in config.train.items() if name != "batch_size"}
        config = replace(config, search=search, space=space, train=train)
        trials = Trials.of(config)
        assert (trials.count, trials.points) == (12, 12)
        assert Trials.of(replace(config, trials=7)).count == 7
        found = []
        for _ in range(12):  # each by another sweeper
            study = begun(config, trials, f"sqlite:///{tmp_path}/study.db", {})
            trial = study.next()
            assert trial is not None
            found.append(tuple(trial.params.values()))
            study.tell(trial, "complete" if len(found) % 3 else "failed", 0.5, {})
        assert sorted(found) == [(beta, size) for beta in (0.05, 0.1, 0.3) for size in (3, 4, 5, 6)]
        assert found != sorted(found)

    def test_two_sweepers_never_try_the_same(self, config: SweepConfig, tmp_path: Path) -> None:
        config = replace(config, search="random", space=SPACE, train={}, trials=9)
        alone = drawn(config, f"sqlite:///{tmp_path}/alone.db")
        assert drawn(config, f"sqlite:///{tmp_path}/shared.db", at_once=3) == alone

    def test_a_trial_of_a_dead_process_is_taken_over_at_once(self, config: SweepConfig, tmp_path: Path) -> None:
        url, trials = f"sqlite:///{tmp_path}/study.db", Trials.of(config)
        program = (
            "import os; from pathlib import Path; from offline_kto.train.sweep.config import SweepConfig\n"
            "from offline_kto.train.sweep.space import Trials; from offline_kto.train.sweep.study import Study\n"
            f"config = SweepConfig(cache=Path('x'), search='grid', space={config.space!r}, train={config.train!r})\n"
            f"study = Study(config, Trials.of(config), {url!r}, {{}}); study.begin()\n"
            "print(study.next().params); study._study.ask(); os._exit(9)\n"  # one with an owner, one that has none yet
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert ran.stdout.strip() == str(trials.point(0)), ran.stderr
        study = begun(config, trials, url, {})
        for number in range(6):
            trial = study.next()
            assert trial is not None
            assert (trial.number, trial.params) == (number, trials.point(number))
        assert study.next() is None

    def test_one_that_lives_elsewhere_keeps_its_trial(
        self, config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Change its signs of life, whatever the clocks say; when they stop for a while, it is gone."""
        url, trials = f"sqlite:///{tmp_path}/study.db", Trials.of(replace(config, trials=1))
        monkeypatch.setattr("offline_kto.train.sweep.study.process_place", lambda: "elsewhere")
        there = begun(config, trials, url, {})
        assert there.next() is not None
        monkeypatch.undo()
        monkeypatch.setattr("offline_kto.train.sweep.study.BEAT_SECONDS", 0.0)
        now = [time.monotonic()]
        monkeypatch.setattr("offline_kto.train.sweep.study.time.monotonic", lambda: now[0])
        here = begun(config, trials, url, {})
        for _ in range(20):
            there.beat()
            assert here.next() is None
            now[0] += 10
        now[0] += 25
        taken = here.next()
        assert taken is not None
        assert taken.number == 0

    def test_more_trials_than_planned_are_never_made(
        self, config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two machines may ask at the same moment: the one too many waits for a longer sweep."""
        url, trials = f"sqlite:///{tmp_path}/study.db", Trials.of(replace(config, trials=1))
        study = begun(config, trials, url, {})
        first = study.next()
        assert first is not None
        study._study.ask()
        assert study.next() is None
        study.tell(first, "complete", 0.5, {})
        assert len(study.records()) == 1
        assert study.is_done()
        monkeypatch.setattr("offline_kto.train.sweep.study.GONE_SECONDS", -1.0)
        longer = begun(config, Trials.of(config), url, {})
        numbers = [trial.number for _ in range(5) if (trial := longer.next()) is not None]
        assert numbers == [1, 2, 3, 4, 5]


class TestInterruptedTrials:
    """What a killed sweep left half done must not show in what the next one does."""

    def test_options_that_were_drawn_already_do_not_change_the_others(
        self, config: SweepConfig, tmp_path: Path
    ) -> None:
        config = replace(config, search="random", space=SPACE, train={}, trials=1)
        whole = drawn(config, f"sqlite:///{tmp_path}/whole.db")
        trials, url = Trials.of(config), f"sqlite:///{tmp_path}/part.db"
        study = begun(config, trials, url, {})
        handle = study._study.ask()
        study._study.sampler = study._sampler(0, 0)
        assert study._suggest(handle, "beta") == whole[0]["beta"]
        handle.set_user_attr("owner", "")
        taken = begun(config, trials, url, {}).next()
        assert taken is not None
        assert taken.params == whole[0]

    def test_evaluations_that_were_reported_do_not_prune_the_second_time(
        self, config: SweepConfig, tmp_path: Path
    ) -> None:
        config = replace(config, pruning="median")
        url, trials = f"sqlite:///{tmp_path}/study.db", Trials.of(config)
        study = begun(config, trials, url, {})
        for value in (0.1, 0.2, 0.3, 0.4, 0.5):
            trial = study.next()
            assert trial is not None
            assert not study.falls_behind(trial, 2, 0.5)
            assert not study.falls_behind(trial, 4, value)
            study.tell(trial, "complete", value, {})
        trial = study.next()
        assert trial is not None
        for step, value in ((2, 0.5), (4, 0.9)):
            trial.handle.report(value, step)  # killed after this
        trial.handle.set_user_attr("owner", "")
        again = begun(config, trials, url, {})
        taken = again.next()
        assert taken is not None
        assert not again.falls_behind(taken, 2, 0.5)
        assert again.falls_behind(taken, 4, 0.9)
        again.tell(taken, "pruned", None, {})
        assert [record.state for record in again.records()] == ["complete"] * 5 + ["pruned"]

    def test_a_sweeper_that_wakes_up_late_changes_nothing(self, config: SweepConfig, tmp_path: Path) -> None:
        url, trials = f"sqlite:///{tmp_path}/study.db", Trials.of(replace(config, trials=1))
        late = begun(config, trials, url, {})
        trial = late.next()
        assert trial is not None
        trial.handle.set_user_attr("owner", "")
        other = begun(config, trials, url, {})
        taken = other.next()
        assert taken is not None
        other.tell(taken, "complete", 0.25, {"metrics": {"eval/loss": 0.25}})
        late.falls_behind(trial, 2, 0.9)
        late.tell(trial, "complete", 0.9, {"metrics": {"eval/loss": 0.9}})
        assert [(record.value, record.result) for record in late.records()] == [
            (0.25, {"metrics": {"eval/loss": 0.25}})
        ]

    def test_another_sweep_that_began_meanwhile(self, config: SweepConfig, tmp_path: Path) -> None:
        trials, url = Trials.of(config), f"sqlite:///{tmp_path}/study.db"
        both = [Study(config, trials, url, {"space": name}) for name in ("mine", "theirs")]
        both[1].begin()
        with pytest.raises(ConfigError, match="started with another space: 'theirs', not 'mine'"):
            both[0].begin()
        assert both[1].next() is not None

    def test_a_trial_is_released_once(self, config: SweepConfig, tmp_path: Path) -> None:
        study = begun(config, Trials.of(config), f"sqlite:///{tmp_path}/study.db", {})
        for times in range(2):
            trial = study.next()
            assert trial is not None
            assert trial.number == 0
            assert study.release(trial) is (times == 0)


class TestBestModel:
    """Models of trials that end in any order, beside a sweep of two workers."""

    @pytest.fixture
    def results(self, config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
        assert config.out is not None
        (config.out / "trials").mkdir(parents=True)
        monkeypatch.setattr("offline_kto.train.sweep.results.write_report", lambda folders: folders[0] / "report.html")
        trials = Trials.of(config)
        results = Results(config.out, config, trials, begun(config, trials, f"sqlite:///{tmp_path}/study.db", {}))
        results.begin(read_manifest(config.cache), {})
        return results

    @staticmethod
    def model_of(results: Results, trial: Trial) -> Path:
        folder = results.out / "trials" / f"{trial.number:04d}" / "model"
        folder.mkdir(parents=True)
        record = {"trial": trial.number, "fingerprint": read_manifest(results.config.cache).fingerprint}
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    def trials(self, results: Results, count: int) -> list[Trial]:
        found = [results.study.next() for _ in range(count)]
        return [trial for trial in found if trial is not None]

    @staticmethod
    def with_loss(value: float) -> Ended:
        return Ended("complete", {"eval/loss": value})

    def test_a_slow_save_does_not_take_a_better_model_away(self, results: Results) -> None:
        slow, fast = self.trials(results, 2)
        assert results.is_best(self.with_loss(0.5))
        results.keep(slow, self.with_loss(0.5))
        first = self.model_of(results, slow)
        assert results.is_best(self.with_loss(0.4))
        results.keep(fast, self.with_loss(0.4))
        second = self.model_of(results, fast)
        results.kept(fast)
        results.kept(slow)
        assert second.exists()
        assert not first.exists()

    def test_a_worker_that_is_lost_while_it_saves(self, results: Results) -> None:
        lost, worse = self.trials(results, 2)
        results.keep(lost, self.with_loss(0.4))
        assert "starts again" in results.lost(lost, "its process ended (signal 9)")
        assert results.is_best(self.with_loss(0.5))  # nothing is better by now
        results.keep(worse, self.with_loss(0.5))
        self.model_of(results, worse)
        results.kept(worse)
        again = results.study.next()
        assert again is not None
        assert again.number == lost.number

    def test_the_only_model_is_never_removed(
        self, results: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = socket.gethostname()
        first, second = self.trials(results, 2)
        results.keep(first, self.with_loss(0.5))
        self.model_of(results, first)
        results.kept(first)
        results.finish()
        assert json.loads((results.out / "best/run.json").read_text())["trial"] == 0
        said = capsys.readouterr().out
        assert f"model       {results.out / 'best'}" in said
        assert "next" not in said  # the best model is there: nothing has to be trained again
        results.keep(second, self.with_loss(0.4))
        results.kept(second)  # whose model somebody removed
        results.finish()
        assert (results.out / "best/run.json").exists()
        said = capsys.readouterr().out
        assert "best model  missing; retrain it with best.yaml" in said
        assert f"next        kto-train --config {results.out / 'best.yaml'}" in said
        monkeypatch.setattr("offline_kto.train.sweep.results.socket.gethostname", lambda: "another")
        monkeypatch.chdir(results.out.parent)
        Path("runs/best").mkdir(parents=True)  # another run
        results.finish()
        assert "--out runs/best-2" in capsys.readouterr().out
        shutil.copy(results.out / "best.yaml", "runs/best/config.yaml")
        Path("runs/best/run.json").write_text('{"final": {"step": 1}}')  # what the line advised
        results.finish()
        said = capsys.readouterr().out
        assert "model       runs/best\n" in said
        assert "next" not in said
        assert f"best model  kept by the sweep that trained it, on {here}: {results.out}" in said

    def test_advice_is_no_learning_rate_that_was_tried(self, results: Results) -> None:
        for trial in self.trials(results, 2):  # with the rates 1e-3 and 3e-3
            results.ended(trial, self.with_loss(0.5))
        inside, outside = "a lower rate: --learning-rate 2e-3", "the policy hardly moved: --learning-rate 10"
        assert results._advice(outside) == outside
        assert results._advice("more feedback") == "more feedback"
        assert results._advice(inside).startswith("this sweep compared such learning rates already: more feedback")


@pytest.mark.usefixtures("warm_workers")
class TestSearches:
    @pytest.mark.slow
    def test_pruning_stops_what_falls_behind(self, config: SweepConfig) -> None:
        """Five trials of one quality, and one that learns nothing: the median of the others is better."""
        space = {"learning_rate": [3e-3, 2.9e-3, 3.1e-3, 2.8e-3, 3.2e-3, 1e-9]}
        settings = {**config.train, "max_steps": 8, "eval_steps": 2, "epochs": 9}
        out = sweep(replace(config, space=space, train=settings, pruning="median", metric="eval/rewards/margins"))
        rows = rows_of(out)
        assert [row["state"] for row in rows[:5]] == ["complete"] * 5
        assert rows[5]["state"] in ("pruned", "complete")
        margins = [float(row["eval/rewards/margins"]) for row in rows]
        if sum(margin > margins[5] for margin in margins[:5]) >= 4:
            assert rows[5]["state"] == "pruned"
            steps = [json.loads(line)["step"] for line in (out / "trials/0005/metrics.jsonl").read_text().splitlines()]
            assert max(steps) < 8

    @pytest.mark.slow
    def test_seeds_are_compared_on_the_same_rows(self, config: SweepConfig) -> None:
        out = sweep(replace(config, space={"seed": [0, 1]}, train={**TRAIN, "max_steps": 1}))
        held = []
        for number in range(2):
            table = pq.read_table(out / f"trials/{number:04d}/rewards.parquet").to_pydict()
            held.append({r for r, s in zip(table["row_id"], table["split"], strict=True) if s == "held_out"})
        assert held[0] == held[1]
        assert "eval_seed: 0" in (out / "best.yaml").read_text()

    def test_rows_are_held_out_unless_told(self, config: SweepConfig) -> None:
        trials = Trials.of(replace(config, train={}))
        assert trials.base["eval_fraction"] == 0.1

    @pytest.mark.slow
    def test_metrics_that_should_grow(self, config: SweepConfig) -> None:
        out = sweep(replace(config, metric="eval/accuracy", space={"learning_rate": [1e-9, 3e-3]}))
        rows = rows_of(out)
        best = yaml.safe_load((out / "best.yaml").read_text())
        assert float(best["learning_rate"]) == float(
            max(rows, key=lambda row: float(row["eval/accuracy"]))["learning_rate"]
        )
        assert json.loads((out / "sweep.json").read_text())["direction"] == "maximize"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"space": {}}, "names no option to search over"),
    ({"space": {"betta": [0.1]}}, "unknown key 'betta'. Did you mean 'beta'"),
    ({"space": {"betta": {"low": 1, "high": 2}}}, "unknown key 'betta'. Did you mean 'beta'"),
    (
        {"space": {"beta": 0.1}},
        "expected a list of values or a range, got 0.1. Put a value that all trials share into train:",
    ),
    ({"space": {"beta": []}}, "an empty list"),
    ({"space": {"beta": [0.1, 0.1]}}, "a value is given twice"),
    ({"space": {"beta": ["big"]}}, "expected a number, got 'big'"),
    ({"space": {"beta": ["1e-5"]}}, "expected a number, got '1e-5'. Write it without quotes: 1e-05"),
    ({"space": {"batch_size": ["4"]}}, "expected a whole number, got '4'. Write it without quotes: 4"),
    ({"space": {"desirable_weight": ["1.5", 1.5]}}, "a value is given twice"),
    (
        {"space": {"beta": {"low": "1e-5", "high": 1}}},
        "low must be a number, got '1e-5'. Write it without quotes: 1e-05",
    ),
    ({"space": {"beta": {"low": 0.1, "high": 1, "points": "2"}}}, "to 1000, got '2'. Write it without quotes: 2"),
    ({"space": {"beta": [-1.0]}}, "beta: -1.0 cannot be used: --beta must be above 0"),
    ({"space": {"beta": {"low": 0.1}}}, "high must be a number, got None"),
    ({"space": {"beta": {"low": 0.3, "high": 0.1}}}, "low (0.3) must be below high (0.1)"),
    ({"space": {"beta": {"low": 0, "high": 1, "log": True}}}, "a range on a log scale must begin above 0"),
    ({"space": {"beta": {"low": 0.1, "high": 1, "logg": True}}}, "unknown key 'logg'"),
    ({"space": {"beta": {"low": 0.1, "high": 1}}}, "add points: 5 to the range"),
    ({"space": {"batch_size": {"low": 1.5, "high": 4, "points": 2}}}, "low must be a whole number, got 1.5"),
    ({"space": {"loss": {"low": 1, "high": 4}}}, "its values are not numbers, so it has no range"),
    ({"space": {"loss": ["ktoo"]}}, "choose one of kto"),
    ({"space": {"cache": ["refs"]}}, "'cache' cannot differ between the trials"),
    ({"space": {"max_length": [None, 120]}}, "compared on the same held-out rows, which it cuts"),
    ({"space": {"batch_size": {"low": 1, "high": 1e300, "points": 2}}}, "high must be at most 1,000,000,000"),
    ({"space": {"beta": {"low": 0.1, "high": 1, "points": 1000}, "seed": [*range(101)]}}, "would have 101,000 trials"),
    ({"space": {"eval_fraction": [0.1, 0.2]}}, "compared on the same held-out rows"),
    ({"space": {"out": ["a", "b"]}}, "belongs on the command line: --out"),
    ({"train": {"beta": 0.1}}, "'beta' is set in space: and in train:"),
    ({"train": {"eval_fraction": 0}}, "train: eval_fraction: 0 leaves no held-out rows"),
    ({"train": {"eval_fraction": 1.5}}, "train: --eval-fraction must"),
    ({"train": {"lerning_rate": 0.1}}, "unknown key 'lerning_rate'. Did you mean 'learning_rate'"),
    ({"train": {"metric": "eval/loss"}}, "'metric' is set for the whole sweep"),
    ({"trials": 0}, "--trials must be at least 1"),
    ({"workers": 0}, "--workers must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_mistakes_are_told_before_anything_starts(
    options: dict[str, Any], message: str, config: SweepConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        sweep(replace(config, **options))
    assert message in str(refused.value)
    assert config.out is not None
    assert not config.out.exists()


@pytest.mark.parametrize(
    "tables", [{"space": {"beta": [-1.0]}}, {"space": {"beta": [0.1]}, "train": {"eval_fraction": 0}}], ids=str
)
def test_a_mistake_in_a_table_names_the_file(tables: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tables))
    result = CliRunner().invoke(kto_sweep, ["--cache", "refs", "--config", str(path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {path}: ")


def test_too_few_prompts_to_hold_some_out_are_told_before_anything_starts(
    config: SweepConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"q{i % 4}", "completion": f"a{i}", "label": i < 6} for i in range(12)]
    data, refs = write_rows(tmp_path / "few.jsonl", rows), tmp_path / "few"
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=refs, max_length=64))
    monkeypatch.setattr("offline_kto.train.sweep.sweep.Workers", None)
    settings = {name: value for name, value in config.train.items() if name != "eval_fraction"}
    with pytest.raises(TrainingError, match=r"0\.1 of 4 prompts leaves no row to be held out\. Use 0\.25 or more"):
        sweep(replace(config, cache=refs, train=settings))
    assert config.out is not None
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("fraction", "prompts", "usable"), [(0.1, 4, 0.25), (0.1, 3, 0.34), (0.99, 2, 0.5), (0.9, 3, 0.66)]
)
def test_the_fraction_that_is_advised_is_usable(fraction: float, prompts: int, usable: float) -> None:
    with pytest.raises(TrainingError, match=f"Use {usable:g} or "):
        check_fraction(fraction, prompts)
    check_fraction(usable, prompts)


@pytest.mark.usefixtures("warm_workers")
class TestFolders:
    def test_another_sweep_in_the_same_folder(self, config: SweepConfig) -> None:
        sweep(replace(config, trials=1))
        with pytest.raises(ConfigError, match="started with another space"):
            sweep(replace(config, space={"beta": [0.1, 0.2]}))
        assert config.out is not None
        said = (config.out / "sweep.yaml").read_bytes()
        with pytest.raises(ConfigError, match="started with another metric"):
            sweep(replace(config, metric="eval/accuracy"))
        assert (config.out / "sweep.yaml").read_bytes() == said
        assert len(rows_of(config.out)) == 1

    @pytest.mark.parametrize("mended", [{"space": {"beta": [0.1]}}, {"metric": "eval/accuracy"}], ids=str)
    def test_a_mistake_that_was_told_can_be_mended(self, mended: dict[str, Any], config: SweepConfig) -> None:
        """Nothing has begun, so nothing of it holds."""
        with pytest.raises(TrainingError, match="--loss dpo compares two completions"):
            sweep(replace(config, train={**config.train, "loss": "dpo"}))
        out = sweep(replace(config, **mended, trials=1))
        assert [row["state"] for row in rows_of(out)] == ["complete"]

    def test_fewer_trials_than_there_are(self, config: SweepConfig) -> None:
        sweep(replace(config, trials=2))
        with pytest.raises(ConfigError, match="the sweep already has 2 trials, which are kept"):
            sweep(replace(config, trials=1))
        assert config.out is not None
        assert (config.out / "best/model.safetensors").exists()

    @pytest.mark.slow
    def test_another_held_out_cache(self, config: SweepConfig, base: Path, tmp_path: Path) -> None:
        for name, seed in (("one", 3), ("two", 4)):
            data = write_feedback(tmp_path / f"{name}.jsonl", 8, seed=seed)
            precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / name, max_length=256))
        shutil.copytree(tmp_path / "one", tmp_path / "held")
        settings = {k: v for k, v in config.train.items() if k != "eval_fraction"}
        config = replace(config, trials=1, train={**settings, "eval_cache": str(tmp_path / "held")})
        sweep(config)
        shutil.rmtree(tmp_path / "held")
        shutil.copytree(tmp_path / "two", tmp_path / "held")
        with pytest.raises(
            ConfigError, match="started with another held-out cache, or its rows or labels changed since"
        ):
            sweep(replace(config, trials=2))

    def test_a_password_is_shown_nowhere(self, config: SweepConfig, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ConfigError) as refused:
            sweep(replace(config, storage="postgresql://me:sekret@127.0.0.1:1/none"))
        assert "sekret" not in str(refused.value)
        assert config.out is not None
        assert all(b"sekret" not in path.read_bytes() for path in config.out.rglob("*") if path.is_file())

    def test_a_folder_of_something_else(self, config: SweepConfig) -> None:
        assert config.out is not None
        config.out.mkdir()
        (config.out / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"contains notes.txt, but no sweep.yaml"):
            sweep(config)
        assert [path.name for path in config.out.iterdir()] == ["notes.txt"]

    def test_a_storage_that_is_not_there(self, config: SweepConfig) -> None:
        with pytest.raises(
            ConfigError, match=r"the sweep's database cannot be used: .*[^.]\. Finished trials are kept"
        ):
            sweep(replace(config, storage=f"sqlite:///{config.out}/none/study.db"))
        with pytest.raises(
            ConfigError, match=r"none: No module named 'cx_Oracle'\. Install the driver of that database"
        ):
            sweep(replace(config, storage="oracle+cx_oracle://nobody@127.0.0.1:1/none"))
        with pytest.raises(ConfigError, match=r"--storage redis://x:\*\*\*@127.0.0.1/1: RedisStorage is removed"):
            sweep(replace(config, storage="redis://x:secret@127.0.0.1/1"))

    def test_under_a_launcher(self, config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="starts its own processes"):
            sweep(config)

    def test_without_a_config(self, config: SweepConfig) -> None:
        result = CliRunner().invoke(kto_sweep, ["--cache", str(config.cache)])
        assert result.exit_code == 2
        assert "Missing option '--config'" in result.output


def test_ranges_make_grids(config: SweepConfig) -> None:
    space = {
        "learning_rate": {"low": 1e-7, "high": 1e-5, "log": True, "points": 3},
        "beta": {"low": 0.1, "high": 0.5, "points": 3},
        "batch_size": {"low": 4, "high": 6, "points": 5},
    }
    trials = Trials.of(replace(config, space=space, train={}))
    values = [entry.grid() for entry in trials.space.values()]
    assert values[0] == pytest.approx((1e-7, 1e-6, 1e-5))
    assert (values[0][0], values[0][-1]) == (1e-7, 1e-5)
    assert values[1] == pytest.approx((0.1, 0.3, 0.5))
    assert values[2] == (4, 5, 6)
    assert trials.count == 27
    assert len({tuple(trials.point(i).values()) for i in range(27)}) == 27


def test_what_is_not_comparable_is_said(config: SweepConfig) -> None:
    assert "eval/loss is measured with each trial's own beta" in Trials.of(config).warnings()[0]
    assert Trials.of(replace(config, metric="eval/accuracy")).warnings() == []
    assert Trials.of(replace(config, space={"seed": [1, 2]})).warnings() == []
    assert "eval/rewards/margins is measured" in Trials.of(replace(config, metric="eval/rewards/margins")).warnings()[0]
    mixed = Trials.of(replace(config, metric="eval/accuracy", space={"loss": ["kto", "dpo"]})).warnings()
    assert "losses of pairs are evaluated on whole pairs" in mixed[0]
