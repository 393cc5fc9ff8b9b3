"""Recognise every error by which a GPU's libraries say that memory ran out."""

import contextlib
import re
from collections.abc import Iterator

import torch

# Of the driver (torch.AcceleratorError), cuBLAS and cuDNN, whose workspaces are allocated beside torch's allocator.
_SAID = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def one_kind_of_out_of_memory() -> Iterator[None]:
    """Raise `torch.OutOfMemoryError` for all of them.

    Raises:
        torch.OutOfMemoryError: memory ran out in the block.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _SAID.search(str(error)):
            raise
        raise torch.OutOfMemoryError(str(error).splitlines()[0]) from error
