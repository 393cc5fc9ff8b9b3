"""Measure what the plan files of shards cost the process that leads workers.

    python benchmarks/plan_files.py [--rows-per-shard 4096] [--shards 8] [--partners 1] [--threads 1 2 4]

Rows have random ids: prompts of 60 to 179 tokens and completions of 50 to 169, 230 together on average. Files are written
in threads, as `offline_kto.precompute.plan_ahead` does, and each number of threads writes all files once more. CPU seconds
are those of all threads; on a busy machine only they can be compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from environments import load_average
from text_table import text_table

from offline_kto.kto_core.feedback.pairing import PairableRows, pair_shuffled
from offline_kto.kto_core.hashing import ids_id, sequence_id
from offline_kto.kto_core.judgements import Judgement
from offline_kto.precompute.needs import Needs, SequenceIds
from offline_kto.precompute.plan import Plan, shard_rows
from offline_kto.precompute.plan_files import plan_path, write_plan_file
from offline_kto.precompute.shard_tables import shard_key, unscored_table
from offline_kto.precompute.spool import PlannedRow, PlannedRows, Spool

VOCABULARY = 16_000
MAX_LENGTH = 1024


def random_rows(count: int, folder: Path) -> PlannedRows:
    """Return rows with random ids, in a file in a folder."""
    random = np.random.default_rng(0)
    with Spool(folder, MAX_LENGTH) as spool:
        for number in range(count):
            lengths = int(random.integers(60, 180)), int(random.integers(50, 170))
            prompt, completion = (random.integers(0, VOCABULARY, n, dtype=np.int32) for n in lengths)
            judgement = Judgement.of_label(bool(number % 2))
            spool.add(
                PlannedRow(
                    source=number,
                    row_id=sequence_id(prompt, completion),
                    prompt_id=ids_id(prompt),
                    pair_id=None,
                    label=judgement.masses.label,
                    prompt_ids=prompt,
                    full_completion_ids=completion,
                    completion_ids=completion,
                    judgement=judgement,
                    place=f"feedback.jsonl:{number + 1}",
                )
            )
        return spool.finish(None)


def random_plan(count: int, partners: int, folder: Path) -> Plan:
    """Return a plan over random rows."""
    rows = random_rows(count, folder)
    pairable = PairableRows(rows.ids("row_id"), rows.ids("prompt_id"), rows.ids("completion_id"), rows.labels)
    pairing = pair_shuffled(pairable, partners=partners, seed=0)
    return Plan(rows, pairing, MAX_LENGTH, count, {}, [], feedback=None)  # type: ignore[arg-type]  # not used here


def main() -> None:
    """Print the cost of a shard's key, and of plan files with each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-per-shard", type=int, default=4096)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--partners", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores; {load_average()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = random_plan(given.shards * given.rows_per_shard, given.partners, folder)
        shards, table = shard_rows(plan, given.rows_per_shard), SequenceIds.of(plan)
        cpu = time.process_time()
        keys = [shard_key(plan, rows) for rows in shards]
        print(f"key of a shard: {(time.process_time() - cpu) / len(shards):.3f} CPU seconds")
        needs = Needs(plan, table, shards, missing=range(len(shards)), keys=keys, files=lambda: [])
        lock = threading.Lock()

        def write(shard: int) -> None:
            with lock:
                need = needs.of(shard)
            write_plan_file(plan_path(folder, shard), unscored_table(plan, shards[shard]), need, {"key": keys[shard]})

        write(0)  # loads what is loaded once
        lines = []
        for threads in given.threads:
            cpu, start = time.process_time(), time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(write, range(len(shards))))
            cpu, seconds = (time.process_time() - cpu) / len(shards), time.perf_counter() - start
            size = sum(plan_path(folder, shard).stat().st_size for shard in range(len(shards)))
            rows = len(plan.rows)
            lines.append([str(threads), f"{cpu:.3f}", f"{rows / seconds:,.0f}", f"{size / rows:,.0f}"])
    print(text_table(["threads", "CPU seconds a file", "rows a second", "bytes a row"], lines))


if __name__ == "__main__":
    main()
