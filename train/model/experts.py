"""Compute the stacked experts of a trained model in the type of autocast, as autocast does for linear layers."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.precision import holds_experts


def cast_experts(model: Model) -> None:
    """Make experts with float32 weights multiply in the type of autocast; their gradients stay float32.

    Autocast leaves the products of stacked experts alone. In float32 they would be slow, and the policy would be another
    function than the reference, which stores its experts in 16 bits (`precision.store_matrices_in`).
    """
    for module in model.modules():
        if holds_experts(module):
            module.forward = _with_cast_weights(module, module.forward)


def _with_cast_weights(module: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(forward)
    def cast_forward(*args: object, **kwargs: object) -> object:
        own = {name: one for name, one in module.named_parameters(recurse=False) if one.ndim >= 2}
        kind = next(iter(own.values())).device.type
        if not torch.is_autocast_enabled(kind):
            return forward(*args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)
        cast = {name: one.to(dtype) for name, one in own.items() if one.dtype == torch.float32}
        # An attribute of the object is found before its parameter of the same name.
        vars(module).update(cast)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in cast:
                del vars(module)[name]

    return cast_forward
