"""Define the precision of a model: the types in which weights are stored and computed."""

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from offline_kto.kto_core.errors import ModelError, printable, said_by
from offline_kto.kto_core.launch import read_launch
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.narrow_embedding import NarrowEmbedding, can_be_narrow
from offline_kto.kto_core.options import AUTO

# The device that stands for all GPUs of a process, which share one model.
ALL = "all"


@dataclass(frozen=True)
class Precision:
    """The precision of the forward passes.

    `float32`: no autocast. `bfloat16`, `float16`: matrix products in that type under autocast, with
    the residual stream, norms and softmax in float32. A frozen model also stores its matrices in it;
    since autocast would cast them anyway, that changes memory and no score.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_full(self) -> bool:
        return self.dtype == torch.float32

    @contextlib.contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        with torch.autocast(device.type, dtype=self.dtype, enabled=not self.is_full):
            yield


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU if there is one, and in a launch the GPU of this rank.

    Nothing is allocated on a GPU, not even its context of some hundred MB, which a process that only plans would keep.

    Args:
        name: auto, all, or as in `torch.device`. `all` is the first of several GPUs that share the model.

    Raises:
        ModelError: the device does not exist here.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO and not here:
        return torch.device("cpu")
    if name in (AUTO, ALL, "cuda") and here:
        return _own_gpu(name, here)
    try:
        device = torch.device("cuda" if name == ALL else name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        if device.type != "cuda" or not here:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise ModelError(_not_available(name, error, here)) from error
    if device.index is not None and device.type == "cuda" and device.index >= here:
        raise ModelError(f"--device {name}: not available here ({here} GPU{'s' if here > 1 else ''}, counted from 0).")
    return device


def _not_available(name: str, error: Exception, here: int) -> str:
    gpus = "" if here else "; there is no CUDA GPU here, so leave it out or pass cpu"
    said = said_by(error) or type(error).__name__
    return (
        f"--device {printable(name, 60)}: not available here ({said}). Expected auto, cpu, cuda, cuda:N or all{gpus}."
    )


def _own_gpu(name: str, here: int) -> torch.device:
    launch = read_launch()
    if name == ALL:
        if launch.world_size > 1:
            raise ModelError(
                "--device all: one process uses all GPUs. Start it without torchrun or accelerate, or leave --device out: each "
                "process then uses its own GPU."
            )
        return torch.device("cuda", 0)
    if launch.world_size == 1:
        return torch.device("cuda")
    if launch.local_rank >= here:
        raise ModelError(f"{launch.local_rank + 1} processes on this machine, but {here} GPUs: start fewer.")
    return torch.device("cuda", launch.local_rank)


def use_device(device: torch.device) -> torch.device:
    """Make a GPU the current one of this process, and return it with its number; call it before anything is loaded.

    Quantisers load onto the current GPU, and Triton's kernels run on it, whatever device their tensors are on: in a
    launch all ranks would use GPU 0.

    Raises:
        ModelError: the GPU cannot be used.
    """
    if device.type != "cuda":
        return device
    try:
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    except RuntimeError as error:
        raise ModelError(f"--device {device}: cannot be used ({str(error).splitlines()[0]}).") from error


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision of that name; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == AUTO:
        name = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(getattr(torch, name))


def store_matrices_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Store in `dtype` the matrices that autocast casts to it before use, and everything else in float32.

    Autocast casts the matrices of linear layers before each product, so their storage changes no score. Embeddings,
    norms, biases, recurrences (Mamba's `A_log`) and position tables are combined with float32 values: rounding them
    would change scores. (Stacked experts are outside of autocast: a mixture of experts computes in their stored type. They are most
    of its weights.)
    """
    _store(model, dtype, _matrices(model, dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(False)


def store_trained_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Store trained matrices and embedding tables in `dtype`, and everything else in float32.

    As in `store_matrices_in`, the storage changes no score: embedding tables return float32, see `NarrowEmbedding`.
    (Tables that were stored in float32 are rounded.)
    """
    tables = [module for module in model.modules() if can_be_narrow(module)]
    for table in tables:
        table.__class__ = NarrowEmbedding
    _store(model, dtype, _matrices(model, dtype, tables=tables))


def store_by_module_in(model: Model, dtype: torch.dtype) -> None:
    """Store all weights of a module in one type, as FSDP2 needs it: float32, or `dtype` where that changes no score."""
    wide = {id(parameter) for module in float32_modules(model, dtype) for parameter in module.parameters(recurse=False)}
    _store(model, dtype, {id(parameter) for parameter in model.parameters()} - wide)


def float32_modules(model: Model, dtype: torch.dtype) -> list[nn.Module]:
    """Return the modules that would compute something else under autocast if all of their own weights were in `dtype`.

    The answer depends on the classes of the modules, not on their values: every rank gives the same.
    """
    head = model.get_output_embeddings()
    alike: dict[type[nn.Module], bool] = {nn.Linear: True, NarrowEmbedding: True}
    found = []
    for module in model.modules():
        own, kind = list(module.parameters(recurse=False)), type(module)
        if not any(parameter.dtype == torch.float32 for parameter in own):
            continue
        if module is head:  # its bias is added to float32 logits
            narrow = getattr(head, "bias", None) is None
        elif holds_experts(module):
            narrow = all(parameter.ndim >= 2 for parameter in own)
        else:
            if kind not in alike:
                is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2
                alike[kind] = is_matrix and not isinstance(module, nn.Embedding) and _casts_its_weights(module, dtype)
            narrow = alike[kind]
        if not narrow:
            found.append(module)
    return found


def _store(model: nn.Module, dtype: torch.dtype, narrow: set[int]) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype if id(parameter) in narrow else torch.float32)


def _matrices(model: nn.Module, dtype: torch.dtype, *, tables: Sequence[nn.Module] = ()) -> set[int]:
    """Return the ids of the parameters that may be stored in `dtype`.

    Args:
        tables: embedding tables that may.
    """
    found, others = {id(table.weight) for table in tables}, set()
    is_cast: dict[type[nn.Module], bool] = {nn.Linear: True}
    for module in model.modules():
        kind, weight = type(module), getattr(module, "weight", None)
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, NarrowEmbedding):
            continue
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            if kind not in is_cast:
                is_cast[kind] = _casts_its_weight(module, dtype)
            if is_cast[kind]:
                found.add(id(own.pop("weight", weight)))
        elif holds_experts(module):
            found |= {id(own.pop(name)) for name in list(own) if own[name].ndim >= 2}
        others |= {id(parameter) for parameter in own.values()}
    return found - others  # a tied matrix is also an embedding


def _casts_its_weight(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a layer gives the same output under autocast with its weight in float32 and in `dtype`.

    Some model families have their own linear layers (GPT-2's are transposed). Some of these normalise or scale the
    weight first, or use it outside of autocast.
    """
    if cast("torch.Tensor", module.weight).is_meta:  # its values are in another process, and do not matter here
        module = _with_other_values(module)
    return _is_alike(module, dtype, [cast("nn.Parameter", module.weight)])


def _casts_its_weights(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return the same as `_casts_its_weight` for all weights of a layer, whatever their values."""
    module = _with_other_values(module)
    return _is_alike(module, dtype, list(module.parameters(recurse=False)))


def _with_other_values(module: nn.Module) -> nn.Module:
    """Return a copy in host memory with values from -1 to 1."""
    module = copy.deepcopy(module).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float32).view(parameter.shape)
    return module


def _is_alike(module: nn.Module, dtype: torch.dtype, weights: Sequence[nn.Parameter]) -> bool:
    """Return whether a layer gives the same output under autocast with some weights in float32 and in `dtype`."""
    stored = [weight.data for weight in weights]
    device = stored[0].device
    for size in cast("torch.Tensor", module.weight).shape[::-1]:
        values = torch.linspace(-1, 1, 3 * size, device=device).reshape(1, 3, size)
        outputs = []
        try:
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
                for kind in (torch.float32, dtype):
                    for weight, values_of in zip(weights, stored, strict=True):
                        weight.data = values_of.to(kind)
                    outputs.append(module(values))
        except Exception:  # noqa: BLE001 (it expects other inputs; float32 is always correct)
            continue
        finally:
            for weight, values_of in zip(weights, stored, strict=True):
                weight.data = values_of
        return all(isinstance(one, torch.Tensor) for one in outputs) and torch.equal(*outputs)
    return False


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module's own parameters are the stacked matrices of many experts."""
    counts = [n for name, n in vars(module).items() if re.search("num_(local_)?experts$", name) and isinstance(n, int)]
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return any(
        (len(shape) == 3 and shape[0] == n) or (len(shape) == 2 and shape[0] > n and shape[0] % n == 0)
        for shape in shapes
        for n in counts
        if n > 1
    )
