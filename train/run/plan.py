"""Print the plan of a run."""

from pathlib import Path

import numpy as np
import torch

from offline_kto.kto_core.console import tell, warn
from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.launch import gpus_sharing_weights, world_size
from offline_kto.kto_core.models.memory_check import gigabytes
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.options import AUTO
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.held_out import HeldOutRows
from offline_kto.train.data.row_words import rows_in_words, scored_in_words
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.diagnostics.settings import in_digits
from offline_kto.train.loss_traits import LOSS_TRAITS
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.training_memory import host_bytes, training_bytes
from offline_kto.train.run.estimates import disk_in_words, time_in_words
from offline_kto.train.samples_file import MOST_NEW_TOKENS
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.tensor_float import tf32_suffices


def print_data(config: TrainConfig, data: TrainingData) -> None:
    """Print what the run trains on; nothing of the policy is needed for it."""
    fingerprint = data.rows.manifest.fingerprint[:12]
    tell(f"cache       {config.cache} (fingerprint {fingerprint}, verified in {data.rows.seconds:.1f} s)")
    tell(f"scored      {scored_in_words(data.rows.manifest)}")
    tell(f"rows        {rows_in_words(data.run_data())}")


def print_plan(
    config: TrainConfig,
    data: TrainingData,
    files: PolicyFiles,
    precision: Precision,
    objective: Objective,
    out: Path,
    device: torch.device,
    warnings: list[str],
    *,
    estimates: bool,
) -> None:
    """Print how the policy is trained, what that will take, and what the user is warned of.

    Args:
        estimates: whether to estimate time and disk; a sweep does that for all its trials.
    """
    desirable, undesirable = data.class_counts
    kind = f"LoRA rank {config.lora_rank}" if config.lora_rank else "all weights"
    steps = config.updates(data.units.size)
    weights = objective.weights
    tell(
        f"labels      {desirable:,} desirable (weight {weights[0]:.4g}), {undesirable:,} undesirable (weight {weights[1]:.4g})"
    )
    for line in _judgement_lines(config, data):
        tell(line)
    adapter = f" with adapter {files.adapter} {files.how_adapted}" if files.adapter else ""
    tell(f"policy      {files.name}{adapter} ({kind}, {precision.name} on {device})")
    for line in _memory_lines(config, files, precision):
        tell(line)
    tell(f"attention   {files.attention.in_words}")
    if tf32_suffices(config, precision, device, data.rows.manifest):
        tell(
            "products    TF32: finer than bfloat16, in which the cache was scored (training: {tf32: false} for float32)"
        )
    if world_size() > 1:
        tell(f"gradients   added over {world_size()} processes in {config.reduce_dtype}")
    elif config.reduce_dtype != "float32":
        warnings = [
            *warnings,
            f"--reduce-dtype {config.reduce_dtype} has no effect: one process adds no gradients over GPUs",
        ]
    of = f"{steps:,} of {counted(config.batch_size, 'row')}"
    tell(f"updates     {of}, {_loss_in_words(config)}beta {config.beta:g}, {_rate_in_words(config)}")
    if objective.traits.ignores_reference:
        tell(f"reference   not used by {config.loss}; rewards and accuracy still measure the change from it")
    count = config.prompts_to_sample(in_sweep=not estimates)
    if count and data.held_out is not None:
        tell(f"samples     {_samples_in_words(config, data.held_out, count)}")
    if estimates:
        tell(f"time        {time_in_words(config, out, data.rows.manifest, precision, device, steps)}")
        tell(f"disk        {disk_in_words(config, files, out, steps, evaluates=data.held_out is not None)}")
    tell(f"run         {out}")
    for line in (*files.warnings, *warnings):
        warn(line)


def _samples_in_words(config: TrainConfig, held_out: HeldOutRows, count: int) -> str:
    """Return how many prompts are completed, and when."""
    prompts = len(np.unique(held_out.cache.prompt_ids.codes[held_out.indices]))
    when = ", and at its evaluations" if config.samples_at == "evaluations" else ""
    return (
        f"{min(count, prompts)} of {counted(prompts, 'held-out prompt')}, at most {MOST_NEW_TOKENS} new tokens each, before and after "
        f"training{when} (--samples 0 for none)"
    )


def _rate_in_words(config: TrainConfig) -> str:
    """Return the learning rate, and why it is that one where nobody chose it."""
    why = f" (auto for {'LoRA' if config.lora_rank else 'all weights'})" if config.learning_rate == AUTO else ""
    return f"learning rate {config.peak_rate:g}{why}"


def _loss_in_words(config: TrainConfig) -> str:
    """Return the loss with the options that only it has, and the likelihood that is added to it."""
    loss = "" if config.loss == "kto" else f"loss {config.loss}, "
    for name in LOSS_TRAITS[config.loss].options:
        loss += f"{name.replace('_', ' ')} {getattr(config, name):g}, "
    return loss + (f"sft weight {config.sft_weight:g}, " if config.sft_weight else "")


def _judgement_lines(config: TrainConfig, data: TrainingData) -> list[str]:
    """Return how rows are judged, where they are more than one bit."""
    if data.rows.masses is None:
        return []
    desirable, undesirable = data.class_masses
    judgements = data.rows.manifest.judgements
    scale = judgements.get("rating_scale")
    kinds = [
        f"votes by {judgements['votes']}" if "votes" in judgements else "",
        f"ratings from {scale[0]:g} to {scale[1]:g}" if scale else "",
        "row weights" if judgements.get("weights") else "",
    ]
    words = ", ".join(filter(None, kinds))
    lines = [
        f"judgements  mass {in_digits(desirable)} desirable, {in_digits(undesirable)} undesirable"
        + (f" ({words})" if words else "")
    ]
    names = data.rows.manifest.objectives
    if names:
        weights = config.objective_weights or dict.fromkeys(names, 1.0)
        chosen = ", ".join(f"{printable(name)} {weights[name]:g}" for name in names if name in weights)
        how = "" if config.objective_weights else " (--objective chooses weights)"
        lines.append(f"objectives  {chosen}{how}")
    return lines


def _memory_lines(config: TrainConfig, files: PolicyFiles, precision: Precision) -> list[str]:
    """Return what training keeps of each weight, where that is known."""
    gpus, weights = gpus_sharing_weights(), files.sizes.parameters
    if gpus is None or not weights:
        return []
    needed = training_bytes(files.sizes, config, precision, gpus=gpus)
    how = f"--lora-rank {config.lora_rank}" if config.lora_rank else f"--memory {config.memory}"
    what = "the frozen weights" if config.lora_rank else "weights, gradients and moments"
    each = f"{needed / weights:.3g} bytes a weight{f' on each of {gpus} GPUs' if gpus > 1 else ''}"
    on_host = host_bytes(files.sizes, config)
    beside = f", and {gigabytes(on_host)} of host memory" if on_host else ""
    return [f"memory      {how}: {gigabytes(needed)} for {what} ({each}){beside}; activations are added to it"]
