"""Choose the optimizer that `--memory` needs."""

from typing import Any

import transformers

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.train.config import TrainConfig
from offline_kto.train.trainer.host_adam import HostAdamW
from offline_kto.train.trainer.lean_adam import LeanAdamW
from offline_kto.train.trainer.narrow_optimizer import NarrowOptimizer


def own_optimizer(
    config: TrainConfig, args: transformers.TrainingArguments
) -> tuple[type[NarrowOptimizer], dict[str, Any]] | None:
    """Return the class of the run's optimizer and its options; None for the Trainer's choice.

    Raises:
        ConfigError: it cannot be used with sharded weights.
    """
    if config.memory == "full":
        return None
    options: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if config.memory == "host":
        if sharding_asked_for():
            raise ConfigError(
                "--memory host is for weights that one GPU holds whole. With FSDP2 use --memory lean, or let FSDP move its "
                "shards to the host (fsdp_offload_params: true)."
            )
        return HostAdamW, options
    rank = args.process_index if sharding_asked_for() else 0  # replicas of a weight must be rounded alike
    return LeanAdamW, {**options, "seed": config.seed, "rank": rank}
