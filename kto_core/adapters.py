"""Merging a PEFT adapter into a model, through `transformers`; peft itself is never imported here."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kto_core.errors import ModelError, in_one_line
from kto_core.model_files import check_texts


def check_adapter_folder(adapter: Path) -> None:
    """Say what is missing before anything heavy is loaded.

    Raises:
        ModelError: no adapter_config.json, or no safetensors.
    """
    if not (adapter / "adapter_config.json").exists():
        raise ModelError(f"{adapter}: no adapter_config.json, so this is not an adapter folder.")
    check_texts(adapter)
    if not (adapter / "adapter_model.safetensors").exists():
        raise ModelError(f"{adapter}: no adapter_model.safetensors. Adapters in pickle files are not read.")


def merge_adapter(model: Any, adapter: Path) -> None:
    """Merge a PEFT adapter into a model's weights, in place.

    `transformers` loads the adapter (peft must be installed); the tuner layers it puts in know how
    to merge themselves and which layer they wrap.

    Raises:
        ModelError: not an adapter, peft missing, weights that do not fit, or a kind that cannot be merged.
    """
    check_adapter_folder(adapter)
    tied = _heads_are_tied(model)
    before, trainable = dict(vars(model)), any(p.requires_grad for p in model.parameters())
    try:
        with _with_layer_names(adapter) as folder:
            info = model.load_adapter(str(folder), adapter_name="default", use_safetensors=True)
    except ImportError as error:
        raise ModelError(
            f"--adapter needs peft: {in_one_line(error)} Install it with: pip install 'offline-kto[lora]'"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{adapter}: the adapter does not fit the model: {in_one_line(error)}") from error
    left_out = sorted(getattr(info, "missing_keys", ()) or ()) + sorted(getattr(info, "unexpected_keys", ()) or ())
    if left_out:
        raise ModelError(
            f"{adapter}: the adapter does not fit the model ({left_out[0]} and {len(left_out) - 1} more weights), or is of "
            f"a kind that is not supported. {_MERGE_YOURSELF}"
        )
    try:
        _merge_layers(model)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{adapter}: cannot be merged: {in_one_line(error)} {_MERGE_YOURSELF}") from error
    if tied and not _heads_are_tied(model):
        model.config.tie_word_embeddings = False  # the adapter brought a head of its own
    _forget_adapter(model, before)
    model.requires_grad_(trainable)


@contextlib.contextmanager
def _with_layer_names(adapter: Path) -> Iterator[Path]:
    """An adapter folder whose weights have the names its layers expect.

    peft saves DoRA's magnitudes without the suffix that `transformers` looks for; such an adapter is
    read from a renamed copy.
    """
    suffix = "lora_magnitude_vector"
    weights = load_file(adapter / "adapter_model.safetensors")
    if not any(name.endswith(suffix) for name in weights):
        yield adapter
        return
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(adapter / "adapter_config.json", copy)
        renamed = {f"{name}.weight" if name.endswith(suffix) else name: tensor for name, tensor in weights.items()}
        save_file(renamed, Path(copy) / "adapter_model.safetensors", metadata={"format": "pt"})
        yield Path(copy)


_MERGE_YOURSELF = "Merge it with peft (merge_and_unload) and pass the merged model to --model."


def _merge_layers(model: Any) -> None:
    """Replace every tuner layer by the merged layer it wraps, innermost wrappers first."""
    for name, layer in sorted(model.named_modules(), key=lambda item: -item[0].count(".")):
        if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.base_layer)
        elif hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
            model.set_submodule(name, layer.modules_to_save["default"])


def _heads_are_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _forget_adapter(model: nn.Module, before: dict[str, Any]) -> None:
    """Undo what loading an adapter notes on the model object.

    Among it is how parameter names map to checkpoint names: left there, `save_pretrained` would
    write the merged weights under names that no loader finds.
    """
    for name in set(vars(model)) - set(before):
        delattr(model, name)
    for name, value in before.items():
        if not isinstance(getattr(nn.Module(), name, None), dict):
            model.__dict__[name] = value
