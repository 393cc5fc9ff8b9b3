"""Compile the layers of a model where they are (`training: torch_compile`), one by one, for any shape of a micro-batch.

The Trainer would compile the model as a whole, and call the result; passes here call the model's scoring forward, whose
micro-batches all have different shapes. Layers keep their place and the names of their weights, so that saving, adapters,
checkpoints and sharding see no difference.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ConfigError, TrainingError, said_by
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.model_code import family_of

# Keys of the `training:` table.
TORCH_COMPILE, BACKEND, MODE = "torch_compile", "torch_compile_backend", "torch_compile_mode"

# Modes that record CUDA graphs, one for each shape.
_GRAPHS = ("reduce-overhead", "max-autotune")

# Arguments that hold keys and values of a prompt that several rows share. Such a pass runs as written: each layer writes to
# its own place in them, so each would be compiled by itself.
_CACHES = ("past_key_values", "past_key_value", "cache", "layer_past")

# Variants of a layer's code: with and without gradient, one row or several, different kinds of layers. Beyond torch's own
# limit of 8, layers would silently run uncompiled.
_VARIANTS = 64


@dataclass(frozen=True)
class Compiling:
    """How layers are compiled.

    Attributes:
        backend: of `torch.compile`.
        mode: of `torch.compile`; None for its default.
    """

    backend: str = "inductor"
    mode: str | None = None

    @classmethod
    def of(cls, table: Mapping[str, object]) -> "Compiling | None":
        """Read the `training:` table; None if it does not ask for it.

        Raises:
            ConfigError: torch has no such backend, or the mode does not suit micro-batches of many shapes.
        """
        backend, mode = table.get(BACKEND), table.get(MODE)
        if not (table.get(TORCH_COMPILE) or backend or mode):
            return None
        known = torch.compiler.list_backends(exclude_tags=())
        if backend is not None and backend not in known:
            raise ConfigError(f"training: {BACKEND}: torch has no backend {backend!r}. It has {', '.join(known)}.")
        if mode in _GRAPHS:
            raise ConfigError(
                f"training: {MODE}: {mode} records a CUDA graph for each shape, and micro-batches have many shapes. Use "
                "max-autotune-no-cudagraphs, or leave the key out."
            )
        return cls(str(backend or "inductor"), None if mode is None else str(mode))


def compile_layers(model: Model, compiling: Compiling) -> None:
    """Let every layer of a model run compiled; it is compiled when it first runs.

    Args:
        model: with or without adapters. Layers that are compiled already are left alone.

    Raises:
        TrainingError: its family does not name its layers, or its weights are quantised.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise TrainingError(
            f"training: {TORCH_COMPILE}: quantised weights are multiplied by kernels that are not compiled. Remove it from the table."
        )
    layers = list(_layers(model))
    if not layers:
        raise TrainingError(
            f"training: {TORCH_COMPILE}: this model family ({family_of(model)}) does not name its layers. Remove it from the table."
        )
    torch.compiler.config.recompile_limit = max(_VARIANTS, torch.compiler.config.recompile_limit)
    new = [layer for layer in layers if not isinstance(vars(layer).get("forward"), _Compiled)]
    if new:
        tell(f"compiling   {len(new)} layers with {compiling.backend}, when they first run; this may take minutes")
    for layer in new:
        layer.forward = _Compiled(layer.forward, compiling)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    kinds: set[str] = set()
    for module in model.modules():
        kinds |= set(getattr(module, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in kinds)


class _Compiled:
    """A layer's forward that runs compiled, except with keys and values of a shared prompt."""

    def __init__(self, forward: Callable[..., object], compiling: Compiling) -> None:
        functools.update_wrapper(self, forward)
        self._plain = forward
        self._compiled = torch.compile(forward, backend=compiling.backend, mode=compiling.mode, dynamic=True)
        self._backend = compiling.backend

    def __call__(self, *args: object, **kwargs: object) -> object:
        if any(kwargs.get(name) is not None for name in _CACHES):
            return self._plain(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            if is_of_damaged_cache(error):
                raise TrainingError(_damaged_cache(error)) from error
            raise TrainingError(
                f"training: {TORCH_COMPILE}: the backend {self._backend} cannot compile this model's layers: {said_by(error)}. Remove "
                f"it from the table, or choose another {BACKEND}."
            ) from error


# What the dynamic linker says of an incomplete library.
_TORN = re.compile("file too short|invalid ELF header|file too small|truncated file|not a mach-o file", re.IGNORECASE)


def is_of_damaged_cache(error: BaseException) -> bool:
    """Return whether compiling failed because a file of the compile cache is incomplete, as an interrupted run leaves it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, EOFError) or _TORN.search(str(found)):
            return True
        found = getattr(found, "inner_exception", None) or found.__cause__
    return False


def _damaged_cache(error: BaseException) -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return (
        f"training: {TORCH_COMPILE}: the compile cache is damaged, perhaps by an interrupted run: {said_by(error)}. Delete the folder "
        f"{cache_dir()} and start again."
    )
