"""The device of the tests marked `gpu`, and a rehearsal: `GPU_REHEARSAL=1` runs their bodies on the CPU.

Time on a GPU is short, so a typo must be found without one. In a rehearsal `DEVICE` is the CPU, there are two of it, and
`torch.cuda` answers as a card that does nothing. What only a card can show is written `assert condition or REHEARSAL`:
the condition is computed in a rehearsal too, and then passes.
"""

import os
from typing import Any

import pytest
import torch

REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
GPUS = 2 if REHEARSAL else torch.cuda.device_count() if torch.cuda.is_available() else 0

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="no CUDA device; GPU_REHEARSAL=1 runs the test's body on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # libraries say on a GPU what they do not say on a CPU
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, and there are {GPUS}")
card_only = pytest.mark.skipif(REHEARSAL, reason="cannot be rehearsed: needs the GPU's own compiler, number or driver")

_MEMORY = 80 * 2**30
_CARD: dict[str, Any] = {
    "synchronize": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "set_sync_debug_mode": None,
    "set_per_process_memory_fraction": None,
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "mem_get_info": (_MEMORY, _MEMORY),
    "memory_stats": {"num_alloc_retries": 0},
    "get_device_capability": (9, 0),
    "get_device_name": "a rehearsal on the CPU",
    "current_device": 0,
}


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what the tests ask of `torch.cuda` by the answers of a card that does nothing."""
    for name, answer in _CARD.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
