"""Write the HTML page of `kto-report`: one file that shows runs and sweeps, needs no network, and is safe to share.

    folders.py and texts.py read, words.py formats, comparison.py compares; figures.py, plots.py and sweep_figures.py say what
    is drawn; report.html.j2 lays out, charts.js draws, report.js responds

Where a text of the page is written: headings and explanations in report.html.j2; the status, the summary and the tiles of
a run or sweep in words.py; titles, captions and notes of plots in plots.py and sweep_figures.py; axis titles in
figures.py; tables of data and origin in this file; warnings in train/diagnostics; text that changes while a reader
uses the page in report.js.

The content of a folder is untrusted: the template escapes it, data in scripts cannot end the script element, charts.js
inserts text as text only, and the page's content security policy allows no script and no style but its own, by their hashes.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import ConfigError, printable
from offline_kto.kto_core.feedback.quoting import counted

if TYPE_CHECKING:
    import jinja2

    from offline_kto.train.report.figures import Plot
    from offline_kto.train.report.folders import Run, Sweep
    from offline_kto.train.run_records import RunRecord, SweepRecord

REPORT = "report.html"
_HOME = Path(__file__).parent


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
    from offline_kto.train.report.comparison import comparison
    from offline_kto.train.report.folders import Run, Sweep

    figures: list[str] = []

    def place(plot: "Plot") -> int:
        figures.append(plot.json)
        return len(figures) - 1

    names = _names([folder.path for folder in found])
    named = list(zip(found, names, strict=True))
    css = (_HOME / "report.css").read_text(encoding="utf-8")
    js = "".join((_HOME / name).read_text(encoding="utf-8") for name in ("charts.js", "report.js"))
    context = {
        "title": names[0] if len(names) == 1 else f"{len(names)} folders compared",
        "runs": [_run_parts(folder, name) for folder, name in named if isinstance(folder, Run)],
        "sweeps": [_sweep_parts(folder, name) for folder, name in named if isinstance(folder, Sweep)],
        "comparison": comparison(named),
        "sources": _sources(found, names),
        "words": words,
        "counted": counted,
        "place": place,
        "placed": lambda: Markup("[" + ",".join(_in_script(figure) for figure in figures) + "]"),
        "in_script": lambda value: Markup(_in_script(json.dumps(value, allow_nan=False))),
        "css": Markup(css),
        "js": Markup(js),
        "css_hash": _hash(css),
        "js_hash": _hash(js),
    }
    return _template().render(context)


def _hash(text: str) -> str:
    """Return the hash by which a content security policy allows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
    from offline_kto.train.report import plots, texts, words

    notes = list(run.notes)
    samples, suspects = texts.read_samples(run.path, notes), texts.read_suspects(run.path, notes)
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
        "notes": notes,
        "smoothing": plots.smoothing_note(run),
        "outcome": plots.outcome_curves(run),
        "samples": samples[: texts.MOST_SAMPLES],
        "more_samples": max(0, len(samples) - texts.MOST_SAMPLES),
        "suspects": {kind: rows[: texts.MOST_SUSPECTS] for kind, rows in suspects.items()},
        "more_suspects": sum(max(0, len(rows) - texts.MOST_SUSPECTS) for rows in suspects.values()),
        "groups": _groups(run),
        "diagnostics": plots.diagnostic_curves(run),
        "rewards": plots.reward_histograms(run),
        "held_out": _held_out(run),
        "data": _data(run.run_record),
        "options": words.changed_options(run.config),
        "origin": _origin(run.path, run.run_record, run.config),
    }


def _sweep_parts(sweep: "Sweep", name: str) -> dict[str, object]:
    from offline_kto.train.report import plots, sweep_figures, words

    header, rows = _trial_table(sweep)
    ranked, note = sweep_figures.importance(sweep)
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
        "best": sweep.best,
        "model": words.best_model(sweep),
        "parallel": sweep_figures.parallel_coordinates(sweep),
        "importance": ranked,
        "importance_note": note,
        "slices": sweep_figures.slices(sweep),
        "curves": plots.trial_curves(sweep),
        "header": header,
        "rows": rows,
        "data": _data(sweep.sweep_record),
        "origin": _origin(sweep.path, sweep.sweep_record, sweep.config),
    }


def _groups(run: "Run") -> list[tuple[str, list[dict[str, str]], str]]:
    """Build the tables of held-out metrics by groups of rows: the kind of group, its rows, and a note on their counts."""
    from offline_kto.train.report import words
    from offline_kto.train.report.folders import listed, mapping, number

    tables: dict[str, list[dict[str, str]]] = {}
    counts: dict[str, float] = {}
    for entry in map(mapping, listed(run.evaluation.get("groups"))):
        values = {}
        for name, metric in (("accuracy", "accuracy"), ("margin", "rewards/margins"), ("loss", "loss")):
            low, high = number(entry.get(f"{name}_low")), number(entry.get(f"{name}_high"))
            value = words.metric_value(metric, number(entry.get(name)), 3)
            values[name] = f"{value} {words.interval(metric, low, high)}".strip()
            values[f"{name}_before"] = words.metric_value(metric, number(entry.get(f"{name}_before")), 3)
        row = {"group": words.shown(entry.get("group")), "rows": words.shown(number(entry.get("rows"))), **values}
        by = words.shown(entry.get("by"))
        tables.setdefault(by, []).append(row)
        counts[by] = counts.get(by, 0.0) + (number(entry.get("rows")) or 0.0)
    held = number(run.evaluation.get("rows"))
    notes = {by: words.repeated_in_groups(by, held) for by in tables if held is not None and counts[by] > held}
    return [(by, rows, notes.get(by, "")) for by, rows in tables.items()]


def _held_out(run: "Run") -> dict[str, object] | None:
    """Build the held-out table: metrics with intervals, or the last evaluation during training."""
    from offline_kto.train.report import words
    from offline_kto.train.report.folders import mapping, number

    evaluation = run.evaluation
    names = [name for name in words.WORDS if name in mapping(evaluation.get("metrics"))]
    names += [name for name in mapping(evaluation.get("metrics")) if name not in names]
    if not names:
        logged = {name.removeprefix("eval/") for record in run.records for name in record if name.startswith("eval/")}
        names = [name for name in words.WORDS if name in logged]
    rows = []
    for name in names:
        value, bounds, _ = words.final(run, name)
        before = words.metric_value(name, run.before(name))
        change = mapping(mapping(evaluation.get("change")).get(name))
        changed = words.metric_value(name, number(change.get("value")))
        ends = words.interval(name, number(change.get("low")), number(change.get("high")))
        rows.append(
            (words.plain_name(name), before, f"{words.metric_value(name, value)} {bounds}", f"{changed} {ends}")
        )
    counts, step = words.held_out_counts(run), number(evaluation.get("step"))
    note = "The last evaluation in training; no intervals were computed."
    if evaluation:
        resamples = number(evaluation.get("resamples"))
        after = "" if step is None else f", after {counted(int(step), 'update')}"
        note = f"{counts}{after}. " if counts else ""
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
        if value:
            lines.append((words.shown(value), text))
    files = [str(name) for name in listed(data.get("files"))]
    return {"counts": counts, "lines": lines, "files": files, "plots": plots.length_histograms(data)}


def _origin(path: Path, record: "RunRecord | SweepRecord", config: dict[str, object]) -> dict[str, object]:
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
        "commands": words.commands(path, record),
        "pairs": [(name, _in_words(value)) for name, value in pairs if value not in (None, "", [])],
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    }


def _in_words(value: object) -> str:
    from offline_kto.train.report.words import shown

    return ", ".join(shown(item) for item in value) if isinstance(value, list) else shown(value)


def _trial_table(sweep: "Sweep") -> tuple[list[str], list[dict[str, object]]]:
    """Build the table of all trials: its header, and each trial's cells, the best trials first."""
    from offline_kto.train.report import words
    from offline_kto.train.report.comparison import Cell

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
    before = any(trial.before is not None for trial in sweep.trials)
    header = ["trial", words.plain_name(sweep.metric), *["before training"] * before, *params]
    header += [*map(words.plain_name, metrics), "time", "state"]
    header += ["host"] * several + ["reason"] * reasons
    complete = sweep.complete
    ordered = [*complete, *(trial for trial in sweep.trials if trial not in complete)]
    rows = []
    for trial in ordered:
        cells = [Cell(words.judged(sweep, trial), trial.value)]
        cells += [Cell(words.metric_value(sweep.metric, trial.before), trial.before)] * before
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
