"""Watching a run: `metrics.jsonl` and what the console shows."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from kto_core.durable import write_text

_SECONDS_BETWEEN_LINES = 2.0

# What the Trainer calls `eval_loss` is `eval/loss` everywhere a user looks.
_INTERNAL = ("total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second")


def record_of(logs: dict[str, Any], step: int) -> dict[str, Any]:
    """A log as it is written: step first, `eval/` names, numbers that JSON can hold."""
    record: dict[str, Any] = {"step": step}
    for name, value in logs.items():
        if name not in _INTERNAL:
            record[name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name] = value
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class MetricsFile(transformers.TrainerCallback):
    """One JSON record for each log. A run drops the records after the checkpoint it starts from, and writes them anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if state.global_step else []:
            record = _parsed(line)
            if record is not None and record["step"] <= state.global_step and "train_runtime" not in record:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record_of(logs, state.global_step)) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    """A record, or None for a line that a crash cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Console(transformers.TrainerCallback):
    """A bar on a terminal; elsewhere a line every few seconds, and for the first and last update and each evaluation."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.first_step = 0
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        record = record_of(logs, state.global_step)
        if "train_runtime" in record:
            self._say(f"trained     {state.global_step:,} updates in {record['train_runtime']:.1f} s")
        elif "eval/loss" in record:
            values = {name.removeprefix("eval/"): value for name, value in record.items()}
            self._say(f"{'eval':<12}{state.global_step}/{state.max_steps}  {_summary(values)}")
        elif "loss" in record:
            self._step(record, state)

    def _step(self, record: dict[str, Any], state: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix_str(f"{record['tokens_per_second']:,.0f} tokens/s  {_summary(record)}")
            return
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES and state.global_step not in (self.first_step + 1, state.max_steps):
            return
        self.last = now
        done = state.global_step - self.first_step
        left = (now - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        self._say(
            f"{'step':<12}{state.global_step}/{state.max_steps}  {_summary(record)}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
        )

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)


def _summary(record: dict[str, Any]) -> str:
    parts = [f"loss {_number(record['loss'])}", f"kl {_number(record['kl'])}"]
    for name, word in (("rewards/chosen", "desirable"), ("rewards/rejected", "undesirable")):
        if name in record:
            parts.append(f"{word} {record[name]:+.3f}")
    return "  ".join([*parts, f"accuracy {record['accuracy']:.0%}"])


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
