"""How time and memory of `kto-train` grow, and with what they do not; ours alone, real processes on made-up rows.

    python benchmarks/train_scaling.py
    python benchmarks/train_scaling.py --parts vocabulary prompts --check
    python benchmarks/train_scaling.py --quick        # smaller, to see that it works

- rows: training time grows with the number of rows, peak memory does not;
- length: the same number of tokens in rows of 128 to 1024: time per token grows by attention's share alone;
- vocabulary: 32,000 against 152,000: memory beyond weights, gradients and optimizer states must not differ by more than
  10 %. What a run holds beyond them is its peak memory less that of a run of the same model on rows of a few tokens: both
  hold the same weights, gradients, moments and libraries;
- prompts: 64 or 960 tokens of prompt before 40 of completion: likewise, under one --max-tokens;
- logging: --logging-steps 1 against 1000, medians of interleaved repeats; must cost less than 2 % of a step.

CPU, float32, a Llama with random weights. Peak memory is resident, of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from environments import load_average, offline_env
from measured_run import run_measured
from text_table import text_table
from workload import ModelShape, Row, save_llama, train_tokenizer

SHAPE = ModelShape(hidden=256, layers=6, heads=4, intermediate=688, vocabulary=32_000)
LARGE_VOCABULARY = 152_000
LOGGING_BOUND, MEMORY_BOUND = 0.02, 0.10
WORDS = 200  # of one token each


@dataclass(frozen=True)
class Point:
    """One training run: seconds of training, peak memory in MiB, tokens of its labelled rows, seconds of each step."""

    seconds: float
    peak_mib: float
    tokens: int
    updates: int


@dataclass(frozen=True)
class Bench:
    """Where the runs lie, and how large they are."""

    work: Path
    quick: bool

    def rows(self, count: int) -> int:
        return max(8, count // 8) if self.quick else count

    def cache(self, name: str, shape: ModelShape, rows: int, prompt: int, completion: int) -> Path:
        """A reference cache of rows with so many tokens in prompt and completion (the template's few come on top)."""
        folder = self.work / name
        folder.mkdir(parents=True)
        data = [_row(i, prompt, completion) for i in range(rows)]
        (folder / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        tokenizer = train_tokenizer(data, vocabulary=shape.vocabulary)
        tokenizer.save_pretrained(folder / "model")
        save_llama(folder / "model", tokenizer, shape=shape, seed=0)
        command = [_command("kto-precompute"), "--model", folder / "model", "--data", folder / "feedback.jsonl"]
        command += ["--out", folder / "refs", "--max-length", "4096", "--device", "cpu", "--dtype", "float32"]
        run_measured(command, log=folder / "precompute.txt", env=offline_env(folder))
        return folder / "refs"

    def train(self, cache: Path, name: str, *options: str) -> Point:
        """One epoch with `kto-train`."""
        out = cache.parent / name
        command: list[str | Path] = [_command("kto-train"), "--cache", cache, "--out", out, "--save-steps", "0"]
        command += ["--device", "cpu", "--dtype", "float32", "--batch-size", "16", *options]
        measured = run_measured(command, log=out.with_suffix(".txt"), env=offline_env(cache.parent))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        tokens = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))["run"]["tokens"]
        return Point(records[-1]["train_runtime"], measured.peak_mib, tokens, records[-1]["step"])

    def activations(self, name: str, shape: ModelShape, prompt: int, completion: int) -> tuple[Point, float]:
        """A run, and MiB at its peak beyond what a run of the same model on rows of a few tokens holds."""
        whole = self.train(self.cache(name, shape, self.rows(64), prompt, completion), "run")
        return whole, whole.peak_mib - self.train(self.cache(f"{name}-short", shape, 16, 2, 2), "run").peak_mib


def _command(name: str) -> Path:
    return Path(sys.executable).parent / name


def _row(number: int, prompt: int, completion: int) -> Row:
    def text(length: int, start: int) -> str:
        return " ".join(f"w{(start + 7 * i * (i + number)) % WORDS:03d}" for i in range(length))

    return {
        "prompt": [{"role": "user", "content": text(prompt, 13 * number)}],
        "completion": [{"role": "assistant", "content": text(completion, 29 * number + 5)}],
        "label": number % 2 == 0,
    }


def rows_part(bench: Bench) -> tuple[str, list[str]]:
    """Time against the number of rows."""
    table = []
    for count in (32, 64, 128):
        point = bench.train(bench.cache(f"rows-{count}", SHAPE, bench.rows(count), 100, 100), "run")
        table.append([f"{bench.rows(count)} rows", f"{point.seconds:.1f}", f"{point.peak_mib:,.0f}"])
    return text_table(["", "train, s", "peak, MiB"], table), []


def length_part(bench: Bench) -> tuple[str, list[str]]:
    """Time per token against the length of rows, at one number of tokens."""
    table = []
    for length in (128, 256, 512, 1024):
        cache = bench.cache(f"length-{length}", SHAPE, bench.rows(32_768 // length), length // 2, length // 2)
        point = bench.train(cache, "run")
        rate = point.tokens / point.seconds
        table.append([f"about {length} tokens", f"{point.seconds:.1f}", f"{rate:,.0f}", f"{point.peak_mib:,.0f}"])
    return text_table(["", "train, s", "tokens/s", "peak, MiB"], table), []


def vocabulary_part(bench: Bench) -> tuple[str, list[str]]:
    """Activations with a small and with a large vocabulary."""
    found = []
    for vocabulary in (SHAPE.vocabulary, LARGE_VOCABULARY):
        shape = ModelShape(SHAPE.hidden, SHAPE.layers, SHAPE.heads, SHAPE.intermediate, vocabulary)
        point, extra = bench.activations(f"vocabulary-{vocabulary}", shape, 60, 200)
        found.append((f"vocabulary {vocabulary:,}", point, extra))
    return _activations_table(found)


def prompts_part(bench: Bench) -> tuple[str, list[str]]:
    """Activations with short and with long prompts."""
    found = []
    for prompt in (64, 960):
        point, extra = bench.activations(f"prompt-{prompt}", SHAPE, prompt, 40)
        found.append((f"prompts of about {prompt} tokens", point, extra))
    return _activations_table(found)


def _activations_table(found: list[tuple[str, Point, float]]) -> tuple[str, list[str]]:
    table = [[name, f"{p.seconds:.1f}", f"{p.peak_mib:,.0f}", f"{extra:,.0f}"] for name, p, extra in found]
    (_, _, first), (name, _, second) = found
    grown = second / first - 1
    missed = [f"{name}: {grown:+.0%} activations, allowed {MEMORY_BOUND:.0%}"] if grown > MEMORY_BOUND else []
    return text_table(["", "train, s", "peak, MiB", "beyond the model's own, MiB"], table), missed


def logging_part(bench: Bench) -> tuple[str, list[str]]:
    """What a log record in every step costs."""
    cache = bench.cache("logging", SHAPE, bench.rows(128), 60, 60)
    seconds: dict[int, list[float]] = {1: [], 1000: []}
    for repeat in range(2 if bench.quick else 5):
        for steps, values in seconds.items():
            point = bench.train(cache, f"log-{steps}-{repeat}", "--logging-steps", str(steps))
            values.append(point.seconds / point.updates)
    each, seldom = (statistics.median(values) for values in seconds.values())
    cost = each / seldom - 1
    table = [["every step", f"{each:.3f}"], ["never", f"{seldom:.3f}"], ["cost", f"{cost:+.1%}"]]
    missed = [f"logging costs {cost:.1%} of a step, allowed {LOGGING_BOUND:.0%}"] if cost > LOGGING_BOUND else []
    return text_table(["log records", "s for a step"], table), missed


PARTS: dict[str, Callable[[Bench], tuple[str, list[str]]]] = {
    "rows": rows_part,
    "length": length_part,
    "vocabulary": vocabulary_part,
    "prompts": prompts_part,
    "logging": logging_part,
}


def main() -> int:
    """Run the parts, print their tables, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="an eighth of the rows")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bound is not kept")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores; {load_average()}", flush=True)
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.parts:
            table, lines = PARTS[name](Bench(Path(temporary), args.quick))
            print(f"\n{name}\n{table}", flush=True)
            missed += lines
    print("".join(f"\nMISSED {line}" for line in missed))
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
