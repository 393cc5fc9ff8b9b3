"""Choose the plots of a run, a sweep and a comparison, and their captions."""

import math
from collections.abc import Sequence

import numpy as np

from offline_kto.train.report.figures import (
    CLASSES,
    LEAST_SPAN,
    Floats,
    Line,
    Plot,
    curves,
    histograms,
    smoothing_window,
)
from offline_kto.train.report.folders import SPLITS, HeldOutCurve, Run, Sweep, listed, mapping, number
from offline_kto.train.report.sweep_figures import shades
from offline_kto.train.report.words import before_and_after, final, plain_name, shown
from offline_kto.train.run_records import RunRecord, SweepRecord

_CLASS_COLORS = {"chosen": "var(--desirable)", "rejected": "var(--undesirable)"}
_CLASS_WORDS = {"chosen": "desirable", "rejected": "undesirable"}
_SPLIT_WORDS = {"train": "Training rows", "held_out": "Held-out rows"}
# var(--run-0) ...; dashes distinguish further curves, and help readers who cannot distinguish the colours.
_RUN_COLORS = 8
_DASHES = ("", "7 4", "2 3", "8 3 2 3", "12 4")
_HELD_OUT_DASH = "2 3"
_TRIALS = 100
_QUANTILES = 401
_LONGEST = 10**9  # tokens of a row; larger neighbouring numbers could not be distinguished
_AS_LOGGED = ("learning_rate", "peak_memory_mb", "peak_reserved_mb")  # no noise to smooth
# Another origin would exaggerate changes.
_FROM_ZERO = ("learning_rate", "tokens_per_second", "peak_memory_mb", "peak_reserved_mb")

# Title, metrics, caption.
_OUTCOME = (
    ("Reward margin", "rewards/margins", "Desirable minus undesirable: above 0 the policy prefers what people liked."),
    ("Loss", "loss", "What training minimizes."),
    ("Accuracy", "accuracy", "Rows on the right side of the loss's reference point."),
)
_DIAGNOSTICS = (
    ("Rewards", ("rewards/chosen", "rewards/rejected"), "beta times the log-ratio of policy and reference, by class."),
    (
        "Reference point z0",
        ("kl", "kl_raw"),
        "From mismatched completions; the raw estimate may be negative, the loss clamps it at zero.",
    ),
    (
        "Log-probability",
        ("logps/chosen", "logps/rejected"),
        "Of whole completions, nats. Both classes may fall while the margin grows.",
    ),
    ("Reward shift", ("reward_shift",), "BCO's running mean of rewards, from which its losses are measured."),
    ("Gradient norm", ("grad_norm",), "Before clipping."),
    ("Learning rate", ("learning_rate",), ""),
    ("Tokens per second", ("tokens_per_second",), ""),
    ("Peak memory, MB", ("peak_memory_mb",), ""),
    (
        "Peak memory held by the GPU's allocator, MB",
        ("peak_reserved_mb",),
        "Used or not; other processes cannot have it.",
    ),
)


def outcome_curves(run: Run) -> list[Plot]:
    """Draw margin, loss and accuracy: of training rows, and of held-out rows with intervals and the untrained policy."""
    plots = []
    for title, metric, note in _OUTCOME:
        held = run.held_out(metric)
        lines = _training_line(run, metric)
        if held is not None:
            lines.append(_held_out_line("held out", held, "var(--ink)"))
        if lines:
            value = before_and_after(run, metric)
            said = f"Held out: {value}. {note}" if value else note
            plots.append(
                Plot(
                    title,
                    f"{title} over {run.updates:,} updates. {said}",
                    curves(
                        lines,
                        percent=metric == "accuracy",
                        before=None if held is None else held.before,
                        least=_least_span(metric, held),
                    ),
                    said,
                )
            )
    return plots


def _least_span(metric: str, held: HeldOutCurve | None) -> float:
    """Return the smallest span of an axis: at least twice the widest interval, so that a change within it looks small."""
    widths = [] if held is None else (held.high - held.low)[np.isfinite(held.high - held.low)].tolist()
    return max(2 * max(widths, default=0.0), LEAST_SPAN.get(metric, 0.0))


def _training_line(run: Run, metric: str) -> list[Line]:
    steps, values = run.curve(metric)
    return [Line("training", steps, values, "var(--train)")] if np.isfinite(values).any() else []


def _held_out_line(name: str, held: HeldOutCurve, color: str, dash: str = "") -> Line:
    return Line(name, held.steps, held.values, color, dots=True, dash=dash, low=held.low, high=held.high)


def diagnostic_curves(run: Run) -> list[Plot]:
    """Draw everything else that was logged in training."""
    plots = []
    for title, metrics, note in _DIAGNOSTICS:
        lines = []
        for metric in metrics:
            lines += _diagnostic_lines(run, metric, several=len(metrics) > 1)
        if lines:
            label = f"{title} over {run.updates:,} updates: {', '.join(line.name for line in lines)}."
            figure = curves(lines, from_zero=metrics[0] in _FROM_ZERO, least=LEAST_SPAN.get(metrics[0], 0.0))
            plots.append(Plot(title, label, figure, note))
    return plots


def smoothing_note(run: Run) -> str:
    """Explain thin and thick lines, bands and the line of step 0."""
    window = smoothing_window(len(run.curve("loss")[0]))
    said = [f"Thin lines: each record. Thick lines: the mean of the last {window:,} records."] if window > 1 else []
    held = [run.held_out(metric) for _, metric, _ in _OUTCOME]
    if any(one is not None and one.before is not None for one in held):
        said.append("Dashed level: the same rows before training.")
    if any(one is not None and np.isfinite(one.low).any() for one in held):
        said.append(
            "Band: the 95 % interval of held-out values. Where it contains the dashed level, the change may be chance."
        )
    return " ".join(said)


def _diagnostic_lines(run: Run, metric: str, *, several: bool) -> list[Line]:
    kind = metric.rsplit("/", 1)[-1]
    color = _CLASS_COLORS.get(kind, "var(--train)")
    what = _CLASS_WORDS.get(kind) or {"kl": "z0", "kl_raw": "raw"}.get(metric, "")
    found = []
    for held in (False, True):
        steps, values = run.curve(f"eval/{metric}" if held else metric)
        if not np.isfinite(values).any():
            continue
        where = "held out" if held else "training"
        name = f"{what}, {where}" if several else where
        raw = metric == "kl_raw"
        shade = color if kind in _CLASS_COLORS else "var(--raw)" if raw else "var(--ink)" if held else color
        dash = _HELD_OUT_DASH if held else ""
        found.append(Line(name, steps, values, shade, held, dash, smooth=metric not in _AS_LOGGED))
    return found


def reward_histograms(run: Run) -> list[tuple[str, Plot]]:
    """Draw the distribution of rewards in each class, by split."""
    beta = number(run.config.get("beta"))
    found = []
    for split in reversed(SPLITS):
        groups, told = {}, []
        for label, name in CLASSES:
            values = run.logratios.get((split, label))
            if values is None:
                continue
            rewards = values * (beta if beta is not None else 1.0)
            groups[name] = (rewards, f"var(--{name})")
            told.append(
                f"{name}: {len(rewards):,} rows, mean {shown(float(rewards.mean()), 3)}, {100 * (rewards > 0).mean():.0f} % above zero"
            )
        if groups:
            unit = "reward" if beta is not None else "log-ratio, nats"
            figure, beyond = histograms(groups, unit=unit)
            figure.add("rule", x=0.0)
            note = "; ".join(told).capitalize() + "."
            note += f" {beyond:,} rows are beyond the axis." if beyond else ""
            found.append(
                (
                    _SPLIT_WORDS[split],
                    Plot(_SPLIT_WORDS[split], f"Histogram of rewards by class. {note}", figure, note, height=260),
                )
            )
    return found


def length_histograms(data: dict[str, object]) -> list[Plot]:
    """Draw the distribution of prompt and completion lengths."""
    lengths = mapping(data.get("lengths"))
    found = {
        name: np.array(
            [v for item in listed(lengths.get(name)) if (v := number(item)) is not None and 0 <= v < _LONGEST]
        )
        for name in ("prompt", "desirable", "undesirable")
    }
    sample = number(data.get("sample"))
    of = f" in a sample of {shown(sample)} rows" if sample else ""
    plots = []
    for title, names in (("Prompts", ("prompt",)), ("Completions", ("desirable", "undesirable"))):
        groups = {
            name: (found[name], "var(--train)" if name == "prompt" else f"var(--{name})")
            for name in names
            if len(found[name])
        }
        if groups:
            figure, _ = histograms(groups, unit="tokens", whole=True)
            medians = ", ".join(f"{name} {shown(float(np.median(values)))}" for name, (values, _) in groups.items())
            note = f"Tokens{of}. Median: {medians.removeprefix('prompt ')}."
            plots.append(Plot(title, f"Histogram of the lengths of {title.lower()}. {note}", figure, note))
    return plots


def compared_curves(runs: Sequence[tuple[Run, str, int]]) -> list[Plot]:
    """Draw one plot for each metric with a curve for each run: held out where there are such values, else in training.

    Args:
        runs: each with its name and the number of its colour.
    """
    plots = []
    for title, metric, _ in _OUTCOME:
        lines, before, spans = [], set(), [0.0]
        for run, name, index in runs:
            held = run.held_out(metric)
            color, dash = f"var(--run-{index % _RUN_COLORS})", _DASHES[index % len(_DASHES)]
            if held is not None:
                lines.append(_held_out_line(name, held, color, dash))
                before.add(held.before)
                spans.append(_least_span(metric, held))
        where = "Held-out"
        if not lines:
            where = "Training"
            for run, name, index in runs:
                color, dash = f"var(--run-{index % _RUN_COLORS})", _DASHES[index % len(_DASHES)]
                lines += [Line(name, line.steps, line.values, color, dash=dash) for line in _training_line(run, metric)]
        if lines:
            what = f"{where} {title.lower()}"
            said = "; ".join(f"{name} {value}" for run, name, _ in runs if (value := before_and_after(run, metric)))
            # A level that runs do not share, as of losses of another kind, is each curve's first point only.
            level = before.pop() if len(before) == 1 else None
            figure = curves(lines, percent=metric == "accuracy", before=level, least=max(spans))
            plots.append(Plot(what, f"{what}: {said or ', '.join(line.name for line in lines)}.", figure))
    return plots


def trial_curves(sweep: Sweep) -> list[tuple[str, Plot]]:
    """Draw the curves of all trials, one plot for each metric."""
    colors, found = shades(sweep), []
    complete = sweep.complete
    others = [trial for trial in sweep.trials if trial not in complete]
    chosen = [trial for trial in [*complete, *others] if trial.run is not None][:_TRIALS]
    metrics = ["eval/loss", "loss", "eval/rewards/margins", "rewards/margins", "eval/accuracy", "accuracy"]
    judged = sweep.metric
    if all(len(trial.run.curve(judged)[0]) < 2 for trial in chosen if trial.run):
        judged = judged.removeprefix("eval/")  # a metric with single points instead of curves is not drawn first
    metrics.sort(key=lambda metric: metric != judged)
    for metric in metrics:
        lines = []
        for trial in reversed(chosen):  # the best one is drawn last, above the others
            steps, values = trial.run.curve(metric) if trial.run else (np.empty(0), np.empty(0))
            if np.isfinite(values).any():
                color = colors.get(trial.number, "var(--train)")
                held = metric.startswith("eval/")
                dash = "" if trial.number in colors else _HELD_OUT_DASH
                lines.append(Line(f"trial {trial.number}", steps, values, color, held, dash, trial=trial.number))
        if lines:
            title = plain_name(metric).capitalize() if metric.startswith("eval/") else "Training " + plain_name(metric)
            note = (
                "The stronger the colour, the better the trial; dotted: not complete. Click a curve to mark its trial."
            )
            if len(chosen) == _TRIALS:
                note += f" The best {_TRIALS} trials."
            before = sweep.untrained if metric == sweep.metric else None
            least = LEAST_SPAN.get(metric.removeprefix("eval/"), 0.0)
            figure = curves(lines, percent="accuracy" in metric, hover="near", before=before, least=least)
            found.append((title, Plot(title, f"{title} of {len(lines)} trials.", figure, note, height=320)))
    return found


def panel_source(
    name: str, run: Run | None, config: dict[str, object], record: RunRecord | SweepRecord
) -> dict[str, object]:
    """Return initial positions of the panel's sliders and quantiles of each class's log-ratios, without rows."""
    logratios = run.logratios if run is not None else {}
    # Prefer held-out rows, which show the current model, and their z0.
    split = next((split for split in reversed(SPLITS) if any(key[0] == split for key in logratios)), None)
    rows = {word: logratios.get((str(split), label), np.empty(0)) for label, word in CLASSES}
    everything: Floats = np.concatenate([*rows.values()])
    beta = number(config.get("beta")) or 0.0
    beta = beta if 1e-6 < beta < 1e6 else 0.1
    z0 = (final(run, "kl")[0] if run is not None else None) or 0.0
    reach = 8 / beta
    low, high = z0 - reach, z0 + reach
    if len(everything):
        low, high = (float(bound) for bound in np.quantile(everything, [0.005, 0.995]))
        margin = 0.15 * (high - low) + 1 / beta
        low, high = min(low, z0) - margin, max(high, z0) + margin
    edges = np.linspace(low, high, 61)
    weights = [number(value) for value in listed(record.get("weights"))]
    if len(weights) != 2:
        weights = [number(config.get(f"{word}_weight")) for _, word in CLASSES]
    return {
        "name": name,
        "loss": str(config.get("loss") or "kto"),
        "beta": beta,
        "z0": max(z0, 0.0),
        "r": float(np.median(everything)) if len(everything) else 0.0,
        "weights": [1.0 if weight is None else weight for weight in weights],
        "low": low,
        "high": high,
        "split": {"train": "training", "held_out": "held-out", None: ""}[split],
        "counts": {word: len(values) for word, values in rows.items()},
        "bins": {word: [int(n) for n in np.histogram(values, edges)[0]] for word, values in rows.items()},
        "quantiles": {word: _quantiles(values) for word, values in rows.items()},
    }


def _quantiles(values: Floats) -> list[float]:
    if not len(values):
        return []
    return [
        round(float(value), 6) for value in np.quantile(values, np.linspace(0, 1, _QUANTILES)) if math.isfinite(value)
    ]
