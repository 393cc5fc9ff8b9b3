"""Keep transformers from searching each pass for packed rows where the answer is known."""

import contextlib
from collections.abc import Iterator

from transformers import masking_utils

_SEARCH = "find_packed_sequence_indices"


@contextlib.contextmanager
def no_packing_search(*, packs: bool) -> Iterator[None]:
    """Answer the search for packed rows without looking at the positions, unless rows are packed.

    The search reads a tensor on the host, which stops it in every forward pass until the device has computed all that is
    queued. Rows that are padded on the right are never found to be packed.
    """
    search = getattr(masking_utils, _SEARCH, None)
    if packs or search is None:
        yield
        return
    setattr(masking_utils, _SEARCH, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _SEARCH, search)
