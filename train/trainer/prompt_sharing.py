"""Decide whether the rows of a unit (a pair) share their prompt in the gradient pass, and check it first.

The prompt runs once, with gradient, and the completions attend to its keys (`share_keys` in `sequences.py`). Everything a
rank decides here depends on the whole batch, which all ranks have, and on a check whose result they agree on. So all
ranks lay out and distribute rows in the same way.
"""

import math
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.out_of_memory import one_memory_error
from offline_kto.kto_core.scoring.logps import sees_whole_passes, token_logps
from offline_kto.kto_core.scoring.model_code import model_code
from offline_kto.kto_core.scoring.packing_check import measure_packing
from offline_kto.kto_core.scoring.sequences import Sequences, TokenIds, share_keys, tokens_of_shared
from offline_kto.kto_core.scoring.shared_attention import register_shared, why_not_shared
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.sharding import local_part

# The share of a batch's tokens that sharing must save. benchmarks/shared_gradients.py measures the time by this share.
WORTH_SHARING = 0.1

# Values of the weights whose gradients are compared.
_COMPARED = 2**20

# Largest relative difference of their gradients, in float32 and in 16 bits: the order of sums differs.
_TOLERANCE, _TOLERANCE_16 = 1e-3, 0.1

# Nats per token: a run that allows its scores to differ by more computes in 16 bits.
_ROUNDING_16 = 0.01

Unit = Sequence[TokenIds]


class PromptSharing:
    """Decides for each update whether its units share prompts.

    Args:
        policy: the model with its ranks.
        may_try: whether backward passes outside of an update are allowed.
    """

    def __init__(self, policy: PreparedPolicy, *, may_try: bool) -> None:
        self.policy, self.may_try = policy, may_try
        # Units up to the first length may share, those from the second one on must not. Nothing else is remembered, so that
        # a resumed run decides as an uninterrupted one.
        self._checked, self._refused_from = 0, math.inf

    def decide(self, units: Sequence[Unit]) -> bool:
        """Return whether an update with these units, of all ranks, shares prompts; called on every rank."""
        if self._refused_from == 0:
            return False
        apart = [sum(len(prompt) + len(completion) for prompt, completion in unit) for unit in units]
        saved = [tokens - tokens_of_shared(unit) for tokens, unit in zip(apart, units, strict=True)]
        if sum(saved) <= WORTH_SHARING * sum(apart):
            return False
        longest = max((unit for unit, of_unit in zip(units, saved, strict=True) if of_unit), key=_longest)
        if self._checked < _longest(longest) < self._refused_from:
            self._check(longest)
        return _longest(longest) <= self._checked

    def _check(self, unit: Unit) -> None:
        never = self._never() if not self._checked else None
        why = never or self._against(unit)
        if self.policy.ranks.any(why is not None):
            if self.policy.ranks.rank == 0 and math.isinf(self._refused_from):
                found = why or "another process found other gradients"
                tell(f"prompts are not shared between the rows of a pair while training: {found}")
            self._refused_from = 0 if never else _longest(unit)
        else:
            self._checked = _longest(unit)

    def _never(self) -> str | None:
        """Return a reason that is known without a pass; the same on all ranks."""
        model = self.policy.model
        if not self.may_try:
            return "DeepSpeed updates the weights in the backward pass, so both ways cannot be compared before"
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            return "the load-balancing loss of a mixture of experts counts each row's prompt"
        if sees_whole_passes(model):
            return "with 8-bit weights (LLM.int8) a row's score depends on the other rows of its pass"
        return why_not_shared(model.config, getattr(model.config, "_attn_implementation", None), self.policy.device)

    def _against(self, unit: Unit) -> str | None:
        """Compare scores and gradients of two rows with and without sharing, and return why they must not share.

        Scores must not depend on the other completion: its ids are changed, and nothing else.
        """
        policy, name = self.policy, type(self.policy.model).__name__
        register_shared(transformers, policy.model.config._attn_implementation)
        try:
            with one_memory_error(), model_code(name, "the attention of another row cannot be computed"):
                packing = measure_packing(policy.scoring_model, policy.device, unit, share_keys, keep_prompts=True)
                why = packing.why_not(policy.rounding)
                plain, shared = (self._gradients(layout) for layout in (policy.lay_out(unit), share_keys(unit)))
        except ModelError as error:
            return str(error)
        except torch.OutOfMemoryError:
            if policy.ranks.sharded:  # the other ranks wait within the pass
                raise
            return "not enough memory to compare both ways"
        apart = _relative_difference(plain, shared)
        allowed = _TOLERANCE if policy.rounding < _ROUNDING_16 else _TOLERANCE_16
        return why or (None if apart <= allowed else f"gradients would differ by {apart:.2g} of their norm")

    def _gradients(self, batch: Sequences) -> list[Tensor]:
        """Return this rank's gradients of some weights; no gradient is kept in the model."""
        policy, on_device = self.policy, batch.to(self.policy.device)
        policy.scoring_model.train()
        logps = token_logps(policy.scoring_model, on_device).token_logps
        loss = (logps * (1.0 - 1.5 * on_device.row_of_token)).sum()  # with both signs, as the rows of a pair
        weights = _compared_weights(policy)
        found: list[Tensor | None]
        if not policy.ranks.sharded:
            found = [*torch.autograd.grad(loss, weights, allow_unused=True)]
        else:  # FSDP2 sums gradients in the backward pass alone
            loss.backward()
            found = [None if one.grad is None else local_part(one.grad).clone() for one in weights]
            policy.model.zero_grad()
        return [torch.zeros(()) if one is None else one.detach().float() for one in found]


def _longest(unit: Unit) -> int:
    return max(len(prompt) + len(completion) for prompt, completion in unit)


def _compared_weights(policy: PreparedPolicy) -> list[Tensor]:
    """Return the smallest trained weights (norms, biases, adapters), of all layers."""
    model, values = policy.model, 0
    chosen: list[Tensor] = []
    tables = {id(one.weight) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    trained = [one for one in model.parameters() if one.requires_grad and id(one) not in tables]
    for weight in sorted(trained, key=lambda one: one.numel()):
        values += weight.numel()
        if chosen and values > _COMPARED:
            break
        chosen.append(weight)
    return chosen


def _relative_difference(plain: Sequence[Tensor], shared: Sequence[Tensor]) -> float:
    """Return the norm of the difference of two gradients, as a share of the first one's; infinite if one is not finite."""
    norm = torch.stack([one.norm() for one in plain]).norm()
    apart = torch.stack([(one - other).norm() for one, other in zip(plain, shared, strict=True)]).norm()
    found = float(apart / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    return found if found == found else float("inf")
