"""Loading causal language models so that both stages compute the same numbers.

Stage 1 and stage 2 hand in the `transformers` class; folder, precision, adapter, dropout and
scoring forward are settled here, once.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from kto_core.adapters import merge_adapter
from kto_core.errors import ModelError, in_one_line, printable, said_by
from kto_core.identity import stored_type
from kto_core.logps import add_scoring_forward
from kto_core.manifest import LONGEST_NAME


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
            return folder, None
        is_file = local and folder.exists()
    except (OSError, ValueError) as error:  # too long a name, or one with a null character
        raise ModelError(f"{printable(model, 100)}: no such {what} folder ({said_by(error)}).") from error
    if is_file:
        raise ModelError(f"{model}: a file; expected the {what}'s folder (with its config and *.safetensors).")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(f"{model}: no such {what} folder.")
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        path = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{model}: no such {what} folder here, and it cannot be fetched from the hub: {reason}"
        ) from error
    return path, path.name


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
            return Path(str(place)).expanduser().absolute(), None
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


def load_tokenizer(auto_tokenizer: Any, folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in a model folder.

    Raises:
        ModelError: the folder holds none that can be loaded.
    """
    try:
        return auto_tokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {in_one_line(error)}") from error


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
        adapter: a PEFT folder to merge into the weights, in float32.

    Raises:
        ModelError: not loadable, or weights missing from the files.
    """
    check_model_folder(folder)
    wide = precision.is_full or not frozen or adapter is not None
    model, info = _read(auto_model, folder, torch.float32 if wide else _stored_type(folder), trust_remote_code)
    if not wide and _has_rounded_constants(model):
        model, info = _read(auto_model, folder, torch.float32, trust_remote_code)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: the files lack {len(missing)} weights ({', '.join(missing[:3])}, ...), which would be random. "
            "Copy the model again, or point to a complete checkpoint."
        )
    if adapter is not None:
        merge_adapter(model, adapter)
    if frozen and not precision.is_full and not _is_quantized(model):
        store_matrices_in(model, precision.dtype)
    if _is_quantized(model):
        keep_gradients_of_four_bits(model)
    disable_dropout(model)
    add_scoring_forward(model)
    return model if _is_quantized(model) else model.to(device)


_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _stored_type(folder: Path) -> torch.dtype | str:
    """What the weights are read in where nothing is lost: their own type, not the one that config.json names."""
    stored = None if is_quantized_folder(folder) else stored_type(folder)
    return _TYPES[stored] if stored else "auto"


def _read(auto_model: Any, folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    try:
        return auto_model.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {in_one_line(error)}") from error


def _has_rounded_constants(model: nn.Module) -> bool:
    """Whether constants that the model computes for itself (Gemma's embedding scale) were rounded to 16 bits."""
    return any(buffer.is_floating_point() and buffer.element_size() < 4 for buffer in model.buffers())


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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config"))


def _is_quantized(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def keep_gradients_of_four_bits(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's bfloat16 instructions in the first pass in eval mode.

    The kernel for packed weights computes in bfloat16 and has no backward pass: once packed, all that lies in front
    of such a layer gets no gradient any more, and nothing says so.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def store_matrices_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Store matrices in `dtype`; embeddings, norms and biases in float32.

    Autocast casts matrices before each product, so their storage changes no number. Embeddings and
    norms feed the float32 residual stream: rounding them would. (Fused expert matrices, with three
    dimensions, are outside of autocast: a mixture of experts computes them as they are stored.)
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        parameter.data = parameter.data.to(dtype if matrix else torch.float32)
        parameter.requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate and router jitter to 0: the start-up check, z0 and the loss must see one and the same policy.

    The configuration keeps its values, so the saved model does too.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "router_jitter_noise"):
            # PhiMoE's router reads it in eval mode as well, as a threshold, and draws its experts by lot in training.
            module.train = lambda mode=True, router=module: nn.Module.train(router, False)  # type: ignore[method-assign,misc]
            continue
        for name, value in list(vars(module).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
