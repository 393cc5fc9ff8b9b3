"""Answer from the host where the sequences of a batch begin, which `transformers` would otherwise read from the device.

Its masks search the positions for packed sequences, once in each forward pass, and wait for the answer: the device's
queue runs empty. Here the answer is known when the batch is built.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from offline_kto.kto_core.scoring.shared_prompts import Batch, SharedPrompts

_BATCH: ContextVar[Batch | None] = ContextVar("batch whose boundaries are known", default=None)

# The module of `transformers` that builds masks, and its search; both are looked up in each call, so that no version
# without them is broken.
_MASKS, _SEARCH = "transformers.masking_utils", "find_packed_sequence_indices"


@contextlib.contextmanager
def known_boundaries(batch: Batch) -> Iterator[None]:
    """Let masks that this thread builds inside the block take the batch's boundaries from the host."""
    _replace_search()
    before = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(before)


def current_batch() -> Batch | None:
    """Return the batch of the enclosing `known_boundaries` block; None outside of one."""
    return _BATCH.get()


def row_of_slot(batch: Batch) -> Tensor | None:
    """Return the number of the sequence in each slot, int64, shape (1, length); None if the batch is padded."""
    if isinstance(batch, SharedPrompts) or not batch.is_packed:
        return None
    slots = torch.arange(batch.input_ids.shape[1], dtype=torch.int32, device=batch.boundaries.device)
    return torch.bucketize(slots, batch.boundaries[1:], right=True)[None]


def _replace_search() -> None:
    """Replace the search of `transformers` by one that asks `current_batch` first; other calls are unchanged."""
    masks = sys.modules.get(_MASKS)
    search = getattr(masks, _SEARCH, None)
    if search is None or getattr(search, "asks_first", False):
        return

    @functools.wraps(search)
    def find(position_ids: Tensor) -> Tensor | None:
        batch = current_batch()
        found: Tensor | None = search(position_ids) if batch is None else row_of_slot(batch)
        return found

    vars(find)["asks_first"] = True
    setattr(masks, _SEARCH, find)
