"""Add, load, merge and remove LoRA adapters; the only module that imports peft."""

import contextlib
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from offline_kto.kto_core.errors import ConfigError, ModelError, in_one_line
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.adapters import BESIDE
from offline_kto.kto_core.models.precision import holds_experts
from offline_kto.kto_core.scoring.output_layer import whole_shape
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.saved_model import cast_weights

_T = TypeVar("_T")

ALL_LINEAR = "all-linear"

# Modules that text never passes through, by the words in their names.
_NO_TEXT = re.compile("vision|visual|image|audio|speech|video")

# Families whose `out_proj` peft refuses to adapt.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def check_installed() -> None:
    """Check that peft is installed. Raises: ModelError: it is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError("--lora-rank needs peft. Install it with: pip install 'offline-kto[lora]'") from error


def add_adapters(model: Model, config: TrainConfig, *, base: str) -> Model:
    """Freeze a model and add trainable float32 adapters, which change nothing at the start (B = 0).

    Linear layers that return more than one tensor, and modules that text never passes through, get no adapter.

    Args:
        model: from `load_causal_lm`, frozen.
        config: `lora_rank`, `lora_alpha`, `lora_targets`.
        base: the name of the base model in the saved adapters' configuration.

    Raises:
        ConfigError: targets that this model does not have, or that do not support adapters.
    """
    import peft

    excluded = _without_adapters(model)
    names = (
        [] if config.lora_targets == ALL_LINEAR else [n.strip() for n in config.lora_targets.split(",") if n.strip()]
    )
    for name in names:
        _check_target(model, name, excluded)
    known = _linear_names(model)
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=names or config.lora_targets,
        exclude_modules=sorted(excluded) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        if "not found" in str(error):
            _check_names(model, names, known)
        raise ConfigError(f"--lora-targets {config.lora_targets}: {str(error).splitlines()[0]}") from error
    settings = adapted.peft_config["default"]
    # peft accepts the older names of some experts (Mixtral's w1) and converts them to parameters.
    _check_names(model, [n for n in names if not settings.target_parameters or n in settings.target_modules], known)
    settings.base_model_name_or_path = base
    for name in ("target_modules", "exclude_modules"):  # sets, which would be written in another order by each process
        if isinstance(found := getattr(settings, name), set):
            setattr(settings, name, sorted(found))
    _activate(adapted, [BESIDE, _TRAINED])
    return adapted


# peft's name for the adapter that is trained.
_TRAINED = "default"


def _activate(model: nn.Module, names: list[str]) -> None:
    """Activate the reference's adapter, kept beside its weights, along with the trained one, and freeze the former."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not any(BESIDE in layer.lora_A for layer in layers if hasattr(layer, "lora_A")):
        return
    for layer in layers:
        layer.set_adapter(names)
    for name, parameter in model.named_parameters():
        if f".{BESIDE}." in name:
            parameter.requires_grad = False


def _without_adapters(model: Model) -> dict[str, str]:
    """Return the linear layers that must not get an adapter, with the reason for each."""
    excluded = {}
    returns_one: dict[type[nn.Module], bool] = {nn.Linear: True, Conv1D: True}
    text = _text_models(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is model.get_output_embeddings():
            continue
        kind = type(module)
        if _NO_TEXT.search(name) or (text and not name.startswith(text)):
            excluded[name] = "no text goes through it"
            continue
        if model.config.model_type in _MAMBA and name.endswith(".out_proj"):
            excluded[name] = "Mamba's kernels use its weight without calling it"
            continue
        if kind not in returns_one:
            returns_one[kind] = _returns_one_tensor(module)
        if not returns_one[kind]:
            excluded[name] = f"an adapter cannot be added to what {kind.__name__} returns"
    return excluded


def _text_models(model: Model) -> tuple[str, ...]:
    """Return the module names of the language models in a multimodal model, each followed by a dot."""
    text = model.config.get_text_config()
    if text is model.config:
        return ()
    parts = [name for name, part in model.named_modules() if isinstance(part, PreTrainedModel) and part.config is text]
    return tuple(f"{name}." for name in parts if name)


def _returns_one_tensor(module: Model) -> bool:
    """Return whether a custom linear layer has the same input and output as `nn.Linear`."""
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    values = torch.zeros(2, module.in_features, dtype=dtype, device=weight.device)
    try:
        with torch.no_grad():
            output = module(values)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, module.out_features)


def _check_target(model: Model, name: str, excluded: dict[str, str]) -> None:
    modules = _named(name, dict(model.named_modules()))
    if any(module is model.get_output_embeddings() for module in modules.values()):
        raise ConfigError("--lora-targets: the output layer does not support an adapter; its rows are read one by one.")
    if modules and all(not hasattr(module, "weight") and any(module.children()) for module in modules.values()):
        kind = type(next(iter(modules.values()))).__name__
        raise ConfigError(f"--lora-targets {name}: a {kind}, not a linear layer. Name the layers inside it.")
    if modules and modules.keys() <= excluded.keys():
        raise ConfigError(f"--lora-targets {name}: does not support adapters: {excluded[min(modules)]}.")


def _check_names(model: Model, names: list[str], known: list[str]) -> None:
    """Check that every name is the name of a module; peft ignores an unknown name if another one matches."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in names:
        if _named(name, modules):
            continue
        if _named(name, parameters):
            raise ConfigError(
                f"--lora-targets {name}: a parameter (such as stacked experts), not a layer: --lora-targets does "
                "not support it. Remove it (peft's target_parameters could adapt it)."
            )
        near = difflib.get_close_matches(name.split(".")[-1], known, 1)
        meant = f"Did you mean {near[0]}?" if near else f"Its linear layers: {', '.join(known)}."
        raise ConfigError(f"--lora-targets {name}: no layer of this model has that name. {meant}")


def _named(name: str, things: dict[str, _T]) -> dict[str, _T]:
    """Return the entries that peft would match with a name: the whole name, or the end of a longer one."""
    return {there: thing for there, thing in things.items() if there == name or there.endswith(f".{name}")}


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)})


def adapter_lines(adapted: Model) -> list[str]:
    """Describe which layers are adapted and which are not, by name and by their share of the model's weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    base = {id(p): p for p in adapted.parameters() if not p.requires_grad}
    total = sum(map(_size, base.values())) or 1
    covered = {id(p): _size(p) for layer in layers.values() for p in _adapted_weights(layer)}
    trained = sum(_size(p) for p in adapted.parameters() if p.requires_grad)
    kinds = _counted(map(_layer_name, layers, layers.values()))
    share = sum(covered.values()) / total
    lines = [f"{len(layers):,} layers ({kinds}) with {share:.0%} of the weights; {trained:,} new ones"]
    settings = adapted.peft_config["default"]
    for why, names in _by_reason(_without_adapters(adapted.get_base_model()) if settings.exclude_modules else {}):
        lines.append(f"none on {_counted(names)}: {why}")
    experts = {id(p): (name, p) for name, p in _stacked_experts(adapted) if id(p) not in covered}
    if experts:
        share = sum(_size(p) for _, p in experts.values()) / total
        stacks = _counted(name for name, _ in experts.values())
        lines.append(f"none on {stacks}, {share:.0%} of the weights: stacked experts (peft's target_parameters could)")
    return [f"{'' if i else 'adapters':<11} {line}" for i, line in enumerate(lines)]


def _by_reason(excluded: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    for why in sorted(set(excluded.values())):
        yield why, [name for name, reason in excluded.items() if reason == why]


def _stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in model.named_modules():
        if holds_experts(module):
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}", parameter


def _adapted_weights(layer: Model) -> list[nn.Parameter]:
    return [layer.get_param()] if hasattr(layer, "parameter_name") else list(layer.base_layer.parameters())


def _layer_name(name: str, layer: Model) -> str:
    """Return the name of an adapted layer, or of a single adapted parameter, in the model."""
    own = getattr(layer, "parameter_name", "weight")
    return name if own == "weight" else str(own)


def _counted(names: Iterable[str]) -> str:
    """Return the last components of layer names with their counts: `q_proj, v_proj: 2 each; lora: 1 each`."""
    kinds = Counter(name.split(".")[-1] for name in names)
    by_number = [(n, [kind for kind in kinds if kinds[kind] == n]) for n in sorted(set(kinds.values()), reverse=True)]
    return "; ".join(
        f"{', '.join(same)}: {n:,} each" if len(same) > 1 else f"{same[0]}: {n:,}" for n, same in by_number
    )


def _size(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(whole_shape(parameter) if state is None else state.shape)


def load_adapters(model: Model, folder: Path) -> Model:
    """Load trained adapters onto their base model, unmerged, as they were trained.

    Raises:
        ModelError: they cannot be read, or do not fit.
    """
    check_installed()
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: its adapters cannot be put on the model: {in_one_line(error)}") from error


@contextlib.contextmanager
def without_adapters(adapted: Model) -> Iterator[None]:
    """Disable the trained adapters in the block, so that the base model computes as the reference does.

    An adapter of the reference that is kept beside quantised weights stays active.
    """
    if not keeps_adapter_beside(adapted):
        with adapted.disable_adapter():
            yield
        return
    _activate(adapted, [BESIDE])
    try:
        yield
    finally:
        _activate(adapted, [BESIDE, _TRAINED])


def remove_adapters(adapted: Model) -> None:
    """Restore the base model to its state before `add_adapters`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not keeps_adapter_beside(adapted):
        model = adapted.unload()
    else:
        model = adapted.get_base_model()
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, BaseTunerLayer):
                continue
            layer.delete_adapter(_TRAINED)
            if BESIDE not in layer.lora_A:
                model.set_submodule(name, layer.base_layer)
        _activate(model, [BESIDE])
    if hasattr(model, "peft_config"):
        del model.peft_config


def merged(adapted: Model) -> Model:
    """Return the base model with its adapters merged into its weights."""
    return adapted.merge_and_unload()


def keeps_adapter_beside(model: nn.Module) -> bool:
    """Return whether the reference's adapter is kept unmerged because its base weights are quantised."""
    return any(f".{BESIDE}." in name for name, _ in model.named_parameters())


def save_as_one_adapter(adapted: Model, out: Path, *, dtype: torch.dtype | None) -> None:
    """Save the reference's adapter and the trained one as a single adapter of the quantised base.

    It is their sum: `[B1 B2] [A1; A2] = B1 A1 + B2 A2`.

    Args:
        dtype: of the saved weights; None for float32.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors, ranks = {}, {}
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        parts = [one for one in (BESIDE, _TRAINED) if one in layer.lora_A]
        lora: Model = layer
        down = torch.cat([lora.lora_A[one].weight.detach().float() for one in parts])
        up = torch.cat([lora.scaling[one] * lora.lora_B[one].weight.detach().float() for one in parts], dim=1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.cpu().contiguous()
        ranks[name] = len(down)
    trained = adapted.peft_config[_TRAINED]
    most = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != most}
    settings = peft.LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=trained.base_model_name_or_path,
        inference_mode=True,
    )
    settings.save_pretrained(str(out))
    if dtype is not None:
        tensors = cast_weights(tensors, dtype)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
