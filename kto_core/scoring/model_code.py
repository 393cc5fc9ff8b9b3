"""Running the code of a model family: whatever it raises becomes one message that names the family.

That code lies in `transformers`, or beside the weights (`--trust-remote-code`), and raises what its authors pleased.
"""

import contextlib
import traceback
from collections.abc import Iterator

import torch

from offline_kto.kto_core.errors import KTOError, ModelError, said_by
from offline_kto.kto_core.library_types import Model

# An error of these kinds, raised in our own frames, comes from what the model returned: a tuple for a tensor, another
# shape. Any other one is our mistake.
_OF_OUTPUTS = (RuntimeError, TypeError, AttributeError, ValueError, IndexError)

_OURS = "offline_kto"

# Not the model's doing: memory, and a device that failed.
_PASSED_ON = (KTOError, MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


@contextlib.contextmanager
def model_code(where: str, failed: str) -> Iterator[None]:
    """Turn an exception of a model's code into a `ModelError`.

    Errors that our own code makes keep their traceback.

    Args:
        where: begins the message: a folder, or the model's class.
        failed: what could not be done, with the family's name.

    Raises:
        ModelError: the code inside raised an exception.
    """
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        if _is_our_mistake(error):
            raise
        kind = type(error).__name__
        said = said_by(error)
        # What says enough by itself, and what may be no more than a key.
        reason = (
            said
            if said == kind or isinstance(error, OSError | ValueError | RuntimeError | ImportError)
            else f"{kind}: {said}"
        )
        raise ModelError(f"{where}: {failed}: {reason}") from error


def family_of(model: Model) -> str:
    """Return the name of a model's family, its `model_type`, or else that of its class."""
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def _is_our_mistake(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return module.split(".")[0] == _OURS and not isinstance(error, _OF_OUTPUTS)
