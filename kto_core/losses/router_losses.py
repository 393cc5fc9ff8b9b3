"""Compute the load-balancing loss of mixture-of-experts models, in shares that add up over micro-batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def count_routed_tokens(router_logits: Sequence[Tensor], mask: Tensor, top_k: int) -> Tensor:
    """Count the (layer, token) slots routed to each expert.

    Args:
        router_logits: for each layer, shape (batch * length, experts).
        mask: bool, shape (batch, length), true at real tokens.
        top_k: experts for each token.

    Returns:
        Shape (experts,), float64.
    """
    flat = mask.reshape(-1)
    counts = torch.zeros(router_logits[0].shape[-1], dtype=torch.float64, device=mask.device)
    for logits in router_logits:
        chosen = logits[flat].topk(top_k, dim=-1).indices
        counts += torch.bincount(chosen.reshape(-1), minlength=len(counts))
    return counts


def router_balance_loss(router_logits: Sequence[Tensor], mask: Tensor, expert_counts: Tensor, slots: Tensor) -> Tensor:
    """Return this micro-batch's share of the load-balancing loss of the whole batch.

    Switch Transformer (arXiv 2101.03961), eq. 4 to 6, as `transformers` computes it for a batch: `experts * sum_e f_e
    P_e`, with f_e the fraction of slots routed to expert e and P_e its mean probability. f_e has no gradient and is
    taken from the whole batch, so loss and gradient do not depend on how the batch is split into micro-batches.

    Args:
        router_logits: for each layer, shape (batch * length, experts).
        mask: bool, shape (batch, length), true at real tokens.
        expert_counts: from `count_routed_tokens`, summed over the whole batch.
        slots: layers * real tokens of the whole batch, scalar.

    Returns:
        Scalar.
    """
    flat = mask.reshape(-1)
    probabilities = torch.stack([logits[flat].float().softmax(-1).sum(0) for logits in router_logits]).sum(0)
    experts = len(expert_counts)
    return experts * (expert_counts / slots * (probabilities.double() / slots)).sum()
