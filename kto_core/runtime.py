"""Set up the process before the libraries are imported: its memory allocator and their log levels.

By default the C library returns large blocks to the system as soon as they are freed, and every micro-batch has to get
new pages: an eighth of the time of training on a CPU.
"""

import contextlib
import ctypes
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version

from offline_kto.kto_core.streams import is_terminal

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT, _STEP = 2**31 - 1, 2**26  # the largest value allowed; bytes requested from the system at a time


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, unless the user set it. Call before torch is imported. No effect without glibc."""
    # torch then requests huge pages, where the system allows that: fewer page faults and TLB misses.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    for parameter, value in ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _STEP)):
        mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return freed memory to the system, once, where glibc keeps it: pieces of an opened cache fit nothing that follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def use_expandable_segments() -> None:
    """Let torch's GPU allocator grow its segments, unless the user set it. Call before torch is imported.

    Every micro-batch has another shape. By default each would need blocks of its own size, and much of the memory would
    lie between blocks. Not for processes that start vLLM, which inherits the environment and manages memory itself.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        # Versions of torch from 2.9 warn of the other name.
        recent = tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) >= (2, 9)
        os.environ["PYTORCH_ALLOC_CONF" if recent else "PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def deprioritize_cudnn_attention() -> None:
    """Make PyTorch prefer flash to cuDNN for sdpa, unless the user set it. Call before the first attention on a GPU.

    On recent GPUs PyTorch 2.11 and later try cuDNN first, which builds a plan for every new shape of a batch, in tenths
    of a second. PyTorch reads the variable once, at the first attention.
    """
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the search for reference cycles, for work that makes many objects and no cycles.

    Each search looks at every object that is alive, of which the imported libraries alone have a million: a sixth of
    the time of planning.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def importing(*, in_own_process: bool) -> Iterator[None]:
    """Pause the search for reference cycles while libraries are imported: a seventh of the time of a short run.

    Args:
        in_own_process: whether the process is ours alone. Later searches then leave out what there is by the end.
    """
    with no_garbage_collection():
        yield
        if in_own_process:
            gc.freeze()


def quiet_libraries() -> None:
    """Show only errors of the libraries, and none of their progress bars; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "" if is_terminal(sys.stderr) else "1")
    quiet_loggers()
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|accelerate|peft)\b")


def leave_out(package: str) -> None:
    """Make an optional package count as not installed in this process, so that no library imports it needlessly.

    transformers imports peft wherever it is installed, and peft imports bitsandbytes and torch's compiler: 1.5 CPU
    seconds. Its Trainer imports datasets, and with it pandas: 0.5 s. No effect once transformers is imported: it looks for
    a package only once. Only for a process that is ours alone.
    """
    if "transformers" not in sys.modules:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # None is Python's sign for it


def needless_packages(*, may_need_peft: bool, trust_remote_code: bool) -> list[str]:
    """Return the packages to leave out of a process that trains: those that transformers would import needlessly."""
    if trust_remote_code:  # its code may import anything
        return []
    return ["datasets"] if may_need_peft else ["datasets", "peft"]


def quiet_loggers() -> None:
    """Show only the errors of libraries that log about features that no run uses."""
    for name in ("torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
