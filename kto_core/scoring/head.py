"""Compute log-probabilities of given tokens from hidden states, chunk by chunk, in a fixed amount of memory.

With a vocabulary of 152,000, a (tokens, vocabulary) tensor would be larger than everything else in a training step.
Here only one chunk of it exists at a time, in a buffer that is overwritten in place. The backward pass recomputes all
chunks but the last. On CUDA, `cuda_head.py` does the same with tiles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offline_kto.kto_core.library_types import AutogradContext
from offline_kto.kto_core.scoring import cuda_head
from offline_kto.kto_core.scoring.output_layer import Head, to_logits_

# Elements of one chunk of float32 logits (64 MiB on a CPU, 256 MiB on a GPU): large enough for the matrix product to
# run at full speed, and independent of the vocabulary.
_CHUNK_ELEMENTS = {"cpu": 2**24}
_CHUNK_ELEMENTS_ACCELERATOR = 2**26


def selected_logps(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return `log_softmax(head(hidden))[targets]`, computed chunk by chunk in both passes.

    Args:
        hidden: shape (tokens, hidden size), any float dtype.
        targets: int64, shape (tokens,).
        head: the projection; a frozen weight gets no gradient.

    Returns:
        float32 nats (float64 for a float64 model), shape (tokens,).
    """
    # Under autocast the matmuls of the model run in its dtype; so does this one.
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    if cuda_head.runs_on(hidden.device, dtype):
        return cuda_head.tiled_logps(hidden, targets, head, dtype=dtype)
    options = _Options(head.scale, head.softcap, dtype, head.gradient, keep=torch.is_grad_enabled())
    logps: Tensor = _SelectedLogps.apply(hidden, head.weight, head.bias, targets, options)
    return logps


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    dtype: torch.dtype
    gradient: Tensor | None
    keep: bool


class _SelectedLogps(torch.autograd.Function):
    """`selected_logps` with one buffer of logits; its last content is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: AutogradContext, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> Tensor:
        # The cast weight would be kept for gradients anyway, so it is cast once, not once for each chunk.
        project = _Projection(weight.to(options.dtype), bias, options.scale, options.softcap)
        chunks = _chunks(len(hidden), len(weight), hidden.device)
        buffer = project.buffer(chunks, hidden.device)
        logps = buffer.new_empty(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks:
                logits = project(hidden[part].to(options.dtype), buffer)
                logps[part] = _softmax_(logits, targets[part])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = options
        # The slope of a softcap needs the logits, which were overwritten.
        ctx.kept = buffer if options.keep and options.softcap is None else None
        return logps

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        scale, softcap, dtype, gradient, _ = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        project = _Projection(weight.to(dtype), bias, scale, softcap)
        chunks = _chunks(len(hidden), len(weight), hidden.device)
        # The buffer is overwritten below, so a second backward pass through the same graph recomputes this chunk too.
        kept, ctx.kept = ctx.kept, None
        buffer = kept if kept is not None else project.buffer(chunks, hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight, grad_bias = gradient, None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in reversed(chunks):
                rows = hidden[part].to(dtype)
                if kept is not None:
                    probabilities, slope, kept = kept[: len(rows)], None, None
                else:
                    probabilities = project(rows, buffer)
                    slope = project.softcap_slope(probabilities)
                    _softmax_(probabilities, targets[part])
                # d logp / d logits = onehot(target) - softmax(logits)
                flow = probabilities.mul_(-grad[part, None])
                flow.scatter_add_(1, targets[part, None], grad[part, None].to(flow.dtype))
                flow = flow if slope is None else flow.mul_(slope)
                flow = flow if scale == 1.0 else flow.mul_(scale)
                if need_bias:
                    # The bias is added before the scaling, as the weight is.
                    grad_bias = _plus(grad_bias, flow.sum(0))
                flow = flow.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = flow @ project.weight
                if need_weight:
                    grad_weight = _plus_product(grad_weight, flow.T, rows, weight.dtype)
        if need_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        if need_bias:
            grad_bias = torch.zeros_like(bias) if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight if gradient is None else None, grad_bias, None, None


def _chunks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Return slices of at most one buffer; the short one comes first, so that the last one, which is kept, is full."""
    step = max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ACCELERATOR) // vocabulary)
    ends = range(tokens % step or step, tokens + 1, step) if tokens > step else [tokens] * bool(tokens)
    return [slice(max(0, end - step), end) for end in ends]


def _softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (tokens, vocabulary) into probabilities, in place; return the targets' log-probabilities.

    Softmax as one fused operation is ten times as fast on a CPU as logsumexp. The largest probability of a row
    is `1 / sum(exp(logits - max))`, from which the log-probability of any token follows without underflow.
    """
    largest = logits.amax(-1)
    chosen = logits.gather(1, targets[:, None])[:, 0] - largest
    torch.softmax(logits, dim=-1, out=logits)
    return chosen + logits.amax(-1).log_()


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if dtype == left.dtype else total.add_(left @ right)


@dataclass(frozen=True)
class _Projection:
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def buffer(self, chunks: list[slice], device: torch.device) -> Tensor:
        """Return a buffer for the logits of the longest chunk, in float32 or wider."""
        rows = max((part.stop - part.start for part in chunks), default=0)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.empty(rows, len(self.weight), dtype=wide, device=device)

    def __call__(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Write the logits of some tokens into the buffer: newly allocated memory would double the time on a CPU."""
        logits = buffer[: len(hidden)]
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            logits.copy_(hidden @ self.weight.T)
        return to_logits_(logits, self.bias, self.scale, self.softcap)

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """Return d logits / d (uncapped logits), shape (tokens, vocabulary), or None if it is 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2
