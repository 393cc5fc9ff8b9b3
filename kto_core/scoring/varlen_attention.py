"""Attention over concatenated sequences with `torch.nn.attention.varlen`, which needs no further package.

Registered with `transformers` under the name `varlen`. Without boundaries (the model's own logits) it is sdpa. On a CPU,
where PyTorch has no such kernel, each sequence goes through sdpa alone.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_kto.kto_core.errors import ModelError, in_one_line, printable
from offline_kto.kto_core.library_types import Model, ModelConfig, Transformers
from offline_kto.kto_core.scoring.known_boundaries import current_batch

VARLEN = "varlen"

_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Arguments that change attention scores, and that the kernel does not have.
_UNKNOWN = ("softcap", "s_aux", "position_bias")

# Settings for the size of a head, the largest first, and the largest that the kernel supports.
_SIZES, _LARGEST = ("qk_head_dim", "global_head_dim", "head_dim"), 256

Attend: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]


def register_varlen(library: Transformers) -> None:
    """Make `varlen` an attention implementation of `transformers` in this process."""
    attentions = library.modeling_utils.ALL_ATTENTION_FUNCTIONS
    masks = library.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if VARLEN in attentions.valid_keys():
        return
    library.AttentionInterface.register(VARLEN, varlen_attention(attentions["sdpa"]))
    library.AttentionMaskInterface.register(VARLEN, _mask(masks["sdpa"]))


def why_not_varlen(config: ModelConfig, device: torch.device) -> str | None:
    """Return why a model cannot use this attention on a device; None if it can."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or _LAYERS)
    if not kinds <= _LAYERS:
        return f"it has layers of another kind ({', '.join(sorted(kinds - _LAYERS))})"
    if device.type != "cuda":
        return None
    why = _why_not_of_size(config.get_text_config())
    if why is not None:
        return why
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    from torch.nn.attention.varlen import varlen_attn

    missing = {"window_size", "scale"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        return f"the kernel of PyTorch {torch.__version__} has no {sorted(missing)[0]}"
    return _why_it_fails(_head_size(config.get_text_config()) or _LARGEST, device)


def _why_it_fails(size: int, device: torch.device) -> str | None:
    """Return why the kernel fails on a device, from two short sequences and their gradients; None if it runs.

    PyTorch has the function in every build, but its kernel only in some.
    """
    try:
        query, key, value = (
            torch.zeros(8, heads, size, dtype=torch.bfloat16, device=device, requires_grad=True) for heads in (2, 1, 1)
        )
        ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        _with_kernel(_Sequences(query, key, value, ends, ends, 5, 5, before=3, scale=None)).sum().backward()
    except Exception as error:  # noqa: BLE001 (whatever a build, a driver or a GPU raises)
        return f"the kernel of PyTorch {torch.__version__} fails here ({printable(in_one_line(error), 200)})"
    return None


def _head_size(config: ModelConfig) -> int | None:
    """Return the largest size of a model's heads, as far as its settings say."""
    heads = getattr(config, "num_attention_heads", None)
    usual = config.hidden_size // heads if isinstance(heads, int) else None
    return next((one for name in _SIZES if isinstance(one := getattr(config, name, None), int)), usual)


def _why_not_of_size(config: ModelConfig) -> str | None:
    """Return why the kernel does not support the size of a model's heads; None if it does."""
    size = _head_size(config)
    values = getattr(config, "v_head_dim", None) or size
    if size is None or (size % 8 == 0 and size <= _LARGEST and values == size):
        return None
    of_values = f" ({values} in values)" if values != size else ""
    return f"the kernel needs heads of one size, a multiple of 8 up to {_LARGEST}, and its heads have {size}{of_values}"


def _mask(sdpa_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        # The boundaries, causality and windows are arguments of the attention itself.
        return None if current_batch() is not None else sdpa_mask(*args, **kwargs)

    return mask


def varlen_attention(sdpa: Attend) -> Attend:
    """Return the attention that takes boundaries, and is `sdpa` without them."""

    def attention(
        module: Model,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        sliding_window: int | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output, shape (batch, length, heads, size).

        Args:
            query, key, value: shape (batch, heads, length, size); keys and values may have fewer heads.
            attention_mask: None, or as for sdpa.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: from `boundary_arguments`, in a scoring pass.
            sliding_window: the number of tokens that a token attends to, itself included.
        """
        if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            if current_batch() is not None:
                raise ModelError(
                    f"--attention {VARLEN}: {type(module).__name__} is not told where sequences begin. Use --attention sdpa."
                )
            return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
        if unknown or not (kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)):
            what = unknown[0] if unknown else "attention to later tokens"
            raise ModelError(f"--attention {VARLEN}: {type(module).__name__} needs {what}. Use --attention sdpa.")
        q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
        attend = _with_kernel if query.is_cuda else _one_by_one
        found = attend(
            _Sequences(
                query=q,
                key=k,
                value=v,
                query_boundaries=cu_seq_lens_q,
                key_boundaries=cu_seq_lens_k,
                longest_query=max_length_q,
                longest_key=max_length_k,
                before=-1 if sliding_window is None else sliding_window - 1,
                scale=scaling,
            )
        )
        return found.unflatten(0, (query.shape[0], query.shape[2])), None

    return attention


class _Sequences(NamedTuple):
    """Concatenated sequences, as arguments of attention.

    Attributes:
        query, key, value: shape (tokens, heads, size).
        query_boundaries, key_boundaries, longest_query, longest_key: as in `boundary_arguments`.
        before: the number of earlier tokens that a token attends to; -1 for all.
        scale: factor on the scores; None for the usual one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_boundaries: Tensor
    key_boundaries: Tensor
    longest_query: int
    longest_key: int
    before: int
    scale: float | None

    @property
    def has_groups(self) -> bool:
        """Return whether several heads of queries share one of keys."""
        return self.query.shape[1] != self.key.shape[1]


def _with_kernel(given: _Sequences) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # RoPE leaves queries and keys in float32 under autocast, which does not reach into this kernel.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else given.value.dtype
    query, key, value = given.query.to(dtype), given.key.to(dtype), given.value.to(dtype)
    grouped: Any = {}
    if given.has_groups and _takes_groups():
        grouped = {"enable_gqa": True}
    elif given.has_groups:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    found = varlen_attn(
        query,
        key,
        value,
        given.query_boundaries,
        given.key_boundaries,
        given.longest_query,
        given.longest_key,
        scale=given.scale,
        window_size=(given.before, 0),
        **grouped,
    )
    assert isinstance(found, Tensor)
    return found


@functools.cache
def _takes_groups() -> bool:
    """Return whether the kernel takes fewer heads of keys than of queries, as since PyTorch 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _one_by_one(given: _Sequences) -> Tensor:
    queries, keys = (one.diff().tolist() for one in (given.query_boundaries, given.key_boundaries))
    parts = zip(given.query.split(queries), given.key.split(keys), given.value.split(keys), strict=True)
    return torch.cat([_one(q, k, v, given) for q, k, v in parts if len(q)])


def _one(query: Tensor, key: Tensor, value: Tensor, given: _Sequences) -> Tensor:
    """Return the attention of one sequence, whose last queries and keys belong to the same token."""
    mask = None
    if len(query) < len(key) or 0 <= given.before < len(query) - 1:
        slots = torch.arange(len(key), device=key.device)
        ago = slots[len(key) - len(query) :, None] - slots
        mask = (ago >= 0) & (ago <= given.before) if given.before >= 0 else ago >= 0
    q, k, v = (one.transpose(0, 1)[None] for one in (query, key, value))  # (1, heads, length, size)
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=given.scale, enable_gqa=given.has_groups
    )
    return found[0].transpose(0, 1)
