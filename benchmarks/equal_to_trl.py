"""Check that TRL's KTOTrainer and this project compute the same numbers from the same rows.

    python benchmarks/equal_to_trl.py
    python benchmarks/equal_to_trl.py --data feedback.jsonl

Both sides score the references of all rows and train a few updates on the CPU in float32, with mismatched pairs made
by TRL's rule (`--pairing rotate` over blocks of one batch) and rows in the order of the file. Compared are the token
ids, the cached reference scores, and loss, KL and rewards of every update. The exit code is 1 if a bound is exceeded.

The weights are random, so a row's reward has no meaning. It must change (column `largest`), and change equally on both
sides.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from environments import add_environment_options, prepare_environments
from sides import OurRun, Recipe, TrlRun, run_ours, run_trl
from text_table import text_table
from workload import SMALL, ModelShape, add_workload_options, make_workload

SUM_BOUND = 1e-6  # relative, of a sum over all rows
STEP_BOUND = 2e-3  # absolute, of each update's metrics
MOVED_AT_LEAST = 50 * STEP_BOUND  # below this, equal rewards could come from two runs that learned nothing
STEP_METRICS = ("loss", "kl", "kl_raw", "rewards/chosen", "rewards/rejected")


@dataclass(frozen=True)
class Comparison:
    """One line of the result: `difference` must not exceed `bound` (None: displayed, not checked)."""

    what: str
    largest: float
    difference: float
    bound: float | None = None

    @property
    def passed(self) -> bool:
        return self.bound is None or self.difference <= self.bound

    def cells(self) -> list[str]:
        bound = "" if self.bound is None else f"{self.bound:.0e}"
        verdict = "" if self.bound is None else "PASS" if self.passed else "FAIL"
        return [self.what, f"{self.largest:.6g}", f"{self.difference:.2e}", bound, verdict]


def compare_ids(trl: TrlRun, ours: OurRun) -> Comparison:
    """Count rows that only one side kept, or that differ in a token id; none are allowed."""
    names = ("source", "prompt_ids", "completion_ids")
    trl_ids = {tuple(map(_hashable, (row[name] for name in names))) for row in trl.rows}
    our_ids = {tuple(map(_hashable, (row[name] for name in names))) for row in ours.rows}
    return Comparison("rows with other ids", float(len(trl_ids)), float(len(trl_ids ^ our_ids)), 0.0)


def _hashable(value: int | list[int]) -> int | tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else value


def paired_with_itself(trl: TrlRun, block: int) -> set[int]:
    """Return the row that TRL pairs with its own completion, a last block of one; ours uses the block before."""
    sources = sorted(row["source"] for row in trl.rows)
    return {sources[-1]} if len(sources) % block == 1 else set()


def compare_scores(trl: TrlRun, ours: OurRun, *, block: int) -> list[Comparison]:
    """Compare reference scores: sums relative to each other, and the row that differs most, in nats."""
    alone = paired_with_itself(trl, block)
    if alone:
        print(f"row {min(alone)} is a last block of one: TRL pairs it with itself, ours does not; its pair is left out")
    of_row = {row["source"]: (row["ref_logps"], row["ref_kl_logps"][0]) for row in ours.rows}
    comparisons = []
    for column, name in enumerate(("ref_logps", "ref_kl_logps")):
        # a row that only one side kept is counted by compare_ids; here it only makes the sums differ
        left_out = alone if name == "ref_kl_logps" else set()
        theirs = {row["source"]: row[name] for row in trl.rows if row["source"] not in left_out}
        mine = {source: scores[column] for source, scores in of_row.items() if source not in left_out}
        trl_sum, our_sum = math.fsum(theirs.values()), math.fsum(mine.values())
        relative = abs(our_sum - trl_sum) / abs(trl_sum)
        worst = max((abs(mine[source] - theirs[source]) for source in theirs.keys() & mine.keys()), default=math.inf)
        comparisons += [
            Comparison(f"sum of {name}, relative", abs(trl_sum), relative, SUM_BOUND),
            Comparison(f"{name} of a row, nats", max(map(abs, theirs.values())), worst),
        ]
    return comparisons


def compare_steps(trl: TrlRun, ours: OurRun) -> list[Comparison]:
    """Compare the metrics of every update; one that only one side has (a class is absent) differs by inf."""
    comparisons = []
    for name in STEP_METRICS:
        pairs = [(theirs.get(name), mine.get(name)) for theirs, mine in zip(trl.steps, ours.steps, strict=True)]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        one_sided = any((a is None) != (b is None) for a, b in pairs)
        difference = math.inf if one_sided else max((abs(a - b) for a, b in both), default=math.inf)
        largest = max((abs(a) for a, _ in both), default=0.0)
        comparisons.append(Comparison(name, largest, difference, STEP_BOUND))
    return comparisons


def steps_table(trl: TrlRun, ours: OurRun) -> str:
    """Return a table of both sides' metrics of every update."""

    def cell(step: dict[str, float], name: str) -> str:
        return f"{step[name]:.5f}" if name in step else "-"

    rows = [
        [f"{i} {side}", *(cell(step, name) for name in STEP_METRICS)]
        for i, steps in enumerate(zip(trl.steps, ours.steps, strict=True), start=1)
        for side, step in zip(("TRL", "ours"), steps, strict=True)
    ]
    return text_table(["update", *STEP_METRICS], rows)


def run(args: argparse.Namespace, work: Path) -> bool:
    """Run both sides under `work`, print the tables, and return whether every bound holds."""
    environments = prepare_environments(args.trl_python)
    shape = ModelShape() if args.full_size else SMALL
    num_rows = args.rows if args.data or args.rows else 64
    workload = make_workload(work, data=args.data, num_rows=num_rows, shape=shape, seed=args.seed)
    print(f"{workload.describe()}\n{environments.describe()}", flush=True)
    recipe = Recipe(
        batch_size=4,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        max_steps=args.updates,
        seed=args.seed,
    )
    trl = run_trl(environments, workload, recipe, out=work / "trl", reference="cached")
    ours = run_ours(environments, workload, recipe, out=work / "ours")
    comparisons = [
        compare_ids(trl, ours),
        *compare_scores(trl, ours, block=recipe.batch_size),
        *compare_steps(trl, ours),
    ]

    print(f"\n{steps_table(trl, ours)}\n")
    header = ["ours against TRL", "largest", "difference", "bound", ""]
    print(text_table(header, [comparison.cells() for comparison in comparisons]))
    moved = max(comparison.largest for comparison in comparisons if comparison.what.startswith("rewards/"))
    if moved < MOVED_AT_LEAST:
        print(f"FAIL: no reward reached {MOVED_AT_LEAST:g}, so equal rewards say nothing; raise --learning-rate")
    return moved >= MOVED_AT_LEAST and all(comparison.passed for comparison in comparisons)


def main() -> int:
    """Compare, print, and return the verdict as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, rows=None)
    add_environment_options(parser)
    parser.add_argument("--updates", type=int, default=5, help="optimizer updates to compare (default: 5)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4, so that rewards move")
    parser.add_argument("--max-length", type=int, default=512, help="default: 512")
    parser.add_argument("--full-size", action="store_true", help="the 42M model; default: one of 1.3M, in a minute")
    parser.add_argument("--work", type=Path, help="keep caches, runs and logs here (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        passed = run(args, args.work or Path(temporary))
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
