"""Numbers that no library can count with are refused by their option, wherever they come from."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from offline_kto.kto_core.errors import ConfigError, KTOError
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.options import flag, resolve, value_types
from offline_kto.precompute.cli import cache as kto_cache
from offline_kto.precompute.cli import precompute as kto_precompute
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import head
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.arguments import training_arguments
from offline_kto.train.run.train_run import train
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials

CONFIGS = (PrecomputeConfig, TrainConfig, SweepConfig)
NUMBERS = [
    (config, field.name)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if {int, float} & set(value_types(config)[field.name]) and bool not in value_types(config)[field.name]
]
SIDES = ("humanline_low", "humanline_high")  # infinity is no limit there


@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=lambda one: getattr(one, "__name__", one))
@pytest.mark.parametrize("value", [10**30, 10**400, float("inf"), float("-inf"), float("nan"), -(10**30)], ids=repr)
def test_no_option_takes_a_number_that_nobody_can_count_to(config: type, name: str, value: float) -> None:
    """Accept 10**30 as a real number, and refuse it as a count."""
    real = float in value_types(config)[name]
    if (real and value == 10**30) or (name in SIDES and abs(value) in (10**30, float("inf"))):
        return
    with pytest.raises(ConfigError, match=rf"^{flag(name)} |--humanline-low .* must have 0 between") as caught:
        config(**{name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, ".inf", "-.inf", ".nan", "1e400", "0x" + "f" * 500])
@pytest.mark.parametrize(
    "name", ["batch_size", "lora_rank", "warmup", "max_steps", "epochs", "max_tokens", "lora_alpha"]
)
def test_nor_does_a_yaml_file(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "kto.yaml"
    path.write_text(f"{name}: {text}\n")
    with pytest.raises(ConfigError) as caught:
        resolve(TrainConfig, {}, yaml_path=path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "space", [{"low": 0.1, "high": 10**400}, {"low": -(10**400), "high": 1}, [10**400], [10**5000]]
)
def test_nor_does_the_space_of_a_sweep(space: Any) -> None:
    with pytest.raises(ConfigError):
        Trials.of(SweepConfig(search="random", space={"beta": space}, train={}))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"adam_epsilon": 10**400}, "training: adam_epsilon must be below"),
        ({"max_grad_norm": float("nan")}, "training: max_grad_norm must be a number"),
        ({"lr_scheduler_kwargs": {"power": 10**30}}, "training: lr_scheduler_kwargs: power must be below"),
        ({"adam_beta1": 2.0}, "training: optim: adamw_torch"),
        ({"adam_beta2": float("inf")}, "training: optim: adamw_torch"),
        ({10**5000: 1}, "training: unknown key 'a huge number'"),
    ],
    ids=lambda one: str(one)[:30] if isinstance(one, str) else "",
)
def test_nor_does_the_trainers_table(table: dict[Any, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        training_arguments(TrainConfig(training=table), tmp_path, Precision(torch.float32), held_out=False)


def test_no_limit_of_the_gradient_is_one(tmp_path: Path) -> None:
    config = TrainConfig(training={"max_grad_norm": float("inf")}, device="cpu")
    assert training_arguments(config, tmp_path, Precision(torch.float32), held_out=False).max_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (kto_precompute, ["--model", "none", "--data", "none", "--limit", str(10**30)]),
        (kto_precompute, ["--model", "none", "--data", "none", "--max-length", str(10**30)]),
        (kto_train, ["--cache", "none", "--warmup", "inf"]),
        (kto_train, ["--cache", "none", "--batch-size", str(10**30)]),
        (kto_train, ["--cache", "none", "--lora-rank", str(10**30)]),
        (kto_train, ["--cache", "none", "--max-tokens", str(10**30)]),
    ],
    ids=lambda one: one[-2] if isinstance(one, list) else one.name,
)
def test_the_commands_say_so(command: Any, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, result.stderr.startswith(f"Error: {arguments[-2]} must be ")) == (1, True), result.output


@pytest.mark.parametrize("rows", ["-1", "-" + "9" * 30])
def test_rows_to_show_are_not_negative(cache: Path, rows: str) -> None:
    result = CliRunner().invoke(kto_cache, ["head", str(cache), "-n", rows])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --rows must be at least 0")


@pytest.mark.parametrize("columns", ["1", "0", "-5", "3"])
def test_more_rows_than_there_are_in_however_narrow_a_terminal(
    cache: Path, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print(*head(cache, rows=10**30, model=None), sep="\n")
    assert capsys.readouterr().out.count("  ref_logps ") == 20


@pytest.mark.parametrize(
    "greatest",
    [
        {"batch_size": 2**31 - 1, "max_tokens": 2**31 - 1, "logging_steps": 2**31 - 1, "save_steps": 2**31 - 1},
        {"epochs": 1e6, "warmup": 2**31 - 1, "seed": 2**32 - 1, "eval_seed": 2**32 - 1, "eval_steps": 2**31 - 1},
        {"learning_rate": 1e-320, "beta": 1e-320, "weight_decay": 0.0, "early_stopping": 2**31 - 1},
    ],
    ids=str,
)
def test_the_greatest_that_are_taken_train(cache: Path, greatest: dict[str, Any], tmp_path: Path) -> None:
    held_out = {"eval_fraction": 0.2} if {"eval_steps", "early_stopping"} & set(greatest) else {}
    config = TrainConfig(cache=cache, out=tmp_path / "run", max_steps=1, device="cpu", batch_size=8)
    try:
        train(replace(config, **greatest, **held_out))
    except KTOError as error:
        pytest.fail(f"refused: {error}")


@pytest.mark.parametrize("rate", [1.5, 9e18])
def test_a_learning_rate_that_moves_every_weight_by_more_than_one_is_refused(rate: float) -> None:
    """Such a model's scores can still be finite numbers."""
    with pytest.raises(ConfigError, match=r"^--learning-rate must be at most 1, got"):
        TrainConfig(learning_rate=rate)
