"""`kto-train --dry-run`: the plan of a run and its checks, with nothing trained and nothing written."""

import json
from dataclasses import replace
from pathlib import Path

import forks
import pytest
from models import save_tiny

import offline_kto
from offline_kto.kto_core.errors import ConfigError, KTOError
from offline_kto.kto_core.options import resolve
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.run.train_run import train
from offline_kto.train.run_files import begun_with
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials

TRAIN = "from offline_kto.train.cli import train; train()"


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(cache=cache, out=tmp_path / "runs/first", batch_size=8, max_steps=2, device="cpu", dry_run=True)


def everything_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_nothing_is_loaded_and_nothing_is_written(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PolicyFiles, "load", lambda *args, **options: pytest.fail("the policy was loaded"))
    monkeypatch.chdir(tmp_path)
    before = everything_in(tmp_path)
    assert train(config) == config.out
    assert offline_kto.train(config.cache, batch_size=8, dry_run=True) is None  # would be in runs/
    assert everything_in(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("updates     2 of 8 rows") and "1e-06 (auto for all weights)" in line for line in lines)
    assert lines[-1].startswith("dry run")


def test_from_the_command_line(config: TrainConfig, tmp_path: Path) -> None:
    done = forks.Fork(TRAIN, "--cache", config.cache, "--out", tmp_path / "runs/x", "--lora-rank", 4, "--dry-run").wait(
        100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "learning rate 2e-05 (auto for LoRA)" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nowhere"}, "no such model folder"),
        ({"loss": "dpo"}, "no two of its"),
        ({"training": {"otpim": "sgd"}}, "unknown key 'otpim'. Did you mean 'optim'"),
        ({"report_to": "comet_ml"}, "--report-to comet_ml"),
        ({"eval_fraction": 0.999}, "eval-fraction"),
        ({"out": Path("taken/run")}, "cannot be written"),
    ],
)
def test_what_would_stop_the_run_stops_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    before = everything_in(tmp_path)
    with pytest.raises(KTOError, match=message):
        train(replace(config, **change))  # type: ignore[arg-type]
    assert everything_in(tmp_path) == before


def test_the_policy_is_checked_without_its_weights(config: TrainConfig, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "quantised")
    settings = json.loads((other / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(KTOError, match="quanti"):
        train(replace(config, model=str(other)))


def test_time_is_that_of_a_run_like_this_one(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(**change: object) -> str:
        capsys.readouterr()
        train(replace(config, **change))  # type: ignore[arg-type]
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("memory      --memory full: ") and "activations" in line for line in lines)
        assert any(line.startswith("disk        ") and line.endswith(" free") for line in lines)
        return next(line for line in lines if line.startswith("time  "))

    assert planned() == (
        "time        unknown: no run like this one was measured here; the line of the first updates shows the time left"
    )
    run = train(replace(config, dry_run=False, save_steps=0, out=tmp_path / "runs/before"))
    final = json.loads((run / "run.json").read_text())["final"]
    seconds = final["seconds_per_update"]
    assert seconds > 0
    assert f"at {seconds:.3g} s an update as in {run}" in planned(max_steps=100, seed=5, learning_rate=1e-4)
    for other in ({"batch_size": 4}, {"max_tokens": 77}, {"eval_fraction": 0.3}):
        assert "unknown" in planned(**other)
    record = json.loads((run / "run.json").read_text())
    record["final"]["computed_on"] = "8 x NVIDIA H100"
    (run / "run.json").write_text(json.dumps(record))
    assert "unknown" in planned()


def test_a_run_that_is_there_is_not_planned_over(config: TrainConfig) -> None:
    run = train(replace(config, dry_run=False, save_steps=1))
    before = everything_in(run)
    with pytest.raises(ConfigError, match="not empty"):
        train(config)
    with pytest.raises(ConfigError, match="started with --seed 0, not 1"):
        train(replace(config, resume=True, seed=1))
    train(replace(config, resume=True))
    assert everything_in(run) == before


# Options in YAML files


@pytest.fixture
def in_yaml(cache: Path, tmp_path: Path) -> Path:
    """A file beside which its run is to lie."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.yaml").write_text("out: runs/a\nbatch_size: 8\nmax_steps: 1\ndevice: cpu\nsave_steps: 1\n")
    return folder / "mine.yaml"


def test_a_config_may_name_the_run_folder(in_yaml: Path, cache: Path, tmp_path: Path) -> None:
    """The command line wins over it, and a run's own config.yaml does not name the folder."""
    resolved = resolve(TrainConfig, {"cache": cache}, yaml_path=in_yaml)
    assert resolved.out == in_yaml.parent / "runs/a"
    assert resolve(TrainConfig, {"cache": cache, "out": tmp_path}, yaml_path=in_yaml).out == tmp_path
    run = train(resolved)
    assert "out:" not in (run / "config.yaml").read_text()
    assert begun_with({"resume": True}, in_yaml) == run / "config.yaml"
    assert begun_with({"resume": True}) is None
    again = offline_kto.train(cache, config=in_yaml, resume=True, max_steps=2)
    assert again is not None
    assert (again.path, again.updates) == (run, 2)


def test_a_sweep_names_its_folder_beside_its_trials(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("out: sweeps/a\nspace: {beta: [0.1, 0.2]}\n")
    assert resolve(SweepConfig, {}, yaml_path=path).out == tmp_path / "sweeps/a"
    with pytest.raises(ConfigError, match="train: 'out' is set for the whole sweep by --out"):
        Trials.of(SweepConfig(space={"beta": [0.1]}, train={"out": "runs"}))


def test_objectives_are_a_table_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("objective: {helpful: 1, harmless: 0.5}\n")
    config = resolve(TrainConfig, {}, yaml_path=path)
    assert config.objective_weights == {"helpful": 1.0, "harmless": 0.5}
    trials = Trials.of(SweepConfig(space={"beta": [0.1]}, train={"objective": {"helpful": 2}}))
    assert trials.config({"beta": 0.1}).objective_weights == {"helpful": 2.0}
    path.write_text("objective: {helpful: often}\n")
    with pytest.raises(ConfigError, match="expected names and weights"):
        resolve(TrainConfig, {}, yaml_path=path)
    path.write_text("model: {a: b}\n")
    with pytest.raises(ConfigError, match="model: expected text"):
        resolve(TrainConfig, {}, yaml_path=path)
