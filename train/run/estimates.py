"""Estimate what a run will take: updates, disk, and time where a run like it was measured."""

import math
import os
import shutil
from pathlib import Path

import torch

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.errors import KTOError
from offline_kto.kto_core.launch import world_size
from offline_kto.kto_core.models.memory_check import gigabytes
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.options import as_plain, with_absolute_paths
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.recipe import saved_type
from offline_kto.train.report.words import duration
from offline_kto.train.run_files import CONFIG, RUN_RECORD, folder_above, read_run_record

# Options that decide how long an update takes, its share of the evaluations included.
_OF_SPEED = (
    *("model", "loss", "batch_size", "max_tokens", "max_length", "attention", "memory", "gradient_checkpointing"),
    *("lora_rank", "lora_targets", "reduce_dtype", "eval_fraction", "eval_cache", "eval_steps", "training"),
)
_MOST_RUNS = 50

# Bytes a weight of a checkpoint of float32 weights: the weights, and AdamW's two moments.
_CHECKPOINT = 12


def computed_on(device: torch.device) -> str:
    """Return a description of the devices of this launch, equal for launches that take equally long."""
    one = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{world_size()} x {one}"


def time_in_words(
    config: TrainConfig, out: Path, manifest: Manifest, precision: Precision, device: torch.device, updates: int
) -> str:
    """Return how long the updates will take, by the newest run beside `out` that trained in the same way."""
    for folder in _runs_beside(out):
        seconds = _seconds_per_update(folder, config, manifest, precision, device)
        if seconds is not None:
            return f"about {duration(seconds * updates)}, at {seconds:.3g} s an update as in {folder}"
    return "unknown: no run like this one was measured here; the line of the first updates shows the time left"


def _runs_beside(out: Path) -> list[Path]:
    parent = out.absolute().parent
    if not parent.is_dir():
        return []
    found = [path.parent for path in parent.glob(f"*/{RUN_RECORD}") if path.parent != out.absolute()]
    return sorted(found, key=lambda folder: (folder / RUN_RECORD).stat().st_mtime, reverse=True)[:_MOST_RUNS]


def _seconds_per_update(
    folder: Path, config: TrainConfig, manifest: Manifest, precision: Precision, device: torch.device
) -> float | None:
    """Return the measured seconds of an update if a run trained in the same way on the same devices."""
    try:
        record, options = read_run_record(folder), read_yaml(folder / CONFIG, foreign=True)
    except KTOError:
        return None
    final = record.get("final")
    if not isinstance(final, dict) or final.get("computed_on") != computed_on(device):
        return None
    now = with_absolute_paths(TrainConfig, as_plain(config))
    same = (record.get("fingerprint"), record.get("precision")) == (manifest.fingerprint, precision.name)
    if not same or any((options.get(name) or None) != (now[name] or None) for name in _OF_SPEED):
        return None
    seconds = final.get("seconds_per_update")
    return float(seconds) if isinstance(seconds, int | float) and 0 < seconds < math.inf else None


def disk_in_words(config: TrainConfig, files: PolicyFiles, out: Path, updates: int, *, evaluates: bool) -> str:
    """Return the bytes that the run folder will take, and those that are free."""
    free = f"{gigabytes(shutil.disk_usage(folder_above(out)).free)} free"
    if config.lora_rank and files.adapter is None:
        return f"the adapters and their checkpoints; {free}"
    kind = saved_type(config) or torch.float32
    model = f"{gigabytes(files.sizes.parameters * torch.finfo(kind).bits // 8)} for the model"
    if config.lora_rank or config.memory != "full" or not config.save_steps:
        return f"{model}; {free}"
    written = min(updates // config.save_steps, 2) + evaluates  # the last two, and the best
    each = gigabytes(_CHECKPOINT * files.sizes.parameters)
    checkpoints = f", {each} for each of at most {written} checkpoints" if written else ""
    return f"{model}{checkpoints}; {free}"
