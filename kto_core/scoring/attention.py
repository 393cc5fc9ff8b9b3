"""Which attention kernel computes a model: one that leaves part of the model's own definition out must never be used.

PyTorch's fused attention (sdpa, the default of `transformers`) has no soft-cap on attention scores, and drops the one
that Gemma 2 and its kin pass to it, without a word.
"""

import contextlib
import re
from collections.abc import Iterator

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model, ModelConfig

# Kernels that apply a soft-cap; every model defines itself by the first.
_CAPPING = ("eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

# `attn_logit_softcapping` and its other spellings.
_SOFTCAP = re.compile(r"att(n|ention)\w*_(soft_?cap|logits?_cap)")

# Parts of a model that no text goes through.
_NO_TEXT = ("vision", "audio", "image", "speech", "video")


def caps_attention(config: ModelConfig) -> bool:
    """Return whether a model limits its attention scores by a soft-cap.

    Args:
        config: the model's, from `transformers`.
    """
    return any(_SOFTCAP.search(name) and value for one in _text_configs(config) for name, value in vars(one).items())


def _text_configs(config: ModelConfig) -> Iterator[ModelConfig]:
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None and not any(word in name for word in _NO_TEXT):
            yield from _text_configs(part)


def apply_softcaps(model: Model) -> None:
    """Switch a model with capped attention scores to a kernel that applies the cap.

    Raises:
        ModelError: the model's code does not let its kernel be chosen.
    """
    if not caps_attention(model.config) or model.config._attn_implementation in _CAPPING:
        return
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise ModelError(
            f"{model.config.model_type}: its attention scores have a soft-cap, which {chosen} attention leaves out. Add "
            '"attn_implementation": "eager" to its config.json.'
        )


@contextlib.contextmanager
def eager_attention(model: Model) -> Iterator[None]:
    """Compute with the attention that a family's own file spells out, and afterwards with the chosen one again."""
    parts = getattr(model.config, "sub_configs", None) or ()
    chosen = {
        name: getattr(model.config, name)._attn_implementation for name in parts if getattr(model.config, name, None)
    }
    chosen[""] = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(chosen)
