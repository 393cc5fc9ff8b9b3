"""Measure the cost of a cache of a million rows: opening, first batch, random reads, verification, resident memory.

    python benchmarks/cache_scale.py
    python benchmarks/cache_scale.py --rows 20000      # a small one, as a quick test
    python benchmarks/cache_scale.py --check           # exit 1 if kto-train needs 20 s or 2 GB to its first batch

Synthetic rows of 300 tokens (150 of prompt, 150 of completion, one mismatched completion of 150) with random ids and
scores, which do not compress: real caches are smaller. Every reader runs in its own process. The files were just
written, so the system caches them if it has room. The model is tiny, so that the cache dominates the measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from measured_run import run_measured
from text_table import text_table
from workload import SMALL, make_workload

from offline_kto.kto_core.cache.manifest import FORMAT, fingerprint, identity_of, read_manifest, write_manifest
from offline_kto.kto_core.cache.places import PLACE
from offline_kto.kto_core.cache.shards import SCHEMA, shard_name, write_table
from offline_kto.kto_core.hashing import file_hashes, json_hash
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute

PROMPT, COMPLETION, ROWS_PER_SHARD, BATCH = 150, 150, 4096, 32
SCHEMA_WITH_PLACES = pa.schema([*SCHEMA, pa.field(PLACE, pa.string(), nullable=False)])
MOST_SECONDS, MOST_MIB = 20.0, 2000 * 1e6 / 2**20


def lists(values: pa.Array | np.ndarray, count: int, width: int) -> pa.ListArray:
    """Return `count` lists of `width` values."""
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * width), pa.array(values))


def write_synthetic_shard(path: Path, first: int, count: int, vocabulary: int, metadata: dict[str, object]) -> int:
    """Write rows `first` to `first + count` as kto-precompute would, and return how many are desirable."""
    random = np.random.default_rng(first)

    def ids(width: int) -> pa.ListArray:
        return lists(random.integers(3, vocabulary, count * width).astype(np.int32), count, width)

    def scores() -> np.ndarray:
        return -random.exponential(2.0, (count, COMPLETION)).astype(np.float32)

    logps, kl_logps = scores(), scores()
    names = pa.array([f"{first + i:032x}" for i in range(count)])
    labels = random.random(count) < 0.5
    columns = {
        "row_id": names,
        "prompt_id": names,
        "pair_id": pa.nulls(count, pa.string()),
        "source": pa.array(np.arange(first, first + count)),
        "prompt_ids": ids(PROMPT),
        "completion_ids": ids(COMPLETION),
        "label": pa.array(labels),
        "ref_logps": pa.array(logps.sum(1, dtype=np.float64)),
        "ref_token_logps": lists(logps.ravel(), count, COMPLETION),
        "kl_completion_ids": lists(ids(COMPLETION), count, 1),
        "ref_kl_logps": lists(kl_logps.sum(1, dtype=np.float64), count, 1),
        "ref_kl_token_logps": lists(lists(kl_logps.ravel(), count, COMPLETION), count, 1),
        PLACE: pa.array([f"feedback.jsonl:{first + i + 1}" for i in range(count)]),
    }
    write_table(path, pa.table(columns, schema=SCHEMA_WITH_PLACES), metadata)
    return int(labels.sum())


def make_cache(folder: Path, small: Path, rows: int, vocabulary: int) -> None:
    """Write a cache of synthetic rows with the reference identity of a small real cache."""
    made = read_manifest(small)
    (folder / "train").mkdir(parents=True)
    names, counts, desirable = [], [], 0
    for number, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        names.append(shard_name(number))
        counts.append(min(ROWS_PER_SHARD, rows - first))
        metadata = {"format": FORMAT, "key": json_hash(first), "identity": made.identity}
        desirable += write_synthetic_shard(folder / names[-1], first, counts[-1], vocabulary, metadata)
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
        "rows_hash": rows_hash,
    }
    write_manifest(folder, parts, shards, fingerprint(identity_of(parts), parts["pairing"], rows_hash))


def peak_mib() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def read(folder: Path, batches: int) -> None:
    """Open a cache, read batches as training does, and print the measurements; runs in its own process."""
    from offline_kto.train.data.batches import BatchLoader, EpochBatches, strata_of, units_of
    from offline_kto.train.data.cache_rows import CacheRows

    imported, started = peak_mib(), time.perf_counter()
    rows = CacheRows(folder)
    opened = time.perf_counter()
    loader = iter(
        BatchLoader(
            rows,
            EpochBatches(
                strata_of(rows, units_of(rows, range(len(rows)), 1), balance=True), BATCH, shuffle=True, seed=0
            ),
        )
    )
    next(loader)
    first = time.perf_counter()
    for _ in range(batches - 1):
        next(loader)
    ended = time.perf_counter()
    found = {
        "open": opened - started,
        "first": first - opened,
        "rate": (batches - 1) * BATCH / (ended - first),
        "mib": peak_mib() - imported,
    }
    print(json.dumps(found))


def run_reader(folder: Path, batches: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--read", str(folder), "--batches", str(batches)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def run_training(cache: Path, out: Path) -> tuple[float, float, float]:
    """Run the real kto-train.

    Returns:
        Seconds to the first batch, seconds to the end of the first update, peak MiB.
    """
    command = [
        sys.executable,
        "-c",
        "from offline_kto.train.cli import train; train()",
        "--cache",
        str(cache),
        "--out",
        str(out),
    ]
    command += ["--max-steps", "1", "--batch-size", str(BATCH), "--save-steps", "0", "--device", "cpu"]
    command += ["--allow-different-policy"]  # the scores are random numbers
    started = time.perf_counter()
    times = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        times.setdefault(line.split()[0] if line.strip() else "", time.perf_counter() - started)
    _, status, usage = os.wait4(process.pid, 0)
    if status or "step" not in times:
        raise RuntimeError(f"kto-train failed: {command}")
    return times["start"], times["step"], usage.ru_maxrss / 1024


def plan_bytes_per_row(work: Path) -> tuple[float, float]:
    """Measure the memory that each further row of feedback costs kto-precompute, which pairs all rows.

    Returns:
        Bytes of text and resident bytes per row.
    """
    peaks, sizes = [], []
    for count in (4000, 20000):
        made = make_workload(work / str(count), data=None, num_rows=count, shape=SMALL, seed=0)
        command = [sys.executable, "-c", "from offline_kto.precompute.cli import precompute; precompute()", "--dry-run"]
        command += ["--model", str(made.model), "--data", str(made.data), "--max-length", "1024"]
        peaks.append(run_measured(command, log=work / f"plan{count}.log").peak_mib * 2**20)
        sizes.append(made.data.stat().st_size)
    return (sizes[1] - sizes[0]) / 16000, (peaks[1] - peaks[0]) / 16000


def measure(work: Path, rows: int) -> list[tuple[str, float, str]]:
    """Return name, value and unit of every measurement."""
    made = make_workload(work / "workload", data=None, num_rows=64, shape=SMALL, seed=0)
    small, large = work / "small", work / "large"
    precompute(PrecomputeConfig(model=str(made.model), data=str(made.data), out=small))
    print(f"writing {rows:,} rows", flush=True)
    make_cache(large, small, rows, SMALL.vocabulary)
    size = sum(path.stat().st_size for path in large.rglob("*.parquet"))
    reader = run_reader(large, batches=200)
    verify = [sys.executable, "-c", "from offline_kto.precompute.cli import cache; cache()", "verify", str(large)]
    verified = run_measured(verify, log=work / "verify.log")
    base_first, _, base_peak = run_training(small, work / "run-small")
    first, updated, peak = run_training(large, work / "run-large")
    text, resident = plan_bytes_per_row(work / "plans")
    return [
        ("files", size / 1e9, "GB"),
        ("open, every byte and row verified", reader["open"], "s"),
        ("first batch after that", reader["first"] * 1e3, "ms"),
        ("shuffled reading", reader["rate"], "rows/s"),
        ("resident beyond the imports, 200 batches in", reader["mib"], "MiB"),
        ("kto-cache verify, whole process", verified.seconds, "s"),
        ("kto-cache verify, rate", size / 1e9 / verified.seconds, "GB/s"),
        ("kto-train to its first batch", first, "s"),
        ("the same with 64 rows", base_first, "s"),
        ("kto-train to the end of its first update", updated, "s"),
        ("kto-train, resident beyond the run with 64 rows", peak - base_peak, "MiB"),
        ("kto-train, resident, all of it", peak, "MiB"),
        ("kto-precompute: text of a row", text, "bytes"),
        ("kto-precompute: resident for each further row", resident, "bytes"),
    ]


def main() -> int:
    """Measure and print one table; with --check, exit 1 if a promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: a million")
    parser.add_argument("--check", action="store_true", help="exit 1 where a promise is missed")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=200, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        read(args.read, args.batches)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary), args.rows)
    print(
        text_table(
            [f"{args.rows:,} rows of {PROMPT + COMPLETION} tokens", "", ""], [[n, f"{v:,.2f}", u] for n, v, u in found]
        )
    )
    values = {name: value for name, value, _ in found}
    missed = values["kto-train to its first batch"] > MOST_SECONDS
    missed |= values["kto-train, resident beyond the run with 64 rows"] > MOST_MIB
    if args.check:
        print("MISSED" if missed else "kept", f"({MOST_SECONDS:.0f} s and {MOST_MIB:.0f} MiB to the first batch)")
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
