"""Measure how time and memory of `kto-train` grow with rows, length, vocabulary and prompts, on synthetic rows.

    python benchmarks/train_scaling.py
    python benchmarks/train_scaling.py --parts vocabulary prompts --check
    python benchmarks/train_scaling.py --quick        # smaller, as a quick test

- rows: training time is linear in the number of rows (the middle one may be 10 % off), peak memory
  stays within 10 % (it differs by half of that from run to run);
- length: the same number of tokens in rows of 128 to 1024: time per token grows by attention's share alone;
- vocabulary: 32,000 against 152,000: memory beyond weights, gradients and optimizer states must not differ by more than
  10 %, up or down. This memory is the peak of a run less the peak of a run of the same model on rows of a few
  tokens: both have the same weights, gradients, moments and libraries. Other memory that grows with the model (such as a
  second gradient of the embeddings) cancels out as well if the first micro-batch already needs it;
- prompts: 64 or 960 tokens of prompt before 40 of completion: likewise, in passes of as many tokens;
- logging: one record for every step; accumulating, writing and printing it, measured by a timer around these calls,
  must take less than 2 % of the training time. (Runs with and without logging differ by more than that by chance.)

CPU, float32, a Llama with random weights. Peak memory is resident, of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from environments import load_average, offline_env
from measured_run import run_measured
from text_table import text_table
from workload import ModelShape, Row, save_llama, train_tokenizer

SHAPE = ModelShape(hidden=256, layers=6, heads=4, intermediate=688, vocabulary=32_000)
QUICK_SHAPE = ModelShape(hidden=64, layers=2, heads=2, intermediate=176, vocabulary=4_000)
LARGE_VOCABULARY, QUICK_LARGE_VOCABULARY = 152_000, 19_000
LOGGING_BOUND, MEMORY_BOUND, LINE_BOUND, FLAT_BOUND = 0.02, 0.10, 0.10, 0.10
# Peak memory varies by about 50 MiB between runs, so activations are measured where they are much larger.
ACTIVATION_TOKENS = 8192
WORDS = 200  # of one token each: letters only, because the tokenizer cuts between letters and digits


# `kto-train` with a timer around all logging; on a CPU no work is hidden in a queue.
TIMED_LOGGING = """
import pathlib, sys, time
from offline_kto.train.cli import train
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.accumulators import Window
seconds = 0.0
def timed(function):
    def call(*arguments, **options):
        global seconds
        started = time.perf_counter()
        result = function(*arguments, **options)
        seconds += time.perf_counter() - started
        return result
    return call
Window.add = timed(Window.add)
KTOTrainer._maybe_log_save_evaluate = timed(KTOTrainer._maybe_log_save_evaluate)
clock = sys.argv.pop(1)
try:
    train()
finally:
    pathlib.Path(clock).write_text(str(seconds))
"""


@dataclass(frozen=True)
class Point:
    """The results of one training run: training seconds, peak memory in MiB, tokens of all sequences, updates."""

    seconds: float
    peak_mib: float
    tokens: int
    updates: int


@dataclass(frozen=True)
class Bench:
    """The folder and the size of the runs."""

    work: Path
    quick: bool

    @property
    def shape(self) -> ModelShape:
        return QUICK_SHAPE if self.quick else SHAPE

    def rows(self, count: int) -> int:
        return count // 4 if self.quick else count

    def cache(self, name: str, shape: ModelShape, rows: int, prompt: int, completion: int) -> Path:
        """Return a reference cache of rows with given prompt and completion tokens (plus a few of the template)."""
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

    def train(self, cache: Path, name: str, *options: str, program: tuple[str, ...] = ()) -> Point:
        """Train one epoch with `kto-train`, or with another Python `program` that accepts the same options."""
        out = cache.parent / name
        begin = [sys.executable, *program] if program else [_command("kto-train")]
        command: list[str | Path] = [*begin, "--cache", cache, "--out", out, "--save-steps", "0"]
        command += ["--device", "cpu", "--dtype", "float32", "--batch-size", "16", *options]
        measured = run_measured(command, log=out.with_suffix(".txt"), env=offline_env(cache.parent))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        tokens = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))["run"]["tokens"]
        return Point(records[-1]["train_runtime"], measured.peak_mib, tokens, records[-1]["step"])

    def activations(self, name: str, shape: ModelShape, prompt: int, completion: int) -> tuple[Point, float]:
        """Run one update over rows that fill two passes of ACTIVATION_TOKENS.

        Returns:
            The run, and the MiB by which its peak exceeds that of the same model on rows of a few tokens.
        """
        tokens = self.rows(ACTIVATION_TOKENS)
        rows = 2 * tokens // (prompt + completion)
        cache = self.cache(name, shape, rows, prompt, completion)
        whole = self.train(cache, "run", "--batch-size", str(rows), "--max-tokens", str(tokens))
        # Row by row: even the logits of sixteen short rows would be megabytes with a large vocabulary.
        short = self.train(self.cache(f"{name}-short", shape, 16, 2, 2), "run", "--max-tokens", "1")
        return whole, whole.peak_mib - short.peak_mib


def _command(name: str) -> Path:
    return Path(sys.executable).parent / name


def _row(number: int, prompt: int, completion: int) -> Row:
    def text(length: int, start: int) -> str:
        return " ".join(_word((start + 7 * i * (i + number)) % WORDS) for i in range(length))

    return {
        "prompt": [{"role": "user", "content": text(prompt, 13 * number)}],
        "completion": [{"role": "assistant", "content": text(completion, 29 * number + 5)}],
        "label": number % 2 == 0,
    }


def _word(number: int) -> str:
    return f"w{chr(97 + number // 26)}{chr(97 + number % 26)}"


def rows_part(bench: Bench) -> tuple[str, list[str]]:
    """Measure time and peak memory against the number of rows."""
    counts = [bench.rows(count) for count in (64, 128, 256)]
    points = [bench.train(bench.cache(f"rows-{n}", bench.shape, n, 100, 100), "run") for n in counts]
    table = [[f"{n} rows", f"{p.seconds:.1f}", f"{p.peak_mib:,.0f}"] for n, p in zip(counts, points, strict=True)]
    first, middle, last = points
    # A part of the time does not depend on the rows (the check before the first update): a line is fitted, not a ratio.
    expected = first.seconds + (last.seconds - first.seconds) * (counts[1] - counts[0]) / (counts[2] - counts[0])
    off, grown = middle.seconds / expected - 1, last.peak_mib / first.peak_mib - 1
    missed = []
    if abs(off) > LINE_BOUND:
        missed.append(f"{counts[1]} rows: {off:+.0%} off the line of time over rows, allowed {LINE_BOUND:.0%}")
    if abs(grown) > FLAT_BOUND:
        missed.append(f"{counts[2]} rows: {grown:+.0%} peak memory, allowed {FLAT_BOUND:.0%}")
    return text_table(["", "train, s", "peak, MiB"], table), missed


def length_part(bench: Bench) -> tuple[str, list[str]]:
    """Measure time per token against the length of rows, at a fixed number of tokens."""
    table = []
    for length in (128, 256, 512, 1024):
        cache = bench.cache(f"length-{length}", bench.shape, bench.rows(32_768 // length), length // 2, length // 2)
        point = bench.train(cache, "run")
        rate = point.tokens / point.seconds
        table.append([f"about {length} tokens", f"{point.seconds:.1f}", f"{rate:,.0f}", f"{point.peak_mib:,.0f}"])
    return text_table(["", "train, s", "tokens/s", "peak, MiB"], table), []


def vocabulary_part(bench: Bench) -> tuple[str, list[str]]:
    """Measure activations with a small and with a large vocabulary."""
    found = []
    large = QUICK_LARGE_VOCABULARY if bench.quick else LARGE_VOCABULARY
    for vocabulary in (bench.shape.vocabulary, large):
        shape = replace(bench.shape, vocabulary=vocabulary)
        point, extra = bench.activations(f"vocabulary-{vocabulary}", shape, 60, 200)
        found.append((f"vocabulary {vocabulary:,}", point, extra))
    return _activations_table(found)


def prompts_part(bench: Bench) -> tuple[str, list[str]]:
    """Measure activations with short and with long prompts."""
    found = []
    for prompt in (64, 960):
        point, extra = bench.activations(f"prompt-{prompt}", bench.shape, prompt, 40)
        found.append((f"prompts of about {prompt} tokens", point, extra))
    return _activations_table(found)


def _activations_table(found: list[tuple[str, Point, float]]) -> tuple[str, list[str]]:
    table = [[name, f"{p.seconds:.1f}", f"{p.peak_mib:,.0f}", f"{extra:,.0f}"] for name, p, extra in found]
    (_, _, first), (name, _, second) = found
    if min(first, second) <= 0:  # the peak occurred elsewhere, in loading or saving: nothing was measured
        missed = [f"{name}: activations do not rise above those of rows of a few tokens; use larger rows"]
    else:
        grown = second / first - 1
        missed = [f"{name}: {grown:+.0%} activations, allowed {MEMORY_BOUND:.0%}"] if abs(grown) > MEMORY_BOUND else []
    return text_table(["", "train, s", "peak, MiB", "beyond the model's own, MiB"], table), missed


def logging_part(bench: Bench) -> tuple[str, list[str]]:
    """Measure the share of the training time that accumulating and writing a record in every step takes."""
    cache = bench.cache("logging", bench.shape, bench.rows(128), 60, 60)
    clock = cache.parent / "logging.json"
    options = ("--logging-steps", "1", "--batch-size", "4")
    point = bench.train(cache, "run", *options, program=("-c", TIMED_LOGGING, str(clock)))
    seconds = float(clock.read_text(encoding="utf-8"))
    share = seconds / point.seconds
    table = [
        ["one step", f"{1000 * point.seconds / point.updates:.1f}"],
        ["its record", f"{1000 * seconds / point.updates:.2f}"],
        ["share", f"{share:.2%}"],
    ]
    missed = [f"logging: {share:.1%} of a step, allowed {LOGGING_BOUND:.0%}"] if share > LOGGING_BOUND else []
    return text_table(["", "ms"], table), missed


PARTS: dict[str, Callable[[Bench], tuple[str, list[str]]]] = {
    "rows": rows_part,
    "length": length_part,
    "vocabulary": vocabulary_part,
    "prompts": prompts_part,
    "logging": logging_part,
}


def main() -> int:
    """Run the parts, print their tables, and return the verdict as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a smaller model, a quarter of the rows")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bound is not kept")
    args = parser.parse_args()
    if args.quick and args.check:
        parser.error("--quick is too small to be judged: its activations and steps drown in noise; leave --check out")
    print(f"{os.cpu_count()} cores; {load_average()}", flush=True)
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.parts:
            print(f"\n{name} ...", flush=True)
            table, lines = PARTS[name](Bench(Path(temporary), args.quick))
            print(table, flush=True)
            missed += lines
    if not args.quick:
        print("".join(f"\nMISSED {line}" for line in missed))
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
