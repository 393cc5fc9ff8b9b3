"""Write a policy to a folder that contains only what was trained, and check that the folder can be loaded.

A folder gets   the weights, in float32 or in the type of --save-dtype
                the configuration and sampling settings of the model the run started from, unchanged
                its tokenizer files, if they still tokenize as the run's tokenizer does
"""

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from offline_kto.kto_core.durable_files import write_json
from offline_kto.kto_core.errors import TrainingError, said_by
from offline_kto.kto_core.hashing import chat_template_hash, stored_type, tokenizer_hash
from offline_kto.kto_core.library_types import Model, Tokenizer
from offline_kto.kto_core.models.weight_files import stored_tensors
from offline_kto.kto_core.scoring.attention import kernel_keywords
from offline_kto.kto_core.scoring.output_layer import whole_shape

ADAPTER_CONFIG = "adapter_config.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"

# In addition to the vocabulary files that each tokenizer class declares.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
)
_MORE_TEMPLATES = "additional_chat_templates"


class UnloadableModelError(TrainingError):
    """A saved folder does not load as the model that was trained."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's weights.

    Attributes:
        shapes: of every name; tied weights have several.
        tied: the names that share one weight, where there are several.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[frozenset[str]]

    @classmethod
    def of(cls, model: Model) -> "Layout":
        shapes: dict[str, tuple[int, ...]] = {}
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shapes[name] = whole_shape(parameter)
            names.setdefault(id(parameter), set()).add(name)
        return cls(shapes, frozenset(frozenset(group) for group in names.values() if len(group) > 1))

    def difference(self, other: "Layout") -> str | None:
        """Return how another model's weights differ, in words; None if names and shapes are equal."""
        if missing := sorted(self.shapes.keys() - other.shapes.keys()):
            return f"{len(missing)} weights are missing ({missing[0]}, ...)"
        if added := sorted(other.shapes.keys() - self.shapes.keys()):
            return f"{len(added)} weights are not the policy's ({added[0]}, ...)"
        for name, shape in self.shapes.items():
            if shape != other.shapes[name]:
                return f"{name} has shape {other.shapes[name]}, not {shape}"
        if self.tied != other.tied:
            return f"{' and '.join(sorted(next(iter(self.tied ^ other.tied))))} share one weight in only one of the two"
        return None


@dataclass(frozen=True)
class ModelWriter:
    """Writer of one run's policy.

    Attributes:
        own: contents of the model's own small files, by name: its folder may be gone when a long run ends.
        wide: names of the weights that are stored in float32 in a model of 16 bits.
        tokenizer: the run's.
        layout: of the policy below its adapters, before it was sharded.
    """

    own: dict[str, bytes]
    wide: frozenset[str]
    tokenizer: Tokenizer
    layout: Layout
    trust_remote_code: bool = False

    @classmethod
    def of(cls, source: Path, tokenizer: Tokenizer, model: Model, *, trust_remote_code: bool = False) -> "ModelWriter":
        """Read the files and names that saving must preserve.

        Args:
            source: the folder of the model that the run started from.
            model: as it was loaded from there, with or without new adapters.

        Raises:
            ModelError: the folder's weights are damaged.
        """
        own, tables = _own_files(source, tokenizer), (_CONFIG, "tokenizer_config.json")
        if any("auto_map" in json.loads(own[name]) for name in tables if name in own):
            own.update({path.name: path.read_bytes() for path in source.glob("*.py")})  # named there
        return cls(own, _wide_names(source), tokenizer, Layout.of(model), trust_remote_code)

    def write(
        self,
        model: Model,
        folder: Path,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Write weights, configuration and tokenizer, then load the folder on the meta device and compare.

        Args:
            model: a `transformers` model, or a PEFT model, whose adapters are written.
            state_dict: its gathered weights, if it is sharded.
            dtype: of floating-point weights; None for their own.
            layout: layout of `model`, if it is not the policy that the run began with.

        Raises:
            TrainingError: the folder does not load as the trained model, or a value does not fit `dtype`.
        """
        if dtype is not None:
            state_dict = cast_weights(
                model.state_dict() if state_dict is None else state_dict, dtype, self.keeps(model)
            )
        model.save_pretrained(str(folder), state_dict=state_dict)
        self.write_tokenizer(folder)
        if (folder / ADAPTER_CONFIG).exists():
            check_adapters(folder, model)
        else:
            self._write_own_config(model, folder, dtype)
            self.check_loads(folder, layout or self.layout)

    def keeps(self, model: Model) -> set[str]:
        """Return the names of the weights that stay in float32 because the model's authors store them so."""
        modules = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
        modules += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
        pattern = re.compile("|".join(rf"(?:^|\.){module}(?:$|\.)" for module in modules) or "$^")
        names = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
        kept = {name for name in names if pattern.search(name)} | self.wide
        if hasattr(model, "get_base_model"):  # PEFT saves some layers below adapters on embeddings as well
            kept |= {name for name, weight in model.named_parameters() if not weight.requires_grad}
        return kept

    def _write_own_config(self, model: Model, folder: Path, dtype: torch.dtype | None) -> None:
        """Replace the configuration that `transformers` wrote by the model's own, with only the run's changes."""
        written, own = _read(folder / _CONFIG), dict(json.loads(self.own[_CONFIG]))
        if _GENERATION in self.own and _can_be_saved(json.loads(self.own[_GENERATION])):
            (folder / _GENERATION).write_bytes(self.own[_GENERATION])
        if own.get("model_type") != written.get("model_type"):
            own = written  # one part of a larger model: its configuration is stored nowhere else
        own["architectures"] = written.get("architectures")
        name = str(dtype or torch.float32).removeprefix("torch.")
        for config in (own, own.get("text_config")):
            if isinstance(config, dict):
                config.update({key: name for key in ("dtype", "torch_dtype") if key in config})
        if "dtype" not in own and "torch_dtype" not in own:
            own["dtype"] = name
        key = "tie_word_embeddings"
        tied = getattr(model.config, key, None)
        if tied != own.get(key, getattr(type(model.config), key, tied)):  # a merged adapter contained its own head
            own[key] = tied
        if getattr(model.config, "quantization_config", None) is None:
            own.pop("quantization_config", None)
        if kernel_keywords(own) and model.config._attn_implementation != "sdpa":
            del own["attn_implementation"]  # recent versions of transformers would refuse to load the model
        write_json(folder / _CONFIG, own)

    def check_loads(self, folder: Path, layout: Layout) -> None:
        """Load a saved folder on the meta device and compare names and shapes.

        Args:
            layout: of the model that was saved.

        Raises:
            UnloadableModelError: it cannot be loaded, or loads as another model.
        """
        try:
            model, info = self._load(folder)
        except Exception as error:
            if self.trust_remote_code:
                return  # custom model code may not support the meta device
            raise UnloadableModelError(f"the saved model cannot be loaded: {said_by(error)}") from error
        wrong = [f"{len(names)} {kind.replace('_', ' ')}" for kind, names in info.items() if names]
        found = ", ".join(wrong) or layout.difference(Layout.of(model))
        if found:
            raise UnloadableModelError(f"the saved model is not the one that was trained: {found}")

    def _load(self, folder: Path) -> tuple[Model, dict[str, Collection[object]]]:
        load = functools.partial(
            transformers.AutoModelForCausalLM.from_pretrained,
            str(folder),
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )
        try:
            model, info = load(device_map="meta")
        except NotImplementedError:  # transformers 5.10 compares the values of two weights that may be tied
            model, info = load()
        return model, info

    def write_tokenizer(self, folder: Path) -> None:
        """Write the model's own tokenizer files, or serialize a tokenizer that the run changed."""
        others = {_CONFIG, _GENERATION}
        for name, content in self.own.items():
            if name not in others:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        if _reads_alike(folder, self.tokenizer, self.trust_remote_code):
            return
        for name in self.own.keys() - others:
            if not name.endswith(".py"):
                (folder / name).unlink()
        self.tokenizer.save_pretrained(str(folder))


def _own_files(source: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the contents of a model folder's small files: configuration, sampling settings, tokenizer."""
    names = {*_TOKENIZER_FILES, *getattr(tokenizer, "vocab_files_names", {}).values()}
    paths = [source / name for name in (_CONFIG, _GENERATION, *sorted(names))]
    paths += sorted((source / _MORE_TEMPLATES).glob("*.jinja"))
    return {path.relative_to(source).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def _wide_names(source: Path) -> frozenset[str]:
    if stored_type(source) in (None, "F32"):
        return frozenset()
    return frozenset(name for name, tensor in stored_tensors(source).items() if tensor.dtype == "F32")


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype, keep: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return floating-point weights in another type, on the host.

    Args:
        keep: names of weights that are not cast.

    Raises:
        TrainingError: a finite value that is too large for the type.
    """
    stay, done, result = set(keep), {}, {}
    for name, weight in weights.items():
        if name in stay or not torch.is_tensor(weight) or not weight.is_floating_point():
            result[name] = weight
            continue
        key = (weight.data_ptr(), weight.shape, weight.device)  # tied weights stay tied
        if key not in done or not weight.numel():
            done[key] = narrowed(name, weight, dtype).to("cpu")
        result[name] = done[key]
    return result


def narrowed(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another type. Raises: TrainingError: a finite value is too large for that type."""
    narrow = weight.detach().to(dtype)
    if not_finite({name: narrow}) and not not_finite({name: weight}):
        largest = float(weight.abs().max())
        kind = str(dtype).removeprefix("torch.")
        raise TrainingError(
            f"--save-dtype {kind}: {name} contains {largest:.3g}, which is too large for {kind}. Use --save-dtype bfloat16 or float32."
        )
    return narrow


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that contain NaN or infinity, with one pass and one device transfer."""
    checked = {name: one.detach() for name, one in weights.items() if one.numel() and one.is_floating_point()}
    if not checked:
        return []
    # Minimum and maximum of a tensor are NaN if one value is. They need one read and no copy, unlike `isfinite`.
    extremes = [torch.stack(torch.aminmax(one)).float() for one in checked.values()]
    device = extremes[0].device
    finite = torch.stack([one.to(device) for one in extremes]).isfinite().all(1).tolist()
    return [name for name, good in zip(checked, finite, strict=True) if not good]


def check_adapters(folder: Path, model: Model) -> None:
    """Compare the names and shapes in an adapter's file with the adapters of a model.

    Raises:
        UnloadableModelError: they differ.
    """
    parameters = {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
    }
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wrong = sorted(
        name for name, one in parameters.items() if one.requires_grad and saved.get(name) != whole_shape(one)
    )
    # An adapter that the reference keeps beside quantised weights is saved as well.
    wrong += sorted(name for name in saved.keys() - parameters.keys() if "lora_" in name)
    if wrong:
        raise UnloadableModelError(
            f"the saved adapters are not those of the run ({wrong[0]} and {len(wrong) - 1} more)"
        )


def load_weights(model: Model, folder: Path, trust_remote_code: bool) -> None:
    """Load a saved folder's weights into a model, as `from_pretrained` reads them.

    Raises:
        UnloadableModelError: they are not those of this model.
    """
    saved, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    found = next((f"{len(names)} {kind.replace('_', ' ')}" for kind, names in info.items() if names), None)
    found = found or Layout.of(model).difference(Layout.of(saved))
    if found:
        raise UnloadableModelError(f"its weights are not those of the run's model: {found}")
    model.load_state_dict(saved.state_dict())


def _can_be_saved(settings: dict[str, object]) -> bool:
    """Return whether sampling settings are consistent, which saving a model requires."""
    try:
        transformers.GenerationConfig.from_dict(settings).validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def _reads_alike(folder: Path, tokenizer: Tokenizer, trust_remote_code: bool) -> bool:
    """Return whether the tokenizer in a folder, loaded the usual way, equals the given one."""
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        return _marks(found) == _marks(tokenizer)
    except Exception:  # noqa: BLE001 - a tokenizer's own code may raise anything; it is written out instead
        return False


def _marks(tokenizer: Tokenizer) -> tuple[str, str | None]:
    return tokenizer_hash(tokenizer), chat_template_hash(tokenizer)


def _read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8-sig")))
