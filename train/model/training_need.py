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

# Bytes of each parameter by `--memory`: 16-bit weights and gradients, and 8-bit moments unless they are on the host.
_NARROW = {"lean": 6, "host": 4}

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


def check_sharded_training_fits(
    name: str, sizes: Sizes, config: TrainConfig, precision: Precision, device: torch.device, *, ranks: int
) -> None:
    """Refuse a run whose parts of weights, gradients and optimizer do not fit on this rank's GPU.

    Args:
        name: of the model, for messages.
        ranks: the number of processes that share them.

    Raises:
        TrainingError: they do not fit.
    """
    # Matrices are gathered in 16 bits, so that autocast keeps no copies of them.
    without_copies = precision if config.lora_rank else Precision(torch.float32)
    need = training_bytes(sizes, config, without_copies)
    ways = {"--memory lean": _NARROW["lean"] * sizes.parameters} if config.memory == "full" else {}
    ways["--lora-rank 16"] = sizes.frozen(precision.dtype)
    instead = [] if config.lora_rank else [Way(words, math.ceil(each / ranks)) for words, each in ways.items()]
    instead += _more_gpus(need, device, more_than=ranks)
    what = f"each of the {ranks} parts of weights, gradients and optimizer states"
    check_fits(name, device, math.ceil(need / ranks), what=what, instead=instead, error=TrainingError)


def training_bytes(sizes: Sizes, config: TrainConfig, precision: Precision) -> int:
    """Return the bytes of weights, gradients and optimizer states, which exist at the same time."""
    if config.lora_rank:
        return sizes.frozen(precision.dtype)  # adapters, with their gradients and moments, are small beside it
    if config.memory in _NARROW:
        return _NARROW[config.memory] * sizes.parameters
    return full_bytes(sizes, precision, optimizer=str(config.training.get("optim", "adamw_torch")))


def full_bytes(sizes: Sizes, precision: Precision, *, optimizer: str) -> int:
    """Return the bytes of full fine-tuning: 16 for each parameter, and autocast's 16-bit copies of the matrices."""
    each = _WEIGHT + _GRADIENT + _MOMENTS.get(optimizer, 0)
    return each * sizes.parameters + (0 if precision.is_full else 2 * sizes.matrices)


def _instead(sizes: Sizes, config: TrainConfig, precision: Precision, need: int, device: torch.device) -> list[Way]:
    """Return ways to train that need less memory on one GPU, the nearest to full fine-tuning first."""
    ways = []
    if not config.lora_rank:
        if config.memory == "full" and not precision.is_full:
            ways += [Way(f"--memory {name}", each * sizes.parameters) for name, each in _NARROW.items()]
        ways.append(Way("--lora-rank 16", sizes.frozen(precision.dtype)))
    if not sizes.packed:
        ways.append(Way("--lora-rank 16 on a version of the model quantised to 4 bits", sizes.four_bits()))
    return ways if sizes.packed else ways + _more_gpus(need, device)


def _more_gpus(need: int, device: torch.device, *, more_than: int = 1) -> list[Way]:
    """Return the number of such GPUs that can share these bytes."""
    room = _OF_EACH_GPU * (free_bytes(device) or 0)
    if not room:
        return []
    gpus = max(more_than + 1, math.ceil(need / room))
    words = f"{gpus} such GPUs that share the weights (accelerate launch --config_file configs/accelerate_fsdp2.yaml)"
    return [Way(words, math.ceil(need / gpus))]
