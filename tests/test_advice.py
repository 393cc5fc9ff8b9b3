"""Class weights by `auto`, and the warnings that give the number to use."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.settings import BALANCE, class_weight_values, warnings_for
from offline_kto.train.diagnostics.training import Settings
from offline_kto.train.run.resumed_options import compare_options
from offline_kto.train.run_files import config_text
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials

COUNTS = st.integers(1, 10**6)


@given(COUNTS, COUNTS, st.sampled_from([{"desirable_weight": "auto"}, {"undesirable_weight": "auto"}]))
def test_auto_brings_one_weight_into_the_published_range(n_d: int, n_u: int, options: dict[str, Any]) -> None:
    weights = class_weight_values(TrainConfig(**options), n_d, n_u)
    assert BALANCE[0] <= weights[0] * n_d / (weights[1] * n_u) <= BALANCE[1]
    assert 1.0 in weights


@given(COUNTS, COUNTS)
def test_both_on_auto_raise_the_rarer_class(n_d: int, n_u: int) -> None:
    config = TrainConfig(desirable_weight="auto", undesirable_weight="auto")
    weights = class_weight_values(config, n_d, n_u)
    assert BALANCE[0] <= weights[0] * n_d / (weights[1] * n_u) <= BALANCE[1]
    assert min(weights) == 1.0


def test_auto_respects_a_given_weight_and_leaves_balanced_data_alone() -> None:
    config = TrainConfig(desirable_weight=3.0, undesirable_weight="auto")
    assert class_weight_values(config, 100, 300) == (3.0, 1.0)
    weights = class_weight_values(config, 100, 100)
    assert weights[0] == 3.0
    assert 1 <= 3.0 / weights[1] <= 4 / 3


def test_auto_cannot_balance_against_nothing() -> None:
    with pytest.raises(TrainingError, match="weight of 0"):
        class_weight_values(TrainConfig(desirable_weight="auto", undesirable_weight=0.0), 5, 5)
    assert class_weight_values(TrainConfig(desirable_weight="auto"), 5, 0) == (1.0, 1.0)


def test_usual_settings_pass_without_a_warning() -> None:
    assert warnings_for(TrainConfig(), 110, 100, (1.0, 1.0)) == []
    assert warnings_for(TrainConfig(lora_rank=8), 110, 100, (1.0, 1.0)) == []
    assert warnings_for(TrainConfig(lora_rank=8, learning_rate=2e-5), 110, 100, (1.0, 1.0)) == []


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1e-6),
        ({"lora_rank": 8}, 2e-5),
        ({"learning_rate": 3e-5}, 3e-5),
        ({"lora_rank": 8, "learning_rate": "3e-5"}, 3e-5),
    ],
)
def test_the_rate_of_auto_depends_on_the_weights_that_are_trained(options: dict[str, Any], rate: float) -> None:
    config = TrainConfig(**options)
    assert config.peak_rate == rate
    assert yaml.safe_load(config_text(config))["learning_rate"] == pytest.approx(rate)
    assert Settings.of(config, (1.0, 1.0), (1, 1)).learning_rate == rate
    # A run's config.yaml holds the number, and the same command continues it.
    assert compare_options(config, {**options, "learning_rate": rate}, Path("run")) == []


def test_a_sweep_over_ranks_gives_each_trial_the_rate_of_its_weights() -> None:
    trials = Trials.of(SweepConfig(cache=Path("refs"), space={"lora_rank": [0, 8]}))
    assert [trials.config({"lora_rank": rank}).peak_rate for rank in (0, 8)] == [1e-6, 2e-5]


@pytest.mark.parametrize("rate", ["fast", "0", 0.0, -1e-6])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigError, match="--learning-rate must be"):
        TrainConfig(learning_rate=rate)


@pytest.mark.parametrize(
    ("change", "counts", "words"),
    [
        ({}, (300, 100), "use --desirable-weight auto (or 0.333 to 0.444)"),
        ({}, (100, 0), "every training row is desirable"),
        ({}, (0, 100), "every training row is undesirable"),
        ({"beta": 5.0}, (110, 100), "--beta 5"),
        ({"learning_rate": 1e-3}, (110, 100), "1e-06 is usual"),
        ({"learning_rate": 1e-6, "lora_rank": 8}, (110, 100), "2e-05 is usual"),
        ({"batch_size": 2}, (110, 100), "--batch-size 2"),
    ],
)
def test_a_warning_gives_the_number_to_use(change: dict[str, Any], counts: tuple[int, int], words: str) -> None:
    lines = warnings_for(replace(TrainConfig(), **change), *counts, (1.0, 1.0))
    assert len(lines) == 1
    assert words in lines[0]
