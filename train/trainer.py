"""A thin `transformers.Trainer`: checkpoints, schedules and loggers are its; one update is ours.

batch          one update: rows of all ranks, dealt out by length
  z0 pass      mismatched rows, no gradient, eval mode, mean over all ranks, clamped once
  loss pass    labelled rows in micro-batches; gradients add up to those of the whole batch
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kto_core.batching import GRADIENT_PASS_COST, micro_batches, packed_batches
from kto_core.errors import TrainingError
from kto_core.head import add_gradients_in_place
from kto_core.logps import token_logps
from kto_core.losses import (
    class_weights,
    count_routed_tokens,
    kl_reference_point,
    kto_losses,
    router_balance_loss,
)
from kto_core.metrics import BatchOutcome, Tokens, metrics_from
from kto_core.passes import ScoringPasses, packs_alike
from kto_core.sequences import FILLER, Sequences, pack_sequences, pad_sequences, sum_rows
from train.cache_rows import BatchLoader, CacheRows, EpochBatches, RowKey, ScoredSequence, TrainingRow
from train.memory import CudaMeter, optimizer_bytes, peak_memory_mb, tokens_that_fit
from train.ranks import Ranks
from train.run_folder import publish_checkpoint, remove_old_checkpoints, unfinished
from train.sharding import tie_again
from train.window import Window

# Without gradient nothing is kept for a backward pass, so a pass holds this many times the tokens.
_SCORING_TOKENS = 4

# Where memory is not measured.
_DEEPSPEED_TOKENS = 8192

# Attention that reads the boundaries of sequences laid one behind the other, at no cost.
_PACKING_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


@dataclass(frozen=True)
class Objective:
    """The hyperparameters of the loss."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


class KTOTrainer(transformers.Trainer):
    """KTO from cached reference scores.

    Args:
        model: from `PolicyFiles.load`.
        args: without gradient accumulation; micro-batches are cut here.
        rows: the training cache.
        batches: optimizer batches, over all ranks.
        eval_data: (cache, rows) held out, or None.
        objective: hyperparameters of the loss.
        max_tokens: padded tokens in one forward and backward pass; None to measure what fits (CUDA).
        rounding: nats a token by which two ways to compute the same score may differ.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: transformers.TrainingArguments,
        rows: CacheRows,
        batches: EpochBatches,
        objective: Objective,
        max_tokens: int | None,
        rounding: float,
        eval_data: tuple[CacheRows, list[int]] | None = None,
        **options: Any,
    ) -> None:
        held_out = eval_data[0] if eval_data else None
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=held_out, **options)
        if use_cache is not None:
            # The Trainer switches it off in the configuration, which is saved; the scoring forward never uses a cache.
            model.config.use_cache = use_cache
        self.rows, self.batches, self.eval_data = rows, batches, eval_data
        self.objective, self.max_tokens, self.rounding = objective, max_tokens or rows.max_length, rounding
        self.measures_memory = max_tokens is None
        self.balances_experts = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
        attention = getattr(model.config, "_attn_implementation", None)
        self.packs = args.device.type == "cuda" and attention in _PACKING_ATTENTION
        self.ranks = Ranks(self.accelerator, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._window = Window()
        self._passes: ScoringPasses | None = None
        self._saving_to: Path | None = None
        self._in_place = [] if self.ranks.sharded else add_gradients_in_place(model)
        self.control: transformers.TrainerControl

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict and tie_again(state_dict, self.model))

    # -- checkpoints --------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, into a folder that gets a checkpoint's name when all of it is on the disk."""
        out, main = Path(self.args.output_dir), self.is_world_process_zero()
        with unfinished(out, "checkpoint", main=main) as folder:
            self._saving_to = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.state.best_model_checkpoint == str(checkpoint):
                self.state.best_model_checkpoint = str(out / checkpoint.name)
                if main:
                    self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if main:
                publish_checkpoint(checkpoint, out)
                self.remove_old_checkpoints()
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(out / checkpoint.name))

    def remove_old_checkpoints(self) -> None:
        """All but the last ones and the best one. A killed run may leave one more, in part."""
        keep, best = self.args.save_total_limit, self.state.best_model_checkpoint
        remove_old_checkpoints(Path(self.args.output_dir), keep=keep, best=best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass  # later, under its name

    # -- what the Trainer asks for ------------------------------------------------------------------

    def get_train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.rows, self.batches)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass

    def training_step(
        self,
        model: Any,
        inputs: Sequence[TrainingRow],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """One batch: z0, losses, gradients. Out of memory halves `max_tokens` and repeats what failed."""
        rows = inputs
        kl, kl_raw, z0_tokens = self._reference_point([row.mismatched for row in rows])
        while True:
            try:
                outcome, aux_loss = self._gradients(rows, kl, z0_tokens)
                break
            except torch.OutOfMemoryError:
                # Gradients meet those of other ranks afterwards, so a rank mends this alone; but a sharded model's
                # ranks wait for each other within every pass. And a single row cannot be cut.
                if self.ranks.sharded or self.max_tokens <= max(len(row.matched) for row in rows):
                    raise
            self._halve_max_tokens(rows)  # outside of `except`, whose traceback holds on to the tensors
        self.ranks.sum_gradients(self.model)
        self._window.add(outcome, kl_raw, aux_loss)
        return outcome.losses.sum() * (self.ranks.world / len(rows))

    def _halve_max_tokens(self, rows: Sequence[TrainingRow]) -> None:
        self.model.zero_grad()
        self.max_tokens = max(max(len(row.matched) for row in rows), self.max_tokens // 2)
        self._passes = None
        torch.cuda.empty_cache()
        print(f"out of memory: going on with --max-tokens {self.max_tokens}", flush=True)

    # -- before the first update --------------------------------------------------------------------

    def settle(self) -> None:
        """What can only be known once the Trainer has prepared the model: whether rows may be packed, and what fits."""
        sample = [self.rows[i].matched.ids for i in range(min(2, len(self.rows)))]
        if self.packs:
            alike = packs_alike(self._callable, self.args.device, sample, tolerance=self.rounding)
            self.packs = bool(self.ranks.least(alike))
        if not self.measures_memory:
            return
        if self.is_deepspeed_enabled:  # a trial's backward pass would count as a micro-batch of the first update
            self.max_tokens = max(_DEEPSPEED_TOKENS, self.rows.max_length)
            return
        reserve = optimizer_bytes(self.model, sharded_over=self.ranks.world if self.ranks.sharded else 1)
        meter = CudaMeter(self.args.device)
        alone = not self.ranks.sharded
        tokens = tokens_that_fit(meter, self._try_rows, row=self.rows.max_length, reserve=reserve, alone=alone)
        self.model.zero_grad()
        torch.cuda.empty_cache()
        self.max_tokens = self.ranks.least(tokens)

    def _try_rows(self, rows: int) -> None:
        """A forward and backward pass over rows of the greatest length; all of each but one token is completion."""
        row = FILLER[0], np.zeros(self.rows.max_length - 1, dtype=np.int32)
        batch = (pack_sequences if self.packs else pad_sequences)([row] * rows).to(self.args.device)
        self._callable.train()
        self._begin_gradients()
        self._backward(token_logps(self._callable, batch).token_logps.sum() * 0.0, last=True)

    # -- one update ---------------------------------------------------------------------------------

    @property
    def _callable(self) -> Any:
        """What to call: a sharded model through its wrapper, else the model itself (see `Ranks.sum_gradients`)."""
        return self.model_wrapped if self.ranks.sharded else self.model

    def _gradients(
        self, rows: Sequence[TrainingRow], kl: Tensor, z0_tokens: Tokens
    ) -> tuple[BatchOutcome, Tensor | None]:
        """Backward passes over this rank's labelled rows; their gradients add up to this rank's part of the mean."""
        lengths = [len(row.matched) for row in rows]
        mine, passes = self.ranks.share(lengths, lambda part: len(self._cut([lengths[i] for i in part])))
        own = [rows[i] for i in mine]
        model, total = self._callable, len(rows)
        model.train()
        self._begin_gradients()
        experts = self._expert_counts(own, passes) if self.balances_experts else None
        logps = torch.empty(len(own), dtype=torch.float64, device=self.args.device)
        aux_loss = torch.zeros((), dtype=torch.float64, device=self.args.device) if experts else None
        tokens = z0_tokens
        for part, batch, last in self._labelled_passes(own, passes):
            scored = token_logps(model, batch, router_logits=self.balances_experts)
            if part:
                logps_part = sum_rows(scored.token_logps, batch.row_of_token, batch.rows)
                loss = self._losses([own[j] for j in part], logps_part, kl).sum() / total
                logps[part] = logps_part.detach()
                tokens += Tokens(batch.tokens, batch.tokens, batch.padded_tokens)
            else:
                loss = (
                    scored.token_logps.sum() * 0.0
                )  # takes part in what sharded ranks do together, and weighs nothing
            if part and experts is not None and aux_loss is not None:
                share = self._router_coefficient * router_balance_loss(scored.router_logits, batch.real, *experts)
                aux_loss, loss = aux_loss + share.detach(), loss + share
            if last:
                outcome = self._outcome(own, logps, kl, tokens)
                self._stop_if_not_finite(own, outcome)  # before DeepSpeed's last backward pass, which updates
            self._backward(loss * self.ranks.mean_to_sum, last)
        if not own and not passes:
            outcome = self._outcome(own, logps, kl, tokens)
        return outcome, aux_loss

    def _begin_gradients(self) -> None:
        for weight in self._in_place:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed takes its step inside of the backward pass that "synchronizes".
        self.accelerator.gradient_state._set_sync_gradients(last)
        self.accelerator.backward(loss)

    def _cut(self, lengths: Sequence[int]) -> list[list[int]]:
        if self.packs:
            return packed_batches(lengths, self.max_tokens)
        return micro_batches(lengths, self.max_tokens, pass_cost=GRADIENT_PASS_COST)

    def _labelled_passes(
        self, rows: Sequence[TrainingRow], at_least: int
    ) -> Iterator[tuple[list[int], Sequences, bool]]:
        """(positions into `rows`, their batch, whether it is the last); filler where other ranks make more passes."""
        parts = self._cut([len(row.matched) for row in rows])
        parts += [[]] * (at_least - len(parts))
        lay_out = pack_sequences if self.packs else pad_sequences
        for number, part in enumerate(parts):
            batch = lay_out([rows[j].matched.ids for j in part] or [FILLER])
            yield part, batch.to(self.args.device), number == len(parts) - 1

    def _reference_point(self, mismatched: Sequence[ScoredSequence]) -> tuple[Tensor, Tensor, Tokens]:
        """z0 over sequences of the whole batch: (kl, kl_raw, this rank's tokens)."""
        lengths = [len(sequence) for sequence in mismatched]
        mine, passes = self.ranks.share(lengths, lambda part: self._scoring().passes_for([lengths[i] for i in part]))
        own = [mismatched[i] for i in mine]
        logps, tokens = self._score(own, passes)
        kl, kl_raw = self._kl(own, logps, len(mismatched))
        return kl, kl_raw, tokens

    def _kl(self, mismatched: Sequence[ScoredSequence], logps: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """(kl, kl_raw) from this rank's part of `total` mismatched sequences."""
        logratios = logps - self._tensor([sequence.ref_logps for sequence in mismatched])
        return kl_reference_point(self.ranks.sum(logratios.sum()), total)

    def _score(self, sequences: Sequence[ScoredSequence], passes: int) -> tuple[Tensor, Tokens]:
        """`logps` under the current policy, float64, shape (sequences,), and what was run for them."""
        logps = torch.zeros(len(sequences), dtype=torch.float64, device=self.args.device)
        tokens = Tokens(0, 0, 0)
        for done in self._scoring().run([sequence.ids for sequence in sequences], at_least=passes):
            logps[done.indices] = sum_rows(done.token_logps, done.batch.row_of_token, done.batch.rows)
            scored = sum(len(sequences[i]) for i in done.indices)
            tokens += Tokens(scored, done.batch.tokens, done.batch.padded_tokens)
        return logps, tokens

    def score_tokens(self, sequences: Sequence[ScoredSequence]) -> list[np.ndarray]:
        """Per-token log-probs under the current policy, in eval mode: float32, one array for each sequence."""
        results: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        for done in self._scoring().run([sequence.ids for sequence in sequences]):
            pieces = done.token_logps.float().cpu().split([len(sequences[i].completion_ids) for i in done.indices])
            for i, piece in zip(done.indices, pieces, strict=True):
                results[i] = piece.numpy()
        return results

    def _scoring(self) -> ScoringPasses:
        """Made when the Trainer has wrapped the model; keeps what it learns about memory and shared prompts."""
        if self._passes is None:
            self._passes = self._new_passes()
        return self._passes

    def _new_passes(self) -> ScoringPasses:
        return ScoringPasses(
            self._callable,
            self.args.device,
            max_tokens=_SCORING_TOKENS * self.max_tokens,
            alone=not self.ranks.sharded,
            pack=self.packs,
            tolerance=self.rounding,
        )

    def _losses(self, rows: Sequence[TrainingRow], logps: Tensor, kl: Tensor) -> Tensor:
        """Loss of each row, shape (rows,)."""
        labels = self._labels(rows)
        weights = class_weights(labels, self.objective.desirable_weight, self.objective.undesirable_weight)
        logratios = logps - self._tensor([row.matched.ref_logps for row in rows])
        return kto_losses(logratios, labels, kl, beta=self.objective.beta, weights=weights)

    def _outcome(self, rows: Sequence[TrainingRow], logps: Tensor, kl: Tensor, tokens: Tokens) -> BatchOutcome:
        logratios = logps - self._tensor([row.matched.ref_logps for row in rows])
        return BatchOutcome(self._losses(rows, logps, kl), logratios, logps, self._labels(rows), kl, tokens)

    def _stop_if_not_finite(self, rows: Sequence[TrainingRow], outcome: BatchOutcome) -> None:
        finite = outcome.logratios.isfinite() & outcome.losses.isfinite() & outcome.kl.isfinite()
        if bool(finite.all()):
            return
        bad = [row.row_id for row, good in zip(rows, finite.tolist(), strict=True) if not good]
        where = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise TrainingError(
            f"Step {self.state.global_step + 1}: the loss is not finite (row_id {where}). The run stopped before the "
            "update. Usual causes: a learning rate that is too high, or damaged weights; use --resume with the last checkpoint "
            "and a lower --learning-rate."
        )

    # -- mixture of experts -------------------------------------------------------------------------

    @property
    def _router_coefficient(self) -> float:
        return float(self.model.config.get_text_config().router_aux_loss_coef)

    @torch.no_grad()
    def _expert_counts(self, rows: Sequence[TrainingRow], passes: int) -> tuple[Tensor, Tensor]:
        """Slots of each expert over the whole batch, and all slots: what makes the shares add up."""
        config = self.model.config.get_text_config()
        slots = self._tensor(0.0)
        counts = slots.repeat(getattr(config, "num_local_experts", None) or config.num_experts)
        for part, batch, _ in self._labelled_passes(rows, passes):
            router_logits = token_logps(self._callable, batch, router_logits=True).router_logits
            if part:
                counts = counts + count_routed_tokens(router_logits, batch.real, config.num_experts_per_tok)
                slots = slots + batch.real.sum() * len(router_logits)
        return self.ranks.sum(counts), self.ranks.sum(slots)

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out metrics from cached references: one z0 and one mean over all held-out rows."""
        if self.eval_data is None:
            raise TrainingError("No held-out rows: give --eval-fraction or --eval-cache.")
        cache, indices = self.eval_data
        rows = [cache[RowKey(i, 0)] for i in indices]
        # A row's two sequences begin with the same prompt: one rank scores both, and runs the prompt once.
        pairs = [(len(row.matched), len(row.mismatched)) for row in rows]
        mine, passes = self.ranks.share(
            [sum(pair) for pair in pairs],
            lambda part: self._scoring().passes_for([length for i in part for length in pairs[i]]),
        )
        own = [rows[i] for i in mine]
        logps, tokens = self._score([r.matched for r in own] + [r.mismatched for r in own], passes)
        kl, kl_raw = self._kl([row.mismatched for row in own], logps[len(own) :], len(rows))
        sums = self.ranks.sum(self._outcome(own, logps[: len(own)], kl, tokens).sums())
        found = {**metrics_from(sums, beta=self.objective.beta), "kl": float(kl), "kl_raw": float(kl_raw)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- logging ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.updates:
            logs.update(self._window.metrics(self.ranks, beta=self.objective.beta))
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
            self._window = Window()
        super().log(logs, start_time)

    # -- tensors ------------------------------------------------------------------------------------

    def _labels(self, rows: Sequence[TrainingRow]) -> Tensor:
        return torch.tensor([row.label for row in rows], dtype=torch.bool, device=self.args.device)

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.args.device)
