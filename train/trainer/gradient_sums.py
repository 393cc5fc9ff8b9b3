"""Sum gradients over the ranks of an unsharded run, in pieces of bounded size, and make the ranks start from equal weights.

large gradient     sent where it is; in slices if it is converted for sending
small gradients    joined in one flat tensor, of which they are views afterwards

Messages are sent while the last backward pass of an update still runs: each as soon as its gradients are final, in an order
that is the same on every rank. A rank that then runs out of memory repeats its batch alone, and no rank needs to know:
what it has sent was final, so it stays sent, and its repetition computes and sends the other gradients only.
"""

import contextlib
from collections import defaultdict, deque
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


class _Message(NamedTuple):
    """Gradients that are sent together.

    Attributes:
        members: the parameters; one, or several small ones.
        part: the elements of a single member that are sent.
    """

    members: list[Tensor]
    part: slice = slice(None)


class GradientSums:
    """The sums of one update's gradients over all ranks.

    Args:
        parameters: all that are trained; the same on every rank, in the same order.
        sending: None if there is nothing to add up: one process, or gradients that are summed within the passes.
        unannounced: parameters whose gradients are complete only after the backward pass, because it changes them in
            place (`add_gradients_in_place`).
    """

    def __init__(
        self, parameters: Sequence[Tensor], sending: Sending | None, *, unannounced: Sequence[Tensor] = ()
    ) -> None:
        self._parameters, self._sending = parameters, sending or Sending()
        late = {id(one) for one in unannounced}
        # The backward pass reaches the last layers first.
        announced = [one for one in reversed(parameters) if id(one) not in late]
        groups = (announced, [one for one in parameters if id(one) in late]) if sending is not None else ()
        self._messages = [message for group in groups for message in _messages(group, self._sending)]
        self._late, self._sent = late, 0
        self._kept: list[Tensor] = []  # gradients that a repeated batch does not compute again
        self._under_way: deque[tuple[dist.Work, Callable[[], object]]] = deque()

    @contextlib.contextmanager
    def sent_early(self) -> Iterator[None]:
        """Send gradients as soon as they are final in the block, which runs the update's last backward pass."""
        missing = [sum(one.requires_grad for one in message.members) for message in self._messages]
        messages_of = defaultdict(list)
        for number, message in enumerate(self._messages[self._sent :], self._sent):
            for one in message.members:
                messages_of[one].append(number)

        def is_final(parameter: Tensor) -> None:
            for number in messages_of[parameter]:
                missing[number] -= 1
            while self._sent < len(missing) and not missing[self._sent]:
                self._send_next()

        hooks = [
            one.register_post_accumulate_grad_hook(is_final)
            for one in messages_of
            if one.requires_grad and id(one) not in self._late
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin_again(self) -> None:
        """Drop the gradients of a batch that will be repeated, except those that are sent: they stay as they are."""
        sent = {id(one) for message in self._messages[: self._sent] for one in message.members}
        self._kept = [one.requires_grad_(False) for one in self._parameters if id(one) in sent]
        for one in self._parameters:
            if id(one) not in sent:
                one.grad = None

    def finish(self) -> None:
        """Send the gradients that are left, and wait for all sums. A parameter without a gradient gets zeros."""
        while self._sent < len(self._messages):
            self._send_next()
        while self._under_way:
            self._receive()
        for one in self._kept:
            one.requires_grad_(True)

    def _send_next(self) -> None:
        if len(self._under_way) == _UNDER_WAY:
            self._receive()
        tensor, store = _packed(self._messages[self._sent], self._sending.dtype)
        self._under_way.append((dist.all_reduce(tensor, async_op=True), store))
        self._sent += 1

    def _receive(self) -> None:
        work, store = self._under_way.popleft()
        work.wait()  # on CUDA the stream waits, not the host
        store()


def _messages(parameters: Iterable[Tensor], sending: Sending) -> Iterator[_Message]:
    """Divide parameters into messages, in the order in which these will be complete."""
    room = max(1, sending.bucket_bytes // sending.dtype.itemsize)  # elements
    small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        size = parameter.numel()
        if size >= _ALONE * room:
            step = size if parameter.dtype == sending.dtype else room
            for start in range(0, size, step):
                yield _Message([parameter], slice(start, start + step))
            continue
        joined = small.setdefault((parameter.device, parameter.dtype), [])
        if sum(one.numel() for one in joined) + size > room:
            yield _Message([*joined])
            joined.clear()
        joined.append(parameter)
    for joined in small.values():
        yield _Message(joined)


def _packed(message: _Message, dtype: torch.dtype) -> tuple[Tensor, Callable[[], object]]:
    """Return the flat tensor to sum, and a function that stores the sum."""
    gradients = [_gradient(one) for one in message.members]
    if len(gradients) == 1:
        flat = gradients[0][message.part]
        sent = flat.to(dtype)
        return sent, (lambda: None) if sent is flat else (lambda: flat.copy_(sent))
    own = gradients[0].dtype
    joined = torch.cat(gradients).to(dtype)

    def store() -> None:
        parts = joined.to(own).split([one.numel() for one in message.members])
        for one, part in zip(message.members, parts, strict=True):
            one.grad = part.view_as(one)

    return joined, store


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, flat and in place; zeros if it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad = parameter.grad.contiguous()
    return parameter.grad.view(-1)


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
