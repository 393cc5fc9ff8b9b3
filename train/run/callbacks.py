"""Write `metrics.jsonl` and the console output during a run."""

import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import transformers
from tqdm import tqdm

from offline_kto.kto_core.console import is_silent, tell
from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.foreign_files import read_foreign
from offline_kto.kto_core.streams import is_terminal
from offline_kto.train.diagnostics.training import Watch
from offline_kto.train.run_files import LARGEST_METRICS
from offline_kto.train.run_records import MetricsRecord

_Args: TypeAlias = transformers.TrainingArguments
_State: TypeAlias = transformers.TrainerState
_Control: TypeAlias = transformers.TrainerControl

_SECONDS_BETWEEN_LINES = 2.0

# Parts that a live line drops first in a narrow terminal.
_DROPPED = ("tokens", "accuracy", "kl", "left", "undesirable", "desirable", "loss")

# Width of a terminal that does not report it.
_USUAL_WIDTH = 80

# The Trainer's `eval_loss` is called `eval/loss` everywhere the user sees it.
_INTERNAL = ("total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second")


def record_of(logs: MetricsRecord, step: int) -> MetricsRecord:
    """Return a log as it is written: step first, names with `eval/`, and numbers that JSON can represent."""
    record: MetricsRecord = {"step": step}
    for name, value in logs.items():
        if name not in _INTERNAL:
            record[name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name] = value
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class EarlyStopping(transformers.EarlyStoppingCallback):
    """Stops after evaluations in a row that are not better than the best one before, or than the untrained policy.

    Attributes:
        untrained: --metric before training; None if it is not known. Checkpoints keep it, so that all ranks of a resumed run
            decide alike.
    """

    untrained: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        found: dict[str, Any] = super().state()
        found["attributes"]["untrained"] = self.untrained
        return found

    def check_metric_value(self, args: _Args, state: _State, control: _Control, metric_value: float) -> None:
        """Count an evaluation."""
        before = self.untrained
        if before is not None and not (metric_value > before if args.greater_is_better else metric_value < before):
            self.early_stopping_patience_counter += 1
        else:
            super().check_metric_value(args, state, control, metric_value)


class MetricsFile(transformers.TrainerCallback):
    """The file of log records, one JSON object per log; a resumed run replaces the records after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: _Args, state: _State, control: _Control, **kwargs: object) -> None:
        if not os.path.lexists(self.path):
            return
        kept = []
        for line in _lines(self.path) if state.global_step else []:
            record = _parsed(line)
            if record is not None and record["step"] <= state.global_step and "train_runtime" not in record:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def on_log(self, args: _Args, state: _State, control: _Control, logs: MetricsRecord, **kwargs: object) -> None:
        # A link could point to another user's file.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(self.path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(json.dumps(record_of(logs, state.global_step)) + "\n")


def read_metrics(path: Path) -> list[MetricsRecord]:
    """Read the records of a `metrics.jsonl`, without a last line that a crash truncated."""
    return [record for line in _lines(path) if (record := _parsed(line)) is not None]


def _lines(path: Path) -> list[str]:
    try:
        return read_foreign(path, most=LARGEST_METRICS).decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error}. Remove it, or restore it.") from error


def _parsed(line: str) -> MetricsRecord | None:
    """Return a record, or None for a line that is truncated or contains other values than numbers."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(value is None or _is_number(value) for value in record.values()):
        return None
    return record if isinstance(record.get("step"), int) else None


def _is_number(value: object) -> bool:
    # An integer may exceed the range of a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Console(transformers.TrainerCallback):
    """The console output: a live line on a terminal, else a line every few seconds.

    The first update, the last update and each evaluation are always printed.

    Args:
        watch: finds the warnings; None for no warnings.
        metrics: the earlier records of a resumed run, whose warnings are not repeated.
    """

    def __init__(self, watch: Watch | None = None, metrics: Path | None = None) -> None:
        self.watch, self.metrics = watch, metrics
        self.started = self.last = time.monotonic()
        self.first_step: int | None = None
        self.bar: _LiveLine | None = None

    def close(self) -> None:
        """End the live line, so that the error of a failed run starts on a new line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_begin(self, args: _Args, state: _State, control: _Control, **kwargs: object) -> None:
        if self.watch is not None and state.global_step and self.metrics is not None and self.metrics.exists():
            for record in read_metrics(self.metrics):
                self.watch.add(record)

    def on_step_begin(self, args: _Args, state: _State, control: _Control, **kwargs: object) -> None:
        if self.first_step is not None:
            return
        # Not before: other callbacks check and print when training begins.
        self.started, self.first_step = time.monotonic(), state.global_step
        if _shows_live_lines():
            # smoothing=0: the remaining time uses the average so far, evaluations included, as without a terminal.
            self.bar = _LiveLine(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, miniters=1, smoothing=0
            )

    def on_step_end(self, args: _Args, state: _State, control: _Control, **kwargs: object) -> None:
        if self.bar is not None and not control.should_log:  # otherwise the next refresh shows the new values
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: _Args, state: _State, control: _Control, **kwargs: object) -> None:
        self.close()

    def on_log(self, args: _Args, state: _State, control: _Control, logs: MetricsRecord, **kwargs: object) -> None:
        record = record_of(logs, state.global_step)
        if "train_runtime" in record:
            self.close()
            self._say(f"trained     {self._made(state.global_step)} in {record['train_runtime']:.1f} s")
        elif "eval/loss" in record:
            values = {name.removeprefix("eval/"): value for name, value in record.items()}
            self._say(f"{'eval':<12}{state.global_step}/{state.max_steps}  {_summary(values)}")
        elif "loss" in record:
            self._step(record, state)
        for warning in self.watch.add(record) if self.watch is not None else ():
            self._say(f"{'warning':<12}step {warning.step:,}: {warning.text}")

    def _made(self, steps: int) -> str:
        """Return how many updates this process made, and how many a resumed run has in all."""
        if self.first_step is None:
            return f"no update: all {counted(steps, 'update')} had been made" if steps else "no update"
        in_all = f" ({steps:,} in all)" if self.first_step else ""
        return f"{counted(steps - self.first_step, 'update')}{in_all}"

    def _step(self, record: MetricsRecord, state: _State) -> None:
        if self.bar is not None:
            self.bar.record = record
            moved = state.global_step - self.bar.n
            if not self.bar.update(moved) and (not moved or state.global_step == state.max_steps):
                self.bar.refresh()  # an evaluation or a checkpoint may take minutes without output
            return
        first = self.first_step or 0
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES and state.global_step not in (first + 1, state.max_steps):
            return
        self.last = now
        left = (now - self.started) / max(state.global_step - first, 1) * (state.max_steps - state.global_step)
        line = f"{'step':<12}{state.global_step}/{state.max_steps}  {_summary(record)}  "
        if record.get("tokens_per_second") is not None:
            line += f"{record['tokens_per_second']:,.0f} tokens/s  "
        self._say(f"{line}{left:,.0f} s left")

    def _say(self, line: str) -> None:
        wraps = self.bar is not None and is_terminal(sys.stdout)
        for part in _wrapped(line, self.bar.width()).split("\n") if wraps and self.bar is not None else [line]:
            tell(part)


class _LiveLine(tqdm):
    """A tqdm bar with remaining time and as much of the last record as fits into the terminal."""

    record: MetricsRecord | None = None

    def width(self) -> int:
        """Return the columns a line may fill; some terminals wrap after the last one."""
        columns = self.format_dict["ncols"] or 0
        return (columns if columns > 1 else _USUAL_WIDTH) - 1

    def __str__(self) -> str:
        width, meter = self.width(), self.format_dict
        for layout in _layouts(self.record or {}):
            # Without a width tqdm draws the shortest bar; with one, a bar that fills the line.
            if len(self.format_meter(**{**meter, "ncols": None, "bar_format": layout})) <= width:
                return self.format_meter(**{**meter, "ncols": width, "bar_format": layout})
        return ""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return a printer that clears the line first; tqdm pads with blanks, which wrap in a narrowed terminal."""

        def show(line: str) -> None:
            file.write(f"\r\x1b[J{line}")  # also clears below, where other bars may have left text
            file.flush()

        return show


def _shows_live_lines() -> bool:
    return is_terminal(sys.stderr) and not is_silent() and os.environ.get("TERM") != "dumb"


def _layouts(record: MetricsRecord) -> Iterator[str]:
    """Yield `bar_format`s for tqdm, from the longest to the shortest."""
    bar, count = "{percentage:3.0f}%|{bar}| ", "{n:,}/{total:,}"
    long, short = _parts(record), _short_parts(record)
    yield "  ".join([bar + count, *long.values()])
    yield "  ".join([bar + count, *short.values()])
    yield "  ".join([count, *short.values()])
    short["left"] = "{remaining}"
    for name in ("", *_DROPPED):
        short.pop(name, None)
        yield " ".join(["{n}/{total}", *short.values()])


def _parts(record: MetricsRecord) -> dict[str, str]:
    """Describe a record in parts; a loss may have no kl, and a batch no row of a class."""
    parts = {"loss": f"loss {_number(record['loss'])}"} if "loss" in record else {}
    if "kl" in record:
        parts["kl"] = f"kl {_number(record['kl'])}"
    for name, word in (("rewards/chosen", "desirable"), ("rewards/rejected", "undesirable")):
        if record.get(name) is not None:
            parts[word] = f"{word} {record[name]:+.3f}"
    if record.get("accuracy") is not None:
        parts["accuracy"] = f"accuracy {record['accuracy']:.0%}"
    if record.get("tokens_per_second") is not None:
        parts["tokens"] = f"{record['tokens_per_second']:,.0f} tokens/s"
    return {**parts, "left": "{remaining} left"}


def _short_parts(record: MetricsRecord) -> dict[str, str]:
    parts = _parts(record)
    for name, value, words in (
        ("loss", "loss", "loss {:.3f}"),
        ("kl", "kl", "kl {:.1f}"),
        ("desirable", "rewards/chosen", "des {:+.2f}"),
        ("undesirable", "rewards/rejected", "undes {:+.2f}"),
        ("accuracy", "accuracy", "acc {:.0%}"),
    ):
        if record.get(value) is not None:
            parts[name] = words.format(record[value])
    if "tokens" in parts:
        parts["tokens"] = f"{tqdm.format_sizeof(record['tokens_per_second'])} tok/s"
    return parts


def _summary(record: MetricsRecord) -> str:
    return "  ".join(text for name, text in _parts(record).items() if name not in ("tokens", "left"))


def _wrapped(line: str, width: int) -> str:
    """Wrap a line at words to at most `width` columns, indented below its heading."""
    return textwrap.fill(
        line, max(width, 24), subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
    )


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
