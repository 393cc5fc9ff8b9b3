"""Compute log-probabilities of completions: both stages score with this one implementation.

    token ids     p0 p1 p2 c0 c1 </s>          p: prompt, c: completion
    hidden state     h2 h3 h4                  h_t predicts token t + 1
    scored                 c0 c1 </s>          log softmax(head(h_t))[token_{t+1}]

Only hidden states at completion positions are multiplied by the vocabulary's matrix (`head.py`), so no tensor of shape
(batch, length, vocabulary) exists. The softmax is float32 for every dtype of the model, and sums are float64: in
bfloat16 a sum near -500 has a resolution of 2 to 4 nats.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.attention import EAGER, apply_softcaps, attention_set_to, takes_boundaries
from offline_kto.kto_core.scoring.head import selected_logps
from offline_kto.kto_core.scoring.known_boundaries import known_boundaries
from offline_kto.kto_core.scoring.model_code import family_of, model_code
from offline_kto.kto_core.scoring.output_layer import Head
from offline_kto.kto_core.scoring.sequences import TokenIds, boundary_arguments, pad_sequences
from offline_kto.kto_core.scoring.shared_attention import shared_arguments
from offline_kto.kto_core.scoring.shared_prompts import Batch, SharedPrompts, hidden_states

# Rounding can raise the log-probability of a certain token above 0 nats by this much; more is an error.
POSITIVE_ROUNDING = 1e-4

# A single token may be this many times as far apart as all tokens may be in the mean. In bfloat16 the model's own logits
# are rounded by up to 0.06 nats, and the largest of many differences says little: among those of a model with 8 billion
# weights it was 0.26 nats.
_SINGLE = 8.0

# Arguments of a model's body.
_POSITIONS, _BOUNDARIES = "position_ids", "cu_seq_lens_q"


class Scored(NamedTuple):
    """The result of the scoring forward.

    Attributes:
        token_logps: float32 nats, shape (completion tokens of the micro-batch,), row after row.
        router_logits: for mixture-of-experts models, one tensor (batch * length, experts) for each layer.
    """

    token_logps: Tensor
    router_logits: tuple[Tensor, ...]


def add_scoring_forward(model: Model) -> None:
    """Extend `model.forward` so that a call with `batch=` returns `Scored`.

    The model's own forward is patched, rather than wrapped from outside, because DDP, FSDP, DeepSpeed, autocast and
    PEFT all hook into that call. Calls without `batch` are unchanged. The output layer's forward is patched for the
    same reason: sharded weights exist only during their module's call. Capped attention gets a kernel that applies the
    cap.

    Args:
        model: a `transformers` causal language model (for PEFT, the model inside).

    Raises:
        ModelError: the output embedding is not a linear layer, or the attention kernel cannot be changed to one that
            applies the model's soft-cap.
    """
    Head.of(model)
    apply_softcaps(model)
    original: Callable[..., object] = model.forward
    takes = frozenset(name for name in (_POSITIONS, _BOUNDARIES) if _takes(_body(model), name))

    @functools.wraps(original)
    def forward(*args: object, batch: Batch | None = None, router_logits: bool = False, **kwargs: object) -> object:
        if batch is None:
            return original(*args, **kwargs)
        return _score(model, batch, router_logits, takes)

    model.forward = forward
    _add_head_forward(model)


def _add_head_forward(model: Model) -> None:
    layer = model.get_output_embeddings()
    original: Callable[..., Tensor] = layer.forward

    @functools.wraps(original)
    def forward(hidden: Tensor, *args: object, targets: Tensor | None = None, **kwargs: object) -> Tensor:
        if targets is None:
            return original(hidden, *args, **kwargs)
        head = Head.of(model)
        found = selected_logps(hidden.to(head.weight.device), targets.to(head.weight.device), head)
        return found.to(targets.device)  # a model over several GPUs has its head on another one than its inputs

    layer.forward = forward


def _body(model: Model) -> Model:
    """Return the model without its output layer."""
    # `base_model` is the model itself if `base_model_prefix` is not the name of the body's attribute.
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _score(model: Model, batch: Batch, router_logits: bool, takes: Collection[str]) -> Scored:
    """Score a batch.

    Args:
        takes: names among `_POSITIONS` and `_BOUNDARIES` that the model's body has as arguments.
    """
    gives_boundaries = _BOUNDARIES in takes and takes_boundaries(getattr(model.config, "_attn_implementation", None))
    if isinstance(batch, SharedPrompts):
        with known_boundaries(batch):
            hidden = hidden_states(
                _body(model), batch, takes_positions=_POSITIONS in takes, takes_boundaries=gives_boundaries
            )
        return Scored(_of_completions(model, hidden, batch), ())
    extra: dict[str, object] = {}
    if _POSITIONS in takes:
        # Explicit, because models with absolute positions otherwise derive them from an attention mask.
        extra[_POSITIONS] = batch.position_ids
    if batch.shared is not None:
        if _BOUNDARIES not in takes:
            raise ModelError(f"{type(model).__name__}: its code does not pass arguments on to attention.")
        extra |= shared_arguments(batch)
    elif gives_boundaries:
        extra |= boundary_arguments(batch.boundaries, batch.boundaries, batch.widest, batch.widest)
    if router_logits:
        extra["output_router_logits"] = True
    with known_boundaries(batch):
        out = _body(model)(input_ids=batch.input_ids, use_cache=False, return_dict=True, **extra)
    logps = _of_completions(model, out.last_hidden_state.flatten(0, 1), batch)
    return Scored(logps, tuple(getattr(out, "router_logits", None) or ()) if router_logits else ())


def _of_completions(model: Model, hidden: Tensor, batch: Batch) -> Tensor:
    """Return log-probs of the completion tokens, from all hidden states of a micro-batch, (states, hidden size)."""
    hidden = hidden.index_select(0, batch.predicts.to(hidden.device))  # (completion tokens, hidden size)
    return model.get_output_embeddings()(hidden, targets=batch.targets)


def token_logps(model: Model, batch: Batch, *, router_logits: bool = False) -> Scored:
    """Score one micro-batch with a model prepared by `add_scoring_forward`, wrapped or not."""
    return Scored(*model(batch=batch, router_logits=router_logits))


def sees_whole_passes(model: Model) -> bool:
    """Return whether a row's scores depend on the other rows of its pass, so that rows have to run one by one.

    LLM.int8() computes a column in 16 bits if any token of the pass has a large value in it, and in 8 bits otherwise.
    """
    settings = getattr(model.config, "quantization_config", None)
    if not isinstance(settings, dict):
        settings = vars(settings) if settings is not None else {}
    eight = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
    return bool(eight and settings.get("llm_int8_threshold", 6.0))


def check_scoring(model: Model, rows: Sequence[TokenIds], *, tolerance: float) -> float:
    """Compare the scoring forward, batched and padded, with the model's own logits, row by row.

    This detects model families whose head or positions are not supported, those that are not causal, and attention
    kernels that leave out part of the model's definition.

    Args:
        model: prepared by `add_scoring_forward`, in eval mode.
        rows: at least one (prompt ids, completion ids); use two of different length to test padding.
        tolerance: mean difference allowed, nats a token; a single token may be 8 times as far apart.

    Returns:
        The mean difference, nats a token.

    Raises:
        ModelError: the two disagree, later tokens change earlier log-probs, or the model's code fails.
    """
    name, family = type(model).__name__, family_of(model)
    with torch.no_grad(), model_code(name, f"this model family ({family}) cannot be scored from its hidden states"):
        moved = 0.0 if sees_whole_passes(model) else _moved_by_later_tokens(model, rows)
        if not moved <= tolerance:
            raise ModelError(
                f"{name}: this model family ({family}) attends to later tokens (changing them moves log-probabilities "
                f"before them by up to {moved:.3g} nats), so it is not a causal language model: scores in a batch would differ "
                "from the model's own logits."
            )
        apart = _moved_by_kernel(model, rows)
        if not apart <= tolerance:
            kernel = model.config._attn_implementation
            raise ModelError(
                f"{name}: {kernel} attention omits part of the definition of this model family ({family}): log-probabilities "
                f"differ from those of its eager attention by {apart:.3g} nats a token. Add "
                '"attn_implementation": "eager" to its config.json.'
            )
        distances = _apart_from_own_logits(model, rows)
        mean, largest = float(distances.mean()), float(distances.max())
    if not (mean <= tolerance and largest <= _SINGLE * tolerance):
        raise ModelError(
            f"{name}: log-probabilities from hidden states differ from the model's own logits by {mean:.3g} nats a token in the "
            f"mean and by {largest:.3g} at most (allowed: {tolerance:g} and {_SINGLE * tolerance:g}). This model family ({family}) "
            "changes its logits or positions in a way that is not supported; please report the model's name."
        )
    return mean


def _apart_from_own_logits(model: Model, rows: Sequence[TokenIds]) -> Tensor:
    """Return how far the scoring forward and the model's own logits are apart, for each token, nats."""
    passes = [[row] for row in rows] if sees_whole_passes(model) else [rows]
    scored = torch.cat([token_logps(model, pad_sequences(one).to(_device(model))).token_logps for one in passes])
    ours = scored.double().split([len(completion) for _, completion in rows])
    own = [_own_logps(model, np.concatenate(row))[len(row[0]) - 1 :] for row in rows]
    if not all(one.isfinite().all() for one in own):
        raise ModelError(
            f"{type(model).__name__}: its own log-probabilities are infinite or NaN. Its weights are damaged, or too large for "
            "--dtype. Copy the model again, or try --dtype float32."
        )
    return torch.cat([_distances(mine - theirs) for mine, theirs in zip(ours, own, strict=True)])


def _moved_by_later_tokens(model: Model, rows: Sequence[TokenIds]) -> float:
    """Return how much log-probabilities change when later tokens are changed; 0 for causal models."""
    ids = np.concatenate(max(rows, key=lambda row: len(row[0]) + len(row[1])))
    kept = (len(ids) + 1) // 2  # at least one token before, and one after
    changed, known = ids.copy(), np.concatenate([part for row in rows for part in row])
    changed[kept:] = other_ids(ids[kept:], known, len(model.get_input_embeddings().weight))
    before, after = (_own_logps(model, one, targets=ids[1 : kept + 1]) for one in (ids, changed))
    return float((before - after).abs().nan_to_num(nan=0.0).max())


def other_ids(ids: np.ndarray, known: np.ndarray, vocabulary: int) -> np.ndarray:
    """Return another token for each of `ids`, taken from the data, because some ids (an image's) are not text."""
    pool = np.unique(known)
    pool = pool if len(pool) > 1 else np.unique([pool[0], (pool[0] + 1) % vocabulary])
    return pool[(np.searchsorted(pool, ids) + 1) % len(pool)]


def _moved_by_kernel(model: Model, rows: Sequence[TokenIds]) -> float:
    """Return the mean difference between the chosen and eager attention, nats per token; 0 if only one exists."""
    if getattr(model.config, "_attn_implementation", None) in (None, EAGER):
        return 0.0
    ids = np.concatenate(max(rows, key=lambda row: len(row[0]) + len(row[1])))
    chosen = _own_logps(model, ids)
    try:
        with model_code(type(model).__name__, "cannot compute eager attention"), attention_set_to(model, EAGER):
            eager = _own_logps(model, ids)
    except (ModelError, torch.OutOfMemoryError):  # not every model can compute it
        return 0.0
    return float((chosen - eager).abs().nan_to_num(nan=0.0).mean())


def _own_logps(model: Model, ids: np.ndarray, *, targets: np.ndarray | None = None) -> Tensor:
    """Return log-probabilities of `targets`, by default the following tokens, from the model's own logits.

    Args:
        ids: one sequence.
        targets: tokens to score at its first positions.

    Returns:
        float64 nats, shape (targets,).
    """
    targets = ids[1:] if targets is None else targets
    device = _device(model)
    inputs, wanted = (torch.from_numpy(one.astype(np.int64)).to(device) for one in (ids, targets))
    logits = model(input_ids=inputs[None], use_cache=False).logits[0, : len(wanted)].double()
    return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]


def _distances(differences: Tensor) -> Tensor:
    return differences.abs().nan_to_num(nan=float("inf"))


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device
