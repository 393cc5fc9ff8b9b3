"""Build `transformers.TrainingArguments` from our options."""

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from offline_kto.kto_core.errors import ConfigError, in_one_line, nearest, shown
from offline_kto.kto_core.launch import START_OR_UNSET, sharding_asked_for, unreachable, world_size
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.options import check_table, value_types
from offline_kto.kto_core.redaction import is_secret_name, without_secrets
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.recipe import keeps_narrow_weights
from offline_kto.train.trainer.compiled_layers import BACKEND, MODE, TORCH_COMPILE, Compiling
from offline_kto.train.trainer.liger_layers import liger_settings

# Set from our own options: two places for one setting could contradict each other.
_OURS = {
    "output_dir": "--out",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--max-tokens",
    "gradient_accumulation_steps": "--batch-size and --max-tokens",
    "auto_find_batch_size": "--max-tokens",
    "learning_rate": "--learning-rate",
    "num_train_epochs": "--epochs",
    "max_steps": "--max-steps",
    "lr_scheduler_type": "--scheduler",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "weight_decay": "--weight-decay",
    "seed": "--seed",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "use_cpu": "--device",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing": "--gradient-checkpointing",  # its name since transformers 5.24
    "eval_steps": "--eval-steps",
    "save_steps": "--save-steps",
    "logging_steps": "--logging-steps",
    "report_to": "--report-to",
    "resume_from_checkpoint": "--resume",
    "metric_for_best_model": "--metric",
    "greater_is_better": "--metric",
    "load_best_model_at_end": "--early-stopping",
    "push_to_hub": "--push-to-hub",
    "hub_model_id": "--push-to-hub",
}

# Settings that would silently have no effect here.
_NO_DDP = "gradients are summed once for each update, without DistributedDataParallel"
_NO_CHECKPOINTS = "--push-to-hub uploads the finished run alone, to the main branch"
_NO_EFFECT = {
    "label_smoothing_factor": "it smooths cross-entropy; --loss robust has --label-smoothing",
    "ddp_find_unused_parameters": _NO_DDP,
    "ddp_broadcast_buffers": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
    "hub_strategy": _NO_CHECKPOINTS,
    "hub_always_push": _NO_CHECKPOINTS,
    "hub_revision": _NO_CHECKPOINTS,
    "hub_private_repo": "the default of the repository's owner holds; create a private one with hf repos create NAME --private",
}

# More updates than any run makes.
_NEVER = 2**31

# Optimizers that step inside the backward pass; an update here has many backward passes.
_STEPS_INSIDE = ("lomo", "adalomo", "_layerwise")


class Arguments(transformers.TrainingArguments):
    """The Trainer's settings, restricted to one GPU per process and displayed without secrets."""

    @property
    def n_gpu(self) -> int:
        # With several GPUs the Trainer would wrap the model in `nn.DataParallel`, and never prepare it for autocast.
        return min(self.gpus_here, 1)

    @property
    def gpus_here(self) -> int:
        """Number of GPUs the Trainer would train on without a launcher: all that this process sees."""
        return int(super().n_gpu)

    def to_dict(self) -> dict[str, object]:
        # Loggers receive this; the original hides only some secrets from some loggers.
        shown_settings: dict[str, object] = without_secrets(super().to_dict())
        return shown_settings

    def __getstate__(self) -> dict[str, object]:
        state = {
            name: None if is_secret_name(name) and isinstance(one, str) else one for name, one in vars(self).items()
        }
        return {name: without_secrets(one) if isinstance(one, dict) else one for name, one in state.items()}


def training_arguments(
    config: TrainConfig, out: Path, precision: Precision, *, held_out: bool, name: str | None = None
) -> Arguments:
    """Build `TrainingArguments` from our options and the YAML's `training:` table.

    Args:
        name: name of the run in external loggers; None leaves the choice to them.

    Raises:
        ConfigError: an unknown key in that table, or a key that one of our options sets.
    """
    _check_deepspeed()
    world = world_size()
    settings = {**_settings(config, out, precision, held_out=held_out, world=world), "run_name": name, **_table(config)}
    try:
        args = Arguments(**settings)
    except (ValueError, TypeError, OverflowError, ImportError, torch.distributed.DistError) as error:
        if world > 1 and not torch.distributed.is_initialized():
            raise ConfigError(unreachable(error)) from error
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error
    if args.world_size != world:
        raise ConfigError(
            f"The launcher started {world} processes, but accelerate connects {args.world_size} on {args.device}: each would train "
            f"by itself. {START_OR_UNSET}"
        )
    if args.use_liger_kernel:
        args.liger_kernel_config = liger_settings(args.liger_kernel_config, args.device)
    _check_optimizer(args)
    _check_reporters(args, config)
    return args


def _check_deepspeed() -> None:
    if "DeepSpeed" in sharding_asked_for() and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "The environment has ACCELERATE_USE_DEEPSPEED=true (accelerate launch sets it), but deepspeed is not installed. "
            "Run pip install deepspeed, use FSDP2, or unset the variable."
        )


def _settings(config: TrainConfig, out: Path, precision: Precision, *, held_out: bool, world: int) -> dict[str, object]:
    """Return the settings that our own options determine."""
    return {
        "output_dir": str(out),
        # The number of rows of a rank; micro-batches are formed inside `training_step`.
        "per_device_train_batch_size": math.ceil(config.batch_size / world),
        "gradient_accumulation_steps": 1,
        "learning_rate": config.peak_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "lr_scheduler_type": _scheduler(config),
        "warmup_steps": config.warmup if config.warmup < 1 else int(config.warmup),
        "weight_decay": config.weight_decay,
        "max_grad_norm": 1.0,
        "seed": config.seed,
        # Otherwise accelerate would convert trained weights to float32 before it shards them; see `shard_in_types`.
        "bf16": precision.dtype == torch.bfloat16 and not (keeps_narrow_weights(config) and sharding_asked_for()),
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # costs a device sync in every step; a non-finite loss stops the run
        "report_to": [one.strip() for one in config.report_to.split(",") if one.strip()],
        # Early stopping ends with the best checkpoint, so one must exist.
        "save_strategy": "steps" if config.save_steps or config.early_stopping else "no",
        "save_steps": config.save_steps or _NEVER,
        "save_total_limit": 2,  # each holds optimizer state: twice the size of the model
        # By default once per epoch, triggered by `training_run`: the Trainer itself would save before it evaluates.
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": config.eval_steps or _NEVER,
        "metric_for_best_model": config.metric.replace("/", "_", 1) if held_out else None,
        "greater_is_better": config.metric != "eval/loss",
        "restore_callback_states_from_checkpoint": True,  # early stopping's patience, BCO's running mean
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "average_tokens_across_devices": False,
    }


def _check_optimizer(args: Arguments) -> None:
    """Refuse an optimizer that cannot be used, before the model is loaded."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer.endswith(_STEPS_INSIDE):
        raise ConfigError(
            f"training: optim: {optimizer} updates weights inside the backward pass, but one batch here needs many of "
            "them. Choose another optimizer, adamw_bnb_8bit to save memory."
        )
    try:
        # Fails if the optimizer's package is missing or rejects a setting.
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        if kind.__module__.startswith("torch.optim"):
            kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"training: optim: {optimizer}: {in_one_line(error)}") from error


def _check_reporters(args: Arguments, config: TrainConfig) -> None:
    """Refuse a logger whose package is missing, before the model is loaded."""
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"--report-to {config.report_to}: {str(error).splitlines()[0]}") from error


def _table(config: TrainConfig) -> dict[str, object]:
    known = list(transformers.TrainingArguments.__dataclass_fields__)
    for name in config.training:
        if name in _OURS:
            raise ConfigError(f"training: {name} is set by {_OURS[name]}; remove it from the table.")
        if name not in known:
            raise ConfigError(f"training: unknown key {shown(name)!r}.{nearest(shown(name), known)}")
        if config.training[name] and name in _NO_EFFECT:
            raise ConfigError(f"training: {name} has no effect: {_NO_EFFECT[name]}. Remove it from the table.")
    check_table(config.training, "training:")
    _check_kinds(config.training)
    _check_words(config)
    Compiling.of(config.training)  # layers are compiled by `compile_layers`; the Trainer would wrap the model
    return {name: value for name, value in config.training.items() if name not in (TORCH_COMPILE, BACKEND, MODE)}


def _check_words(config: TrainConfig) -> None:
    """Check the optimizer's name, and that TF32 is asked for where a GPU computes."""
    known, optimizer = [one.value for one in OptimizerNames], config.training.get("optim")
    if isinstance(optimizer, str) and optimizer not in known:
        near = nearest(optimizer, known)
        raise ConfigError(f"training: optim: transformers has no optimizer {shown(optimizer)!r}.{near}")
    if config.training.get("tf32") and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError(
            "training: tf32: only NVIDIA GPUs compute in TF32, and this run is on a CPU. Remove it from the table."
        )


def _check_kinds(table: dict[str, object]) -> None:
    """Check the types in the table: the Trainer would read the text 'no' as true."""
    kinds = value_types(transformers.TrainingArguments)
    for name, value in table.items():
        wanted = set(kinds[name])
        if value is None or not isinstance(value, bool | int | float | str):
            continue
        if wanted == {bool} and not isinstance(value, bool):
            raise ConfigError(f"training: {name} must be true or false, got {shown(value)!r}.")
        if wanted <= {int, float} and (isinstance(value, bool | str) or (float not in wanted and value % 1)):
            what = "a number" if float in wanted else "a whole number"
            raise ConfigError(f"training: {name} must be {what}, got {shown(value)!r}.")


@contextlib.contextmanager
def accepted_by_trainer(config: TrainConfig) -> Iterator[None]:
    """Convert the Trainer's errors about incompatible settings into one message.

    Raises:
        ConfigError: for instance an evaluation without held-out rows, or a hub that cannot be reached.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        if not config.training:
            raise
        raise ConfigError(f"training: {in_one_line(error)}") from error


def _scheduler(config: TrainConfig) -> str:
    if config.scheduler == "constant" and config.warmup:
        return "constant_with_warmup"
    return config.scheduler
