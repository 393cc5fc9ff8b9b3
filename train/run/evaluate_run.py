"""Evaluate a finished run on held-out rows against the cached reference: `kto-train --evaluate-only RUN`."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from offline_kto.kto_core.models.precision import Precision, resolve_device
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.row_ids import as_ids, id_array_of
from offline_kto.train.data.row_words import scored_in_words, shortened_in_words
from offline_kto.train.data.training_data import RowsToEvaluate, TrainingData, rows_to_evaluate
from offline_kto.train.diagnostics.outcome import Tried
from offline_kto.train.diagnostics.settings import usual_rate
from offline_kto.train.diagnostics.training import Settings, Watch
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.recipe import run_precision
from offline_kto.train.run.arguments import training_arguments
from offline_kto.train.run.callbacks import read_metrics
from offline_kto.train.run.run_trainer import check_vocabulary, make_trainer
from offline_kto.train.run.samples import HeldOutSamples
from offline_kto.train.run.start_check import check_start
from offline_kto.train.run.suspects import find_suspects, held_out_rows
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
from offline_kto.train.trainer.held_out_groups import held_out_groups
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
    evaluation = _Evaluation.set_up(config, run, record)
    evaluation.compare_with_cache()
    if evaluation.is_main:
        evaluation.tell_plan()
    scores = evaluation.score()
    if evaluation.is_main:
        evaluation.write(scores, _tried(config, run, record, stops_early=stops_early))
    of_samples = evaluation.sample()
    if evaluation.is_main:
        for line in [*of_samples, f"wrote       {evaluation.path}"]:
            tell(line)
    return evaluation.path


@dataclass(frozen=True)
class _Evaluation:
    """The model of a finished run, ready to score held-out rows.

    Attributes:
        run: the run folder.
        record: its run.json.
        rows: what is evaluated.
        place: the device of the model.
        own_base: whether the model without its adapters is the untrained one, and in memory.
    """

    config: TrainConfig
    run: Path
    record: RunRecord
    rows: RowsToEvaluate
    files: PolicyFiles
    precision: Precision
    objective: Objective
    trainer: KTOTrainer
    place: torch.device
    own_base: bool

    @classmethod
    def set_up(cls, config: TrainConfig, run: Path, record: RunRecord) -> "_Evaluation":
        """Choose the rows, load the model, and prepare it to score; called on every rank."""
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
        units = held_out.indices.reshape(-1, objective.rows_in_unit)
        data = TrainingData(held_out.cache, units, held_out)
        trainer = make_trainer(config, args, data, model, files, objective, precision, callbacks=[])
        # The base model is read from its folder again. On quantised weights the adapters include the reference's adapter.
        own_base = adapters is not None and manifest.reference.get("adapter") is None
        evaluation = cls(config, run, record, rows, files, precision, objective, trainer, place, own_base)
        with evaluation._memory("it was prepared to score"):
            trainer.prepare_to_score()
        if trainer.shift is not None:
            trainer.shift.begin_at(float(evaluation._final.get("shift", 0.0)), 1)
        return evaluation

    @property
    def is_main(self) -> bool:
        """Return whether this process writes."""
        return bool(self.trainer.is_world_process_zero())

    @property
    def path(self) -> Path:
        """Return the file that the evaluation is written to."""
        manifest = self._manifest
        labels = str(manifest.data.get("labels_hash"))[:4]
        other = f"evaluation-{manifest.fingerprint[:12]}-{labels}.json"
        return self.run / (EVALUATION if self.rows.of_run else other)

    @property
    def _manifest(self) -> Manifest:
        return self.rows.held_out.cache.manifest

    @property
    def _final(self) -> FinalUpdate:
        found = self.record.get("final")
        return found if isinstance(found, dict) else {}

    def _beside(self, stem: str, suffix: str) -> Path:
        """Return a path named like that of the evaluation."""
        return self.path.with_suffix(suffix).with_stem(self.path.stem.replace("evaluation", stem, 1))

    def _memory(self, when: str) -> AbstractContextManager[None]:
        return self.files.reporting_memory(self.config, self.precision, self.place, when)

    def _products(self) -> AbstractContextManager[None]:
        return tf32_products(tf32_suffices(self.config, self.precision, self.trainer.args.device, self._manifest))

    def compare_with_cache(self) -> None:
        """Compare the base model of an adapter with the cache, where it is the one that was scored."""
        if not self.own_base:
            return
        from offline_kto.train.model.lora import without_adapters

        with without_adapters(self.trainer.model), self._products(), self._memory("policy and cache were compared"):
            allow, cache = self.config.allow_different_policy, self.rows.held_out.cache
            check_start(self.trainer.scores, cache, self.precision, policy=self.files.name, allow=allow)

    def tell_plan(self) -> None:
        """Print what is evaluated."""
        where = f"{self.precision.name} on {resolve_device(self.config.device)}"
        _tell_plan(self.config, self.run, self.rows, self.files, where)

    def score(self) -> Scores:
        """Score the held-out rows; called on every rank."""
        with self._products(), self._memory("held-out rows were scored"):
            scores = self.trainer.final_scores()
        assert scores is not None
        return scores

    def write(self, scores: Scores, tried: Tried) -> None:
        """Print the held-out values, and write them, and suspect rows of another cache than the run's own."""
        held_out, objective = self.rows.held_out, self.objective
        before: Scores | None = self.trainer.scores.untrained(held_out)
        if before is not None and self.config.allow_different_policy:
            before = load_untrained(self.run / UNTRAINED, before) if self.rows.of_run else None
        found = summary(scores, objective, int(self._final.get("step", 0)), before, tried)
        groups = held_out_groups(scores, before, objective, held_out.cache.source_files(held_out.indices))
        for line in [
            *summary_lines(found, rows="held out" if self.rows.of_run else "evaluated"),
            *verdict_lines(found),
        ]:
            tell(line)
        with written_to(self.run, WriteError, "Make room, and evaluate again; existing files are unchanged."):
            rows = {**self._manifest.rows_identity, "rows_are": self.rows.what}
            write_json(self.path, {**found, "groups": groups, **rows})
        if not self.rows.of_run:  # the run has listed its own suspects, training rows among them
            evaluated = held_out_rows(held_out, scores, before, objective, split="evaluated")
            suspects = find_suspects([evaluated], objective.beta, self.files.tokenizer)
            for line in suspects.write(self._beside("suspects", ".csv")):
                tell(line)

    def sample(self) -> list[str]:
        """Make the samples of the run's model, and those before training where that model is in memory too.

        Returns:
            What there is, for the console.
        """
        count = self.config.prompts_to_sample() if self.rows.of_run else self.config.samples or 0
        if not count:
            return []
        name = self._beside("samples", ".jsonl").name
        samples = HeldOutSamples(self.run, self.trainer, self.files.tokenizer, count, name=name)
        step = _final_step(self.record)
        with self._products(), written_to(self.run, WriteError, "Make room, and evaluate again."):
            samples.begin(until=step)
            if self.own_base and 0 not in samples.steps:
                from offline_kto.train.model.lora import without_adapters

                with without_adapters(self.trainer.model):
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


def _trained_prompts(run: Path) -> np.ndarray | None:
    """Return the ids of the prompts the run was trained on, dtype `hashing.ID`; None if they are not recorded."""
    try:
        table = read_rewards(run, ["split", "prompt_id"])
    except (OSError, ValueError, MemoryError, pa.ArrowException):
        return None
    trained = table["prompt_id"].filter(holds_word(table["split"], "train")).unique().dictionary_decode()
    return id_array_of(pa.chunked_array([as_ids(trained)]))
