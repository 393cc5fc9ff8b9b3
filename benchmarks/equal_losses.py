"""Check that TRL's trainers and this project compute the same updates under the losses that both have.

    python benchmarks/equal_losses.py
    python benchmarks/equal_losses.py --loss dpo --updates 10

Both sides train a few updates on the same rows, in the order of the file, on the CPU in float32: TRL's KTOTrainer
(`apo_zero_unpaired`), DPOTrainer (`sigmoid`, `robust`, `ipo`, `nca_pair`, and `sigmoid` with `sft`) with live references and
CPOTrainer (`simpo`), ours from a cache. Compared are loss, rewards and margins of every update; of `simpo` the loss alone, because
TRL's rewards are likelihoods there. (CPOTrainer ends a rendered conversation with a second end token. A mean over tokens hardly
changes with it, as under `simpo`; under `cpo` sums over tokens would differ.) The exit code is 1 if one differs by more than the
bound, or if no reward changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from environments import HERE, Environments, add_environment_options, offline_env, prepare_environments
from measured_run import run_measured
from sides import Recipe, Step, read_metrics, recipe_options
from text_table import text_table
from trl_loss import GAMMA, LOSSES, SFT_WEIGHT, SMOOTHING
from workload import SMALL, Row, Workload, add_workload_options, make_workload

BOUND = 2e-3  # absolute, of each update's metrics
MOVED_AT_LEAST = 50 * BOUND  # below this, equal rewards could come from two runs that learned nothing
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
OURS = {
    "robust": ["--loss", "robust", "--label-smoothing", str(SMOOTHING)],
    "dpo_sft": ["--loss", "dpo", "--sft-weight", str(SFT_WEIGHT)],
    "simpo": ["--loss", "simpo", "--simpo-gamma", str(GAMMA)],
}


def as_pairs(rows: list[Row]) -> list[Row]:
    """Combine every two rows into a pair: the prompt of the first, with the completions of both."""
    return [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(rows[::2], rows[1::2], strict=False)
    ]


def both_sides(
    environments: Environments, workload: Workload, recipe: Recipe, loss: str, work: Path
) -> tuple[list[Step], list[Step]]:
    """Train with TRL and with ours, and return each side's record of every update."""
    data = workload.data
    if loss != "apo_zero":
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        data = work / "pairs.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(pair) + "\n" for pair in as_pairs(rows)), encoding="utf-8")
    options = recipe_options(recipe)
    trl: list[str | Path] = [environments.trl_python, HERE / "trl_loss.py", "--model", workload.model, "--data", data]
    trl += ["--out", work / "trl", *options, "--loss", loss, "--max-length", str(recipe.max_length)]
    run_measured(trl, log=work / "trl.txt", env=offline_env(work))

    refs, run = work / "refs", work / "run"
    score: list[str | Path] = [environments.our_command("kto-precompute"), "--model", workload.model, "--data", data]
    score += ["--out", refs, "--max-length", str(recipe.max_length), "--dtype", "float32", "--device", "cpu"]
    run_measured(score, log=work / "precompute.txt", env=offline_env(work))
    train: list[str | Path] = [environments.our_command("kto-train"), "--cache", refs, "--out", run, *options]
    train += OURS.get(loss, ["--loss", loss])
    train += ["--no-shuffle", "--dtype", "float32", "--device", "cpu", "--save-steps", "0"]
    run_measured(train, log=work / "train.txt", env=offline_env(work))
    theirs = json.loads((work / "trl" / "steps.json").read_text(encoding="utf-8"))
    return theirs, read_metrics(run / "metrics.jsonl")[0]


def compare(loss: str, theirs: list[Step], ours: list[Step]) -> tuple[list[list[str]], bool]:
    """Return the lines of the table, and whether all bounds hold."""
    lines, passed = [], len(theirs) == len(ours)
    moved = max(abs(step[name]) for step in ours for name in METRICS[1:] if name in step)
    for name in METRICS[:1] if loss == "simpo" else METRICS:
        pairs = [(a[name], b[name]) for a, b in zip(theirs, ours, strict=True) if name in a and name in b]
        difference = max(abs(a - b) for a, b in pairs)
        largest = max(abs(a) for a, _ in pairs)
        passed &= difference <= BOUND and len(pairs) == len(ours)
        verdict = "PASS" if difference <= BOUND else "FAIL"
        lines.append([loss, name, str(len(pairs)), f"{largest:.5g}", f"{difference:.2e}", f"{BOUND:.0e}", verdict])
    return lines, passed and moved >= MOVED_AT_LEAST


def main() -> int:
    """Compare, print, and return the verdict as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, rows=48)
    add_environment_options(parser)
    parser.add_argument("--loss", choices=LOSSES, help="only this one (default: all)")
    parser.add_argument("--updates", type=int, default=5, help="optimizer updates to compare (default: 5)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4, so that rewards move")
    args = parser.parse_args()
    environments = prepare_environments(args.trl_python)
    recipe = Recipe(8, 512, args.learning_rate, max_steps=args.updates, seed=args.seed)
    table, passed = [], True
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        workload = make_workload(work / "rows", data=args.data, num_rows=args.rows, shape=SMALL, seed=args.seed)
        print(f"{workload.describe()}\n{environments.describe()}", flush=True)
        for loss in [args.loss] if args.loss else LOSSES:
            lines, held = compare(loss, *both_sides(environments, workload, recipe, loss, work / loss))
            table, passed = [*table, *lines], passed and held
    print(text_table(["loss", "metric", "updates", "largest", "difference", "bound", ""], table))
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
