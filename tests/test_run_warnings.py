"""Warnings during a run: told for runs that go wrong, with a number that helps; never for runs that go well."""

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.training import RunWarning, Settings, Watch, run_warnings
from offline_kto.train.loss_traits import LOSSES

SETTINGS = Settings(
    loss="kto",
    beta=0.1,
    learning_rate=1e-6,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    desirable_rows=1000,
    undesirable_rows=1000,
    epochs=1.0,
)
Curve = Callable[[float], float]


def run_of(
    steps: int,
    *,
    desirable: Curve,
    undesirable: Curve,
    kl: Curve = lambda part: 0.0,
    logps: Curve = lambda part: -200.0,
    noise: float = 0.0,
    absent: float = 0.0,
    logging_steps: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Training records of one epoch whose values follow curves over the part of the run that is done.

    Args:
        noise: of a batch's reward: heavy-tailed, and as in real runs the larger the farther rewards have come. A record
            is a mean over the batches since the last one.
        absent: how often a batch has no row of a class.
    """
    rng = random.Random(seed)

    def shaken(value: float) -> float:
        spread = noise / math.sqrt(logging_steps) * (0.02 + min(abs(value), 1.0))
        return value + spread * rng.gauss(0, 1) / max(0.4, rng.random())

    records = []
    for step in range(1, steps + 1):
        if step != 1 and step % logging_steps and step != steps:
            continue
        part = step / steps
        good, bad, nats = shaken(desirable(part)), shaken(undesirable(part)), shaken(kl(part))
        record: dict[str, Any] = {"step": step, "epoch": part, "learning_rate": 1e-6, "grad_norm": 1 + rng.random()}
        slope = [1 / (1 + math.exp(good - 0.1 * nats)), 1 / (1 + math.exp(0.1 * nats - bad))]
        record |= {"loss": sum(slope) / 2, "kl": max(0.0, nats), "kl_raw": nats, "accuracy": 0.7}
        if rng.random() >= absent:
            record |= {"rewards/chosen": good, "logps/chosen": logps(part)}
        if rng.random() >= absent:
            record["rewards/rejected"] = bad
        records.append(record)
    return records


def evaluated(records: list[dict[str, Any]], losses: dict[int, float]) -> list[dict[str, Any]]:
    """The records with evaluations after these steps."""
    found: list[dict[str, Any]] = []
    for record in records:
        found.append(record)
        if record["step"] in losses:
            found.append({"step": record["step"], "epoch": record["epoch"], "eval/loss": losses[record["step"]]})
    return found


def kinds(found: list[RunWarning]) -> list[str]:
    return [warning.kind for warning in found]


def number_for(option: str, warning: RunWarning) -> float:
    """Return the value that a text advises."""
    match = re.search(rf"{option} (\d[\d.e-]*\d|\d)", warning.text)
    assert match, warning.text
    return float(match[1])


class TestToldWhen:
    def test_rewards_run_far_in_the_first_updates(self) -> None:
        records = run_of(100, desirable=lambda x: 90 * x, undesirable=lambda x: -20 * x, noise=0.1)
        (warning,) = run_warnings(records, SETTINGS)  # what else is out of bounds then has the same cause
        assert (warning.kind, warning.step) == ("rate-high", pytest.approx(8, abs=2))
        assert "desirable rewards are at +" in warning.text
        assert number_for("--learning-rate", warning) in (1e-7, 2e-7)

    def test_rewards_hardly_move(self) -> None:
        records = run_of(1000, desirable=lambda x: 0.01 * x, undesirable=lambda x: -0.01 * x, noise=0.1)
        (warning,) = run_warnings(records, SETTINGS)
        assert (warning.kind, warning.step) == ("rate-low", 266)
        assert number_for("--learning-rate", warning) == 1e-5

    def test_not_while_warming_up_or_with_much_of_the_run_ahead(self) -> None:
        slow = run_of(1000, desirable=lambda x: 0.2 * x, undesirable=lambda x: -0.2 * x)
        assert run_warnings(slow, SETTINGS) == []
        assert kinds(run_warnings(slow, replace(SETTINGS, max_steps=100))) == ["rate-low"]
        warming = [dict(r, learning_rate=1e-6 * r["epoch"] ** 2) for r in slow]
        still = [{**r, "rewards/chosen": r["epoch"] ** 3, "rewards/rejected": -(r["epoch"] ** 3)} for r in warming]
        assert run_warnings(still, SETTINGS) == []

    @pytest.mark.parametrize("loss", ["kto", "humanline"])
    def test_kl_runs_away(self, loss: str) -> None:
        records = run_of(400, desirable=lambda x: 7 * x, undesirable=lambda x: 5 * x, kl=lambda x: 60 * x, noise=0.1)
        (warning,) = run_warnings(records, replace(SETTINGS, loss=loss))
        assert warning.kind == "kl"
        assert "still rising" in warning.text
        assert number_for("kl is", warning) == pytest.approx(22, abs=3)
        assert number_for("--learning-rate", warning) in (4e-7, 5e-7)

    def test_kl_stands_far_off(self) -> None:
        for nats, told in ((45.0, ["kl"]), (25.0, [])):
            z0 = 0.1 * nats
            records = run_of(
                100, desirable=lambda x, z=z0: z + x, undesirable=lambda x, z=z0: z - x, kl=lambda x, n=nats: n
            )
            records = [r for r in records if r["step"] > 20]
            assert kinds(run_warnings(records, SETTINGS)) == told

    @pytest.mark.parametrize("desirable", [-1.5, 0.0], ids=["falls too", "does not move"])
    def test_desirable_rows_are_not_learned(self, desirable: float) -> None:
        records = run_of(300, desirable=lambda x: desirable * x, undesirable=lambda x: -4 * x, noise=0.1)
        (warning,) = run_warnings(records, SETTINGS)
        assert warning.kind == "class"
        assert warning.step == pytest.approx(182, abs=10)  # at 150 undesirable rewards pass -2
        assert "only undesirable rows are learned" in warning.text
        assert number_for("--desirable-weight", warning) == 1.33

    def test_undesirable_rows_are_not_learned(self) -> None:
        records = run_of(300, desirable=lambda x: 4 * x, undesirable=lambda x: 0.5 * x, noise=0.1)
        (warning,) = run_warnings(records, replace(SETTINGS, desirable_rows=1200))
        assert warning.kind == "class"
        assert number_for("--undesirable-weight", warning) == 1.2
        (warning,) = run_warnings(records, SETTINGS)  # a greater weight would leave the published range
        assert number_for("--learning-rate", warning) == 5e-7

    def test_the_advised_weight_draws_no_warning_of_its_own(self) -> None:
        records = run_of(300, desirable=lambda x: -x, undesirable=lambda x: -4 * x)
        for rows in ((100, 1000), (1000, 1000), (1000, 900)):
            of = replace(SETTINGS, desirable_rows=rows[0], undesirable_rows=rows[1])
            (warning,) = run_warnings(records, of)
            assert number_for("--desirable-weight", warning) * rows[0] / rows[1] == pytest.approx(4 / 3, rel=0.01)

    def test_not_where_desirable_rows_are_certain_already(self) -> None:
        records = run_of(300, desirable=lambda x: -0.01, undesirable=lambda x: -5 * x, logps=lambda x: -2.5, noise=0.1)
        assert run_warnings(records, SETTINGS) == []

    def test_not_for_a_class_that_has_no_weight(self) -> None:
        records = run_of(300, desirable=lambda x: -x, undesirable=lambda x: -4 * x)
        assert run_warnings(records, replace(SETTINGS, desirable_weight=0.0)) == []

    @pytest.mark.parametrize("loss", ["kto", "apo_zero", "bco", "dpo"])
    def test_both_classes_are_saturated(self, loss: str) -> None:
        records = run_of(600, desirable=lambda x: 8 * x, undesirable=lambda x: -8 * x, noise=0.1)
        (warning,) = run_warnings(records, replace(SETTINGS, loss=loss))
        assert warning.kind == "saturated"
        assert warning.step == pytest.approx(330, abs=15)
        assert number_for("--max-steps", warning) == pytest.approx(165, abs=15)
        assert number_for("--beta", warning) in (0.04, 0.05)

    def test_held_out_loss_rises_while_training_loss_falls(self) -> None:
        records = run_of(500, desirable=lambda x: 3 * x, undesirable=lambda x: -3 * x, noise=0.1)
        losses = {100: 0.45, 200: 0.41, 300: 0.42, 400: 0.44, 500: 0.46}
        (warning,) = run_warnings(evaluated(records, losses), SETTINGS)
        assert (warning.kind, warning.step) == ("overfitting", 500)
        assert "rose from 0.4100 at step 200 to 0.4600" in warning.text
        assert number_for("--early-stopping", warning) == 2
        assert number_for("--max-steps", warning) == 200
        assert (
            run_warnings(evaluated(records, losses), replace(SETTINGS, early_stopping=3)) == []
        )  # it takes care of that
        flat = run_of(500, desirable=lambda x: 1.0, undesirable=lambda x: -1.0)
        assert run_warnings(evaluated(flat, losses), SETTINGS) == []  # worse on both: that is not overfitting

    @pytest.mark.parametrize("loss", ["ipo", "slic"])
    def test_losses_without_a_sigmoid_have_another_scale(self, loss: str) -> None:
        records = run_of(500, desirable=lambda x: 90 * x, undesirable=lambda x: -90 * x)
        losses = {100: 0.41, 200: 0.42, 300: 0.44, 400: 0.46}
        assert kinds(run_warnings(evaluated(records, losses), replace(SETTINGS, loss=loss))) == ["overfitting"]

    def test_with_records_of_many_updates(self) -> None:
        for every in (10, 50):
            records = run_of(
                1000, desirable=lambda x: 8 * x, undesirable=lambda x: -8 * x, noise=0.1, logging_steps=every
            )
            (warning,) = run_warnings(records, SETTINGS)
            assert warning.kind == "saturated"
        records = run_of(200, desirable=lambda x: 5.0, undesirable=lambda x: -5.0, logging_steps=50)
        assert run_warnings(records, SETTINGS) == []  # five records are few


SHAPES: dict[str, Curve] = {
    "linear": lambda x: x,
    "early": lambda x: 1 - math.exp(-8 * x),
    "root": math.sqrt,
    "late": lambda x: x**1.5,
}


@st.composite
def healthy_runs(draw: st.DrawFn) -> tuple[list[dict[str, Any]], str]:
    """Margins that grow from 0 to between 1 and 4, kl to a few nats, in 5 to 1,500 updates, with the noise of batches."""
    loss = draw(st.sampled_from(LOSSES))
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    margin, share = draw(st.floats(1, 4)), draw(st.floats(0.2, 0.8))
    nats = draw(st.floats(-20, 5)) if loss in ("kto", "humanline") else 0.0
    z0 = 0.1 * max(0.0, nats)  # moves with kl, and the classes part around it
    records = run_of(
        draw(st.integers(5, 50) | st.integers(50, 1500)),
        desirable=lambda x: margin * share * shape(x) + z0 * x,
        undesirable=lambda x: -margin * (1 - share) * shape(x) + z0 * x,
        kl=lambda x: nats * x,
        noise=draw(st.floats(0, 0.3)),
        absent=draw(st.sampled_from([0.0, 0.1, 0.6])),
        logging_steps=draw(st.sampled_from([1, 1, 1, 10, 50])),
        seed=draw(st.integers(0, 10**6)),
    )
    if loss not in ("kto", "humanline"):
        records = [{name: value for name, value in r.items() if not name.startswith("kl")} for r in records]
    every, rng = draw(st.integers(5, 200)), random.Random(draw(st.integers(0, 10**6)))
    held_out = {
        r["step"]: (0.5 - 0.1 * shape(r["epoch"])) * (1 + 0.01 * rng.gauss(0, 1))
        for r in records
        if r["step"] % every == 0
    }
    start = draw(st.sampled_from([0, 0, len(records) // 2]))  # a resumed run without the records of before
    return evaluated(records, held_out)[start:], loss


@settings(max_examples=150)
@given(healthy_runs())
def test_a_healthy_run_is_left_alone(run: tuple[list[dict[str, Any]], str]) -> None:
    records, loss = run
    assert run_warnings(records, replace(SETTINGS, loss=loss)) == []


def test_one_wild_record_gives_no_warning() -> None:
    for wild in ({"rewards/chosen": 400.0, "rewards/rejected": -400.0}, {"kl": 5000.0}, {"rewards/chosen": -400.0}):
        records = run_of(200, desirable=lambda x: 2 * x, undesirable=lambda x: -2 * x, noise=0.1)
        for at in (3, 60, 130):
            records[at].update(wild)
        assert run_warnings(records, SETTINGS) == []


values = st.none() | st.floats() | st.floats(-10, 10) | st.just("text") | st.booleans()
names = ["loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "learning_rate", "epoch", "eval/loss"]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(names), values).flatmap(
            lambda r: st.integers(-5, 200).map(lambda step: {**r, "step": step})
        ),
        max_size=60,
    ),
    st.sampled_from(LOSSES),
)
def test_live_and_afterwards_agree_on_any_records(records: list[dict[str, Any]], loss: str) -> None:
    of = replace(SETTINGS, loss=loss)
    watch, told = Watch(of), []
    for record in records:
        told += watch.add(record)
    assert told == run_warnings(iter(records), of)
    assert len(set(kinds(told))) == len(told)
    for warning in told:
        assert "nan" not in warning.text
        assert "inf" not in warning.text


def test_records_read_back_from_json_say_the_same() -> None:
    def troubles() -> Iterator[dict[str, Any]]:
        yield from run_of(300, desirable=lambda x: -x, undesirable=lambda x: -4 * x, kl=lambda x: 70 * x, noise=0.2)

    told = run_warnings(troubles(), SETTINGS)
    assert len(told) >= 2
    assert (
        run_warnings(
            [json.loads(json.dumps(r)) for r in troubles()], Settings(**json.loads(json.dumps(asdict(SETTINGS))))
        )
        == told
    )


def test_a_record_costs_no_more_late_in_a_run() -> None:
    watch = Watch(SETTINGS)
    for record in run_of(2000, desirable=lambda x: 2 * x, undesirable=lambda x: -2 * x):
        watch.add(record)
    assert len(watch._window) <= 32


def test_settings_come_from_the_options_with_weights_as_numbers() -> None:
    config = TrainConfig(desirable_weight="auto", beta=0.2, max_steps=7)
    found = Settings.of(config, (1.5, 1.0), (10, 20))
    assert (found.beta, found.desirable_weight, found.undesirable_rows, found.max_steps) == (0.2, 1.5, 20, 7)


def test_a_loss_without_traits_fails_instead_of_giving_no_warnings() -> None:
    with pytest.raises(KeyError, match="unlisted"):
        run_warnings([], replace(SETTINGS, loss="unlisted"))
