"""Measure how fast `kto-precompute` plans, in rows a second, and the memory that it takes, in bytes a row.

    python benchmarks/planning.py [--rows 10000 100000 1000000] [--data FILE] [--check]

Planning is to read, check, render, tokenize and pair, and to count what is scored. Without --data, rows are
conversations of one to three exchanges (see workload.py), each with its own prompt. The tokenizer is a BPE of 16,000
tokens, trained on some of the rows, with a chat template. Each plan runs in a process of its own; its memory is what it
adds to the imports, without the pages of mapped files. The last line fits memory and time to the number of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from environments import offline_env
from text_table import text_table
from workload import SMALL, make_workload, synthetic_rows

# What the project promises on two cores.
LEAST_ROWS_A_SECOND = 4000


# What the project promises of 1,000,000 rows.
MOST_MIB = 250
# Rows that are made; more of them repeat these with a number.
MADE_ROWS = 10_000


def write_rows(path: Path, count: int) -> Path:
    """Write rows of chat with a label, one on each line; no two have the same prompt."""
    made = synthetic_rows(min(count, MADE_ROWS), seed=0)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, MADE_ROWS):
            for row in made[: count - start]:
                first, *others = row["prompt"]
                numbered = {**first, "content": f"{first['content']} ({start})"} if start else first
                file.write(json.dumps({**row, "prompt": [numbered, *others]}) + "\n")
    return path


def anonymous_kib() -> int:
    """Return the memory of this process without mapped files; where that is not known, its peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Peak:
    """Watches the memory of this process in a thread."""

    def __init__(self) -> None:
        self.before = self.kib = anonymous_kib()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.kib = max(self.kib, anonymous_kib())
            time.sleep(0.02)


def plan(model: str, data: str) -> None:
    """Plan in this process, and print seconds of planning, and bytes at their peak, as JSON."""
    import transformers

    from offline_kto.kto_core.runtime import keep_freed_memory
    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.plan import make_plan

    keep_freed_memory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    peak, start = Peak(), time.perf_counter()
    made = make_plan(PrecomputeConfig(model=model, data=data), tokenizer)
    seconds = time.perf_counter() - start
    counts = made.counts()
    memory = (max(peak.kib, anonymous_kib()) - peak.before) * 1024
    print(json.dumps({"rows": counts.read, "seconds": seconds, "memory": memory, "tokens": counts.tokens}))


def measured(work: Path, model: Path, data: Path) -> dict[str, float]:
    """Return what `plan` prints in a process of its own."""
    words = [sys.executable, __file__, "--plan", str(model), str(data)]
    done = subprocess.run(words, env=offline_env(work), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(found: list[dict[str, float]]) -> str:
    """Return how memory and time grow with the rows, by least squares: bytes a row, and the exponent of the time."""
    rows, memory, seconds = (np.array([one[name] for one in found]) for name in ("rows", "memory", "seconds"))
    a_row, fixed = np.polyfit(rows, memory, 1)
    exponent = np.polyfit(np.log(rows), np.log(seconds), 1)[0]
    return (
        f"growth: {a_row:,.0f} bytes a row beyond {fixed / 2**20:,.0f} MiB, so 1,000,000 rows take "
        f"{(a_row * 10**6 + fixed) / 2**20:,.0f} MiB; seconds grow as rows^{exponent:.2f}"
    )


def main() -> int:
    """Measure, print the table, and with --check return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is slower or larger than promised")
    parser.add_argument("--plan", nargs=2, metavar=("MODEL", "DATA"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        plan(*given.plan)
        return 0
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        sample = given.data or write_rows(work / "sample.jsonl", 2000)
        shape = dataclasses.replace(SMALL, vocabulary=16_000)
        model = make_workload(work / "workload", data=sample, num_rows=2000, shape=shape, seed=0).model
        for count in [0] if given.data else sorted(given.rows):
            found.append(measured(work, model, given.data or write_rows(work / "rows.jsonl", count)))
    table = [
        [
            f"{one['rows']:,}",
            f"{one['seconds']:.1f}",
            f"{one['rows'] / one['seconds']:,.0f}",
            f"{one['memory'] / 2**20:,.0f}",
        ]
        for one in found
    ]
    print(text_table(["rows", "seconds", "rows a second", "MiB"], table))
    if len(found) > 1:
        print(growth(found))
    is_slow = any(one["rows"] / one["seconds"] < LEAST_ROWS_A_SECOND for one in found)
    is_large = any(one["memory"] > MOST_MIB * 2**20 * max(1, one["rows"] / 10**6) for one in found)
    return 1 if given.check and (is_slow or is_large) else 0


if __name__ == "__main__":
    raise SystemExit(main())
