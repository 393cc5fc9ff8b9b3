"""Draw the plots of a sweep's report page: parallel coordinates, a slice for each parameter; and rank the parameters."""

import math
from collections.abc import Sequence

import numpy as np

from offline_kto.train.report.figures import LEAST_CHANGE, LEAST_SPAN, Figure, Plot, fitted_range
from offline_kto.train.report.folders import Sweep, Trial, listed, mapping, number
from offline_kto.train.report.words import judged, plain_name, shown

_SHADES = 9  # var(--shade-0), the worst trial's, to var(--shade-8), the best one's
_SHADE_NAMES = [f"var(--shade-{i})" for i in range(_SHADES)]
_AXES = 12
_LINES = 300
# Of all other trials, the share that must differ from the best one; with equal trials a twentieth would, by chance.
_MORE_THAN_CHANCE = 0.1
_LABEL_CHARACTER = (
    11  # pixels between two axes for each character of a label, of which the first one begins at its axis
)
_WIDE = 20.0  # positive values with a larger ratio get a logarithmic axis


def varied(sweep: Sweep) -> list[str]:
    """Return the parameters that differ between trials, in the order of the search space."""
    names = [*mapping(sweep.sweep_record.get("space")), *(name for trial in sweep.trials for name in trial.params)]
    return [name for name in dict.fromkeys(names) if len({repr(t.params.get(name)) for t in sweep.trials}) > 1]


def shades(sweep: Sweep) -> dict[int, str]:
    """Return a colour for each complete trial, by the position of its value between the worst and the best.

    Values beyond 1.5 interquartile ranges are clipped, because a few bad outliers would leave one shade to all others.
    """
    trials = sweep.complete
    values = np.array([trial.value for trial in trials], dtype=np.float64)
    if not len(values):
        return {}
    quarter, three_quarters = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (three_quarters - quarter)
    if reach > 0:
        values = np.clip(values, quarter - reach, three_quarters + reach)
    span = max(values.max() - values.min(), _least_span(sweep))
    places = (values - values.min()) / span if span > 0 else np.ones_like(values)
    places = places if sweep.maximize or span == 0 else 1 - places
    return {t.number: _SHADE_NAMES[round(float(p) * (_SHADES - 1))] for t, p in zip(trials, places, strict=True)}


def _least_span(sweep: Sweep) -> float:
    """Return the smallest span of values that may look like a difference."""
    return LEAST_SPAN.get(sweep.metric.removeprefix("eval/"), 0.0)


def _word(value: object) -> str:
    """Return a value of a categorical axis as the tables show it."""
    return shown(value) if isinstance(value, bool) else str(value)


class _Axis:
    """The positions of one parameter's values on an axis from 0 to 1, and its ticks.

    Args:
        least: the smallest span of an axis of numbers, so that a change within it looks small.
    """

    def __init__(
        self, values: Sequence[object], *, log: bool = False, flipped: bool = False, least: float = 0.0
    ) -> None:
        present = [value for value in values if value is not None]
        numbers = [found for value in present if (found := number(value)) is not None]
        self.flipped = flipped
        self.words: list[str] | None = None
        distinct = list(dict.fromkeys(map(_word, present)))
        if len(numbers) < len(present) or not numbers:
            self.words = sorted(distinct)
            return
        self.log = min(numbers) > 0 and (log or max(numbers) / min(numbers) > _WIDE)
        self.low, self.high = self._scaled(min(numbers)), self._scaled(max(numbers))
        # A few distinct values are used as the ticks.
        self.numbers = sorted(set(numbers)) if len(set(numbers)) <= 5 else None
        if not self.log and self.high - self.low < least:
            middle = (self.low + self.high) / 2
            self.low, self.high, self.numbers = middle - least / 2, middle + least / 2, None

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: object) -> float | None:
        if value is None:
            return None
        if self.words is not None:
            at = (self.words.index(_word(value)) + 0.5) / len(self.words)
        elif self.high == self.low:
            at = 0.5
        else:
            at = (self._scaled(number(value) or 0.0) - self.low) / (self.high - self.low)
        return 1 - at if self.flipped else at

    def ticks(self) -> list[tuple[float, str]]:
        if self.words is not None:
            return [(self.place(word) or 0.0, word if len(word) <= 14 else word[:13] + "…") for word in self.words]
        values = self.numbers
        if values is None:
            scaled = np.linspace(self.low, self.high, 5)
            values = [float(10**value if self.log else value) for value in scaled]
        words = [shown(value, 3) for value in values]
        if len(set(words)) < len(words):  # values that are nearly equal
            words = [shown(value, 8) for value in values]
        return [(self.place(value) or 0.0, word) for value, word in zip(values, words, strict=True)]


def _is_log(sweep: Sweep, name: str) -> bool:
    return mapping(mapping(sweep.sweep_record.get("space")).get(name)).get("log") is True


def told(sweep: Sweep, trial: Trial) -> list[str]:
    """Return a trial as the lines of a hover box."""
    lines = [f"trial {trial.number}", f"{sweep.metric}: {judged(sweep, trial)}"]
    return [*lines, *(f"{name}: {shown(value)}" for name, value in trial.params.items())]


def _short(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "…"


def parallel_coordinates(sweep: Sweep) -> Plot | None:
    """Draw a line for each complete trial through an axis for each parameter; the best value is at the top."""
    names, trials, colors = varied(sweep)[:_AXES], sweep.complete[:_LINES], shades(sweep)
    if not names or len(trials) < 2:
        return None
    axes = [_Axis([trial.params.get(name) for trial in trials], log=_is_log(sweep, name)) for name in names]
    axes.append(_Axis([trial.value for trial in trials], flipped=not sweep.maximize, least=_least_span(sweep)))
    figure = Figure(hover="near")
    best = sweep.best
    for trial in reversed(trials):  # the best one is drawn last, above the others
        values = [*(trial.params.get(name) for name in names), trial.value]
        is_best = best is not None and trial.number == best.number
        figure.add(
            "line",
            x=list(range(len(axes))),
            y=[axis.place(value) for axis, value in zip(axes, values, strict=True)],
            color=colors[trial.number],
            width=3.5 if is_best else 1.5,
            dots=True,
            text=told(sweep, trial),
            trial=trial.number,
        )
    labels = [_short(label) for label in (*names, plain_name(sweep.metric))]
    for index, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        figure.add("axis", x=index, label=label, ticks=axis.ticks())
    figure.x, figure.y = {"range": [0, len(axes) - 1]}, {"range": [0, 1]}
    which = f"Each line is a trial{f', of the best {_LINES}' if len(sweep.complete) > _LINES else ''}."
    return Plot(
        "All trials at once",
        f"Parallel coordinates: {len(trials)} trials over {', '.join(names)} and {sweep.metric}.",
        figure,
        f"{which} The right-hand axis has the best value on top; the stronger the colour, the better the trial. "
        "Click a line to mark its trial everywhere.",
        height=340,
        min_width=max(120, _LABEL_CHARACTER * max(map(len, labels))) * len(axes) + 40,
    )


def importance(sweep: Sweep) -> tuple[list[tuple[str, float]], str]:
    """Return the share of the metric's variation that each parameter explains, the largest first.

    Returns:
        The shares, empty if they would be drawn from noise or a single parameter varied; and a sentence that says what they
        are, or why there are none.
    """
    given = {name: number(value) for name, value in mapping(sweep.sweep_record.get("importance")).items()}
    ranked = sorted(((name, value) for name, value in given.items() if value is not None), key=lambda one: -one[1])
    others = len(sweep.complete) - 1
    tied = [one for one in listed(sweep.sweep_record.get("tied")) if isinstance(one, int)]
    distinct = others - len(tied)
    if not ranked or len(varied(sweep)) < 2:  # a single parameter explains all, whatever it does
        return [], ""
    values = [trial.value for trial in sweep.complete if trial.value is not None]
    if max(values, default=0.0) - min(values, default=0.0) < LEAST_CHANGE.get(sweep.metric.removeprefix("eval/"), 0.0):
        return [], "The trials differ by less than a change that would count as one, so no parameter is ranked."
    if tied and distinct < max(2, _MORE_THAN_CHANCE * others):
        said = (
            f"The best trial can be told from {'the other one' if others == 1 else f'{distinct} of the {others} others'}"
            if distinct
            else "No trial can be told from the best one"
        )
        return (
            [],
            f"{said} on these held-out rows: what separates the trials is mostly chance, so no parameter is ranked.",
        )
    return ranked[
        :_AXES
    ], f"The share of the variation in {sweep.metric} that each parameter explains, as the search estimates it."


def slices(sweep: Sweep) -> list[Plot]:
    """Draw the metric against each parameter that varied, with the interval of each trial and the level before training."""
    trials, colors, plots = sweep.complete, shades(sweep), []
    for name in varied(sweep)[:_AXES]:
        present = [trial for trial in trials if trial.params.get(name) is not None]
        if not present:
            continue
        values = [trial.params[name] for trial in present]
        numbers = [found for value in values if (found := number(value)) is not None]
        axis = _Axis(values, log=_is_log(sweep, name))
        ends = {end: np.array([getattr(trial, end) for trial in present], dtype=np.float64) for end in ("low", "high")}
        y = np.array([trial.value for trial in present], dtype=np.float64)
        figure = Figure(hover="near")
        if sweep.untrained is not None:
            figure.add("rule", y=sweep.untrained, text="before training")
        figure.add(
            "dots",
            x=values if axis.words is None else [axis.words.index(_word(value)) for value in values],
            y=y,
            **ends,
            colors=[colors[trial.number] for trial in present],
            texts=[told(sweep, trial) for trial in present],
            trials=[trial.number for trial in present],
        )
        if axis.words is not None:
            ticks = [(index, word) for index, word in enumerate(axis.words)]
            figure.x = {"range": [-0.5, len(axis.words) - 0.5], "ticks": ticks}
        else:
            low, high = min(numbers), max(numbers)
            room = (0.0 if high > low else max(abs(high), 1e-3)) if not axis.log else 0.0
            figure.x = {"range": [low - room, high + room], "log": axis.log}
            if axis.numbers is not None:
                figure.x["ticks"] = [(value, shown(value, 3)) for value in axis.numbers]
        level = np.array([math.nan if sweep.untrained is None else sweep.untrained])
        least = _least_span(sweep)
        bounds = fitted_range([y, *ends.values(), level], least=least, share=sweep.metric.endswith("accuracy"))
        figure.y = {"range": bounds, "format": "number", "title": plain_name(sweep.metric)}
        plots.append(Plot(name, f"{sweep.metric} against {name}, {len(values)} trials.", figure, height=200))
    return plots
