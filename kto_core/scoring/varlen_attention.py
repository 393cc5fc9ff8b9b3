"""Attention over concatenated sequences with `torch.nn.attention.varlen`, which needs no further package.

Registered with `transformers` under the name `varlen`. Without boundaries (shared prompts, the model's own logits) it is
sdpa. On a CPU, where PyTorch has no such kernel, each sequence goes through sdpa alone.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model, ModelConfig, Transformers
from offline_kto.kto_core.scoring.known_boundaries import current_batch

VARLEN = "varlen"

_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Arguments that change attention scores, and that the kernel does not have.
_UNKNOWN = ("softcap", "s_aux", "position_bias")

Attend: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]


def register_varlen(library: Transformers) -> None:
    """Make `varlen` an attention implementation of `transformers` in this process."""
    attentions = library.modeling_utils.ALL_ATTENTION_FUNCTIONS
    masks = library.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if VARLEN in attentions.valid_keys():
        return
    library.AttentionInterface.register(VARLEN, _attention(attentions["sdpa"]))
    library.AttentionMaskInterface.register(VARLEN, _mask(masks["sdpa"]))


def why_not_varlen(config: ModelConfig, device: torch.device) -> str | None:
    """Return why a model cannot use this attention on a device; None if it can."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or _LAYERS)
    if not kinds <= _LAYERS:
        return f"it has layers of another kind ({', '.join(sorted(kinds - _LAYERS))})"
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    from torch.nn.attention.varlen import varlen_attn

    missing = {"window_size", "enable_gqa", "scale"} - set(inspect.signature(varlen_attn).parameters)
    return f"the kernel of PyTorch {torch.__version__} has no {sorted(missing)[0]}" if missing else None


def _mask(sdpa_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        # The boundaries, causality and windows are arguments of the attention itself.
        return None if current_batch() is not None else sdpa_mask(*args, **kwargs)

    return mask


def _attention(sdpa: Attend) -> Attend:
    def attention(
        module: Model,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        sliding_window: int | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output, shape (batch, length, heads, size).

        Args:
            query, key, value: shape (batch, heads, length, size); keys and values may have fewer heads.
            attention_mask: None, or as for sdpa.
            cu_seq_lens_q: `Sequences.boundaries`, if the pass is a batch of whole sequences.
            max_length_q: `Sequences.widest`.
            sliding_window: the number of tokens that a token attends to, itself included.
        """
        if cu_seq_lens_q is None or max_length_q is None:
            if current_batch() is not None:
                raise ModelError(
                    f"--attention {VARLEN}: {type(module).__name__} is not told where sequences begin. Use --attention sdpa."
                )
            return sdpa(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **_passed_on(kwargs)
            )
        unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
        if unknown or not (kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)):
            what = unknown[0] if unknown else "attention to later tokens"
            raise ModelError(f"--attention {VARLEN}: {type(module).__name__} needs {what}. Use --attention sdpa.")
        window = (sliding_window - 1 if sliding_window is not None else -1, 0)
        q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))  # (tokens, heads, size)
        attend = _with_kernel if query.is_cuda else _one_by_one
        found = attend(q, k, v, cu_seq_lens_q, max_length_q, window, scaling)
        return found.unflatten(0, (query.shape[0], query.shape[2])), None

    return attention


def _passed_on(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("cu_seq_lens_k", "max_length_k")}


def _with_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    widest: int,
    window: tuple[int, int],
    scale: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # RoPE leaves queries and keys in float32 under autocast, which does not reach into this kernel.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    query, key, value = (one.to(dtype) for one in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    found = varlen_attn(
        query, key, value, boundaries, boundaries, widest, widest, scale=scale, window_size=window, enable_gqa=gqa
    )
    assert isinstance(found, Tensor)
    return found


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    widest: int,
    window: tuple[int, int],
    scale: float | None,
) -> Tensor:
    lengths = boundaries.diff().tolist()
    parts = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        mask = None
        if 0 <= window[0] < len(q) - 1:
            steps = torch.arange(len(q), device=q.device)
            ago = steps[:, None] - steps
            mask = (ago >= 0) & (ago <= window[0])
        q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))  # (1, heads, length, size)
        gqa = q.shape[1] != k.shape[1]
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)
