"""Sum gradients over the ranks of an unsharded run, in pieces of bounded size, and make the ranks start from equal weights.

large gradient     sent where it is; in slices if it is converted for sending
small gradients    joined in one flat tensor, of which they are views afterwards
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes of one message, if `training: ddp_bucket_cap_mb` does not set them: enough for a GPU's links to run at full speed.
BUCKET_BYTES = 64 * 2**20

# A gradient of at least this share of a message is sent alone: joining it would cost more than a message of its own.
_ALONE = 1 / 4

# Messages under way. Their copies are all the memory that summing takes.
_UNDER_WAY = 2


class Sending(NamedTuple):
    """The form in which gradients are sent.

    Attributes:
        dtype: the type in which they are added up; 16 bits halve the traffic and round each addition.
        bucket_bytes: size of one message.
    """

    dtype: torch.dtype = torch.float32
    bucket_bytes: int = BUCKET_BYTES


def sum_gradients(parameters: Sequence[Tensor], sending: Sending) -> None:
    """Replace the gradients of parameters by their sums over all ranks.

    Args:
        parameters: the same on every rank, in the same order. One without a gradient gets zeros.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
    under_way: deque[tuple[dist.Work, Callable[[], object]]] = deque()
    for message, finish in _messages(parameters, sending):
        if len(under_way) == _UNDER_WAY:
            _receive(*under_way.popleft())
        under_way.append((dist.all_reduce(message, async_op=True), finish))
    while under_way:
        _receive(*under_way.popleft())


def _receive(work: dist.Work, finish: Callable[[], object]) -> None:
    work.wait()  # on CUDA the stream waits, not the host
    finish()


def _messages(parameters: Sequence[Tensor], sending: Sending) -> Iterator[tuple[Tensor, Callable[[], object]]]:
    """Yield flat tensors to sum, each with a function that stores the sum."""
    room = max(1, sending.bucket_bytes // sending.dtype.itemsize)  # elements
    small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        gradient = _gradient(parameter)
        if gradient.numel() >= _ALONE * room:
            yield from _slices(gradient.view(-1), room, sending.dtype)
            continue
        joined = small.setdefault((gradient.device, gradient.dtype), [])
        if sum(one.numel() for one in joined) + gradient.numel() > room:
            yield _join(joined, sending.dtype)
            joined.clear()
        joined.append(parameter)
    for joined in small.values():
        yield _join(joined, sending.dtype)


def _slices(flat: Tensor, room: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Callable[[], object]]]:
    if flat.dtype == dtype:
        yield flat, lambda: None
        return
    for part in flat.split(room):
        message = part.to(dtype)
        yield message, lambda part=part, message=message: part.copy_(message)  # type: ignore[misc]


def _join(parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Callable[[], object]]:
    members = list(parameters)
    own = _gradient(members[0]).dtype
    message = torch.cat([_gradient(one).view(-1) for one in members]).to(dtype)

    def finish() -> None:
        parts = message.to(own).split([one.numel() for one in members])
        for one, part in zip(members, parts, strict=True):
            one.grad = part.view_as(one)

    return message, finish


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def copy_from_first(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    copy_tensors(chain(model.parameters(), model.buffers()))


@torch.no_grad()
def copy_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, as bytes, whatever their types."""
    under_way = []
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        work = dist.broadcast(whole.view(-1).view(torch.uint8), src=0, async_op=True)
        under_way.append((work, tensor, whole))
    for work, tensor, whole in under_way:
        work.wait()
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
