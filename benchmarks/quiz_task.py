"""Make the demo's task for benchmarks of outcomes: rated replies of its base model, and the share of wanted replies.

The base model answers about half of the questions as wanted. A seed draws its replies, and so the feedback; the
questions that the outcome is measured on are the demo's and are in no feedback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from quiz import Question, is_wanted, split_questions  # noqa: E402  it is in the folder of the examples

HELD_OUT = 240
LEARNING_RATE, EPOCHS, BATCH_SIZE = 5e-4, 3, 32  # the demo's
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100000",  # a batch's shape comes back hundreds of updates later
}

# The 97.5 % quantile of Student's t, by degrees of freedom.
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 14: 2.14, 19: 2.09}

Key = TypeVar("Key")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Reply:
    """A reply of the base model to a question, and whether it is wanted."""

    question: Question
    text: str
    wanted: bool

    def row(self, **judgement: object) -> dict[str, object]:
        """Return a record of feedback."""
        from tiny_model import assistant_turn, user_turn

        return {"prompt": user_turn(self.question), "completion": assistant_turn(self.text), **judgement}


def teach_base(folder: Path) -> Path:
    """Teach the demo's model."""
    from tiny_model import build_base_model

    for _ in build_base_model(split_questions(held_out=HELD_OUT, seed=0)[0], folder, seed=0):
        pass
    return folder


def draw_replies(base: Path, seed: int) -> list[Reply]:
    """Sample one reply of the base model to each question of the feedback."""
    from tiny_model import sample_replies

    questions = split_questions(held_out=HELD_OUT, seed=0)[0]
    replies = sample_replies(base, questions, seed=1000 + seed)
    return [
        Reply(question, reply, is_wanted(question, reply))
        for question, reply in zip(questions, replies, strict=True)
        if reply.strip()
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def wanted_share(model: Path, *, seed: int = 3) -> float:
    """Return the share of wanted replies to the questions that are in no feedback, sampled at temperature 1."""
    from tiny_model import sample_replies

    questions = split_questions(held_out=HELD_OUT, seed=0)[1]
    replies = sample_replies(model, questions, seed=seed)
    return statistics.mean(map(is_wanted, questions, replies))


def train_ours(
    base: Path, data: Path, out: Path, *, scoring: Mapping[str, object], training: Mapping[str, object]
) -> Path:
    """Score and train with the demo's settings, and return the run folder. The commands print to `out/log.txt`."""
    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.run import precompute
    from offline_kto.train.config import TrainConfig
    from offline_kto.train.run.train_run import train

    settings: dict[str, object] = {
        "learning_rate": LEARNING_RATE,
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "dtype": "float32",
        "device": "cpu",
        "save_steps": 0,
        **training,
    }
    out.mkdir(parents=True, exist_ok=True)
    with log_to(out / "log.txt"):
        precompute(
            PrecomputeConfig(
                **{"model": str(base), "data": str(data), "out": out / "refs", "dtype": "float32", **scoring}  # type: ignore[arg-type]
            )
        )
        train(TrainConfig(cache=out / "refs", out=out / "run", **settings))  # type: ignore[arg-type]
    return out / "run"


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send everything that this process prints to a file."""
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def run_all(
    jobs: Mapping[Key, tuple[Callable[..., Outcome], tuple[object, ...]]], *, at_a_time: int
) -> dict[Key, Outcome]:
    """Run jobs in processes of their own, print each result, and return them."""
    spawn = multiprocessing.get_context("spawn")
    results: dict[Key, Outcome] = {}
    with ProcessPoolExecutor(at_a_time, mp_context=spawn) as pool:
        waiting = {pool.submit(function, *arguments): key for key, (function, arguments) in jobs.items()}
        for done in as_completed(waiting):
            results[waiting[done]] = done.result()
            print(waiting[done], done.result(), flush=True)
    return results


def add_options(parser: argparse.ArgumentParser, *, seeds: int) -> None:
    """Add the options that every benchmark of outcomes has."""
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    parser.add_argument(
        "--work", type=Path, help="keep runs and results here, and continue from them (default: temporary)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if the claims do not hold")


@contextlib.contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Set the variables that every process needs, and give the folder of the runs, with the base model in `base`."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = options.work or Path(temporary)
        if not (work / "base" / "config.json").exists():
            teach_base(work / "base")
        yield work


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    degrees = len(values) - 1
    quantile = _STUDENT.get(degrees, min(_STUDENT[known] for known in _STUDENT if known <= degrees))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def shown(values: Sequence[float], *, sign: str = "") -> str:
    """Return a mean with its interval as text."""
    low, high = interval(values)
    return f"{statistics.mean(values):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
