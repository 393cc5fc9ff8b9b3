"""Attention over micro-batches whose rows share prompts, with gradient (`share_keys` in `sequences.py`).

    keys       p0 p1 c0 c1 c2 d0 d1             in each layer, computed once
    gathered   p0 p1 | p0 p1 c0 c1 c2 | p0 p1 d0 d1
    queries    p0 p1 |       c0 c1 c2 |       d0 d1

Everything but attention sees each prompt once. Attention sees its keys once for each of its parts: they are selected
within each layer, so that gradient checkpointing, adapters, compiled and sharded layers see nothing but another argument.
An implementation of `transformers` is extended under its own name; calls without that argument are unchanged.

Whether a model does so correctly is checked in `train/trainer/prompt_sharing.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offline_kto.kto_core.library_types import ModelConfig, Transformers
from offline_kto.kto_core.scoring.attention import SDPA, is_flash
from offline_kto.kto_core.scoring.known_boundaries import current_batch
from offline_kto.kto_core.scoring.sequences import Sequences, boundary_arguments
from offline_kto.kto_core.scoring.varlen_attention import VARLEN, Attend, varlen_attention, why_not_varlen

# The argument that reaches attention through a model's layers.
KEY_SLOTS = "shared_key_slots"


def shared_arguments(batch: Sequences) -> dict[str, object]:
    """Return the arguments that tell attention which keys each part of a batch attends to."""
    assert batch.shared is not None
    keys = batch.shared
    return {
        KEY_SLOTS: keys.slots,
        **boundary_arguments(batch.boundaries, keys.boundaries, batch.widest, keys.widest),
    }


def why_not_shared(config: ModelConfig, kernel: str | None, device: torch.device) -> str | None:
    """Return why an attention implementation cannot compute a model with shared prompts; None if it may."""
    if getattr(config.get_text_config(), "is_encoder_decoder", False):
        return "the model has an encoder"
    if kernel in (SDPA, VARLEN):
        return why_not_varlen(config, device)
    return None if is_flash(kernel) else f"{kernel} attention does not take the keys of another row"


def register_shared(library: Transformers, kernel: str) -> None:
    """Let an attention implementation of `transformers` select keys in this process.

    Args:
        library: `transformers`.
        kernel: one without `why_not_shared`.
    """
    attentions = library.modeling_utils.ALL_ATTENTION_FUNCTIONS
    masks = library.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if getattr(attentions[kernel], "selects_keys", False):
        return
    # Entries of the instance that models use come before registered ones, and another library may have made one.
    attentions[kernel] = _selecting(attentions[kernel], has_boundaries=kernel != SDPA)
    library.AttentionInterface.register(kernel, attentions[kernel])
    if kernel == SDPA:
        masks[kernel] = _without_shared(masks[kernel])
        library.AttentionMaskInterface.register(kernel, masks[kernel])


def _selecting(original: Attend, *, has_boundaries: bool) -> Attend:
    """Return an attention that selects keys.

    Args:
        has_boundaries: whether `original` takes boundaries.
    """
    of_parts = original if has_boundaries else varlen_attention(original)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        slots = kwargs.pop(KEY_SLOTS, None)
        if slots is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        slots = slots.to(key.device)  # layers may be on several GPUs
        return of_parts(module, query, key.index_select(2, slots), value.index_select(2, slots), None, *args, **kwargs)

    vars(attention)["selects_keys"] = True
    return attention


def _without_shared(original: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        batch = current_batch()
        # The boundaries, causality and windows are arguments of the attention itself.
        return None if isinstance(batch, Sequences) and batch.shared is not None else original(*args, **kwargs)

    return mask
