"""Write the HTML page of `kto-report`: one file that shows runs and sweeps, needs no network, and is safe to share.

    folders.py reads, words.py formats, figures.py, plots.py and sweep_figures.py draw, report.html.j2 lays out

Where a text of the page is written: headings and explanations in report.html.j2; the status, the summary and the tiles of
a run or sweep in words.py; titles, captions and notes of plots in plots.py and sweep_figures.py; axis titles in
figures.py; tables of data and origin in this file; warnings in train/diagnostics; text that changes while a reader
uses the page in report.js.

The content of a folder is untrusted: the template escapes it, data in scripts cannot end the script element, plots
display it verbatim, and the page's content security policy allows only its own script.
"""

import functools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import ConfigError, printable
from offline_kto.kto_core.options import flag

if TYPE_CHECKING:
    import jinja2

    from offline_kto.train.report.figures import Plot
    from offline_kto.train.report.folders import Run, Sweep
    from offline_kto.train.run_records import RunRecord, SweepRecord

REPORT = "report.html"
_HOME = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and its sort key; None sorts last."""

    text: str
    sort: float | str | None


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report page of one or several runs and sweeps.

    Args:
        folders: folders of kto-train and kto-sweep, finished or not.
        out: the HTML file.  [default: report.html in the folder; of several folders, in the current directory]

    Returns:
        The file's path.

    Raises:
        ConfigError: a folder is neither run nor sweep, or the file cannot be written.
    """
    from offline_kto.train.report.folders import read_folder

    if not folders:
        raise ConfigError("kto-report: no folder given. Name the folders of runs (runs/NAME) or sweeps (sweeps/NAME).")
    out = out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    if out.is_dir():
        raise ConfigError(f"--out {out}: a folder of that name exists; name an .html file.")
    if out.exists() and out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: a file of that name exists and is not a report; name an .html file.")
    page = _page([read_folder(folder) for folder in folders])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error}. Make room, or write it elsewhere: kto-report {folders[0]} --out FILE"
        ) from error
    return out


def warnings_of(run: "Run") -> list[str]:
    """Return the warnings before and during a run, one sentence each, as on its console."""
    from offline_kto.train.diagnostics.training import Settings, run_warnings

    said = _plan_warnings(run.run_record)
    try:
        found = run_warnings(run.records, Settings(**run.run_record["alarms"]))
    # A run of another version, or values that are not numbers or not finite.
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return said
    return said + [f"Step {warning.step:,}: {warning.text}" for warning in found]


def _plan_warnings(record: "RunRecord | SweepRecord") -> list[str]:
    from offline_kto.train.report.folders import listed

    lines = map(str, listed(record.get("warnings")))
    return [line[:1].upper() + line[1:] for line in lines]


def _page(found: Sequence["Run | Sweep"]) -> str:
    """Build the page's HTML."""
    from markupsafe import Markup

    from offline_kto.train.report import words
    from offline_kto.train.report.figures import plotly_js
    from offline_kto.train.report.folders import Run, Sweep

    plots: list[str] = []

    def place(plot: "Plot") -> int:
        plots.append(plot.json)
        return len(plots) - 1

    names = _names([folder.path for folder in found])
    runs = [_run_parts(folder, name) for folder, name in zip(found, names, strict=True) if isinstance(folder, Run)]
    sweeps = [
        _sweep_parts(folder, name) for folder, name in zip(found, names, strict=True) if isinstance(folder, Sweep)
    ]
    whole = [one for folder, name in zip(found, names, strict=True) if (one := _compared(folder, name))]
    context = {
        "title": names[0] if len(names) == 1 else f"{len(names)} folders compared",
        "runs": runs,
        "sweeps": sweeps,
        "comparison": _comparison(whole) if len(whole) > 1 else None,
        "panel": {"plot": _panel_plot(), "sources": _sources(found, names)},
        "words": words,
        "place": place,
        "placed": lambda: Markup("[" + ",".join(_in_script(plot) for plot in plots) + "]"),
        "in_script": lambda value: Markup(_in_script(json.dumps(value, allow_nan=False))),
        "css": Markup((_HOME / "report.css").read_text(encoding="utf-8")),
        "js": Markup((_HOME / "report.js").read_text(encoding="utf-8")),
        "plotly_js": Markup(plotly_js()),
        "nonce": secrets.token_urlsafe(16),
    }
    return _template().render(context)


@functools.cache
def _template() -> "jinja2.Template":
    """Return the page's template, compiled once in a process."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HOME),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2")


def _compared(folder: "Run | Sweep", name: str) -> tuple["Run", str] | None:
    """Return the run that represents a folder in a comparison, with its name: a run itself, or a sweep's best trial."""
    from offline_kto.train.report.folders import Run

    if isinstance(folder, Run):
        return folder, name
    best = folder.best
    return (best.run, f"{name}, trial {best.number}") if best and best.run else None


def _in_script(text: str) -> str:
    """Escape JSON for a script element, so that nothing in it ends the element or begins a comment."""
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return text.translate({ord(character): escape for character, escape in escapes.items()})


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names, with parent folders where two names are equal."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < 4 and len({part[-depth:] for part in parts}) < len({*parts}):
        depth += 1
    return [printable("/".join(part[-depth:])) for part in parts]


def _run_parts(run: "Run", name: str) -> dict[str, object]:
    from offline_kto.train.report import plots, words

    return {
        "name": name,
        "path": printable(str(run.path)),
        "status": words.status(run),
        "started": words.moment(run.run_record.get("started")),
        "changed": words.moment(run.changed.isoformat(timespec="seconds")) if run.changed else "",
        "verdict": words.verdict(run),
        "summary": words.summary(run),
        "tiles": words.tiles(run),
        "warnings": warnings_of(run),
        "notes": run.notes,
        "smoothing": plots.smoothing_note(run),
        "curves": plots.run_curves(run),
        "rewards": plots.reward_histograms(run),
        "held_out": _held_out(run),
        "data": _data(run.run_record),
        "origin": _origin(run.path, run.run_record, run.config),
    }


def _sweep_parts(sweep: "Sweep", name: str) -> dict[str, object]:
    from offline_kto.train.report import plots, sweep_figures, words

    best = sweep.best
    header, rows = _trial_table(sweep)
    return {
        "name": name,
        "path": printable(str(sweep.path)),
        "status": words.sweep_status(sweep),
        "started": words.moment(sweep.sweep_record.get("started")),
        "verdict": (verdict := words.sweep_verdict(sweep)),
        "badge": "best of the trials" if verdict is not None and verdict.kind != "better" else "best",
        "summary": words.sweep_summary(sweep),
        "tiles": words.sweep_tiles(sweep),
        "warnings": _plan_warnings(sweep.sweep_record),
        "notes": sweep.notes,
        "best": best,
        "parallel": sweep_figures.parallel_coordinates(sweep),
        "importance": sweep_figures.importance_bars(sweep),
        "slices": sweep_figures.slices(sweep),
        "curves": plots.trial_curves(sweep),
        "header": header,
        "rows": rows,
        "metric": words.plain_name(sweep.metric),
        "data": _data(sweep.sweep_record),
        "origin": _origin(sweep.path, sweep.sweep_record, sweep.config, best=best is not None),
    }


def _held_out(run: "Run") -> dict[str, object] | None:
    """Build the held-out table: metrics with intervals, or the last evaluation during training."""
    from offline_kto.train.report import words
    from offline_kto.train.report.folders import mapping, number

    evaluation = run.evaluation
    names = list(mapping(evaluation.get("metrics")))
    if not names:
        logged = {name.removeprefix("eval/") for record in run.records for name in record if name.startswith("eval/")}
        names = [name for name in words.WORDS if name in logged]
    rows = []
    for name in names:
        value, bounds, _ = words.final(run, name)
        then = number(mapping(mapping(evaluation.get("before")).get(name)).get("value"))
        before = words.metric_value(name, then) if then is not None else words.NOTHING
        rows.append((words.plain_name(name), words.metric_value(name, value), bounds or words.NOTHING, before))
    counts = [
        f"{words.shown(count)} {what}"
        for what in ("rows", "prompts")
        if (count := number(evaluation.get(what))) is not None
    ]
    note = "The last evaluation in training; no intervals were computed."
    if evaluation:
        resamples = number(evaluation.get("resamples"))
        note = f"{' of '.join(counts)}, after {words.shown(number(evaluation.get('step')))} updates. " if counts else ""
        note += f"95 % intervals from {words.shown(resamples)} bootstrap resamples of the prompts." if resamples else ""
    return {"rows": rows, "note": note} if rows else None


def _data(record: "RunRecord | SweepRecord") -> dict[str, object] | None:
    """Build the data section of a run or sweep."""
    from offline_kto.train.report import plots, words
    from offline_kto.train.report.folders import listed, mapping, number

    data = mapping(record.get("data"))
    if not data:
        return None
    counts = [
        (kind, words.shown(number(data.get(kind))), words.shown(number(data.get(f"held_out_{kind}"))))
        for kind in ("desirable", "undesirable")
    ]
    lines = []
    for key, text in (
        ("truncated", "rows of the sample fill the limit of tokens"),
        ("dropped", "rows dropped because their prompt leaves no room"),
        ("contradictory", "completions that carry both labels"),
        ("max_length", "tokens at most in a row"),
    ):
        value = number(data.get(key))
        if value is not None:
            lines.append((words.shown(value), text))
    files = [str(name) for name in listed(data.get("files"))]
    return {"counts": counts, "lines": lines, "files": files, "plots": plots.length_histograms(data)}


def _origin(
    path: Path, record: "RunRecord | SweepRecord", config: dict[str, object], *, best: bool = False
) -> dict[str, object]:
    """Build the reproduction section: commands, fingerprints, versions, options."""
    import yaml

    from offline_kto.train.report import words
    from offline_kto.train.report.folders import mapping

    reference = mapping(record.get("reference"))
    pairs = [
        ("cache fingerprint", record.get("fingerprint")),
        ("labels", record.get("labels_hash")),
        ("reference model", reference.get("id")),
        ("reference weights", reference.get("weights_hash")),
        ("reference precision", reference.get("dtype")),
        ("precision", record.get("precision")),
        ("device", record.get("device")),
        ("class weights", record.get("weights")),
        *((name, version) for name, version in mapping(record.get("versions")).items()),
    ]
    return {
        "commands": words.commands(path, record, best=best),
        "pairs": [(name, _in_words(value)) for name, value in pairs if value not in (None, "", [])],
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    }


def _in_words(value: object) -> str:
    from offline_kto.train.report.words import shown

    return ", ".join(shown(item) for item in value) if isinstance(value, list) else shown(value)


def _trial_table(sweep: "Sweep") -> tuple[list[str], list[dict[str, object]]]:
    """Build the table of all trials: its header, and each trial's cells, the best trials first."""
    from offline_kto.train.report import words

    params = list(dict.fromkeys(name for trial in sweep.trials for name in trial.params))
    others = ("eval/loss", "eval/accuracy", "eval/rewards/margins")
    metrics = [name for name in others if name != sweep.metric and any(name in t.metrics for t in sweep.trials)]
    front = sweep.sweep_record.get("pareto_front")
    front = front if isinstance(front, list) else []
    if front:
        of_objectives = {name for t in sweep.trials for name in t.metrics if name.endswith("/rewards/margins")}
        metrics += sorted(of_objectives - {*others})
    several = len({trial.host for trial in sweep.trials}) > 1
    reasons = any(trial.reason for trial in sweep.trials)
    header = ["trial", words.plain_name(sweep.metric), *params, *map(words.plain_name, metrics), "time", "state"]
    header += ["host"] * several + ["reason"] * reasons
    complete = sweep.complete
    ordered = [*complete, *(trial for trial in sweep.trials if trial not in complete)]
    rows = []
    for trial in ordered:
        cells = [Cell(words.judged(sweep, trial.value), trial.value)]
        for name in params:
            value = trial.params.get(name)
            cells.append(Cell(words.shown(value), words.sortable(value)))
        cells += [Cell(words.metric_value(name, v), v) for name in metrics for v in [trial.metrics.get(name)]]
        cells += [Cell(words.duration(trial.seconds), trial.seconds), Cell(trial.state, trial.state)]
        cells += [Cell(trial.host, trial.host or None)] * several + [Cell(trial.reason, trial.reason or None)] * reasons
        best = sweep.best is not None and trial.number == sweep.best.number
        on_front = trial.number in front
        rows.append({"number": trial.number, "best": best, "front": on_front, "state": trial.state, "cells": cells})
    return header, rows


def _comparison(runs: Sequence[tuple["Run", str]]) -> dict[str, object]:
    """Build the comparison of several runs: overlaid curves, and a table of final values."""
    from offline_kto.train.report import plots, words

    metrics = [m for m in words.WORDS if any(words.final(run, m)[0] is not None for run, _ in runs)]
    options = words.different_options([run for run, _ in runs])
    rows = []
    for run, name in runs:
        finals = [(metric, words.final(run, metric)) for metric in metrics]
        cells = [Cell(f"{words.metric_value(m, value)} {bounds}".strip(), value) for m, (value, bounds, _) in finals]
        where = (
            "held out" if any(found[2] == "held out" and found[0] is not None for _, found in finals) else "training"
        )
        state = [Cell(f"{run.updates:,}", run.updates), Cell(words.status(run), words.status(run)), Cell(where, where)]
        chosen = [Cell(words.shown(value), words.sortable(value)) for value in map(run.config.get, options)]
        rows.append({"name": name, "cells": [*chosen, *cells, *state]})
    header = [
        "run",
        *map(flag, options),
        *(words.plain_name(metric) for metric in metrics),
        "updates",
        "status",
        "measured on",
    ]
    return {"curves": plots.compared_curves(runs), "header": header, "rows": rows}


def _panel_plot() -> "Plot":
    from offline_kto.train.report.figures import Plot, value_function

    label = "Value, loss and gradient of one row over its log-ratio, with this run's rows in the background."
    return Plot("The value of an outcome", label, value_function(), height=430)


def _sources(found: Sequence["Run | Sweep"], names: Sequence[str]) -> list[dict[str, object]]:
    """Return the panel's initial state for each folder: a run's settings and rows."""
    from offline_kto.train.report.folders import Run
    from offline_kto.train.report.plots import panel_source

    sources = []
    for folder, name in zip(found, names, strict=True):
        if isinstance(folder, Run):
            sources.append(panel_source(name, folder, folder.config, folder.run_record))
        else:
            best = folder.best
            run, params = (best.run, best.params) if best else (None, {})
            title = f"{name}, trial {best.number}" if best else name
            config = {**folder.config, **(run.config if run else {}), **params}
            sources.append(panel_source(title, run, config, folder.sweep_record))
    return sources
