"""Run the code of a model family, and turn any exception into one message that names the family.

That code is in `transformers`, or comes with the weights (`--trust-remote-code`), and may raise any exception.
"""

import contextlib
import traceback
from collections.abc import Iterator

import torch

from offline_kto.kto_core.errors import KTOError, ModelError, said_by
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.out_of_memory import one_memory_error

# An error of these types raised in this package comes from the model's output: a tuple instead of a tensor, another
# shape. Any other one is a bug in this package.
_OF_OUTPUTS = (RuntimeError, TypeError, AttributeError, ValueError, IndexError)

_OURS = "offline_kto"

# Errors that the model did not cause: out of memory, and a device that failed.
_PASSED_ON = (KTOError, MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


@contextlib.contextmanager
def model_code(where: str, failed: str) -> Iterator[None]:
    """Turn an exception of a model's code into a `ModelError`.

    Errors of this package's own code keep their traceback.

    Args:
        where: begins the message: a folder, or the model's class.
        failed: what could not be done, with the family's name.

    Raises:
        ModelError: the model's code raised an exception.
    """
    try:
        with one_memory_error():
            yield
    except _PASSED_ON:
        raise
    except Exception as error:
        if _is_our_mistake(error):
            raise
        kind = type(error).__name__
        said = said_by(error)
        # The message of these types is enough; that of others may be only a key, so the type is added.
        reason = (
            said
            if said == kind or isinstance(error, OSError | ValueError | RuntimeError | ImportError)
            else f"{kind}: {said}"
        )
        raise ModelError(f"{where}: {failed}: {reason}") from error


def family_of(model: Model) -> str:
    """Return the name of a model's family: its `model_type`, or else its class name."""
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def _is_our_mistake(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return module.split(".")[0] == _OURS and not isinstance(error, _OF_OUTPUTS)
