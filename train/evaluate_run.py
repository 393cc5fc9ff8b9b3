"""`kto-train --evaluate-only RUN`: a finished run's model on held-out rows, against the cached reference."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kto_core.errors import ConfigError
from kto_core.manifest import Manifest
from kto_core.models import resolve_device, resolve_precision
from train.advice import class_weight_values
from train.arguments import training_arguments
from train.config import TrainConfig
from train.data import HELD_OUT, TrainingData, rows_to_evaluate
from train.evaluation import HeldOutRows, summary, summary_lines, write_summary
from train.objective import Objective
from train.policy import PolicyFiles
from train.run_files import EVALUATION, METRICS, read_facts
from train.training_run import check_vocabulary, make_trainer


def evaluate_run(config: TrainConfig) -> Path:
    """Evaluate a finished run.

    Its held-out rows where `--cache` is the one it was trained with, else all rows of `--cache`.

    Args:
        config: the run's own, with the options of the command line.

    Returns:
        The file with the values.

    Raises:
        KTOError: no finished run, or a cache that its model cannot be measured on.
    """
    run = config.evaluate_only
    assert run is not None
    config = dataclasses.replace(config, report_to="none", early_stopping=None)
    facts, last = read_facts(run), _last_records(run)
    device = resolve_device(config.device)
    precision = resolve_precision(config.dtype, device)
    held_out, what = rows_to_evaluate(config, facts.get("fingerprint"))
    manifest = held_out.cache.manifest
    files, adapters = _find(config, run, manifest)
    objective = Objective.of(config, _weights(config, held_out, facts))
    args = training_arguments(config, run, precision, held_out=True)
    model = files.load(config, precision, args.device if device.type == "cuda" else torch.device("cpu"))
    if adapters is not None:
        from train.lora import load_adapters

        model = load_adapters(model, adapters)
    check_vocabulary(model, held_out.cache)
    units = np.asarray(held_out.indices).reshape(-1, objective.rows_in_unit)
    data = TrainingData(held_out.cache, units, held_out)
    trainer = make_trainer(config, args, data, model, files, objective, precision, callbacks=[])
    trainer.prepare_to_score()
    if objective.uses_shift:
        trainer.shift.begin_at(last.get("reward_shift", 0.0) / config.beta)
    main = trainer.is_world_process_zero()
    if main:
        print(f"cache       {config.cache} (fingerprint {manifest.fingerprint[:12]})")
        print(f"policy      {run} ({precision.name} on {device})")
        print(f"rows        {len(held_out.indices):,}: {what}", flush=True)
    scores = trainer.final_scores()
    assert scores is not None
    path = run / (EVALUATION if what == HELD_OUT else f"evaluation-{manifest.fingerprint[:12]}.json")
    if main:
        found = summary(scores, objective, int(last.get("step", 0)))
        print("\n".join(summary_lines(found)))
        write_summary(path, {**found, "fingerprint": manifest.fingerprint, "rows_are": what})
        print(f"wrote       {path}")
    return path


def _find(config: TrainConfig, run: Path, manifest: Manifest) -> tuple[PolicyFiles, Path | None]:
    """The run's model, or the model below its adapters and the adapters."""
    if (run / "adapter_config.json").exists():
        return PolicyFiles.find(config, manifest), run
    if not (run / "config.json").exists():
        raise ConfigError(f"--evaluate-only {run}: holds no model; the run is not finished. --resume goes on with it.")
    return PolicyFiles.find(dataclasses.replace(config, model=str(run)), manifest), None


def _weights(config: TrainConfig, held_out: HeldOutRows, facts: dict[str, Any]) -> tuple[float, float]:
    """The class weights the run was trained with; `auto` depends on its training rows."""
    known = facts.get("weights")
    if isinstance(known, list) and len(known) == 2:
        return float(known[0]), float(known[1])
    desirable = int(held_out.cache.labels[held_out.indices].sum())
    return class_weight_values(config, desirable, len(held_out.indices) - desirable)


def _last_records(run: Path) -> dict[str, Any]:
    """The last value of each metric."""
    last: dict[str, Any] = {}
    if (run / METRICS).exists():
        for line in (run / METRICS).read_text(encoding="utf-8").splitlines():
            last.update(json.loads(line))
    return last
