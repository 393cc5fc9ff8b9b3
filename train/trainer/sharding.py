"""Check accelerate's settings for sharded weights (FSDP2, DeepSpeed), and gather the model for saving."""

import accelerate
import torch

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.kto_core.library_types import Model


def prepare_sharding(
    accelerator: accelerate.Accelerator,
    dtype: torch.dtype,
    *,
    merges: bool,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Check accelerate's settings before the model is sharded, and set those that the run needs.

    Args:
        accelerator: accelerate's, of the Trainer.
        dtype: the type that passes compute in.
        merges: whether the run ends by merging adapters into the weights.
        reduce_dtype: the type that gradients are summed in.

    Raises:
        TrainingError: the settings cannot train or save this run.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    shards = [way for way, plugin in {"FSDP": fsdp, "DeepSpeed": deepspeed}.items() if plugin is not None]
    for way in sharding_asked_for():
        if way not in shards:
            raise TrainingError(
                f"accelerate's settings ask for {way}, but on this device the run would not be sharded: every rank would hold "
                "all weights. Use GPUs, or launch without these settings."
            )
    if (fsdp is not None or deepspeed is not None) and merges:
        raise TrainingError(
            "LoRA on a reference that carries an adapter is saved merged, but sharded weights cannot be merged: use DDP or one device."
        )
    if fsdp is not None:
        if fsdp.fsdp_version != 2:
            raise TrainingError("FSDP 1 is not supported: set fsdp_version: 2, as in configs/accelerate_fsdp2.yaml.")
        from offline_kto.train.trainer.sharded_types import Types, shard_in_types

        shard_in_types(accelerator, Types(dtype, reduce_dtype))
    if deepspeed is not None and dtype != torch.float32:
        raise TrainingError(
            "DeepSpeed in 16 bits would save the weights in 16 bits, in which KTO's small updates vanish: pass --dtype float32, "
            "or use configs/accelerate_fsdp2.yaml, which keeps float32 weights."
        )
    if deepspeed is not None and deepspeed.zero_stage == 3:
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if not deepspeed.hf_ds_config.is_true(gathers):
            raise TrainingError(
                "ZeRO-3 would not save a model: set zero3_save_16bit_model: true, as in configs/accelerate_zero3.yaml."
            )


def gather_when_saving(accelerator: accelerate.Accelerator) -> None:
    """Make the next save gather the whole model; with SHARDED_STATE_DICT the Trainer would save none."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")


def tie_again(state_dict: dict[str, torch.Tensor], model: Model) -> dict[str, torch.Tensor]:
    """Restore tied weights after gathering, which gives every name its own tensor, so that they are saved once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    same = {name: state_dict[source] for name, source in tied.items() if name in state_dict and source in state_dict}
    return {**state_dict, **same}


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a weight; the whole weight if it is not sharded."""
    part: torch.Tensor = getattr(weight, "ds_tensor", weight)  # ZeRO-3
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2


def like_weight(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of an optimizer's state as a tensor that is sharded like its weight.

    Args:
        part: sized like this rank's part of the weight, in all but the last dimension.
    """
    if not hasattr(weight, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    shape = torch.Size((*weight.shape[:-1], part.shape[-1])) if part.ndim > 1 else weight.shape
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=strides)
