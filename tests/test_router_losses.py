import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from offline_kto.kto_core.losses.router_losses import count_routed_tokens, router_balance_loss

LAYERS, EXPERTS, TOP_K = 3, 4, 2
ROW_LENGTHS = (9, 7, 4, 4, 2, 1)


def routed_batch(lengths, seed):
    """Router logits (LAYERS times (batch * length, EXPERTS)) of one padded batch, and its mask; padding is noise too."""
    torch.manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = [2 * torch.randn(mask.numel(), EXPERTS) + torch.arange(EXPERTS) / 2 for _ in range(LAYERS)]
    return [one.requires_grad_() for one in logits], mask


def in_micro_batches(logits, mask, cuts):
    """The same rows in several micro-batches, each padded to its own longest row."""
    per_row = [one.view(*mask.shape, EXPERTS) for one in logits]
    for rows in cuts:
        width = int(mask[rows].sum(1).max())
        yield [one[rows, :width].reshape(-1, EXPERTS) for one in per_row], mask[rows, :width]


CUTS = [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3, 4, 5]], [[i] for i in range(6)]]


@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "three", "single rows"])
def test_shares_of_the_balance_loss_add_up_to_that_of_the_whole_batch(cuts):
    logits, mask = routed_batch(ROW_LENGTHS, seed=0)
    whole = load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K, mask.long())
    expected = torch.autograd.grad(whole, logits)
    parts = list(in_micro_batches(logits, mask, cuts))
    counts = sum(count_routed_tokens(part, part_mask, TOP_K) for part, part_mask in parts)
    slots = LAYERS * mask.sum()
    total = sum(router_balance_loss(part, part_mask, counts, slots) for part, part_mask in parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    assert whole.item() > 1.05 * TOP_K  # far from balance, where the loss would be TOP_K whatever the formula
    for mine, other in zip(torch.autograd.grad(total, logits), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_padding_is_not_counted_as_routed():
    logits, mask = routed_batch((5, 2), seed=1)
    counts = count_routed_tokens(logits, mask, TOP_K)
    assert counts.dtype == torch.float64
    assert counts.sum().item() == LAYERS * TOP_K * 7
    real = mask.reshape(-1)
    naive = sum(
        torch.bincount(one[i].topk(TOP_K).indices, minlength=EXPERTS) for one in logits for i in real.nonzero()[:, 0]
    )
    assert counts.tolist() == naive.tolist()


def test_balanced_experts_cost_the_least():
    """With all experts equally likely the loss is top-k times 1."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    logits = [torch.zeros(4, EXPERTS)]
    loss = router_balance_loss(logits, mask, torch.full((EXPERTS,), 2.0, dtype=torch.float64), torch.tensor(4))
    assert loss.item() == pytest.approx(TOP_K)
