"""Compare runs on a report page, those apart whose held-out rows differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from offline_kto.kto_core.options import flag
from offline_kto.train.report import plots, words
from offline_kto.train.report.figures import Plot
from offline_kto.train.report.folders import Run, Sweep, mapping, number
from offline_kto.train.run_records import RunRecord, SweepRecord

_METRICS = ("rewards/margins", "accuracy", "loss")


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and its sort key; None sorts last."""

    text: str
    sort: float | str | None


@dataclass(frozen=True)
class Compared:
    """A run in a comparison; a sweep is represented by its best trial.

    record: run.json, or sweep.json of a trial.
    color: number of its colour.
    """

    run: Run
    name: str
    record: RunRecord | SweepRecord
    color: int


@dataclass(frozen=True)
class Group:
    """Runs with the same held-out rows.

    rows: these rows in words, with what differs from other groups.
    header, table: the names of the columns; for each run its name, the number of its colour, and its cells.
    """

    rows: str
    header: list[str]
    table: list[tuple[str, int, list[Cell]]]
    plots: list[Plot]


def comparison(folders: Sequence[tuple[Run | Sweep, str]]) -> list[Group]:
    """Return the groups of runs whose values can be compared; none if there are not several runs."""
    compared: list[Compared] = []
    for folder, name in folders:
        if isinstance(folder, Run):
            compared.append(Compared(folder, name, folder.run_record, len(compared)))
        elif folder.best and folder.best.run:
            title = f"{name}, trial {folder.best.number}"
            compared.append(Compared(folder.best.run, title, folder.sweep_record, len(compared)))
    if len(compared) < 2:
        return []
    groups: dict[tuple[str, ...], list[Compared]] = {}
    for one in compared:
        groups.setdefault(tuple(_held_out_rows(one).values()), []).append(one)
    facts = [_held_out_rows(group[0]) for group in groups.values()]
    differing = [name for name in facts[0] if len({fact[name] for fact in facts}) > 1]
    return [
        _group(group, _heading(group[0], fact, differing)) for group, fact in zip(groups.values(), facts, strict=True)
    ]


_CACHE, _OF_RUN = "cache", "held out"
_HASHES = (_CACHE, "labels", "held-out cache", "labels of the held-out cache")


def _held_out_rows(one: Compared) -> dict[str, str]:
    """Return what decides which rows are held out, and what they are judged by: a value for each name in words."""
    config, record, evaluation = one.run.config, one.record, one.run.evaluation
    seed = config.get("eval_seed")
    elsewhere, data = mapping(record.get("held_out_cache")), mapping(record.get("data"))
    other = elsewhere.get("fingerprint") or config.get("eval_cache")
    # Training does not name its rows. --evaluate-only names them, also if they are the same, and their cache, which with
    # --eval-cache is not the run's: of the run's own rows, its record decides.
    rows = evaluation.get("rows_are") or _OF_RUN
    first, second = (record, evaluation) if rows == _OF_RUN else (evaluation, record)
    found = {
        _CACHE: first.get("fingerprint") or second.get("fingerprint"),
        "labels": first.get("labels_hash") or second.get("labels_hash"),
        "rows evaluated": rows,
        "objective": config.get("objective"),
        "held-out cache": other,
        "labels of the held-out cache": elsewhere.get("labels_hash"),
        "fraction held out": None if other else config.get("eval_fraction"),
        "seed of the hold-out": None if other else config.get("seed") if seed is None else seed,
        "desirable rows": data.get("held_out_desirable"),
        "undesirable rows": data.get("held_out_undesirable"),
    }
    return {name: "none" if value is None else str(value) for name, value in found.items()}


def _heading(one: Compared, facts: dict[str, str], differing: Sequence[str]) -> str:
    """Return the rows of a group in words, with the facts that differ between groups."""
    data = mapping(one.record.get("data"))
    counts = [number(data.get(f"held_out_{kind}")) for kind in ("desirable", "undesirable")]
    known = sum(count for count in counts if count is not None)
    rows = f"{known:,.0f} held-out rows of cache {facts[_CACHE][:12]}" if known else "no held-out rows"
    said = [f"{name}: {facts[name][:12] if name in _HASHES else facts[name]}" for name in differing]
    return f"{rows} ({'; '.join(said)})" if said else rows


def _group(compared: Sequence[Compared], rows: str) -> Group:
    runs = [one.run for one in compared]
    metrics = [m for m in _METRICS if any(words.final(run, m)[0] is not None for run in runs)]
    options = words.different_options(runs)
    header = ["run", "verdict", *map(words.plain_name, metrics), *map(flag, options)]
    header += ["measured on", "updates", "time", "peak memory, MB", "rows dropped", "status"]
    table = [(one.name, one.color, _cells(one, metrics, options)) for one in compared]
    curves = plots.compared_curves([(one.run, one.name, one.color) for one in compared])
    return Group(rows, header, table, curves)


def _cells(one: Compared, metrics: Sequence[str], options: Sequence[str]) -> list[Cell]:
    run, data = one.run, mapping(one.record.get("data"))
    verdict = str(mapping(run.evaluation.get("verdict")).get("outcome") or words.NOTHING)
    cells, where = [Cell(verdict, verdict)], "training"
    for metric in metrics:
        value, bounds, measured = words.final(run, metric)
        before = run.before(metric) if measured == "held out" else None
        where = measured if value is not None else where
        then = f"{words.metric_value(metric, before)} → " if before is not None else ""
        cells.append(Cell(f"{then}{words.metric_value(metric, value)} {bounds}".strip(), value))
    cells += [Cell(words.shown(value), words.sortable(value)) for value in map(run.config.get, options)]
    seconds, memory, dropped = run.last("train_runtime"), run.last("peak_memory_mb"), number(data.get("dropped"))
    return [
        *cells,
        Cell(where, where),
        Cell(f"{run.updates:,}", run.updates),
        Cell(words.duration(seconds), seconds),
        Cell(words.shown(memory, 3), memory),
        Cell(words.shown(dropped), dropped),
        Cell(words.status(run), words.status(run)),
    ]
