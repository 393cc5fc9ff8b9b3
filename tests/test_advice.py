"""Class weights by `auto`, and the warnings that give the number to use."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.losses.verdict import Verdict
from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.outcome import Tried, advice
from offline_kto.train.diagnostics.settings import BALANCE, class_warnings, class_weight_values, warnings_for
from offline_kto.train.diagnostics.training import Settings, Watch
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
    assert warnings_for(TrainConfig(loss="dpo", batch_size=2), 100, 100, (1.0, 1.0)) == []  # it has no z0
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


def test_a_sweep_may_search_a_rate_of_0_on_a_linear_scale() -> None:
    for rates in ([0, 1e-6], {"low": 0, "high": 1e-6}):
        trials = Trials.of(SweepConfig(space={"learning_rate": rates}))
        assert trials.config({"learning_rate": 0.0}).peak_rate == 0
    with pytest.raises(ConfigError, match="a range on a log scale must begin above 0, got 0"):
        Trials.of(SweepConfig(space={"learning_rate": {"low": 0, "high": 1e-6, "log": True}}))


@pytest.mark.parametrize("rate", ["fast", "-1", -1e-6])
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
        ({"learning_rate": 0}, (110, 100), "nothing will be learned"),
        ({"batch_size": 2}, (110, 100), "--batch-size 2"),
    ],
)
def test_a_warning_gives_the_number_to_use(change: dict[str, Any], counts: tuple[int, int], words: str) -> None:
    lines = warnings_for(replace(TrainConfig(), **change), *counts, (1.0, 1.0))
    assert len(lines) == 1
    assert words in lines[0]


def test_masses_are_not_called_rows() -> None:
    (line,) = class_warnings(300.5, 100, (1.0, 1.0), by_mass=True)
    assert line.startswith("masses of 300.5 desirable and 100 undesirable with weights 1 and 1 are outside")
    assert "rows" not in line


# One learning rate in all messages of a run

WORSE = Verdict("worse", "rewards/margins", "the held-out margin fell")


def rates(lines: list[str]) -> set[float]:
    return {float(one) for line in lines for one in re.findall(r"--learning-rate (\d[\d.e-]*\d|\d)\b", line)}


def evaluation_of(step: int) -> dict[str, Any]:
    """An evaluation of a model that has become worse."""
    change = {"eval/change/margin": -0.5, "eval/change/margin_low": -0.6, "eval/change/margin_high": -0.4}
    return {"step": step, "epoch": 0.5, "eval/loss": 0.5 + step / 1000, **change}


def test_plan_warning_and_verdict_advise_the_same_rate() -> None:
    """Rewards run far in the first updates, and held-out rows get worse."""
    config = TrainConfig(learning_rate=1e-3, max_steps=20)
    (plan,) = warnings_for(config, 110, 100, (1.0, 1.0))
    assert "1e-06 is usual" in plan
    watch = Watch(Settings.of(config, (1.0, 1.0), (110, 100)))
    records = [{"step": i, "loss": 0.5, "rewards/chosen": -20.0, "rewards/rejected": -30.0} for i in range(1, 6)]
    found = [warning for record in [*records, evaluation_of(5), evaluation_of(10)] for warning in watch.add(record)]
    assert [one.kind for one in found] == ["rate-high", "worse"]
    tried = Tried(1e-3, -10.0, -0.5, advised_rate=watch.advised_rate, got_worse=watch.got_worse)
    assert rates([*(one.text for one in found), advice(WORSE, tried)]) == {1e-6}


def test_the_first_warning_of_a_run_sets_the_rate() -> None:
    """The rate is a usual one, so the plan advises nothing."""
    config = TrainConfig(learning_rate=5e-6, max_steps=100)
    watch = Watch(Settings.of(config, (1.0, 1.0), (110, 100)))
    assert watch.advised_rate is None
    records = [{"step": i, "loss": 0.5, "rewards/chosen": 5.0, "rewards/rejected": 5.0} for i in range(1, 6)]
    found = [warning for record in [*records, evaluation_of(50), evaluation_of(60)] for warning in watch.add(record)]
    (rate,) = rates([one.text for one in found])
    assert len(found) == 2
    assert rate == watch.advised_rate == 1e-6
    assert f"--learning-rate {rate:g}" in advice(WORSE, Tried(5e-6, None, -0.5, advised_rate=rate))
    # Advice that goes the other way is not replaced by it.
    slow = advice(
        Verdict("no difference", "rewards/margins", "hardly changed"), Tried(5e-6, None, 0.0, advised_rate=rate)
    )
    assert "--learning-rate 5e-05" in slow


@pytest.mark.parametrize(
    "verdict",
    [
        WORSE,
        Verdict("worse", "rewards/chosen", "lost"),
        Verdict("no difference", "rewards/margins", "hardly changed"),
    ],
)
def test_the_verdict_repeats_that_labels_may_be_swapped(verdict: Verdict) -> None:
    hint = "check that thumbs up and down are not swapped"
    for learned in (0.5, None):
        assert advice(verdict, Tried(1e-6, learned, 0.0, got_worse=True)).count(hint) == 1
    assert hint not in advice(Verdict("better", "rewards/margins", "rose"), Tried(1e-6, 0.5, 0.5, got_worse=True))


def test_a_rate_of_0_is_advised_to_be_changed_by_nobody_but_the_verdict() -> None:
    config = TrainConfig(learning_rate=0, max_steps=100)
    watch = Watch(Settings.of(config, (1.0, 1.0), (110, 100)))
    still = {"loss": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "learning_rate": 0.0}
    assert [one for i in range(1, 101) for one in watch.add({"step": i, "epoch": i / 100, **still})] == []
    none = Verdict("no difference", "rewards/margins", "hardly changed")
    assert "the learning rate was 0, so nothing was learned" in advice(none, Tried(0.0, 0.0, 0.0))
