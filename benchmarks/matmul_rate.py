"""Measure this machine's float32 matrix products per second, the yardstick for the rate of a training step.

    python benchmarks/matmul_rate.py

The shapes are those of a small model's layers and of its output layer, and one large square; the rate is the median of
the repeats of the fastest shape. The result is written to existing memory, so that no new pages are part of the time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = ((1024, 512, 1376), (1024, 1376, 512), (1024, 512, 8192), (2048, 2048, 2048))
REPEATS = 15


def measured_rate(python: Path) -> float:
    """Return FLOP/s, measured in a separate process with torch's default number of threads."""
    result = subprocess.run([python, __file__], capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout)["flops_per_second"])


def main() -> None:
    """Measure and print one JSON object."""
    import torch

    best = 0.0
    for rows, inner, columns in SHAPES:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out = left @ right
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * rows * inner * columns / statistics.median(seconds))
    json.dump({"flops_per_second": best, "threads": torch.get_num_threads()}, sys.stdout)


if __name__ == "__main__":
    main()
