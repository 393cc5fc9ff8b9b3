"""Measure what Ray adds to scoring with the real scorer: one worker on a simulated node beside one process.

    python benchmarks/ray_overhead.py [--shards 20] [--rows-per-shard 32] [--repeat 2]

Both score the same rows with the same small model, one thread of torch each, in turns. The time is that between the end of
the first shard and the end of the last one, so that no start-up counts; the overhead is its part that is not scoring,
which a busy machine changes less than the time itself. A run takes two minutes of a core. Needs Ray.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from environments import load_average, offline_env
from ray_nodes import OBJECT_STORE_BYTES
from text_table import text_table
from workload import ModelShape, Workload, make_workload

from offline_kto.kto_core.cache.manifest import read_manifest

SHAPE = ModelShape(hidden=256, layers=6, heads=4, intermediate=704, vocabulary=4096)
SCORE = "from offline_kto.precompute.cli import precompute; precompute()"


class Scored(NamedTuple):
    """A run: seconds between the first and the last shard, and those of them in which it scored."""

    seconds: float
    scoring: float

    @property
    def overhead(self) -> float:
        return self.seconds - self.scoring


def scored(workload: Workload, out: Path, rows_per_shard: int, *more: str) -> Scored:
    """Score a workload on the CPU.

    Args:
        more: options.
    """
    words = ["--model", workload.model, "--data", workload.data, "--out", out, "--device", "cpu"]
    words += ["--rows-per-shard", rows_per_shard, *more]
    environment = {**os.environ, **offline_env(out.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCORE, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    ends = sorted(path.stat().st_mtime for path in (out / "train").iterdir())  # as they were written, not moved
    share = (len(ends) - 1) / len(ends)
    return Scored(ends[-1] - ends[0], read_manifest(out).run["seconds"] * share)


def main() -> None:
    """Print every run, and the overhead of Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rows-per-shard", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which are the node's processes
    from ray.cluster_utils import Cluster

    print(f"{os.cpu_count()} cores; {load_average()}")
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    found: dict[str, list[Scored]] = {"one process": [], "one worker on Ray": []}
    try:
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            rows = given.shards * given.rows_per_shard
            workload = make_workload(work / "workload", data=None, num_rows=rows, shape=SHAPE, seed=0)
            print(workload.describe())
            for turn in range(given.repeat):
                for name, more in zip(found, ((), ("--cluster", cluster.address)), strict=True):
                    out = work / f"{name} {turn}"
                    run = scored(workload, out, given.rows_per_shard, *more)
                    found[name].append(run)
                    print(f"{name}: {run.seconds:.1f} s, of which it scored {run.scoring:.1f} s", flush=True)
    finally:
        cluster.shutdown()
    lines = [
        [name, f"{run.seconds:.1f}", f"{run.scoring:.1f}", f"{run.overhead:.1f}", f"{run.overhead / run.scoring:.1%}"]
        for name, runs in found.items()
        for run in runs
    ]
    print(text_table(["run", "seconds", "scoring", "not scoring", "of scoring"], lines))
    alone, on_ray = (statistics.mean(run.overhead / run.scoring for run in runs) for runs in found.values())
    print(f"Ray adds {on_ray - alone:.1%} of the scoring")


if __name__ == "__main__":
    main()
