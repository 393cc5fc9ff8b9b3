"""Print one JSON object: the card, the versions, and the rate of a product of two large matrices in TFLOP/s."""

from __future__ import annotations

import json
import time
from typing import Any


def facts() -> dict[str, Any]:
    """Return what a figure depends on; on a CPU the matrices are small."""
    import accelerate
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    size, dtype, repeats = (8192, torch.bfloat16, 10) if gpu else (256, torch.float32, 2)
    one = torch.randn(size, size, dtype=dtype, device="cuda" if gpu else "cpu")
    one @ one
    if gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        one @ one
    if gpu:
        torch.cuda.synchronize()
    rate = repeats * 2 * size**3 / (time.perf_counter() - begun)
    return {
        "card": torch.cuda.get_device_name() if gpu else "CPU",
        "memory": torch.cuda.mem_get_info()[1] if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "matmul_tflops": round(rate / 1e12, 3),
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
