"""Format the numbers of the report page, and write its sentences."""

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offline_kto.kto_core.errors import printable
from offline_kto.train.report.folders import Run, Sweep, listed, mapping, number
from offline_kto.train.run_records import RunRecord, SweepRecord

NOTHING = "–"
_MOST_NAMED = 10
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


def judged(sweep: Sweep, value: float | None) -> str:
    """Format a value of the metric that a sweep compares its trials by."""
    return metric_value(sweep.metric, value, _SWEEP_DIGITS)


def interval(metric: str, held: dict[str, object]) -> str:
    """Format an interval as `[64, 78]`; empty without one."""
    low, high = number(held.get("low")), number(held.get("high"))
    if low is None or high is None:
        return ""
    if metric in PERCENT:
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
        return number(held.get("value")), interval(metric, held), "held out"
    if run.last("eval/loss") is not None:
        return run.last(f"eval/{metric}"), "", "held out"
    return run.last(metric), "", "training"


def status(run: Run) -> str:
    """Return the state of a run: finished, running, or unfinished."""
    return "finished" if run.finished else "running" if run.running else "unfinished"


@dataclass(frozen=True)
class VerdictWords:
    """A verdict: its kind for the style sheet, its headline, and the sentences below it."""

    kind: str
    headline: str
    text: str


def verdict(run: Run) -> VerdictWords | None:
    """Return whether a run made its model better; None if it has not ended, or is of a version without verdicts."""
    found = mapping(run.evaluation.get("verdict"))
    outcome, reason, advice = (printable(str(found.get(name) or "")) for name in ("outcome", "reason", "next"))
    if outcome in ("better", "no difference", "worse"):
        than = "from" if outcome == "no difference" else "than"
        text = f"{_sentence(reason)} (95 % interval, paired.) Next: {advice}."
        return VerdictWords(outcome.replace(" ", "-"), f"{outcome.capitalize()} {than} before training.", text)
    if run.finished and not run.evaluation and run.last("eval/loss") is None:
        text = "No rows were held out. --eval-fraction 0.1 holds out a tenth of the prompts."
        return VerdictWords("unknown", "Not known whether it is better than before training.", text)
    return None


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def summary(run: Run) -> str:
    """Summarize a run in one line."""
    if not run.records and not run.evaluation:
        return "No update was logged yet."
    total = number(run.run_record.get("total_updates"))
    of = f" of {total:,.0f}" if total and not run.finished else ""
    after = f"after {run.updates:,}{of} update{'' if run.updates == 1 and not of else 's'}"
    kept = best_update(run)
    if kept is not None:
        after = f"after {kept:,} updates, the best of {run.updates:,}"
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


# Options that get a column in a comparison if runs differ in them.
_COMPARED = (
    "loss",
    "beta",
    "learning_rate",
    "desirable_weight",
    "undesirable_weight",
    "lora_rank",
    "batch_size",
    "seed",
)


def different_options(runs: Sequence[Run]) -> list[str]:
    """Return the names of options that differ between runs, so that their values may not be comparable."""
    return [name for name in _COMPARED if len({str(run.config.get(name)) for run in runs}) > 1]


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
    for metric in ("accuracy", "loss", "rewards/margins", "kl"):
        value, bounds, where = final(run, metric)
        if value is not None:
            found.append(Tile(WORDS[metric], metric_value(metric, value), f"{bounds} {where}".strip()))
    seconds = run.last("train_runtime")
    kept = best_update(run)
    below = f"in {duration(seconds)}" if seconds is not None else ""
    found.append(Tile("updates", f"{run.updates:,}", f"{below}; kept: {kept:,}" if kept is not None else below))
    speed, memory = run.last("tokens_per_second"), run.last("peak_memory_mb")
    if speed is not None:
        below = f"peak memory {shown(memory)} MB" if memory is not None else ""
        reserved = run.last("peak_reserved_mb")
        below += f", {shown(reserved)} MB reserved" if below and reserved is not None else ""
        found.append(Tile("tokens per second", shown(speed), below))
    return found


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
        return f"{len(sweep.trials):,} trials so far, none of them complete."
    way = "highest" if sweep.maximize else "lowest"
    text = f"Trial {best.number} has the {way} {plain_name(sweep.metric)}, {judged(sweep, best.value)}"
    if len(complete) > 1:
        worst = judged(sweep, complete[-1].value)
        if worst == judged(sweep, best.value):
            return f"{text}; so have the other complete trials."
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
    tied = [str(one) for one in listed(record.get("tied")) if isinstance(one, int)]
    text = f"Trial {best.number}: {reason}."
    if tied:
        more = " and others" if len(tied) > _MOST_NAMED else ""
        text += f" On these held-out rows it cannot be told from trial {', '.join(tied[:_MOST_NAMED])}{more}."
    if not any(isinstance(one, int) for one in listed(record.get("better"))):
        return VerdictWords("worse", "No trial beats the untrained model.", f"{text} Next: {advice}.")
    than = "no different from" if outcome == "no difference" else f"{outcome} than"
    kind = outcome.replace(" ", "-")
    return VerdictWords(kind, f"The best trial is {than} before training.", text)


def sweep_tiles(sweep: Sweep) -> list[Tile]:
    """Return a sweep's key numbers."""
    found = []
    best = sweep.best
    if best is not None and best.value is not None:
        value = judged(sweep, best.value)
        found.append(Tile(f"best {plain_name(sweep.metric)}", value, f"trial {best.number}"))
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


def commands(path: Path, record: RunRecord | SweepRecord, *, best: bool = False) -> list[str]:
    """Return the commands that recreate this folder and its page."""
    given = record.get("command")
    found = [given] if isinstance(given, str) and given else []
    if best:
        found.append(f"kto-train --config {shlex.quote(printable(str(path / 'best.yaml')))} --out runs/best")
    return [*found, f"kto-report {shlex.quote(printable(str(path)))}"]
