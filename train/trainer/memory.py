"""Measure device memory, and find how many tokens fit into one forward and backward pass."""

import resource
import sys
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

# The rest stays free for fragmentation, other libraries' workspaces, and the spread of row lengths.
_USED = 0.85

# More tokens than this in one pass make no GPU faster, and cost padding.
_MOST = 65_536

# Adam: two float32 moments for each trained weight, allocated at the first update.
_OPTIMIZER_BYTES = 8


class Meter(Protocol):
    """An interface to read a device's memory, in bytes."""

    def used(self) -> int: ...
    def available(self) -> int:
        """Return the bytes that are free now, including the allocator's reserve."""

    def peak_of(self, work: Callable[[], None]) -> int:
        """Return the peak number of bytes in use while `work` ran."""


class CudaMeter:
    """Memory as `torch.cuda` reports it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def used(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - self.used()

    def peak_of(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def meter_of(device: torch.device) -> Meter | None:
    """Return the meter of a device; None where memory is not measured."""
    return CudaMeter(device) if device.type == "cuda" else None


def tokens_that_fit(meter: Meter, trial: Callable[[int], None], *, row: int, reserve: int, alone: bool = True) -> int:
    """Return the padded tokens of one pass that keep memory within 85 % of the device.

    Each additional row of a given length needs the same number of bytes for activations, so two small trials
    determine the need of any number of rows.

    Args:
        meter: of the device.
        trial: runs a forward and backward pass over a number of rows of the longest length; it may leave gradients.
        row: tokens in the longest row.
        reserve: bytes that training will need and that are not in use yet (optimizer states).
        alone: whether no other rank waits for this one within a trial.

    Returns:
        A multiple of `row`, at least `row`: a device without room for two rows relies on out-of-memory handling.
    """
    before = meter.used()
    room = _USED * (before + meter.available()) - reserve
    try:
        trial(1)  # kernels' workspaces and the gradients come with the first pass
        one, two = (meter.peak_of(lambda rows=rows: trial(rows)) for rows in (1, 2))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        if not alone:
            raise
        return row
    each = max(1, two - one)
    rows = int((room - (one - each)) // each)
    return row * max(1, min(rows, _MOST // row))


def optimizer_bytes(model: nn.Module, *, sharded_over: int) -> int:
    """Return the bytes of Adam's moments on this device."""
    return _OPTIMIZER_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad) // sharded_over


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory so far, MB: of the allocator on CUDA, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
