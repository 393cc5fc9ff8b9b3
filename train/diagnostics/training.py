"""Find warnings during a run, each with the value to change, from the records of `metrics.jsonl` alone.

Rewards are beta times log-ratios, and the loss applies a sigmoid around z0 = beta * kl. The sigmoid sets the scale on
which rewards are too small or too large, for any model. Each kind of warning is given once in a run.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.losses.verdict import LEAST_LOSS, LEAST_MARGIN, Change
from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.rates import RateAdvice, rounded
from offline_kto.train.diagnostics.settings import BALANCE, usual_rate
from offline_kto.train.loss_traits import LOSS_TRAITS

# A batch's values are noisy, and a class may be absent from it. So the median over the last updates is checked, once
# there are a few, and a condition must last for a while. A record of --logging-steps N counts as N updates, but one or
# two records are never enough.
_WINDOW = 32
_LEAST = 8
_HOLD = 16
_RECORDS = 8
_LEAST_RECORDS = 5
_HOLD_RECORDS = 4

# At a distance of 4 from z0 the sigmoid has 7 % of its greatest slope, at 2 it has 42 %; healthy runs end at 1 to 3.
_FLAT = 4.0

# Published runs reach rewards of 1 after hundreds of updates. A flat loss within 20 updates, in three
# records in a row, is divergence.
_FIRST_UPDATES = 20
_FIRST_RECORDS = 3

# At 0.05 (half a nat at beta 0.1) the loss has changed by a fortieth. Rewards grow in proportion to updates times
# learning rate, or faster; after a quarter of the run, and at least 60 updates, their final size can be extrapolated
# with a safety factor of ten.
_STILL = 0.05
_STILL_FROM = 60
_STILL_SHARE = 0.25
_STILL_FACTOR = 10.0

# beta * kl of healthy runs stays below 1 (a few nats at beta 0.1). At 2, rows whose log-ratio has not changed have
# lost more than half of their slope, which is reported if kl is still rising; at 4 it is reported in any case.
_DRIFT = 2.0
_RISING = 1.05

# A class has learned when its reward is 2 away from z0, and not at all while it is on the wrong side of z0. Desirable
# completions that are already nearly certain cannot gain 1, and need not.
_LEARNED = 2.0
_ROOM = 1.0

# The same rows are evaluated each time, so a loss whose paired interval is above the best one twice in a row is not noise if it
# rises each time; after small drops in between, a third evaluation is required. Records of older versions have no
# intervals: there, 5 % are required. The median of the training loss varies by about 2 %.
_WORSE = 1.05
_TRAINING_FELL = 0.98
_PATIENCE = 2

# A placeholder for the advised learning rate, which depends on earlier advice.
_THE_RATE = "--learning-rate {}"
_HALF = 0.5

_DESIRABLE, _UNDESIRABLE = "rewards/chosen", "rewards/rejected"
_SEEN = (_DESIRABLE, _UNDESIRABLE, "logps/chosen", "kl", "loss")


@dataclass(frozen=True)
class RunWarning:
    """A warning about a run in progress.

    Attributes:
        kind: rate-high, rate-low, kl, class, saturated, overfitting or worse.
        step: updates done when it arose.
        text: the finding, and the option to use instead.
        rate: the learning rate that it advises; None for another option.
    """

    kind: str
    step: int
    text: str
    rate: float | None = None


@dataclass(frozen=True)
class Settings:
    """The settings that warnings about a run depend on: options, class weights as numbers, rows of each class, or their masses.

    Attributes:
        advised_rate: the learning rate that the plan advised; None without advice.
    """

    loss: str
    beta: float
    learning_rate: float
    desirable_weight: float
    undesirable_weight: float
    desirable_rows: float
    undesirable_rows: float
    epochs: float
    max_steps: int | None = None
    early_stopping: int | None = None
    advised_rate: float | None = None

    @classmethod
    def of(cls, config: TrainConfig, weights: tuple[float, float], rows: tuple[float, float]) -> "Settings":
        """Build the settings of a run.

        Args:
            config: options of the run.
            weights: class weights of the desirable and the undesirable class.
            rows: training rows of the desirable and the undesirable class, or their masses.
        """
        return cls(
            loss=config.loss,
            beta=config.beta,
            learning_rate=config.peak_rate,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            desirable_rows=rows[0],
            undesirable_rows=rows[1],
            epochs=config.epochs,
            max_steps=config.max_steps,
            early_stopping=config.early_stopping,
            advised_rate=usual_rate(config),
        )


def run_warnings(records: Iterable[Mapping[str, object]], settings: Settings) -> list[RunWarning]:
    """Return the warnings that a run with these records gave, in their order.

    Args:
        records: of `metrics.jsonl`; a name that is missing or null gives no warning.
        settings: those of the run.
    """
    watch = Watch(settings)
    return [warning for record in records for warning in watch.add(record)]


class _Finding(NamedTuple):
    """The text of a warning; `_THE_RATE` in it is the learning rate to use, about `factor` times that of the run."""

    text: str
    factor: float | None = None


@dataclass(frozen=True)
class _Now:
    """Medians of the window; None if too few records have the value. Rewards and beta * kl are dimensionless."""

    step: int
    desirable: float | None
    undesirable: float | None
    sides: tuple[float, float] | None  # distance of each class from z0, positive on its own side
    kl: float | None
    room: float | None  # the most that desirable rewards can still gain: a probability is at most 1


class Watch:
    """Search for warnings in a stream of records; the work per record is limited to one window."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        traits = LOSS_TRAITS[settings.loss]
        self._judges_rewards = traits.sigmoid
        # Other losses only separate the classes: their rewards are measured from the middle of both.
        self._from_z0 = traits.measured_from in ("z0", "0")
        self._weighs_classes = traits.unit == 1
        self._rates = RateAdvice(settings.learning_rate, settings.advised_rate)
        self._told: set[str] = set()
        self._window: deque[tuple[int, int, dict[str, float]]] = deque()  # (step, updates, values)
        self._since: dict[str, tuple[int, int]] = {}  # (step, record)
        self._records = 0
        self._step = 0
        self._effective = 0.0  # updates, each weighted by its learning rate relative to the peak
        self._flat_records = 0
        self._halfway: int | None = None
        self._held_out = _HeldOut()
        self._worse_evaluations = 0

    @property
    def advised_rate(self) -> float | None:
        """The learning rate that was advised, in the plan or by a warning; None without advice."""
        return self._rates.advised

    @property
    def got_worse(self) -> bool:
        """Return whether a warning said that the model is getting worse."""
        return "worse" in self._told

    def add(self, record: Mapping[str, object]) -> list[RunWarning]:
        """Add a record and return the new warnings."""
        step = record.get("step")
        if not isinstance(step, int):
            return []
        if "eval/loss" in record:
            worse = self._worse(record, step)
            found = {"overfitting": self._overfitting(record, step), "worse": worse}
        elif "loss" in record and step > self._step:
            found = self._trained(record, step)
        else:
            return []
        new = []
        for kind, one in found.items():
            if one is None or kind in self._told:
                continue
            rate = None if one.factor is None else self._rates.other(one.factor)
            text = one.text if rate is None else one.text.replace(_THE_RATE, f"--learning-rate {rate:g}")
            new.append(RunWarning(kind, step, text, rate))
            self._told.add(kind)
            self._rates.advised = self._rates.advised if rate is None else rate
        return new

    def _trained(self, record: Mapping[str, object], step: int) -> "dict[str, _Finding | None]":
        values = {name: value for name in _SEEN if (value := _number(record, name)) is not None}
        rate = _number(record, "learning_rate")
        span = step - self._step
        peak = self.settings.learning_rate
        self._effective += span * (peak if rate is None else rate) / peak if peak else 0.0
        self._step = step
        self._records += 1
        self._window.append((step, span, values))
        while self._window[0][0] <= step - _WINDOW and len(self._window) > _RECORDS:
            self._window.popleft()
        if not self._judges_rewards:
            return {}
        too_fast = self._too_fast(values)
        if too_fast or "rate-high" in self._told:  # other conditions then have the same cause
            return {"rate-high": too_fast}
        now = self._now()
        if self._halfway is None and now.sides is not None and min(now.sides) >= _FLAT / 2:
            self._halfway = step
        return {
            "rate-low": self._held("rate-low", step, self._too_slow(now, record)),
            "kl": self._held("kl", step, self._drifting(now)),
            "class": self._held("class", step, self._one_class(now)),
            "saturated": self._held("saturated", step, self._saturated(now)),
        }

    def _held(self, kind: str, step: int, found: "_Finding | None") -> "_Finding | None":
        """Return what was found once its condition has lasted long enough."""
        if found is None:
            self._since.pop(kind, None)
            return None
        since, record = self._since.setdefault(kind, (step, self._records))
        return found if step - since >= _HOLD and self._records - record >= _HOLD_RECORDS else None

    def _median(self, name: str) -> float | None:
        found = [(span, values[name]) for _, span, values in self._window if name in values]
        if len(found) < _LEAST_RECORDS or sum(span for span, _ in found) < _LEAST:
            return None
        return median(value for _, value in found)

    def _kl_rises(self) -> bool:
        """Return whether the median of the window's later half exceeds that of its earlier half."""
        kls = [values["kl"] for _, _, values in self._window if "kl" in values]
        half = len(kls) // 2
        return median(kls[half:]) > _RISING * median(kls[:half])

    def _now(self) -> _Now:
        beta = self.settings.beta
        desirable, undesirable = self._median(_DESIRABLE), self._median(_UNDESIRABLE)
        kl = self._median("kl")
        sides = None
        if desirable is not None and undesirable is not None:
            z0 = beta * (kl or 0.0) if self._from_z0 else (desirable + undesirable) / 2
            sides = desirable - z0, z0 - undesirable
        logps = self._median("logps/chosen")
        return _Now(
            step=self._step,
            desirable=desirable,
            undesirable=undesirable,
            sides=sides,
            kl=None if kl is None else beta * kl,
            room=None if logps is None else -beta * logps,
        )

    def _too_fast(self, values: Mapping[str, float]) -> "_Finding | None":
        names = {_DESIRABLE: "desirable", _UNDESIRABLE: "undesirable"}
        rewards = {name: values[name] for name in names if name in values}
        farthest = max(rewards, key=lambda name: abs(rewards[name]), default=None)
        if farthest is None or abs(rewards[farthest]) < _FLAT or self._step > _FIRST_UPDATES:
            self._flat_records = 0
            return None
        self._flat_records += 1
        if self._flat_records < _FIRST_RECORDS:
            return None
        # An update's size is proportional to its rate: this rate would have led to rewards of 1.
        factor = min(max(abs(rewards[farthest]), _FLAT), 100.0)
        return _Finding(
            f"{names[farthest]} rewards are at {rewards[farthest]:+.1f} after {counted(self._step, 'update')}, where the loss is flat: "
            f"use {_THE_RATE}, or a warm-up.",
            1 / factor,
        )

    def _too_slow(self, now: _Now, record: Mapping[str, object]) -> "_Finding | None":
        of, total = self.settings, self._planned(record)
        rewards = [
            reward
            for reward, rows in ((now.desirable, of.desirable_rows), (now.undesirable, of.undesirable_rows))
            if rows
        ]
        known = [abs(reward) for reward in rewards if reward is not None]
        if not known or len(known) < len(rewards) or total is None or now.step < max(_STILL_FROM, _STILL_SHARE * total):
            return None
        at_the_end = max(known) * (1 + max(0.0, total - now.step) / max(self._effective, 1.0))
        if at_the_end >= _STILL or not of.learning_rate:  # the plan has said what a rate of 0 does
            return None
        return _Finding(
            f"rewards have hardly moved ({_signed(now.desirable)} desirable, {_signed(now.undesirable)} undesirable after "
            f"{now.step:,} updates) and will end below {_STILL:g}; 1 is usual: use {_THE_RATE}.",
            _STILL_FACTOR,
        )

    def _drifting(self, now: _Now) -> "_Finding | None":
        if now.kl is None or now.kl < _DRIFT:
            return None
        rises = self._kl_rises()
        if not rises and now.kl < _FLAT:
            return None
        rising = ", still rising" if rises else ""
        return _Finding(
            f"kl is {now.kl / self.settings.beta:.3g} nats{rising}: at beta * kl {now.kl:.1f} a completion that the policy has not "
            f"changed has {_slope(now.kl):.0%} of its gradient left; healthy runs stay below 1. Use {_THE_RATE}.",
            1 / min(max(now.kl, 2.0), 10.0),
        )

    def _one_class(self, now: _Now) -> "_Finding | None":
        if not (self._from_z0 and self._weighs_classes) or now.sides is None:
            return None
        desirable, undesirable = now.sides
        certain = now.room is not None and now.room < _ROOM
        if undesirable >= _LEARNED and desirable <= 0 and not certain:
            which, other, advice = "desirable", "undesirable", self._weight(desirable=True)
        elif desirable >= _LEARNED and undesirable <= 0:
            which, other, advice = "undesirable", "desirable", self._weight(desirable=False)
        else:
            return None
        if advice is None:
            return None
        kl = "" if now.kl is None else f", z0 {now.kl:.2f}"
        return _Finding(
            f"only {other} rows are learned (rewards {_signed(now.desirable)} desirable, {_signed(now.undesirable)} "
            f"undesirable{kl}), {which} ones are on the wrong side of z0: use {advice}.",
            _HALF if _THE_RATE in advice else None,
        )

    def _saturated(self, now: _Now) -> "_Finding | None":
        if now.sides is None or min(now.sides) < _FLAT:
            return None
        stop = (
            ""
            if self._halfway in (None, now.step)
            else f"--max-steps {self._halfway} (half of that distance was reached there) or "
        )
        beta = rounded(self.settings.beta * _FLAT / 2 / min(now.sides))
        return _Finding(
            f"rewards of both classes are where the loss is flat ({_signed(now.desirable)} desirable, "
            f"{_signed(now.undesirable)} undesirable): less than {_slope(_FLAT) + 0.01:.0%} of the gradient is left. "
            f"Use {stop}--beta {beta:g}."
        )

    def _overfitting(self, record: Mapping[str, object], step: int) -> "_Finding | None":
        loss = _number(record, "eval/loss")
        if loss is None:
            return None
        held_out, training = self._held_out, self._median("loss")
        worse = held_out.add(step, loss, training, _number(record, "eval/since_lowest/loss_low"))
        fell = training is not None and held_out.training is not None and training < _TRAINING_FELL * held_out.training
        if not (worse and fell) or self.settings.early_stopping is not None:
            return None
        return _Finding(
            f"held-out loss rose from {held_out.best:.4f} at step {held_out.best_step} to {loss:.4f} while the training loss "
            f"fell from {held_out.training:.4f} to {training:.4f}: use --early-stopping {_PATIENCE}, or --max-steps "
            f"{held_out.best_step}."
        )

    def _worse(self, record: Mapping[str, object], step: int) -> "_Finding | None":
        """Return a warning if held-out rows are worse than before training, twice in a row or at the end."""
        margin, loss = _change(record, "margin"), _change(record, "loss")
        fell = margin is not None and margin.is_below(LEAST_MARGIN)
        rose = loss is not None and loss.is_above(LEAST_LOSS) and not (margin and margin.is_above(LEAST_MARGIN))
        self._worse_evaluations = self._worse_evaluations + 1 if fell or rose else 0
        total = self._planned(record) if self._step else None
        enough = 1 if total is not None and step >= total - 0.5 else _PATIENCE
        if self._worse_evaluations < enough:
            return None
        what = f"margin changed by {margin}" if fell else f"loss changed by {loss}"
        return _Finding(
            f"held-out {what} since before training, so the model is getting worse: use {_THE_RATE}, and check that thumbs up and down "
            "are not swapped.",
            1 / _STILL_FACTOR,
        )

    def _planned(self, record: Mapping[str, object]) -> float | None:
        """Return the number of updates of the whole run."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        epoch = _number(record, "epoch")
        return self._step * self.settings.epochs / epoch if epoch else None

    def _weight(self, *, desirable: bool) -> str | None:
        """Return the class weight that favours this class within the published balance; None if a class has none."""
        of = self.settings
        pulls = of.desirable_weight * of.desirable_rows, of.undesirable_weight * of.undesirable_rows
        if not all(pulls):
            return None
        ratio = pulls[0] / pulls[1]
        name, weight, factor = (
            ("desirable", of.desirable_weight, BALANCE[1] / ratio)
            if desirable
            else ("undesirable", of.undesirable_weight, ratio / BALANCE[0])
        )
        if factor < 1.05:
            return f"{_THE_RATE} (class weights are already at the end of the published range)"
        return f"--{name}-weight {factor * weight:.3g}"


class _HeldOut:
    """The best evaluation and the evaluations after it."""

    def __init__(self) -> None:
        self.best = math.inf
        self.best_step = 0
        self.training: float | None = None  # loss at the best evaluation
        self._previous = math.inf
        self._drops = 0.0
        self._worse = 0

    def add(self, step: int, loss: float, training: float | None, low: float | None) -> bool:
        """Add an evaluation, and return whether the loss has been rising since the best one.

        Args:
            low: lower end of the paired interval of the loss since the best evaluation; None in records of older versions.
        """
        if loss < self.best:
            self.best, self.best_step, self.training = loss, step, training
            self._drops, self._worse = 0.0, 0
        else:
            self._drops += max(0.0, self._previous - loss)
            rose = loss >= _WORSE * self.best if low is None else low > 0 and loss - self.best >= LEAST_LOSS
            self._worse = self._worse + 1 if rose else 0
        self._previous = loss
        enough = _PATIENCE if not self._drops else _PATIENCE + 1
        return self._worse >= enough and loss - self.best >= 2 * self._drops


def _number(record: Mapping[str, object], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _change(record: Mapping[str, object], name: str) -> Change | None:
    """Return the change of a held-out value since before training; None without an interval."""
    value, low, high = (_number(record, f"eval/change/{name}{end}") for end in ("", "_low", "_high"))
    return None if value is None or low is None or high is None else Change(value, low, high)


def _slope(distance: float) -> float:
    """Return the slope of the sigmoid at a distance from its centre, relative to the greatest slope."""
    return 1 / math.cosh(min(distance, 100.0) / 2) ** 2


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"
