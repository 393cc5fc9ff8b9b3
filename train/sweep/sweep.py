"""Run many trials from one cache: `kto-sweep` distributes trials to workers and collects their results.

sweeps/NAME/sweep.yaml     resolved options
sweeps/NAME/study.db       Optuna's study, unless --storage names another database
sweeps/NAME/trials/0000/   a trial: config.yaml, metrics.jsonl, evaluation.json, rewards.parquet, log.txt
sweeps/NAME/sweep.json     all trials and their results, for the report
sweeps/NAME/results.csv    one row for each trial
sweeps/NAME/best.yaml      options of the best trial, as `kto-train --config` takes them
sweeps/NAME/best/          its run: model, tokenizer, metrics
sweeps/NAME/report.html
"""

import contextlib
import dataclasses
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from offline_kto.kto_core.cache.manifest import Manifest, read_manifest
from offline_kto.kto_core.cache.manifest_fields import RowsIdentity
from offline_kto.kto_core.cache.remote_cache import begun_downloads, remote_manifest
from offline_kto.kto_core.console import is_silent, tell, warn
from offline_kto.kto_core.durable_files import write_text, written_to
from offline_kto.kto_core.errors import ConfigError, TrainingError, printable
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.launch import settle_launch, world_size
from offline_kto.kto_core.locations import Location, is_url
from offline_kto.kto_core.lock import LOCK, only_writer
from offline_kto.kto_core.options import as_plain, with_absolute_paths
from offline_kto.kto_core.redaction import hidden_url, without_secrets
from offline_kto.kto_core.runtime import needless_packages
from offline_kto.kto_core.streams import is_terminal
from offline_kto.kto_core.yaml_files import named_file
from offline_kto.train.data.held_out import check_fraction
from offline_kto.train.data.objectives import check_objectives
from offline_kto.train.data.row_words import rows_in_words, scored_in_words
from offline_kto.train.report.words import duration
from offline_kto.train.run_files import make_folder, yaml_without_secrets
from offline_kto.train.run_records import RunData, TrainedWith
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.messages import Ended, Evaluated, Kept, Lost, Stop
from offline_kto.train.sweep.results import Results
from offline_kto.train.sweep.space import Range, Trials
from offline_kto.train.sweep.storage import check_installed, check_storage
from offline_kto.train.sweep.study import BEAT_SECONDS, Study, Trial
from offline_kto.train.sweep.workers import Worker, Workers

SWEEP = "sweep.yaml"
DATABASE = "study.db"


def sweep(config: SweepConfig, *, yaml_path: Path | None = None) -> Path:
    """Run `kto-sweep`.

    Args:
        config: its options.
        yaml_path: file with the tables `space` and `train`, for messages; None if a program gave them.

    Returns:
        The sweep folder.

    Raises:
        KTOError: the user's input cannot be used, or every trial failed.
    """
    check_installed()
    if config.storage:
        check_storage(config.storage)
    if config.cache == Path(""):
        raise ConfigError("--cache is missing: name the folder that kto-precompute wrote.")
    if world_size() > 1:
        raise ConfigError(
            "kto-sweep starts its own processes, one for each trial at a time; run it without torchrun, with --workers."
        )
    settle_launch()
    # sweep.yaml repeats the sweep from any folder.
    tables = with_absolute_paths(SweepConfig, {"space": config.space, "train": config.train})
    config = dataclasses.replace(config, **tables)
    trials = _trials(config, yaml_path)
    out = make_folder(config.out, "sweeps")
    try:
        with (
            only_writer(out, ConfigError),
            written_to(out, TrainingError, "Make room, and run the same command to continue."),
        ):
            _check_folder(out)
            _sweep(config, trials, out)
    finally:
        with contextlib.suppress(OSError):  # the folder is not empty
            out.rmdir()
    return out


def _trials(config: SweepConfig, yaml_path: Path | None) -> Trials:
    """Return the trials of a sweep. Raises: ConfigError: a mistake in `space` or `train`, with the file that has it."""
    try:
        return Trials.of(config)
    except ConfigError as error:
        if yaml_path is None:
            raise
        raise ConfigError(f"{named_file(yaml_path)}: {error}") from error


def _check_folder(out: Path) -> None:
    """Check that the sweep folder is empty or contains a sweep."""
    begun = (LOCK, f".{SWEEP}.")
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith(begun))
    if found and not (out / SWEEP).exists():
        raise ConfigError(
            f"--out {out}: contains {found[0]}, but no {SWEEP}, so it is not a kto-sweep sweep. Choose another --out."
        )


def _write_config(config: SweepConfig, out: Path) -> None:
    values = with_absolute_paths(SweepConfig, as_plain(config))
    values = {k: v for k, v in values.items() if k != "out" and v not in (None, {})}
    if config.storage:
        values["storage"] = hidden_url(config.storage)
    write_text(out / SWEEP, yaml_without_secrets(values))


def _manifest(cache: Location) -> Manifest:
    return remote_manifest(cache) if is_url(cache) else read_manifest(Path(cache))


def _check_held_out(manifest: Manifest, trials: Trials) -> None:
    """Check that prompts can be held out, before any worker starts. Raises: TrainingError: too few prompts."""
    fraction, prompts = trials.base.get("eval_fraction"), manifest.data.get("prompts")
    if fraction and isinstance(prompts, int):  # --max-length may drop some: a worker checks again
        check_fraction(fraction, prompts)


def _check_objectives(config: SweepConfig, manifest: Manifest, trials: Trials) -> None:
    """Check that the caches have the objectives of all trials, before the study is created.

    Raises:
        TrainingError: one of them is unknown.
        ConfigError: no trial can be planned.
    """
    held_out = trials.base.get("eval_cache")
    check_objectives(sorted(trials.objectives()), manifest, config.cache)
    if held_out is not None:
        check_objectives(sorted(trials.objectives()), _manifest(held_out), held_out)
    trials.planned()


def _rows(manifest: Manifest, trials: Trials) -> dict[str, RowsIdentity]:
    """Return the identity of the rows that all trials read, as `TrainingData.identity` does."""
    held_out = trials.base.get("eval_cache")
    manifests = {"cache": manifest, "held-out cache": manifest if held_out is None else _manifest(held_out)}
    return {name: one.rows_identity for name, one in manifests.items()}


def _needless(manifest: Manifest, trials: Trials) -> list[str]:
    """Return the packages that transformers would import, and that no trial needs."""
    options = trials.base
    may_need_peft = "lora_rank" in trials.space or options.get("lora_rank") or manifest.reference.get("adapter")
    return needless_packages(
        may_need_peft=bool(may_need_peft), trust_remote_code=bool(options.get("trust_remote_code"))
    )


def _identity(config: SweepConfig, rows: dict[str, RowsIdentity]) -> dict[str, object]:
    """Return the settings that all trials of one study share; the numbers of trials and workers may change."""
    return {
        **rows,
        **{name: getattr(config, name) for name in ("search", "metric", "pruning", "seed", "space")},
        "train": without_secrets(config.train),  # other users may read the database
    }


def _sweep(config: SweepConfig, trials: Trials, out: Path) -> None:
    manifest = _manifest(config.cache)
    _check_held_out(manifest, trials)
    _check_objectives(config, manifest, trials)
    rows = _rows(manifest, trials)
    if not (out / SWEEP).exists():
        _write_config(config, out)
    held_out = trials.base.get("eval_cache")
    with (
        # The workers import their libraries meanwhile, and wait for it.
        begun_downloads(config.cache, held_out),
        Workers(_worker_count(config, trials), trials, rows, needless=_needless(manifest, trials)) as workers,
    ):
        # Workers import their libraries and verify the cache while the study is opened here.
        workers.ask(trials)
        url = config.storage or f"sqlite:///{_database(out)}"
        study = Study(config, trials, url, _identity(config, rows))
        _write_config(config, out)
        results = Results(out, config, trials, study)
        left = trials.count - sum(record.state != "running" for record in study.records())
        found: TrainedWith = workers.told() if left else {}
        study.begin()
        results.begin(manifest, found)
        _print_plan(config, trials, manifest, out, workers, left, results)
        if left:
            with _bar(trials.count - left, trials.count) as say:
                _run(study, trials, workers, results, out, say)
    results.finish()


def _database(out: Path) -> Path:
    """Return the study's file in the sweep folder.

    Raises:
        ConfigError: it is a link, which would be written through, or not a file.
    """
    path = out / DATABASE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(
            f"{path}: not a regular file. Remove it; for a study elsewhere, pass --storage sqlite:///PATH."
        )
    return path.resolve()


def _worker_count(config: SweepConfig, trials: Trials) -> int:
    return min(config.workers or max(1, len(Workers.gpus(trials))), trials.count)


def _run(
    study: Study, trials: Trials, workers: Workers, results: Results, out: Path, say: Callable[[str], None]
) -> None:
    """Run trials until every one has ended, here or on another machine."""
    running: dict[Worker, Trial] = {}
    while True:
        study.beat()
        for worker in workers.idle(running):
            trial = study.next()
            if trial is None:
                break
            folder = out / "trials" / f"{trial.number:04d}"
            try:
                # An interrupted trial starts again.
                worker.start(trial.number, dataclasses.replace(trials.config(trial.params), save_steps=0), folder)
            except ConfigError as error:  # values that cannot be combined
                say(results.ended(trial, Ended.refused(str(error))))
                continue
            running[worker] = trial
        if not running:
            if study.is_done():
                return
            time.sleep(1.0)  # another machine is still working
            continue
        for worker, message in workers.wait(BEAT_SECONDS):
            if worker not in running:
                continue
            trial = running[worker]
            match message:
                case Evaluated(step, value):
                    worker.answer("stop" if study.falls_behind(trial, step, value) else "continue")
                case Ended():
                    if results.is_best(message):
                        worker.answer("keep")
                        results.keep(trial, message)
                    else:
                        worker.answer("drop")
                        say(results.ended(trial, message))
                        del running[worker]
                case Kept():
                    say(results.kept(trial))
                    del running[worker]
                case Stop():
                    raise TrainingError(message.reason)
                case Lost():
                    say(results.lost(trial, message.reason))
                    del running[worker]


@contextlib.contextmanager
def _bar(done: int, total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints a line about an ended trial, above a progress bar if there is a terminal."""
    if not is_terminal(sys.stderr) or is_silent():
        yield tell
        return
    with tqdm(total=total, initial=done, desc="trials", unit="trial", dynamic_ncols=True) as bar:

        def say(line: str) -> None:
            bar.write(printable(line))
            bar.update()

        yield say


def _updates_in_words(trials: Trials, rows: RunData) -> str:
    """Return how many updates a trial makes, from the fewest to the most."""
    count = rows["desirable"] + rows["undesirable"]
    ends = [
        [{name: value} for value in (entry.ends() if isinstance(entry, Range) else entry.values)]
        for name, entry in trials.space.items()
        if name in ("batch_size", "epochs", "max_steps")
    ]
    found = set()
    for chosen in itertools.product(*ends):
        with contextlib.suppress(ConfigError):  # values that cannot be combined: that trial will be refused
            found.add(trials.config({name: value for one in chosen for name, value in one.items()}).updates(count))
    if not found:
        return "unknown"
    each = f"{min(found):,}" if len(found) == 1 else f"{min(found):,} to {max(found):,}"
    return f"{each} in each trial"


def _time_in_words(results: Results, left: int, workers: int) -> str:
    """Return the time of the trials that are left, by those that are complete."""
    seconds = results.seconds_of_trials()
    if not left or not seconds:
        return "none" if not left else "unknown until the first trial ends"
    each = statistics.median(seconds)
    return (
        f"about {duration(each * math.ceil(left / workers))}, at {duration(each)} a trial (median of {len(seconds):,})"
    )


def _print_plan(
    config: SweepConfig, trials: Trials, manifest: Manifest, out: Path, workers: Workers, left: int, results: Results
) -> None:
    names = ", ".join(trials.space)
    tell(f"cache       {config.cache} (fingerprint {manifest.fingerprint[:12]})")
    all_of_them = " (all combinations)" if trials.count == trials.points and config.search != "grid" else ""
    tell(f"search      {config.search} over {names}, {counted(trials.count, 'trial')}{all_of_them}")
    tell(f"scored      {scored_in_words(manifest)}")
    rows = workers.trained_with.get("data")
    if rows:
        tell(f"rows        {rows_in_words(rows)}")
    tell(f"metric      {config.metric}, {'greater' if config.metric != 'eval/loss' else 'smaller'} is better")
    if rows:
        tell(f"updates     {_updates_in_words(trials, rows)}")
    tell(f"time        {_time_in_words(results, left, len(workers))}")
    tell(
        f"workers     {len(workers)} ({counted(os.cpu_count() or 1, 'CPU core')}, {counted(len(Workers.gpus(trials)), 'GPU')})"
    )
    tell(f"sweep       {out} ({counted(trials.count - left, 'trial')} done, {left:,} to go)")
    for line in [*(workers.trained_with.get("warnings") or []), *trials.warnings()]:
        warn(line)
