"""The KTO loss and its reference point: free functions, tensors in, tensors out."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kl_reference_point(kl_logratio_sum: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """`z0 = max(0, mean of log pi(y'|x) - log pi_ref(y'|x))` over mismatched pairs (paper, section 4.1).

    Sums and counts are those of the whole batch, over all ranks: the clamp comes after the global
    mean, once.

    Args:
        kl_logratio_sum: scalar, nats, without gradient.
        count: mismatched pairs in the sum, at least 1.

    Returns:
        (kl, kl_raw): the clamped value, which the loss uses, and the one before the clamp.
    """
    kl_raw = kl_logratio_sum / count
    return kl_raw.clamp(min=0), kl_raw


def kto_losses(logratios: Tensor, labels: Tensor, kl: Tensor, *, beta: float, weights: Tensor) -> Tensor:
    """`w (1 - sigmoid(beta s (r - z0)))` with s = +1 for desirable and -1 for undesirable.

    KTO paper (arXiv 2402.01306), eq. 7 and 8: the value of an outcome is measured from the
    reference point z0, and losses are mirrored gains. `1 - sigmoid(t)` is computed as
    `sigmoid(-t)`, which keeps its precision where the sigmoid saturates.

    Args:
        logratios: r = log pi(y|x) - log pi_ref(y|x), nats, shape (batch,).
        labels: bool, shape (batch,), true for desirable.
        kl: z0, nats, scalar, no gradient flows into it.
        beta: how fast the value saturates, per nat.
        weights: lambda_D or lambda_U of each row, shape (batch,).

    Returns:
        Loss of each row, shape (batch,); the batch loss is their mean over the whole batch.
    """
    signs = torch.where(labels, 1.0, -1.0).to(logratios.dtype)
    return weights * torch.sigmoid(-beta * signs * (logratios - kl.detach()))


def class_weights(labels: Tensor, desirable: float, undesirable: float) -> Tensor:
    """lambda_D or lambda_U for each row, float64, shape (batch,)."""
    pair = torch.tensor([undesirable, desirable], dtype=torch.float64, device=labels.device)
    return pair[labels.long()]


def count_routed_tokens(router_logits: Sequence[Tensor], mask: Tensor, top_k: int) -> Tensor:
    """How many (layer, token) slots each expert got.

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
    """This micro-batch's share of the load-balancing loss of the whole batch.

    Switch Transformer (arXiv 2101.03961), eq. 4 to 6, as `transformers` computes it for a batch:
    `experts * sum_e f_e P_e`, with f_e the fraction of slots routed to expert e and P_e its mean
    probability. f_e has no gradient and is taken from the whole batch, so the shares add up to the
    same loss and gradient however memory cuts the batch.

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
