"""Time and memory of `kto-precompute` and `kto-train` beside TRL's KTOTrainer, on the same rows in one run.

    python benchmarks/first_reading.py
    python benchmarks/first_reading.py --data feedback.jsonl --repeats 3
    python benchmarks/first_reading.py --quick        # a tiny model, to see that it works

One pass over the rows on the CPU in float32, without gradient checkpointing, with the same pairs and row order. The
sides run one after another; with --repeats the whole round is run again and medians are shown. TRL is read three times:

- cached: `precompute_ref_log_probs=True`, as it comes;
- cached, GPU rule: the same, but projecting completion positions only. TRL does so on CUDA; on the CPU it projects
  prompts and padding to the vocabulary too, which flatters whoever is compared with it;
- live: the reference model stays in memory and scores every batch.

What the lines mean:

- score references: the pass over all rows, from `run.seconds` of our manifest and a clock around TRL's own pass;
- train: `train_runtime` of both trainers (ours contains the check of policy against cache);
- all of it: wall time of whole processes from start to saved model. Ours are two, each with its own imports;
- processor s: the same in processor time, over all threads; a busy machine stretches it less than wall time;
- peak memory: resident, of the process. TRL scores and trains in one process, ours in one each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from environments import Environments, add_environment_options, load_average, prepare_environments
from sides import OurRun, Recipe, TrlRun, run_ours, run_trl
from text_table import text_table
from workload import SMALL, ModelShape, Workload, add_workload_options, make_workload

OURS = "ours"
TRL_SIDES = {
    "TRL cached": {"reference": "cached"},
    "TRL cached, GPU rule": {"reference": "cached", "completions_only": True},
    "TRL live": {"reference": "live"},
}
LINES = (
    "score references, s",
    "train, s",
    "all of it, s",
    "all of it, processor s",
    "peak memory scoring, MiB",
    "peak memory training, MiB",
)

Reading = dict[str, float | None]


def read_ours(run: OurRun) -> Reading:
    """Our side's value of each line."""
    return dict(
        zip(
            LINES,
            (
                run.manifest["run"]["seconds"],
                run.train_seconds,
                run.precompute.seconds + run.train.seconds,
                run.precompute.cpu_seconds + run.train.cpu_seconds,
                run.precompute.peak_mib,
                run.train.peak_mib,
            ),
            strict=True,
        )
    )


def read_trl(run: TrlRun) -> Reading:
    """TRL's value of each line; with a live reference there is no scoring pass to read."""
    return dict(
        zip(
            LINES,
            (
                run.reference_seconds,
                run.train_seconds,
                run.process.seconds,
                run.process.cpu_seconds,
                run.reference_peak_mib,
                run.process.peak_mib,
            ),
            strict=True,
        )
    )


def one_round(
    environments: Environments, workload: Workload, recipe: Recipe, out: Path
) -> tuple[dict[str, Reading], list[str]]:
    """Run every side once; returns the readings and a line on each that says how the run compares with ours."""
    print(f"  {OURS}: {load_average()}", flush=True)
    ours = run_ours(environments, workload, recipe, out=out / "ours")
    readings, checks = {OURS: read_ours(ours)}, []
    for i, (name, options) in enumerate(TRL_SIDES.items()):
        print(f"  {name}: {load_average()}", flush=True)
        trl = run_trl(environments, workload, recipe, out=out / f"trl-{i}", **options)
        readings[name] = read_trl(trl)
        checks.append(same_work(name, trl, ours))
    return readings, checks


def same_work(name: str, trl: TrlRun, ours: OurRun) -> str:
    """Rows, updates and losses of both sides: a ratio of times counts only where the work was the same.

    Raises:
        ValueError: if the sides kept other rows or made another number of updates.
    """
    sizes = [(len(run.rows), len(run.steps)) for run in (trl, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name} trained on (rows, updates) {sizes[0]}, ours on {sizes[1]}: nothing to compare")
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(trl.steps, ours.steps, strict=True))
    return f"{name}: {sizes[0][0]} rows, {sizes[0][1]} updates on both sides, losses at most {apart:.1e} apart"


def medians(rounds: list[dict[str, Reading]]) -> dict[str, Reading]:
    """Each side's median of each line over the rounds."""
    result: dict[str, Reading] = {}
    for side in rounds[0]:
        result[side] = {}
        for line in LINES:
            values = [readings[side][line] for readings in rounds]
            result[side][line] = statistics.median(values) if None not in values else None
    return result


def readings_table(readings: dict[str, Reading]) -> str:
    """Every side's values, and ours divided by each of TRL's."""
    header = ["", *readings, *(f"ours / {name.removeprefix('TRL ')}" for name in TRL_SIDES)]
    rows = []
    for line in LINES:
        ours = readings[OURS][line]
        values = [_number(reading[line], digits=0 if "MiB" in line else 1) for reading in readings.values()]
        ratios = [
            "-" if readings[name][line] is None else _number(ours / readings[name][line], digits=2)
            for name in TRL_SIDES
        ]
        rows.append([line, *values, *ratios])
    return text_table(header, rows)


def _number(value: float | None, *, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def run(args: argparse.Namespace, work: Path) -> None:
    """Make the workload, run all rounds, print the table."""
    environments = prepare_environments(args.trl_python)
    shape, num_rows, batch_size = (SMALL, 16, 4) if args.quick else (ModelShape(), 96, 16)
    workload = make_workload(work, data=args.data, num_rows=args.rows or num_rows, shape=shape, seed=args.seed)
    recipe = Recipe(
        batch_size=args.batch_size or batch_size,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    print(f"{workload.describe()}\n{environments.describe()}")
    print(f"batch {recipe.batch_size}, at most {recipe.max_length} tokens, learning rate {recipe.learning_rate:g}")
    rounds = []
    for i in range(args.repeats):
        print(f"round {i + 1} of {args.repeats}")
        readings, checks = one_round(environments, workload, recipe, work / f"round-{i}")
        rounds.append(readings)
    print("\n".join(checks))
    print(f"at the end: {load_average()}\n")
    print(readings_table(medians(rounds)))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, rows=None)
    add_environment_options(parser)
    parser.add_argument("--quick", action="store_true", help="a model of 1.3M parameters, 16 rows, batches of 4")
    parser.add_argument("--batch-size", type=int, help="default: 16 (--quick: 4)")
    parser.add_argument("--max-length", type=int, default=512, help="default: 512")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="default: 1e-6")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the table shows medians (default: 1)")
    parser.add_argument("--work", type=Path, help="keep caches, runs and logs here (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(args, args.work or Path(temporary))


if __name__ == "__main__":
    main()
