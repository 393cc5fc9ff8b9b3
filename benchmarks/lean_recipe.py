"""Compare three ways to keep weights over many small updates: float32, `--memory lean`, and plain bfloat16.

    python benchmarks/lean_recipe.py --check
    python benchmarks/lean_recipe.py --seeds 1 --updates 100 --tasks demo      # a minute

Tasks: the demo's questions (examples/), with a thumb on each of the model's replies; and the same questions at the end
of conversations of two or three exchanges. The model has 0.4 million weights of about 0.06; the learning rate, 5e-6, is
in the same proportion to them as KTO's 1e-6 to the weights of 0.01 of a large model: a step is below half a unit in
the last place of bfloat16. Every run computes in bfloat16; they differ in the storage of weights and moments alone.

- float32: float32 weights and AdamW (`--memory full`);
- lean: bfloat16 weights, rounded at random, and 8-bit moments (`--memory lean`);
- plain: bfloat16 weights, rounded to the nearest, with torch's AdamW. `kto-train` does not offer it.

A seed chooses the hold-out and the order of the rows. `--check`: held-out loss and margin of lean, means over the
seeds, are within one standard deviation (over the seeds) of float32, and those of plain are not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

TASKS = ("demo", "multi-turn")
RECIPES = ("float32", "lean", "plain")
LEARNING_RATE = 5e-6
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100000",  # a batch's shape comes back hundreds of updates later
}


@dataclass(frozen=True)
class Result:
    """Held-out loss and margin (nats) after training."""

    loss: float
    margin: float


def main() -> None:
    """Run all tasks, recipes and seeds, and print a table."""
    parser = argparse.ArgumentParser(description="Float32 weights, lean weights and plain bfloat16 weights.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, of one thread each.")
    parser.add_argument("--check", action="store_true", help="Exit with 1 if the claims do not hold.")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from text_table import text_table

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        refs = {task: make_cache(task, base, Path(folder) / task) for task in options.tasks}
        results = run_all(refs, Path(folder), options)
    failed = False
    for task in options.tasks:
        found = {recipe: [results[task, recipe, seed] for seed in range(options.seeds)] for recipe in RECIPES}
        print(f"\n{task}: {options.updates} updates of {options.batch_size} rows, {options.seeds} seeds, held-out rows")
        header = ("recipe", "loss", "spread", "margin", "spread", "margin to float32, same seed")
        print(text_table(header, [_cells(recipe, found) for recipe in RECIPES]), flush=True)
        failed |= not all(_holds(found, measure) for measure in ("loss", "margin"))
    if options.check and failed:
        sys.exit("failed: lean must be within the seeds' spread of float32, and plain must not")


def run_all(refs: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[tuple[str, str, int], Result]:
    """Train every task, recipe and seed, some at a time, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        waiting = {
            pool.submit(
                run, recipe, refs[task], folder / f"{task}-{recipe}-{seed}", seed, options.updates, options.batch_size
            ): (task, recipe, seed)
            for seed in range(options.seeds)
            for task in refs
            for recipe in RECIPES
        }
        results = {}
        for done in as_completed(waiting):
            key, found = waiting[done], done.result()
            results[key] = found
            print(*key, f"loss {found.loss:.5f} margin {found.margin:.4f}", flush=True)
    return results


def make_base(folder: Path) -> Path:
    """Teach the demo's model."""
    from quiz import split_questions
    from tiny_model import build_base_model

    seen, _ = split_questions(held_out=0, seed=0)
    for _ in build_base_model(seen, folder, seed=0):
        pass
    return folder


def make_cache(task: str, base: Path, folder: Path) -> Path:
    """Write a task's feedback, and score it under the model."""
    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.run import precompute

    folder.mkdir()
    data = folder / "feedback.jsonl"
    rows = demo_rows(base) if task == "demo" else multi_turn_rows()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", dtype="bfloat16"))
    return folder / "refs"


def demo_rows(base: Path) -> list[dict[str, object]]:
    """Return one rated reply of the model to each question."""
    from quiz import is_wanted, split_questions
    from tiny_model import assistant_turn, sample_replies, user_turn

    questions, _ = split_questions(held_out=0, seed=0)
    replies = sample_replies(base, questions, seed=1)
    return [
        {"prompt": user_turn(question), "completion": assistant_turn(reply), "label": is_wanted(question, reply)}
        for question, reply in zip(questions, replies, strict=True)
        if reply.strip()
    ]


def multi_turn_rows(count: int = 600) -> list[dict[str, object]]:
    """Return rated replies at the end of conversations of two or three exchanges, courteous and curt ones mixed."""
    from quiz import courteous_replies, curt_replies, split_questions
    from tiny_model import assistant_turn, user_turn

    draw = random.Random(0)
    questions, _ = split_questions(held_out=0, seed=0)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        turns = []
        for question in draw.sample(questions, draw.randint(1, 2)):
            manner = draw.choice((courteous_replies, curt_replies))
            turns += user_turn(question) + assistant_turn(draw.choice(manner(question)))
        question, label = draw.choice(questions), draw.random() < 0.5
        reply = draw.choice((courteous_replies if label else curt_replies)(question))
        rows.append({"prompt": turns + user_turn(question), "completion": assistant_turn(reply), "label": label})
    return rows


def run(recipe: str, refs: Path, out: Path, seed: int, updates: int, batch_size: int) -> Result:
    """Train once, and return the held-out values."""
    from offline_kto.train.config import TrainConfig
    from offline_kto.train.run import run_trainer
    from offline_kto.train.run.train_run import train

    config = TrainConfig(
        cache=refs,
        out=out,
        memory="full" if recipe == "float32" else "lean",
        dtype="bfloat16",
        device="cpu",
        max_steps=updates,
        epochs=1e4,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        seed=seed,
        eval_fraction=0.2,
        eval_steps=2**30,
        save_steps=0,
        logging_steps=100,
        max_tokens=4096,
    )
    own = run_trainer.own_optimizer if recipe != "plain" else _torch_adamw
    with mock.patch.object(run_trainer, "own_optimizer", own):
        train(config)
    found = json.loads((out / "evaluation.json").read_text())["metrics"]
    return Result(found["loss"]["value"], found["rewards/margins"]["value"])


def _torch_adamw(config: object, args: object) -> tuple[object, dict[str, object]]:
    import torch

    return torch.optim.AdamW, {"lr": LEARNING_RATE, "weight_decay": 0.0}


def _cells(recipe: str, results: dict[str, list[Result]]) -> tuple[str, ...]:
    cells = [recipe]
    for measure, digits in (("loss", 5), ("margin", 4)):
        values = [getattr(one, measure) for one in results[recipe]]
        cells += [f"{statistics.mean(values):.{digits}f}", f"{_spread(values):.{digits}f}"]
    ratios = [one.margin / other.margin for one, other in zip(results[recipe], results["float32"], strict=True)]
    return (*cells, f"{statistics.mean(ratios):.1%}")


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _holds(results: dict[str, list[Result]], measure: str) -> bool:
    """Return whether lean is within the spread of float32, and plain is not."""
    values = {recipe: [getattr(one, measure) for one in found] for recipe, found in results.items()}
    spread, mean = _spread(values["float32"]), statistics.mean(values["float32"])
    lean, plain = (abs(statistics.mean(values[recipe]) - mean) for recipe in ("lean", "plain"))
    return lean <= spread < plain


if __name__ == "__main__":
    main()
