"""Halve the activations that a layer keeps for its backward pass, without computing anything else in the forward pass.

        as transformers defines it                                  here
norm    keeps its input, the normalized input, and a 16-bit copy     keeps its input, and one 16-bit output that all
        of its output for each matrix that reads it                  matrices share
SwiGLU  keeps gate, silu(gate), up and their product                 keeps gate and up; the rest is computed again

For hidden units h, queries q, keys k and intermediate units f that is 12h + 4q + 4k + 4f bytes a token and layer
instead of 26h + 4q + 4k + 8f. The matrices are called as modules, whatever they are: linear layers, adapters, quantised
ones.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from offline_kto.kto_core.library_types import AutogradContext, Model
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import Sequences
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.ranks import Ranks
from offline_kto.train.trainer.sharding import local_part

# Norms whose output only matrices read. Elsewhere (norms of queries, of outputs) it is read in float32.
_NORMS = ("input_layernorm", "post_attention_layernorm")

# What is replaced: as much as leaves the scores as they are. (A router reads its norm's output in float32.)
_TRIED = (("mlp", *_NORMS), ("mlp", "input_layernorm"), ("mlp",))

_MLP = ("gate_proj", "up_proj", "down_proj")

# Largest relative difference of the gradients of norms: sums of a few terms are rounded to bfloat16, or not.
_TOLERANCE = 0.05


def can_halve_activations(policy: PreparedPolicy, *, checkpoints: bool, compiles: bool) -> bool:
    """Return whether to try.

    Not on a CPU: there, results are the same bit for bit in every version, and sums of gradients are rounded
    differently here. Not with gradient checkpointing, which keeps no activations, nor with compiled layers, which choose
    what they keep.
    """
    return policy.device.type == "cuda" and not (checkpoints or compiles)


def halve_activations(model: Model, scoring_model: Model, batch: Sequences, ranks: Ranks | None = None) -> int:
    """Replace the forward methods of norms and SwiGLU layers, and check that scores stay the same bit for bit.

    Args:
        model: on its device.
        scoring_model: the module that passes call.
        batch: a few rows, on the device.
        ranks: the processes of the run, if there are several; those that share a sharded model decide alike.

    Returns:
        Number of replaced forward methods; 0 if the model has none of these layers, or if scores or gradients would
        differ.
    """
    every = list(_replacements(model))
    if not every:
        return 0
    norms = [module for module, _, kind in every if kind in _NORMS and module.weight.requires_grad]
    measure = _sharded_gradients if ranks is not None and ranks.sharded else _gradients
    before = measure(scoring_model, batch, norms)
    for kinds in _TRIED:
        chosen = [(module, forward) for module, forward, kind in every if kind in kinds]
        for module, forward in chosen:
            module.forward = forward
        if chosen:
            alike = _alike(before, measure(scoring_model, batch, norms))
            if alike if ranks is None else ranks.least(alike):
                return len(chosen)
        restore_layers(model)
    return 0


def _alike(before: tuple[Tensor, list[Tensor]], after: tuple[Tensor, list[Tensor]]) -> bool:
    return torch.equal(before[0], after[0]) and all(
        bool((one - other).norm() <= _TOLERANCE * one.norm()) for one, other in zip(before[1], after[1], strict=True)
    )


def restore_layers(model: Model) -> None:
    """Undo `halve_activations`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Replaced):
            del module.forward


class _Replaced(partial[Tensor]):
    """A forward method that was put here."""


def _replacements(model: Model) -> Iterator[tuple[nn.Module, "_Replaced", str]]:
    """Yield modules with their new forward methods and their kind."""
    for layer in model.modules():
        mlp = getattr(layer, "mlp", None)
        if mlp is None or not isinstance(layer, nn.Module):
            continue
        if _is_swiglu(mlp):
            yield mlp, _Replaced(_swiglu, mlp), "mlp"
        for name in _NORMS:
            norm = getattr(layer, name, None)
            if norm is not None and _is_rms_norm(norm):
                yield norm, _Replaced(_norm, norm), name


def _is_plain(module: Any) -> bool:
    """Return whether a module's forward method is the one that transformers defines."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    kind = type(module)
    if "FSDPModule" in {one.__name__ for one in kind.__bases__}:  # a class that FSDP2 makes from the module's own
        kind = kind.__bases__[-1]
    # Liger replaces methods of these classes.
    return all(name.startswith("transformers.models.") for name in (kind.__module__, kind.forward.__module__))


def _is_swiglu(module: Any) -> bool:
    if not _is_plain(module) or {name for name, _ in module.named_children()} != {*_MLP, "act_fn"}:
        return False
    lines = inspect.getsource(type(module).forward)
    expected = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
    return expected in lines and isinstance(module.act_fn, nn.SiLU | type(_silu()))


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN["silu"]


def _is_rms_norm(module: Any) -> bool:
    if not _is_plain(module) or not hasattr(module, "variance_epsilon"):
        return False
    return [name for name, _ in module.named_parameters()] == ["weight"]


def _gradients(model: Model, batch: Sequences, norms: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """Return token scores and the gradients of norms; those of other weights are freed layer by layer."""
    model.train()
    logps = token_logps(model, batch).token_logps
    gradients = torch.autograd.grad(logps.sum(), [norm.weight for norm in norms]) if norms else ()
    return logps.detach(), [one.float() for one in gradients]


def _sharded_gradients(model: Model, batch: Sequences, norms: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """Return token scores and this rank's part of the gradients of norms, which FSDP2 sums in the backward pass alone."""
    model.train()
    logps = token_logps(model, batch).token_logps
    logps.sum().backward()
    gradients = [local_part(norm.weight.grad).clone() for norm in norms]
    model.zero_grad()
    return logps.detach(), gradients


def _norm(norm: Any, hidden_states: Tensor) -> Tensor:
    out: Tensor = _RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon, _product_type(hidden_states))
    return out


def _product_type(hidden: Tensor) -> torch.dtype | None:
    """Return the type that autocast casts the inputs of matrices to; None without autocast."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _RMSNorm(torch.autograd.Function):
    """`weight * x / rms(x)`, rounded to the type of the matrices that follow."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        out = weight * (wide * scale).to(x.dtype)
        return out if dtype is None else out.to(dtype)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normalized = grad.float(), x.float() * scale
        grad_weight = (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        flow = grad * weight
        flow.sub_(normalized.mul_((flow * normalized).mean(-1, keepdim=True))).mul_(scale)
        return flow.to(x.dtype), grad_weight, None, None


def _swiglu(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = _SiLUProduct.apply(gate, up)
    if not torch.is_grad_enabled():
        out: Tensor = mlp.down_proj(product)
        return out
    # The matrix that follows keeps its input. Here it keeps the recipe, and computes the input again.
    again = _Recomputed(gate.detach(), up.detach())
    with saved_tensors_hooks(partial(_pack, product.data_ptr(), product.shape, again), _unpack):
        return mlp.down_proj(product)


class _Recomputed:
    """A product that is computed when it is needed."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.gate, self.up = gate, up

    def __call__(self) -> Tensor:
        return nn.functional.silu(self.gate) * self.up


def _pack(address: int, shape: torch.Size, again: _Recomputed, saved: Tensor) -> Any:
    is_product = saved.data_ptr() == address and saved.numel() == shape.numel()
    return (again, saved.shape) if is_product else saved


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, tuple):
        again: Callable[[], Tensor] = packed[0]
        return again().view(packed[1])
    saved: Tensor = packed
    return saved


class _SiLUProduct(torch.autograd.Function):
    """`silu(gate) * up`."""

    @staticmethod
    def forward(ctx: AutogradContext, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * nn.functional.silu(gate)
