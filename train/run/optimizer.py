"""Choose the optimizer that `--memory` needs, and refuse what it cannot be combined with."""

from typing import Any

import transformers

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.train.config import TrainConfig
from offline_kto.train.trainer.host_adam import HostAdamW
from offline_kto.train.trainer.lean_adam import LeanAdamW
from offline_kto.train.trainer.narrow_optimizer import NarrowOptimizer


def check_sharding(config: TrainConfig, args: transformers.TrainingArguments) -> None:
    """Refuse a `--memory` that the launch's sharding cannot honour, before anything is loaded.

    Raises:
        ConfigError: DeepSpeed with any, or FSDP2 with an optimizer on the host.
    """
    if config.memory == "full":
        return
    if args.deepspeed_plugin is not None:
        raise ConfigError(
            f"--memory {config.memory} does not work with DeepSpeed, which keeps weights and moments its own way. Use FSDP2 "
            "(configs/accelerate_fsdp2.yaml) and --memory lean, or --memory full --dtype float32."
        )
    if config.memory == "host" and sharding_asked_for():
        raise ConfigError(
            "--memory host is for weights that one GPU holds whole. With FSDP2 use --memory lean, or let FSDP move its "
            "shards to the host (fsdp_offload_params: true)."
        )


def own_optimizer(
    config: TrainConfig, args: transformers.TrainingArguments
) -> tuple[type[NarrowOptimizer], dict[str, Any]] | None:
    """Return the class of the run's optimizer and its options; None for the Trainer's choice."""
    if config.memory == "full":
        return None
    options: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if config.memory == "host":
        return HostAdamW, options
    rank = args.process_index if sharding_asked_for() else 0  # replicas of a weight must be rounded alike
    return LeanAdamW, {**options, "seed": config.seed, "rank": rank}
