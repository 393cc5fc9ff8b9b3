"""Format the numbers of the report page, and write its sentences."""

import dataclasses
import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.feedback.quoting import counted, numbered
from offline_kto.kto_core.options import flag
from offline_kto.train.config import TrainConfig
from offline_kto.train.report.folders import Run, Sweep, Trial, listed, mapping, number
from offline_kto.train.run_records import RunRecord, SweepRecord

NOTHING = "–"
PERCENT = frozenset({"accuracy", "padding"})
# Names of metrics in the files, and on the page.
WORDS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/chosen": "reward, desirable",
    "rewards/rejected": "reward, undesirable",
    "rewards/margins": "reward margin",
    "kl": "reference point z0",
    "kl_raw": "z0 before its clamp",
    "logps/chosen": "log-prob., desirable",
    "logps/rejected": "log-prob., undesirable",
    "reward_shift": "reward shift",
}


@dataclass(frozen=True)
class Tile:
    """A key number: its name, its value, and the text below it."""

    name: str
    value: str
    below: str = ""


def shown(value: object, digits: int = 4) -> str:
    """Format a value: numbers with `digits` significant digits and thousands separators."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return NOTHING
    if not isinstance(value, int | float):
        return str(value)
    found = number(value)
    if found is None:
        return NOTHING
    if found == int(found) and abs(found) < 1e15:
        text = f"{int(found):,}"
    elif abs(found) >= 10 ** (digits - 1):
        text = f"{found:,.0f}" if abs(found) < 1e15 else f"{found:.{digits - 1}e}"
    elif abs(found) < 1e-3:
        mantissa, exponent = f"{found:.{digits - 1}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{found:.{digits}g}"
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text


def plain_name(metric: str) -> str:
    """Return a metric's name in words, for instance of `eval/rewards/chosen`."""
    held = metric.startswith("eval/")
    objective, name = _of_objective(metric.removeprefix("eval/"))
    return ("held-out " if held else "") + WORDS.get(name, name) + (f", {objective}" if objective else "")


def _of_objective(name: str) -> tuple[str, str]:
    """Split a metric such as `helpful/accuracy` into the name of an objective, empty for others, and the metric."""
    for metric in ("accuracy", "rewards/margins"):
        if name.endswith(f"/{metric}"):
            return printable(name.removesuffix(f"/{metric}"), 100), metric
    return "", name


def metric_value(metric: str, value: float | None, digits: int = 4) -> str:
    """Format a metric's value; shares as percentages."""
    if value is not None and _of_objective(metric.removeprefix("eval/"))[1] in PERCENT:
        return f"{100 * value:.1f} %".replace(".0 %", " %")
    return shown(value, digits)


_SWEEP_DIGITS = 6  # trials with a small learning rate differ in late digits


def judged(sweep: Sweep, trial: Trial) -> str:
    """Format a trial's value of the metric that a sweep compares its trials by, with its interval."""
    value = metric_value(sweep.metric, trial.value, _SWEEP_DIGITS)
    return f"{value} {interval(sweep.metric, trial.low, trial.high)}".strip()


def interval(metric: str, low: float | None, high: float | None) -> str:
    """Format an interval as `[64, 78]`; empty without one."""
    if low is None or high is None:
        return ""
    if _of_objective(metric.removeprefix("eval/"))[1] in PERCENT:
        return f"[{100 * low:.0f}, {100 * high:.0f}]"
    return f"[{shown(low, 3)}, {shown(high, 3)}]"


def duration(seconds: float | None) -> str:
    """Format seconds in words."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{shown(seconds, 3)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: object) -> str:
    """Format a time stamp of a file; return the text unchanged if it is not one."""
    try:
        when = datetime.datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        when = None
    if when is None:
        return str(text or "")
    return f"{when.day} {when:%B %Y, %H:%M}" + (" UTC" if when.utcoffset() == datetime.timedelta(0) else "")


def final(run: Run, metric: str) -> tuple[float | None, str, str]:
    """Return a run's final value of a metric: held out with its interval, held out, or of the last training record.

    Returns:
        The value, its formatted interval or "", and the rows it was measured on.
    """
    # All metrics are of the same rows: a metric that held-out rows lack (of a class without rows) stays empty.
    metrics = mapping(run.evaluation.get("metrics"))
    if metrics:
        held = mapping(metrics.get(metric))
        ends = (number(held.get(end)) for end in ("low", "high"))
        return number(held.get("value")), interval(metric, *ends), "held out"
    if run.last("eval/loss") is not None:
        return run.last(f"eval/{metric}"), "", "held out"
    return run.last(metric), "", "training"


def before_and_after(run: Run, metric: str) -> str:
    """Format a held-out metric before and after training; empty without held-out rows."""
    value, bounds, where = final(run, metric)
    if value is None or where != "held out":
        return ""
    before = run.before(metric)
    then = f"{metric_value(metric, before)} before, " if before is not None else ""
    at = number(run.evaluation.get("step"))
    updates = counted(int(at) if at is not None else run.updates, "update")
    return f"{then}{metric_value(metric, value)}{' ' + bounds if bounds else ''} after {updates}"


def status(run: Run) -> str:
    """Return the state of a run: finished, running, or unfinished."""
    return "finished" if run.finished else "running" if run.running else "unfinished"


@dataclass(frozen=True)
class VerdictWords:
    """A verdict: its kind for the style sheet, its headline, the numbers that say so, and what to try next."""

    kind: str
    headline: str
    text: str
    next: str = ""


def verdict(run: Run) -> VerdictWords | None:
    """Return whether a run made its model better; None if it has not ended, or is of a version without verdicts."""
    found = mapping(run.evaluation.get("verdict"))
    outcome, reason, advice = (printable(str(found.get(name) or "")) for name in ("outcome", "reason", "next"))
    if outcome in ("better", "no difference", "worse"):
        than = "from" if outcome == "no difference" else "than"
        rows = f" on {counts}" if (counts := held_out_counts(run)) else ""
        text = f"{_sentence(reason)} (Paired 95 % interval{rows}.)"
        return VerdictWords(outcome.replace(" ", "-"), f"{outcome.capitalize()} {than} before training.", text, advice)
    if run.finished and not run.evaluation and run.last("eval/loss") is None:
        return VerdictWords(
            "unknown",
            "Not known whether it is better than before training.",
            "No rows were held out.",
            "--eval-fraction 0.1 holds out a tenth of the prompts",
        )
    return None


def held_out_counts(run: Run) -> str:
    """Return the numbers of held-out rows and prompts; empty if neither is known."""
    found = ((number(run.evaluation.get(f"{what}s")), what) for what in ("row", "prompt"))
    return " of ".join(counted(int(count), what) for count, what in found if count)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def summary(run: Run) -> str:
    """Summarize a run in one line."""
    if not run.records and not run.evaluation:
        return "No update was logged yet."
    total = number(run.run_record.get("total_updates"))
    of = f" of {total:,.0f}" if total and not run.finished else ""
    after = f"after {run.updates:,}{of} updates" if of else f"after {counted(run.updates, 'update')}"
    kept = best_update(run)
    if kept is not None:
        after = f"after {counted(kept, 'update')}, the best of {run.updates:,}"
    value, bounds, where = final(run, "accuracy")
    name = "Held-out" if where == "held out" else "Training"
    text = f"No accuracy was logged {after}"
    if value is not None:
        text = f"{name} accuracy {100 * value:.0f} %{' ' + bounds if bounds else ''} {after}"
    margin, bounds, _ = final(run, "rewards/margins")
    if margin is not None:
        text += f"; reward margin {shown(margin, 3)}{' ' + bounds if bounds else ''}"
    if run.finished:
        return text + "."
    return text + ("; still running." if run.running else "; the run has not finished.")


def different_options(runs: Sequence[Run]) -> list[str]:
    """Return the names of all options that differ between runs; not where files are, which changes no value."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("cache", "out", "resume"))
    return [name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1]


def changed_options(config: dict[str, object]) -> list[tuple[str, str, str]]:
    """Return the options of a run that differ from the defaults: name, value, default."""
    found = []
    for field in dataclasses.fields(TrainConfig):
        value = config.get(field.name)
        if field.name not in ("cache", "out") and value is not None and value != field.default:
            found.append((flag(field.name), shown(value), shown(field.default)))
    return found


def sortable(value: object) -> float | str | None:
    """Return the sort key of a value in a table."""
    found = number(value)
    return found if found is not None else None if value is None else str(value)


def best_update(run: Run) -> int | None:
    """Return the update whose model a run ended with, or None if it is the last one."""
    kept = number(mapping(run.run_record.get("final")).get("step"))
    return int(kept) if kept is not None and 0 < kept < run.updates else None


def tiles(run: Run) -> list[Tile]:
    """Return a run's key numbers."""
    found = []
    for metric in ("rewards/margins", "accuracy", "loss"):
        value, bounds, where = final(run, metric)
        if value is not None:
            before = run.before(metric) if where == "held out" else None
            then = f"before {metric_value(metric, before)}" if before is not None else ""
            name = f"{where.replace(' ', '-')} {WORDS[metric]}"
            found.append(Tile(name, metric_value(metric, value), ", ".join(filter(None, [bounds, then]))))
    seconds, kept = run.last("train_runtime"), best_update(run)
    below = [f"in {duration(seconds)}"] if seconds is not None else []
    below += [f"kept: {kept:,}"] if kept is not None else []
    found.append(Tile("updates", f"{run.updates:,}", "; ".join(below)))
    memory = run.last("peak_memory_mb")
    if memory is not None:
        found.append(Tile("peak memory", f"{shown(memory, 3)} MB"))
    return found


def repeated_in_groups(by: str, held_out: float) -> str:
    """Return why the rows of groups are more than the held-out ones; empty for groups that no row can share."""
    why = {
        "class": "A row with votes for and against it is in both classes",
        "objective": "A row that is judged for several objectives is in the group of each",
    }.get(by)
    return f"{why}, so the counts add up to more than the {shown(held_out)} held-out rows." if why else ""


def sweep_status(sweep: Sweep) -> str:
    """Return the state of a sweep: finished, running, or unfinished."""
    ended = [trial for trial in sweep.trials if trial.state != "running"]
    if sweep.trials and len(ended) >= (number(sweep.sweep_record.get("planned")) or len(sweep.trials)):
        return "finished"
    return "running" if sweep.running else "unfinished"


def sweep_summary(sweep: Sweep) -> str:
    """Summarize a sweep in one line."""
    best, complete = sweep.best, sweep.complete
    if best is None or best.value is None:
        return f"{counted(len(sweep.trials), 'trial')} so far, none of them complete."
    way = "highest" if sweep.maximize else "lowest"
    text = f"Trial {best.number} has the {way} {plain_name(sweep.metric)}, {judged(sweep, best)}"
    if sweep.untrained is not None:
        text += f", before training {metric_value(sweep.metric, sweep.untrained, _SWEEP_DIGITS)}"
    if len(complete) > 1:
        if complete[-1].value == best.value:
            return f"{text}; so {'has the other complete trial' if len(complete) == 2 else 'have the other complete trials'}."
        worst = metric_value(sweep.metric, complete[-1].value, _SWEEP_DIGITS)
        way = "go down to" if sweep.maximize else "reach up to"
        text += f"; the {len(complete):,} complete trials {way} {worst}"
    return text + "."


def sweep_verdict(sweep: Sweep) -> VerdictWords | None:
    """Return whether a sweep found a better model; None if it is of a version without verdicts."""
    record, best = sweep.sweep_record, sweep.best
    entries = {mapping(entry).get("number"): mapping(entry) for entry in listed(record.get("trials"))}
    found = mapping(entries.get(best.number, {}).get("verdict")) if best is not None else {}
    outcome, reason, advice = (printable(str(found.get(name) or "")) for name in ("outcome", "reason", "next"))
    if best is None or outcome not in ("better", "no difference", "worse"):
        return None
    tied = [one for one in listed(record.get("tied")) if isinstance(one, int)]
    text = f"Trial {best.number}, {plain_name(sweep.metric)} {judged(sweep, best)}: {reason}."
    if tied:
        text += f" On these held-out rows it cannot be told from {numbered('trial', tied)}."
    if not any(isinstance(one, int) for one in listed(record.get("better"))):
        return VerdictWords("worse", "No trial beats the untrained model.", text, advice)
    than = "no different from" if outcome == "no difference" else f"{outcome} than"
    return VerdictWords(outcome.replace(" ", "-"), f"The best trial is {than} before training.", text)


def sweep_tiles(sweep: Sweep) -> list[Tile]:
    """Return a sweep's key numbers."""
    found = []
    best = sweep.best
    if best is not None and best.value is not None:
        bounds = interval(sweep.metric, best.low, best.high)
        then = f"before {metric_value(sweep.metric, best.before)}" if best.before is not None else ""
        below = ", ".join(filter(None, [bounds, then, f"trial {best.number}"]))
        found.append(Tile(f"best {plain_name(sweep.metric)}", metric_value(sweep.metric, best.value), below))
        for name in ("eval/accuracy", "eval/rewards/margins"):
            if name != sweep.metric and best.metrics.get(name) is not None:
                found.append(Tile(plain_name(name), metric_value(name, best.metrics[name]), "of the best trial"))
    states = [trial.state for trial in sweep.trials]
    others = [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "complete"]
    found.append(Tile("complete trials", f"{states.count('complete'):,}", ", ".join(others)))
    seconds = number(sweep.sweep_record.get("seconds"))
    if seconds is not None:
        found.append(Tile("time", duration(seconds), ""))
    return found


def commands(path: Path, record: RunRecord | SweepRecord) -> list[str]:
    """Return the commands that recreate this folder and its page."""
    given = record.get("command")
    return [*([given] if isinstance(given, str) and given else []), f"kto-report {shlex.quote(printable(str(path)))}"]


@dataclass(frozen=True)
class BestModel:
    """Where a sweep's best model is, or the command that trains it; the other one is empty.

    options: the file with its options.
    """

    options: str
    folder: str = ""
    command: str = ""


def best_model(sweep: Sweep) -> BestModel | None:
    """Return where a sweep's best model is; before the sweep has ended, only where its options are."""
    if sweep.best is None:
        return None
    options = sweep.path / "best.yaml"
    if not options.is_file():
        return BestModel(f"trials/{sweep.best.number:04d}/config.yaml")
    if sweep.best_is_kept:
        return BestModel("best.yaml", folder=printable(str(sweep.path / "best")))
    return BestModel("best.yaml", command=f"kto-train --config {shlex.quote(printable(str(options)))} --out runs/best")
