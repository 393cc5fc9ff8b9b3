"""Choose an attention kernel that computes the model exactly as its family defines it.

PyTorch's fused attention (sdpa, the default of `transformers`) does not support soft-caps on attention scores. Where
`transformers` chooses it nevertheless (Gemma 2 in version 5.19), it silently ignores the soft-cap.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping

import torch

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model, ModelConfig
from offline_kto.kto_core.scoring.varlen_attention import VARLEN

EAGER, SDPA, FLEX = "eager", "sdpa", "flex_attention"

# The names of flash attention in `transformers`: of a package, or of a kernel on the hub (kernels-community/flash-attn3).
_FLASH = re.compile(r"flash_attention_\d+|[^/:]+/[^/:]*flash[^/:]*(:.+)?")

# `attn_logit_softcapping` and its other spellings.
_SOFTCAP = re.compile(r"att(n|ention)\w*_(soft_?cap|logits?_cap)")

# Parts of a model that do not process text.
_NO_TEXT = ("vision", "audio", "image", "speech", "video")


def is_flash(kernel: str | None) -> bool:
    """Return whether an attention implementation of `transformers` is a flash attention."""
    return kernel is not None and _FLASH.fullmatch(kernel) is not None


def takes_boundaries(kernel: str | None) -> bool:
    """Return whether an attention implementation takes the boundaries of concatenated sequences as arguments."""
    return kernel == VARLEN or is_flash(kernel)


def can_pack(model: Model, device: torch.device) -> bool:
    """Return whether concatenated sequences cost the model's attention no more than the same sequences apart."""
    return packs_on(getattr(model.config, "_attn_implementation", None), device)


def packs_on(kernel: str | None, device: torch.device) -> bool:
    """Return `can_pack` for an attention implementation. Flex attention skips masked blocks on a GPU only."""
    return kernel == VARLEN or (device.type == "cuda" and (kernel == FLEX or is_flash(kernel)))


def applies_softcaps(kernel: str | None) -> bool:
    """Return whether an attention implementation applies a soft-cap on attention scores, or refuses it by itself."""
    return kernel in (EAGER, FLEX) or is_flash(kernel)


def caps_attention(config: ModelConfig) -> bool:
    """Return whether a model has a soft-cap on its attention scores.

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


def kernel_keywords(config: Mapping[str, object]) -> dict[str, None]:
    """Return keywords for `from_pretrained` that turn a request for sdpa into the library's own choice.

    The library's own choice is sdpa wherever the model supports it. Recent versions of `transformers` refuse the
    request for models whose soft-cap sdpa ignores.

    Args:
        config: the content of config.json.
    """
    return {"attn_implementation": None} if config.get("attn_implementation") == SDPA else {}


def apply_softcaps(model: Model) -> None:
    """Switch a model with capped attention scores to a kernel that applies the cap.

    Raises:
        ModelError: the model's code does not support choosing its kernel.
    """
    chosen = model.config._attn_implementation
    if not caps_attention(model.config) or applies_softcaps(chosen):
        return
    model.set_attn_implementation(EAGER)
    if model.config._attn_implementation != EAGER:
        raise ModelError(
            f"{model.config.model_type}: its attention scores have a soft-cap, which {chosen} attention ignores. Add "
            '"attn_implementation": "eager" to its config.json.'
        )


@contextlib.contextmanager
def attention_set_to(model: Model, kernel: str) -> Iterator[None]:
    """Use another attention implementation while the block runs, then restore the chosen one."""
    parts = getattr(model.config, "sub_configs", None) or ()
    chosen = {
        name: getattr(model.config, name)._attn_implementation for name in parts if getattr(model.config, name, None)
    }
    chosen[""] = model.config._attn_implementation
    try:
        model.set_attn_implementation(kernel)
        yield
    finally:
        model.set_attn_implementation(chosen)
