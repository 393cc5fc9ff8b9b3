"""Describe the plots of a report page as data; charts.js draws them.

Colours are names of the page's CSS, `var(--desirable)`: a class has one colour everywhere, in light and in dark.

The range of a vertical axis is decided here, by what is known about the noise of the values: the interval of a held-out
metric is always inside it, so that a change within the interval does not look like a trend.

Nothing from a file is plotted at full length: curves keep the lowest and highest value of each stretch, and rows are
counted in bins.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offline_kto.kto_core.losses.verdict import LEAST_LOSS, LEAST_MARGIN

Floats = npt.NDArray[np.float64]
CLASSES = ((True, "desirable"), (False, "undesirable"))
_POINTS = 1000  # points of one curve
_BINS = 60
_ENOUGH_TO_SMOOTH = 40
_MARGIN = 0.06  # of the range, above and below the values
# The smallest change that counts as one, as in verdicts. An axis spans five of them, so that smaller changes look small.
LEAST_CHANGE = {
    "loss": LEAST_LOSS,
    "accuracy": 0.02,
    "rewards/margins": LEAST_MARGIN,
    "rewards/chosen": LEAST_MARGIN,
    "rewards/rejected": LEAST_MARGIN,
}
LEAST_SPAN = {metric: 5 * change for metric, change in LEAST_CHANGE.items()}


@dataclass(frozen=True)
class Plot:
    """A figure with its surrounding text.

    label: describes the plot for screen readers.
    note: one or two sentences below the title, with the numbers that matter.
    """

    title: str
    label: str
    figure: "Figure"
    note: str = ""
    height: int = 220
    min_width: int = 0

    @property
    def json(self) -> str:
        """The figure as JSON for charts.js."""
        return self.figure.json()


@dataclass(frozen=True)
class Line:
    """A curve over updates: steps and values of shape (n,), nan for missing values.

    dots: few points, each drawn; otherwise many records are drawn thin and their running mean thick.
    low, high: ends of each value's interval, shape (n,); None if there are none.
    named: whether it is listed in the legend.
    smooth: false if each record counts, as for a schedule.
    """

    name: str
    steps: Floats
    values: Floats
    color: str
    dots: bool = False
    dash: str = ""
    low: Floats | None = None
    high: Floats | None = None
    trial: int | None = None
    named: bool = True
    smooth: bool = True


class Figure:
    """Axes and marks in the format that charts.js draws; see there for the fields of each mark."""

    def __init__(self, *, hover: str = "x", legend: bool = False) -> None:
        """Create an empty figure; `hover` is "x" (all curves at one position) or "near" (the nearest point)."""
        self.x: dict[str, object] = {}
        self.y: dict[str, object] = {}
        self.marks: list[dict[str, Any]] = []
        self._how = {"hover": hover, "legend": legend}

    def add(self, kind: str, **mark: object) -> None:
        """Add a mark: line, bars, dots, rule or axis."""
        self.marks.append({"kind": kind, **mark})

    def json(self) -> str:
        """Return the figure as JSON for charts.js; a number that is not finite becomes a gap."""
        return json.dumps(_plain({**self._how, "x": self.x, "y": self.y, "marks": self.marks}), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def fitted_range(values: Sequence[Floats], *, least: float = 0.0, share: bool = False) -> tuple[float, float]:
    """Return the range of an axis that shows all finite values, with some room around them.

    Args:
        values: arrays of any shape.
        least: the smallest span of the range, in the values' unit.
        share: the values are shares, and the range does not exceed 0 to 1 by much.
    """
    known = np.concatenate([np.ravel(one) for one in values] or [np.empty(0)])
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    missing = max(least - (high - low), 0.0) or (0.0 if high > low else max(abs(high), 1e-3))
    low, high = low - missing / 2, high + missing / 2
    room = _MARGIN * (high - low)
    low, high = low - room, high + room
    return (max(low, -0.02), min(high, 1.02)) if share else (low, high)


def curves(
    lines: Sequence[Line],
    *,
    percent: bool = False,
    hover: str = "x",
    from_zero: bool = False,
    before: float | None = None,
    least: float = 0.0,
) -> Figure:
    """Draw curves over updates.

    Args:
        lines: the curves.
        percent: the values are shares.
        hover: see `Figure`.
        from_zero: the vertical axis begins at 0.
        before: the value of the untrained policy, drawn as a horizontal line.
        least: the smallest span of the vertical axis.
    """
    figure = Figure(hover=hover, legend=len(lines) > 1 and hover == "x")
    seen: list[Floats] = [np.array([math.nan if before is None else before]), np.zeros(int(from_zero))]
    for line in lines:
        window = 1 if line.dots or not line.smooth else smoothing_window(len(line.values))
        if line.low is not None and line.high is not None:
            seen += [line.low, line.high]
        if window > 1 and line.trial is None:
            steps, values = thinned(line.steps, line.values)
            figure.add("line", x=_whole(steps), y=values, color=line.color, width=1, faint=True)
        mean = running_mean(line.values, window)
        seen.append(mean)
        steps, values = thinned(line.steps, mean, 200 if line.trial is not None else _POINTS)
        figure.add(
            "line",
            name=line.name,
            x=_whole(steps),
            y=values,
            low=line.low,
            high=line.high,
            color=line.color,
            width=1.5 if line.trial is not None else 2,
            dash=line.dash or None,
            dots=line.dots or int(np.isfinite(values).sum()) == 1,
            named=line.named,
            trial=line.trial,
        )
    if before is not None:
        figure.add("rule", y=before, text="before training")
    last = max((float(line.steps.max()) for line in lines if len(line.steps)), default=1.0)
    figure.x = {"title": "update", "range": [0, max(last, 1.0)], "format": "whole"}
    bounds = fitted_range(seen, least=least, share=percent)
    figure.y = {"range": bounds if not from_zero else (0.0, bounds[1]), "format": "percent" if percent else "number"}
    return figure


def _whole(steps: Floats) -> list[int]:
    return [int(step) for step in steps]


def smoothing_window(records: int) -> int:
    """Return the number of records in a curve's running mean; 1 for a short curve."""
    return max(1, records // 30) if records >= _ENOUGH_TO_SMOOTH else 1


def running_mean(values: Floats, window: int) -> Floats:
    """Return the mean of each value and the `window - 1` before it, ignoring nan. Shape as `values`."""
    if window <= 1:
        return values
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    count = counts[1:] - counts[first]
    mean = (sums[1:] - sums[first]) / np.maximum(count, 1)
    return np.asarray(np.where((count > 0) & known, mean, math.nan))


def thinned(steps: Floats, values: Floats, most: int = _POINTS) -> tuple[Floats, Floats]:
    """Return about `most` points at most: the lowest and highest of each stretch, and the first and last of all."""
    if len(values) <= most:
        return steps, values
    stretch = -(-2 * len(values) // most)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), stretch):
        part = values[start : start + stretch]
        kept.add(start + int(np.argmin(np.where(np.isnan(part), math.inf, part))))
        kept.add(start + int(np.argmax(np.where(np.isnan(part), -math.inf, part))))
    index = np.array(sorted(kept))
    return steps[index], values[index]


def histograms(groups: Mapping[str, tuple[Floats, str]], *, unit: str, whole: bool = False) -> tuple[Figure, int]:
    """Draw histograms of several groups on one axis, as shares of each group.

    Args:
        groups: by name, values of shape (n,) and the colour.
        unit: the axis' title.
        whole: the values are whole numbers, and no bin is narrower than one.

    Returns:
        The figure, and the number of values beyond its axis, which ends at the outermost thousandth.
    """
    everything = np.concatenate([values for values, _ in groups.values()])
    low, high = (float(bound) for bound in np.quantile(everything, [0.001, 0.999]))
    beyond = int(((everything < low) | (everything > high)).sum()) if len(everything) > 1000 else 0
    if not beyond:
        low, high = float(everything.min()), float(everything.max())
    if whole:
        width = max(1, math.ceil((high - low + 1) / _BINS))
        edges = low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1)
    else:
        bins = min(_BINS, max(12, int(2 * math.sqrt(len(everything)))))
        margin = 1e-3 * (high - low) or 0.5 * max(abs(high), 1e-3)
        edges = np.linspace(low - margin, high + margin, bins + 1)
    figure, most = Figure(legend=len(groups) > 1), 0.0
    for name, (values, color) in groups.items():
        shares = np.histogram(values, edges)[0] / len(values)
        most = max(most, float(shares.max()))
        figure.add("bars", name=name, edges=edges, y=shares, color=color)
    figure.x = {"title": unit, "range": [edges[0], edges[-1]], "format": "whole" if whole else "number"}
    figure.y = {"range": [0.0, 1.05 * most or 1.0], "format": "percent"}
    return figure, beyond
