"""Measure how fast `kto-precompute` plans: read, check, render, tokenize and pair, in rows a second and bytes a row.

    python benchmarks/planning.py [--rows 100000] [--data FILE] [--check]

Without --data, rows are conversations of one to six turns, of 10 to 120 words each. The tokenizer is a BPE of 4,000
tokens with a chat template. The plan runs in a process of its own; its memory is what it adds to the imports.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environments import offline_env
from text_table import text_table
from workload import SMALL, make_workload

# What the project promises on two cores.
LEAST_ROWS_A_SECOND = 4000


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Write conversations with a label, one on each line."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(10, 120)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(2 * rng.randint(1, 3))]
            file.write(json.dumps({"messages": turns, "label": number % 2 == 0}) + "\n")


def plan(model: str, data: str) -> None:
    """Plan in this process, and print seconds and bytes as JSON."""
    import transformers

    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.plan import make_plan

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
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
        model = make_workload(work / "workload", data=None, num_rows=16, shape=SMALL, seed=0).model
        data = given.data
        if data is None:
            data = work / "rows.jsonl"
            write_rows(data, given.rows)
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
