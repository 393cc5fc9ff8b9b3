"""Draw the plots of a run's report page.

Their colours are names of the page's CSS, `var(--desirable)`: the page inserts the values, light or dark, so that a
class has one colour everywhere.

Nothing from a file is plotted at full length: curves keep the lowest and highest value of each stretch, and rows are
counted in bins.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from plotly.offline import get_plotlyjs

Floats = npt.NDArray[np.float64]
CLASSES = ((True, "desirable"), (False, "undesirable"))
_POINTS = 1000  # points of one curve
_BINS = 60
_ENOUGH_TO_SMOOTH = 40


@dataclass(frozen=True)
class Plot:
    """A figure with its surrounding text.

    label: describes the plot for screen readers.
    note: one or two sentences below the title.
    """

    title: str
    label: str
    figure: "Figure"
    note: str = ""
    height: int = 260
    min_width: int = 0

    @property
    def json(self) -> str:
        """The figure as JSON for plotly.js."""
        return self.figure.json()


@dataclass(frozen=True)
class Line:
    """A curve over updates: steps and values of shape (n,), nan for missing values.

    held_out: few points, each drawn; otherwise the records are drawn thin and their running mean thick.
    named: whether it is listed in the legend.
    smooth: false if each record counts, as for a schedule.
    """

    name: str
    steps: Floats
    values: Floats
    color: str
    held_out: bool = False
    dash: str = "solid"
    trial: int | None = None
    named: bool = True
    smooth: bool = True


def plotly_js() -> str:
    """Return the source of plotly.js, to be embedded in the page."""
    return str(get_plotlyjs())


def literal(text: object) -> str:
    """Escape text from a file so that plotly displays it verbatim, including tags and formulas."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


class Figure:
    """Traces and layout in the format of plotly.js.

    They are dictionaries: plotly's Python objects validate every property against a schema, which took a second per
    page.
    """

    def __init__(self, **layout: object) -> None:
        """Create an empty figure in the page's style."""
        axis = {
            "gridcolor": "var(--grid)",
            "zeroline": False,
            "linecolor": "var(--rule)",
            "tickcolor": "var(--rule)",
            "automargin": True,
            "ticks": "outside",
            "ticklen": 4,
            "title": {"standoff": 8, "font": {"size": 12}},
        }
        self.data: list[dict[str, object]] = []
        self.layout: dict[str, Any] = {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "var(--muted)", "size": 12},
            "margin": {"l": 48, "r": 14, "t": 10, "b": 40},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": "var(--ink)"}},
            "hoverlabel": {
                "bgcolor": "var(--surface)",
                "bordercolor": "var(--rule)",
                "font": {"color": "var(--ink)"},
            },
            "xaxis": {**axis, "showgrid": False},
            "yaxis": {**axis, "ticks": "", "showline": False},
            "annotations": [],
            "shapes": [],
            **layout,
        }

    def add(self, kind: str, **trace: object) -> None:
        """Add a trace: `scatter` or `bar`."""
        self.data.append({"type": kind, **trace})

    def axis(self, name: str, *, title: str | None = None, **look: object) -> None:
        """Set properties of an axis: `xaxis`, `yaxis`, `yaxis2`, ..."""
        axis = self.layout.setdefault(name, {})
        axis.update(look)
        if title is not None:
            axis["title"] = {**axis.get("title", {}), "text": title}

    def annotate(self, **annotation: object) -> None:
        """Add a text without an arrow."""
        self.layout["annotations"].append({"showarrow": False, **annotation})

    def json(self) -> str:
        """Return the figure as JSON for plotly.js; a number that is not finite becomes a gap."""
        return json.dumps(_plain({"data": self.data, "layout": self.layout}), allow_nan=False)


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


def curves(lines: Sequence[Line], *, percent: bool = False, unified: bool = True, from_zero: bool = False) -> Figure:
    """Draw curves over updates."""
    figure = Figure(hovermode="x unified" if unified else "closest", showlegend=len(lines) > 1 and unified)
    form = ".0%" if percent else ".4~g"
    for line in lines:
        window = 1 if line.held_out or not line.smooth else smoothing_window(len(line.values))
        if window > 1 and line.trial is None:
            steps, values = thinned(line.steps, line.values)
            look = {"color": line.color, "width": 1}
            thin = {"line": look, "opacity": 0.25, "showlegend": False, "hoverinfo": "skip"}
            figure.add("scatter", mode="lines", x=_whole(steps), y=values, **thin)
        steps, values = thinned(
            line.steps, running_mean(line.values, window), 200 if line.trial is not None else _POINTS
        )
        single = np.isfinite(values).sum() == 1
        figure.add(
            "scatter",
            x=_whole(steps),
            y=values,
            name=literal(line.name),
            showlegend=line.named,
            mode="lines+markers" if line.held_out or single else "lines",
            line={"color": line.color, "width": 1.5 if line.trial is not None else 2, "dash": line.dash},
            marker={"color": line.color, "size": 5, "symbol": "circle"},
            hovertemplate=f"%{{y:{form}}}" if unified else f"{literal(line.name)}: %{{y:{form}}}<extra></extra>",
            meta=None if line.trial is None else {"trial": line.trial},
        )
    figure.axis("xaxis", title="update", tickformat=",~d", hoverformat=",~d", rangemode="tozero")
    figure.axis("yaxis", tickformat=".0%" if percent else None, exponentformat="e")
    if percent and len({value for line in lines for value in line.values[np.isfinite(line.values)]}) == 1:
        figure.axis("yaxis", range=[-0.02, 1.02])  # otherwise the axis would run from -50 % to 150 %
    if from_zero:
        figure.axis("yaxis", rangemode="tozero")
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
    figure = Figure(barmode="overlay", bargap=0, hovermode="x unified", showlegend=len(groups) > 1)
    for name, (values, color) in groups.items():
        counts = np.histogram(values, edges)[0]
        figure.add(
            "bar",
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts / len(values),
            width=float(edges[1] - edges[0]),
            name=literal(name),
            opacity=0.55,
            marker={"color": color, "line": {"width": 0}},
            hovertemplate="%{y:.1%}",
        )
    figure.axis("xaxis", title=unit, hoverformat=",.0f" if whole else ".3~g", tickformat=",~d" if whole else None)
    figure.axis("yaxis", tickformat=".0%", rangemode="tozero", nticks=5)
    return figure, beyond


def marked_at(figure: Figure, x: float, text: str) -> None:
    """Draw a thin vertical line with a label."""
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    ends = {"x0": x, "x1": x, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
    figure.layout["shapes"].append({"type": "line", "line": line, **ends})
    figure.annotate(x=x, y=1, yref="paper", text=literal(text), xanchor="right", yanchor="top", xshift=-4)


def value_function() -> Figure:
    """Draw the empty figure of the panel: the page's script adds curves, rows and lines as the sliders move.

    The traces, in order: rows of each class, value, loss, gradient, and the points at r on the last three.
    """
    figure = Figure(barmode="overlay", bargap=0, hovermode="x unified", showlegend=True)
    for _, name in CLASSES:
        marker = {"color": f"var(--{name})", "line": {"width": 0}}
        figure.add("bar", name=f"{name} rows", yaxis="y3", marker=marker, opacity=0.28, hoverinfo="skip")
    for name, axis, width, dash in (
        ("value", "y", 2.5, "solid"),
        ("loss", "y", 2, "dash"),
        ("gradient of the loss", "y2", 2, "dot"),
    ):
        line = {"width": width, "dash": dash}
        figure.add("scatter", name=name, mode="lines", yaxis=axis, line=line, hovertemplate="%{y:.4~g}")
    for axis in ("y", "y", "y2"):
        point = {"size": 9, "line": {"width": 2, "color": "var(--surface)"}}
        figure.add("scatter", mode="markers", yaxis=axis, showlegend=False, marker=point, hoverinfo="skip")
    plain = {"gridcolor": "var(--grid)", "zeroline": False, "automargin": True}
    figure.axis("yaxis", title="value, loss", domain=[0.36, 1], rangemode="tozero")
    small = {"standoff": 8, "font": {"size": 12}}
    figure.layout["yaxis2"] = {**plain, "title": {**small, "text": "gradient"}, "domain": [0, 0.26], "nticks": 4}
    figure.axis("yaxis3", domain=[0.36, 1], range=[0, 2.2], overlaying="y", visible=False, fixedrange=True)
    figure.axis("xaxis", title="log-ratio r, nats", anchor="y2", hoverformat=".3~f")
    return figure
