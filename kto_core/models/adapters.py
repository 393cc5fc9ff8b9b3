"""Merge a PEFT adapter into a model, or load it next to quantised weights, through `transformers` without peft."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from offline_kto.kto_core.errors import ModelError, in_one_line
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.model_files import check_texts


def check_adapter_folder(adapter: Path) -> None:
    """Check an adapter folder before anything large is loaded.

    Raises:
        ModelError: no adapter_config.json, no safetensors, or a kind that cannot be part of a reference model.
    """
    if not (adapter / "adapter_config.json").exists():
        raise ModelError(f"{adapter}: no adapter_config.json, so this is not an adapter folder.")
    check_texts(adapter)
    if not (adapter / "adapter_model.safetensors").exists():
        raise ModelError(f"{adapter}: no adapter_model.safetensors. Adapters in pickle files are not read.")
    settings = _settings(adapter)
    for name, why in _UNUSABLE.items():
        if settings.get(name):
            raise ModelError(f"{adapter}: {name} is set: {why}")
    if settings.get("peft_type") in _NO_WEIGHTS:
        raise ModelError(
            f"{adapter}: {settings['peft_type']} changes a model's input, not its weights, so it cannot be part of a reference "
            "model. Score with the base model alone, or train a LoRA adapter."
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASES):
        raise ModelError(
            f"{adapter}: init_lora_weights is {start!r}, so that training changed the base model's weights by values that only that run "
            "had. Save it again in that run with path_initial_model_for_weight_conversion, which makes it an ordinary adapter, "
            "or merge it in that run and pass the merged model to --model."
        )


# Kinds that add learnt tokens, keys or states to the input instead of changing weights.
_NO_WEIGHTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)

# Settings that change a model beyond adding to its layers. `transformers` ignores them.
_UNUSABLE = {
    "layer_replication": "the adapter belongs to a model with repeated layers, and merging it does not give the base model's layers. "
    "Merge it with peft (merge_and_unload) and pass the merged model to --model.",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts only after its invocation tokens, so it cannot be part of a "
    "model's weights. Score with the base model alone, or train an ordinary LoRA.",
    "arrow_config": "the adapter chooses among other adapters for each token, so it cannot be part of a model's weights. "
    "Pass one of those to --adapter.",
}

# Initialisations of an adapter that subtract random or measured parts from the base model, which no file contains.
_CHANGED_BASES = ("pissa_niter", "corda", "lora_ga")


def _settings(adapter: Path) -> dict[str, object]:
    """Return the content of adapter_config.json; empty if it cannot be read, which loading reports."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return settings if isinstance(settings, dict) else {}
    return {}


def merge_adapter(model: Model, adapter: Path) -> None:
    """Merge a PEFT adapter into a model's weights, in place.

    `transformers` loads the adapter (peft must be installed). The tuner layers that it inserts provide the merge and
    their base layer.

    Raises:
        ModelError: not an adapter, peft missing, weights that do not fit, or a kind that cannot be merged.
    """
    tied = _heads_are_tied(model)
    before, trainable = dict(vars(model)), any(p.requires_grad for p in model.parameters())
    _load(model, adapter, "default")
    unmerged = _some_logps(model)
    try:
        _merge_layers(model)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{adapter}: cannot be merged: {in_one_line(error)} {_MERGE_YOURSELF}") from error
    apart = float((_some_logps(model) - unmerged).abs().mean())
    if not apart <= _MERGED_ALIKE:
        raise ModelError(
            f"{adapter}: its log-probabilities change by {apart:.2g} nats when it is merged into the weights: it is of a kind "
            f"that is not supported. {_MERGE_YOURSELF}"
        )
    if tied and not _heads_are_tied(model):
        model.config.tie_word_embeddings = False  # the adapter contains its own head
    _forget_adapter(model, before)
    model.requires_grad_(trainable)


def add_adapter_beside(model: Model, adapter: Path) -> None:
    """Add a frozen LoRA adapter next to quantised weights, without merging, because merging would round it to their few bits.

    Raises:
        ModelError: as `merge_adapter`, or of a kind that training could not save together with new adapters.
    """
    found = [name for name in _NOT_BESIDE if _settings(adapter).get(name) not in (None, False, "none", [], {})]
    if found or _settings(adapter).get("peft_type") != "LORA":
        raise ModelError(
            f"{adapter}: {', '.join(found) or _settings(adapter).get('peft_type')}: of adapters on quantised weights, only LoRA on "
            "linear layers is supported. Load the base model without quantisation (or call dequantize() on it), merge the "
            "adapter into it with peft (merge_and_unload), and pass the merged model to --model."
        )
    before = dict(vars(model))
    _load(model, adapter, BESIDE)
    for name, parameter in model.named_parameters():
        if f".{BESIDE}." in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad = False
    if any(hasattr(module, "lora_embedding_A") and len(module.lora_embedding_A) for module in model.modules()):
        raise ModelError(
            f"{adapter}: changes embeddings, which is not supported on quantised weights. {_MERGE_YOURSELF}"
        )
    _forget_adapter(model, before)


# peft's name of the reference's adapter if it is not merged; trained adapters have peft's default name.
BESIDE = "reference"

# Settings of LoRA that prevent saving two adapters together.
_NOT_BESIDE = ("use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


def _load(model: Model, adapter: Path, name: str) -> None:
    check_adapter_folder(adapter)
    try:
        with _with_layer_names(adapter) as folder:
            info = model.load_adapter(str(folder), adapter_name=name, use_safetensors=True)
        unknown = _unknown_settings(model, _settings(adapter))
    except ImportError as error:
        raise ModelError(
            f"--adapter needs peft: {in_one_line(error)} Install it with: pip install 'offline-kto[lora]'"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        way = f" {_MERGE_YOURSELF}" if "does not support" in str(error) else ""
        raise ModelError(f"{adapter}: the adapter does not fit the model: {in_one_line(error)}{way}") from error
    left_out = sorted(getattr(info, "missing_keys", ()) or ()) + sorted(getattr(info, "unexpected_keys", ()) or ())
    if left_out:
        raise ModelError(
            f"{adapter}: the adapter does not fit the model ({left_out[0]} and {len(left_out) - 1} more weights), or is of "
            f"a kind that is not supported. {_MERGE_YOURSELF}"
        )
    if unknown:
        raise ModelError(
            f"{adapter}: adapter_config.json sets {', '.join(unknown)}, which the installed peft does not know. Update peft, or "
            f"merge it with the version that trained it. {_MERGE_YOURSELF}"
        )


# Largest mean difference of log-probabilities that rounding can explain, nats.
_MERGED_ALIKE = 0.01


def _unknown_settings(model: Model, settings: dict[str, object]) -> list[str]:
    """Return settings that the installed peft silently dropped."""
    known = {field.name for config in model.peft_config.values() for field in dataclasses.fields(config)}
    return sorted(name for name, value in settings.items() if value and name not in known)


@torch.no_grad()
def _some_logps(model: Model) -> torch.Tensor:
    """Return the log-probabilities of every token after each of the vocabulary's first few."""
    weight, training = model.get_input_embeddings().weight, model.training
    ids = torch.arange(min(8, len(weight)), device=weight.device)[None]
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(training)
    return logits.double().log_softmax(-1)


@contextlib.contextmanager
def _with_layer_names(adapter: Path) -> Iterator[Path]:
    """Yield an adapter folder whose weights have the names that its layers expect.

    peft saves DoRA's magnitudes without the suffix that `transformers` looks for. Such an adapter is read from a
    renamed copy.
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


def _merge_layers(model: Model) -> None:
    """Replace every tuner layer by its merged base layer, innermost wrappers first."""
    for name, layer in sorted(model.named_modules(), key=lambda item: -item[0].count(".")):
        if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.base_layer)
        elif isinstance(getattr(layer, "token_adapter", None), nn.Embedding):
            model.set_submodule(name, layer.token_adapter)
        elif hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
            model.set_submodule(name, layer.modules_to_save["default"])


def _heads_are_tied(model: Model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _forget_adapter(model: nn.Module, before: dict[str, object]) -> None:
    """Remove the attributes that loading an adapter sets on the model object.

    This includes the mapping from parameter names to checkpoint names: with it, `save_pretrained` would save the
    merged weights under names that no loader finds.
    """
    for name in set(vars(model)) - set(before):
        delattr(model, name)
    for name, value in before.items():
        if not isinstance(getattr(nn.Module(), name, None), dict):
            model.__dict__[name] = value
