"""Open the inputs of a run (caches, tokenizer, policy); a sweep's worker keeps them between its trials."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.locations import Location
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.models.weight_files import stored_tensors
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.training_data import TrainingData, open_cache
from offline_kto.train.model.checkpointing import disable_checkpointing, is_checkpointing
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.trainer.lean_layers import restore_layers

# Options that require loading another model. Other options are applied to, or removed from, the model in memory.
_OF_MODEL = ("model", "dtype", "attention", "memory", "gradient_checkpointing", "trust_remote_code")


class Materials:
    """The inputs of a run; opens them again for every run."""

    def data(self, config: TrainConfig) -> TrainingData:
        """Open the data. Raises: CacheError, TrainingError: see `TrainingData.open`."""
        return TrainingData.open(config)

    def files(self, config: TrainConfig, manifest: Manifest) -> PolicyFiles:
        """Find the policy's files. Raises: ModelError, TrainingError: see `PolicyFiles.find`."""
        return PolicyFiles.find(config, manifest)

    def model(self, files: PolicyFiles, config: TrainConfig, precision: Precision, device: torch.device) -> Model:
        """Load the policy, ready to train. Raises: ModelError, TrainingError: see `PolicyFiles.load`."""
        return files.prepare(files.load(config, precision, device), config)

    def take_back(self) -> None:
        """Release the policy after the run that used it has ended or failed to begin."""


class _WeightFiles:
    """The weights of a model folder, mapped into memory: the system's file cache holds them once for all processes.

    The files stay open, so that a folder that is moved or replaced during a sweep changes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._places = stored_tensors(folder)
        self._open = {
            path: safe_open(path, framework="pt") for path in {stored.file for stored in self._places.values()}
        }

    def get(self, name: str) -> Tensor:
        """Return the tensor of that name. Raises: KeyError: there is none."""
        tensor: Tensor = self._open[self._places[name].file].get_tensor(name)
        return tensor

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Return whether the tensor of that name, converted to a tensor's type, has its values."""
        if name not in self._places or self._places[name].shape != tuple(tensor.shape):
            return False
        return torch.equal(self.get(name).to(tensor), tensor)


@dataclass
class _Initial:
    """A loaded model and its initial state before training.

    Attributes:
        files: where the initial weights are read from again.
        in_files: names of the weights that have their initial values there.
        others: initial values of all others: constants, and weights that were merged or are stored under another name.
    """

    key: tuple[object, ...]
    model: Model
    files: _WeightFiles
    in_files: list[str]
    others: dict[str, Tensor]
    trained: dict[str, bool]
    forward: Callable[..., object] | None
    checkpoints: bool

    @classmethod
    @torch.no_grad()
    def of(cls, key: tuple[object, ...], model: Model, folder: Path, *, frozen: bool) -> "_Initial":
        # LoRA does not change the base model, so nothing is restored.
        tensors = {} if frozen else _tensors(model)
        files = _WeightFiles(folder)
        in_files = [name for name, tensor in tensors.items() if files.holds(name, tensor)]
        others = {name: tensors[name].detach().to("cpu", copy=True) for name in tensors.keys() - set(in_files)}
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return cls(key, model, files, in_files, others, trained, vars(model).get("forward"), is_checkpointing(model))

    @torch.no_grad()
    def restore(self) -> Model:
        tensors = _tensors(self.model)
        for name in self.in_files:
            tensors[name].copy_(self.files.get(name))
        for name, weight in self.others.items():
            tensors[name].copy_(weight)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trained[name])
            parameter.grad = None
        restore_layers(self.model)
        if is_checkpointing(self.model) and not self.checkpoints:  # the last run's own choice
            disable_checkpointing(self.model)
        # accelerate wrapped `forward` in autocast, and would not do so again if it found its attribute.
        self.model.forward = self.forward
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        return self.model.eval()


def _tensors(model: Model) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@dataclass
class KeptMaterials(Materials):
    """The inputs of several runs, opened once; the policy is restored to its initial state, not loaded again.

    Attributes:
        loads: how often a model was read from disk.
    """

    loads: int = 0
    _caches: dict[tuple[Location, int | None], CacheRows] = field(default_factory=dict)
    _files: dict[tuple[object, ...], PolicyFiles] = field(default_factory=dict)
    _initial: _Initial | None = None
    _given: Model = None

    def data(self, config: TrainConfig) -> TrainingData:
        return TrainingData.open(config, self._open)

    def verified_data(self, config: TrainConfig) -> TrainingData:
        """Open the data after verifying it as the options say.

        `data` only verifies what changed since then, or what nobody could remember.
        """

        def verified(cache: Location, max_length: int | None) -> CacheRows:
            rows = open_cache(cache, max_length, mapped=True, trust_unchanged=config.trusts_unchanged)
            self._caches[cache, max_length] = rows
            return rows

        return TrainingData.open(config, verified)

    def _open(self, cache: Location, max_length: int | None) -> CacheRows:
        key = (cache, max_length)
        if key not in self._caches:
            self._caches[key] = open_cache(cache, max_length, mapped=True, trust_unchanged=True)
        return self._caches[key]

    def files(self, config: TrainConfig, manifest: Manifest) -> PolicyFiles:
        of_attention = (config.attention, config.device, config.dtype)
        key = (config.model, config.trust_remote_code, manifest.fingerprint, *of_attention)
        if key not in self._files:
            self._files[key] = PolicyFiles.find(config, manifest)
        return self._files[key]

    def model(self, files: PolicyFiles, config: TrainConfig, precision: Precision, device: torch.device) -> Model:
        frozen = config.lora_rank > 0
        key = (*(getattr(config, name) for name in _OF_MODEL), frozen, str(device))
        if self._initial is None or self._initial.key != key:
            self._initial = None  # freed before the next one is loaded: memory may not hold two models
            self.loads += 1
            self._initial = _Initial.of(key, files.load(config, precision, device), files.folder, frozen=frozen)
        initial, self._initial = self._initial, None  # a model that could not be prepared is not reused
        self._given = files.prepare(initial.restore(), config)
        self._initial = initial
        return self._given

    def take_back(self) -> None:
        given, self._given = self._given, None
        if self._initial is not None and given is not None and given is not self._initial.model:
            from offline_kto.train.model.lora import remove_adapters

            remove_adapters(given)
