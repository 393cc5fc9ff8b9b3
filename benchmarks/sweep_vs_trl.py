"""Measure an eight-trial sweep beside eight runs of TRL's KTOTrainer with live references, on the same rows.

    python benchmarks/sweep_vs_trl.py --check
    python benchmarks/sweep_vs_trl.py --quick        # a tiny model, as a quick test

A grid of four betas and two learning rates, short runs on the CPU in float32. TRL's side is eight processes, one after
another, each of which trains on all rows and evaluates nothing; its batch is cut into passes of whichever --rows-a-pass
trains fastest. Ours is `kto-precompute` and `kto-sweep`: scoring, start-up, the eight trials with an evaluation of
held-out rows each, best model and report. The held-out rows come on top of the same training rows.

- whole: processes from start to end, imports included; ours both commands;
- in the trials: `train_runtime` of all runs, ours with evaluations;
- beside the trials: our sweep's time outside `train_runtime`, and its ratio to `train_runtime`, without the start-up
  (imports and reading the model once) and with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from environments import Environments, add_environment_options, load_average, offline_env, prepare_environments
from measured_run import run_measured
from sides import Recipe, run_trl
from text_table import text_table
from workload import SMALL, ModelShape, Workload, add_workload_options, make_workload, synthetic_rows

BETAS, RATES = (0.05, 0.1, 0.2, 0.3), (5e-7, 1e-6)
HELD_OUT = 4
BOUND = 0.3


@dataclass(frozen=True)
class Reading:
    """The durations of one side, seconds."""

    whole: float
    in_trials: float
    beside: float = 0.0
    start_up: float = 0.0


def sweep_side(environments: Environments, workload: Workload, recipe: Recipe, out: Path) -> Reading:
    """Score all rows and some held-out ones, then sweep."""
    env = offline_env(out)
    held = out / "held_out.jsonl"
    held.parent.mkdir(parents=True, exist_ok=True)
    rows = synthetic_rows(HELD_OUT, seed=recipe.seed + 1)
    held.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seconds = 0.0
    for data, refs in ((workload.data, out / "refs"), (held, out / "held_refs")):
        command: list[str | Path] = [environments.our_command("kto-precompute"), "--model", workload.model]
        command += ["--data", data, "--out", refs, "--max-length", str(recipe.max_length)]
        command += ["--dtype", "float32", "--device", "cpu"]
        seconds += run_measured(command, log=refs.with_suffix(".txt"), env=env).seconds
    shared = {"batch_size": recipe.batch_size, "dtype": "float32", "device": "cpu", "seed": recipe.seed}
    plan = {
        "search": "grid",
        "space": {"beta": list(BETAS), "learning_rate": list(RATES)},
        "train": {**shared, "eval_cache": str(out / "held_refs"), "max_steps": recipe.max_steps},
    }
    (out / "sweep.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    command = [environments.our_command("kto-sweep"), "--cache", out / "refs", "--config", out / "sweep.yaml"]
    swept = run_measured([*command, "--out", out / "sweep"], log=out / "sweep.txt", env=env)
    trials = json.loads((out / "sweep" / "sweep.json").read_text(encoding="utf-8"))["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * len(BETAS) * len(RATES)
    training, whole = (sum(trial[name] for trial in trials) for name in ("train_seconds", "seconds"))
    return Reading(seconds + swept.seconds, training, whole - training, swept.seconds - whole)


def trl_side(
    environments: Environments, workload: Workload, recipe: Recipe, out: Path, rows_a_pass: list[int]
) -> Reading:
    """Run the same trainings with TRL, one process each, at the number of rows per pass that trains fastest."""

    def seconds(rows: int) -> float:
        run = run_trl(environments, workload, recipe, out=out / f"try-{rows}", reference="live", rows_a_pass=rows)
        print(f"  TRL, {rows} rows a pass: {run.process.seconds:.1f} s; {load_average()}", flush=True)
        return run.train_seconds or 0.0

    fastest = min(rows_a_pass, key=seconds)
    whole = in_trials = 0.0
    for number, (beta, rate) in enumerate(itertools.product(BETAS, RATES)):
        one = replace(recipe, beta=beta, learning_rate=rate)
        run = run_trl(environments, workload, one, out=out / str(number), reference="live", rows_a_pass=fastest)
        print(f"  TRL, run {number + 1}: {run.process.seconds:.1f} s; {load_average()}", flush=True)
        whole, in_trials = whole + run.process.seconds, in_trials + (run.train_seconds or 0.0)
    return Reading(whole, in_trials)


def main() -> int:
    """Measure, print, and with --check return the verdict as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, rows=32)
    add_environment_options(parser)
    parser.add_argument("--updates", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--rows-a-pass", type=int, nargs="+", default=[2, 4, 8, 16], help="TRL's (default: 2 4 8 16)")
    parser.add_argument("--quick", action="store_true", help="a model of 1.3M parameters")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {BOUND}")
    args = parser.parse_args()
    environments = prepare_environments(args.trl_python)
    recipe = Recipe(args.batch_size, 512, 1e-6, max_steps=args.updates, seed=args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work, shape = Path(temporary), SMALL if args.quick else ModelShape()
        workload = make_workload(work / "rows", data=args.data, num_rows=args.rows, shape=shape, seed=args.seed)
        print(f"{workload.describe()}\n{environments.describe()}", flush=True)
        ours = sweep_side(environments, workload, recipe, work / "ours")
        print(f"  ours: {ours.whole:.1f} s; {load_average()}", flush=True)
        trl = trl_side(environments, workload, recipe, work / "trl", args.rows_a_pass)
    lines = [
        ["whole, s", f"{ours.whole:.1f}", f"{trl.whole:.1f}", f"{ours.whole / trl.whole:.2f}"],
        ["in the trials, s", f"{ours.in_trials:.1f}", f"{trl.in_trials:.1f}", f"{ours.in_trials / trl.in_trials:.2f}"],
    ]
    print(text_table([f"{len(BETAS) * len(RATES)} runs", "ours", "TRL", "ours / TRL"], lines))
    with_start = ours.beside + ours.start_up
    print(
        f"beside the trials: {ours.beside:.1f} s ({ours.beside / ours.in_trials:.1%}) and a start-up and end of "
        f"{ours.start_up:.1f} s ({with_start / ours.in_trials:.1%} together)"
    )
    ratio = ours.whole / trl.whole
    print("PASS" if ratio <= BOUND else f"FAIL: {ratio:.2f} is above {BOUND}")
    return 1 if args.check and ratio > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
