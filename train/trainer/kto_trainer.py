"""A thin `transformers.Trainer`: checkpoints, schedules and loggers are its; one update is ours.

batch             one update: rows of all ranks, dealt out by length
  reference pass  what the loss measures rows from, if it needs one: mismatched rows for z0; no gradient, eval mode
  loss pass       labelled rows in micro-batches; gradients add up to those of the whole batch
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.losses.metrics import BatchOutcome, Tokens
from offline_kto.kto_core.losses.preference_losses import kl_reference_point
from offline_kto.kto_core.losses.router_losses import count_routed_tokens, router_balance_loss
from offline_kto.kto_core.scoring.batching import GRADIENT_PASS_COST, micro_batches, packed_batches
from offline_kto.kto_core.scoring.head import add_gradients_in_place
from offline_kto.kto_core.scoring.logps import Batch, token_logps
from offline_kto.kto_core.scoring.passes import ScoringPasses, packs_alike
from offline_kto.kto_core.scoring.sequences import FILLER, Sequences, pack_sequences, pad_sequences, sum_rows
from offline_kto.train.data.batches import BatchLoader, EpochBatches
from offline_kto.train.data.cache_rows import CacheRows, RowKey, ScoredSequence, TrainingRow
from offline_kto.train.data.held_out import HeldOutRows
from offline_kto.train.model.saved_model import (
    ADAPTER_CONFIG,
    ModelWriter,
    check_adapters,
    load_weights,
    narrowed,
    not_finite,
)
from offline_kto.train.trainer.accumulators import ReferencePoint, RowLogratios, RunningShift, Window
from offline_kto.train.trainer.checkpoints import reading
from offline_kto.train.trainer.evaluation import Scores, held_out_metrics
from offline_kto.train.trainer.memory import CudaMeter, optimizer_bytes, peak_memory_mb, tokens_that_fit
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.ranks import Ranks
from offline_kto.train.trainer.saving import publish_checkpoint, remove_old_checkpoints, unfinished
from offline_kto.train.trainer.sharding import local_part, tie_again

# Without gradient nothing is kept for a backward pass, so a pass holds this many times the tokens.
_SCORING_TOKENS = 4

# Rows in memory at a time while they are evaluated.
_HELD_OUT_ROWS = 4096

# Where memory is not measured.
_DEEPSPEED_TOKENS = 8192

# Attention that reads the boundaries of sequences laid one behind the other, at no cost.
_PACKING_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class KTOTrainer(transformers.Trainer):
    """KTO from cached reference scores.

    Args:
        model: from `PolicyFiles.load`.
        args: without gradient accumulation; micro-batches are cut here.
        rows: the training cache.
        batches: optimizer batches, over all ranks.
        held_out: rows held out, or None.
        objective: the loss.
        max_tokens: padded tokens in one forward and backward pass; None to measure what fits (CUDA).
        rounding: nats a token by which two ways to compute the same score may differ.
        writer: of checkpoints' and the final model.
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
        writer: ModelWriter,
        held_out: HeldOutRows | None = None,
        **options: Any,
    ) -> None:
        use_cache = getattr(model.config, "use_cache", None)
        eval_dataset = held_out.cache if held_out else None
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=eval_dataset, **options)
        if use_cache is not None:
            # The Trainer switches it off in the configuration, which is saved; the scoring forward never uses a cache.
            model.config.use_cache = use_cache
        self.rows, self.batches, self.held_out = rows, batches, held_out
        self.objective, self.max_tokens, self.rounding = objective, max_tokens or rows.max_length, rounding
        self.measures_memory = max_tokens is None
        self.writer = writer
        self.balances_experts = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
        attention = getattr(model.config, "_attn_implementation", None)
        self.packs = args.device.type == "cuda" and attention in _PACKING_ATTENTION
        self.ranks = Ranks(self.accelerator, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._window, self.row_logratios = Window(), RowLogratios(len(rows))
        self.held_out_scores: Scores | None = None
        self._best_scores: Scores | None = None
        self.final_step = 0
        if objective.uses_shift:
            self.add_callback(RunningShift())
        self._passes: ScoringPasses | None = None
        self._saving_to: Path | None = None
        self._saving_as: torch.dtype | None = None
        self._loading_from = Path()
        self._last_rows: Sequence[TrainingRow] = ()
        self._in_place = [] if self.ranks.sharded else add_gradients_in_place(model)
        self.control: transformers.TrainerControl
        self.model: Any
        self.model_wrapped: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model, folder = self.accelerator.unwrap_model(self.model, keep_torch_compile=False), Path(output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = state_dict and tie_again(state_dict, model)
        self.writer.write(model, folder, state_dict=state_dict, dtype=self._saving_as)

    def save_in(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Save the model as it is to be used; called on every rank.

        Args:
            dtype: of its weights; None for their own.
        """
        self._saving_as = dtype
        try:
            self.save_model(str(folder))
        finally:
            self._saving_as = None

    # -- checkpoints --------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, into a folder that gets a checkpoint's name when all of it is on the disk."""
        out, main = Path(self.args.output_dir), self.is_world_process_zero()
        self.stop_if_weights_not_finite("checkpoint")
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
            self.row_logratios.save(checkpoint, self.ranks, main=main)
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._loading(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    @contextlib.contextmanager
    def _loading(self, checkpoint: str) -> Iterator[None]:
        self._loading_from = Path(checkpoint)
        with reading(self._loading_from):
            if (self._loading_from / ADAPTER_CONFIG).exists():
                check_adapters(self._loading_from, self.model)
            yield

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load the weights through `transformers` where the Trainer could not: it only knows names in memory.

        Files of a mixture of experts hold each expert by itself, the model in memory all of a layer in one tensor.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        without = {*tied, *(self.model._keys_to_ignore_on_save or ())}
        if load_result.unexpected_keys or set(load_result.missing_keys) - without:
            load_weights(self.model, self._loading_from, self.writer.trust_remote_code)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "optimizer.pt", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with reading(self._loading_from, TRAINER_STATE_NAME):
            super()._load_callback_state()

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
        """One batch: reference point, losses, gradients. Out of memory halves `max_tokens` and repeats what failed."""
        self._last_rows = rows = inputs
        reference = self._reference_point(rows)
        least = self.objective.rows_in_unit * max(len(row.matched) for row in rows)  # what cannot be cut
        while True:
            try:
                outcome, aux_loss = self._gradients(rows, reference)
                break
            except torch.OutOfMemoryError:
                # Gradients meet those of other ranks afterwards, so a rank mends this alone; but a sharded model's
                # ranks wait for each other within every pass.
                if self.ranks.sharded or self.max_tokens <= least:
                    raise
            self._halve_max_tokens(least)  # outside of `except`, whose traceback holds on to the tensors
        self.ranks.sum_gradients(self.model)
        self._window.add(outcome, reference, aux_loss)
        return outcome.losses.sum() * (self.ranks.world / len(rows))

    def _halve_max_tokens(self, least: int) -> None:
        self.model.zero_grad()
        self.max_tokens = max(least, self.max_tokens // 2)
        self._passes = None
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory: going on with --max-tokens {self.max_tokens}")  # above the live line

    # -- before the first update --------------------------------------------------------------------

    def prepare_to_score(self) -> None:
        """What the Trainer does to a model before it trains, for one that will only be scored with."""
        self.model_wrapped = self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self._check_precision()

    def _check_precision(self) -> None:
        """Check that passes run in the precision that the run promises, whatever prepared the model.

        Raises:
            TrainingError: without autocast, or under another one.
        """
        if self.ranks.sharded:  # has a policy of its own, see `prepare_sharding`
            return
        promised, kind = torch.bfloat16 if self.args.bf16 else torch.float32, self.args.device.type
        found: list[torch.dtype] = []

        def note(*_: Any) -> None:
            found.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            with torch.no_grad():
                token_logps(self._callable.eval(), pad_sequences([FILLER]).to(self.args.device))
        finally:
            hook.remove()
        if set(found) != {promised}:
            raise TrainingError(
                f"The policy computes in {', '.join(map(str, found))}, but --dtype promises {promised}: this version of "
                "accelerate prepares models in another way. Please report it, with the versions of torch, transformers and "
                "accelerate; --dtype float32 may work."
            )

    def settle(self) -> None:
        """What can only be known once the Trainer has prepared the model: whether rows may be packed, and what fits."""
        self._check_precision()
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

    def _gradients(self, rows: Sequence[TrainingRow], reference: ReferencePoint) -> tuple[BatchOutcome, Tensor | None]:
        """Backward passes over this rank's labelled rows; their gradients add up to this rank's part of the mean."""
        units = self._units(rows)
        mine, passes = self.ranks.share(
            [sum(len(row.matched) for row in unit) for unit in units],
            lambda part: len(self._cut([row for i in part for row in units[i]])),
        )
        own = [row for i in mine for row in units[i]]
        model, total = self._callable, len(rows)
        model.train()
        self._begin_gradients()
        experts = self._expert_counts(own, passes) if self.balances_experts else None
        logps, logratios = (torch.empty(len(own), dtype=torch.float64, device=self.args.device) for _ in range(2))
        aux_loss = torch.zeros((), dtype=torch.float64, device=self.args.device) if experts else None
        tokens = reference.tokens
        for part, batch, last in self._labelled_passes(own, passes):
            scored = token_logps(model, batch, router_logits=self.balances_experts)
            if part:
                part_rows = [own[j] for j in part]
                part_logps, part_logratios = self._row_scores(
                    [row.matched for row in part_rows], scored.token_logps, batch
                )
                loss = self._losses(part_rows, part_logratios, reference.point).sum() / total
                logps[part], logratios[part] = part_logps.detach(), part_logratios.detach()
                tokens += Tokens(batch.tokens, batch.tokens, batch.padded_tokens)
            else:
                loss = (
                    scored.token_logps.sum() * 0.0
                )  # takes part in what sharded ranks do together, and weighs nothing
            if part and experts is not None and aux_loss is not None:
                share = self._router_coefficient * router_balance_loss(scored.router_logits, batch.real, *experts)
                aux_loss, loss = aux_loss + share.detach(), loss + share
            if last:
                outcome = self._outcome(own, logps, logratios, reference.point, tokens)
                self._stop_if_not_finite(own, outcome)  # before DeepSpeed's last backward pass, which updates
            self._backward(loss * self.ranks.mean_to_sum, last)
        if not own and not passes:
            outcome = self._outcome(own, logps, logratios, reference.point, tokens)
        return outcome, aux_loss

    def _begin_gradients(self) -> None:
        for weight in self._in_place:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed takes its step inside of the backward pass that "synchronizes".
        self.accelerator.gradient_state._set_sync_gradients(last)
        self.accelerator.backward(loss)

    def _units(self, rows: Sequence[TrainingRow]) -> list[Sequence[TrainingRow]]:
        """Rows that share a loss: single ones, or the two of a pair, which stand side by side."""
        size = self.objective.rows_in_unit
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _cut(self, rows: Sequence[TrainingRow]) -> list[list[int]]:
        """Positions into `rows` for each micro-batch; units stay whole."""
        size = self.objective.rows_in_unit
        lengths = [[len(row.matched) for row in unit] for unit in self._units(rows)]
        if self.packs:
            parts = packed_batches([sum(unit) for unit in lengths], self.max_tokens)
        else:
            budget = max(1, self.max_tokens // size)
            parts = micro_batches([max(unit) for unit in lengths], budget, pass_cost=GRADIENT_PASS_COST)
        return [[unit * size + k for unit in part for k in range(size)] for part in parts]

    def _labelled_passes(
        self, rows: Sequence[TrainingRow], at_least: int
    ) -> Iterator[tuple[list[int], Sequences, bool]]:
        """(positions into `rows`, their batch, whether it is the last); filler where other ranks make more passes."""
        parts = self._cut(rows)
        parts += [[]] * (at_least - len(parts))
        lay_out = pack_sequences if self.packs else pad_sequences
        for number, part in enumerate(parts):
            batch = lay_out([rows[j].matched.ids for j in part] or [FILLER])
            yield part, batch.to(self.args.device), number == len(parts) - 1

    # -- scoring without gradient -------------------------------------------------------------------

    def _reference_point(self, rows: Sequence[TrainingRow]) -> ReferencePoint:
        """What the loss measures this batch's rows from, over all ranks."""
        if self.objective.uses_kl:
            logratio_sum, tokens = self._logratio_sum([row.mismatched for row in rows])
            kl, kl_raw = kl_reference_point(logratio_sum, len(rows))
            return ReferencePoint(kl, {"kl": kl, "kl_raw": kl_raw}, tokens)
        if self.objective.uses_shift:
            logratio_sum, tokens = self._logratio_sum([row.matched for row in rows])
            point = self.shift.after(logratio_sum / len(rows))
            return ReferencePoint(point, {"reward_shift": self.objective.beta * point}, tokens)
        return ReferencePoint(self._tensor(0.0), {}, Tokens(0, 0, 0))

    @property
    def shift(self) -> RunningShift:
        """BCO's running mean."""
        # Looked up, not kept: --resume puts another object in its place.
        return next(one for one in self.callback_handler.callbacks if isinstance(one, RunningShift))

    def _logratio_sum(self, sequences: Sequence[ScoredSequence]) -> tuple[Tensor, Tokens]:
        """Sum of log-ratios over sequences of the whole batch, and this rank's tokens."""
        lengths = [len(sequence) for sequence in sequences]
        mine, passes = self.ranks.share(lengths, lambda part: self._scoring().passes_for([lengths[i] for i in part]))
        _, logratios, tokens = self._score([sequences[i] for i in mine], passes)
        return self.ranks.sum(logratios.sum()), tokens

    def _score(self, sequences: Sequence[ScoredSequence], passes: int) -> tuple[Tensor, Tensor, Tokens]:
        """`logps` and log-ratios under the current policy, float64, shape (sequences,), and what was run for them."""
        logps, logratios = (torch.zeros(len(sequences), dtype=torch.float64, device=self.args.device) for _ in range(2))
        tokens = Tokens(0, 0, 0)
        for done in self._scoring().run([sequence.ids for sequence in sequences], at_least=passes):
            part = [sequences[i] for i in done.indices]
            logps[done.indices], logratios[done.indices] = self._row_scores(part, done.token_logps, done.batch)
            tokens += Tokens(sum(map(len, part)), done.batch.tokens, done.batch.padded_tokens)
        return logps, logratios, tokens

    def _row_scores(
        self, sequences: Sequence[ScoredSequence], policy_token_logps: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """`logps` and log-ratios of a micro-batch's rows, float64, shape (rows,)."""
        logps = sum_rows(policy_token_logps, batch.row_of_token, batch.rows)
        if not self.objective.limits_tokens:
            return logps, logps - self._tensor([sequence.ref_logps for sequence in sequences])
        ref_token_logps = self._tensor(np.concatenate([sequence.ref_token_logps for sequence in sequences]))
        token_logratios = self.objective.limited(policy_token_logps.double() - ref_token_logps)
        return logps, sum_rows(token_logratios, batch.row_of_token, batch.rows)

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

    def _losses(self, rows: Sequence[TrainingRow], logratios: Tensor, point: Tensor) -> Tensor:
        """Loss of each row, shape (rows,)."""
        tokens = self._tensor([len(row.matched.completion_ids) for row in rows])
        return self.objective.losses(logratios, self._labels(rows), tokens, point)

    def _outcome(
        self, rows: Sequence[TrainingRow], logps: Tensor, logratios: Tensor, point: Tensor, tokens: Tokens
    ) -> BatchOutcome:
        self.row_logratios.add([row.index for row in rows], logratios, self.state.global_step)
        losses, midpoints = self._losses(rows, logratios, point), self.objective.midpoints(logratios, point)
        return BatchOutcome(losses, logratios, logps, self._labels(rows), midpoints, tokens)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's, before each update; one that is not finite would spoil all weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise TrainingError(
                f"Step {self.state.global_step + 1}: the gradients are not finite. {self._where_it_broke()} Nothing of this "
                "update is saved."
            )
        return norm

    def stop_if_weights_not_finite(self, what: str) -> None:
        """Check what is about to be saved: every trained weight, and a score of a row; called on every rank.

        Args:
            what: is about to be saved, for the message.

        Raises:
            TrainingError: a weight, an optimizer's state or the score is not finite.
        """
        weights = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        bad = not_finite({name: local_part(one) for name, one in weights.items()})
        found = f"{len(bad)} of {len(weights)} trained weights are not finite ({bad[0]}, ...)" if bad else ""
        if not found and (states := not_finite(self._optimizer_state())):
            found = f"the optimizer's state is not finite ({states[0]})"
        if not found and self.held_out_scores is not None and not self.held_out_scores.logps.isfinite().all():
            found = "log-probabilities of held-out rows are not finite"
        if not self.ranks.any(bool(found)):
            if self._scores_are_finite():
                return
            found = "the trained weights are so large that log-probabilities are not finite"
        raise TrainingError(
            f"Step {self.state.global_step}: {found or 'the weights of another process are not finite'}. "
            f"{self._where_it_broke()} The {what} is not saved."
        )

    def _optimizer_state(self) -> dict[str, Tensor]:
        states = getattr(self.optimizer, "state", None) or {}
        return {
            f"{name} of tensor {number}": local_part(value)
            for number, state in enumerate(states.values())
            if isinstance(state, dict)
            for name, value in state.items()
            if torch.is_tensor(value)
        }

    @torch.no_grad()
    def _scores_are_finite(self) -> bool:
        """Whether the shortest row of the last batch still has a score: finite weights may be too large to compute with."""
        if not self._last_rows:
            return True
        row = min(self._last_rows, key=lambda row: len(row.matched))
        model = self._callable
        model.eval()
        batch = pad_sequences([row.matched.ids]).to(self.args.device)
        return not self.ranks.any(not token_logps(model, batch).token_logps.isfinite().all())

    def _where_it_broke(self) -> str:
        ids = [row.row_id for row in self._last_rows]
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        return (
            f"--learning-rate {self.args.learning_rate:g}; row_id of the last batch: {', '.join(ids[:5])}{more}. Usual causes: "
            "a learning rate that is too high, or damaged weights. Use a lower --learning-rate; --resume goes on from the "
            "last checkpoint of a run."
        )

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Give the trained weights the values that they will have once they are saved in `dtype`.

        What is evaluated afterwards is the model that is saved. Called on every rank.

        Raises:
            TrainingError: a value that the type cannot hold.
        """
        keep = self.writer.keeps(self.model)
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and name not in keep:
                part = local_part(weight)
                part.copy_(narrowed(name, part, dtype))
        self.held_out_scores = None

    def _stop_if_not_finite(self, rows: Sequence[TrainingRow], outcome: BatchOutcome) -> None:
        finite = outcome.logratios.isfinite() & outcome.losses.isfinite() & outcome.point.isfinite()
        if bool(finite.all()):
            return
        bad = [row.row_id for row, good in zip(rows, finite.tolist(), strict=True) if not good]
        where = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise TrainingError(
            f"Step {self.state.global_step + 1}: the loss is not finite (row_id {where}). The run stopped before the "
            "update. Usual causes: a learning rate that is too high, or damaged weights. Use a lower --learning-rate; --resume "
            "goes on from the last checkpoint of a run."
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
        if self.held_out is None:
            raise TrainingError("No held-out rows: give --eval-fraction or --eval-cache.")
        self.held_out_scores = scores = self._score_held_out(self.held_out)
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in held_out_metrics(scores, self.objective).items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self._best_scores = self.held_out_scores
            self.control.should_save = self.args.save_strategy != "no"  # the best checkpoint is kept
        return best

    def load_best(self) -> None:
        """Put the best checkpoint's weights in place of the last ones."""
        if self.state.best_model_checkpoint is None:
            return
        self._load_best_model()
        self.final_step, self.held_out_scores = int(self.state.best_global_step or 0), self._best_scores
        if self.objective.uses_shift:
            path = Path(self.state.best_model_checkpoint) / TRAINER_STATE_NAME
            self.shift.begin_at(**json.loads(path.read_text())["stateful_callbacks"][RunningShift.__name__]["args"])

    def final_scores(self) -> Scores | None:
        """Held-out scores of the model as it is now, after `final_step` updates; called on every rank."""
        self.final_step = self.final_step or int(self.state.global_step)
        if self.held_out is not None and self.held_out_scores is None:
            self.held_out_scores = self._score_held_out(self.held_out)
        return self.held_out_scores

    def _score_held_out(self, held_out: HeldOutRows) -> Scores:
        """Every held-out row's scores, on every rank."""
        indices, tokens = held_out.indices, []
        scores = torch.empty(3, len(indices), dtype=torch.float64)
        for start in range(0, len(indices), _HELD_OUT_ROWS):
            rows = [held_out.cache[RowKey(i, 0)] for i in indices[start : start + _HELD_OUT_ROWS]]
            scores[:, start : start + len(rows)] = self._score_rows(rows)
            tokens += [len(row.matched.completion_ids) for row in rows]
        logps, matched, mismatched = scores
        return Scores(
            prompt_ids=[held_out.cache.prompt_ids[i] for i in indices],
            labels=torch.from_numpy(held_out.cache.labels[indices]),
            tokens=torch.tensor(tokens, dtype=torch.float64),
            logps=logps,
            logratios=matched,
            kl_logratios=mismatched if self.objective.uses_kl else None,
            shift=self.shift.mean if self.objective.uses_shift else None,
        )

    def _score_rows(self, rows: Sequence[TrainingRow]) -> Tensor:
        """`logps`, log-ratios and, where the loss has a z0, those of mismatched completions: float64, shape (3, rows)."""
        with_kl = self.objective.uses_kl
        # A row's two sequences begin with the same prompt: one rank scores both, and runs the prompt once.
        sequences = [[row.matched, row.mismatched] if with_kl else [row.matched] for row in rows]
        lengths = [[len(sequence) for sequence in of_row] for of_row in sequences]
        mine, passes = self.ranks.share(
            [sum(of_row) for of_row in lengths],
            lambda part: self._scoring().passes_for([length for i in part for length in lengths[i]]),
        )
        logps, logratios, _ = self._score([sequence for i in mine for sequence in sequences[i]], passes)
        per_row = 1 + with_kl
        everywhere = torch.zeros(3, len(rows), dtype=torch.float64, device=self.args.device)
        everywhere[0, mine], everywhere[1, mine] = logps[::per_row], logratios[::per_row]
        if with_kl:
            everywhere[2, mine] = logratios[1::2]
        return self.ranks.sum(everywhere).cpu()

    # -- logging ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.updates:
            logs.update(self._window.metrics(self.ranks, beta=self.objective.beta))
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
            self.row_logratios.settle()
            self._window = Window()
        super().log(logs, start_time)

    # -- tensors ------------------------------------------------------------------------------------

    def _labels(self, rows: Sequence[TrainingRow]) -> Tensor:
        return torch.tensor([row.label for row in rows], dtype=torch.bool, device=self.args.device)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=self.args.device)
