"""Count the bytes that a run's weights, gradients and optimizer states take, before the model is loaded.

The counts are lower bounds: activations, workspaces and kernels come on top.
"""

import math

import torch

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.models.memory_check import Sizes, Way, check_fits, free_bytes
from offline_kto.kto_core.models.precision import Precision
from offline_kto.train.config import TrainConfig

_WEIGHT = _GRADIENT = 4  # float32

# Moments of the optimizers that `training: optim:` may name; of others nothing is certain.
_MOMENTS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 0}

# Bytes of each parameter by `--memory`: 16-bit weights and gradients, and 8-bit moments unless they are on the host.
_NARROW = {"lean": 6, "host": 4}

# Bytes of each parameter that `--memory host` keeps in host memory: a float32 weight and its two moments.
_ON_HOST = 12

# The share of a GPU that sharded weights, gradients and moments may take when a number of GPUs is recommended.
_OF_EACH_GPU = 0.8

_HOST = torch.device("cpu")


def check_training_fits(
    name: str, sizes: Sizes, config: TrainConfig, precision: Precision, device: torch.device, *, gpus: int = 1
) -> None:
    """Refuse a run whose weights, gradients and optimizer do not fit on its GPU; log a warning if the host is too small.

    Args:
        name: of the model, for messages.
        gpus: number of GPUs that share the weights.

    Raises:
        TrainingError: they do not fit.
    """
    need, on_host = training_bytes(sizes, config, precision, gpus=gpus), host_bytes(sizes, config)
    if device == _HOST:
        need, on_host = need + on_host, 0
    each = f"{need / max(1, sizes.parameters):.3g} bytes a parameter"
    sharing = f" on each of {gpus} GPUs" if gpus > 1 else ""
    full = f"full fine-tuning in {precision.name} ({each}{sharing})"
    what = f"--lora-rank {config.lora_rank}{sharing}" if config.lora_rank else full
    instead = _instead(sizes, config, precision, device, gpus=gpus)
    check_fits(name, device, need, what=what, instead=instead, error=TrainingError)
    check_fits(name, _HOST, on_host, what=f"--memory {config.memory}: the optimizer on the host", instead=[])


def training_bytes(sizes: Sizes, config: TrainConfig, precision: Precision, *, gpus: int = 1) -> int:
    """Return the bytes on one device of weights, gradients and optimizer states, which exist at the same time.

    Args:
        gpus: number of GPUs that share them.
    """
    if config.lora_rank:
        whole = sizes.frozen(precision.dtype)  # adapters, with their gradients and moments, are small beside it
    elif config.memory in _NARROW:
        whole = _NARROW[config.memory] * sizes.parameters
    else:
        each = _WEIGHT + _GRADIENT + _MOMENTS.get(str(config.training.get("optim", "adamw_torch")), 0)
        # Autocast keeps 16-bit copies of the matrices until the end of a backward pass; FSDP has those of one layer.
        copies = 0 if precision.is_full or gpus > 1 else 2 * sizes.matrices
        whole = each * sizes.parameters + copies
    return math.ceil(whole / gpus)


def host_bytes(sizes: Sizes, config: TrainConfig) -> int:
    """Return the bytes of host memory that the optimizer takes."""
    return _ON_HOST * sizes.parameters if config.memory == "host" else 0


def _instead(sizes: Sizes, config: TrainConfig, precision: Precision, device: torch.device, *, gpus: int) -> list[Way]:
    """Return ways to train that need less memory on one GPU, the nearest to full fine-tuning first."""
    ways = []
    if not config.lora_rank:
        if config.memory == "full" and not precision.is_full:
            ways.append(Way("--memory lean", math.ceil(_NARROW["lean"] * sizes.parameters / gpus)))
            if gpus == 1 and _ON_HOST * sizes.parameters <= (free_bytes(_HOST) or math.inf):
                ways.append(Way("--memory host", _NARROW["host"] * sizes.parameters))
        ways.append(Way("--lora-rank 16", math.ceil(sizes.frozen(precision.dtype) / gpus)))
    if not sizes.packed:
        ways.append(Way("--lora-rank 16 on a version of the model quantised to 4 bits", sizes.four_bits()))
    room = _OF_EACH_GPU * (free_bytes(device) or 0)
    if room and not sizes.packed:
        need = gpus * training_bytes(sizes, config, precision, gpus=gpus)
        more = math.ceil(need / room)
        words = (
            f"{more} such GPUs that share the weights (accelerate launch --config_file configs/accelerate_fsdp2.yaml)"
        )
        ways.append(Way(words, math.ceil(need / more)))
    return ways
