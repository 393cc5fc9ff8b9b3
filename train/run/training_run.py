"""Set up one training run, train it, and write its results; used by `kto-train` and by the workers of a sweep."""

import dataclasses
import datetime
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import write_json
from offline_kto.kto_core.errors import TrainingError, in_one_line
from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.out_of_memory import one_memory_error
from offline_kto.train.config import TrainConfig, is_better
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.diagnostics.outcome import Tried
from offline_kto.train.diagnostics.training import Settings, Watch
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.recipe import saved_type
from offline_kto.train.model.saved_model import Layout
from offline_kto.train.publish.base_model import CARD
from offline_kto.train.publish.local_paths import LocalPaths
from offline_kto.train.publish.model_card import CardContent, command_of, write_card
from offline_kto.train.publish.upload_folder import collect
from offline_kto.train.run.callbacks import Console, EarlyStopping, MetricsFile
from offline_kto.train.run.estimates import computed_on
from offline_kto.train.run.folder import write_start
from offline_kto.train.run.inputs import Materials
from offline_kto.train.run.planned_run import Plan, versions
from offline_kto.train.run.rewards_file import write_rewards
from offline_kto.train.run.run_trainer import check_vocabulary, make_trainer
from offline_kto.train.run.samples import HeldOutSamples
from offline_kto.train.run.start_check import check_start
from offline_kto.train.run.suspects import ScoredRows, find_suspects, held_out_rows, trained_rows
from offline_kto.train.run_files import (
    EVALUATION,
    METRICS,
    REWARDS,
    SUSPECTS,
    UNTRAINED,
    read_run_record,
    write_run_record,
)
from offline_kto.train.run_records import EvaluationRecord, FinalUpdate, RunRecord
from offline_kto.train.trainer.checkpoints import reading
from offline_kto.train.trainer.evaluation import Scores, summary
from offline_kto.train.trainer.held_out_changes import load_untrained, save_untrained
from offline_kto.train.trainer.held_out_groups import held_out_groups
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.saving import publish_model, remove_leftovers, unfinished
from offline_kto.train.trainer.sharding import gather_when_saving
from offline_kto.train.trainer.tensor_float import tf32_products, tf32_suffices


@dataclass
class TrainingRun:
    """A training run, ready to train.

    Attributes:
        settings: the settings that warnings during the run depend on.
        console: the console, on the process that prints.
        checkpoint: the checkpoint to resume from, or None.
        warnings: the warnings of the plan, on the process that prints.
        name: name of the run; None for the folder's name.
        checked: whether policy and cache have been compared before, with these materials.
        resumed_at: number of updates that were made before this process began.
        saved: names of the files of the saved model and tokenizer, on the process that writes.
        samples: completions of held-out prompts; None if none are asked for.
        scored_rows: training and held-out rows with their log-ratios, on the process that writes, after `sum_up`.
    """

    config: TrainConfig
    out: Path
    data: TrainingData
    files: PolicyFiles
    precision: Precision
    objective: Objective
    trainer: KTOTrainer
    settings: Settings
    console: Console | None
    checkpoint: str | None
    warnings: list[str]
    name: str | None = None
    checked: bool = False
    resumed_at: int = 0
    saved: list[str] = field(default_factory=list)
    samples: HeldOutSamples | None = None
    scored_rows: tuple[ScoredRows, ...] = ()

    @classmethod
    def set_up(
        cls, config: TrainConfig, out: Path, data: TrainingData, materials: Materials, name: str | None = None
    ) -> "TrainingRun":
        """Prepare everything up to the first update.

        Args:
            config: options of the run.
            out: its folder.
            data: the rows to train on.
            materials: where the policy comes from.
            name: name of the run, if the folder's name is not descriptive.

        Raises:
            KTOError: the user's input cannot be used.
        """
        plan = Plan.make(config, out, data, materials, name)
        device, precision, args, files, objective = plan.device, plan.precision, plan.args, plan.files, plan.objective
        if plan.is_main:
            remove_leftovers(out)
        # A sharded model may not fit on one device; sharding moves each rank's part to its device.
        whole_fits = device.type == "cuda" and not sharding_asked_for()
        model = materials.model(files, config, precision, args.device if whole_fits else torch.device("cpu"))
        if config.lora_rank and args.process_index == 0:
            from offline_kto.train.model.lora import adapter_lines

            for line in adapter_lines(model):
                tell(line)
        check_vocabulary(model, data.rows)
        settings = Settings.of(config, objective.weights, data.class_masses)
        console = Console(Watch(settings), out / METRICS) if args.process_index == 0 else None
        callbacks: list[transformers.TrainerCallback] = (
            [MetricsFile(out / METRICS), console] if console is not None else []
        )
        if config.early_stopping:
            callbacks.append(EarlyStopping(config.early_stopping))
        trainer = make_trainer(config, args, data, model, files, objective, precision, callbacks)
        run = cls(
            config,
            out,
            data,
            files,
            precision,
            objective,
            trainer,
            settings,
            console,
            plan.checkpoint,
            plan.warnings,
            name,
        )
        count = config.prompts_to_sample(in_sweep=name is not None)  # only trials of a sweep have names
        if count and data.held_out is not None:
            run.samples = HeldOutSamples(out, trainer, files.tokenizer, count)
        trainer.add_callback(_Steps(run))
        return run

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that writes."""
        return bool(self.trainer.is_world_process_zero())

    def train(self) -> None:
        """Run all updates; afterwards the model is the one that `--keep` asks for.

        Raises:
            TrainingError: out of memory for a single row, a loss that is not finite, a disk that is full.
        """
        trainer = self.trainer
        if self.checkpoint is not None:
            with reading(Path(self.checkpoint)):
                trainer.row_logratios.load(Path(self.checkpoint))
                self._load_changes(Path(self.checkpoint))
        try:
            with one_memory_error(), tf32_products(self._tf32):
                trainer.train(resume_from_checkpoint=self.checkpoint)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"Out of memory with --max-tokens {trainer.policy.max_tokens}, rows of at most {self.data.rows.max_length} tokens: "
                f"{in_one_line(error)} Use a smaller --max-tokens or --max-length, --gradient-checkpointing, --memory lean "
                "or --lora-rank 16. --resume continues from the last checkpoint."
            ) from error
        finally:
            if self.console is not None:
                self.console.close()  # so that the next output starts on a new line
        self._choose_model()
        trainer.stop_if_weights_not_finite("model")
        if self._saved_type is not None and not self._merges:
            trainer.round_weights(self._saved_type)

    def _choose_model(self) -> None:
        """Replace the last model by that of the best evaluation, if `--keep` says so.

        The untrained model is never kept in place of a trained one: the user has it already, and its copy would look like the
        result of training.
        """
        trainer, config = self.trainer, self.config
        made = trainer.state.global_step
        if self.data.held_out is None:
            return
        if config.keeps_best:
            trainer.load_best()
        if not self.is_main:
            return
        if not config.keeps_best:
            best = trainer.state.best_global_step
            if best is not None and best != made:
                tell(
                    f"kept        update {made:,}, the last one (--keep last); update {best:,} had the best {config.metric}"
                )
            return
        kept = trainer.final_step or made
        before, best = trainer.untrained_metric(config.metric), trainer.state.best_metric
        if before is not None and best is not None and not is_better(best, before, config.metric):
            tell(
                f"kept        update {kept:,}, but none was better than the untrained model: {config.metric} {best:.4f} at best, "
                f"{before:.4f} before training"
            )
        elif kept < made:
            tell(
                f"kept        update {kept:,} of {made:,}, with the best {config.metric} (--keep last for the last one)"
            )

    def _load_changes(self, checkpoint: Path) -> None:
        """Load the scores that later evaluations of a resumed run are compared with."""
        trainer, held_out = self.trainer, self.data.held_out
        if held_out is None or not self.is_main:
            return
        of_reference = trainer.scores.untrained(held_out)
        known = self._starts_as_reference
        trainer.changes.untrained = of_reference if known else load_untrained(self.out / UNTRAINED, of_reference)
        trainer.changes.load(checkpoint, of_reference)

    @property
    def _starts_as_reference(self) -> bool:
        """Return whether the untrained policy is the cached reference, so that its scores need no pass."""
        return not self.config.allow_different_policy

    def _begin_held_out(self) -> None:
        """Log the values of the untrained policy, and keep its scores if they cannot be computed again."""
        changes = self.trainer.changes
        self.trainer.log_untrained(is_reference=self._starts_as_reference)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStopping):
                callback.untrained = self.trainer.untrained_metric(self.config.metric)
        if self.is_main and changes.untrained is not None and not self._starts_as_reference:
            save_untrained(self.out / UNTRAINED, changes.untrained)

    @property
    def _tf32(self) -> bool:
        return tf32_suffices(self.config, self.precision, self.trainer.args.device, self.data.rows.manifest)

    @property
    def _saved_type(self) -> torch.dtype | None:
        """Type of the saved weights; None for the type they were trained in."""
        return saved_type(self.config)

    @property
    def _merges(self) -> bool:
        """Return whether the run ends by merging its adapters into a base model that exists only in memory."""
        return bool(self.config.lora_rank) and self.files.adapter is not None

    def sum_up(self) -> EvaluationRecord | None:
        """Write evaluation.json and rewards.parquet; called on every rank.

        Returns:
            The content of evaluation.json; None without held-out rows.
        """
        trainer = self.trainer
        with (
            tf32_products(self._tf32),
            self.files.reporting_memory(self.config, self.precision, trainer.args.device, "held-out rows were scored"),
        ):
            scores = trainer.final_scores()
        steps, logratios = trainer.row_logratios.over_ranks(trainer.policy.ranks)
        if not self.is_main:
            return None
        write_rewards(self.out / REWARDS, self.data, steps, logratios, scores)
        self.scored_rows = self._scored_rows(steps, logratios, scores)
        final: FinalUpdate = {"step": trainer.final_step, "updates": trainer.state.global_step}
        final.update(self._speed())
        if trainer.shift is not None:
            final["shift"] = trainer.shift.mean
        write_run_record(self.out, {**read_run_record(self.out), "final": final})
        if scores is None:
            return None
        found = summary(scores, self.objective, trainer.final_step, trainer.changes.untrained, self._tried)
        assert self.data.held_out is not None
        files = self.data.held_out.cache.source_files(self.data.held_out.indices)
        found["groups"] = held_out_groups(scores, trainer.changes.untrained, self.objective, files)
        found["fingerprint"] = self.data.rows.manifest.fingerprint
        write_json(self.out / EVALUATION, found)
        return found

    def _scored_rows(self, steps: np.ndarray, logratios: np.ndarray, scores: Scores | None) -> tuple[ScoredRows, ...]:
        state, held_out = self.trainer.state, self.data.held_out
        trained = trained_rows(
            self.data,
            steps,
            logratios,
            self.objective,
            state.log_history,
            starts_as_reference=self._starts_as_reference,
        )
        if scores is None or held_out is None:
            return (trained,)
        return trained, held_out_rows(held_out, scores, self.trainer.changes.untrained, self.objective)

    def write_suspects(self, out: Path) -> list[str]:
        """Write suspects.csv into a folder, after `sum_up`, on the process that writes; return its line for the console.

        Raises:
            WriteError: it cannot be written.
        """
        return find_suspects(self.scored_rows, self.objective.beta, self.files.tokenizer).write(out / SUSPECTS)

    def _speed(self) -> FinalUpdate:
        """Return the time of an update without samples, for the plans of later runs; nothing if this process made none."""
        state = self.trainer.state
        updates = state.global_step - self.resumed_at
        seconds = next((log["train_runtime"] for log in reversed(state.log_history) if "train_runtime" in log), None)
        if seconds is None or updates < 1:
            return {}
        seconds -= 0.0 if self.samples is None else self.samples.seconds
        return {"seconds_per_update": seconds / updates, "computed_on": computed_on(self.trainer.args.device)}

    @property
    def _tried(self) -> Tried:
        history = self.trainer.state.log_history
        margins = (log["rewards/margins"] for log in reversed(history) if "rewards/margins" in log)
        watch = None if self.console is None else self.console.watch
        return Tried(
            learning_rate=self.config.peak_rate,
            training_margin=next(margins, None),
            stops_early=self.config.early_stopping is not None,
            advised_rate=self.settings.advised_rate if watch is None else watch.advised_rate,
            got_worse=watch is not None and watch.got_worse,
        )

    def finish_samples(self) -> list[str]:
        """Add the samples of the final model, after `sum_up`; called on every rank.

        Returns:
            What there is, for the console.
        """
        if self.samples is None:
            return []
        with tf32_products(self._tf32):
            self.samples.make(self.trainer.final_step)
        return self.samples.line()

    def save_model(self, out: Path) -> None:
        """Save model and tokenizer in a folder, and note the names of their files; called on every rank.

        Raises:
            TrainingError: it cannot be written.
        """
        trainer = self.trainer
        with unfinished(out, "model", main=self.is_main) as folder:
            if self._merges:
                self._save_with_reference_adapter(folder)
            else:
                gather_when_saving(trainer.accelerator)
                trainer.save_in(folder, self._saved_type)
            if self.is_main:
                self.saved = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
                publish_model(folder, out)

    def write_card(self, out: Path, found: EvaluationRecord | None, repository: str | None = None) -> None:
        """Write the model card into the folder of the saved model.

        Args:
            found: content of evaluation.json; None without held-out rows.
            repository: the repository on the hub that the model is uploaded to, or None.
        """
        title = self.name or (repository or out.resolve().name).rpartition("/")[2]
        manifest, history = self.data.rows.manifest, self.trainer.state.log_history
        record = read_run_record(self.out)
        write_card(
            out / CARD, CardContent(title, self.config, manifest, self.files, record, history, found, repository)
        )

    def collect_upload(self) -> Path:
        """Collect what is uploaded to the hub, and return its folder."""
        paths = LocalPaths.of(self.config, self.out, self.files, self.data.rows.manifest.reference)
        return collect(self.out, self.saved, self.config, self.files, paths)

    def _save_with_reference_adapter(self, folder: Path) -> None:
        """Save the merged model, or a single adapter if the reference's adapter is kept beside quantised weights.

        The trained adapters alone would need a base model that exists only in memory.
        """
        from offline_kto.train.model.lora import keeps_adapter_beside, merged, save_as_one_adapter

        if not self.is_main:
            return
        writer, model = self.trainer.writer, self.trainer.accelerator.unwrap_model(self.trainer.model)
        if keeps_adapter_beside(model):
            save_as_one_adapter(model, folder, dtype=self._saved_type)
            writer.write_tokenizer(folder)
        else:
            model = merged(model)
            writer.write(model, folder, dtype=self._saved_type, layout=Layout.of(model))

    def begin(self) -> None:
        """Compare policy and cache, and write the first files; called on every rank once the model is prepared."""
        trainer = self.trainer
        transformers.utils.logging.disable_progress_bar()  # the bars of file writing would break the live line
        self.resumed_at = trainer.state.global_step
        trainer.prepare_to_train()
        if self.is_main and trainer.meter is not None:
            tell(f"memory      --max-tokens {trainer.policy.max_tokens} (measured)")
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.batches.finish()  # the Trainer checks only after an update whether it was the last
        if trainer.state.global_step:  # a resumed policy differs from the reference
            if self.config.lora_rank:  # but its base model is loaded again and can be compared
                from offline_kto.train.model.lora import without_adapters

                with without_adapters(trainer.model):
                    self._check_policy()
            if self.is_main:
                trainer.remove_old_checkpoints()
                write_start(
                    self.config, self.out, {**self.record(), "started": read_run_record(self.out).get("started")}
                )  # options that may change have changed
            if self.samples is not None:
                self.samples.begin(until=trainer.state.global_step)
            return
        if not self.checked:
            self._check_policy()
        if self.is_main:
            write_start(self.config, self.out, self.record())
        self._begin_held_out()
        if self.samples is not None:
            self.samples.begin(until=None)
            self.samples.make(0)

    def _check_policy(self) -> None:
        allow = self.config.allow_different_policy
        found = check_start(self.trainer.scores, self.data.rows, self.precision, policy=self.files.name, allow=allow)
        if self.is_main:
            tell(
                f"start       policy and cache differ by {found.mean:.1e} nats a token (mean), {found.largest:.1e} (max)"
            )

    def record(self) -> RunRecord:
        """Return the content of run.json: the settings the run was started with."""
        manifest = self.data.rows.manifest
        return {
            "fingerprint": manifest.fingerprint,
            "labels_hash": manifest.data.get("labels_hash"),
            "identity": manifest.identity,
            "rendered_on": manifest.tokenization.get("rendered_on"),
            "command": command_of(dataclasses.replace(self.config, out=self.out)),
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "precision": self.precision.name,
            "held_out_cache": self.data.held_out_cache,
            "device": self.trainer.args.device.type,
            "weights": list(self.objective.weights),
            "total_updates": self.trainer.state.max_steps,
            "warnings": self.warnings,
            "alarms": dataclasses.asdict(self.settings),
            "reference": manifest.reference,
            "data": self.data.run_data(),
        }


class _Steps(transformers.TrainerCallback):
    """A callback that begins the run, and requests logs and evaluations in addition to the Trainer's."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: object,
    ) -> None:
        self.run.begin()  # here the model is in training precision and on its device
        self.run.trainer.start_clock()

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.run.data.held_out is not None and self.run.config.eval_steps is None:
            control.should_evaluate |= state.global_step % len(self.run.trainer.batches) == 0
        # The last update is always logged. Every checkpoint (an evaluation may write one) is preceded by a log, because a
        # resumed run does not have the sums accumulated before the checkpoint.
        last = state.global_step >= state.max_steps
        control.should_log |= control.should_save or control.should_evaluate or last

    def on_evaluate(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: object,
    ) -> None:
        # The samples of the last update are made once the model to keep is known.
        at_evaluations = self.run.config.samples_at == "evaluations" and state.global_step < state.max_steps
        if self.run.samples is not None and at_evaluations:
            self.run.samples.make(state.global_step)
        self.run.trainer.start_clock()
