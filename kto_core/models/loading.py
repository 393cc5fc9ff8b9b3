"""Load causal language models so that both stages compute the same scores.

Both stages pass in the `transformers` class. Folder, precision, adapter, dropout and scoring forward are set here.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.hashing import stored_type
from offline_kto.kto_core.library_types import Model, ModelConfig, Transformers
from offline_kto.kto_core.models.adapters import add_adapter_beside, merge_adapter
from offline_kto.kto_core.models.folder_code import check_model_code
from offline_kto.kto_core.models.library_warnings import collected_warnings, skipped_quantization
from offline_kto.kto_core.models.model_files import check_texts, read_json_object
from offline_kto.kto_core.models.outline import LoadingInfo, check_shapes, check_unread, classes_used
from offline_kto.kto_core.models.precision import Precision, store_matrices_in, store_trained_in, use_device
from offline_kto.kto_core.models.quantization import USE_ANOTHER, check_quantization, declared_quantization
from offline_kto.kto_core.models.tokenizer_files import load_tokenizer as load_tokenizer
from offline_kto.kto_core.models.weight_files import stored_tensors
from offline_kto.kto_core.scoring.attention import kernel_keywords
from offline_kto.kto_core.scoring.logps import add_scoring_forward
from offline_kto.kto_core.scoring.model_code import family_of, model_code


def longest_alike(config: ModelConfig) -> int | None:
    """Return the largest length in tokens at which a row's scores do not depend on the rest of its batch; None without a limit.

    With "longrope" (Phi-3 and related models), all rows of a batch switch to other position frequencies when its
    longest row exceeds the length of pre-training. If a row keeps only its strongest keys (Doge), padding affects the
    choice.

    Args:
        config: the model's, from `transformers`.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]  # all layers', or each kind's
    lengths = [one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"]
    kept = getattr(config.get_text_config(), "keep_window_size", None)
    return min(lengths + ([kept] if kept else []), default=None)


def load_causal_lm(
    auto_model: Transformers,
    folder: Path,
    *,
    precision: Precision,
    device: torch.device,
    frozen: bool,
    narrow: bool = False,
    adapter: Path | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    spread: Mapping[int, int] | None = None,
    reads: bool = True,
) -> Model:
    """Load a model, merge its adapter, set its precision, switch dropout off, add the scoring forward.

    Args:
        auto_model: `transformers.AutoModelForCausalLM`.
        folder: local folder with config.json and *.safetensors.
        precision: see `Precision`; trainable weights stay float32, because an update of 1e-6 on a
            weight of 1e-2 is below half a unit in the last place of bfloat16.
        narrow: store trained weights in the precision's type too; their optimizer must not lose such updates.
        device: where the model is placed; becomes this process's current one.
        frozen: True if no weight of this model will be trained (a reference, the base model of LoRA).
        adapter: a PEFT folder to merge into the weights, in float32; next to quantised weights it is not merged.
        attention: implementation to use (`choose_attention`); None for the model's own.
        spread: GPUs that share the model, and the bytes that its weights may take of each; None for `device` alone.
        reads: False if another process reads the weights and sends them when the model is sharded; this one then has their
            shapes only.

    Raises:
        ModelError: not loadable, or weights missing from the files.
    """
    check_model_folder(folder)
    device = use_device(device)
    merges = adapter is not None and not is_quantized_folder(folder)
    wide = precision.is_full or not (frozen or narrow) or adapter is not None
    reads = reads or adapter is not None or is_quantized_folder(folder)
    places = functools.partial(_places, device, spread, reads=reads)
    model = _read_checked(auto_model, folder, places, wide=wide, merges=merges, trust_remote_code=trust_remote_code)
    if adapter is not None:
        with model_code(str(adapter), f"the adapter cannot be put on this model family ({family_of(model)})"):
            (add_adapter_beside if _is_quantized(model) else merge_adapter)(model, adapter)
    if wide:
        _widen(model)
    if _is_quantized(model):
        _compute_four_bits_in(model, precision.dtype)
        keep_gradients_of_four_bits(model)
        keep_eight_bits_in_eval_mode(model)
    elif frozen and not precision.is_full:
        store_matrices_in(model, precision.dtype)
    elif narrow:
        store_trained_in(model, precision.dtype)
    disable_dropout(model)
    _set_outputs(model.config)
    with model_code(str(folder), f"this model family ({family_of(model)}) cannot be scored"):
        if attention is not None:
            model.set_attn_implementation(attention)
        add_scoring_forward(model)
    if not reads:
        _reserve_weights(model)
    if _is_quantized(model) or spread is not None or not reads:
        return model
    model.__dict__.pop("hf_device_map", None)  # a sign for libraries that the model is not theirs to place
    return model.to(device)


def _read_checked(
    auto_model: Transformers,
    folder: Path,
    places: Callable[..., dict[str, object]],
    *,
    wide: bool,
    merges: bool,
    trust_remote_code: bool,
) -> Model:
    """Read a model in float32 or in the type in which it is stored, and check that all of its weights were read.

    Args:
        places: `_places`, for this process.
        wide: whether all weights are read in float32.
    """
    dtype = torch.float32 if wide else _stored_type(folder)
    model, info = _read(auto_model, folder, dtype, trust_remote_code, places(merges=merges))
    if not wide and (_has_rounded_constants(model) or not _restore_wide(model, folder, info["unexpected_keys"])):
        del model  # a GPU may not hold it twice, nor in float32
        model, info = _read(auto_model, folder, torch.float32, trust_remote_code, places(merges=True))
    if not trust_remote_code:
        check_model_code(folder, *classes_used(model, folder))
    _check_loaded(model, folder, info)
    return model


def _places(device: torch.device, spread: Mapping[int, int] | None, *, merges: bool, reads: bool) -> dict[str, object]:
    """Return keywords for `from_pretrained` that read the weights straight onto GPUs.

    Without them the whole model, as it is read, has to fit into the host's memory once for each process.

    Args:
        merges: whether the model is changed in float32 before it is stored in its final types; then it is read into the
            host's memory, because a GPU may not have room for float32.
        reads: whether this process reads the weights.
    """
    if not reads:
        return {"device_map": "meta"}
    if spread is not None:
        return {"device_map": "auto", "max_memory": dict(spread)}
    if device.type != "cuda" or merges:
        return {}
    return {"device_map": {"": device}}


def _reserve_weights(model: nn.Module) -> None:
    """Give weights that have only shapes an address in host memory, which is not used until somebody writes there.

    accelerate tells the weights of an optimizer apart by their addresses when it shards a model.
    """
    reserved: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in reserved:
                empty = torch.empty_like(parameter, device="cpu")
                reserved[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, reserved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))


def _check_loaded(model: Model, folder: Path, info: LoadingInfo) -> None:
    """Compare the weights that were read with those in the files.

    Raises:
        ModelError: weights are missing, were not read, or are quantised but were read as unquantised.
    """
    check_shapes(folder, info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing in the files ({', '.join(missing[:3])}, ...) and would be random. "
            "Copy the model again, or point to a complete checkpoint."
        )
    tensors = stored_tensors(folder)
    check_quantization(folder, tensors, is_applied=lambda _: True)  # `_read` refuses unknown ones
    check_unread(model, folder, info["unexpected_keys"], tensors)


_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _stored_type(folder: Path) -> torch.dtype | str:
    """Return the type in which the weights are stored, not the one in config.json; reading them in it loses nothing."""
    stored = None if is_quantized_folder(folder) else stored_type(folder)
    return _TYPES[stored] if stored else "auto"


def _read(
    auto_model: Transformers,
    folder: Path,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    places: Mapping[str, object],
) -> Model:
    with collected_warnings() as messages, model_code(str(folder), f"the model{_family_in(folder)} cannot be loaded"):
        read = auto_model.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by `_check_loaded`, which names them
            **kernel_keywords(read_json_object(folder / "config.json")),
            **places,
        )
    skipped = skipped_quantization(messages)
    if skipped is not None:
        raise ModelError(
            f"{folder}: its weights are quantised, but would be read as unquantised: {skipped}. {USE_ANOTHER}"
        )
    return read


def _family_in(folder: Path) -> str:
    """Return the `model_type` of config.json in brackets; an empty text if it cannot be read."""
    with contextlib.suppress(ModelError):
        if kind := read_json_object(folder / "config.json").get("model_type"):
            return f" ({kind})"
    return ""


def _has_rounded_constants(model: nn.Module) -> bool:
    """Return whether constants that the model computes itself (Gemma's embedding scale) were rounded to 16 bits."""
    return any(buffer.is_floating_point() and buffer.element_size() < 4 for buffer in model.buffers())


def _restore_wide(model: nn.Module, folder: Path, unexpected: Collection[str]) -> bool:
    """Restore weights that are stored in float32 among 16-bit ones (mostly of recurrences).

    Returns:
        False if that cannot be done, because a tensor has another name in the model, or 16-bit types are mixed.
    """
    if is_quantized_folder(folder):
        return True
    tensors = stored_tensors(folder)
    if {"BF16", "F16"} <= {tensor.dtype for tensor in tensors.values()}:
        return False
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {name: one.file for name, one in tensors.items() if one.dtype == "F32" and name not in unexpected}
    if not stored.keys() <= parameters.keys():
        return False
    for name, path in stored.items():
        with safe_open(path, framework="pt") as file:
            parameters[name].data = file.get_tensor(name).to(parameters[name].device)
    return True


def _widen(model: nn.Module) -> None:
    """Convert 16-bit weights to float32 in all layers without quantised weights.

    `transformers` leaves experts that it dequantises (gpt-oss) in bfloat16, whatever type is requested.
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(map(_is_packed, own)):
            continue
        for tensor in own:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()


def _is_packed(tensor: torch.Tensor) -> bool:
    """Return whether a tensor contains quantised weights: integers, 8-bit floats, or bitsandbytes' 4-bit ones.

    bitsandbytes may store them in any type, since sharding requires that of the other weights.
    """
    if getattr(tensor, "quant_state", None) is not None:
        return True
    if tensor.is_floating_point():
        return tensor.element_size() == 1
    return tensor.ndim >= 2 and tensor.dtype != torch.bool


def check_model_folder(folder: Path) -> None:
    """Check a model folder before anything large is loaded.

    Raises:
        ModelError: no config.json, or no safetensors.
    """
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"{folder}: an adapter, not a model. Pass the base model to --model and this folder to --adapter."
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder.")
    check_texts(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: there is an adapter_config.json next to config.json, and loading would silently add that adapter to the model "
            ". Move the adapter's files into a separate folder, and pass it to --adapter."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no *.safetensors file. Weights in pickle files are not read; "
            "load the model once with transformers and save it with save_pretrained()."
        )


def is_quantized_folder(folder: Path) -> bool:
    """Return whether the weights in a model folder are quantised."""
    return declared_quantization(folder) is not None


def _is_quantized(model: Model) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _compute_four_bits_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make bitsandbytes' 4-bit layers compute in the run's precision, not in the one they were saved with."""
    for module in model.modules():
        if "compute_type_is_set" in vars(module):
            vars(module).update(compute_dtype=dtype, compute_type_is_set=True)


def keep_gradients_of_four_bits(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's bfloat16 instructions in eval mode.

    The kernel for repacked weights computes in bfloat16 and has no backward pass. Once weights are repacked, all
    earlier layers silently get no gradient.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def keep_eight_bits_in_eval_mode(model: nn.Module) -> None:
    """Keep bitsandbytes' 8-bit layers in eval mode: on a CPU they compute other values in train mode."""
    for module in model.modules():
        if hasattr(getattr(module, "state", None), "is_training"):
            _keep_in_eval_mode(module)


def _keep_in_eval_mode(module: nn.Module) -> None:
    nn.Module.train(module, False)
    module.train = lambda mode=True: nn.Module.train(module, False)  # type: ignore[method-assign]


def _set_outputs(config: ModelConfig) -> None:
    """Configure the model to return an object with the last hidden states, whatever config.json says.

    `transformers` loads a model that returns its attentions, but saves it only with eager attention.
    """
    for one in (config, config.get_text_config()):
        one.return_dict, one.output_attentions, one.output_hidden_states = True, False, False


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate and router jitter to 0, so that the start check, z0 and the loss use the same policy.

    The configuration keeps its values, and so does the saved model.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "router_jitter_noise"):
            # PhiMoE's router uses it in eval mode too, as a threshold, and samples its experts in train mode.
            _keep_in_eval_mode(module)
            continue
        for name, value in list(vars(module).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
