"""Evaluate a finished run on held-out rows against the cached reference: `kto-train --evaluate-only RUN`."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.console import tell, warn
from offline_kto.kto_core.durable_files import write_json, written_to
from offline_kto.kto_core.errors import ConfigError, TrainingError, WriteError
from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.kto_core.models.folders import find_reference
from offline_kto.kto_core.models.precision import resolve_device
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.row_words import scored_in_words, shortened_in_words
from offline_kto.train.data.training_data import RowsToEvaluate, TrainingData, rows_to_evaluate
from offline_kto.train.diagnostics.outcome import Tried
from offline_kto.train.diagnostics.settings import usual_rate
from offline_kto.train.diagnostics.training import Settings, Watch
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.recipe import run_precision
from offline_kto.train.run.arguments import training_arguments
from offline_kto.train.run.callbacks import read_metrics
from offline_kto.train.run.samples import HeldOutSamples
from offline_kto.train.run.start_check import check_start
from offline_kto.train.run.training_run import check_vocabulary, make_trainer
from offline_kto.train.run_files import (
    EVALUATION,
    METRICS,
    RUN_RECORD,
    UNTRAINED,
    check_is_run,
    holds_word,
    read_rewards,
    read_run_record,
    refuse_pipes,
)
from offline_kto.train.run_records import FinalUpdate, RunRecord
from offline_kto.train.trainer.evaluation import Scores, summary, summary_lines, verdict_lines
from offline_kto.train.trainer.held_out_changes import load_untrained
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.tensor_float import tf32_products, tf32_suffices


def evaluate_run(config: TrainConfig) -> Path:
    """Evaluate a finished run.

    If `--cache` is the run's own, its held-out rows are evaluated, else the rows of `--cache` it was not trained on.

    Args:
        config: the run's own, with the options of the command line.

    Returns:
        Path of the written file.

    Raises:
        KTOError: the run is not finished, or its model cannot be evaluated on the cache.
    """
    run = config.evaluate_only
    assert run is not None
    for way in sharding_asked_for():
        raise ConfigError(
            f"--evaluate-only: accelerate's settings ask for {way}, but models are evaluated without sharded weights. Start it "
            "without them; under torchrun the processes divide the rows."
        )
    stops_early = config.early_stopping is not None
    config = _without_training(config)
    check_is_run(run, "--evaluate-only")
    record = read_run_record(run)
    refuse_pipes(run, "--evaluate-only")
    found_final = record.get("final")
    final: FinalUpdate = found_final if isinstance(found_final, dict) else {}
    device = resolve_device(config.device)
    precision = run_precision(config, device)
    rows = rows_to_evaluate(config, record, _trained_prompts(run))
    held_out, manifest = rows.held_out, rows.held_out.cache.manifest
    files, adapters = _find(config, run, manifest, record)
    objective = Objective.of(config, _weights(run, record))
    args = training_arguments(config, run, precision, held_out=True)
    place = args.device if device.type == "cuda" else torch.device("cpu")
    model = files.load(config, precision, place, trains=False)
    if adapters is not None:
        from offline_kto.train.model.lora import load_adapters

        model = load_adapters(model, adapters)
    check_vocabulary(model, held_out.cache)
    units = np.asarray(held_out.indices).reshape(-1, objective.rows_in_unit)
    data = TrainingData(held_out.cache, units, held_out)
    trainer = make_trainer(config, args, data, model, files, objective, precision, callbacks=[])
    tf32 = tf32_suffices(config, precision, args.device, manifest)
    memory = partial(files.reporting_memory, config, precision, place)
    with memory("it was prepared to score"):
        trainer.prepare_to_score()
    if trainer.shift is not None:
        trainer.shift.begin_at(float(final.get("shift", 0.0)), 1)
    # The base model is read from its folder again. On quantised weights the adapters include the reference's adapter.
    if adapters is not None and manifest.reference.get("adapter") is None:
        from offline_kto.train.model.lora import without_adapters

        with without_adapters(trainer.model), tf32_products(tf32), memory("policy and cache were compared"):
            allow = config.allow_different_policy
            check_start(trainer.scores, held_out.cache, precision, policy=files.name, allow=allow)
    main = trainer.is_world_process_zero()
    if main:
        _tell_plan(config, run, rows, files, f"{precision.name} on {device}")
    with tf32_products(tf32), memory("held-out rows were scored"):
        scores = trainer.final_scores()
    assert scores is not None
    labels = str(manifest.data.get("labels_hash"))[:4]
    path = run / (EVALUATION if rows.of_run else f"evaluation-{manifest.fingerprint[:12]}-{labels}.json")
    if main:
        before: Scores | None = trainer.scores.untrained(held_out)
        if before is not None and config.allow_different_policy:
            before = load_untrained(run / UNTRAINED, before) if rows.of_run else None
        found = summary(
            scores, objective, int(final.get("step", 0)), before, _tried(config, run, record, stops_early=stops_early)
        )
        lines = summary_lines(found, rows="held out" if rows.of_run else "evaluated")
        for line in [*lines, *verdict_lines(found)]:
            tell(line)
        with written_to(run, WriteError, "Make room, and evaluate again; existing files are unchanged."):
            write_json(path, {**found, **manifest.rows_identity, "rows_are": rows.what})
    of_samples: list[str] = []
    count = config.prompts_to_sample() if rows.of_run else config.samples or 0
    if count:
        name = path.with_suffix(".jsonl").name.replace("evaluation", "samples", 1)
        samples = HeldOutSamples(run, trainer, files.tokenizer, count, name=name)
        with tf32_products(tf32), written_to(run, WriteError, "Make room, and evaluate again."):
            own_base = adapters is not None and manifest.reference.get("adapter") is None
            of_samples = _sample(samples, trainer, _final_step(record), own_base=own_base)
    if main:
        for line in [*of_samples, f"wrote       {path}"]:
            tell(line)
    return path


def _sample(samples: HeldOutSamples, trainer: KTOTrainer, step: int, *, own_base: bool) -> list[str]:
    """Make the samples of the run's model, and those before training where that model is in memory too.

    Args:
        step: the update that the model comes from.
        own_base: whether the model without its adapters is the untrained one.

    Returns:
        What there is, for the console.
    """
    samples.begin(until=step)
    if own_base and 0 not in samples.steps:
        from offline_kto.train.model.lora import without_adapters

        with without_adapters(trainer.model):
            samples.make(0)
    samples.make(step)
    return samples.line()


def _final_step(record: RunRecord) -> int:
    """Return the update that the run's model comes from; if an old record lacks it, the last one, for it is not step 0."""
    final: Mapping[str, object] = record.get("final") or {}
    found = (final.get("step") if isinstance(final, dict) else None, record.get("total_updates"))
    return next((step for step in found if isinstance(step, int) and step > 0), 1)


def _tried(config: TrainConfig, run: Path, record: RunRecord, *, stops_early: bool) -> Tried:
    """Return what the advice of the run itself depended on, as far as its files tell."""
    try:
        records = read_metrics(run / METRICS)
        watch = Watch(Settings(**record["alarms"]))
        for one in records:
            watch.add(one)
    except (KeyError, TypeError, ValueError, ArithmeticError, TrainingError):  # of another version, or damaged
        return Tried(learning_rate=config.peak_rate, stops_early=stops_early, advised_rate=usual_rate(config))
    margins = (one["rewards/margins"] for one in reversed(records) if "rewards/margins" in one)
    return Tried(
        learning_rate=config.peak_rate,
        training_margin=next(margins, None),
        stops_early=stops_early,
        advised_rate=watch.advised_rate,
        got_worse=watch.got_worse,
    )


def _without_training(config: TrainConfig) -> TrainConfig:
    """Return the options without those that only matter in training."""
    config = dataclasses.replace(config, report_to="none", early_stopping=None, metric="eval/loss")
    # A model trained in 16 bits can be evaluated in more.
    return dataclasses.replace(config, memory="full") if config.dtype == "float32" else config


def _tell_plan(config: TrainConfig, run: Path, rows: RowsToEvaluate, files: PolicyFiles, precision: str) -> None:
    cache = rows.held_out.cache
    tell(f"cache       {config.cache} (fingerprint {cache.manifest.fingerprint[:12]})")
    tell(f"policy      {run} ({precision})")
    tell(f"attention   {files.attention.in_words}")
    tell(f"scored      {scored_in_words(cache.manifest)}")
    shortened = shortened_in_words(cache.shortened, cache.max_length)
    tell(f"rows        {len(rows.held_out.indices):,}: {rows.what}{shortened}")
    for line in [*files.warnings, *filter(None, [rows.warning])]:
        warn(line)


def _find(config: TrainConfig, run: Path, manifest: Manifest, record: RunRecord) -> tuple[PolicyFiles, Path | None]:
    """Find the run's model, or its base model together with the folder of its adapters."""
    if (run / "adapter_config.json").exists():
        # The model that the run started from, whichever model scored the cache.
        own = dataclasses.replace(manifest, reference=record.get("reference") or manifest.reference)
        base = _base_folder(run)
        if config.model is not None and base is not None:
            folder, _ = find_reference({"id": config.model, "path": base})
            config = dataclasses.replace(config, model=str(folder))
        # A run's adapter includes that of its reference.
        return dataclasses.replace(PolicyFiles.find(config, own), adapter=None), run
    if not (run / "config.json").exists():
        if (run / "../../sweep.yaml").exists():
            raise ConfigError(
                f"--evaluate-only {run}: contains no model; a sweep keeps only the best trial's, in best/."
            )
        raise ConfigError(
            f"--evaluate-only {run}: contains no model; the run is not finished. Continue it with --resume."
        )
    return PolicyFiles.find(dataclasses.replace(config, model=str(run)), manifest), None


def _base_folder(run: Path) -> str | None:
    """Return the base model's folder from the adapter's settings; `model` in config.yaml may be a relative path."""
    try:
        base = json.loads((run / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # loading the adapters will report the error
    return base if isinstance(base, str) and Path(base).is_absolute() else None


def _weights(run: Path, record: RunRecord) -> tuple[float, float]:
    """Return the class weights the run was trained with; `auto` depends on its training rows."""
    match record.get("weights"):
        case [int() | float() as desirable, int() | float() as undesirable]:
            return float(desirable), float(undesirable)
    raise ConfigError(f"{run / RUN_RECORD}: the class weights of the run are missing, so it cannot be evaluated.")


def _trained_prompts(run: Path) -> set[str] | None:
    """Return the ids of the prompts the run was trained on; None if they are not recorded."""
    try:
        table = read_rewards(run, ["split", "prompt_id"])
    except (OSError, ValueError, MemoryError, pa.ArrowException):
        return None
    return set(table["prompt_id"].filter(holds_word(table["split"], "train")).unique().to_pylist())
