"""Run the trials of one worker of a sweep: a process that loads the policy once and runs one trial after another.

Requests over the pipe, and the answers:

    ("check", trials)                    ("ready", trained_with) or ("refused", message)
    ("trial", number, config, folder)    `Evaluated`, then waits for "continue" or "stop"; `Ended`, then waits for "keep"
                                         or "drop"; `Kept`, once the model is on disk
"""

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from offline_kto.kto_core.cache.manifest_fields import RowsIdentity
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import OF_THE_DISK, remove_tree, written_to
from offline_kto.kto_core.errors import CacheError, KTOError, WriteError, in_one_line
from offline_kto.kto_core.models.precision import resolve_device
from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.settings import class_warnings, class_weight_values
from offline_kto.train.model.recipe import run_precision
from offline_kto.train.run.arguments import training_arguments
from offline_kto.train.run.inputs import KeptMaterials
from offline_kto.train.run.plan import print_data
from offline_kto.train.run.planned_run import versions
from offline_kto.train.run.training_run import TrainingRun
from offline_kto.train.run_files import CONFIG, EVALUATION, METRICS, REWARDS, read_run_record, write_run_record
from offline_kto.train.run_records import EvaluationRecord, TrainedWith
from offline_kto.train.samples_file import SAMPLES
from offline_kto.train.sweep.messages import Ended, Evaluated, Kept, Stop
from offline_kto.train.sweep.space import Trials, Values
from offline_kto.train.trainer.evaluation import drawn_values

LOG = "log.txt"
MODEL = "model"


def work(pipe: Connection, rows: dict[str, RowsIdentity], threads: int | None) -> None:
    """Execute the requests of the pipe until it is closed.

    Args:
        rows: the expected `TrainingData.identity`.
        threads: number of CPU threads; None for torch's default.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the sweep ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if threads is not None:
        torch.set_num_threads(threads)
    worker = Worker(pipe, rows)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        if order[0] == "check":
            pipe.send(worker.check(*order[1:]))
        else:
            worker.run(*order[1:])


def _end_with_parent() -> None:
    """End this process when the sweep is killed: the next sweep starts its own workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Worker:
    """The worker's side of the pipe, with the inputs that its trials share.

    Args:
        pipe: to the sweep.
        rows: identity of the rows that every trial must train on.
    """

    def __init__(self, pipe: Connection, rows: dict[str, RowsIdentity]) -> None:
        self.pipe, self.rows, self.materials = pipe, rows, KeptMaterials()
        self.checked: set[tuple[object, ...]] = set()
        self.loads = -1

    def check(self, trials: Trials) -> tuple[str, TrainedWith | str]:
        """Return whether cache, policy and options can be used; called before the first trial."""
        try:
            config = trials.planned()
            data = self.materials.verified_data(config)
            self.materials.files(config, data.rows.manifest)
            precision = run_precision(config, resolve_device(config.device))
            training_arguments(config, Path(), precision, held_out=data.held_out is not None)
        except KTOError as error:
            return "refused", str(error)
        if data.identity() != self.rows:
            return "refused", _other_rows(config)
        lines = [*data.warnings(config, precision), *self._losses_refused(trials)]
        if not {"desirable_weight", "undesirable_weight"} & set(trials.space) or not all(data.class_masses):
            weights = class_weight_values(config, *data.class_masses)
            lines += class_warnings(*data.class_masses, weights, by_mass=data.rows.masses is not None)
        return "ready", {
            "versions": versions(),
            "reference": data.rows.manifest.reference,
            "data": data.run_data(),
            "warnings": lines,
        }

    def _losses_refused(self, trials: Trials) -> list[str]:
        """Return a line for each loss of the space that the cache does not support, so that its trials will fail."""
        lines, entry = [], trials.space.get("loss")
        for loss in entry.values if isinstance(entry, Values) else ():
            try:
                self.materials.data(trials.config({"loss": loss}))
            except KTOError as error:
                lines.append(f"every trial with loss {loss} will fail: {error}")
        return lines

    def run(self, number: int, config: TrainConfig, folder: Path) -> None:
        """Run a trial from start to end."""
        try:
            with written_to(folder, WriteError, ""):
                self._run(number, config, folder)
        except WriteError as error:
            reason = in_one_line(error.__cause__ or error).rstrip(".")
            self.pipe.send(
                Stop(f"{folder}: cannot be written: {reason}. Make room, and run the same command to continue.")
            )
        except KTOError as error:  # the cache cannot be read, or the best model cannot be kept
            self.pipe.send(Stop(str(error)))

    def _run(self, number: int, config: TrainConfig, folder: Path) -> None:
        remove_tree(folder)  # left by a killed sweep
        folder.mkdir(parents=True)
        started = time.monotonic()
        with log_into(folder / LOG):
            run = found = None
            try:
                name = f"{folder.parent.parent.resolve().name}, trial {folder.name}"
                data = self.materials.data(config)
                print_data(config, data)
                run = TrainingRun.set_up(config, folder, data, self.materials, name)
                if run.data.identity() != self.rows:  # possible for a worker that replaced another one
                    self.materials.take_back()
                    self.pipe.send(Stop(_other_rows(config)))
                    return
                outcome, found = self._train(run)
            except (WriteError, CacheError):  # no trial is recorded as failed, because every other one would fail too
                raise
            except KTOError as error:
                tell(f"Error: {error}", logging.ERROR)
                outcome = Ended.refused(str(error))
            except Exception as error:
                if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                    raise
                _tell_traceback()  # a trial that fails must not stop the others
                outcome = Ended.refused(f"{type(error).__name__}: {in_one_line(error)} (see {LOG})")
            outcome = dataclasses.replace(outcome, seconds=time.monotonic() - started)
            self.pipe.send(outcome)
            if self.pipe.recv() == "keep" and run is not None:
                self._keep(run, folder, found)
            self.materials.take_back()
            _end_reports()
            del run
        for checkpoint in folder.glob("checkpoint-*"):  # written for early stopping
            remove_tree(checkpoint)
        self._tidy()

    def _tidy(self) -> None:
        """Free optimizer and gradients before the next trial allocates its own."""
        if self.loads != self.materials.loads:
            # Libraries and the policy are frozen: collecting them takes longer than a short trial.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self.loads = self.materials.loads
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _train(self, run: TrainingRun) -> tuple[Ended, EvaluationRecord]:
        # With the same weights in memory and the same rows, policy and cache are compared once.
        key = (run.config.model, run.config.dtype, run.config.max_length, run.config.lora_rank > 0)
        run.checked = key in self.checked
        watcher = _Evaluations(self.pipe, run.config.metric)
        run.trainer.add_callback(watcher)
        run.train()
        self.checked.add(key)
        found = run.sum_up()
        for line in run.finish_samples():
            tell(line)
        scores, metric = run.trainer.held_out_scores, run.config.metric.removeprefix("eval/")
        assert found is not None
        assert scores is not None
        history = run.trainer.state.log_history
        ended = Ended(
            "pruned" if watcher.stopped else "complete",
            metrics={f"eval/{name}": metric["value"] for name, metric in found["metrics"].items()},
            train_seconds=sum(record.get("train_runtime", 0.0) for record in history),
            interval=found["metrics"].get(metric),
            untrained=found["before"].get(metric, {}).get("value"),
            verdict=found["verdict"],
            draws=drawn_values(scores, run.objective, metric),
            prompts=scores.prompts_of_class,
        )
        return ended, found

    def _keep(self, run: TrainingRun, folder: Path, found: EvaluationRecord | None) -> None:
        """Save the best model so far as a run folder; it is renamed when the sweep ends."""
        out = folder / MODEL
        out.mkdir()
        for name in (METRICS, CONFIG, EVALUATION, REWARDS, SAMPLES):
            if name != SAMPLES or (folder / name).exists():
                shutil.copy2(folder / name, out / name)
        write_run_record(out, {**read_run_record(folder), "trial": int(folder.name)})
        run.save_model(out)
        run.write_card(out, found)
        run.write_suspects(out)
        self.pipe.send(Kept())


def _other_rows(config: TrainConfig) -> str:
    return (
        f"{config.cache}: the cache, or the held-out one, changed since this sweep started. Restore it, or start another "
        "sweep."
    )


def _end_reports() -> None:
    """Close the trial's run in external loggers; these two would wait for the process to end."""
    for name, end in (("wandb", "finish"), ("mlflow", "end_run")):
        if name in sys.modules:
            try:
                getattr(sys.modules[name], end)()
            except Exception:  # noqa: BLE001 - a service that cannot be reached must not end the sweep
                _tell_traceback()


def _tell_traceback() -> None:
    for line in traceback.format_exc().splitlines():
        tell(line, logging.ERROR)


class _Evaluations(transformers.TrainerCallback):
    """A callback that reports each evaluation to the sweep, and stops the trial if it falls behind."""

    def __init__(self, pipe: Connection, metric: str) -> None:
        self.pipe, self.name, self.stopped = pipe, metric.replace("/", "_", 1), False

    def on_evaluate(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> None:
        if state.global_step >= state.max_steps:  # there is nothing left to stop
            return
        self.pipe.send(Evaluated(state.global_step, metrics[self.name]))
        if self.pipe.recv() == "stop":
            self.stopped = control.should_training_stop = True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # a full disk: the trial reports it in more detail
                stream.flush()


@contextlib.contextmanager
def log_into(path: Path) -> Iterator[None]:
    """Append the output of the block to a file, including output that libraries write bypassing Python."""
    _flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
