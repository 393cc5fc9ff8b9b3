"""Read names, types and shapes of the tensors in a model folder from its weight files' headers, without values."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from offline_kto.kto_core.hashing import safetensors_header, weight_files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, without its values.

    Attributes:
        dtype: as safetensors names it: F32, BF16, F8_E4M3, I8, ...
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the files that loading the folder reads.

    Raises:
        ModelError: no safetensors file, or one that is damaged.
    """
    return {
        name: StoredTensor(path, dtype, tuple(shape))
        for path in weight_files(folder)
        for name, (dtype, shape, _, _) in safetensors_header(path).items()
    }


def bytes_read(folder: Path) -> int:
    """Return the bytes of the tensors that a text model reads from a folder: those of towers are left out.

    Raises:
        ModelError: no safetensors file, or one that is damaged.
    """
    return sum(
        end - start
        for path in weight_files(folder)
        for name, (_, _, start, end) in safetensors_header(path).items()
        if not is_of_tower(name)
    )


# Constants that older versions of transformers saved, and that each model computes itself.
_CONSTANTS = re.compile(
    r"\.inv_freq$|(^|\.)(rope|rotary_emb|rotary_pos_emb)\.\w+$|(^|\.)freqs_cis$|(^|\.)position_ids$"
    r"|embed_positions\.weights$|(^|\.)version$|\.num_batches_tracked$|\.masked_bias$|\.causal_mask$|\.attn_mask$"
)
# Causal masks of GPT-2 and related models; a bias of one dimension is a weight.
_MASKS = re.compile(r"(attn|attention)\.bias$")
# Scales for an 8-bit key-value cache, which scoring does not use.
_CACHE_SCALES = re.compile(r"\.(q|k|v|prob|kv)_scale$|\.[kv]_proj\.output_scale$")


def is_constant(name: str, tensor: StoredTensor | None) -> bool:
    """Return whether a tensor of a file is a constant or a scale that no score depends on.

    Args:
        tensor: None if the file has it under another name.
    """
    if _MASKS.search(name):
        return tensor is not None and len(tensor.shape) >= 3
    if _CACHE_SCALES.search(name):
        return tensor is not None and prod(tensor.shape) == 1
    return bool(_CONSTANTS.search(name))


def is_activation_scale(name: str) -> bool:
    """Return whether a tensor scales activations, which is not needed for weights that are unpacked on loading."""
    return name.endswith((".input_scale", ".activation_scale", ".output_scale"))


# Floats of 4 to 8 bits, and matrices of 4-bit and 8-bit integers, are quantised weights that need their scales.
_NARROW = re.compile(r"F[468]_|I4$|U4$")


def is_packed(name: str, tensor: StoredTensor) -> bool:
    """Return whether a tensor of a file is a quantised weight."""
    if _NARROW.match(tensor.dtype):
        return True
    return tensor.dtype in ("I8", "U8") and len(tensor.shape) >= 2 and not is_constant(name, tensor)


# Weights of a multimodal checkpoint that its text model does not use.
_TOWER = re.compile(
    r"(^|\.)(visual|vision_\w+|vision|vit|image_\w+|img_\w+|audio_\w+|audio|speech_\w+|embed_vision|embed_audio|"
    r"multi_?modal_\w+|mm_\w+|connector|perceiver\w*|resampler|aligner|patch_embed\w*)(\.|$)"
)
_PREDICTION = re.compile(r"(^|\.)mtp(\.|_)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

TOWER, PREDICTION = "vision or audio", "multi-token prediction"


def is_of_tower(name: str) -> bool:
    """Return whether a weight belongs to a vision or audio tower, or to the projection of its output."""
    return bool(_TOWER.search(name))


def is_of_prediction(name: str, layers: int, prediction_layers: int) -> bool:
    """Return whether a weight serves multi-token prediction, which scoring does not use.

    Args:
        layers: number of the model's layers, from its configuration.
        prediction_layers: number of prediction layers in the configuration, numbered after these.
    """
    if _PREDICTION.search(name):
        return True
    layer = _LAYER.search(name)
    return layer is not None and layers <= int(layer[1]) < layers + prediction_layers


def is_zero_bias(name: str, tensors: dict[str, StoredTensor]) -> bool:
    """Return whether a weight is a bias of zeros, as some quantisers write for layers without one."""
    tensor = tensors.get(name)
    if tensor is None or not name.endswith(".bias") or tensor.dtype not in ("F32", "F16", "BF16"):
        return False
    with safe_open(tensor.file, framework="pt") as file:
        return not bool(file.get_tensor(name).any())


def some(names: Iterable[str]) -> str:
    """Return the first few of some names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
