"""Choose the attention implementation of a run (`--attention`) before the model is loaded, and say why.

auto    on a CUDA device flash attention where it is installed and the model supports it, or else varlen, or else the
        model's own
flash   flash attention, or an error
sdpa, flex, varlen, or the name of an implementation in `transformers` or of a kernel on the hub
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants

from offline_kto.kto_core.errors import ModelError, in_one_line, printable
from offline_kto.kto_core.library_types import Model, Transformers
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.options import AUTO
from offline_kto.kto_core.runtime import deprioritize_cudnn_attention
from offline_kto.kto_core.scoring.attention import (
    FLEX,
    SDPA,
    applies_softcaps,
    attention_set_to,
    caps_attention,
    is_flash,
    packs_on,
)
from offline_kto.kto_core.scoring.logps import sees_whole_passes
from offline_kto.kto_core.scoring.varlen_attention import VARLEN, register_varlen, why_not_varlen

FLASH = "flash"
_SHORT = {"flex": FLEX}

# Kernels on the hub that `auto` uses if they have been downloaded, by the least compute capability.
_HUB_KERNELS = {
    "kernels-community/flash-attn3": 9,
    "kernels-community/vllm-flash-attn3": 9,
    "kernels-community/flash-attn2": 8,
}

_KNOWN = "Pass auto, sdpa, flash, flex, varlen, or a kernel on the hub (org/name)"

_NOT_INSTALLED = (
    "flash attention is not installed (pip install flash-attn, or pip install kernels and --attention "
    "kernels-community/flash-attn3)"
)


class Attention(NamedTuple):
    """The attention implementation of a run.

    Attributes:
        kernel: its name in `transformers`.
        why: why it was chosen; empty if the user asked for it.
        packs: whether sequences will be concatenated, if that leaves scores unchanged.
        is_own: whether the model has it without being told.
    """

    kernel: str
    why: str
    packs: bool
    is_own: bool

    @property
    def to_set(self) -> str | None:
        """The name to set on the loaded model; None leaves the model's own."""
        return None if self.is_own else self.kernel

    @property
    def in_words(self) -> str:
        """The choice, for the printed plan."""
        why = f" ({self.why})" if self.why else ""
        return f"{self.kernel}{why}, rows {'concatenated without padding' if self.packs else 'padded'}"


def choose_attention(
    asked: str,
    shape: Model,
    settings: Mapping[str, object],
    *,
    device: torch.device,
    precision: Precision,
    library: Transformers,
) -> Attention:
    """Return the attention implementation of a run.

    Args:
        asked: `--attention`.
        shape: the model without weights, as the library builds it by default.
        settings: the content of its config.json.
        library: the module `transformers`.

    Raises:
        ModelError: the implementation that the user asked for cannot be used.
    """
    if device.type == "cuda":
        deprioritize_cudnn_attention()
    own = str(shape.config._attn_implementation)
    if not asked.strip():
        raise ModelError(f"--attention: is empty. {_KNOWN}.")
    if asked == AUTO:
        kernel, why = _automatic(shape, own, settings, device, precision, library)
    elif asked == FLASH:
        kernel, why = _flash(shape, device, precision, library), ""
    else:
        kernel, why = _SHORT.get(asked, asked), ""
        if kernel != own:
            refusal = _why_not(shape, kernel, device, precision, library)
            if refusal is not None:
                raise ModelError(f"--attention {printable(asked, 100)}: {refusal}.")
    packs = packs_on(kernel, device) and not sees_whole_passes(shape)
    return Attention(kernel, why, packs, is_own=kernel == own)


def _automatic(
    shape: Model,
    own: str,
    settings: Mapping[str, object],
    device: torch.device,
    precision: Precision,
    library: Transformers,
) -> tuple[str, str]:
    """Return an implementation, and why it was chosen."""
    set_there = settings.get("attn_implementation")
    if set_there not in (None, SDPA):
        return own, "config.json sets it"
    if device.type != "cuda":
        return own, f"no flash attention on {device.type}"
    if precision.is_full:
        return own, "flash attention does not compute in float32"
    refusals = []
    for kernel in _installed(device, library):
        refusal = _why_not(shape, kernel, device, precision, library)
        if refusal is None:
            return kernel, "installed"
        refusals.append(refusal)
    why = refusals[0] if refusals else "flash attention is not installed"
    may_pack = _tells_boundaries(shape) and not sees_whole_passes(shape)
    packs = may_pack and _why_not(shape, VARLEN, device, precision, library) is None
    return (VARLEN if packs else own), why


def _tells_boundaries(shape: Model) -> bool:
    """Return whether a model's code promises to pass the boundaries of concatenated rows on to its attention."""
    return all(getattr(shape, promise, False) for promise in ("_supports_flash_attn", "_supports_attention_backend"))


def _flash(shape: Model, device: torch.device, precision: Precision, library: Transformers) -> str:
    refusals = [] if device.type == "cuda" else [_why_not(shape, "flash_attention_2", device, precision, library)]
    for kernel in _installed(device, library) if device.type == "cuda" else ():
        refusal = _why_not(shape, kernel, device, precision, library)
        if refusal is None:
            return kernel
        refusals.append(refusal)
    raise ModelError(f"--attention {FLASH}: {refusals[0] if refusals else _NOT_INSTALLED}.")


def _installed(device: torch.device, library: Transformers) -> Iterator[str]:
    """Yield the flash attentions that need no download, the fastest first."""
    capability, _ = torch.cuda.get_device_capability(device)
    if capability >= 9 and library.utils.is_flash_attn_3_available():
        yield "flash_attention_3"
    if library.utils.is_flash_attn_2_available():
        yield "flash_attention_2"
    if importlib.util.find_spec("kernels") is not None:
        yield from (name for name, least in _HUB_KERNELS.items() if capability >= least and _is_downloaded(name))


def _is_downloaded(kernel: str) -> bool:
    """Return whether the cache of the hub contains a kernel; looking needs no network."""
    cache = Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)
    return any(
        (cache / f"{kind}--{kernel.replace('/', '--')}" / "snapshots").is_dir() for kind in ("kernels", "models")
    )


def _why_not(
    shape: Model, kernel: str, device: torch.device, precision: Precision, library: Transformers
) -> str | None:
    """Return why a model cannot use an implementation; None if it can."""
    if kernel != VARLEN and packs_on(kernel, torch.device("cuda")) and device.type != "cuda":
        return f"it needs a CUDA device, and this run is on {device.type}"
    if (kernel == VARLEN or is_flash(kernel)) and device.type == "cuda" and precision.is_full:
        return "it does not compute in float32; pass --dtype bfloat16"
    if (kernel == VARLEN or is_flash(kernel)) and device.type == "cuda":
        why = _why_not_on(torch.cuda.get_device_capability(device), kernel)
        if why is not None:
            return why
    if caps_attention(shape.config) and not applies_softcaps(kernel):
        return f"it ignores the soft-cap of this model's attention scores ({shape.config.model_type})"
    if kernel == VARLEN:
        register_varlen(library)
        why = why_not_varlen(shape.config, device)
        if why is not None:
            return why
    if not getattr(shape, "_can_set_attn_implementation", lambda: True)():
        return f"the code of {type(shape).__name__} does not support choosing its attention"
    try:
        with attention_set_to(shape, kernel):
            used = str(shape.config._attn_implementation)
    except Exception as error:  # noqa: BLE001 (the library, a kernel from the hub, or the model's own code)
        if "/" not in kernel and kernel not in ("eager", *library.AttentionInterface().valid_keys()):
            return f"{type(shape).__name__} cannot use it: there is no such attention. {_KNOWN}"
        return f"{type(shape).__name__} cannot use it: {printable(in_one_line(error), 300)}"
    # `transformers` 5.17 to 5.19 raises for a kernel that it cannot load the first time only, and then sets it.
    if "/" in kernel and used not in library.AttentionInterface().valid_keys():
        return f"{type(shape).__name__} cannot use it: it could not be loaded (pip install kernels, and download it)"
    # Where the package of a flash attention is missing, the library may use a kernel from the hub in its place.
    if used != kernel and not (is_flash(used) and is_flash(kernel)):
        return f"transformers uses {used} in its place for {type(shape).__name__}"
    return None


def _why_not_on(capability: tuple[int, int], kernel: str) -> str | None:
    """Return why flash attention has no kernels for GPUs of a compute capability; None if it has."""
    major, minor = capability
    is_third = re.search(r"flash(_attention_|-attn)3", kernel) is not None  # for Ampere and Hopper only
    if 8 <= major <= 9 or (major > 9 and not is_third):
        return None
    instead = "; use flash attention 2" if is_third and major > 9 else ""
    return f"it has no kernels for this GPU (compute capability {major}.{minor}){instead}"
