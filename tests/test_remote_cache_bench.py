import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/remote_cache.py"


@pytest.mark.slow
def test_the_benchmark_of_remote_caches_trains_from_a_bucket():
    """One shard on moto's server, behind a network that is hardly slow."""
    sizes = ["--rows", "4096", "--megabytes", "100", "--latency", "0.001"]
    done = subprocess.run([sys.executable, SCRIPT, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, needed = done.stdout.split("rows       update 1")
    values = {line[:45].strip(): float(line[45:].split()[0]) for line in measured.splitlines()[2:]}
    assert values["shards"] == 1
    runs = [values[name] for name in values if "first batch" in name or "the same from S3" in name]
    assert len(runs) == 3
    assert min(runs) > 0
    assert needed.splitlines()[2].split() == ["4,096", *["100%"] * 4]
