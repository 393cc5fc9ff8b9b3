"""A thin `transformers.Trainer`: checkpoints, schedules and loggers are its; one update is ours.

batch          one update: this rank's rows
  z0 pass      mismatched rows, no gradient, eval mode, mean over all ranks, clamped once
  loss pass    labelled rows in micro-batches; gradients add up to those of the whole batch
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from kto_core.batching import micro_batches
from kto_core.errors import TrainingError
from kto_core.logps import Sequences, pad_sequences, sum_rows, token_logps
from kto_core.losses import (
    class_weights,
    count_routed_tokens,
    kl_reference_point,
    kto_losses,
    router_balance_loss,
)
from kto_core.metrics import BatchOutcome, metrics_from, tokens_of
from train.cache_rows import BatchLoader, CacheRows, EpochBatches, RowKey, ScoredSequence, TrainingRow


@dataclass(frozen=True)
class Objective:
    """The hyperparameters of the loss."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


@dataclass
class _Window:
    """What was added up since the last log."""

    sums: Tensor | None = None
    kl: Tensor | float = 0.0
    kl_raw: Tensor | float = 0.0
    aux_loss: Tensor | float | None = None
    updates: int = 0
    started: float = 0.0

    def add(self, outcome: BatchOutcome, kl_raw: Tensor, aux_loss: Tensor | None) -> None:
        sums = outcome.sums()
        self.sums = sums if self.sums is None else self.sums + sums
        self.kl, self.kl_raw = self.kl + outcome.kl, self.kl_raw + kl_raw
        if aux_loss is not None:
            self.aux_loss = aux_loss + (self.aux_loss or 0.0)
        self.updates += 1


class KTOTrainer(transformers.Trainer):
    """KTO from cached reference scores.

    Args:
        model: from `PolicyFiles.load`.
        args: with `per_device_train_batch_size` rows per rank and no gradient accumulation.
        rows: the training cache.
        train_rows: rows of it to train on.
        batches: optimizer batches of this rank.
        eval_data: (cache, rows) held out, or None.
        objective: hyperparameters of the loss.
        max_tokens: padded tokens in one forward and backward pass.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: transformers.TrainingArguments,
        rows: CacheRows,
        batches: EpochBatches,
        objective: Objective,
        max_tokens: int,
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
        self.objective, self.max_tokens = objective, max_tokens
        self.balances_experts = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
        self._window = _Window(started=time.monotonic())
        self.control: transformers.TrainerControl

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
        """One batch: z0, losses, gradients. Out of memory halves `max_tokens` and repeats it."""
        while True:
            try:
                return self._batch_gradients(model, inputs)
            except torch.OutOfMemoryError:
                self._halve_max_tokens(inputs)
            model.zero_grad()

    def _halve_max_tokens(self, rows: Sequence[TrainingRow]) -> None:
        longest = max(max(len(row.matched), len(row.mismatched)) for row in rows)
        if self.max_tokens <= longest or self.accelerator.num_processes > 1:
            raise TrainingError(
                f"Out of memory with --max-tokens {self.max_tokens} (longest row: {longest} tokens). Use a smaller "
                "--max-tokens or --max-length, --gradient-checkpointing or --lora-rank 16."
            )
        self.max_tokens = max(longest, self.max_tokens // 2)
        torch.cuda.empty_cache()
        print(f"out of memory: going on with --max-tokens {self.max_tokens}", flush=True)

    # -- one update ---------------------------------------------------------------------------------

    def _batch_gradients(self, model: Any, rows: Sequence[TrainingRow]) -> Tensor:
        counted = [row for row in rows if row.counted]
        kl, kl_raw, total, tokens = self._reference_point(counted)
        model.train()
        experts = self._expert_counts(counted) if self.balances_experts else None
        parts = self._micro_batches([row.matched for row in rows])
        logps = torch.empty(len(rows), dtype=torch.float64, device=self.args.device)
        aux_loss = torch.zeros((), dtype=torch.float64, device=self.args.device) if experts else None
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            batch = self._padded([rows[j].matched for j in part])
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                scored = token_logps(model, batch, router_logits=self.balances_experts)
                part_logps = sum_rows(scored.token_logps, batch.completion_mask)
                loss = self._part_loss([rows[j] for j in part], part_logps, kl, total)
                if experts is not None and aux_loss is not None:
                    share = self._router_coefficient * router_balance_loss(
                        scored.router_logits, _real(batch, [rows[j].matched for j in part]), *experts
                    )
                    share = share * bool(counted)  # filler rows weigh nothing here either
                    aux_loss, loss = aux_loss + share.detach(), loss + share
                # DDP averages gradients over ranks; ours are shares of one mean over all of them.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            logps[part] = part_logps.detach()
            tokens = tokens[0] + sum(len(rows[j].matched) for j in part), tokens[1] + batch.input_ids.numel()
        outcome = self._outcome(counted, logps[: len(counted)], kl, tokens)
        self._stop_if_not_finite(counted, outcome)
        self._window.add(outcome, kl_raw, aux_loss)
        return outcome.losses.sum() * (self.accelerator.num_processes / total)

    def _reference_point(self, rows: Sequence[TrainingRow]) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
        """z0 of the whole batch: (kl, kl_raw, rows over all ranks, (tokens, padded tokens))."""
        logps, tokens = self.score([row.mismatched for row in rows])
        ref = self._tensor([row.mismatched.ref_logps for row in rows])
        sums = torch.stack([(logps - ref).sum(), self._tensor(float(len(rows)))])
        sums = self.accelerator.reduce(sums, reduction="sum")
        kl, kl_raw = kl_reference_point(sums[0], sums[1])
        return kl, kl_raw, int(sums[1]), tokens

    @torch.no_grad()
    def score(self, sequences: Sequence[ScoredSequence]) -> tuple[Tensor, tuple[int, int]]:
        """`logps` under the current policy, in eval mode: (float64, shape (sequences,); tokens and padded tokens)."""
        logps = torch.zeros(len(sequences), dtype=torch.float64, device=self.args.device)
        tokens = padded = 0
        for part, batch, flat in self._forward(sequences):
            logps[part] = sum_rows(flat, batch.completion_mask)
            tokens += sum(len(sequences[i]) for i in part)
            padded += batch.input_ids.numel()
        return logps, (tokens, padded)

    @torch.no_grad()
    def score_tokens(self, sequences: Sequence[ScoredSequence]) -> list[np.ndarray]:
        """Per-token log-probs under the current policy, in eval mode: float32, one array for each sequence."""
        results: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        for part, _, flat in self._forward(sequences):
            pieces = flat.float().cpu().split([len(sequences[i].completion_ids) for i in part])
            for i, piece in zip(part, pieces, strict=True):
                results[i] = piece.numpy()
        return results

    def _forward(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[list[int], Sequences, Tensor]]:
        # After from_pretrained a model is in eval mode for the first batch only; this pass says what it needs.
        self.model.eval()
        for part in self._micro_batches(sequences):
            batch = self._padded([sequences[i] for i in part])
            yield part, batch, token_logps(self.model, batch).token_logps

    def _part_loss(self, rows: Sequence[TrainingRow], logps: Tensor, kl: Tensor, total: int) -> Tensor:
        """This micro-batch's share of the mean over the whole batch; filler rows weigh nothing."""
        labels = self._labels(rows)
        weights = class_weights(labels, self.objective.desirable_weight, self.objective.undesirable_weight)
        weights = weights * self._tensor([float(row.counted) for row in rows])
        logratios = logps - self._tensor([row.matched.ref_logps for row in rows])
        return kto_losses(logratios, labels, kl, beta=self.objective.beta, weights=weights).sum() / total

    def _outcome(self, rows: Sequence[TrainingRow], logps: Tensor, kl: Tensor, tokens: tuple[int, int]) -> BatchOutcome:
        labels = self._labels(rows)
        weights = class_weights(labels, self.objective.desirable_weight, self.objective.undesirable_weight)
        logratios = logps - self._tensor([row.matched.ref_logps for row in rows])
        losses = kto_losses(logratios, labels, kl, beta=self.objective.beta, weights=weights)
        return BatchOutcome(losses, logratios, logps, labels, kl, *tokens)

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
    def _expert_counts(self, rows: Sequence[TrainingRow]) -> tuple[Tensor, Tensor]:
        """Slots of each expert over the whole batch, and all slots: what makes the shares add up."""
        config = self.model.config.get_text_config()
        counts = slots = self._tensor(0.0)
        for part in self._micro_batches([row.matched for row in rows]):
            sequences = [rows[j].matched for j in part]
            batch = self._padded(sequences)
            router_logits = token_logps(self.model, batch, router_logits=True).router_logits
            mask = _real(batch, sequences)
            counts = counts + count_routed_tokens(router_logits, mask, config.num_experts_per_tok)
            slots = slots + mask.sum() * len(router_logits)
        counts = self.accelerator.reduce(counts, reduction="sum")
        return counts, self.accelerator.reduce(slots, reduction="sum")

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
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = [cache[RowKey(i, 0)] for i in indices[rank::world]]
        kl, kl_raw, _, kl_tokens = self._reference_point(rows)
        logps, tokens = self.score([row.matched for row in rows])
        both = kl_tokens[0] + tokens[0], kl_tokens[1] + tokens[1]
        sums = self.accelerator.reduce(self._outcome(rows, logps, kl, both).sums(), reduction="sum")
        found = {**metrics_from(sums, beta=self.objective.beta), "kl": float(kl), "kl_raw": float(kl_raw)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- logging ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        window = self._window
        if "loss" in logs and window.sums is not None:
            sums = self.accelerator.reduce(window.sums, reduction="sum")
            seconds = time.monotonic() - window.started
            logs.update(metrics_from(sums, beta=self.objective.beta))
            logs["kl"] = float(window.kl) / window.updates
            logs["kl_raw"] = float(window.kl_raw) / window.updates
            if window.aux_loss is not None:
                logs["aux_loss"] = float(self.accelerator.reduce(window.aux_loss, reduction="sum")) / window.updates
            logs["tokens_per_second"] = tokens_of(sums) / seconds
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
            self._window = _Window(started=time.monotonic())
        super().log(logs, start_time)

    # -- tensors ------------------------------------------------------------------------------------

    def _micro_batches(self, sequences: Sequence[ScoredSequence]) -> list[list[int]]:
        return micro_batches([len(s) for s in sequences], self.max_tokens)

    def _padded(self, sequences: Sequence[ScoredSequence]) -> Sequences:
        return pad_sequences([(s.prompt_ids, s.completion_ids) for s in sequences]).to(self.args.device)

    def _labels(self, rows: Sequence[TrainingRow]) -> Tensor:
        return torch.tensor([row.label for row in rows], dtype=torch.bool, device=self.args.device)

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.args.device)


def _real(batch: Sequences, sequences: Sequence[ScoredSequence]) -> Tensor:
    """Mask of tokens that are not padding, shape (batch, length)."""
    lengths = torch.from_numpy(np.array([len(s) for s in sequences])).to(batch.input_ids.device)
    return torch.arange(batch.input_ids.shape[1], device=lengths.device)[None, :] < lengths[:, None]


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, MB: of the allocator on CUDA, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
