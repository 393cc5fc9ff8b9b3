"""Measure what caches of 10,000 to 1,000,000 rows cost: start-up to the first batch, memory, verification, random reads.

    python benchmarks/cache_scale.py
    python benchmarks/cache_scale.py --rows 20000      # a small one, as a quick test
    python benchmarks/cache_scale.py --tokens 300      # longer rows; a million take 3 GB
    python benchmarks/cache_scale.py --held-out 4000   # also a run with so many held-out rows
    python benchmarks/cache_scale.py --check           # exit 1 if the last cache misses a promise

Synthetic rows of 60 tokens (30 of prompt, 30 of completion, one mismatched completion of 30) with random ids and
scores, which do not compress: real caches are smaller. Every reader runs in its own process. The files were just
written, so the system caches them if it has room. The model is tiny, so that the cache dominates the measurement. CPU
seconds count all threads: two free cores read twice the rows of one CPU second. Memory is the peak of anonymous memory of
kto-train, up to the line of its first update and to its end, beyond that of a run with 64 rows; mapped files are left out,
since the system takes their pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from anonymous_memory import sampled_peak
from measured_run import run_measured
from text_table import text_table
from workload import SMALL, make_workload

from offline_kto.kto_core.cache.labels_hash import labels_hash_of
from offline_kto.kto_core.cache.manifest import FORMAT, fingerprint, identity_of, read_manifest, write_manifest
from offline_kto.kto_core.cache.places import PLACE
from offline_kto.kto_core.cache.row_schema import SCHEMA
from offline_kto.kto_core.cache.shards import shard_name, write_table
from offline_kto.kto_core.hashing import file_hashes, json_hash
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute

ROWS_PER_SHARD, BATCH = 4096, 32
SCHEMA_WITH_PLACES = pa.schema([*SCHEMA, pa.field(PLACE, pa.string(), nullable=False)])
MOST_SECONDS, MOST_MIB, LEAST_ROWS = 12.0, 150.0, 1500.0  # two cores read 3,000 rows a second
FIRST_BATCH, BEYOND = "kto-train to its first batch, {}", "kto-train, memory beyond that with 64 rows, {}"
HELD_OUT = "kto-train with {} held-out rows, memory beyond that with an eighth of them, {}"
# Passes of 4,096 tokens, which an eighth of the held-out rows fills: memory grows up to the first full pass.
SMALL_PASSES = ("--max-tokens", "1024")
READS = "random reads of one core"


def lists(values: pa.Array | np.ndarray, count: int, width: int) -> pa.ListArray:
    """Return `count` lists of `width` values."""
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * width), pa.array(values))


def synthetic_table(first: int, count: int, *, width: int, vocabulary: int) -> pa.Table:
    """Return rows `first` to `first + count`, with `width` tokens in prompt and completions."""
    random = np.random.default_rng(first)

    def ids() -> pa.ListArray:
        return lists(random.integers(3, vocabulary, count * width).astype(np.int32), count, width)

    def scores() -> np.ndarray:
        return -random.exponential(2.0, (count, width)).astype(np.float32)

    logps, kl_logps = scores(), scores()
    names = pa.array([f"{first + i:032x}" for i in range(count)])
    columns = {
        "row_id": names,
        "prompt_id": names,
        "pair_id": pa.nulls(count, pa.string()),
        "source": pa.array(np.arange(first, first + count)),
        "prompt_ids": ids(),
        "completion_ids": ids(),
        "label": pa.array(random.random(count) < 0.5),
        "ref_logps": pa.array(logps.sum(1, dtype=np.float64)),
        "ref_token_logps": lists(logps.ravel(), count, width),
        "kl_completion_ids": lists(ids(), count, 1),
        "ref_kl_logps": lists(kl_logps.sum(1, dtype=np.float64), count, 1),
        "ref_kl_token_logps": lists(lists(kl_logps.ravel(), count, width), count, 1),
        PLACE: pa.array([f"feedback.jsonl:{first + i + 1}" for i in range(count)]),
    }
    return pa.table(columns, schema=SCHEMA_WITH_PLACES)


def make_cache(folder: Path, small: Path, rows: int, *, width: int, vocabulary: int) -> None:
    """Write a cache of synthetic rows with the reference identity of a small real cache."""
    made = read_manifest(small)
    (folder / "train").mkdir(parents=True)
    names, counts, desirable = [], [], 0
    for number, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        names.append(shard_name(number))
        counts.append(min(ROWS_PER_SHARD, rows - first))
        table = synthetic_table(first, counts[-1], width=width, vocabulary=vocabulary)
        metadata = {"format": FORMAT, "key": json_hash(first), "identity": made.identity}
        write_table(folder / names[-1], table, metadata)
        desirable += table["label"].to_numpy().sum().item()
    paths = [folder / name for name in names]
    shards = [
        {"file": name, "rows": count, "bytes": path.stat().st_size, "sha256": digest}
        for name, count, path, digest in zip(names, counts, paths, file_hashes(paths), strict=True)
    ]
    parts = {
        name: getattr(made, name)
        for name in ("reference", "tokenizer", "tokenization", "pairing", "scorer", "data", "run")
    }
    rows_hash = json_hash(rows)
    parts["data"] = {
        **parts["data"],
        "read": rows,
        "kept": rows,
        "desirable": desirable,
        "undesirable": rows - desirable,
        "duplicates": 0,
        "contradictions": 0,
        "rows_hash": rows_hash,
        "labels_hash": labels_hash_of(paths, made.columns),
    }
    write_manifest(folder, parts, shards, fingerprint(identity_of(parts), parts["pairing"], rows_hash))


def read(folder: Path, batches: int) -> None:
    """Open a cache three times, read batches as training does, and print the measurements; runs in its own process."""
    from offline_kto.train.data.batches import BatchLoader, EpochBatches, strata_of, units_of
    from offline_kto.train.data.cache_rows import CacheRows

    found = {}
    for name, trusts in (("first", False), ("full", False), ("changed", True)):
        rows = CacheRows(folder, trust_unchanged=trusts)
        found[name] = rows.seconds
    strata = strata_of(rows, units_of(rows, np.arange(len(rows)), 1), balance=True)
    loader = iter(BatchLoader(rows, EpochBatches(strata, BATCH, shuffle=True, seed=0)))
    next(loader)
    started, used, count = time.perf_counter(), time.process_time(), 0
    for _, batch in zip(range(batches), loader, strict=False):
        count += len(batch)
    found["rate"] = count / (time.perf_counter() - started)
    found["cpu_rate"] = count / (time.process_time() - used)
    print(json.dumps(found))


def run_reader(folder: Path, batches: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--read", str(folder), "--batches", str(batches)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


@dataclass(frozen=True)
class Start:
    """A kto-train of one update.

    Attributes:
        seconds: to its first batch.
        cpu_seconds: of all of it.
        update_mib, peak_mib: peak of its anonymous memory up to its first update, and up to its end.
    """

    seconds: float
    cpu_seconds: float
    update_mib: float
    peak_mib: float


def run_training(cache: Path, out: Path, *options: str) -> Start:
    """Run the real kto-train for one update."""
    command = [sys.executable, "-c", "from offline_kto.train.cli import train; train()"]
    command += ["--cache", str(cache), "--out", str(out), *options]
    command += ["--max-steps", "1", "--batch-size", str(BATCH), "--save-steps", "0", "--device", "cpu"]
    command += ["--allow-different-policy"]  # the scores are random numbers
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    times, said, to_update = {}, [], 0
    with sampled_peak(process.pid) as peak:
        for line in process.stdout:
            said.append(line)
            word = line.split()[0] if line.strip() else ""
            if word == "step" and not to_update:
                to_update = peak[0]
            times.setdefault(word, time.perf_counter() - started)
    _, status, usage = os.wait4(process.pid, 0)
    if status or "step" not in times:
        raise RuntimeError(f"kto-train failed: {command}\n{''.join(said)}")
    return Start(times["start"], usage.ru_utime + usage.ru_stime, to_update / 2**20, peak[0] / 2**20)


def measure_held_out(work: Path, cache: Path, rows: int, held_out: int) -> list[tuple[str, float, str]]:
    """Return the memory of a run with held-out rows, beyond that of a run of the same cache with an eighth of them."""

    def held(count: int) -> Start:
        # No samples: completing prompts takes longer than all the rest.
        options = "--eval-fraction", str(count / rows), "--samples", "0", "--verify", "changed", *SMALL_PASSES
        return run_training(cache, work / f"{rows}-held-{count}", *options)

    some, many = held(held_out // 8), held(held_out)
    return [
        (HELD_OUT.format(f"{held_out:,}", "to its first update"), many.update_mib - some.update_mib, "MiB"),
        (HELD_OUT.format(f"{held_out:,}", "to its end"), many.peak_mib - some.peak_mib, "MiB"),
    ]


def measure(work: Path, rows: int, width: int, held_out: int) -> list[tuple[str, float, str]]:
    """Return name, value and unit of every measurement of one cache."""
    small, large = work / "small", work / f"rows{rows}"
    print(f"writing {rows:,} rows", flush=True)
    make_cache(large, small, rows, width=width, vocabulary=SMALL.vocabulary)
    time.sleep(3)  # files that were written just now are not remembered
    size = sum(path.stat().st_size for path in large.rglob("*.parquet"))
    base = run_training(small, work / f"{rows}-small")
    first = run_training(large, work / f"{rows}-first")
    again = run_training(large, work / f"{rows}-again")
    changed = run_training(large, work / f"{rows}-changed", "--verify", "changed")
    of_held_out = measure_held_out(work, large, rows, held_out) if held_out else []
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    reader = run_reader(large, batches=1500)
    verify = [sys.executable, "-c", "from offline_kto.precompute.cli import cache; cache()", "verify", str(large)]
    verified = run_measured(verify, log=work / "verify.log")
    shutil.rmtree(large)
    return [
        ("files", size / 1e9, "GB"),
        ("verification, first time", reader["first"], "s"),
        ("verification, known content (--verify full)", reader["full"], "s"),
        ("verification, unchanged files (--verify changed)", reader["changed"], "s"),
        ("kto-cache verify, whole process", verified.seconds, "s"),
        (FIRST_BATCH.format("first time"), first.seconds, "s"),
        (FIRST_BATCH.format("again"), again.seconds, "s"),
        (FIRST_BATCH.format("--verify changed"), changed.seconds, "s"),
        (FIRST_BATCH.format("64 rows"), base.seconds, "s"),
        ("kto-train, one update, first time", first.cpu_seconds, "CPU s"),
        ("kto-train, one update, again", again.cpu_seconds, "CPU s"),
        ("kto-train, one update, --verify changed", changed.cpu_seconds, "CPU s"),
        ("kto-train, one update, 64 rows", base.cpu_seconds, "CPU s"),
        (BEYOND.format("first time"), first.update_mib - base.update_mib, "MiB"),
        (BEYOND.format("again"), again.update_mib - base.update_mib, "MiB"),
        (BEYOND.format("first time, to the end"), first.peak_mib - base.peak_mib, "MiB"),
        (BEYOND.format("again, to the end"), again.peak_mib - base.peak_mib, "MiB"),
        *of_held_out,
        ("random reads", reader["rate"], "rows/s"),
        (READS, reader["cpu_rate"], "rows/CPU s"),
    ]


def main() -> int:
    """Measure and print one table for each cache; with --check, exit 1 if a promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=60, help="of prompt and completion together")
    parser.add_argument("--held-out", type=int, default=0, help="rows to hold out in a further run of each cache")
    parser.add_argument("--check", action="store_true", help="exit 1 if the last cache misses a promise")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=1500, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        read(args.read, args.batches)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(work / "own")
        made = make_workload(work / "workload", data=None, num_rows=64, shape=SMALL, seed=0)
        precompute(PrecomputeConfig(model=str(made.model), data=str(made.data), out=work / "small"))
        for rows in args.rows:
            found = measure(work, rows, args.tokens // 2, args.held_out)
            title = f"{rows:,} rows of {args.tokens} tokens"
            print(text_table([title, "", ""], [[n, f"{v:,.2f}", u] for n, v, u in found]), flush=True)
    values = {name: value for name, value, _ in found}
    missed = values[FIRST_BATCH.format("first time")] > MOST_SECONDS
    missed |= values[BEYOND.format("first time")] > MOST_MIB
    missed |= values[READS] < LEAST_ROWS
    if args.check:
        promise = (
            f"{MOST_SECONDS:.0f} s and {MOST_MIB:.0f} MiB to the first batch, {LEAST_ROWS:,.0f} rows/s of one core"
        )
        print("MISSED" if missed else "kept", f"({promise})")
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
