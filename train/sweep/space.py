"""Parse the space that a sweep searches, and build the options of each trial."""

import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from offline_kto.kto_core.errors import ConfigError, shown
from offline_kto.kto_core.options import as_given, checked_values, value_types
from offline_kto.train.config import TrainConfig, parse_objective
from offline_kto.train.loss_traits import LOSS_OF_OPTION, PAIRED_LOSSES
from offline_kto.train.sweep.config import MOST_TRIALS, USUAL_TRIALS, SweepConfig

_JUDGED = "they are compared on the same held-out rows"
_NOT_UPLOADED = (
    "trials are not uploaded. Train the winner with kto-train --config best.yaml --push-to-hub, or upload best/"
)
_SAME_FOR_ALL = {
    "cache": "give --cache",
    "verify": "give --verify",
    "out": "the folder of the sweep belongs on the command line: --out, or beside train:",
    "metric": "they are compared by one value",
    "training": "it is not an option; set it in train:",
    "push_to_hub": _NOT_UPLOADED,
    "eval_fraction": _JUDGED,
    "eval_cache": _JUDGED,
    "eval_seed": _JUDGED,
    "max_length": f"{_JUDGED}, which it cuts",
}
# Limit of a range of whole numbers.
_GREATEST = 10**9
# `objective.helpful` is the weight of an objective, a part of the option `objective`.
OBJECTIVE = "objective."
# Options that change the held-out loss itself.
_CHANGES_LOSS = ("loss", "beta", "desirable_weight", "undesirable_weight", "sft_weight", *LOSS_OF_OPTION)


@dataclass(frozen=True)
class Values:
    """An option with a list of values."""

    values: tuple[object, ...]

    def grid(self) -> tuple[object, ...]:
        """Return all values."""
        return self.values


@dataclass(frozen=True)
class Range:
    """An option with a range of numbers, both ends included.

    Attributes:
        whole: whether only whole numbers are allowed.
        points: number of grid points.
    """

    low: float
    high: float
    log: bool
    whole: bool
    points: int | None

    def ends(self) -> tuple[float, float]:
        """Return the least and the greatest number."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def grid(self) -> tuple[object, ...]:
        """Return `points` numbers at equal distances (equal ratios if `log`)."""
        assert self.points is not None
        share = [i / max(1, self.points - 1) for i in range(self.points)]
        if self.log:
            numbers = [math.exp(math.log(self.low) + s * (math.log(self.high) - math.log(self.low))) for s in share]
        else:
            numbers = [self.low + s * (self.high - self.low) for s in share]
        if self.whole:
            return tuple(dict.fromkeys(round(n) for n in numbers))
        numbers = [float(f"{n:.12g}") for n in numbers]  # 1e-4, not 9.999999999999991e-05
        return (self.low, *numbers[1:-1], self.high) if self.points > 1 else (self.low,)


# kto-train's options by name; `TrainConfig` checks their types.
Options: TypeAlias = dict[str, Any]
Space: TypeAlias = dict[str, Values | Range]


@dataclass(frozen=True)
class Trials:
    """The common options and the search space of a sweep's trials.

    Attributes:
        base: options that all trials share.
        space: options that they differ in.
        count: number of trials.
        choices: the values of each option; None if the space is infinite.
    """

    base: Options
    space: Space
    count: int
    choices: dict[str, Sequence[object]] | None

    @classmethod
    def of(cls, config: SweepConfig) -> "Trials":
        """Build the trials of a sweep. Raises: ConfigError: a key, a value or a range that kto-train would reject."""
        base = _base(config)
        if not config.space:
            raise ConfigError("space: names no option to search over. For instance:  space: {beta: [0.05, 0.1, 0.3]}")
        space = {name: _parse(name, entry, config.search) for name, entry in _names(config.space).items()}
        twice = sorted({name for name in space if name.removeprefix(OBJECTIVE) in _set_in(base, name)})
        if twice:
            raise ConfigError(f"{twice[0]!r} is set in space: and in train:; keep one of them.")
        if "seed" in space:
            # All trials are compared on the same held-out rows.
            base.setdefault("eval_seed", base.get("seed", TrainConfig.seed))
        _check_own_options(base, space)
        for name, entry in space.items():
            _try_values(base, name, entry)
        choices = _choices(space, config.search)
        points = _count(choices)
        wanted = config.trials or (points if config.search == "grid" and points else USUAL_TRIALS)
        if wanted > MOST_TRIALS:
            raise ConfigError(
                f"The sweep would have {wanted:,} trials. Give trials: (at most {MOST_TRIALS:,}), or fewer values."
            )
        return cls(base, space, min(wanted, points or wanted), choices)

    @property
    def points(self) -> int | None:
        """Number of distinct trials in the space; None if it is infinite."""
        return _count(self.choices)

    def warnings(self) -> list[str]:
        """Return one line for each setting that makes trials hard to compare."""
        lines, metric = [], self.base["metric"]
        scale = {"eval/loss": _CHANGES_LOSS, "eval/rewards/margins": ("beta",)}.get(metric, ())
        changed = [name for name in self.space if name in scale]
        if changed:
            names = " and ".join(changed) if len(changed) < 3 else ", ".join(changed)
            lines.append(
                f"{metric} is measured with each trial's own {names}, so its scale differs between trials; metric: eval/accuracy "
                "compares them on one scale."
            )
        if any(name.startswith(OBJECTIVE) for name in self.space):
            lines.append(
                f"{metric} weighs the objectives as each trial does. results.csv has the held-out margin of each objective, which "
                "compare on one scale, and marks the Pareto front."
            )
        zero = [name for name, entry in self.space.items() if name.startswith(OBJECTIVE) and _least(entry) == 0]
        if zero or "objective" in self.space:
            lines.append(
                "a trial that gives an objective no weight leaves out the rows in which no other one was judged; the rows above are "
                "those of "
                + (
                    "the first value of objective."
                    if "objective" in self.space
                    else "trials in which every objective has a weight."
                )
            )
        losses = self.space.get("loss")
        paired = [loss in PAIRED_LOSSES for loss in losses.grid()] if isinstance(losses, Values) else []
        if any(paired) and not all(paired):
            lines.append(
                "losses of pairs are evaluated on whole pairs, by the better row of each; the others on single rows, by their side "
                "of the reference point: compare the two kinds with care."
            )
        return lines

    def config(self, params: dict[str, object]) -> TrainConfig:
        """Return a trial's options. Raises: ConfigError: values that cannot be combined."""
        return TrainConfig(**_with(self.base, params))

    def planned(self) -> TrainConfig:
        """Return the options whose rows are those of the plan: every objective that is searched has a weight above 0.

        Raises:
            ConfigError: values that cannot be combined.
        """
        largest: dict[str, object] = {
            name: entry.high if isinstance(entry, Range) else max(entry.values, key=float)  # type: ignore[arg-type]
            for name, entry in self.space.items()
            if name.startswith(OBJECTIVE)
        }
        objective = self.space.get("objective")
        if isinstance(objective, Values):
            largest["objective"] = objective.values[0]
        return self.config({"loss": self.base.get("loss", TrainConfig.loss), **largest})

    def objectives(self) -> set[str]:
        """Return the names of all objectives that some trial weighs."""
        searched = self.space.get("objective")
        texts = [self.base.get("objective"), *(searched.values if isinstance(searched, Values) else ())]
        names = {name.removeprefix(OBJECTIVE) for name in self.space if name.startswith(OBJECTIVE)}
        return names.union(*(parse_objective(str(text)) for text in texts if text is not None))

    def point(self, number: int) -> dict[str, object]:
        """Return the parameters of a point, numbered below `points`; the last option of the space changes fastest."""
        assert self.choices is not None
        params: dict[str, object] = {}
        for name, values in reversed(self.choices.items()):
            number, place = divmod(number, len(values))
            params[name] = values[place]
        return {name: params[name] for name in self.space}


def _least(entry: Values | Range) -> float:
    return entry.low if isinstance(entry, Range) else min(map(float, entry.values))  # type: ignore[arg-type]


def _with(base: Options, params: dict[str, object]) -> Options:
    """Return options with a trial's parameters; weights of objectives are joined to those that all trials share."""
    options = {name: value for name, value in params.items() if not name.startswith(OBJECTIVE)}
    weights = {name.removeprefix(OBJECTIVE): value for name, value in params.items() if name.startswith(OBJECTIVE)}
    if weights:
        shared = parse_objective(base["objective"]) if base.get("objective") else {}
        options["objective"] = json.dumps({**shared, **weights})
    options = {**base, **options}
    # In a sweep over losses, an option of one loss is for the trials that have it.
    loss = options.get("loss", TrainConfig.loss)
    return {name: value for name, value in options.items() if LOSS_OF_OPTION.get(name, loss) == loss}


def _check_own_options(base: Options, space: Space) -> None:
    """Check that some trial has the loss of each option that only one loss has."""
    losses = space["loss"].grid() if "loss" in space else (base.get("loss", TrainConfig.loss),)
    for name, loss in LOSS_OF_OPTION.items():
        given = name in space or base.get(name, getattr(TrainConfig, name)) != getattr(TrainConfig, name)
        if given and loss not in losses:
            raise ConfigError(
                f"{name!r} is an option of the loss {loss}, which no trial has. Remove it, or add the loss."
            )


def _set_in(base: Options, name: str) -> Collection[str]:
    """Return the names that `train:` sets, of options or, for the weight of an objective, of objectives."""
    if not name.startswith(OBJECTIVE):
        return base
    return parse_objective(base["objective"]) if base.get("objective") else ()


def _choices(space: Space, search: str) -> dict[str, Sequence[object]] | None:
    """Return the values of each option; None if the space is infinite."""
    choices: dict[str, Sequence[object]] = {}
    for name, entry in space.items():
        if isinstance(entry, Values) or search == "grid":
            choices[name] = entry.grid()
        elif entry.whole:
            choices[name] = range(int(entry.low), int(entry.high) + 1)
        else:
            return None
    return choices


def _count(choices: dict[str, Sequence[object]] | None) -> int | None:
    return None if choices is None else math.prod(map(len, choices.values()))


def _names(space: dict[str, object]) -> dict[str, object]:
    """Return the space with names as in `TrainConfig`."""
    names = {
        shown(key) if shown(key).startswith(OBJECTIVE) else shown(key).replace("-", "_"): entry
        for key, entry in space.items()
    }
    for name in names:
        if name in _SAME_FOR_ALL:
            raise ConfigError(f"space: {name!r} cannot differ between the trials of a sweep: {_SAME_FOR_ALL[name]}.")
    return names


def _base(config: SweepConfig) -> Options:
    base = checked_values(TrainConfig, config.train, "train")
    for name, where in (
        ("cache", "--cache"),
        ("verify", "--verify"),
        ("out", "--out"),
        ("metric", "metric:, beside train:"),
    ):
        if name in base:
            raise ConfigError(f"train: {name!r} is set for the whole sweep by {where}; remove it from the table.")
    if "push_to_hub" in base:
        raise ConfigError(f"train: 'push_to_hub': {_NOT_UPLOADED}.")
    if "eval_cache" not in base:
        base.setdefault("eval_fraction", 0.1)  # trials are compared on rows that none of them saw
        if not base["eval_fraction"]:
            raise ConfigError(
                "train: eval_fraction: 0 leaves no held-out rows to compare trials by. Hold some out, or give eval_cache."
            )
    return {**base, "cache": config.cache, "verify": config.verify, "metric": config.metric}


def _parse(name: str, entry: object, search: str) -> Values | Range:
    where = f"space: {name}"
    if isinstance(entry, list):
        values = tuple(_weight(where, value) if name.startswith(OBJECTIVE) else _value(name, value) for value in entry)
        if not values:
            raise ConfigError(f"{where}: an empty list; give at least one value.")
        if len(set(values)) < len(values):
            raise ConfigError(f"{where}: a value is given twice.")
        return Values(values)
    if not isinstance(entry, dict):
        raise ConfigError(
            f"{where}: expected a list of values or a range, got {shown(entry)}. Put a value that all trials share into train:."
        )
    kinds = (float,) if name.startswith(OBJECTIVE) else value_types(TrainConfig).get(name)
    if kinds is None:
        checked_values(TrainConfig, {name: None}, "space")  # reports the closest name
    if kinds is None or not {int, float} & set(kinds):
        raise ConfigError(f"{where}: its values are not numbers, so it has no range; give a list of values.")
    unknown = sorted(set(map(str, entry)) - {"low", "high", "log", "points"})
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}. A range has low, high, log and, for a grid, points.")
    return _range(where, entry, whole=float not in kinds, grid=search == "grid")


def _value(name: str, value: object) -> object:
    return checked_values(TrainConfig, {name: value}, "space")[name]


def _weight(where: str, value: object) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if not 0 <= number < math.inf:
        raise ConfigError(
            f"{where}: the weight of an objective must be a number from 0, got {as_given(value, (float,))}"
        )
    return float(number)


def _range(where: str, entry: dict[str, object], *, whole: bool, grid: bool) -> Range:
    log, points = entry.get("log", False), entry.get("points")
    low, high = (_end(where, name, entry.get(name), whole=whole) for name in ("low", "high"))
    if whole and high > _GREATEST:
        raise ConfigError(f"{where}: high must be at most {_GREATEST:,}, got {high:g}.")
    if low >= high:
        raise ConfigError(f"{where}: low ({low:g}) must be below high ({high:g}).")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log must be true or false, got {as_given(log, (bool,))}")
    if log and low <= 0:
        raise ConfigError(f"{where}: a range on a log scale must begin above 0, got {low:g}.")
    if grid and points is None:
        raise ConfigError(
            f"{where}: a grid needs the number of points: add points: 5 to the range, or give a list of values."
        )
    if points is not None and (not isinstance(points, int) or isinstance(points, bool) or not 1 <= points <= 1000):
        raise ConfigError(f"{where}: points must be a whole number from 1 to 1000, got {as_given(points, (int,))}")
    return Range(low, high, log, whole, points)


def _end(where: str, name: str, value: object, *, whole: bool) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.inf
    kinds = (int,) if whole else (float,)
    if not abs(number) <= sys.float_info.max or (whole and number != int(number)):
        raise ConfigError(
            f"{where}: {name} must be {'a whole number' if whole else 'a number'}, got {as_given(value, kinds)}"
        )
    return float(number)


def _try_values(base: Options, name: str, entry: Values | Range) -> None:
    """Check each value on its own, combined with the options that all trials share."""
    if name.startswith(OBJECTIVE):
        if isinstance(entry, Range) and entry.low < 0:
            raise ConfigError(f"space: {name}: the weight of an objective must not be negative, got {entry.low:g}.")
        return
    of_loss = {"loss": LOSS_OF_OPTION[name]} if name in LOSS_OF_OPTION else {}
    for value in entry.ends() if isinstance(entry, Range) else entry.values:
        try:
            TrainConfig(**_with(base, {**of_loss, name: value}))
        except ConfigError as error:
            if _refused(base) == str(error):
                raise ConfigError(f"train: {error}") from error
            raise ConfigError(f"space: {name}: {shown(value)} cannot be used: {error}") from error


def _refused(base: Options) -> str | None:
    """Return the error of the options that all trials share; None if they are valid."""
    try:
        TrainConfig(**_with(base, {}))
    except ConfigError as error:
        return str(error)
    return None
