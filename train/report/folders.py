"""Read run and sweep folders for `kto-report`, including damaged, older and untrusted ones.

Only a folder that is neither run nor sweep is an error. Anything else that is missing or damaged becomes a note on the
page.
"""

import datetime
import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from offline_kto.kto_core.errors import ConfigError, KTOError, printable, said_by, shown
from offline_kto.kto_core.foreign_files import read_foreign
from offline_kto.kto_core.lock import is_held
from offline_kto.kto_core.redaction import hidden, is_secret
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.train.run_files import LARGEST_JSON, LARGEST_METRICS, holds_word, read_rewards
from offline_kto.train.run_records import EvaluationRecord, RunRecord, SweepRecord

_T = TypeVar("_T")
Floats = npt.NDArray[np.float64]
SPLITS = ("train", "held_out")
_FAR = 1e100  # squares and sums of numbers below this are finite
_NUMBERS = frozenset((int, float, type(None)))
_LONGEST = 100_000  # characters of one text
_ACTIVE_WITHIN = datetime.timedelta(
    minutes=10
)  # a run is active if it wrote a record within this time and holds its lock


@dataclass(frozen=True)
class HeldOutCurve:
    """Held-out values of a metric over updates, from the untrained policy to the model that was kept.

    steps, values: shape (n,).
    low, high: ends of the 95 % interval, shape (n,), nan where there is none. It is the paired interval of the change since
    `before`, moved to that level: where it contains `before`, the change may be chance.
    before: the value of the untrained policy; None if it is not known.
    """

    steps: Floats
    values: Floats
    low: Floats
    high: Floats
    before: float | None


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder.

    run_record, evaluation, records: as in the files, with values of any type; `number`, `mapping` and `listed` check them.
    logratios: r in nats of each row by (split, label), finite ones only; empty if there is no rewards.parquet.
    changed: when metrics.jsonl was last written.
    notes: descriptions of what could not be read.
    """

    path: Path
    name: str
    config: dict[str, object]
    run_record: RunRecord
    records: tuple[dict[str, object], ...]
    evaluation: EvaluationRecord
    logratios: dict[tuple[str, bool], Floats]
    changed: datetime.datetime | None
    running: bool
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        state = "finished" if self.finished else "not finished"
        losses = {name: self.last(name) for name in ("loss", "eval/loss")}
        ended = "".join(f", {name} {value:.4f}" for name, value in losses.items() if value is not None)
        cache = shown(self.run_record.get("fingerprint"))[:12]
        return f"Run({str(self.path)!r}, {state}, {self.updates:,} updates{ended}, cache {cache})"

    @property
    def finished(self) -> bool:
        """Return whether the last update was made: a finished run's last record contains its duration."""
        return any("train_runtime" in record for record in self.records[-3:])

    @property
    def updates(self) -> int:
        """The last step that was logged."""
        return max(map(_step, self.records), default=0)

    def curve(self, metric: str) -> tuple[Floats, Floats]:
        """Return steps and values of the records with `metric`, shape (n,) each; a value that is not finite is nan."""
        pairs = [(_step(record), number(record[metric])) for record in self.records if metric in record]
        steps = np.array([step for step, _ in pairs], dtype=np.float64)
        return steps, np.array([math.nan if value is None else value for _, value in pairs], dtype=np.float64)

    def before(self, metric: str) -> float | None:
        """Return a held-out metric of the untrained policy; None if it is not known."""
        found = number(mapping(mapping(self.evaluation.get("before")).get(metric)).get("value"))
        if found is not None:
            return found
        first = (number(record.get(f"eval/{metric}")) for record in self.records if _step(record) == 0)
        return next((value for value in first if value is not None), None)

    def held_out(self, metric: str) -> HeldOutCurve | None:
        """Return the held-out values of a metric; None if there are none."""
        before = self.before(metric)
        change = "eval/change/margin" if metric == "rewards/margins" else f"eval/change/{metric}"
        points: dict[int, tuple[float, float, float]] = {}
        for record in self.records:
            value = number(record.get(f"eval/{metric}"))
            if value is not None:
                ends = _moved(record.get(f"{change}_low"), record.get(f"{change}_high"), before)
                points[_step(record)] = (value, *ends)
        final, step = mapping(mapping(self.evaluation.get("metrics")).get(metric)), self.evaluation.get("step")
        value = number(final.get("value"))
        if value is not None and type(step) is int and 0 <= step < 2**53:
            paired = mapping(mapping(self.evaluation.get("change")).get(metric))
            ends = _moved(paired.get("low"), paired.get("high"), before)
            own = _moved(final.get("low"), final.get("high"), 0.0)
            points[step] = (value, *(ends if math.isfinite(ends[0]) else own))
        if before is not None:
            points[0] = (before, before, before)
        if not points:
            return None
        steps = sorted(points)
        values, low, high = np.array([points[step] for step in steps], dtype=np.float64).T
        return HeldOutCurve(np.array(steps, dtype=np.float64), values, low, high, before)

    def last(self, metric: str) -> float | None:
        """Return the last finite value of a metric."""
        values = (number(record.get(metric)) for record in reversed(self.records))
        return next((value for value in values if value is not None), None)


@dataclass(frozen=True, repr=False)
class Trial:
    """One trial of a sweep.

    value: of the sweep's metric, with the ends of its 95 % interval, and the value before training.
    run: None if its folder is on another machine.
    """

    number: int
    state: str
    params: dict[str, object]
    value: float | None
    low: float | None
    high: float | None
    before: float | None
    metrics: dict[str, float | None]
    seconds: float | None
    reason: str
    host: str
    run: Run | None

    def __repr__(self) -> str:
        return f"Trial({self.number}, {self.state}, value {self.value}, {shown(self.params)})"


@dataclass(frozen=True, repr=False)
class Sweep:
    """A sweep folder.

    best_is_kept: whether best/ contains the model of the best trial.
    """

    path: Path
    name: str
    config: dict[str, object]
    sweep_record: SweepRecord
    trials: tuple[Trial, ...]
    metric: str
    maximize: bool
    running: bool
    best_is_kept: bool
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        counts = f"{len(self.complete):,} of {len(self.trials):,} trials complete"
        return f"Sweep({str(self.path)!r}, {counts}, best {self.metric}: {self.best})"

    @property
    def complete(self) -> list[Trial]:
        """Trials with a value, the best first."""
        with_value = [trial for trial in self.trials if trial.value is not None and trial.state == "complete"]
        return sorted(with_value, key=lambda trial: trial.value or 0.0, reverse=self.maximize)

    @property
    def untrained(self) -> float | None:
        """The sweep's metric before training, if it is known and the same in all trials."""
        known = {trial.before for trial in self.complete}
        return known.pop() if len(known) == 1 else None

    @property
    def best(self) -> Trial | None:
        """The trial that the sweep recorded as its best one, or else the trial with the best value."""
        named = [trial for trial in self.trials if trial.number == self.sweep_record.get("best")]
        return next(iter(named or self.complete), None)


def read_folder(folder: Path) -> Run | Sweep:
    """Read a run or a sweep.

    Raises:
        ConfigError: the folder is neither of them.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise ConfigError(f"{folder}: {found}. Name the folder of a run (runs/NAME) or of a sweep (sweeps/NAME).")
    names = {path.name for path in folder.iterdir()}
    if names & {"sweep.json", "sweep.yaml"}:
        return _sweep(folder)
    if names & {"run.json", "metrics.jsonl"}:
        return _run(folder)
    holds = f"contains {min(names)}, but" if names else "is empty:"
    raise ConfigError(
        f"{folder}: {holds} neither run.json nor sweep.json, so it is neither a kto-train run nor a kto-sweep sweep. "
        "Name the folder that its --out named."
    )


def number(value: object) -> float | None:
    """Return a number of JSON or YAML as a float; None for any other value and for nan, infinity and beyond 1e100."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if abs(value) < _FAR else None
    except OverflowError:
        return None


def mapping(value: object) -> dict[str, object]:
    """Return a mapping of JSON or YAML with its keys as text; an empty one for any other value."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def listed(value: object) -> list[object]:
    """Return a list of JSON or YAML; an empty one for any other value."""
    return value if isinstance(value, list) else []


@dataclass
class _Reader:
    folder: Path
    notes: list[str] = field(default_factory=list)

    def json(self, name: str, *, expected: bool) -> dict[str, object]:
        path = self.folder / name
        if not os.path.lexists(path):
            if expected:
                self.notes.append(f"{name} is missing: this page shows what the other files have.")
            return {}
        try:
            content = json.loads(read_foreign(path, most=LARGEST_JSON), parse_int=_whole)
        except (OSError, ValueError, RecursionError) as error:
            self.notes.append(f"{name} cannot be read ({said_by(error)}): its content is left out.")
            return {}
        if not isinstance(content, dict):
            self.notes.append(f"{name} is not a JSON object: it is left out.")
        return mapping(self._checked(name, _fit(content)))

    def yaml(self, name: str) -> dict[str, object]:
        if not os.path.lexists(self.folder / name):
            return {}
        try:
            return mapping(self._checked(name, _fit(read_yaml(self.folder / name, foreign=True))))
        except KTOError as error:
            self.notes.append(f"{name} cannot be read ({said_by(error)}): the options are left out.")
            return {}

    def records(self) -> tuple[dict[str, object], ...]:
        path = self.folder / "metrics.jsonl"
        try:
            content = read_foreign(path, most=LARGEST_METRICS) if os.path.lexists(path) else b""
        except OSError as error:
            self.notes.append(f"metrics.jsonl cannot be read ({said_by(error)}): the curves are left out.")
            return ()
        lines = content.decode("utf-8", errors="replace").splitlines()
        found = [record for line in lines if line.strip() and (record := _record(line)) is not None]
        damaged = sum(1 for line in lines if line.strip()) - len(found)
        if damaged:
            what = "1 line that is" if damaged == 1 else f"{damaged:,} lines that are"
            self.notes.append(f"metrics.jsonl has {what} truncated or damaged, perhaps by a crash: left out.")
        return tuple(self._checked("metrics.jsonl", found))

    def _checked(self, name: str, content: _T) -> _T:
        """Return the content unchanged, and add a note about numbers that are not finite or too large."""
        odd = _count_odd(content)
        if odd:
            what = "1 number that is" if odd == 1 else f"{odd:,} numbers that are"
            self.notes.append(f"{name} has {what} infinite, not a number or beyond {_FAR:g}: left out.")
        return content

    def logratios(self) -> dict[tuple[str, bool], Floats]:
        path = self.folder / "rewards.parquet"
        if not os.path.lexists(path):
            return {}
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            table = read_rewards(self.folder, ["split", "label", "logratio"])
            table = table.filter(
                pc.and_(pc.is_valid(table["logratio"]), pc.is_valid(table["label"]))
            )  # rows that training did not reach are null
            splits = {name: holds_word(table["split"], name) for name in SPLITS}
            label = table["label"].to_numpy()
            values = np.asarray(table["logratio"].to_numpy(), dtype=np.float64)
        except (OSError, ValueError, TypeError, KeyError, MemoryError, pa.ArrowException) as error:
            self.notes.append(f"rewards.parquet cannot be read ({said_by(error)}): the histograms are left out.")
            return {}
        finite = np.abs(values) < _FAR  # false for nan
        if not finite.all():
            self.notes.append(
                f"rewards.parquet has {int((~finite).sum()):,} rows without a finite log-ratio: left out."
            )
        parts = {(s, y): values[finite & splits[s] & (label == y)] for s in SPLITS for y in (True, False)}
        return {key: part for key, part in parts.items() if len(part)}


def _record(line: str) -> dict[str, object] | None:
    try:
        record = json.loads(line, parse_int=_whole)
        if isinstance(record, dict) and _NUMBERS.issuperset(map(type, record.values())):
            record = {_fit_text(name): value for name, value in record.items()}  # the fast path, for nearly all records
        else:
            record = _fit(record)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**53 else None


def _step(record: dict[str, object]) -> int:
    step = record["step"]
    assert isinstance(step, int)  # guaranteed by `_record`
    return step


def _moved(low: object, high: object, level: float | None) -> tuple[float, float]:
    """Return the ends of a change, moved to the level that it starts from; nan unless all are known."""
    ends = number(low), number(high)
    if level is None or ends[0] is None or ends[1] is None:
        return math.nan, math.nan
    return level + ends[0], level + ends[1]


def _count_odd(content: object) -> int:
    count = 0
    for one in content.values() if isinstance(content, dict) else content if isinstance(content, list) else [content]:
        if isinstance(one, float):
            count += not -_FAR < one < _FAR  # includes nan
        elif isinstance(one, dict | list):
            count += _count_odd(one)
    return count


def _whole(digits: str) -> int | float:
    """Parse an integer of JSON; one of 20 characters or more becomes a float, which may be infinite."""
    return int(digits) if len(digits) < 20 else float(digits)


@functools.lru_cache(maxsize=1024)
def _fit_text(text: str) -> str:
    return "\n".join(map(printable, hidden(text).split("\n")))


def _fit(value: object, depth: int = 20) -> object:
    """Sanitize data of a file for display: no secrets, no control characters, no unlimited texts or numbers."""
    if isinstance(value, str):
        return _fit_text(value[:_LONGEST])
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return (math.inf if value > 0 else -math.inf) if abs(value) > _FAR else float(value)
    if isinstance(value, Mapping | list | tuple) and depth == 0:
        return "..."
    if isinstance(value, Mapping):
        named = {_fit_text((key if isinstance(key, str) else shown(key))[:_LONGEST]): one for key, one in value.items()}
        return {name: _fit(one, depth - 1) for name, one in named.items() if not is_secret(name, one)}
    return [_fit(one, depth - 1) for one in value] if isinstance(value, list | tuple) else value


def _run(folder: Path, *, of_a_sweep: bool = False) -> Run:
    reader = _Reader(folder)
    path = folder / "metrics.jsonl"
    try:
        changed = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
    except (OSError, ValueError, OverflowError):  # a time outside the calendar's range
        changed = None
    recently = changed is not None and datetime.datetime.now(datetime.timezone.utc) - changed < _ACTIVE_WITHIN
    run = Run(
        path=folder,
        name=printable(folder.resolve().name),
        config=reader.yaml("config.yaml"),
        run_record=cast("RunRecord", reader.json("run.json", expected=not of_a_sweep)),
        records=reader.records(),
        evaluation=cast("EvaluationRecord", reader.json("evaluation.json", expected=False)),
        logratios=reader.logratios(),
        changed=changed,
        running=recently and is_held(folder),
        notes=(),
    )
    return Run(**{**run.__dict__, "notes": tuple(reader.notes)})


def _sweep(folder: Path) -> Sweep:
    reader = _Reader(folder)
    config = reader.yaml("sweep.yaml")
    record = cast("SweepRecord", reader.json("sweep.json", expected=True))
    trials = [_trial(folder, mapping(trial)) for trial in listed(record.get("trials"))]
    metric = record.get("metric") or config.get("metric") or "eval/loss"
    kept = _Reader(folder / "best").json("run.json", expected=False)
    is_kept = record.get("best") is not None and kept.get("trial") == record.get("best")
    notes = [f"Trial {t.number}: {note}" for t in trials if t is not None and t.run for note in t.run.notes]
    return Sweep(
        path=folder,
        name=printable(folder.resolve().name),
        config=config,
        sweep_record=record,
        trials=tuple(trial for trial in trials if trial is not None),
        metric=str(metric),
        maximize=str(record.get("direction", "")).lower().startswith("max"),
        running=is_held(folder),
        best_is_kept=is_kept and kept.get("fingerprint") == record.get("fingerprint"),
        notes=(*reader.notes, *notes),
    )


def _is_trial(path: Path | str, name: str) -> bool:
    """Return whether a path, also through links, is the named trial's folder; no other folder is displayed."""
    try:
        folder = Path(path).resolve()
        return folder.name == name and (folder / "metrics.jsonl").is_file()
    except (OSError, ValueError, RuntimeError):  # not a valid path
        return False


def _trial(folder: Path, trial: dict[str, object]) -> Trial | None:
    index = trial.get("number")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 10**6:
        return None
    path, elsewhere = folder / "trials" / f"{index:04d}", trial.get("folder")
    if not path.is_dir() and isinstance(elsewhere, str) and _is_trial(elsewhere, path.name):
        path = Path(elsewhere)  # a trial of another sweeper on shared storage, if its disk can be read here
    return Trial(
        number=index,
        state=str(trial.get("state") or "unknown"),
        params=mapping(trial.get("params")),
        value=number(trial.get("value")),
        low=number(mapping(trial.get("interval")).get("low")),
        high=number(mapping(trial.get("interval")).get("high")),
        before=number(trial.get("untrained")),
        metrics={name: number(value) for name, value in mapping(trial.get("metrics")).items()},
        seconds=number(trial.get("seconds")),
        reason=str(trial.get("reason") or ""),
        host=str(trial.get("host") or ""),
        run=_run(path, of_a_sweep=True) if _is_trial(path, path.name) else None,
    )
