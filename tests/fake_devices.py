"""Two devices that exist only in name: tensors hold their values on the CPU and say that they are elsewhere.

As on GPUs, an operation on tensors of different devices is an error. Torch's own fakes need a build with CUDA, so these
use the indices of the meta device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FIRST, SECOND = torch.device("meta", 0), torch.device("meta", 1)

_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Placed(torch.Tensor):
    """A tensor that says it is on one of the two devices.

    Attributes:
        inner: its values, on the CPU.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "Placed":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        placed = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **layout)  # type: ignore[attr-defined]
        placed.inner = inner
        return placed  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Devices():
            return func(*args, **(kwargs or {}))


class Devices(TorchDispatchMode):
    """While it is active, operations run on the CPU, and fail where their tensors say that they are on two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        places = [one.device for one in tensors if one.numel() and one.ndim]  # numbers may be anywhere
        if len(set(places)) > 1 and func not in _MOVES:
            raise RuntimeError(f"{func}: tensors on {sorted(map(str, set(places)))}")
        device = (places or [one.device for one in tensors] or [torch.device("cpu")])[0]
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
        args, kwargs = pytree.tree_map(_values, (args, kwargs))
        result = func(*args, **kwargs)
        if device.type == "cpu":
            return result
        return pytree.tree_map(lambda one: Placed(one, device) if isinstance(one, torch.Tensor) else one, result)


def _values(one: Any) -> Any:
    if isinstance(one, Placed):
        return one.inner
    if isinstance(one, torch.Tensor) and one.device.type == "meta":  # an empty one, made by torch itself
        return torch.empty(one.shape, dtype=one.dtype)
    return one


class _Hook(AlignDevicesHook):  # type: ignore[misc]
    def init_hook(self, module: nn.Module) -> nn.Module:
        return module  # its tensors are placed already


def spread(model: Any, places: Mapping[str, torch.device]) -> None:
    """Put modules on devices, with accelerate's hooks as `dispatch_model` adds them: they move a module's inputs.

    Args:
        places: device by module name; the rest is on the first device.
    """
    for name, module in model.named_modules():
        device = next((place for at, place in places.items() if f"{name}.".startswith(f"{at}.")), FIRST)
        for key, one in module._parameters.items():
            if one is not None:
                module._parameters[key] = nn.Parameter(Placed(one.data, device), requires_grad=False)
        for key, one in module._buffers.items():
            module._buffers[key] = None if one is None else Placed(one, device)
    skipped = model._skip_keys_device_placement
    for name, device in {**places, "": FIRST}.items():
        hook = _Hook(execution_device=device, io_same_device=name == "", skip_keys=skipped)
        add_hook_to_module(model.get_submodule(name), hook, append=True)
