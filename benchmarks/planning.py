"""Measure how `kto-precompute` plans: read, check, render, tokenize and pair.

    python benchmarks/planning.py [--rows 10000 100000 1000000] [--data FILE] [--readers N] [--check]

Without --data, rows are conversations of one to three exchanges (see workload.py), each with its own prompt. The
tokenizer is a BPE of 16,000 tokens, trained on some of the rows, with a chat template. Each size is planned in a
process of its own. Its memory is the peak of its anonymous memory, beyond the imports and the tokenizer; mapped files
are left out, since the system takes their pages back when it needs them. With several sizes the growth is fitted:
seconds and bytes as powers of the rows, and bytes as a line.

--readers N plans every size three times: on one core; in one process, whose tokenizer uses all cores; and with N processes
that read. Their CPU seconds are included, and so is their start.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anonymous_memory import anonymous_bytes, sampled_peak
from environments import load_average, offline_env
from text_table import text_table
from workload import SMALL, Row, endless_rows, make_workload

# What the project promises on two cores.
LEAST_ROWS_A_SECOND = 4000


class Planned(NamedTuple):
    """What planning took.

    Args:
        rows: Rows that were read.
        seconds: Of the plan.
        cpu: Seconds of all cores, child processes included.
        pairing: Seconds of the plan that went into pairing.
        memory: Most bytes of anonymous memory beyond the imports, counts included.
    """

    rows: int
    seconds: float
    cpu: float
    pairing: float
    memory: int


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows of chat with a label, one on each line, without holding them."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the children it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def plan(model: str, data: str, readers: str) -> None:
    """Plan in this process, and print what it took as JSON.

    Args:
        model, data: Paths.
        readers: Number of processes that read; "0" for this process on one core.
    """
    if readers == "0":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if readers == "0" and hasattr(os, "sched_setaffinity"):  # macOS has none
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import transformers

    from offline_kto.precompute import plan as planning
    from offline_kto.precompute.config import PrecomputeConfig

    seconds_of_pairing = timed(planning, "pair_shuffled")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    memory, cpu, start = anonymous_bytes(), cpu_seconds(), time.perf_counter()
    with sampled_peak(every=0.02) as peak:
        config = PrecomputeConfig(model=model, data=data, read_workers=max(1, int(readers)))
        made = planning.make_plan(config, tokenizer, folder=Path(model))
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        read = made.counts().read
    print(json.dumps(Planned(read, seconds, cpu, sum(seconds_of_pairing), peak[0] - memory)))


def timed(module: Any, name: str) -> list[float]:
    """Replace a function of a module by one that appends the seconds of every call to the list that is returned."""
    call, seconds = getattr(module, name), []

    def timed_call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(module, name, timed_call)
    return seconds


def planned(model: Path, data: Path, work: Path, readers: int = 1) -> Planned:
    """Plan a file in a process of its own; see `plan`."""
    words = [sys.executable, __file__, "--plan", str(model), str(data), str(readers)]
    done = subprocess.run(words, env=offline_env(work), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Planned(*json.loads(done.stdout.splitlines()[-1]))


def growth(found: Sequence[Planned]) -> str:
    """Return the exponents of seconds and bytes, fitted by least squares on logarithms, and the bytes of a further row."""
    rows = [one.rows for one in found]

    def exponent(values: Sequence[float]) -> float:
        return statistics.linear_regression(list(map(math.log, rows)), list(map(math.log, values))).slope

    time_power, memory_power = exponent([one.cpu for one in found]), exponent([max(one.memory, 1) for one in found])
    slope = statistics.linear_regression(rows, [one.memory for one in found]).slope
    return f"CPU seconds grow as rows^{time_power:.2f}, memory as rows^{memory_power:.2f}: {slope:,.0f} bytes for each further row"


def table(found: Sequence[Planned]) -> str:
    """Return one line for each size."""
    header = ["rows", "seconds", "rows a second", "CPU seconds", "pairing seconds", "MiB", "bytes a row"]
    return text_table(
        header,
        [
            [
                f"{one.rows:,}",
                f"{one.seconds:.1f}",
                f"{one.rows / one.seconds:,.0f}",
                f"{one.cpu:.1f}",
                f"{one.pairing:.2f}",
                f"{one.memory / 2**20:,.0f}",
                f"{one.memory / one.rows:,.0f}",
            ]
            for one in found
        ],
    )


def table_of_readers(model: Path, data: Path, work: Path, readers: int) -> str:
    """Plan a file on one core, in one process and with several; return one line for each."""
    ways = {"one core": 0, "one process": 1, f"{readers} processes that read": readers}
    found = {name: planned(model, data, work, count) for name, count in ways.items()}
    slowest = found["one core"].seconds
    rows = [
        [
            name,
            f"{one.rows:,}",
            f"{one.seconds:.1f}",
            f"{one.rows / one.seconds:,.0f}",
            f"{one.cpu:.1f}",
            f"{slowest / one.seconds:.2f}",
        ]
        for name, one in found.items()
    ]
    return text_table(["read by", "rows", "seconds", "rows a second", "CPU seconds", "times one core"], rows)


def main() -> int:
    """Measure, print the table and the growth, and with --check return 1 if the largest size is slower than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="sizes of made-up data")
    parser.add_argument("--data", type=Path, help="plan this file instead")
    parser.add_argument("--readers", type=int, help="compare one core, one process, and so many processes that read")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is slower than promised")
    parser.add_argument("--plan", nargs=3, metavar=("MODEL", "DATA", "READERS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        plan(*given.plan)
        return 0
    print(f"{os.cpu_count()} cores; {load_average()}")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shape = dataclasses.replace(SMALL, vocabulary=16_000)
        model = make_workload(work / "workload", data=given.data, num_rows=2000, shape=shape, seed=0).model
        if given.data and not given.readers:
            found.append(planned(model, given.data, work))
        for size in [] if given.data else sorted(set(given.rows)):
            data = write_rows(work / "rows.jsonl", itertools.islice(endless_rows(seed=0), size))
            if given.readers:
                print(table_of_readers(model, data, work, given.readers))
            else:
                found.append(planned(model, data, work))
        if given.readers and given.data:
            print(table_of_readers(model, given.data, work, given.readers))
    if given.readers:
        return 0
    print(table(found))
    if len(found) > 1:
        print(growth(found))
    speed = found[-1].rows / found[-1].seconds
    return 1 if given.check and speed < LEAST_ROWS_A_SECOND else 0


if __name__ == "__main__":
    raise SystemExit(main())
