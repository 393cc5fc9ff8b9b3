"""Measure time and memory of scoring the references: `kto-precompute` beside TRL's pass, on the same rows in one run.

    python benchmarks/score_vs_trl.py --data feedback.jsonl --rows 400
    python benchmarks/score_vs_trl.py --vllm-python .venv-vllm/bin/python      # created by `make test-vllm`
    python benchmarks/score_vs_trl.py --quick                                  # a tiny model, as a quick test

The same model, rows and pairs on all sides, on the CPU in float32; one after another:

- TRL: `precompute_ref_log_probs=True`, stopped before it trains, at every number of --rows-a-pass: times are compared with
  the fastest of them, memory with the smallest. "GPU rule" is the fastest again, projecting completion positions only,
  which TRL does on CUDA (on a CPU it projects prompts and padding to the vocabulary too);
- plain: `kto-precompute` with shared prompts switched off;
- shared: `kto-precompute` as it is;
- vLLM: `kto-precompute --backend vllm`. Its whole process holds two starts of an engine, Transformers' for the sample.

The lines of the table:

- scoring: `run.seconds` of our manifest, and a clock around TRL's own pass;
- whole process: from start to finished cache; TRL's ends after its pass;
- tokens/s: tokens of the sequences asked for, the same number for all sides, over the scoring time;
- achieved: floating-point operations over the scoring time: 2 for each weight of the layers and each token that is fed,
  attention over the visible tokens, the output layer at completion positions. TRL, plain and vLLM feed every sequence
  whole; shared feeds a prompt once and its completions without their last token, where that saves a tenth of the tokens:
  operations that are saved do not count, so the faster of two sides can achieve less;
- of the matmul rate: achieved, over what `matmul_rate.py` measured before and after (mean) in this run;
- peak memory: resident, of the largest process;
- scores: the largest relative difference of the sums of `ref_logps` and `ref_kl_logps` from those of TRL's run whose pass
  is the whole batch: TRL draws mismatched completions from the rows of a pass, so only that one has our pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Environments, add_environment_options, load_average, prepare_environments
from matmul_rate import measured_rate
from measured_run import Measured
from sides import Recipe, read_cache, run_trl, score
from text_table import text_table
from workload import SMALL, ModelShape, Workload, add_workload_options, make_workload

from offline_kto.kto_core.scoring.passes import WORTH_SHARING

PLAIN = """
import offline_kto.kto_core.scoring.passes
offline_kto.kto_core.scoring.passes.WORTH_SHARING = 1.0
from offline_kto.precompute.cli import precompute
precompute()
"""
CLI = "from offline_kto.precompute.cli import precompute; precompute()"
GPU_RULE = "TRL, GPU rule"
SCORING, PROCESS, TOKENS = "scoring, s", "whole process, s", "tokens/s"
ACHIEVED, SHARE, MEMORY, APART = "achieved, GFLOP/s", "of the matmul rate, %", "peak memory, MiB", "scores differ by"

LONG = 256  # mean tokens of a sequence: below, --check does not judge the share of the matmul rate


@dataclass(frozen=True)
class Side:
    """One run: its scoring time, its process, the sums of its scores, and its number of operations."""

    seconds: float
    process: Measured
    sums: tuple[float, float]
    flops: float

    @property
    def peak_mib(self) -> float:
        return self.process.peak_mib


def read_refs(refs: Path, process: Measured, flops: Callable[[list[dict[str, Any]]], float]) -> Side:
    """Read one of our sides from its cache."""
    rows = read_cache(refs)
    manifest = json.loads((refs / "manifest.json").read_text(encoding="utf-8"))
    sums = math.fsum(row["ref_logps"] for row in rows), math.fsum(row["ref_kl_logps"][0] for row in rows)
    return Side(manifest["run"]["seconds"], process, sums, flops(rows))


def sequences_of(rows: Iterable[dict[str, Any]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the distinct (prompt, completion) of a cache: the sequences to score."""
    pairs = ((row["prompt_ids"], y) for row in rows for y in (row["completion_ids"], *row["kl_completion_ids"]))
    return list(dict.fromkeys((tuple(x), tuple(y)) for x, y in pairs))


def asked_tokens(rows: list[dict[str, Any]]) -> int:
    """Return the number of tokens of all labelled and mismatched sequences, including repeated ones."""
    return sum(2 * len(r["prompt_ids"]) + len(r["completion_ids"]) + len(r["kl_completion_ids"][0]) for r in rows)


def operations(shape: ModelShape, first: int, last: int, scored: int) -> float:
    """Return the operations of feeding tokens `first` to `last` of a sequence, and scoring `scored` of them."""
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    seen = (last * (last + 1) - first * (first + 1)) / 2
    body = shape.layers * (2 * layer * (last - first) + 4 * shape.hidden * seen)
    return body + 2 * shape.hidden * shape.vocabulary * scored


def whole_flops(shape: ModelShape, rows: list[dict[str, Any]], *, repeated: bool) -> float:
    """Return the operations of feeding every sequence whole; `repeated` includes sequences that occur again."""
    sequences = sequences_of(rows)
    if repeated:
        sequences = [(r["prompt_ids"], y) for r in rows for y in (r["completion_ids"], r["kl_completion_ids"][0])]
    return sum(operations(shape, 0, len(x) + len(y), len(y)) for x, y in sequences)


def shared_flops(shape: ModelShape, rows: list[dict[str, Any]]) -> float:
    """Return the operations of feeding every prompt once, followed by each completion without its last token.

    A prompt is shared only where that saves enough tokens.
    """
    sequences = sequences_of(rows)
    distinct = {x for x, _ in sequences}
    whole = sum(len(x) + len(y) for x, y in sequences)
    if sum(len(x) for x, _ in sequences) - sum(map(len, distinct)) <= WORTH_SHARING * whole:
        return whole_flops(shape, rows, repeated=False)
    prompts = sum(operations(shape, 0, len(x), 0) for x in distinct)
    return prompts + sum(operations(shape, len(x), len(x) + len(y) - 1, len(y)) for x, y in sequences)


def run_sides(
    environments: Environments,
    workload: Workload,
    recipe: Recipe,
    out: Path,
    *,
    rows_a_pass: list[int],
    vllm_python: Path | None,
) -> dict[str, Side]:
    """Run every side once."""
    shape, sides = workload.shape, {}

    def ours(name: str, command: Path, flops: Callable[[list[dict[str, Any]]], float], **options: Any) -> None:
        print(f"  {name}: {load_average()}", flush=True)
        refs = out / name / "refs"
        sides[name] = read_refs(refs, score(command, workload, recipe, refs=refs, **options), flops)

    ours("shared", environments.our_command("kto-precompute"), lambda rows: shared_flops(shape, rows))
    ours("plain", environments.our_python, lambda rows: whole_flops(shape, rows, repeated=False), program=PLAIN)
    if vllm_python is not None:
        backend = ("--backend", "vllm")
        ours("vLLM", vllm_python, lambda r: whole_flops(shape, r, repeated=False), program=CLI, options=backend)
    rows = read_cache(out / "shared" / "refs")

    def trl(name: str, rows_at_once: int, *, completions_only: bool = False) -> None:
        print(f"  {name}: {load_average()}", flush=True)
        run = run_trl(
            environments,
            workload,
            recipe,
            out=out / name.replace(" ", "-"),
            reference="cached",
            rows_a_pass=rows_at_once,
            completions_only=completions_only,
            score_only=True,
        )
        if len(run.rows) != len(rows):
            raise ValueError(f"{name} scored {len(run.rows)} rows, ours {len(rows)}: nothing to compare")
        sums = math.fsum(row["ref_logps"] for row in run.rows), math.fsum(row["ref_kl_logps"] for row in run.rows)
        sides[name] = Side(run.reference_seconds or 0.0, run.process, sums, whole_flops(shape, rows, repeated=True))

    for number in rows_a_pass:
        trl(trl_name(number), number)
    fastest = min(rows_a_pass, key=lambda number: sides[trl_name(number)].seconds)
    trl(GPU_RULE, fastest, completions_only=True)
    return sides


def trl_name(rows_a_pass: int) -> str:
    return f"TRL {rows_a_pass} a pass"


def peers_of(sides: dict[str, Side]) -> list[Side]:
    """Return TRL's unmodified runs, those with fewer rows in a pass first."""
    return [side for name, side in sides.items() if name.endswith("a pass")]


def apart(side: Side, peer: Side) -> float:
    """Return the larger relative difference of the two sums."""
    return max(abs(a - b) / abs(b) for a, b in zip(side.sums, peer.sums, strict=True))


def table_of(sides: dict[str, Side], tokens: int, rate: float) -> str:
    """Return every side's lines, and our sides' ratios to TRL's scoring time and memory."""
    peers = peers_of(sides)
    seconds, peak, same_pairs = min(p.seconds for p in peers), min(p.peak_mib for p in peers), peers[-1]
    lines = {
        SCORING: lambda s: f"{s.seconds:.1f}",
        PROCESS: lambda s: f"{s.process.seconds:.1f}",
        TOKENS: lambda s: f"{tokens / s.seconds:,.0f}",
        ACHIEVED: lambda s: f"{s.flops / s.seconds / 1e9:.0f}",
        SHARE: lambda s: f"{100 * s.flops / s.seconds / rate:.0f}",
        MEMORY: lambda s: f"{s.peak_mib:,.0f}",
        APART: lambda s: f"{apart(s, same_pairs):.1e}",
        "scoring / TRL's fastest": lambda s: f"{s.seconds / seconds:.2f}",
        "whole process / TRL's fastest scoring": lambda s: f"{s.process.seconds / seconds:.2f}",
        "peak memory / TRL's smallest": lambda s: f"{s.peak_mib / peak:.2f}",
    }
    rows = [[name, *(show(side) for side in sides.values())] for name, show in lines.items()]
    return text_table(["", *sides], rows)


def missed_targets(sides: dict[str, Side], rate: float, *, speedup: float, length: float) -> list[str]:
    """Return the promises of this project that were missed; `length` is the mean number of tokens of a sequence."""
    ours, peers = sides["shared"], peers_of(sides)
    seconds, peak = min(p.seconds for p in peers), min(p.peak_mib for p in peers)
    missed = []
    if seconds < speedup * ours.process.seconds:
        missed.append(
            f"whole process {seconds / ours.process.seconds:.1f} times as fast as TRL's fastest pass, promised {speedup:g}"
        )
    if ours.peak_mib > 0.5 * peak:
        missed.append(f"peak memory {ours.peak_mib / peak:.2f} of TRL's smallest, promised at most 0.5")
    share = ours.flops / ours.seconds / rate
    if share < 0.7 and length >= LONG:
        missed.append(f"{share:.0%} of the matmul rate, promised at least 70 % on long rows")
    for name in ("shared", "plain"):
        if apart(sides[name], peers[-1]) > 1e-6:
            missed.append(f"{name}: sums differ by {apart(sides[name], peers[-1]):.1e}")
    return missed


def main() -> int:
    """Parse the command line, run all sides, and return the verdict as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, rows=None)
    add_environment_options(parser)
    parser.add_argument("--quick", action="store_true", help="a model of 1.3M parameters, 16 rows")
    parser.add_argument(
        "--rows-a-pass",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16],
        help="TRL's (default: 2 4 8 16); the pairs are the last's",
    )
    parser.add_argument("--max-length", type=int, default=512, help="default: 512")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter that has this project and vLLM")
    parser.add_argument(
        "--check", type=float, metavar="N", help="exit code 1 unless N times as fast, with all else kept"
    )
    parser.add_argument("--work", type=Path, help="keep caches and logs here (default: a temporary directory)")
    args = parser.parse_args()
    environments = prepare_environments(args.trl_python)
    shape, num_rows = (SMALL, 16) if args.quick else (ModelShape(), 96)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        workload = make_workload(work, data=args.data, num_rows=args.rows or num_rows, shape=shape, seed=args.seed)
        print(f"{workload.describe()}\n{environments.describe()}\nat most {args.max_length} tokens", flush=True)
        before = measured_rate(environments.our_python)
        recipe = Recipe(args.rows_a_pass[-1], args.max_length, learning_rate=1e-6, seed=args.seed)
        sides = run_sides(
            environments,
            workload,
            recipe,
            work / "sides",
            rows_a_pass=args.rows_a_pass,
            vllm_python=args.vllm_python,
        )
        rate = (before + measured_rate(environments.our_python)) / 2
        rows = read_cache(work / "sides" / "shared" / "refs")
    print(
        f"{len(rows)} rows kept, {len(sequences_of(rows))} distinct sequences; matmul rate {rate / 1e9:.0f} GFLOP/s\n"
    )
    print(table_of(sides, asked_tokens(rows), rate))
    length = asked_tokens(rows) / (2 * len(rows))
    print(f"\n{length:.0f} tokens in a sequence (mean)")
    missed = missed_targets(sides, rate, speedup=args.check, length=length) if args.check else []
    print("".join(f"\nMISSED {line}" for line in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
