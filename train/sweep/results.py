"""Write the results of a sweep: results.csv, sweep.json, best.yaml, the best model and the report."""

import csv
import datetime
import io
import itertools
import json
import math
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import cast

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import flush, remove_tree, write_json, write_text
from offline_kto.kto_core.errors import ConfigError, TrainingError, printable
from offline_kto.kto_core.feedback.quoting import counted, numbered
from offline_kto.kto_core.foreign_files import read_foreign
from offline_kto.kto_core.options import as_plain, flag
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.train.report.report import write_report
from offline_kto.train.run_files import CONFIG, LARGEST_JSON, RUN_RECORD, config_text, read_run_record
from offline_kto.train.run_records import SpaceEntry, SweepRecord, TrainedWith, TrialEntry
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.messages import Ended
from offline_kto.train.sweep.pareto import pareto_front
from offline_kto.train.sweep.space import Range, Trials, Values
from offline_kto.train.sweep.standing import better_trials, tied_trials
from offline_kto.train.sweep.study import StoredResult, Study, Trial, TrialRecord

RESULTS, BEST, BEST_OPTIONS, STATE = "results.csv", "best", "best.yaml", "sweep.json"

# Where the `next` line lets the winner be trained, if its model is not here.
_TRAINED_AGAIN = Path("runs/best")

# First columns of results.csv, in this order; others follow.
_METRICS = (
    "eval/loss",
    "eval/accuracy",
    "eval/rewards/chosen",
    "eval/rewards/rejected",
    "eval/rewards/margins",
    "eval/kl",
)


def _again() -> Path:
    """Return a folder for the winner's run in which nothing is yet."""
    numbered = (_TRAINED_AGAIN.with_name(f"{_TRAINED_AGAIN.name}-{n}") for n in itertools.count(2))
    return next(folder for folder in itertools.chain([_TRAINED_AGAIN], numbered) if not folder.exists())


class Results:
    """The result files of a sweep folder, rewritten after every trial.

    Args:
        out: the sweep folder.
    """

    def __init__(self, out: Path, config: SweepConfig, trials: Trials, study: Study) -> None:
        self.out, self.config, self.trials, self.study = out, config, trials, study
        self._keeping: dict[int, Ended] = {}
        self._record: SweepRecord = {}

    def begin(self, manifest: Manifest, reported: TrainedWith) -> None:
        """Record the settings the sweep was started with.

        Args:
            reported: by a worker; empty if every trial had already ended.
        """
        known = cast("SweepRecord", _read(self.out / STATE))
        trained_with: TrainedWith = reported or known
        self._record = {
            "fingerprint": manifest.fingerprint,
            "labels_hash": manifest.data.get("labels_hash"),
            "command": self._command(),
            "started": known.get("started")
            or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": trained_with.get("versions"),
            "reference": trained_with.get("reference"),
            "data": trained_with.get("data"),
            "warnings": trained_with.get("warnings"),
            "metric": self.config.metric,
            "direction": "maximize" if self.study.maximize else "minimize",
            "space": {name: _space_entry(entry) for name, entry in self.trials.space.items()},
        }
        self._write()

    def seconds_of_trials(self) -> list[float]:
        """Return how long each complete trial took."""
        records = [record for record in self.study.records() if record.state == "complete"]
        return [seconds for record in records if (seconds := record.result.get("seconds"))]

    def is_best(self, ended: Ended) -> bool:
        """Return whether a trial is better than all that ended before, here or on another machine."""
        value = self._value(ended)
        if ended.state != "complete" or value is None:
            return False
        best = self.study.best()
        known = [best.value if best else None, *map(self._value, self._keeping.values())]
        return all(value > one if self.study.maximize else value < one for one in known if one is not None)

    def keep(self, trial: Trial, ended: Ended) -> None:
        """Register a trial as the best so far, whose model is being written."""
        self._keeping[trial.number] = ended

    def kept(self, trial: Trial) -> str:
        """Record a trial whose model is on disk, remove worse models, and return a line about the trial."""
        line = self.ended(trial, self._keeping.pop(trial.number))
        best = self.study.best()  # another trial may have become the best meanwhile
        stay = {*self._keeping, *((best.number,) if best else ())}
        for folder in (self.out / "trials").glob("*/model"):
            if folder.parent.name.isdecimal() and int(folder.parent.name) not in stay:
                remove_tree(folder)
        return line

    def lost(self, trial: Trial, reason: str) -> str:
        """Record a trial whose worker ended, and return a line about it."""
        if trial.number in self._keeping:  # trained and evaluated: only its model is missing
            del self._keeping[trial.number]
            if self.study.release(trial):
                return f"trial {trial.number:<6}starts again: {reason} while it wrote its model"
        return self.ended(trial, Ended.refused(reason))

    def ended(self, trial: Trial, ended: Ended) -> str:
        """Record a trial that ended without a model to keep, and return a line about it."""
        value, reason, state = self._value(ended), ended.reason, ended.state
        if state == "complete" and value is None:
            state, reason = "failed", f"{self.config.metric} is not finite"
        result: StoredResult = {
            "metrics": {name: found for name, found in ended.metrics.items() if math.isfinite(found)},
            "seconds": ended.seconds,
            "train_seconds": ended.train_seconds,
            "reason": reason,
            "host": socket.gethostname(),
            "folder": str((self.out / "trials" / f"{trial.number:04d}").resolve()),
            "interval": ended.interval,
            "untrained": ended.untrained,
            "verdict": ended.verdict,
            "draws": ended.draws,
            "prompts": ended.prompts,
        }
        self.study.tell(trial, state, value, result)
        self._write()
        said = f"failed: {reason}" if state == "failed" else f"{state}, " * (state != "complete") + self._shown(value)
        took = f"  {ended.seconds:.1f} s" if ended.seconds else ""  # unknown for a lost trial
        return f"trial {trial.number:<6}{said}  {_words(trial.params)}{took}"

    def _shown(self, value: float | None) -> str:
        return "" if value is None else f"{self.config.metric} {value:.6g}"

    def _value(self, ended: Ended) -> float | None:
        value = ended.metrics.get(self.config.metric)
        return value if value is not None and math.isfinite(value) else None

    def _write(self, *, importance: dict[str, float] | None = None) -> None:
        records = self.study.records()
        write_text(self.out / RESULTS, self._csv(records))
        best = self.study.best()
        state: SweepRecord = {
            **self._record,
            "seconds": sum(record.result.get("seconds") or 0.0 for record in records),
            "importance": importance,
            "best": best.number if best else None,
            "planned": self.trials.count,
            "trials": [_entry(record) for record in records],
            "better": better_trials(records),
            "tied": tied_trials(records, best),
            "pareto_front": _front(records),
        }
        write_json(self.out / STATE, state)

    def _csv(self, records: list[TrialRecord]) -> str:
        """Return the text of results.csv, without times and paths, so that repeated sweeps give equal rows."""
        found = {name for record in records for name in record.result.get("metrics") or {}}
        names = [name for name in _METRICS if name in found] + sorted(found - set(_METRICS))
        front = _front(records)
        columns = ["pareto_front"] if front is not None else []
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(map(_cell, ["trial", "state", *self.trials.space, *names, *columns, "reason"]))
        for record in records:
            metrics = record.result.get("metrics") or {}
            params = [record.params.get(name) for name in self.trials.space]
            table.writerow(
                map(
                    _cell,
                    [
                        record.number,
                        record.state,
                        *params,
                        *(metrics.get(name) for name in names),
                        *("yes" if record.number in (front or []) else "no" for _ in columns),
                        record.result.get("reason"),
                    ],
                )
            )
        return text.getvalue()

    def finish(self) -> None:
        """Publish the best trial and write the report, after every trial has ended.

        Raises:
            TrainingError: all trials failed.
        """
        self._write(importance=self.study.importance())  # slow, so not after each trial
        best = self.study.best()
        if best is not None:
            self._publish(best)
        report = write_report([self.out])
        if best is None:
            reasons = [record.result.get("reason") for record in self.study.records() if record.state == "failed"]
            raise TrainingError(
                f"{self.out}: no trial completed. The first one: {reasons[0] if reasons else 'was pruned'}"
            )
        failed = sum(record.state == "failed" for record in self.study.records())
        for line in self._best_lines(best):
            tell(line)
        if failed:
            tell(
                f"failed      {counted(failed, 'trial')}; {RESULTS} lists the {'reason' if failed == 1 else 'reasons'}"
            )
        if self._is_of(self.out / BEST, best):
            tell(f"model       {self.out / BEST}")
        elif self._is_trained_again():
            tell(f"model       {_TRAINED_AGAIN}")
        else:  # it is on another machine, or was lost
            tell(f"next        kto-train --config {shlex.quote(str(self.out / BEST_OPTIONS))} --out {_again()}")
        tell(f"report      {report}")
        tell(f"wrote       {self.out}")

    def _best_lines(self, best: TrialRecord) -> list[str]:
        """Return the best trial with its interval, the trials it cannot be told from, and whether any is better than before."""
        records, ends = self.study.records(), best.result.get("interval") or {}
        between = f" [{ends['low']:.6g}, {ends['high']:.6g}]" if "low" in ends and "high" in ends else ""
        lines = [f"best        trial {best.number}: {self._shown(best.value)}{between}  {_words(best.params)}"]
        tied, better = tied_trials(records, best), better_trials(records)
        if tied:
            lines.append(f"tied        {numbered('trial', tied)} cannot be told from it on these held-out rows")
        verdict = best.result.get("verdict")
        if verdict is None:
            return lines
        if not better:
            lines.append(f"verdict     no trial beats the untrained model; of trial {best.number}: {verdict['reason']}")
            return [*lines, f"try         {self._advice(verdict['next'])}"]
        than = "no different from" if verdict["outcome"] == "no difference" else f"{verdict['outcome']} than"
        line = f"verdict     trial {best.number} is {than} before training: {verdict['reason']}"
        if best.number not in better:
            are = "is" if len(better) == 1 else "are"
            line += f"; {numbered('trial', better)} {are} better, but not by {self.config.metric}"
        return [*lines, line]

    def _advice(self, advice: str) -> str:
        """Return the advice on the best trial, unless it is a learning rate among those that the sweep has tried."""
        advised = re.search(rf"{flag('learning_rate')} ([\d.e+-]+\d)", advice)
        tried = [record.params["learning_rate"] for record in self.study.records() if "learning_rate" in record.params]
        rates = [rate for rate in tried if isinstance(rate, int | float)]
        if advised is None or not rates or not min(rates) <= float(advised[1]) <= max(rates):
            return advice
        return (
            "this sweep compared such learning rates already: more feedback, cleaner labels, or more held-out prompts"
        )

    def _is_trained_again(self) -> bool:
        """Return whether the winner's options were trained on their own, as the `next` line of an earlier call advised."""
        try:
            trained, best = (
                read_yaml(path, foreign=True) for path in (_TRAINED_AGAIN / CONFIG, self.out / BEST_OPTIONS)
            )
            return trained == best and "final" in read_run_record(_TRAINED_AGAIN)
        except ConfigError:
            return False

    def _publish(self, best: TrialRecord) -> None:
        config = self.trials.config(best.params)
        head = printable(f"# Trial {best.number} of {self.out}: {self._shown(best.value)}") + "\n"
        write_text(self.out / BEST_OPTIONS, head + config_text(config))
        model, out = self.out / "trials" / f"{best.number:04d}" / "model", self.out / BEST
        if model.exists():
            remove_tree(out)
            model.rename(out)
            flush(self.out)
        elif not self._is_of(out, best):
            folder, host = Path(str(best.result.get("folder"))), best.result.get("host")
            # A trial of another sweep process on shared storage: its model is in the trial's folder, or already in best/.
            there = next(
                (one for one in (folder / "model", folder.parent.parent / BEST) if self._is_of(one, best)), None
            )
            if there is not None:
                copy = self.out / f".{BEST}.tmp"
                remove_tree(copy)
                shutil.copytree(there, copy)
                remove_tree(out)
                copy.rename(out)
                flush(self.out)
            elif host != socket.gethostname():
                tell(f"best model  kept by the sweep that trained it, on {host}: {folder.parent.parent}")
            else:
                tell("best model  missing; retrain it with best.yaml")

    def _is_of(self, folder: Path, best: TrialRecord) -> bool:
        """Return whether a folder contains the model of a trial of this sweep."""
        record = _read(folder / RUN_RECORD)
        return record.get("trial") == best.number and record.get("fingerprint") == self._record["fingerprint"]

    def _command(self) -> str:
        words = ["kto-sweep", "--config", str(self.out / "sweep.yaml"), "--out", str(self.out)]
        default = as_plain(SweepConfig())
        for name, value in as_plain(self.config).items():
            if name in ("cache", "verify", "workers") and value != default[name]:
                words += [flag(name), str(value)]
        return shlex.join(words)


def _front(records: list[TrialRecord]) -> list[int] | None:
    """Return the numbers of the complete trials on the Pareto front; None without several objectives."""
    complete = [record for record in records if record.state == "complete"]
    found = pareto_front([record.result.get("metrics") or {} for record in complete])
    return None if found is None else [complete[i].number for i in found]


def _entry(record: TrialRecord) -> TrialEntry:
    result = record.result
    return {
        "number": record.number,
        "state": record.state,
        "params": record.params,
        "value": record.value,
        "metrics": result.get("metrics"),
        "seconds": result.get("seconds"),
        "train_seconds": result.get("train_seconds"),
        "reason": result.get("reason"),
        "host": result.get("host"),
        "folder": result.get("folder"),
        "interval": result.get("interval"),
        "untrained": result.get("untrained"),
        "verdict": result.get("verdict"),
    }


def _words(params: dict[str, object]) -> str:
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


# A spreadsheet executes a cell that begins with these. If ; separates its cells, one of them can begin in the middle of ours.
_FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _cell(value: object) -> object:
    """Return a cell of results.csv: numbers unchanged, text on one line that no spreadsheet reads as a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return text if _NUMBER.fullmatch(text) else _FORMULA.sub(r"\1\2'", text)


def _space_entry(entry: Values | Range) -> SpaceEntry:
    if isinstance(entry, Range):
        return {"low": entry.low, "high": entry.high, "log": entry.log}
    return {"values": list(entry.values)}


def _read(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(read_foreign(path, most=LARGEST_JSON)))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
