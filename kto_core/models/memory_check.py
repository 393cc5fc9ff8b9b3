"""Compare the bytes that a model needs with the bytes that are free, before it is loaded.

Sizes come from the model without weights and from the files' headers. They are lower bounds (activations, workspaces and
kernels come on top), so that a model is refused only if it cannot fit.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from offline_kto.kto_core.console import warn
from offline_kto.kto_core.errors import KTOError, ModelError, in_one_line
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.quantization import declared_quantization, fits_four_bits
from offline_kto.kto_core.models.weight_files import bytes_read
from offline_kto.kto_core.out_of_memory import is_out_of_memory

# Bytes for each parameter in 4 bits with bitsandbytes: half a byte, its share of the scales, and embeddings in 16 bits.
FOUR_BITS = 0.6

# The share of each GPU that the weights of a model spread over several may take; activations take the rest.
_OF_EACH_GPU = 0.85


class Sizes(NamedTuple):
    """The sizes of a model's weights; weights that are tied count once.

    Attributes:
        matrices: number of parameters that a frozen model stores in the type of its precision.
        others: number of parameters that it stores in float32: embeddings, norms, biases.
        packed: bytes of quantised weights and their scales in the files; 0 if the weights are not quantised.
        stacked: number of those in `matrices` that no quantiser packs: stacked experts.
    """

    matrices: int
    others: int
    packed: int = 0
    stacked: int = 0

    @classmethod
    def of(cls, model: Model, folder: Path) -> "Sizes":
        """Measure a model without weights (`Outline.model`) and its files."""
        tables = {
            id(p)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for p in module.parameters(recurse=False)
        }
        matrices = others = 0
        for parameter in model.parameters():
            if parameter.ndim >= 2 and id(parameter) not in tables:
                matrices += parameter.numel()
            else:
                others += parameter.numel()
        packed = bytes_read(folder) if declared_quantization(folder) is not None else 0
        return cls(matrices, others, packed, _stacked(model, tables))

    @property
    def parameters(self) -> int:
        return self.matrices + self.others

    def frozen(self, dtype: torch.dtype) -> int:
        """Return the bytes of a model that is not trained, whose passes compute in `dtype`."""
        return self.packed or torch.finfo(dtype).bits // 8 * self.matrices + 4 * self.others

    def four_bits(self) -> int:
        """Return the bytes of the same model quantised to 4 bits."""
        return self.packed or round(FOUR_BITS * (self.parameters - self.stacked) + 2 * self.stacked)


def _stacked(model: Model, tables: set[int]) -> int:
    """Return the number of weights of matrices that stay in 16 bits when bitsandbytes quantises the other layers."""
    return sum(
        weight.numel()
        for module in model.modules()
        if not fits_four_bits(module)
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2 and id(weight) not in tables
    )


class Way(NamedTuple):
    """Another way to run, and the bytes that it needs on one device.

    Attributes:
        words: continue "What fits: ".
    """

    words: str
    need: int


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free now: on a GPU, or of the host's memory; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _host_bytes() if device.type == "cpu" else None


def _host_bytes() -> int | None:
    """Return the memory that Linux can give to programs, at most this container's; None on other systems."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def check_fits(
    name: str,
    device: torch.device,
    need: int,
    *,
    what: str,
    instead: Sequence[Way],
    error: type[KTOError] = ModelError,
) -> None:
    """Refuse a model that needs more memory than is free on its GPU; log a warning if it exceeds the host's memory.

    The host's memory is not certain: weights may stay in their file until they are read, and systems swap.

    Args:
        name: of the model, for messages.
        need: bytes that certainly will be used at the same time.
        what: what needs them, for messages.
        instead: other ways to run, the preferred first.
        error: type of the error.

    Raises:
        KTOError: it does not fit.
    """
    free = free_bytes(device)
    if free is None or need <= free:
        return
    place = _place(device)
    if device.type == "cpu":
        warn(f"{_against(name, what, need, free, place)} It may be very slow, or be ended by the system.")
        return
    raise error(too_large(name, what, need, free, place, instead))


def too_large(name: str, what: str, need: int, free: int, place: str, instead: Sequence[Way]) -> str:
    """Return the message for a model that does not fit: bytes needed and free, and other ways that fit."""
    ways = [f"{way.words} ({gigabytes(way.need)})" for way in instead if way.need <= free]
    advice = (
        f"What fits: {'; '.join(ways)}. Or end other processes on this GPU, if there are any."
        if ways
        else "Use GPUs with more memory, or a smaller model."
    )
    return f"{_against(name, what, need, free, place)} {advice}"


def _against(name: str, what: str, need: int, free: int, place: str) -> str:
    return f"{name}: {what} needs {gigabytes(need)}, and {gigabytes(free)} are free on {place}."


def _place(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else str(device)


def gigabytes(count: int) -> str:
    """Return bytes in words, with three digits."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def over_all_gpus(sizes: Sizes) -> dict[int, int]:
    """Return the bytes that weights may take of each of this process's GPUs.

    Embeddings are read in 16 bits and then stored in float32, so their GPU (the first, or the last) needs more than is
    planned when the layers are distributed.
    """
    wider = 0 if sizes.packed else 2 * sizes.others
    free = [free_bytes(torch.device("cuda", number)) or 0 for number in range(torch.cuda.device_count())]
    return {number: max(0, int(_OF_EACH_GPU * one) - wider) for number, one in enumerate(free)}


@contextlib.contextmanager
def reporting_memory(
    name: str, device: torch.device, need: int | None, *, doing: str, error: type[KTOError] = ModelError
) -> Iterator[None]:
    """Turn exhausted memory of a device into an error with the bytes needed and free.

    Args:
        name: of the model, for messages.
        need: bytes that the weights need; None if unknown.
        doing: what the block does, for messages.
        error: type of the error.

    Raises:
        KTOError: memory was exhausted.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as caught:
        if not isinstance(caught, MemoryError) and not is_out_of_memory(caught):
            raise
        raise error(_ran_out(name, device, need, doing, caught)) from caught


def _ran_out(name: str, device: torch.device, need: int | None, doing: str, caught: BaseException) -> str:
    weights = f" Its weights need {gigabytes(need)}." if need is not None else ""
    free = None
    with contextlib.suppress(RuntimeError):  # a device that failed
        free = free_bytes(device)
    now = f" Now {gigabytes(free)} are free on {_place(device)}." if free is not None else ""
    return (
        f"{name}: out of memory while {doing}.{weights}{now} End other processes that use this memory, use a smaller "
        f"model or one in 4 bits, or more GPUs. ({in_one_line(caught)[:300]})"
    )
