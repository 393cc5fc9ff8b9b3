"""Draw the plots of a sweep's report page: parallel coordinates, importance, a slice for each parameter."""

import math
from collections.abc import Sequence

import numpy as np

from offline_kto.train.report.figures import Figure, Plot, literal
from offline_kto.train.report.folders import Sweep, Trial, mapping, number
from offline_kto.train.report.words import judged, plain_name, shown

_SHADES = 9  # var(--shade-0), the worst trial's, to var(--shade-8), the best one's
_SHADE_NAMES = [f"var(--shade-{i})" for i in range(_SHADES)]
_AXES = 12
_LINES = 300
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
    span = values.max() - values.min()
    places = (values - values.min()) / span if span > 0 else np.ones_like(values)
    places = places if sweep.maximize or span == 0 else 1 - places
    return {t.number: _SHADE_NAMES[round(float(p) * (_SHADES - 1))] for t, p in zip(trials, places, strict=True)}


def _word(value: object) -> str:
    """Return a value of a categorical axis as the tables show it."""
    return shown(value) if isinstance(value, bool) else str(value)


class _Axis:
    """The positions of one parameter's values on an axis from 0 to 1, and its ticks."""

    def __init__(self, values: Sequence[object], *, log: bool = False, flipped: bool = False) -> None:
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
        return [(self.place(value) or 0.0, shown(value, 3)) for value in values]


def _is_log(sweep: Sweep, name: str) -> bool:
    return mapping(mapping(sweep.sweep_record.get("space")).get(name)).get("log") is True


def told(sweep: Sweep, trial: Trial) -> str:
    """Return a trial as the lines of a hover box."""
    lines = [f"trial {trial.number}", f"{literal(sweep.metric)}: {judged(sweep, trial.value)}"]
    return "<br>".join([*lines, *(f"{literal(name)}: {literal(shown(v))}" for name, v in trial.params.items())])


def parallel_coordinates(sweep: Sweep) -> Plot | None:
    """Draw a line for each complete trial through an axis for each parameter; the best value is at the top.

    Ordinary lines are used: plotly's trace of this name needs WebGL, drops trials that lack a value, and supports
    neither hovering nor printing.
    """
    names, trials, colors = varied(sweep)[:_AXES], sweep.complete[:_LINES], shades(sweep)
    if not names or len(trials) < 2:
        return None
    axes = [_Axis([trial.params.get(name) for trial in trials], log=_is_log(sweep, name)) for name in names]
    axes.append(_Axis([trial.value for trial in trials], flipped=not sweep.maximize))
    labels = [*names, sweep.metric]
    figure = Figure(hovermode="closest", showlegend=False, margin={"l": 70, "r": 70, "t": 34, "b": 14})
    best = sweep.best
    for trial in reversed(trials):  # the best one is drawn last, above the others
        values = [*(trial.params.get(name) for name in names), trial.value]
        is_best = best is not None and trial.number == best.number
        figure.add(
            "scatter",
            x=list(range(len(axes))),
            y=[axis.place(value) for axis, value in zip(axes, values, strict=True)],
            mode="lines+markers",
            connectgaps=True,
            line={"color": colors[trial.number], "width": 3.5 if is_best else 1.5},
            marker={"size": 7 if is_best else 4, "color": colors[trial.number]},
            hovertext=told(sweep, trial),
            hoverinfo="text",
            meta={"trial": trial.number},
        )
    for index, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        line = {"color": "var(--muted)", "width": 1}
        figure.layout["shapes"].append({"type": "line", "x0": index, "x1": index, "y0": 0, "y1": 1, "line": line})
        figure.annotate(
            x=index,
            y=1,
            yshift=22,
            text=f"<b>{literal(_short(label))}</b>",
            font={"color": "var(--ink)"},
        )
        for at, word in axis.ticks():
            figure.annotate(
                x=index,
                y=at,
                text=literal(word),
                xanchor="left",
                xshift=5,
                bgcolor="var(--halo)",
                borderpad=1,
                font={"size": 11, "color": "var(--ink)"},
            )
    figure.axis("xaxis", visible=False, range=[-0.12, len(axes) - 0.6], fixedrange=True)
    figure.axis("yaxis", visible=False, range=[-0.06, 1.06], fixedrange=True)
    which = f"Each line is a trial{f', of the best {_LINES}' if len(sweep.complete) > _LINES else ''}."
    return Plot(
        "All trials at once",
        f"Parallel coordinates: {len(trials)} trials over {', '.join(names)} and {sweep.metric}.",
        figure,
        f"{which} The right-hand axis has the best value on top; the stronger the colour, the better the trial. "
        "Click a line to mark its trial everywhere.",
        height=380,
        min_width=110 * len(axes) + 60,
    )


def _short(text: str) -> str:
    return text if len(text) <= 20 else text[:19] + "…"


def importance_bars(sweep: Sweep) -> Plot | None:
    """Draw the share of the metric's variation that each parameter explains."""
    given = {name: number(value) for name, value in mapping(sweep.sweep_record.get("importance")).items()}
    ranked = sorted(((value, name) for name, value in given.items() if value is not None), reverse=True)[:_AXES]
    if not ranked:
        return None
    figure = Figure(showlegend=False, hovermode="closest", margin={"l": 10, "r": 40, "t": 4, "b": 30})
    figure.add(
        "bar",
        x=[value for value, _ in reversed(ranked)],
        y=[literal(_short(name)) + " " for _, name in reversed(ranked)],
        orientation="h",
        marker={"color": "var(--shade-6)"},
        width=0.6,
        text=[f"{100 * value:.0f} %" for value, _ in reversed(ranked)],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    figure.axis("xaxis", visible=False, range=[0, 1.1 * max(ranked[0][0], 1e-9)], fixedrange=True)
    figure.axis("yaxis", type="category", ticks="", fixedrange=True, tickfont={"color": "var(--ink)"}, showgrid=False)
    label = "; ".join(f"{name} {100 * value:.0f} %" for value, name in ranked)
    note = f"The share of the variation in {sweep.metric} that each parameter explains, as the search estimates it."
    return Plot("What mattered", f"Importance: {label}.", figure, note, height=60 + 34 * len(ranked))


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten from low to high, or low and high if fewer than two are in range."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [number for ten in tens for factor in (1, 2, 5) if low <= (number := factor * 10.0**ten) <= high]
    return found if len(found) > 1 else [low, high]


def slices(sweep: Sweep) -> list[Plot]:
    """Draw the metric against each parameter that varied."""
    trials, colors, plots = sweep.complete, shades(sweep), []
    for name in varied(sweep)[:_AXES]:
        shown_trials = [trial for trial in trials if trial.params.get(name) is not None]
        if not shown_trials:
            continue
        values = [trial.params[name] for trial in shown_trials]
        numbers = [found for value in values if (found := number(value)) is not None]
        axis = _Axis(values, log=_is_log(sweep, name))
        figure = Figure(showlegend=False, hovermode="closest")
        figure.add(
            "scatter",
            x=[literal(_word(value)) if axis.words is not None else value for value in values],
            y=[trial.value for trial in shown_trials],
            mode="markers",
            marker={
                "size": 9,
                "color": [colors[trial.number] for trial in shown_trials],
                "line": {"width": 1, "color": "var(--surface)"},
            },
            unselected={"marker": {"opacity": 0.15}},
            hovertext=[told(sweep, trial) for trial in shown_trials],
            hoverinfo="text",
            meta={"trials": [trial.number for trial in shown_trials]},
        )
        if axis.words is not None:
            words = [literal(word) for word in axis.words]
            figure.axis("xaxis", type="category", categoryorder="array", categoryarray=words)
        else:
            figure.axis("xaxis", type="log" if axis.log else "linear", exponentformat="e")
            if axis.numbers is not None:
                figure.axis("xaxis", tickvals=axis.numbers, ticktext=[shown(value, 3) for value in axis.numbers])
            elif axis.log and axis.high - axis.low > 1.5:
                figure.axis("xaxis", dtick=1)
            elif axis.log:
                ticks = _round_numbers(min(numbers), max(numbers))
                figure.axis("xaxis", tickvals=ticks, ticktext=[shown(value, 3) for value in ticks])
        figure.axis("yaxis", title=literal(plain_name(sweep.metric)), exponentformat="e", nticks=5)
        plots.append(Plot(name, f"{sweep.metric} against {name}, {len(values)} trials.", figure, height=210))
    return plots
