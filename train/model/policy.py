"""Find and load the policy, which starts as a trainable copy of the cached reference."""

import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.console import warn
from offline_kto.kto_core.errors import KTOError, ModelError, TrainingError
from offline_kto.kto_core.hashing import chat_template_hash, tokenizer_hash
from offline_kto.kto_core.launch import gpus_sharing_weights, reads_weights, sharding_asked_for
from offline_kto.kto_core.library_types import Model, Tokenizer
from offline_kto.kto_core.models.attention_choice import Attention, choose_attention
from offline_kto.kto_core.models.folder_code import check_tokenizer_code
from offline_kto.kto_core.models.folders import find_folder, find_reference
from offline_kto.kto_core.models.loading import check_model_folder, is_quantized_folder, load_causal_lm
from offline_kto.kto_core.models.memory_check import Sizes, check_fits, reporting_memory
from offline_kto.kto_core.models.model_files import read_json_object
from offline_kto.kto_core.models.outline import find_outline
from offline_kto.kto_core.models.precision import Precision, resolve_device, store_by_module_in
from offline_kto.kto_core.models.tokenizer_files import load_tokenizer
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.checkpointing import enable_checkpointing
from offline_kto.train.model.experts import cast_experts
from offline_kto.train.model.recipe import keeps_narrow_weights, run_precision
from offline_kto.train.model.training_memory import check_training_fits


@dataclass(frozen=True)
class PolicyFiles:
    """The model folder and tokenizer that the policy is loaded from.

    Attributes:
        name: as the user or the manifest names it.
        adapter: the reference's adapter; merged into the weights before training, or loaded next to quantised weights.
        attention: the implementation that the policy is trained with.
        warnings: about the folder, for the plan.
        is_local: whether the model is a folder of the user's, and not one of the hub's.
        sizes: of its weights.
    """

    name: str
    folder: Path
    adapter: Path | None
    tokenizer: Tokenizer
    attention: Attention
    warnings: tuple[str, ...] = ()
    is_local: bool = True
    sizes: Sizes = Sizes(0, 0)

    @property
    def how_adapted(self) -> str:
        """Return where the reference's adapter is, for the printed plan."""
        return "next to its quantised weights" if is_quantized_folder(self.folder) else "merged"

    @classmethod
    def find(cls, config: TrainConfig, manifest: Manifest) -> "PolicyFiles":
        """Find the model named by `--model`, or else the one that the cache was scored with.

        Raises:
            ModelError: it cannot be found.
            TrainingError: its tokenizer or chat template is not the cache's.
        """
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        reference = manifest.reference
        name = config.model or str(reference["id"])
        adapter = None
        try:
            # A hub model is loaded at the commit that was scored.
            folder, commit = find_folder(name, revision=None) if config.model else find_reference(reference)
            check_model_folder(folder)
            if not config.model and reference.get("adapter"):
                adapter, _ = find_reference(reference, "adapter")
        except KTOError as error:
            if config.model:
                raise
            raise ModelError(
                f"{error} The cache names it as its reference; if it was moved, pass it with --model."
            ) from error
        tokenizer = load_tokenizer(
            transformers.AutoTokenizer,
            folder,
            trust_remote_code=config.trust_remote_code,
            options=manifest.tokenizer.get("options"),
        )
        if template := manifest.tokenizer.get("chat_template"):
            tokenizer.chat_template = template  # the tokenizer of the rows; `compare_tokenizer` compares its hash
        outline = find_outline(transformers, folder, trust_remote_code=config.trust_remote_code)
        device, warnings = resolve_device(config.device), outline.warnings
        attention = choose_attention(
            config.attention,
            outline.model,
            read_json_object(folder / "config.json"),
            device=device,
            precision=run_precision(config, device),
            library=transformers,
        )
        if not config.trust_remote_code:
            warnings += check_tokenizer_code(folder, type(tokenizer).__name__)
        files = cls(
            name,
            folder,
            adapter,
            tokenizer,
            attention,
            tuple(warnings),
            is_local=commit is None,
            sizes=Sizes.of(outline.model, folder),
        )
        files.compare_tokenizer(manifest, allow=config.allow_different_policy)
        return files

    def compare_tokenizer(self, manifest: Manifest, *, allow: bool) -> None:
        """Check that the policy's tokenizer and chat template are those of the cache."""
        found = {
            "tokenizer": (tokenizer_hash(self.tokenizer), manifest.tokenizer.get("files_hash")),
            "chat template": (
                chat_template_hash(self.tokenizer),
                manifest.tokenizer.get("chat_template_hash"),
            ),
        }
        other = [what for what, (mine, cached) in found.items() if mine != cached]
        if not other:
            return
        message = (
            f"{self.name}: its {' and '.join(other)} differ{'s' if len(other) == 1 else ''} from the one that the cache "
            f"was tokenized with ({manifest.reference.get('id')})."
        )
        if not allow:
            raise TrainingError(
                f"{message} The trained model would be prompted differently than in training. Score again with "
                f"kto-precompute --model {self.name}, or pass --allow-different-policy if this is intended."
            )
        warn(message)

    def load(self, config: TrainConfig, precision: Precision, device: torch.device, *, trains: bool = True) -> Model:
        """Load the model as it is on disk: all weights trainable, or frozen when adapters are trained.

        Args:
            trains: whether it will be trained on this device, with gradients and an optimizer.

        Raises:
            ModelError: it cannot be loaded.
            TrainingError: its weights are quantised, and no adapters are asked for; or training does not fit into memory.
        """
        self.check_trainable(config, precision, device, trains=trains)
        with self.reporting_memory(config, precision, device, "it was loaded"):
            model = load_causal_lm(
                transformers.AutoModelForCausalLM,
                self.folder,
                precision=precision,
                device=device,
                frozen=config.lora_rank > 0,
                narrow=keeps_narrow_weights(config),
                adapter=self.adapter,
                attention=self.attention.to_set,
                trust_remote_code=config.trust_remote_code,
                reads=reads_weights(),
            )
        if keeps_narrow_weights(config):
            if sharding_asked_for():
                store_by_module_in(model, precision.dtype)
        elif not config.lora_rank:
            cast_experts(model)
        _repair_generation(model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        return model

    def check_trainable(
        self, config: TrainConfig, precision: Precision, device: torch.device, *, trains: bool = True
    ) -> None:
        """Check that the weights are of a kind that can be trained, and fit into memory. Args, Raises: as `load`."""
        if not config.lora_rank and is_quantized_folder(self.folder):
            raise TrainingError(
                f"{self.name}: its weights are quantised and cannot be trained. Train adapters on them "
                "(QLoRA) with --lora-rank 16."
            )
        self._check_fits(config, precision, device, trains=trains)

    def _check_fits(self, config: TrainConfig, precision: Precision, device: torch.device, *, trains: bool) -> None:
        gpus = gpus_sharing_weights()
        if gpus is None:
            return
        if gpus > 1:  # `device` holds the copy that is sharded, if this rank reads one
            device = resolve_device(config.device)
        if trains:
            check_training_fits(self.name, self.sizes, config, precision, device, gpus=gpus)
        else:
            need = math.ceil(self._loaded_bytes(config, precision) / gpus)
            check_fits(self.name, device, need, what=f"evaluation in {precision.name}", instead=[])

    def _loaded_bytes(self, config: TrainConfig, precision: Precision) -> int:
        each = 2 if keeps_narrow_weights(config) else 4
        return self.sizes.frozen(precision.dtype) if config.lora_rank else each * self.sizes.parameters

    def reporting_memory(
        self, config: TrainConfig, precision: Precision, device: torch.device, doing: str
    ) -> AbstractContextManager[None]:
        """Return a block in which exhausted memory is an error with the bytes needed and free."""
        return reporting_memory(self.name, device, self._loaded_bytes(config, precision), doing=doing)

    def prepare(self, model: Model, config: TrainConfig) -> Model:
        """Return a loaded model ready to train, with new LoRA adapters if the run trains adapters."""
        if not config.lora_rank:
            return model
        from offline_kto.train.model.lora import add_adapters

        torch.manual_seed(config.seed)  # LoRA starts from random A matrices
        base = str(self.folder.resolve()) if self.is_local else self.name
        return add_adapters(model, config, base=base)


def _repair_generation(model: Model) -> None:
    """Make the generation settings valid, so that saving does not fail after training.

    Some published models set sampling options without `do_sample`.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
        return
    except ValueError:
        generation.do_sample = True
    try:
        generation.validate(strict=True)
        warn("generation_config.json sets sampling options without do_sample; do_sample is added when it is saved")
    except ValueError:
        tokens = {name: value for name, value in generation.to_dict().items() if name.endswith("_token_id")}
        model.generation_config = transformers.GenerationConfig.from_dict(tokens)
        warn("generation_config.json contradicts itself; only its special tokens are saved")
