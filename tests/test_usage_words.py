"""Settings that do not suit this machine are one message that says what to do."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.models.precision import Precision
from offline_kto.train.cli import train as command
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.arguments import training_arguments

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks/head_bench.py"
CONFIG = TrainConfig(cache=Path("refs"), device="cpu")


def test_one_gpu_is_chosen_by_cuda_visible_devices() -> None:
    found = CliRunner().invoke(command, ["--cache", "refs", "--device", "cuda:0"])
    assert found.exit_code == 2
    assert "set CUDA_VISIBLE_DEVICES" in found.output
    with pytest.raises(ConfigError, match="set CUDA_VISIBLE_DEVICES"):
        replace(CONFIG, device="cuda:0")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tf32": True}, "training: tf32: only NVIDIA GPUs .* Remove it from the table"),
        ({"optim": "adamw_torhc"}, "has no optimizer 'adamw_torhc'. Did you mean 'adamw_torch'?"),
    ],
)
def test_the_training_table_on_a_cpu(table: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        training_arguments(replace(CONFIG, training=table), tmp_path, Precision(torch.float32), held_out=False)


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^The environment has ACCELERATE_USE_DEEPSPEED=true"):
        training_arguments(CONFIG, tmp_path, Precision(torch.float32), held_out=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "foo"], "expected pairs of numbers"),
        pytest.param(["--device", "meta"], "--device meta: not available here", marks=pytest.mark.slow),
    ],
)
def test_the_benchmark_of_the_output_layer_refuses_what_it_cannot_run(options: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
