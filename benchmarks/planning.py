"""Measure how fast `kto-precompute` plans: read, check, render, tokenize and pair, in rows a second and bytes a row.

    python benchmarks/planning.py [--rows 100000] [--data FILE] [--check]

Without --data, rows are conversations of one to three exchanges (see workload.py). The tokenizer is a BPE of 16,000
tokens, trained on some of the rows, with a chat template. The plan runs in a process of its own; its memory is what it
adds to the imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environments import offline_env
from text_table import text_table
from workload import SMALL, Row, make_workload, synthetic_rows

# What the project promises on two cores.
LEAST_ROWS_A_SECOND = 4000


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows of chat with a label, one on each line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def resident_kib() -> int:
    """Return the resident memory of this process; where it is not known, its peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def plan(model: str, data: str) -> None:
    """Plan in this process, and print seconds and bytes as JSON."""
    import transformers

    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.plan import make_plan

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    before, start = resident_kib(), time.perf_counter()
    made = make_plan(PrecomputeConfig(model=model, data=data), tokenizer)
    seconds = time.perf_counter() - start
    counts = made.counts()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"rows": counts.read, "seconds": seconds, "memory": memory, "tokens": counts.tokens}))


def main() -> int:
    """Measure, print the table, and with --check return 1 if planning is slower than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is slower than promised")
    parser.add_argument("--plan", nargs=2, metavar=("MODEL", "DATA"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        plan(*given.plan)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = given.data or write_rows(work / "rows.jsonl", synthetic_rows(given.rows, seed=0))
        shape = dataclasses.replace(SMALL, vocabulary=16_000)
        model = make_workload(work / "workload", data=data, num_rows=2000, shape=shape, seed=0).model
        words = [sys.executable, __file__, "--plan", str(model), str(data)]
        done = subprocess.run(words, env=offline_env(work), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    speed = found["rows"] / found["seconds"]
    row = [f"{found['rows']:,}", f"{found['seconds']:.1f}", f"{speed:,.0f}", f"{found['memory'] / found['rows']:,.0f}"]
    print(text_table(["rows", "seconds", "rows a second", "bytes a row"], [row]))
    return 1 if given.check and speed < LEAST_ROWS_A_SECOND else 0


if __name__ == "__main__":
    raise SystemExit(main())
