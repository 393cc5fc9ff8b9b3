"""Find the declaration of quantised weights in a model folder, and check that transformers applies it.

transformers skips a method that it does not know, and reads the packed values as weights.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from offline_kto.kto_core.errors import ModelError, in_one_line, printable
from offline_kto.kto_core.models.model_files import read_json_object
from offline_kto.kto_core.models.weight_files import StoredTensor, is_packed, some

# Keys of a configuration that declare quantised weights; transformers reads only the first.
_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
# Files that quantisers write next to config.json, for programs other than transformers.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def declared_quantization(folder: Path) -> dict[str, object] | None:
    """Return the quantisation settings in config.json, or in its text part; None without any."""
    found = _declared(read_json_object(folder / "config.json"))
    return found[1] if found else None


def _declared(config: Mapping[str, object], where: str = "") -> tuple[str, dict[str, object]] | None:
    """Return key and settings of the declared quantisation, without those of towers, which are not read."""
    for key in _KEYS:
        settings = config.get(key)
        if isinstance(settings, dict) and settings:
            return where + key, settings
    for key, part in config.items():
        is_text = "text" in key or "llm" in key or "language" in key or "thinker" in key
        found = _declared(part, f"{where}{key}.") if is_text and isinstance(part, dict) else None
        if found:
            return found
    return None


def check_quantization(
    folder: Path, tensors: Mapping[str, StoredTensor], *, is_applied: Callable[[dict[str, object]], bool]
) -> None:
    """Refuse quantised weights that would be read as unquantised.

    Args:
        tensors: of the folder's files.
        is_applied: whether transformers knows the method in the settings; may raise ValueError.

    Raises:
        ModelError: settings or packed weights that transformers does not apply.
    """
    found = _declared(read_json_object(folder / "config.json"))
    if found is not None:
        where, settings = found
        method = printable(str(settings.get("quant_method") or settings.get("quant_algo") or "without a method"), 60)
        try:
            known = where.endswith(_KEYS[0]) and is_applied(settings)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder / 'config.json'}: {where} cannot be used: {in_one_line(error)}") from error
        if not known:
            raise ModelError(
                f"{folder / 'config.json'}: {where} ({method}) is a quantisation that the installed transformers does not support: it "
                f"would read the packed values as weights. {USE_ANOTHER}"
            )
        return
    check_unpacked(folder, tensors)
    for name in _FILES:
        path = folder / name
        if path.exists() and not _is_for_cache_alone(path):
            raise ModelError(
                f"{path}: declares quantised weights, but config.json does not, so transformers would read them as "
                f"unquantised. {USE_ANOTHER} If the weights are not quantised, remove this file."
            )


def fits_four_bits(module: nn.Module) -> bool:
    """Return whether bitsandbytes stores a layer's weight in 4 bits; it leaves stacked experts as they are.

    transformers' `Conv1D` is GPT-2's linear layer. Both leave out the output layer.
    """
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


USE_ANOTHER = "Use the unquantised model, or one quantised with bitsandbytes."


def check_unpacked(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse packed weights in a model that is loaded without a quantiser.

    Raises:
        ModelError: there are some.
    """
    packed = [name for name, tensor in tensors.items() if is_packed(name, tensor)]
    if packed:
        types = ", ".join(sorted({tensors[name].dtype for name in packed}))
        raise ModelError(
            f"{folder}: {len(packed)} weights are stored as {types} ({some(packed)}), but config.json names no quantisation: "
            f"they would be read without their scales. {USE_ANOTHER}"
        )


def _is_for_cache_alone(path: Path) -> bool:
    """Return whether a quantiser's file quantises only the key-value cache and no weights."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    settings = content.get("quantization", content) if isinstance(content, dict) else {}
    return isinstance(settings, dict) and "quant_algo" in settings and not settings["quant_algo"]
