"""Count the bytes that training needs on one device, before the model is loaded.

The counts are lower bounds: activations, workspaces and kernels come on top.
"""

import math

import torch

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.models.memory_need import Sizes, Way, check_fits, free_bytes
from offline_kto.kto_core.models.precision import Precision
from offline_kto.train.config import TrainConfig

_WEIGHT = _GRADIENT = 4  # float32

# Moments of the optimizers that `training: optim:` may name; of others nothing is certain.
_MOMENTS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 0}

# The share of a GPU that sharded weights, gradients and moments may take when a number of GPUs is recommended.
_OF_EACH_GPU = 0.8


def check_training_fits(
    name: str, sizes: Sizes, config: TrainConfig, precision: Precision, device: torch.device
) -> None:
    """Refuse a run whose weights, gradients and optimizer do not fit on its GPU.

    Args:
        name: of the model, for messages.

    Raises:
        TrainingError: they do not fit.
    """
    need = training_bytes(sizes, config, precision)
    if config.lora_rank:
        what = f"--lora-rank {config.lora_rank}"
    else:
        what = f"full fine-tuning in {precision.name} ({need / sizes.parameters:.3g} bytes a parameter)"
    instead = _instead(sizes, config, precision, need, device)
    check_fits(name, device, need, what=what, instead=instead, error=TrainingError)


def training_bytes(sizes: Sizes, config: TrainConfig, precision: Precision) -> int:
    """Return the bytes of weights, gradients and optimizer states, which exist at the same time."""
    if config.lora_rank:
        return sizes.frozen(precision.dtype)  # adapters, with their gradients and moments, are small beside it
    return full_bytes(sizes, precision, optimizer=str(config.training.get("optim", "adamw_torch")))


def full_bytes(sizes: Sizes, precision: Precision, *, optimizer: str) -> int:
    """Return the bytes of full fine-tuning: 16 for each parameter, and autocast's 16-bit copies of the matrices."""
    each = _WEIGHT + _GRADIENT + _MOMENTS.get(optimizer, 0)
    return each * sizes.parameters + (0 if precision.is_full else 2 * sizes.matrices)


def _instead(sizes: Sizes, config: TrainConfig, precision: Precision, need: int, device: torch.device) -> list[Way]:
    """Return ways to train that need less memory on one GPU, the nearest to full fine-tuning first."""
    ways = []
    if not config.lora_rank:
        # Recipes that train all weights in fewer bytes belong here.
        ways.append(Way("--lora-rank 16", sizes.frozen(precision.dtype)))
    if not sizes.packed:
        ways.append(Way("--lora-rank 16 on a version of the model quantised to 4 bits", sizes.four_bits()))
    room = _OF_EACH_GPU * (free_bytes(device) or 0)
    if room and not sizes.packed:
        gpus = math.ceil(need / room)
        words = (
            f"{gpus} such GPUs that share the weights (accelerate launch --config_file configs/accelerate_fsdp2.yaml)"
        )
        ways.append(Way(words, math.ceil(need / gpus)))
    return ways
