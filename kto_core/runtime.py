"""Set up the process before the libraries are imported: its memory allocator, and what they may print.

By default the C library hands large blocks back to the system as soon as they are freed, and every micro-batch pays for
fresh pages again: an eighth of the time of training on a CPU.
"""

import ctypes
import logging
import os
import sys
import warnings

from offline_kto.kto_core.streams import is_terminal

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT, _STEP = 2**31 - 1, 2**26  # the largest value it takes; bytes asked of the system at a time


def keep_freed_memory() -> None:
    """To be called before torch is imported. Does nothing where the C library is not glibc, or where the user set it."""
    # torch then asks for large pages, where the system gives them on request: fewer faults, fewer misses.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    for parameter, value in ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _STEP)):
        mallopt(parameter, value)


def quiet_libraries() -> None:
    """Before the libraries are imported: only their errors are shown, and no progress bars but ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "" if is_terminal(sys.stderr) else "1")
    for name in ("torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|accelerate|peft)\b")
