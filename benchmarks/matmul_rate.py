"""This machine's float32 matrix products a second: the yardstick for what a training step achieves.

    python benchmarks/matmul_rate.py

The shapes are those of a small model's layers and of its output layer, and one large square; the rate is the median of
the repeats of the fastest shape. The result is kept in memory that exists already: fresh pages are not part of a product.
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
    """FLOP/s, in a process of its own, with as many threads as torch takes by itself."""
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
