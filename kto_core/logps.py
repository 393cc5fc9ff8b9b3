"""Log-probabilities of completions: the one implementation that both stages score with.

    token ids     p0 p1 p2 c0 c1 </s>          p: prompt, c: completion
    hidden state     h2 h3 h4                  h_t predicts token t + 1
    scored                 c0 c1 </s>          log softmax(head(h_t))[token_{t+1}]

Only hidden states at completion positions meet the vocabulary, in chunks, so no tensor of shape
(batch, length, vocabulary) exists; the softmax is float32 whatever the model's dtype, and sums are
float64: in bfloat16 a sum near -500 moves in steps of 2 to 4 nats.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kto_core.errors import ModelError

# Elements of one chunk of float32 logits: small enough to stay near the caches of a CPU, large
# enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**24}
_CHUNK_ELEMENTS_ACCELERATOR = 2**26

# Rounding can lift a probability of 1 above 0 nats by this much; more means a wrong computation.
POSITIVE_ROUNDING = 1e-4


class Sequences(NamedTuple):
    """One micro-batch, right-padded.

    Attributes:
        input_ids: int64, shape (batch, length).
        completion_mask: bool, shape (batch, length), true at completion tokens.
    """

    input_ids: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device | str) -> "Sequences":
        return Sequences(self.input_ids.to(device), self.completion_mask.to(device))


class Scored(NamedTuple):
    """What the scoring forward returns.

    Attributes:
        token_logps: float32 nats, shape (completion tokens of the micro-batch,), row after row.
        router_logits: for mixture-of-experts models, one tensor (batch * length, experts) for each layer.
    """

    token_logps: Tensor
    router_logits: tuple[Tensor, ...]


def pad_sequences(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Sequences:
    """Right-pad (prompt ids, completion ids) pairs.

    Right padding needs no attention mask under causal attention: what stands behind a token never
    reaches it. Pad ids are 0 (any valid id would do); they are neither attended to nor scored.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, : len(prompt)] = prompt
        ids[i, len(prompt) : end] = completion
        mask[i, len(prompt) : end] = True
    return Sequences(torch.from_numpy(ids), torch.from_numpy(mask))


def sum_rows(token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """Sum per-token log-probs into `logps`.

    Args:
        token_logps: shape (completion tokens,), row after row.
        completion_mask: shape (batch, length).

    Returns:
        float64 nats, shape (batch,).
    """
    row_of_token = completion_mask.nonzero(as_tuple=True)[0]
    sums = torch.zeros(len(completion_mask), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, row_of_token, token_logps.double())


@dataclass(frozen=True)
class Head:
    """What stands between hidden states and logits: `softcap * tanh((h W^T + b) * scale / softcap)`."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """Read the head of a causal language model and its family's scaling.

        Raises:
            ModelError: the output embedding is no linear layer.
        """
        layer = model.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        if weight is None or weight.ndim != 2:
            raise ModelError(
                f"{type(model).__name__} has no linear output layer; only causal language models can be scored."
            )
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(weight, getattr(layer, "bias", None), _logit_scale(config), softcap or None)


def _logit_scale(config: Any) -> float:
    """Factor on the logits. Cohere and Falcon-H1 multiply, Granite divides."""
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
    """`log_softmax(head(hidden))[targets]`, chunk by chunk, in the backward pass as well.

    Args:
        hidden: shape (tokens, hidden size), any float dtype.
        targets: int64, shape (tokens,).
        head: the projection; its weight may be frozen, then it gets no gradient.

    Returns:
        float32 nats (float64 for a float64 model), shape (tokens,).
    """
    # Under autocast the matmuls of the model run in its dtype; so does this one.
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    logps: Tensor = _SelectedLogps.apply(hidden, head.weight, head.bias, targets, head.scale, head.softcap, dtype)
    return logps


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    return max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ACCELERATOR) // vocabulary)


class _SelectedLogps(torch.autograd.Function):
    """Recomputes each chunk of logits in the backward pass: memory is one chunk, not (tokens, vocabulary)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        normalizer = torch.empty_like(logps)
        # With gradients the cast weight would be kept anyway; cast once, not once for each chunk.
        project = _Projection(weight.to(dtype), bias, scale, softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(hidden), len(weight), hidden.device):
                logits = project(hidden[part].to(dtype))
                normalizer[part] = torch.logsumexp(logits, dim=-1)
                logps[part] = logits.gather(1, targets[part, None])[:, 0] - normalizer[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.options = (scale, softcap, dtype)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        scale, softcap, dtype = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        cast = weight.to(dtype)
        project = _Projection(cast, bias, scale, softcap)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(hidden), len(weight), hidden.device):
                rows = hidden[part].to(dtype)
                logits = project(rows)
                slope = project.slope(logits)
                # d logp / d logits = onehot(target) - softmax(logits)
                flow = (logits - normalizer[part, None]).exp_().mul_(-grad[part, None])
                flow.scatter_add_(1, targets[part, None], grad[part, None].to(flow.dtype))
                flow = (flow if slope is None else flow.mul_(slope)).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (flow @ cast).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, flow.T, rows)
                if grad_bias is not None:
                    # The bias is added before the scaling, as the weight is.
                    grad_bias += flow.sum(0, dtype=normalizer.dtype).to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    step = _chunk_rows(vocabulary, device)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += (left @ right).to(total.dtype)


class _Projection(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (h W^T + b), shape (tokens, vocabulary), or None where it is 1."""
        if self.softcap is not None:
            return (1 - (logits / self.softcap) ** 2) * self.scale
        if self.scale != 1.0:
            return torch.full_like(logits[:1, :1], self.scale)
        return None


def add_scoring_forward(model: Any) -> None:
    """Teach `model.forward` to score: called with `completion_mask` it returns `Scored`.

    The model's own forward is patched, rather than wrapped from outside, because DDP, FSDP,
    DeepSpeed, autocast and PEFT all hook into that call; without `completion_mask` it is unchanged.

    Args:
        model: a `transformers` causal language model (for PEFT, the model inside).
    """
    original: Callable[..., Any] = model.forward
    takes_positions = _takes(model.base_model, "position_ids")

    @functools.wraps(original)
    def forward(*args: Any, completion_mask: Tensor | None = None, router_logits: bool = False, **kwargs: Any) -> Any:
        if completion_mask is None:
            return original(*args, **kwargs)
        return _score(model, kwargs["input_ids"], completion_mask, router_logits, takes_positions)

    model.forward = forward


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _score(
    model: Any, input_ids: Tensor, completion_mask: Tensor, router_logits: bool, takes_positions: bool
) -> Scored:
    extra: dict[str, Any] = {}
    if takes_positions:
        # Explicit: models with absolute positions otherwise guess them from a mask they are not given.
        extra["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if router_logits:
        extra["output_router_logits"] = True
    out = model.base_model(input_ids=input_ids, use_cache=False, return_dict=True, **extra)
    # The hidden state at t predicts token t + 1.
    predicts = completion_mask[:, 1:]  # (batch, length - 1)
    hidden = out.last_hidden_state[:, :-1][predicts]  # (completion tokens, hidden)
    head = Head.of(model)
    logps = selected_logps(hidden.to(head.weight.device), input_ids[:, 1:][predicts], head)
    return Scored(logps, tuple(getattr(out, "router_logits", None) or ()) if router_logits else ())


def token_logps(model: Any, batch: Sequences, *, router_logits: bool = False) -> Scored:
    """Score one micro-batch with a model prepared by `add_scoring_forward`, wrapped or not."""
    scored = model(input_ids=batch.input_ids, completion_mask=batch.completion_mask, router_logits=router_logits)
    return Scored(*scored)


def check_scoring(model: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]], *, tolerance: float) -> float:
    """Compare the scoring forward, batched and padded, with the model's own logits, row by row.

    Catches model families whose head or positions work in a way this module does not know.

    Args:
        model: prepared by `add_scoring_forward`, in eval mode.
        rows: at least one (prompt ids, completion ids); use two of different length to test padding.
        tolerance: largest difference allowed for one token, nats.

    Returns:
        The largest difference for one token, nats.

    Raises:
        ModelError: the two disagree.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        batch = pad_sequences(rows).to(device)
        ours = token_logps(model, batch).token_logps.double().split([len(c) for _, c in rows])
        worst = 0.0
        for (prompt, completion), mine in zip(rows, ours, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double()
            own = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            difference = (own - mine).abs().nan_to_num(nan=float("inf"))
            worst = max(worst, float(difference.max()))
    if not worst <= tolerance:
        raise ModelError(
            f"{type(model).__name__}: log-probabilities from hidden states differ from the model's own logits by up to "
            f"{worst:.3g} nats a token (allowed: {tolerance:g}). This model family changes its logits or positions "
            "in a way that is not supported; please report the model's name."
        )
    return worst
