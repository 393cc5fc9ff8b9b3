"""Recognise that a device ran out of memory, whichever library says so.

Torch's allocator raises `torch.OutOfMemoryError`. Libraries that allocate by themselves (cuBLAS, cuDNN, NCCL, the driver)
end in other errors, of which only the text tells.
"""

import contextlib
import re
from collections.abc import Iterator

import torch

_SAID = re.compile(
    "|".join(
        (
            r"CUDA (driver )?error: out of memory",
            r"(CUDA|HIP|XPU) out of memory",
            r"CUBLAS_STATUS_ALLOC_FAILED",
            r"CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublas(Lt)?Create",  # its handle did not fit
            r"CU(DNN|SOLVER|SPARSE)_STATUS_\w*ALLOC\w*_FAILED",
            r"Cuda failure \d* ?'out of memory'",  # NCCL
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
        )
    )
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left; after it, smaller work can be tried."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SAID.search(str(error)))


@contextlib.contextmanager
def one_memory_error() -> Iterator[None]:
    """Turn every error that says so into `torch.OutOfMemoryError`.

    Raises:
        torch.OutOfMemoryError: a device has no memory left.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error
