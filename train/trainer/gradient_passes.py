"""Run the backward passes over one batch's labelled rows; their gradients add up to those of the whole batch.

unit         rows that share a loss: one row, or the two of a pair
micro-batch  units that fit into --max-tokens: one forward and backward pass
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import accelerate
import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.losses.metrics import BatchOutcome, Tokens
from offline_kto.kto_core.losses.preference_losses import sft_losses
from offline_kto.kto_core.losses.router_losses import count_routed_tokens, router_balance_loss
from offline_kto.kto_core.out_of_memory import one_memory_error
from offline_kto.kto_core.scoring.batching import GRADIENT_PASS_COST, micro_batches, packed_batches
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.output_layer import add_gradients_in_place
from offline_kto.kto_core.scoring.sequences import FILLER, Sequences, tokens_of_shared
from offline_kto.train.data.cache_rows import TrainingRow, total_mass
from offline_kto.train.trainer.finite_checks import check_losses
from offline_kto.train.trainer.gradient_sums import GradientSums
from offline_kto.train.trainer.memory import Budget, Meter, optimizer_bytes, tokens_that_fit
from offline_kto.train.trainer.objective import Objective, RowScores
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.prompt_sharing import PromptSharing
from offline_kto.train.trainer.reference_point import ReferencePoint
from offline_kto.train.trainer.update_inputs import RowFacts, UpdateInputs


class RankResult(NamedTuple):
    """The results of one rank other than its gradients.

    Attributes:
        rows: its part of the batch.
        outcome: of these rows.
        aux_loss: its part of the router loss; None without one.
    """

    rows: Sequence[TrainingRow]
    outcome: BatchOutcome
    aux_loss: Tensor | None


class GradientPasses:
    """The forward and backward passes over one batch.

    Args:
        policy: the model and its token budget.
        objective: the loss.
        accelerator: accelerate's, which scales and counts backward passes.
    """

    def __init__(self, policy: PreparedPolicy, objective: Objective, accelerator: accelerate.Accelerator) -> None:
        self.policy, self.objective, self.accelerator = policy, objective, accelerator
        # DeepSpeed updates the weights in the last backward pass.
        self._updates_in_backward = accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED
        self._in_place = [] if policy.ranks.sharded else add_gradients_in_place(policy.model)
        self._balance: _RouterBalance | None = None
        self._balances_experts = bool(getattr(policy.model.config.get_text_config(), "output_router_logits", False))
        self._sharing = PromptSharing(policy, may_try=not self._updates_in_backward)
        self._shares = False  # whether the rows of this update share prompts

    def run(self, rows: Sequence[TrainingRow], reference: ReferencePoint, *, step: int) -> RankResult:
        """Compute the gradients of the batch's mean loss, summed over unsharded ranks.

        Out of memory halves the token budget, and all passes of this rank are repeated.

        Args:
            rows: the whole batch, of all ranks; this rank runs its part.
            reference: the point that the loss measures the rows from.
            step: number of the update, for messages.

        Raises:
            torch.OutOfMemoryError: on a single unit, or on a sharded model.
            TrainingError: a loss is not finite.
        """
        policy, size = self.policy, self.objective.rows_in_unit
        self._shares = size > 1 and self._sharing.decide(
            [[row.matched.ids for row in unit] for unit in self._units(rows)]
        )
        # A unit cannot be split.
        least = (
            max(map(self._tokens, self._units(rows))) if self._shares else size * max(len(row.matched) for row in rows)
        )
        sums = policy.ranks.gradient_sums(policy.model, unannounced=self._in_place)
        self._balance = None
        while True:
            try:
                with one_memory_error():
                    result = self._run(rows, reference, sums, step=step)
                    sums.finish()
                    return result
            except torch.OutOfMemoryError:
                # An unsharded rank can repeat its passes alone, see `gradient_sums.py`. The ranks of a sharded model wait
                # for each other within every pass.
                if policy.ranks.sharded or policy.max_tokens <= least:
                    raise
            sums.begin_again()  # outside `except`, whose traceback keeps the tensors alive
            policy.halve_max_tokens(least)

    def measure_max_tokens(self, meter: Meter, *, longest: int, of_matrix: Callable[[torch.dtype], float]) -> Budget:
        """Return how many tokens of one pass fit into memory, agreed between sharded ranks; gradients are cleared.

        Args:
            longest: tokens in the longest row.
            of_matrix: bytes that the optimizer keeps of a value, see `optimizer_bytes`.
        """
        ranks, model = self.policy.ranks, self.policy.model
        reserve = optimizer_bytes(model, sharded_over=ranks.world if ranks.sharded else 1, of_matrix=of_matrix)
        row = longest if self.policy.packs else self.policy.widths.of(longest)
        fit = functools.partial(tokens_that_fit, meter, row=row, reserve=reserve, alone=not ranks.sharded)
        # Scoring runs while there are no gradients, but they may stay allocated.
        tokens, scoring = (
            fit(lambda rows: self.try_rows(rows, longest)),
            fit(lambda rows: self.score_rows(rows, longest)),
        )
        model.zero_grad()
        torch.cuda.empty_cache()
        return Budget(ranks.least(tokens), ranks.least(scoring))

    def try_rows(self, rows: int, length: int) -> None:
        """Run a forward and backward pass over rows of one length; every token but one belongs to the completion."""
        with one_memory_error():
            batch = self._rows_of(rows, length)
            self._train()
            self._begin_gradients()
            self.backward(token_logps(self.policy.scoring_model, batch).token_logps.sum() * 0.0, last=True)

    @torch.no_grad()
    def score_rows(self, rows: int, length: int) -> None:
        """Run a forward pass without gradients over such rows."""
        batch = self._rows_of(rows, length)
        self.policy.scoring_model.eval()
        token_logps(self.policy.scoring_model, batch)

    def _rows_of(self, rows: int, length: int) -> Sequences:
        return self.policy.lay_out([(FILLER[0], np.zeros(length - 1, dtype=np.int32))] * rows).to(self.policy.device)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a loss's gradients to the existing ones.

        Args:
            last: whether it is the update's last pass. DeepSpeed applies the optimizer step in
                the backward pass with `sync_gradients`.
        """
        self.accelerator.gradient_state._set_sync_gradients(last)
        self.accelerator.backward(loss)

    def _run(
        self, rows: Sequence[TrainingRow], reference: ReferencePoint, sums: GradientSums, *, step: int
    ) -> RankResult:
        policy, total = self.policy, total_mass(rows)
        own, passes = self._share(rows)
        self._train()
        self._begin_gradients()
        parts = self._cut(own)
        parts += [[]] * (passes - len(parts))  # other ranks run more
        inputs = UpdateInputs(own, parts, policy=policy, objective=self.objective, share=self._shares)
        if self._balances_experts and self._balance is None:  # all ranks count once, also if one repeats its passes
            self._balance = self._router_balance(inputs)
        shape = self.objective.scores_per_row, len(own)
        scores = RowScores(torch.empty(shape, dtype=torch.float64, device=policy.device))
        aux_loss, tokens = policy.zero(), reference.tokens
        for micro_batch, last in inputs.micro_batches():
            batch = micro_batch.batch
            scored = token_logps(policy.scoring_model, batch, router_logits=self._balances_experts)
            if micro_batch.part:
                of_part = self.objective.row_scores(micro_batch.reference, scored.token_logps, batch)
                loss = self._losses(micro_batch.facts, of_part, reference.point).sum() / total
                scores.values.index_copy_(1, micro_batch.where, of_part.values.detach())
                of_rows = sum(len(own[i].matched) for i in micro_batch.part)
                tokens += Tokens(of_rows, batch.tokens, batch.padded_tokens)
            else:  # joins the collective operations of sharded ranks, with weight zero
                loss = scored.token_logps.sum() * 0.0
            if micro_batch.part and self._balance is not None:
                share = self._balance.share(scored.router_logits, batch.real)
                aux_loss, loss = aux_loss + share.detach(), loss + share
            if last:
                outcome = self._outcome(inputs.facts, scores, reference.point, tokens)
                if self._updates_in_backward:
                    check_losses(own, outcome, step=step)
            if loss.requires_grad:  # not if all gradients were sent before memory ran out
                with sums.sent_early() if last else contextlib.nullcontext():
                    self.backward(loss * policy.ranks.mean_to_sum, last=last)
        if not parts:
            outcome = self._outcome(inputs.facts, scores, reference.point, tokens)
        return RankResult(own, outcome, aux_loss if self._balances_experts else None)

    def _train(self) -> None:
        # Setting the mode takes a walk through all modules.
        if not self.policy.scoring_model.training:
            self.policy.scoring_model.train()

    def _begin_gradients(self) -> None:
        for weight in self._in_place:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _share(self, rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], int]:
        """Return this rank's rows of a batch, and the least number of passes it must run."""
        units = self._units(rows)
        mine, passes = self.policy.ranks.share(
            [*map(self._tokens, units)],
            lambda part: len(self._cut([row for i in part for row in units[i]])),
        )
        return [row for i in mine for row in units[i]], passes

    def _units(self, rows: Sequence[TrainingRow]) -> list[Sequence[TrainingRow]]:
        """Return the rows grouped by shared loss: single rows, or the two neighbouring rows of a pair."""
        size = self.objective.rows_in_unit
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _tokens(self, unit: Sequence[TrainingRow]) -> int:
        """Return the tokens of a unit in a pass, without padding."""
        if self._shares:
            return tokens_of_shared([row.matched.ids for row in unit])
        return sum(len(row.matched) for row in unit)

    def _cut(self, rows: Sequence[TrainingRow]) -> list[list[int]]:
        """Return positions into `rows` for each micro-batch; units are not split."""
        size, max_tokens, units = self.objective.rows_in_unit, self.policy.max_tokens, self._units(rows)
        if self.policy.packs or self._shares:
            parts = packed_batches([*map(self._tokens, units)], max_tokens)
        else:
            budget = max(1, max_tokens // size)
            widths = [self.policy.widths.of(max(len(row.matched) for row in unit)) for unit in units]
            parts = micro_batches(widths, budget, pass_cost=GRADIENT_PASS_COST)
        return [[unit * size + k for unit in part for k in range(size)] for part in parts]

    def _losses(self, facts: RowFacts, scores: RowScores, point: Tensor) -> Tensor:
        """Return the loss of each row, shape (rows,)."""
        return self.objective.losses(scores, facts.masses, facts.tokens, point)

    def _outcome(self, facts: RowFacts, scores: RowScores, point: Tensor, tokens: Tokens) -> BatchOutcome:
        losses, midpoints = self._losses(facts, scores, point), self.objective.midpoints(scores.logratios, point)
        nll = sft_losses(scores.logps, facts.tokens) if self.objective.sft_weight else None
        return BatchOutcome(losses, scores.logratios, scores.logps, facts.masses, midpoints, tokens, nll)

    @torch.no_grad()
    def _router_balance(self, inputs: UpdateInputs) -> "_RouterBalance":
        """Count the slots of each expert over the whole batch, so that the losses of micro-batches add up."""
        policy = self.policy
        config = policy.model.config.get_text_config()
        slots = policy.zero()
        counts = slots.repeat(getattr(config, "num_local_experts", None) or config.num_experts)
        for micro_batch, _ in inputs.micro_batches():
            batch = micro_batch.batch
            router_logits = token_logps(policy.scoring_model, batch, router_logits=True).router_logits
            if micro_batch.part:
                counts = counts + count_routed_tokens(router_logits, batch.real, config.num_experts_per_tok)
                slots = slots + batch.real.sum() * len(router_logits)
        everywhere = policy.ranks.sum(torch.cat([counts, slots[None]]))
        return _RouterBalance(float(config.router_aux_loss_coef), everywhere[:-1], everywhere[-1])


class _RouterBalance(NamedTuple):
    """The load-balancing loss of a mixture of experts over one batch of all ranks.

    Attributes:
        coefficient: its weight relative to the preference loss.
        expert_counts: slots of each expert, shape (experts,).
        slots: all of them, scalar.
    """

    coefficient: float
    expert_counts: Tensor
    slots: Tensor

    def share(self, router_logits: Sequence[Tensor], real: Tensor) -> Tensor:
        """Return a micro-batch's weighted share, scalar.

        Args:
            router_logits: for each layer, shape (batch * length, experts).
            real: bool, shape (batch, length), false at padding.
        """
        return self.coefficient * router_balance_loss(router_logits, real, self.expert_counts, self.slots)
