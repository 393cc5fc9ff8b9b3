"""Train with a thin `transformers.Trainer`: checkpoints, schedules and loggers are inherited, the update is our own.

batch             one update: rows of all ranks, distributed by length
  reference pass  computes the point that rows are measured from (reference_point.py); no gradient, eval mode
  loss pass       runs labelled rows in micro-batches; gradients add up to those of the whole batch
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.train.data.batches import BatchLoader, EpochBatches
from offline_kto.train.data.cache_rows import CacheRows, TrainingRow, total_mass
from offline_kto.train.data.held_out import HeldOutRows
from offline_kto.train.model.checkpointing import can_checkpoint, enable_checkpointing, is_checkpointing
from offline_kto.train.model.saved_model import ModelWriter
from offline_kto.train.model.token_budget import FEW_TOKENS, MOST_TOKENS
from offline_kto.train.trainer.accumulators import RowLogratios, Window
from offline_kto.train.trainer.best_weights import BestWeights
from offline_kto.train.trainer.checkpoints import (
    check_optimizer_loaded,
    load_renamed_weights,
    loading_model,
    reading,
)
from offline_kto.train.trainer.evaluation import Scores, held_out_metrics
from offline_kto.train.trainer.finite_checks import FiniteChecks
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.gradient_sums import Sending
from offline_kto.train.trainer.held_out_changes import HeldOutChanges
from offline_kto.train.trainer.lean_layers import can_halve_activations, halve_activations, restore_layers
from offline_kto.train.trainer.memory import Meter, peak_memory_mb, peak_reserved_mb, state_bytes
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.policy_scores import PolicyScores
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.ranks import Ranks
from offline_kto.train.trainer.reference_point import RunningShift, reference_point
from offline_kto.train.trainer.saving import (
    publish_checkpoint,
    remove_old_checkpoints,
    rename_best,
    round_weights,
    unfinished,
)
from offline_kto.train.trainer.sharding import tie_again

# Token budget where memory is not measured.
_DEEPSPEED_TOKENS = 8192


class KTOTrainer(transformers.Trainer):
    """Trainer for KTO from cached reference scores.

    Args:
        model: from `PolicyFiles.load`.
        args: settings without gradient accumulation; micro-batches are formed here.
        rows: the training cache.
        batches: optimizer batches, over all ranks.
        held_out: rows held out, or None.
        objective: the loss.
        max_tokens: padded tokens in one forward and backward pass, or a meter that measures how many fit.
        dtype: the type that passes compute in.
        rounding: nats per token by which two ways to compute the same score may differ.
        writer: writes the models of checkpoints and of the run.
        sending: how unsharded ranks send gradients.
        may_checkpoint: whether gradient checkpointing may be switched on if few tokens fit.
        keeps_best: whether the weights of the best evaluation are needed at the end.

    Attributes:
        policy: the model with its token budget.
        meter: measures memory; None if the token budget is given.
        held_out_scores: scores of the current model; None before they are computed.
        changes: of held-out values in the run.
        final_step: the update that the final model comes from; 0 before it is known.
    """

    def __init__(
        self,
        *,
        model: Model,
        args: transformers.TrainingArguments,
        rows: CacheRows,
        batches: EpochBatches,
        objective: Objective,
        max_tokens: int | Meter,
        dtype: torch.dtype,
        rounding: float,
        writer: ModelWriter,
        held_out: HeldOutRows | None = None,
        sending: Sending | None = None,
        may_checkpoint: bool = False,
        keeps_best: bool = False,
        **options: Any,
    ) -> None:
        use_cache = getattr(model.config, "use_cache", None)
        eval_dataset = held_out.cache if held_out else None
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=eval_dataset, **options)
        if use_cache is not None:
            # The Trainer disables it in the configuration, which is saved; the scoring forward never uses a cache.
            model.config.use_cache = use_cache
        self.rows, self.batches, self.held_out = rows, batches, held_out
        self.objective, self.writer = objective, writer
        self.dtype, self.may_checkpoint, self.keeps_best = dtype, may_checkpoint, keeps_best
        self.meter = None if isinstance(max_tokens, int) else max_tokens
        budget = max_tokens if isinstance(max_tokens, int) else rows.max_length
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        ranks = Ranks(self.accelerator, sharded=sharded, sending=sending)
        self.policy = PreparedPolicy(model, args.device, ranks=ranks, max_tokens=budget, rounding=rounding)
        self.scores = PolicyScores(self.policy, objective)
        self.gradients = GradientPasses(self.policy, objective, self.accelerator)
        self.finite_checks = FiniteChecks(self.policy, learning_rate=args.learning_rate)
        self.row_logratios = RowLogratios(len(rows))
        self.held_out_scores: Scores | None = None
        self.changes = HeldOutChanges(objective)
        self.final_step = 0
        if objective.traits.needs_shift:
            self.add_callback(RunningShift())
        self._window = Window()
        self._best_scores: Scores | None = None
        self._best_weights: BestWeights | None = None
        self._saving_to: Path | None = None
        self._saving_as: torch.dtype | None = None
        self._loading_from = Path()
        self.control: transformers.TrainerControl
        self.model: Model
        self.model_wrapped: Any

    @property
    def shift(self) -> RunningShift | None:
        """BCO's running mean; None for other losses."""
        # Looked up each time: --resume replaces the object.
        return next((one for one in self.callback_handler.callbacks if isinstance(one, RunningShift)), None)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; an unsharded model is prepared here, so that the Trainer finds it prepared and does not wrap it.

        In `DistributedDataParallel` it would cost buckets as large as all gradients, which nothing here would use.
        """
        if not self.policy.ranks.sharded:
            self.model_wrapped = self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return super().train(*args, **options)

    def prepare_to_score(self) -> None:
        """Prepare a model that will only be scored, as the Trainer does before training."""
        self.model_wrapped = self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self._take_over_model()

    def prepare_to_train(self) -> None:
        """Decide whether rows can be packed and how many tokens fit, once the Trainer has prepared the model."""
        self._take_over_model()
        self.policy.ranks.start_equal(self.model)
        longest = self.rows.max_length
        self._halve_activations([self.rows[i].matched.ids for i in range(min(2, len(self.rows)))])
        if self.meter is None:
            return
        if self.is_deepspeed_enabled:  # see `_halve_activations`
            self.policy.max_tokens = max(_DEEPSPEED_TOKENS, longest)
        else:
            self._measure_budget(self.meter, longest)

    def _measure_budget(self, meter: Meter, longest: int) -> None:
        """Measure how many tokens fit; with few, measure again with gradient checkpointing unless that was decided."""
        policy, measure = self.policy, self.gradients.measure_max_tokens
        found = measure(meter, longest=longest, of_matrix=self._state_bytes)
        if found.tokens < FEW_TOKENS and self.may_checkpoint and can_checkpoint(policy.model):
            restore_layers(policy.model)
            enable_checkpointing(policy.model)
            again = measure(meter, longest=longest, of_matrix=self._state_bytes)
            if self.is_world_process_zero():
                tell(
                    f"memory      {found.tokens:,} tokens fit into a pass, and with gradient checkpointing {again.tokens:,}: it is on, "
                    "for about a third more time (--no-gradient-checkpointing leaves it off)"
                )
            found = again
        policy.max_tokens = found.tokens
        self.scores.most_tokens = min(MOST_TOKENS, found.scoring_tokens)

    def _state_bytes(self, dtype: torch.dtype) -> float:
        """Return the bytes that the optimizer will allocate for each value of a matrix."""
        if self.optimizer.state:  # of a checkpoint: they are allocated
            return 0.0
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        return state_bytes(kind, options, self.args.device, dtype)

    def _halve_activations(self, sample: Sequence[TokenIds]) -> None:
        policy, args = self.policy, self.args
        checkpoints = is_checkpointing(policy.model)
        if self.is_deepspeed_enabled:  # a trial's backward pass would count as a micro-batch of the first update
            return
        if not can_halve_activations(policy, checkpoints=checkpoints, compiles=args.torch_compile):
            return
        batch = policy.lay_out(sample).to(policy.device)
        replaced = halve_activations(policy.model, policy.scoring_model, batch, policy.ranks)
        if replaced and self.is_world_process_zero():
            tell(
                f"activations {replaced} norms and SwiGLU layers keep their inputs only; scores are the same bit for bit"
            )

    def _take_over_model(self) -> None:
        self.policy.replace_model(self.model, wrapped=self.model_wrapped)
        if not self.is_deepspeed_enabled:
            self.policy.check_precision(self.dtype)
        self.policy.check_packing([self.rows[i].matched.ids for i in range(min(2, len(self.rows)))])

    def get_train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.rows, self.batches)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass

    def training_step(
        self,
        model: Model,
        inputs: Sequence[TrainingRow],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Compute reference point, losses and gradients of one batch."""
        self.finite_checks.last_rows, self.held_out_scores = inputs, None
        step, ranks = self.state.global_step, self.policy.ranks
        reference = reference_point(self.scores, inputs, self.shift)
        rows, outcome, aux_loss = self.gradients.run(inputs, reference, step=step + 1)
        self.finite_checks.add_losses(rows, outcome, step=step + 1)
        self.row_logratios.add([row.index for row in rows], outcome.logratios, step)
        self._window.add(outcome, reference, aux_loss)
        return outcome.losses.sum() * (ranks.world / total_mass(inputs))

    def start_clock(self) -> None:
        """Leave what was done since the last log (checks, evaluation, samples) out of `tokens_per_second`."""
        self._window.start()

    def _get_grad_norm(self, model: Model, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return self.finite_checks.check_update(norm, step=self.state.global_step + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's values together with the metrics of all updates since the last log."""
        if "loss" in logs and self._window.updates:
            logs.update(self._window.metrics(self.policy.ranks, beta=self.objective.beta))
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
            reserved = peak_reserved_mb(self.args.device)
            logs.update({} if reserved is None else {"peak_reserved_mb": reserved})
            self._window = Window()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute held-out metrics from cached references: one z0 and one mean over all held-out rows."""
        if self.held_out is None:
            raise TrainingError("No held-out rows: give --eval-fraction or --eval-cache.")
        self.held_out_scores = scores = self._score_held_out(self.held_out)
        values = held_out_metrics(scores, self.objective)
        changes = self.changes.add(scores, values["loss"]) if self.is_world_process_zero() else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in (values | changes).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log_untrained(self, *, is_reference: bool) -> None:
        """Log the held-out metrics of the untrained policy; called on every rank.

        Args:
            is_reference: whether the policy is the model that the cache was scored with, so that its scores are known.
        """
        if self.held_out is None:
            return
        scores = self.scores.untrained(self.held_out) if is_reference else self._score_held_out(self.held_out)
        self.changes.untrained = scores
        values = held_out_metrics(scores, self.objective)
        self.changes.add(scores, values["loss"])
        self.log({f"eval_{name}": value for name, value in values.items()})

    def untrained_metric(self, metric: str) -> float | None:
        """Return the value of a metric (`eval/loss`) before training; None if it is not known."""
        scores = self.changes.untrained
        return None if scores is None else held_out_metrics(scores, self.objective).get(metric.removeprefix("eval/"))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self._best_scores, self._best_weights = self.held_out_scores, None
            self.control.should_save = self.args.save_strategy != "no"  # the best checkpoint is kept
            if self._needs_copy:
                self._best_weights = BestWeights.of(self.model, self.state.global_step, self.shift)
        return best

    @property
    def _needs_copy(self) -> bool:
        """Return whether the weights have to be copied: they are not the last ones, and no checkpoint holds them."""
        is_last = self.state.global_step >= self.state.max_steps
        return self.keeps_best and self.args.save_strategy == "no" and not is_last and not self.policy.ranks.sharded

    def load_best(self) -> None:
        """Load the weights of the best evaluation in place of the last ones."""
        state = self.state
        if self._best_weights is not None:
            self._best_weights.restore(self.model, self.shift)
            self.final_step, self.held_out_scores = self._best_weights.step, self._best_scores
        elif state.best_model_checkpoint is not None and state.best_global_step != state.global_step:
            self._load_best_model()
            self.final_step, self.held_out_scores = int(state.best_global_step or 0), self._best_scores
            if self.shift is not None:
                self.shift.load(Path(state.best_model_checkpoint))

    def final_scores(self) -> Scores | None:
        """Return held-out scores of the current model, after `final_step` updates; called on every rank."""
        self.final_step = self.final_step or int(self.state.global_step)
        if self.held_out is not None and self.held_out_scores is None:
            self.held_out_scores = self._score_held_out(self.held_out)
        return self.held_out_scores

    def _score_held_out(self, held_out: HeldOutRows) -> Scores:
        shift = self.shift
        return self.scores.held_out(held_out, None if shift is None else shift.mean)

    def stop_if_weights_not_finite(self, what: str) -> None:
        """Check the state before it is saved; called on every rank.

        Args:
            what: name of what is saved, for the message.

        Raises:
            TrainingError: a weight, an optimizer's state or a score is not finite.
        """
        step = self.state.global_step
        self.finite_checks.check_weights(self.optimizer, self.held_out_scores, what=what, step=step)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round the weights to the values they will have when saved in `dtype`, so that the evaluation uses those."""
        round_weights(self.model, dtype, keep=self.writer.keeps(self.model))
        self.held_out_scores = None

    def save_in(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Save the model for use; called on every rank.

        Args:
            dtype: of its weights; None for their own.
        """
        self._saving_as = dtype
        try:
            self.save_model(str(folder))
        finally:
            self._saving_as = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # recent versions of transformers call this on every rank
            return
        model, folder = self.accelerator.unwrap_model(self.model, keep_torch_compile=False), Path(output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = state_dict and tie_again(state_dict, model)
        self.writer.write(model, folder, state_dict=state_dict, dtype=self._saving_as)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Model, trial: Any) -> None:
        """Save into an unfinished folder that is renamed to a checkpoint once everything is on disk."""
        out, main = Path(self.args.output_dir), self.is_world_process_zero()
        self.stop_if_weights_not_finite("checkpoint")
        with unfinished(out, "checkpoint", main=main) as folder:
            self._saving_to = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            rename_best(self.state, checkpoint, out, main=main)
            self.row_logratios.save(checkpoint, self.policy.ranks, main=main)
            if main:
                self.changes.save(checkpoint)
            self.accelerator.wait_for_everyone()
            if main:
                publish_checkpoint(checkpoint, out)
                self.remove_old_checkpoints()
            self.accelerator.wait_for_everyone()

    def remove_old_checkpoints(self) -> None:
        """Remove all but the last checkpoints and the best one. A killed run may leave one more, incomplete."""
        keep, best = self.args.save_total_limit, self.state.best_model_checkpoint
        remove_old_checkpoints(Path(self.args.output_dir), keep=keep, best=best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Model = None) -> None:
        self._loading_from = Path(resume_from_checkpoint)
        with loading_model(self._loading_from, self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loading_from = Path(str(self.state.best_model_checkpoint))
        with loading_model(self._loading_from, self.model):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        trust = self.writer.trust_remote_code
        load_renamed_weights(load_result, self._loading_from, self.model, trust_remote_code=trust)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "optimizer.pt", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            check_optimizer_loaded(self.optimizer, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with reading(self._loading_from, TRAINER_STATE_NAME):
            super()._load_callback_state()
