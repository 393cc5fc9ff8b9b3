"""Warn, in the plan of a run, of devices that would wait or be idle, and of what the saved files will not contain."""

import torch

from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.loss_traits import LOSS_TRAITS
from offline_kto.train.run.arguments import Arguments

# Tokens of one rank and update below which launching kernels and summing gradients take about as long as computing.
_FEW_TOKENS = 4096


def rank_warnings(config: TrainConfig, data: TrainingData, *, ranks: int, device: torch.device) -> list[str]:
    """Return a line if the ranks get so few tokens that an update takes as long on one GPU."""
    lengths = data.rows.lengths["lengths"]
    completions = [*lengths["desirable"], *lengths["undesirable"]]
    row = (sum(lengths["prompt"]) + sum(completions)) / max(1, len(completions))
    tokens = row * config.batch_size * (1 + LOSS_TRAITS[config.loss].needs_mismatched) / ranks
    if device.type != "cuda" or ranks == 1 or tokens >= _FEW_TOKENS:
        return []
    return [
        f"each of the {ranks} processes has about {tokens:,.0f} tokens in an update: a GPU then waits for the host and for the "
        "sum of the gradients most of the time. Use fewer processes, or a larger --batch-size."
    ]


def idle_gpu_warnings(args: Arguments) -> list[str]:
    """Return a line if one process sees several GPUs, of which it uses one."""
    if args.gpus_here <= 1:
        return []
    return [
        f"{args.gpus_here} GPUs here, but one process trains on one of them: torchrun --nproc_per_node {args.gpus_here} "
        "--no-python kto-train ... uses all"
    ]


def saving_warnings(config: TrainConfig, *, merges: bool, held_out: bool) -> list[str]:
    """Return a line for each part that the saved files will not contain.

    Args:
        merges: whether the run ends by merging its adapters, and rounds the merged weights.
        held_out: whether there are held-out rows.
    """
    lines = []
    if config.training.get("save_only_model") and config.save_steps:
        lines.append("training: save_only_model: checkpoints contain no optimizer state, and --resume cannot use them.")
    if config.keep == "best" and not held_out:
        lines.append(
            "--keep best has no effect: no rows are held out, so the run ends with its last model. Hold some out with --eval-fraction 0.1."
        )
    if held_out and config.keeps_best and not (config.save_steps or config.early_stopping) and sharding_asked_for():
        lines.append(
            "--keep best needs checkpoints where weights are sharded, and --save-steps 0 writes none: the last model is kept."
        )
    if config.save_dtype in ("bfloat16", "float16"):
        share, kind = ("0.2", "bfloat16") if config.save_dtype == "bfloat16" else ("0.02", "float16")
        evaluated = "before they are rounded" if merges else "as they are saved"
        lines.append(
            f"--save-dtype {kind}: a weight that training moves by less than {share} % of itself keeps its old value; "
            f"held-out rows are evaluated with the weights {evaluated}."
        )
    return lines
