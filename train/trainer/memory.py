"""Measure device memory, and find how many tokens fit into one forward and backward pass."""

import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offline_kto.kto_core.out_of_memory import one_memory_error
from offline_kto.train.model.token_budget import MOST_TOKENS, USED

# Two float32 moments.
_VECTOR_BYTES = 8

# Side of the matrix that an optimizer's states are measured on: bitsandbytes keeps those of small ones in float32.
_PROBE = 256


class Meter(Protocol):
    """An interface to read a device's memory, in bytes."""

    def used(self) -> int: ...
    def available(self) -> int:
        """Return the bytes that are free now, including the allocator's reserve, within this process's share."""

    def peak_of(self, work: Callable[[], None]) -> int:
        """Return the peak number of bytes in use while `work` ran."""


class CudaMeter:
    """Memory as `torch.cuda` reports it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def used(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def available(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)  # since torch 2.7
        allowed = int(total * share(self.device)) - reserved
        return max(0, min(free, allowed)) + reserved - self.used()

    def peak_of(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def meter_of(device: torch.device) -> Meter | None:
    """Return the meter of a device; None where memory is not measured."""
    return CudaMeter(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Budget:
    """The padded tokens of one pass that fit into memory: of training, and of scoring without gradients."""

    tokens: int
    scoring_tokens: int


def share_device(processes: int) -> None:
    """Limit this process to its share of the GPU that several processes of ours train on.

    Each would measure the whole device as free if all began at the same time.
    """
    if processes > 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1 / processes)


def tokens_that_fit(meter: Meter, trial: Callable[[int], None], *, row: int, reserve: int, alone: bool = True) -> int:
    """Return the padded tokens of one pass that keep memory within 85 % of the device.

    The peak is the highest of several moments of a pass, and each of these grows linearly with the rows. Two small trials
    find the line of the moment that is highest with few rows. With many rows another may be, and a trial of as many
    rows as that line allows shows it. Then fewer rows are taken, by the line through both trials: no moment is above it.

    Args:
        meter: of the device.
        trial: runs a pass over a number of rows of the longest length; it may leave gradients.
        row: tokens in the longest row.
        reserve: bytes that training will need and that are not in use yet (optimizer states).
        alone: whether no other rank waits for this one within a trial.

    Returns:
        A multiple of `row`, at least `row`: a device without room for two rows relies on out-of-memory handling.
    """
    before = meter.used()
    room = USED * (before + meter.available()) - reserve
    try:
        with one_memory_error():
            trial(1)  # kernels' workspaces and the gradients come with the first pass
            one, two = (meter.peak_of(lambda rows=rows: trial(rows)) for rows in (1, 2))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        if not alone:
            raise
        return row
    most = max(1, MOST_TOKENS // row)
    rows = min(most, _rows_within(room, (1, one), (2, two)))
    while rows > 2 or not alone:  # ranks that wait for each other run equally many trials
        try:
            with one_memory_error():
                peak = meter.peak_of(lambda rows=rows: trial(rows))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            if not alone:
                raise
            rows //= 2
            continue
        if rows > 2 and peak > room:
            rows = _rows_within(room, (2, two), (rows, peak))
        break
    return row * max(1, rows)


def _rows_within(room: float, fewer: tuple[int, int], more: tuple[int, int]) -> int:
    """Return the rows, at least 1, whose bytes are within `room` by the line through two measurements (rows, bytes)."""
    each = max(1.0, (more[1] - fewer[1]) / (more[0] - fewer[0]))
    return max(1, int(fewer[0] + (room - fewer[1]) // each))


def optimizer_bytes(model: nn.Module, *, sharded_over: int, of_matrix: Callable[[torch.dtype], float]) -> int:
    """Return the bytes of an optimizer's states on this device.

    Args:
        of_matrix: bytes of a value of a matrix in some type; those of vectors are counted in float32.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found = sum(weight.numel() * (of_matrix(weight.dtype) if weight.ndim > 1 else _VECTOR_BYTES) for weight in trained)
    return int(found / sharded_over)


def state_bytes(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> float:
    """Return how many bytes an optimizer keeps for each value of a matrix, from an update of a small one.

    States in paged memory (bitsandbytes) are moved to the host when the device is full, and are not counted.
    """
    weight = nn.Parameter(torch.zeros(_PROBE, _PROBE, dtype=dtype, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        probe = optimizer([weight], **options)
        probe.step()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return _VECTOR_BYTES  # it needs more than a weight; most keep two moments
    kept = [one for one in _tensors(probe.state[weight]) if one.device == weight.device]
    return sum(one.numel() * one.element_size() for one in kept if not getattr(one, "is_paged", False)) / weight.numel()


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for one in state.values():
            yield from _tensors(one)


def peak_reserved_mb(device: torch.device) -> float | None:
    """Return the peak memory that the allocator took from the device, MB: what other processes cannot use."""
    return torch.cuda.max_memory_reserved(device) / 1e6 if device.type == "cuda" else None


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory so far, MB: of the allocator on CUDA, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
