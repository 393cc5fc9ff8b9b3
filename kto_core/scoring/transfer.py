"""Copy tensors from the host to a device, many in one transfer.

Each copy of its own would cost a call, and without pinned memory the host would wait for all work that is queued on the
device.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

_Nested = TypeVar("_Nested")
_Item = TypeVar("_Item")

# Tokens of one transfer (about 40 MB). Inputs of more take several, so that their number does not limit the device.
TRANSFER_TOKENS = 2**20

# Tensors begin at multiples of this many bytes, so that each can be read as its own type.
_ALIGNED = 16


def to_device(values: _Nested, device: torch.device | str) -> _Nested:
    """Return nested tuples, named tuples and lists with all of their tensors on a device; other values stay as they are.

    Args:
        values: tensors, all on the host or all on the device. If they are there already, the same ones are returned.
    """
    device = torch.device(device)
    tensors = [*_tensors(values)]
    if _is_host(device) or all(tensor.is_cuda for tensor in tensors):
        return values
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    blob = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        _part(blob, start, tensor).copy_(tensor)
    moved = blob.to(device, non_blocking=True)
    parts = iter([_part(moved, start, tensor) for start, tensor in zip(starts, tensors, strict=True)])
    return _rebuilt(values, parts)


def in_transfers(
    items: Iterable[_Item], tokens_of: Callable[[_Item], int], device: torch.device
) -> Iterator[list[_Item]]:
    """Yield consecutive items in groups, of one transfer each.

    Args:
        items: read one ahead only.
        tokens_of: returns the tokens of an item.
        device: the one to copy to. On a CPU nothing is copied, and each item is a group.
    """
    group: list[_Item] = []
    room = most = 0 if _is_host(device) else TRANSFER_TOKENS
    for item in items:
        tokens = tokens_of(item)
        if group and tokens > room:
            yield group
            group, room = [], most
        group.append(item)
        room -= tokens
    if group:
        yield group


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _part(blob: Tensor, start: int, like: Tensor) -> Tensor:
    return blob[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _rebuilt(values: Any, parts: Iterator[Tensor]) -> Any:
    if isinstance(values, Tensor):
        return next(parts)
    if isinstance(values, tuple | list):
        members = [_rebuilt(value, parts) for value in values]
        return type(values)(*members) if hasattr(values, "_fields") else type(values)(members)
    return values
