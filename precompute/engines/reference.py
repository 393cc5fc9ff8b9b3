"""Find the reference model's files, hash the content that identifies it, and load it."""

import contextlib
import importlib.metadata
import json
import math
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from offline_kto.kto_core.cache.manifest_fields import (
    LONGEST_NAME,
    ReferenceFields,
    ScorerFields,
    ScoringSections,
    TokenizerFields,
)
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ModelError, printable
from offline_kto.kto_core.hashing import (
    chat_template_hash,
    config_hash,
    file_hash,
    json_hash,
    tokenizer_hash,
    weight_files,
    weights_bytes,
    weights_hash,
)
from offline_kto.kto_core.library_types import Model, Tokenizer
from offline_kto.kto_core.models.adapters import check_adapter_folder
from offline_kto.kto_core.models.attention_choice import Attention, choose_attention
from offline_kto.kto_core.models.folder_code import check_tokenizer_code
from offline_kto.kto_core.models.folders import find_folder, local_path
from offline_kto.kto_core.models.loading import check_model_folder, load_causal_lm
from offline_kto.kto_core.models.memory_check import (
    Sizes,
    Way,
    check_fits,
    free_bytes,
    gigabytes,
    over_all_gpus,
    reporting_memory,
    too_large,
)
from offline_kto.kto_core.models.model_files import read_json_object
from offline_kto.kto_core.models.outline import find_outline
from offline_kto.kto_core.models.precision import ALL, Precision, resolve_device, resolve_precision
from offline_kto.kto_core.options import AUTO
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.tokenizer import reference_tokenizer

# Increment when the rules of kto_core/feedback/tokenization.py change in a way that changes ids.
TOKENIZATION_RULE = 1

_LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow")


@dataclass(frozen=True)
class ReferenceFiles:
    """The files of a reference, found but not opened, and where and in which precision they will be used."""

    config: PrecomputeConfig
    folder: Path
    revision: str | None
    adapter: Path | None
    device: torch.device
    precision: Precision
    paths: dict[str, str | None]  # `path` and `adapter_path` of the manifest

    @classmethod
    def find(cls, config: PrecomputeConfig) -> "ReferenceFiles":
        """Find the files; the libraries that open them are not imported yet, which takes seconds.

        Raises:
            ModelError: model, adapter or device cannot be used.
        """
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        for name in (config.model, config.adapter, config.revision):
            if name is not None and not (name.isprintable() and len(name) <= LONGEST_NAME):
                raise ModelError(
                    f"{printable(name, 100)}: the name is too long or contains control characters; rename it."
                )
        device = resolve_device(config.device)
        folder, revision = find_folder(config.model, revision=config.revision)
        check_model_folder(folder)
        adapter = adapter_revision = None
        if config.adapter:
            adapter, adapter_revision = find_folder(config.adapter, revision=None, what="adapter")
            check_adapter_folder(adapter)
        paths = {
            "path": local_path(folder, revision),
            "adapter_path": local_path(adapter, adapter_revision) if adapter else None,
        }
        return cls(config, folder, revision, adapter, device, resolve_precision(config.dtype, device), paths)


@dataclass(frozen=True)
class Reference(ReferenceFiles):
    """A reference whose tokenizer is loaded, but not its weights."""

    tokenizer: Tokenizer
    shape: Model  # the model without weights, on the meta device
    attention: Attention  # that Transformers scores with
    unread: dict[str, int]  # number of weights in the files that are not read, by kind
    warnings: list[str]  # about the folder and its tokenizer, for the plan
    state: tuple[object, ...]  # sizes and times of its weight files, before they were hashed

    @classmethod
    def find(cls, config: PrecomputeConfig) -> "Reference":
        """Find the files and open them. Raises: ModelError: see `ReferenceFiles.find` and `open`."""
        return cls.open(ReferenceFiles.find(config))

    @classmethod
    def open(cls, files: ReferenceFiles) -> "Reference":
        """Load the tokenizer, and do all cheap checks.

        Raises:
            ModelError: the tokenizer cannot be used, or the files do not fit each other.
        """
        config, folder = files.config, files.folder
        tokenizer, notes = reference_tokenizer(transformers.AutoTokenizer, config, folder)
        outline = find_outline(transformers, folder, trust_remote_code=config.trust_remote_code)
        shape, warnings = outline.model, [*outline.warnings, *notes]
        if not config.trust_remote_code:
            warnings += check_tokenizer_code(folder, type(tokenizer).__name__)
        longest = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and config.max_length > longest:
            raise ModelError(
                f"--max-length {config.max_length}: this model has positions for {longest} tokens. Use --max-length {longest} or less."
            )
        attention = choose_attention(
            config.attention,
            shape,
            read_json_object(folder / "config.json"),
            device=files.device,
            precision=files.precision,
            library=transformers,
        )
        return cls(
            **vars(files),
            tokenizer=tokenizer,
            shape=shape,
            attention=attention,
            unread=outline.unread,
            warnings=warnings,
            state=_state(folder, files.adapter),
        )

    def hash_weights(self) -> "WeightsHashing":
        """Start hashing weights and adapter in the background."""
        return WeightsHashing(self.folder, self.adapter)

    def sections(
        self, hashes: tuple[str, str | None], *, backend: str, engine_versions: Mapping[str, str]
    ) -> ScoringSections:
        """Return the manifest's sections `reference`, `tokenizer`, `tokenization` and `scorer`."""
        scorer: ScorerFields = {
            "backend": backend,
            "versions": {**{name: importlib.metadata.version(name) for name in _LIBRARIES}, **engine_versions},
        }
        if backend == "transformers":
            scorer["attention"] = self.attention.kernel
        return {
            "reference": self._fields(*hashes),
            "tokenizer": self._tokenizer_fields(),
            "tokenization": {"max_length": self.config.max_length, "rule": TOKENIZATION_RULE},
            "scorer": scorer,
        }

    def _fields(self, weights: str, adapter: str | None) -> ReferenceFields:
        shape = self.shape.config
        quantization = getattr(shape, "quantization_config", None)
        code = _code_hashes(self.folder) if self.config.trust_remote_code else {}
        fields: ReferenceFields = {
            "id": self.config.model,
            "revision": self.revision or self.config.revision,
            "path": self.paths["path"],
            "adapter_path": self.paths["adapter_path"],
            "weights_hash": weights,
            "config_hash": config_hash({**shape.to_dict(), **({"code": code} if code else {})}),
            "adapter": self.config.adapter,
            "adapter_hash": adapter,
            "quantization": quantization if isinstance(quantization, dict | None) else quantization.to_dict(),
            "dtype": self.precision.name,
            "attention": shape._attn_implementation,
            "vocabulary": self.vocabulary,
        }
        if self.unread:
            fields["model_type"] = shape.model_type
            fields["unread"] = self.unread
        return fields

    def _tokenizer_fields(self) -> TokenizerFields:
        config = self.config
        fields: TokenizerFields = {
            "files_hash": tokenizer_hash(self.tokenizer),
            "chat_template_hash": chat_template_hash(self.tokenizer),
        }
        # Training on the cache needs the tokenizer as these options changed it.
        if config.tokenizer_options:
            fields["options"] = config.tokenizer_options
        if config.chat_template is not None or config.template_settings:
            fields["chat_template"] = self.tokenizer.chat_template
            fields["chat_template_kwargs"] = config.template_settings
        return fields

    def load(self) -> Model:
        """Return the model, frozen, in eval mode, on its device or spread over several.

        Raises:
            ModelError: it does not fit, or cannot be loaded.
        """
        spread = self._spread()
        with self.reporting_memory("it was loaded"):
            model = load_causal_lm(
                transformers.AutoModelForCausalLM,
                self.folder,
                precision=self.precision,
                device=self.device,
                frozen=True,
                adapter=self.adapter,
                attention=self.attention.to_set,
                trust_remote_code=self.config.trust_remote_code,
                spread=spread,
            )
        return model.eval().requires_grad_(False)

    def reporting_memory(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Return a block in which exhausted memory is an error with the bytes needed and free."""
        return reporting_memory(self.config.model, self.device, self.weights_bytes, doing=doing)

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.shape, self.folder)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the loaded weights."""
        return self.sizes.frozen(self.precision.dtype)

    def _spread(self) -> dict[int, int] | None:
        """Return the GPUs that share the model, and the bytes that its weights may take of each; None for one device.

        Raises:
            ModelError: the model does not fit.
        """
        device, count = self.device, torch.cuda.device_count()
        need = self.weights_bytes
        if self.needs_all_gpus:
            # An adapter is merged in float32.
            while_loading = 4 * self.sizes.parameters if self.adapter and not self.sizes.packed else need
            room = over_all_gpus(self.sizes)
            if while_loading <= sum(room.values()):
                tell(f"memory      the weights need {gigabytes(need)}: {count} GPUs share them")
                return room
            what = f"scoring in {self.precision.name}"
            raise ModelError(
                too_large(
                    self.config.model,
                    what,
                    while_loading,
                    sum(room.values()),
                    f"{count} GPUs for weights",
                    self._instead(),
                )
            )
        check_fits(self.config.model, device, need, what=f"scoring in {self.precision.name}", instead=self._instead())
        return None

    @property
    def needs_all_gpus(self) -> bool:
        """Return whether all GPUs have to share the model: one is too small, or `--device all` says so."""
        name = self.config.device
        if self.device.type != "cuda" or torch.cuda.device_count() < 2:
            return False
        free = free_bytes(self.device)
        return name == ALL or (name == AUTO and free is not None and self.weights_bytes > free)

    def _instead(self) -> list[Way]:
        """Return ways to score that need less memory on one GPU."""
        count, config = torch.cuda.device_count(), self.config
        ways = []
        if self.precision.is_full and not self.sizes.packed:
            ways.append(Way("--dtype bfloat16", self.sizes.frozen(torch.bfloat16)))
        if count > 1 and config.device != ALL:
            ways.append(
                Way(
                    f"--device all without torchrun, or --backend vllm --tensor-parallel {count}, on each of {count} GPUs",
                    math.ceil(self.weights_bytes / count),
                )
            )
        if not self.sizes.packed:
            ways.append(Way("a version of it quantised to 4 bits with bitsandbytes", self.sizes.four_bits()))
        return ways

    def check_unchanged(self) -> None:
        """Check, once the weights are loaded, that the files are those that were hashed.

        Raises:
            ModelError: a file was replaced or written to.
        """
        if _state(self.folder, self.adapter) != self.state:
            raise ModelError(
                f"{self.config.model}: its weight files changed since this command was started, so it is not known which "
                "weights would be scored. Run it again when they are complete."
            )

    @property
    def state_hash(self) -> str:
        """A hash of names, inodes, sizes and times of the weight files; equal ones are the same files."""
        return json_hash([str(one) for one in self.state])

    @property
    def vocabulary(self) -> int:
        return int(self.shape.get_input_embeddings().weight.shape[0])


class WeightsHashing:
    """Hashes weights and adapter in the background; leaving the `with` block stops it.

    Otherwise the process would continue hashing for minutes after an error in the data was reported.
    """

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self._folder, self._adapter = folder, adapter
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=1)
        self._future = pool.submit(self._work)
        pool.shutdown(wait=False)

    def __enter__(self) -> "WeightsHashing":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()

    def result(self) -> tuple[str, str | None]:
        """Wait for the hashes of weights and adapter. Raises: ModelError: damaged files."""
        return self._future.result()

    def _work(self) -> tuple[str, str | None]:
        with Progress("hashing weights", weights_bytes(self._folder), "B") as progress:

            def on_bytes(count: int) -> None:
                if self._stop.is_set():
                    raise CancelledError
                progress.add(count)

            weights = weights_hash(self._folder, on_bytes=on_bytes)
        return weights, _adapter_hash(self._adapter) if self._adapter else None


def _state(folder: Path, adapter: Path | None) -> tuple[object, ...]:
    files = [file for one in (folder, adapter) if one is not None for file in weight_files(one)]
    states = [(file, file.stat()) for file in files if file.exists()]
    return tuple((file, state.st_ino, state.st_size, state.st_mtime_ns) for file, state in states)


def _adapter_hash(adapter: Path) -> str:
    """Return a hash of weights and settings, without settings that are labels only: any other may affect the merge."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return json_hash([weights_hash(adapter), {k: v for k, v in settings.items() if k not in _NAMES}])


_NAMES = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")


def _code_hashes(folder: Path) -> dict[str, str]:
    """Return hashes of the code that comes with a model, which `--trust-remote-code` runs."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.py"))}
