"""Loading causal language models so that both stages compute the same numbers.

Stage 1 and stage 2 hand in the `transformers` class; folder, precision, adapter, dropout and
scoring forward are settled here, once.
"""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kto_core.adapters import add_adapter_beside, merge_adapter
from kto_core.errors import ModelError, printable, said_by
from kto_core.folder_code import check_model_code
from kto_core.foreign_files import check_kinds
from kto_core.hub import fetch_from_hub
from kto_core.identity import stored_type
from kto_core.library_warnings import collected_warnings, skipped_quantization
from kto_core.logps import add_scoring_forward
from kto_core.manifest import LONGEST_NAME
from kto_core.model_code import family_of, model_code
from kto_core.model_files import check_texts, read_json_object
from kto_core.outline import check_shapes, check_unread, classes_used
from kto_core.quantization import USE_ANOTHER, check_quantization, declared_quantization
from kto_core.tokenizer_files import load_tokenizer as load_tokenizer
from kto_core.weight_files import stored_tensors


@dataclass(frozen=True)
class Precision:
    """How numbers are computed.

    `float32`: no autocast. `bfloat16`, `float16`: matrix products in that type under autocast, with
    the residual stream, norms and softmax in float32. A frozen model also stores its matrices in it;
    since autocast would cast them anyway, that changes memory and no number.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_full(self) -> bool:
        return self.dtype == torch.float32

    @contextlib.contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        with torch.autocast(device.type, dtype=self.dtype, enabled=not self.is_full):
            yield


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ModelError: the device asked for does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name}: not available here ({str(error).splitlines()[0]}).") from error
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(getattr(torch, name))


def find_folder(
    model: str, *, revision: str | None, what: str = "model", local: bool = True
) -> tuple[Path, str | None]:
    """The local folder of a model or adapter, and the commit it was resolved to.

    A hub id is downloaded, or found in the hub's cache on disk. With `local` off a folder of that name is passed over.

    Raises:
        ModelError: neither a folder nor a hub id that can be had.
    """
    folder = Path(model).expanduser()
    try:
        if local and folder.is_dir():
            return _without_pipes(folder, what), None
        is_file = local and folder.exists()
    except (OSError, ValueError) as error:  # too long a name, or one with a null character
        raise ModelError(f"{printable(model, 100)}: no such {what} folder ({said_by(error)}).") from error
    if is_file:
        raise ModelError(f"{model}: a file; expected the {what}'s folder (with its config and *.safetensors).")
    _refuse_address(model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(f"{model}: no such {what} folder.")
    path = fetch_from_hub(model, revision=revision, what=what)
    return path, path.name


_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?/?")


def _refuse_address(model: str) -> None:
    """Say what to pass for the address of a hub page, or for `id@revision`.

    Raises:
        ModelError: it is one.
    """
    url, at = _HUB_URL.fullmatch(model), re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", model)
    if url:
        kind, _, rest = (url[2] or "").partition("/")
        name, revision = url[1], rest.split("/")[0] if kind in ("tree", "blob", "resolve", "commit") else ""
    elif at:
        name, revision = at[1], at[2]
    elif "://" in model:
        raise ModelError(f"{printable(model, 100)}: an address. Pass a local folder, or a hub id (org/name).")
    else:
        return
    rest = f" with --revision {revision} (an option of kto-precompute)" if revision else ""
    raise ModelError(f"{printable(model, 100)}: neither a folder nor a hub id. Pass {name}{rest}.")


def _without_pipes(folder: Path, what: str) -> Path:
    """A folder in which no library waits for ever. Raises: ModelError: a pipe or a device is in it."""
    try:
        check_kinds(folder)
    except OSError as error:
        raise ModelError(f"{folder}: the {what} cannot be read: {said_by(error)}.") from error
    return folder


def find_reference(reference: Mapping[str, Any], what: str = "model") -> tuple[Path, str | None]:
    """The folder of the model, or of the adapter, that a manifest names, and its commit if it is the hub's.

    What was a folder when it was scored is never looked for on the hub, and what was the hub's is never taken from a
    folder that happens to have its name.

    Args:
        reference: the manifest's section.
        what: "model" or "adapter".

    Raises:
        ModelError: it is not there any more, or cannot be had.
    """
    name, path = (reference.get(key) for key in (("id", "path") if what == "model" else ("adapter", "adapter_path")))
    revision = reference.get("revision") if what == "model" else None
    is_recorded = "path" in reference  # older caches do not say it; there a model with a commit was the hub's
    if path is None and (is_recorded or what == "adapter" or revision is not None):
        return find_folder(str(name), revision=revision, what=what, local=not is_recorded)
    for place in (path, name):  # the second where model and cache were moved together
        if place is not None and Path(str(place)).expanduser().is_dir():
            return _without_pipes(Path(str(place)).expanduser().absolute(), what), None
    shown = f"{path} (given as {name})" if path not in (None, name) else str(name)
    raise ModelError(f"{shown}: no such {what} folder; it was one when the cache was scored.")


def local_path(folder: Path, revision: str | None) -> str | None:
    """Where a model or adapter lies, for the manifest; None for one of the hub, which has a commit."""
    path = str(folder.absolute())
    return path if revision is None and path.isprintable() and len(path) <= LONGEST_NAME else None


def longest_alike(config: Any) -> int | None:
    """How many tokens a sequence may have before its scores depend on what else is in its batch; None without a limit.

    With "longrope" (Phi-3 and its kin) a batch switches to other position frequencies, for all of its
    rows, when its longest row goes beyond the length of pre-training. Where a row keeps only its strongest keys
    (Doge), padding takes part in the choice.

    Args:
        config: the model's, from `transformers`.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]  # all layers', or each kind's
    lengths = [one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"]
    kept = getattr(config.get_text_config(), "keep_window_size", None)
    return min(lengths + ([kept] if kept else []), default=None)


def load_causal_lm(
    auto_model: Any,
    folder: Path,
    *,
    precision: Precision,
    device: torch.device,
    frozen: bool,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model, merge its adapter, set its precision, switch dropout off, add the scoring forward.

    Args:
        auto_model: `transformers.AutoModelForCausalLM`.
        folder: local folder with config.json and *.safetensors.
        precision: see `Precision`; trainable weights stay float32, because an update of 1e-6 on a
            weight of 1e-2 is below half a unit in the last place of bfloat16.
        device: where the model goes.
        frozen: True where no weight of this model will be trained (a reference, the base under LoRA).
        adapter: a PEFT folder to merge into the weights, in float32; beside quantised weights it stays as it is.

    Raises:
        ModelError: not loadable, or weights missing from the files.
    """
    check_model_folder(folder)
    wide = precision.is_full or not frozen or adapter is not None
    model, info = _read(auto_model, folder, torch.float32 if wide else _stored_type(folder), trust_remote_code)
    if not wide and (_has_rounded_constants(model) or not _restore_wide(model, folder, info["unexpected_keys"])):
        model, info = _read(auto_model, folder, torch.float32, trust_remote_code)
    if not trust_remote_code:
        check_model_code(folder, *classes_used(model, folder))
    _check_loaded(model, folder, info)
    if adapter is not None:
        with model_code(str(adapter), f"the adapter cannot be put on this model family ({family_of(model)})"):
            (add_adapter_beside if _is_quantized(model) else merge_adapter)(model, adapter)
    if wide:
        _widen(model)
    if frozen and not precision.is_full and not _is_quantized(model):
        store_matrices_in(model, precision.dtype)
    if _is_quantized(model):
        _compute_four_bits_in(model, precision.dtype)
        keep_gradients_of_four_bits(model)
        keep_eight_bits_in_eval_mode(model)
    disable_dropout(model)
    _set_outputs(model.config)
    with model_code(str(folder), f"this model family ({family_of(model)}) cannot be scored"):
        add_scoring_forward(model)
    return model if _is_quantized(model) else model.to(device)


def _check_loaded(model: Any, folder: Path, info: dict[str, Any]) -> None:
    """Compare what was read with the files.

    Raises:
        ModelError: weights that are missing, that were not read, or that are quantised and were read as if they were not.
    """
    check_shapes(folder, info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: the files lack {len(missing)} weights ({', '.join(missing[:3])}, ...), which would be random. "
            "Copy the model again, or point to a complete checkpoint."
        )
    tensors = stored_tensors(folder)
    check_quantization(folder, tensors, is_applied=lambda _: True)  # `_read` refuses unknown ones
    check_unread(model, folder, info["unexpected_keys"], tensors)


_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _stored_type(folder: Path) -> torch.dtype | str:
    """What the weights are read in where nothing is lost: their own type, not the one that config.json names."""
    stored = None if is_quantized_folder(folder) else stored_type(folder)
    return _TYPES[stored] if stored else "auto"


def _read(auto_model: Any, folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    with collected_warnings() as messages, model_code(str(folder), f"the model{_family_in(folder)} cannot be loaded"):
        read = auto_model.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by `_check_loaded`, which names them
        )
    skipped = skipped_quantization(messages)
    if skipped is not None:
        raise ModelError(
            f"{folder}: its weights are quantised, and would be read as if they were not: {skipped}. {USE_ANOTHER}"
        )
    return read


def _family_in(folder: Path) -> str:
    """Return the `model_type` that config.json names, in brackets; nothing where it cannot be read."""
    with contextlib.suppress(ModelError):
        if kind := read_json_object(folder / "config.json").get("model_type"):
            return f" ({kind})"
    return ""


def _has_rounded_constants(model: nn.Module) -> bool:
    """Whether constants that the model computes for itself (Gemma's embedding scale) were rounded to 16 bits."""
    return any(buffer.is_floating_point() and buffer.element_size() < 4 for buffer in model.buffers())


def _restore_wide(model: nn.Module, folder: Path, unexpected: Collection[str]) -> bool:
    """Put weights that are stored in float32 among narrower ones (recurrences, most often) back as they are stored.

    Returns:
        False where that cannot be done, because a tensor has another name in the model, or narrow types are mixed.
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
            parameters[name].data = file.get_tensor(name)
    return True


def _widen(model: nn.Module) -> None:
    """Turn 16-bit weights into float32 in all layers but those that are computed from quantised ones.

    `transformers` leaves experts that it dequantises (gpt-oss) in bfloat16, whatever is asked for.
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(map(_is_packed, own)):
            continue
        for tensor in own:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()


def _is_packed(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds quantised weights: whole numbers, floats of 8 bits, or 4-bit ones of bitsandbytes.

    Those may lie in storage of any type, since sharding wants that of the other weights.
    """
    if getattr(tensor, "quant_state", None) is not None:
        return True
    if tensor.is_floating_point():
        return tensor.element_size() == 1
    return tensor.ndim >= 2 and tensor.dtype != torch.bool


def check_model_folder(folder: Path) -> None:
    """Say what is missing before anything heavy is loaded.

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
            f"{folder}: adapter_config.json lies beside config.json, and loading would put that adapter into the model "
            "unasked. Move the adapter's files into a folder of their own, and pass it to --adapter."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no *.safetensors file. Weights in pickle files are not read; "
            "load the model once with transformers and save it with save_pretrained()."
        )


def is_quantized_folder(folder: Path) -> bool:
    """Whether the weights in a model folder are stored quantised."""
    return declared_quantization(folder) is not None


def _is_quantized(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _compute_four_bits_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute bitsandbytes' 4-bit layers in the run's precision, not in the one that they were once saved with."""
    for module in model.modules():
        if "compute_type_is_set" in vars(module):
            vars(module).update(compute_dtype=dtype, compute_type_is_set=True)


def keep_gradients_of_four_bits(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's bfloat16 instructions in the first pass in eval mode.

    The kernel for packed weights computes in bfloat16 and has no backward pass: once packed, all that lies in front
    of such a layer gets no gradient any more, and nothing says so.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def keep_eight_bits_in_eval_mode(model: nn.Module) -> None:
    """Keep bitsandbytes' 8-bit layers in eval mode: on a CPU they compute by another rule in train mode."""
    for module in model.modules():
        if hasattr(getattr(module, "state", None), "is_training"):
            _keep_in_eval_mode(module)


def _keep_in_eval_mode(module: nn.Module) -> None:
    nn.Module.train(module, False)
    module.train = lambda mode=True: nn.Module.train(module, False)  # type: ignore[method-assign]


def store_matrices_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Store in `dtype` what autocast would cast before it is used; everything else in float32.

    Autocast casts the matrices of linear layers before each product, so their storage changes no number. Embeddings,
    norms, biases, recurrences (Mamba's `A_log`) and tables of positions meet float32 values: rounding them would.
    (Stacked experts are outside of autocast: a mixture of experts computes them as they are stored. They are most of
    its weights.)
    """
    narrow = _matrices(model, dtype)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(dtype if id(parameter) in narrow else torch.float32)
        parameter.requires_grad_(False)


def _matrices(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """Return the ids of the parameters that may be stored in `dtype`."""
    found, others = set(), set()
    is_cast: dict[type[nn.Module], bool] = {nn.Linear: True}
    for module in model.modules():
        kind, weight = type(module), getattr(module, "weight", None)
        own = dict(module.named_parameters(recurse=False))
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            if kind not in is_cast:
                is_cast[kind] = _casts_its_weight(module, dtype)
            if is_cast[kind]:
                found.add(id(own.pop("weight", weight)))
        elif holds_experts(module):
            found |= {id(own.pop(name)) for name in list(own) if own[name].ndim >= 2}
        others |= {id(parameter) for parameter in own.values()}
    return found - others  # a tied matrix is an embedding too


def _casts_its_weight(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a layer computes the same whether its weight is stored in float32 or in `dtype`, under autocast.

    Families have linear layers of their own (GPT-2's are transposed); some normalise or scale the weight before they use
    it, or use it outside of autocast.
    """
    weight: Any = module.weight
    stored = weight.data
    for size in stored.shape[::-1]:
        values = torch.linspace(-1, 1, 3 * size, device=stored.device).reshape(1, 3, size)
        outputs = []
        try:
            with torch.no_grad(), torch.autocast(stored.device.type, dtype=dtype):
                for kind in (torch.float32, dtype):
                    weight.data = stored.to(kind)
                    outputs.append(module(values))
        except Exception:  # noqa: BLE001 (it takes other inputs; float32 is always right)
            continue
        finally:
            weight.data = stored
        return all(isinstance(one, torch.Tensor) for one in outputs) and torch.equal(*outputs)
    return False


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module's own parameters are the matrices of many experts, stacked."""
    counts = [n for name, n in vars(module).items() if re.search("num_(local_)?experts$", name) and isinstance(n, int)]
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return any(
        (len(shape) == 3 and shape[0] == n) or (len(shape) == 2 and shape[0] > n and shape[0] % n == 0)
        for shape in shapes
        for n in counts
        if n > 1
    )


def _set_outputs(config: Any) -> None:
    """Ask for an object with the last hidden states, whatever config.json asks for.

    `transformers` reads a model that returns its attentions, and refuses to save it under any kernel but eager.
    """
    for one in (config, config.get_text_config()):
        one.return_dict, one.output_attentions, one.output_hidden_states = True, False, False


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate and router jitter to 0: the start-up check, z0 and the loss must see one and the same policy.

    The configuration keeps its values, so the saved model does too.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "router_jitter_noise"):
            # PhiMoE's router reads it in eval mode as well, as a threshold, and draws its experts by lot in training.
            _keep_in_eval_mode(module)
            continue
        for name, value in list(vars(module).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
