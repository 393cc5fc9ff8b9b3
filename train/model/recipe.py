"""Choose in which types a run keeps its weights, from `--memory` and `--dtype`."""

import torch

from offline_kto.kto_core.models.precision import Precision, resolve_precision
from offline_kto.kto_core.options import AUTO
from offline_kto.train.config import TrainConfig


def run_precision(config: TrainConfig, device: torch.device) -> Precision:
    """Return the precision of a run's forward passes; 16-bit weights compute in bfloat16 on every device."""
    name = "bfloat16" if config.dtype == AUTO and keeps_narrow_weights(config) else config.dtype
    return resolve_precision(name, device)


def keeps_narrow_weights(config: TrainConfig) -> bool:
    """Return whether trained weights are kept in 16 bits on the device."""
    return config.memory != "full"


def saved_type(config: TrainConfig) -> torch.dtype | None:
    """Return the type of the saved weights; None for the type they were trained in, where that is one type."""
    name = config.save_dtype
    if name == AUTO and keeps_narrow_weights(config):
        name = "bfloat16"
    return None if name in (AUTO, "float32") and not keeps_narrow_weights(config) else getattr(torch, name)
