"""Log-probabilities of completions: the one implementation that both stages score with.

    token ids     p0 p1 p2 c0 c1 </s>          p: prompt, c: completion
    hidden state     h2 h3 h4                  h_t predicts token t + 1
    scored                 c0 c1 </s>          log softmax(head(h_t))[token_{t+1}]

Only hidden states at completion positions meet the vocabulary (`head.py`), so no tensor of shape
(batch, length, vocabulary) exists; the softmax is float32 whatever the model's dtype, and sums are
float64: in bfloat16 a sum near -500 moves in steps of 2 to 4 nats.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kto_core.errors import ModelError, in_one_line
from kto_core.head import Head, selected_logps
from kto_core.sequences import Sequences, TokenIds, pad_sequences
from kto_core.shared_prompts import SharedPrompts, hidden_states

# Rounding can lift a probability of 1 above 0 nats by this much; more means a wrong computation.
POSITIVE_ROUNDING = 1e-4

Batch = Sequences | SharedPrompts


class Scored(NamedTuple):
    """What the scoring forward returns.

    Attributes:
        token_logps: float32 nats, shape (completion tokens of the micro-batch,), row after row.
        router_logits: for mixture-of-experts models, one tensor (batch * length, experts) for each layer.
    """

    token_logps: Tensor
    router_logits: tuple[Tensor, ...]


def add_scoring_forward(model: Any) -> None:
    """Teach `model.forward` to score: called with `batch=` it returns `Scored`.

    The model's own forward is patched, rather than wrapped from outside, because DDP, FSDP,
    DeepSpeed, autocast and PEFT all hook into that call; without `batch` it is unchanged. So is the
    output layer's, for the same reason: sharded weights exist only inside of their module's call.

    Args:
        model: a `transformers` causal language model (for PEFT, the model inside).

    Raises:
        ModelError: the output embedding is no linear layer.
    """
    Head.of(model)
    original: Callable[..., Any] = model.forward
    takes_positions = _takes(_body(model), "position_ids")

    @functools.wraps(original)
    def forward(*args: Any, batch: Batch | None = None, router_logits: bool = False, **kwargs: Any) -> Any:
        if batch is None:
            return original(*args, **kwargs)
        return _score(model, batch, router_logits, takes_positions)

    model.forward = forward
    _add_head_forward(model)


def _add_head_forward(model: Any) -> None:
    layer = model.get_output_embeddings()
    original: Callable[..., Any] = layer.forward

    @functools.wraps(original)
    def forward(hidden: Tensor, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        if targets is None:
            return original(hidden, *args, **kwargs)
        head = Head.of(model)
        return selected_logps(hidden.to(head.weight.device), targets.to(head.weight.device), head)

    layer.forward = forward


def _body(model: Any) -> Any:
    """The model below its output layer."""
    # Some name their body otherwise than they call it, and are handed back themselves.
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _score(model: Any, batch: Batch, router_logits: bool, takes_positions: bool) -> Scored:
    if isinstance(batch, SharedPrompts):
        hidden = hidden_states(_body(model), batch, takes_positions=takes_positions)
        return Scored(_of_completions(model, hidden, batch), ())
    extra: dict[str, Any] = {}
    if takes_positions:
        # Explicit: models with absolute positions otherwise guess them from a mask they are not given.
        extra["position_ids"] = batch.position_ids
    if router_logits:
        extra["output_router_logits"] = True
    out = _body(model)(input_ids=batch.input_ids, use_cache=False, return_dict=True, **extra)
    logps = _of_completions(model, out.last_hidden_state.flatten(0, 1), batch)
    return Scored(logps, tuple(getattr(out, "router_logits", None) or ()) if router_logits else ())


def _of_completions(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """From all hidden states of a micro-batch, (states, hidden size), to the log-probs of its completion tokens."""
    hidden = hidden.index_select(0, batch.predicts.to(hidden.device))  # (completion tokens, hidden size)
    return model.get_output_embeddings()(hidden, targets=batch.targets)


def token_logps(model: Any, batch: Batch, *, router_logits: bool = False) -> Scored:
    """Score one micro-batch with a model prepared by `add_scoring_forward`, wrapped or not."""
    return Scored(*model(batch=batch, router_logits=router_logits))


def check_scoring(model: Any, rows: Sequence[TokenIds], *, tolerance: float) -> float:
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
        try:
            scored = token_logps(model, batch).token_logps
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(
                f"{type(model).__name__}: this model family cannot be scored from its hidden states "
                f"({type(error).__name__}: {in_one_line(error)}); please report the model's name."
            ) from error
        ours = scored.double().split([len(c) for _, c in rows])
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
