"""Build a model without its weights, to see which class reads a folder and whether it reads all weights in the files.

Loading that class from tensors without values takes milliseconds, and reports the same unread weights as a real load:
names go through the same renaming and merging. `transformers` is passed in as a module.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict, cast

import torch

from offline_kto.kto_core.errors import ModelError, in_one_line, printable
from offline_kto.kto_core.library_types import Model, Transformers
from offline_kto.kto_core.models.folder_code import check_model_code, not_run, own_code
from offline_kto.kto_core.models.library_warnings import collected_warnings, telling
from offline_kto.kto_core.models.model_files import read_json_object
from offline_kto.kto_core.models.quantization import check_quantization, declared_quantization
from offline_kto.kto_core.models.weight_files import (
    PREDICTION,
    TOWER,
    StoredTensor,
    is_activation_scale,
    is_constant,
    is_of_prediction,
    is_of_tower,
    is_zero_bias,
    some,
    stored_tensors,
)
from offline_kto.kto_core.scoring.attention import apply_softcaps, kernel_keywords

# Name of a weight, its shape in the files, its shape in the model.
Mismatch: TypeAlias = tuple[str, Sequence[int], Sequence[int]]


class LoadingInfo(TypedDict, total=False):
    """The part of transformers' `output_loading_info` that is used here.

    Attributes:
        missing_keys: weights of the model that the files lack.
        unexpected_keys: weights of the files that were not read.
        mismatched_keys: weights of another shape.
    """

    missing_keys: Collection[str]
    unexpected_keys: Collection[str]
    mismatched_keys: Collection[Mismatch]


@dataclass(frozen=True)
class Outline:
    """A folder's model without weights, and how it differs from the files.

    Attributes:
        model: without weights, on the meta device.
        unread: number of weights in the files that it does not read, by kind.
        warnings: lines for the plan.
    """

    model: Model
    unread: dict[str, int]
    warnings: list[str]


def find_outline(library: Transformers, folder: Path, *, trust_remote_code: bool) -> Outline:
    """Build a folder's model without weights, and compare it with the files.

    Args:
        library: the module `transformers`.

    Raises:
        ModelError: not a causal language model, or one whose scores would be wrong: unread weights, weights of another
            shape, a quantisation that is not applied, code that is not run.
    """
    with collected_warnings() as messages:
        model = build_without_weights(library, folder, trust_remote_code=trust_remote_code)
    warnings = [f"{folder / 'config.json'}: transformers warns: {message}" for message in telling(messages)]
    if not trust_remote_code:
        warnings += check_model_code(folder, *classes_used(model, folder))
    tensors = stored_tensors(folder)
    check_quantization(folder, tensors, is_applied=library.quantizers.AutoHfQuantizer.supports_quant_method)
    unread: dict[str, int] = {}
    if declared_quantization(folder) is None:
        report = _report(library, model, tensors)
        check_shapes(folder, report["mismatched_keys"])
        unread = check_unread(model, folder, report["unexpected_keys"], tensors)
    check_reloadable(library, model, folder)
    warnings += said_of_unread(model, folder, unread)
    return Outline(model, unread, warnings)


def build_without_weights(library: Transformers, folder: Path, *, trust_remote_code: bool) -> Model:
    """Build the model that a folder's config.json describes, on the meta device; no other file is read.

    Args:
        library: the module `transformers`.

    Raises:
        ModelError: not a causal language model, or one with code that is not run.
    """
    config = read_json_object(folder / "config.json")
    kind = _other_family(config, library)
    if kind is not None:
        raise ModelError(f"{folder}: {kind}")
    try:
        keywords = {"trust_remote_code": trust_remote_code, **kernel_keywords(config)}
        settings = library.AutoConfig.from_pretrained(str(folder), **keywords)
        with torch.device("meta"):
            model = library.AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
        apply_softcaps(model)
        return model
    except Exception as error:  # a model's own code may raise anything
        code = None if trust_remote_code else own_code(folder)
        if code is not None:
            raise not_run(folder, code, instead=None) from error
        if str(config.get("architectures")).endswith("ForConditionalGeneration']"):
            raise ModelError(
                f"{folder}: transformers has no causal language model for this multimodal model "
                f"({printable(str(config.get('model_type')), 60)}). Use a text-only model."
            ) from error
        raise ModelError(
            f"{folder}: not a causal language model that transformers can load: {printable(in_one_line(error), 300)}"
        ) from error


# Endings of the class names in config.json, and the kind of model.
_FAMILIES = {
    "ForMaskedLM": "an encoder (a masked language model)",
    "ForPreTraining": "an encoder (a masked language model)",
    "ForSequenceClassification": "a classifier or reward model",
    "ForTokenClassification": "a classifier",
    "ForQuestionAnswering": "a classifier",
    "ForImageClassification": "an image classifier",
}


def _other_family(config: Mapping[str, object], library: Transformers) -> str | None:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    kind = next((kind for end, kind in _FAMILIES.items() if name.endswith(end)), None)
    if config.get("is_encoder_decoder"):
        kind = "an encoder-decoder model"
    if kind is None and not name and not config.get("auto_map"):
        kind = _other_type(config, library.models.auto.modeling_auto)
    if kind is None:
        return None
    return (
        f"{printable(name or str(config.get('model_type')), 60)} is {kind}. KTO needs a causal (decoder-only) language model, as "
        "AutoModelForCausalLM loads it."
    )


def _other_type(config: Mapping[str, object], auto: Transformers) -> str | None:
    """Return what a configuration without `architectures` describes, if that is no causal language model."""
    kind = str(config.get("model_type"))
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        return "an encoder (a masked language model)"
    if kind in auto.MODEL_MAPPING_NAMES and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "not a language model of text alone"
    return None


def classes_used(model: Model, folder: Path) -> tuple[str, dict[str, str]]:
    """Return the folder's model type, and the classes that are used to load it."""
    body = getattr(model, "base_model", model)
    classes = {"AutoConfig": model.config, "AutoModelForCausalLM": model, "AutoModel": body}
    model_type = str(read_json_object(folder / "config.json").get("model_type"))
    return model_type, {name: type(one).__name__ for name, one in classes.items()}


def _report(library: Transformers, model: Model, tensors: Mapping[str, StoredTensor]) -> LoadingInfo:
    """Return the weights that loading the model from these tensors would not read, or would read in another shape.

    Each class has a list of names that it ignores silently, among them whole layers by their number; the subclass here
    disables that list. If transformers cannot load without values, nothing is reported until the weights are loaded.
    """
    kind = type(model)
    overrides = {"_adjust_missing_and_unexpected_keys": lambda *_: None, "__module__": kind.__module__}
    speaking: Transformers = type(kind.__name__, (kind,), overrides)
    empty = {
        name: torch.empty(tensor.shape, dtype=torch.float32, device="meta")
        for name, tensor in tensors.items()
        if not is_constant(name, tensor)
    }
    try:
        with _no_progress_bar(library):
            _, info = speaking.from_pretrained(
                None,
                config=model.config,
                state_dict=empty,
                dtype=torch.float32,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError, AssertionError):
        return {"unexpected_keys": set(), "mismatched_keys": set()}
    return cast("LoadingInfo", info)


@contextlib.contextmanager
def _no_progress_bar(library: Transformers) -> Iterator[None]:
    shown = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.utils.logging.enable_progress_bar()


def check_shapes(folder: Path, mismatched: Collection[Mismatch]) -> None:
    """Refuse weights whose shape differs from the configuration's.

    Args:
        mismatched: name, shape in the files, shape in the model.

    Raises:
        ModelError: there are some.
    """
    if mismatched:
        name, stored, wanted = min(mismatched, key=lambda one: one[0])
        more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        raise ModelError(
            f"{folder}: {name} is {list(stored)} in the files, {list(wanted)} by config.json{more}. The configuration belongs to "
            "another model, or was edited. Copy the model again."
        )


def check_unread(
    model: Model, folder: Path, unexpected: Collection[str], tensors: dict[str, StoredTensor]
) -> dict[str, int]:
    """Count the weights that loading leaves out, by kind.

    Args:
        model: loaded, or without weights.
        unexpected: names of the weights that it does not read.
        tensors: of the folder's files.

    Raises:
        ModelError: some of them would change the model's scores.
    """
    config = model.config.get_text_config()
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    prediction = int(getattr(config, "num_nextn_predict_layers", 0) or 0)
    quantized = declared_quantization(folder) is not None
    counts: Counter[str] = Counter()
    others = []
    for name in unexpected:
        if is_of_tower(name):
            counts[TOWER] += 1
        elif is_of_prediction(name, layers, prediction):
            counts[PREDICTION] += 1
        elif quantized and is_activation_scale(name):
            continue
        elif not is_constant(name, tensors.get(name)) and not is_zero_bias(name, tensors):
            others.append(name)
    if others:
        raise ModelError(
            f"{folder}: the files contain {len(others)} weights that {type(model).__name__} does not read ({some(others)}). The "
            "scores would be those of another model. Either config.json omits the parts that they belong to (layers, biases, a "
            "head), or this is not a causal language model (a reward model, an unmerged adapter)."
        )
    return dict(counts)


def check_reloadable(library: Transformers, model: Model, folder: Path) -> None:
    """Refuse the text part of a multimodal checkpoint if it could not be loaded again once it is saved alone (Mllama).

    Raises:
        ModelError: it could not be loaded.
    """
    if model.config.model_type == read_json_object(folder / "config.json").get("model_type"):
        return
    try:
        with torch.device("meta"):
            library.AutoModelForCausalLM.from_config(model.config)
    except ValueError as error:
        raise ModelError(
            f"{folder}: only the text part of this multimodal checkpoint would be trained, as {model.config.model_type}, and "
            "transformers could not load the saved model again. Use a text-only model."
        ) from error


def said_of_unread(model: Model, folder: Path, unread: Mapping[str, int]) -> list[str]:
    """Return the plan's warnings about unread weights."""
    kept, was = model.config.model_type, read_json_object(folder / "config.json").get("model_type")
    warnings = []
    if TOWER in unread or kept != was:
        counted = f"{unread[TOWER]:,} {TOWER} weights" if TOWER in unread else "the other parts"
        warnings.append(
            f"{counted} of this {printable(str(was), 60)} checkpoint are not read: only the text part is scored and trained, "
            f"and a run saves a text model ({kept}, {type(model).__name__}), without towers and processors"
        )
    if PREDICTION in unread:
        warnings.append(
            f"{unread[PREDICTION]:,} {PREDICTION} weights are not read, and not saved with a trained model; no score depends "
            "on them"
        )
    return warnings
