"""Measure time and memory of `kto-train` (and `kto-precompute`) beside TRL's KTOTrainer, on the same rows in one run.

    python benchmarks/train_vs_trl.py
    python benchmarks/train_vs_trl.py --data feedback.jsonl --repeats 3 --check
    python benchmarks/train_vs_trl.py --quick        # a tiny model, as a quick test

One pass over the rows on the CPU in float32, without gradient checkpointing, with the same model, row order, batch and
optimizer. The sides run one after another; with --repeats the whole round is run again and medians are shown.

TRL cuts a batch into forward passes of a fixed number of rows, and this number decides what it costs. So each side gets
its best: TRL's cached references (`precompute_ref_log_probs=True`) are read at every number of --rows-a-pass, and a
ratio of times is taken to the fastest of these runs, a ratio of memory to the smallest, line by line. Ours is one run,
as it comes. Two more kinds of TRL are read, at the numbers of rows that were fastest and smallest with cached
references:

- GPU rule: cached, but projecting completion positions only. TRL does so on CUDA; on the CPU it projects prompts and
  padding to the vocabulary too, which flatters whoever is compared with it;
- live: the reference model stays in memory and scores every batch.

TRL pairs prompts with the completions of the same pass, and measures z0 there; ours pairs and measures over the batch.
Losses are therefore equal only where one pass is the whole batch; tokens are the same number for all.

The lines of the table:

- score references: the pass over all rows, from `run.seconds` of our manifest and a clock around TRL's own pass;
- train: `train_runtime` of both trainers;
- whole process that trains: from start to saved model, imports included; ours also checks policy against cache. TRL's with
  cached references contains their scoring;
- all of it: both of our processes, each with its own imports; TRL's one;
- tokens/s: tokens of the labelled and of the mismatched sequences, the same number for all sides, over the training time;
- achieved: useful floating-point operations over the training time. Useful are the operations that training
  with given references needs, the same for all sides: 2 for each weight of the layers and each token, attention over
  visible tokens, the output layer at completion positions; all of it three times for labelled rows (forward and
  backward), once for mismatched ones. Prompts and padding projected, logits computed again and live references are not
  useful. A prompt counts in every sequence that begins with it, so on data that repeat prompts a side that runs them
  once shows more than its hardware did;
- of the matmul rate: achieved, over what `matmul_rate.py` measured before and after (mean) in this run;
- peak memory: resident, of the process. TRL scores and trains in one process, ours in one each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import Environments, add_environment_options, load_average, prepare_environments
from matmul_rate import measured_rate
from sides import OurRun, Recipe, TrlRun, run_ours, run_trl
from text_table import text_table
from workload import SMALL, ModelShape, Workload, add_workload_options, make_workload

OURS = "ours"
CACHED, GPU_RULE, LIVE = "cached", "cached, GPU rule", "live"
KINDS: dict[str, dict[str, Any]] = {
    CACHED: {"reference": "cached"},
    GPU_RULE: {"reference": "cached", "completions_only": True},
    LIVE: {"reference": "live"},
}
SCORING, TRAINING, PROCESS, ALL = "score references, s", "train, s", "whole process that trains, s", "all of it, s"
TOKENS, ACHIEVED, SHARE = "tokens/s in training", "achieved, GFLOP/s", "of the matmul rate, %"
SCORING_MEMORY, MEMORY = "peak memory scoring, MiB", "peak memory training, MiB"
RATIOS = (SCORING, TRAINING, PROCESS, ALL, SCORING_MEMORY, MEMORY)
LINES = (SCORING, TRAINING, PROCESS, ALL, TOKENS, ACHIEVED, SHARE, SCORING_MEMORY, MEMORY)

Reading = dict[str, float | None]


def useful_flops(shape: ModelShape, rows: list[dict[str, Any]]) -> float:
    """Return the operations that one pass of training over these cached rows needs; see the module docstring."""
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate

    def forward(prompt: int, completion: int) -> float:
        tokens = prompt + completion
        attention = 4 * shape.hidden * tokens * (tokens + 1) / 2
        return shape.layers * (2 * layer * tokens + attention) + 2 * shape.hidden * shape.vocabulary * completion

    return sum(
        3 * forward(len(row["prompt_ids"]), len(row["completion_ids"]))
        + forward(len(row["prompt_ids"]), len(row["kl_completion_ids"][0]))
        for row in rows
    )


def sequence_tokens(rows: list[dict[str, Any]]) -> int:
    """Return the number of tokens of the labelled and of the mismatched sequences."""
    return sum(
        2 * len(row["prompt_ids"]) + len(row["completion_ids"]) + len(row["kl_completion_ids"][0]) for row in rows
    )


def read_ours(run: OurRun) -> Reading:
    """Return our side's value of each line that a run reports."""
    return {
        SCORING: run.manifest["run"]["seconds"],
        TRAINING: run.train_seconds,
        PROCESS: run.train.seconds,
        ALL: run.precompute.seconds + run.train.seconds,
        SCORING_MEMORY: run.precompute.peak_mib,
        MEMORY: run.train.peak_mib,
    }


def read_trl(run: TrlRun) -> Reading:
    """Return TRL's value of each line; with a live reference there is no scoring pass."""
    return {
        SCORING: run.reference_seconds,
        TRAINING: run.train_seconds,
        PROCESS: run.process.seconds,
        ALL: run.process.seconds,
        SCORING_MEMORY: run.reference_peak_mib,
        MEMORY: run.process.peak_mib,
    }


def one_round(
    environments: Environments, workload: Workload, recipe: Recipe, out: Path, args: argparse.Namespace
) -> tuple[dict[str, Reading], list[str]]:
    """Run every side once, and return the readings and, for each side, a line that compares it with ours."""
    before = measured_rate(environments.our_python)
    print(f"  {OURS}: {load_average()}", flush=True)
    ours = run_ours(environments, workload, recipe, out=out / "ours", max_tokens=args.max_tokens)
    readings, checks = {OURS: read_ours(ours)}, []

    def read(kind: str, rows: int) -> None:
        name = side_name(kind, rows, recipe.batch_size)
        print(f"  TRL {name}: {load_average()}", flush=True)
        trl = run_trl(environments, workload, recipe, out=out / f"trl-{len(readings)}", rows_a_pass=rows, **KINDS[kind])
        readings[name] = read_trl(trl)
        checks.append(same_work(name, trl, ours))

    for rows in args.rows_a_pass:
        read(CACHED, rows)
    peers = [side_name(CACHED, rows, recipe.batch_size) for rows in args.rows_a_pass]
    best = {args.rows_a_pass[peers.index(best_side(readings, line, CACHED))] for line in (TRAINING, MEMORY)}
    for kind in args.kinds:
        for rows in sorted(best):
            read(kind, rows)
    after = measured_rate(environments.our_python)
    print(f"  matmul rate: {before / 1e9:.0f} GFLOP/s before, {after / 1e9:.0f} after", flush=True)
    flops, tokens = useful_flops(workload.shape, ours.rows), sequence_tokens(ours.rows)
    for reading in readings.values():
        seconds = reading[TRAINING] or float("nan")
        reading[TOKENS], reading[ACHIEVED] = tokens / seconds, flops / seconds / 1e9
        reading[SHARE] = 100 * flops / seconds / ((before + after) / 2)
    return readings, checks


def side_name(kind: str, rows: int, batch_size: int) -> str:
    """Return the name of a TRL run: its kind, and how its batch is split."""
    return f"{kind} {rows} x {batch_size // rows}"


def best_side(readings: dict[str, Reading], line: str, kind: str) -> str | None:
    """Return the run of this kind of TRL with the smallest value of a line; None if there is none."""
    found = {name: value for name, reading in readings.items() if (value := reading[line]) is not None}
    mine = [name for name in found if name.rsplit(" ", 3)[0] == kind]
    return min(mine, key=found.__getitem__) if mine else None


def same_work(name: str, trl: TrlRun, ours: OurRun) -> str:
    """Compare rows, updates and losses of both sides: a ratio of times is only valid for the same work.

    Raises:
        ValueError: the sides kept different rows or made different numbers of updates.
    """
    sizes = [(len(run.rows), len(run.steps)) for run in (trl, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name} trained on (rows, updates) {sizes[0]}, ours on {sizes[1]}: nothing to compare")
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(trl.steps, ours.steps, strict=True))
    return f"TRL {name}: {sizes[0][0]} rows, {sizes[0][1]} updates on both sides, losses at most {apart:.1e} apart"


def medians(rounds: list[dict[str, Reading]]) -> dict[str, Reading]:
    """Return each side's median of each line over the rounds."""
    result: dict[str, Reading] = {}
    for side in rounds[0]:
        result[side] = {}
        for line in LINES:
            values = [value for readings in rounds if (value := readings[side][line]) is not None]
            result[side][line] = statistics.median(values) if values else None
    return result


def ratio(readings: dict[str, Reading], line: str, kind: str) -> float | None:
    """Return ours divided by the best run of a kind of TRL, for this line."""
    ours, best = readings[OURS][line], best_side(readings, line, kind)
    return None if ours is None or best is None else ours / (readings[best][line] or float("nan"))


def kinds_in(readings: dict[str, Reading]) -> list[str]:
    """Return the kinds of TRL that were measured."""
    return [kind for kind in KINDS if best_side(readings, TRAINING, kind)]


def readings_table(readings: dict[str, Reading]) -> str:
    """Return every side's values, and ours divided by the best of each kind of TRL."""
    kinds = kinds_in(readings)
    header = [
        "",
        OURS,
        *(f"TRL {side}" for side in readings if side != OURS),
        *(f"ours / best {kind}" for kind in kinds),
    ]
    rows = []
    for line in LINES:
        digits = 1 if line.endswith(", s") else 0
        values = [_number(reading[line], digits=digits) for reading in readings.values()]
        ratios = [_number(ratio(readings, line, kind), digits=2) if line in RATIOS else "" for kind in kinds]
        rows.append([line, *values, *ratios])
    return text_table(header, rows)


def markdown_table(readings: dict[str, Reading]) -> str:
    """Return the ratios alone, as the README shows them."""
    kinds = kinds_in(readings)
    lines = [
        "| measure | " + " | ".join(f"ours / TRL, {kind}" for kind in kinds) + " |",
        "| --- |" + " --- |" * len(kinds),
    ]
    for line in RATIOS:
        cells = [_number(ratio(readings, line, kind), digits=2) for kind in kinds]
        lines.append(f"| {line.rsplit(',', 1)[0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, *, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def missed_targets(readings: dict[str, Reading]) -> list[str]:
    """Return the promises of this project about these lines that were missed."""

    def at_most(what: str, value: float | None, bound: float) -> str | None:
        return f"{what}: {value:.2f}, promised at most {bound}" if value is not None and value > bound else None

    found = [
        at_most("training time / TRL's fastest, cached", ratio(readings, TRAINING, CACHED), 0.33),
        at_most("training time / TRL's fastest, live", ratio(readings, TRAINING, LIVE), 0.30),
        at_most("peak memory / TRL's smallest, cached", ratio(readings, MEMORY, CACHED), 0.35),
    ]
    share = readings[OURS][SHARE] or 0.0
    found.append(f"{share:.0f} % of the matmul rate, promised at least 60" if share < 60 else None)
    return [line for line in found if line]


def run(args: argparse.Namespace, work: Path) -> list[dict[str, Reading]]:
    """Create the workload, run all rounds, print the table of medians, and return the rounds."""
    environments = prepare_environments(args.trl_python)
    shape, num_rows = (SMALL, 16) if args.quick else (ModelShape(), 96)
    workload = make_workload(work, data=args.data, num_rows=args.rows or num_rows, shape=shape, seed=args.seed)
    recipe = Recipe(
        batch_size=args.batch_size,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    print(f"{workload.describe()}\n{environments.describe()}")
    print(f"batch {recipe.batch_size}, at most {recipe.max_length} tokens, learning rate {recipe.learning_rate:g}")
    rounds = []
    for i in range(args.repeats):
        print(f"round {i + 1} of {args.repeats}")
        out = work / f"round-{i}"
        readings, checks = one_round(environments, workload, recipe, out, args)
        rounds.append(readings)
    print("\n".join(checks))
    print(f"at the end: {load_average()}\n")
    print(readings_table(medians(rounds)))
    return rounds


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, rows=None)
    add_environment_options(parser)
    parser.add_argument("--quick", action="store_true", help="a model of 1.3M parameters, 16 rows, batches of 4")
    parser.add_argument("--batch-size", type=int, help="default: 16 (--quick: 4)")
    parser.add_argument("--max-length", type=int, default=512, help="default: 512")
    parser.add_argument("--max-tokens", type=int, help="ours: tokens in one pass (default: kto-train's)")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="default: 1e-6")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the table shows medians (default: 1)")
    parser.add_argument(
        "--rows-a-pass", type=int, nargs="+", help="TRL's rows in one pass (default: 2 4 8 16; --quick: 2 4)"
    )
    parser.add_argument(
        "--kinds", nargs="*", choices=[GPU_RULE, LIVE], default=[GPU_RULE, LIVE], help="of TRL, beside cached"
    )
    parser.add_argument("--markdown", action="store_true", help="print the ratios as a Markdown table as well")
    parser.add_argument("--json", type=Path, help="write all values to this file")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a promised ratio is not kept")
    parser.add_argument("--work", type=Path, help="keep caches, runs and logs here (default: a temporary directory)")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (4 if args.quick else 16)
    args.rows_a_pass = args.rows_a_pass or ([2, 4] if args.quick else [2, 4, 8, 16])
    if any(args.batch_size % rows for rows in args.rows_a_pass):
        parser.error(f"--rows-a-pass must divide the batch of {args.batch_size}")
    if args.check and LIVE not in args.kinds:
        parser.error("--check judges live references too; leave --kinds out, or name it")
    return args


def main() -> int:
    """Parse the command line, run all rounds, and return the verdict as an exit code."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        rounds = run(args, args.work or Path(temporary))
    readings = medians(rounds)
    if args.markdown:
        print(f"\n{markdown_table(readings)}")
    if args.json:
        args.json.write_text(json.dumps({"medians": readings, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")
    missed = missed_targets(readings) if args.check else []
    print("".join(f"\nMISSED {line}" for line in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
