"""Compute log-probabilities of given tokens from hidden states, chunk by chunk, in a fixed amount of memory.

With a vocabulary of 152,000, a (tokens, vocabulary) tensor would be larger than everything else in a training step.
Here only one chunk of it exists at a time, in a buffer that is overwritten in place. The backward pass recomputes all
chunks but the last. On CUDA, `cuda_head.py` does the same with tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import AutogradContext, Model, ModelConfig
from offline_kto.kto_core.scoring import cuda_head

# Elements of one chunk of float32 logits (64 MiB on a CPU, 256 MiB on a GPU): large enough for the matrix product to
# run at full speed, and independent of the vocabulary.
_CHUNK_ELEMENTS = {"cpu": 2**24}
_CHUNK_ELEMENTS_ACCELERATOR = 2**26

# Attribute of an output layer whose gradient exists before the forward pass; the backward pass adds to it in place.
_IN_PLACE = "gradient_in_place"


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `softcap * tanh((h W^T + b) * scale / softcap)`."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None
    scale: float
    softcap: float | None
    # The tensor to which the weight's gradient is added, instead of being returned: see `add_gradients_in_place`.
    gradient: Tensor | None = None

    @classmethod
    def of(cls, model: Model) -> "Head":
        """Read the head of a causal language model and its family's scaling.

        Raises:
            ModelError: the output embedding is not a linear layer.
        """
        layer = model.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        if weight is None or len(whole_shape(weight)) != 2:
            raise ModelError(
                f"{type(model).__name__} has no linear output layer; only causal language models can be scored."
            )
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        gradient = weight.grad if getattr(layer, _IN_PLACE, False) else None
        return cls(weight, getattr(layer, "bias", None), _logit_scale(config), softcap or None, gradient)


def add_gradients_in_place(model: Model) -> list[Tensor]:
    """Let backward passes add to the gradients of a model's largest matrices in place.

    By default, autograd allocates in every pass a tensor as large as the vocabulary's matrix for the output layer,
    another for the embeddings, and a third for their sum. This is only for unsharded weights, in one process or under
    DDP without its reducer: hooks on gradients do not see them.

    Returns:
        The weights; their `grad` must be a tensor (zeros at first) when a forward pass begins.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = []
    if head.weight.requires_grad:
        setattr(head, _IN_PLACE, True)
        weights.append(head.weight)
    if isinstance(embeddings, nn.Embedding) and embeddings.weight.requires_grad:
        embeddings.sparse = True  # the gradient then has only the rows that were read
        weights += [] if embeddings.weight is head.weight else [embeddings.weight]
    return weights


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's unsharded shape, which DeepSpeed ZeRO-3 notes when it empties the tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _logit_scale(config: ModelConfig) -> float:
    """Return the factor on the logits. Cohere and Falcon-H1 multiply, Granite divides."""
    for name in ("logit_scale", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if isinstance(scale, str):
            raise ModelError(f"{config.model_type} models with {name} {scale!r} are not supported.")
        if scale is not None:
            return float(scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0


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
        return cuda_head.tiled_logps(
            hidden,
            head.weight,
            head.bias,
            targets,
            scale=head.scale,
            softcap=head.softcap,
            dtype=dtype,
            gradient=head.gradient,
        )
    logps: Tensor = _SelectedLogps.apply(
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, dtype, head.gradient, torch.is_grad_enabled()
    )
    return logps


class _SelectedLogps(torch.autograd.Function):
    """`selected_logps` with one buffer of logits; its last content is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        gradient: Tensor | None,
        keep: bool,
    ) -> Tensor:
        # The cast weight would be kept for gradients anyway, so it is cast once, not once for each chunk.
        project = _Projection(weight.to(dtype), bias, scale, softcap)
        chunks = _chunks(len(hidden), len(weight), hidden.device)
        buffer = project.buffer(chunks, hidden.device)
        logps = buffer.new_empty(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks:
                logits = project(hidden[part].to(dtype), buffer)
                logps[part] = _softmax_(logits, targets[part])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = (scale, softcap, dtype, gradient)
        # The slope of a softcap needs the logits, which were overwritten.
        ctx.kept = buffer if keep and softcap is None else None
        return logps

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        scale, softcap, dtype, gradient = ctx.options
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
        return grad_hidden, grad_weight if gradient is None else None, grad_bias, *[None] * 6


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
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """Return d logits / d (uncapped logits), shape (tokens, vocabulary), or None if it is 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2
