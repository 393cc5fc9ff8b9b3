"""Choose the optimizer that `--memory` needs."""

from typing import Any

import transformers

from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.train.config import TrainConfig
from offline_kto.train.trainer.lean_adam import LeanAdamW


def own_optimizer(
    config: TrainConfig, args: transformers.TrainingArguments
) -> tuple[type[LeanAdamW], dict[str, Any]] | None:
    """Return the class of the run's optimizer and its options; None for the Trainer's choice."""
    if config.memory == "full":
        return None
    rank = args.process_index if sharding_asked_for() else 0  # replicas of a weight must be rounded alike
    return LeanAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "seed": config.seed,
        "rank": rank,
    }
