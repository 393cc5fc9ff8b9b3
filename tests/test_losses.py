import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_kto.kto_core.losses.preference_losses import class_weights, kl_reference_point, kto_losses


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


BETA = 0.2
LOGRATIOS = doubles(-8.2, -5.1, -7.0, -6.4) - doubles(-8.6, -5.0, -6.1, -6.9)
LABELS = torch.tensor([True, True, False, False])
ONES = torch.ones(4, dtype=torch.float64)


def test_the_worked_example():
    """Computed by hand from the paper's eq. 7 and 8."""
    kl, kl_raw = kl_reference_point(doubles(0.3, 0.4, 0.2, 0.2).sum(), 4)
    assert kl.item() == kl_raw.item() == pytest.approx(0.275, abs=1e-12)
    logratios = LOGRATIOS.clone().requires_grad_()
    losses = kto_losses(logratios, LABELS, kl, beta=BETA, weights=ONES)
    assert losses.tolist() == pytest.approx([0.49375, 0.51874, 0.44152, 0.51125], abs=5e-6)
    assert losses.mean().item() == pytest.approx(0.49131, abs=5e-6)
    (slopes,) = torch.autograd.grad(losses.sum(), logratios)
    assert slopes.tolist() == pytest.approx([-0.04999, -0.04993, 0.04932, 0.04997], abs=5e-6)


def test_the_clamp_comes_after_the_global_mean():
    """Two ranks of four, one of them with a negative mean: sums and counts meet first, then the clamp."""
    ranks = [doubles(0.9, 0.7, 0.2, 0.6), doubles(-0.8, 0.1, -0.5, -0.4)]
    everything = torch.cat(ranks)
    kl, kl_raw = kl_reference_point(sum(rank.sum() for rank in ranks), sum(len(rank) for rank in ranks))
    whole, whole_raw = kl_reference_point(everything.sum(), 8)
    assert kl.item() == whole.item() == pytest.approx(0.1)
    assert kl_raw.item() == whole_raw.item()
    clamped_per_rank = sum(rank.mean().clamp(min=0) for rank in ranks) / 2
    clamped_per_pair = everything.clamp(min=0).mean()
    assert abs(kl - clamped_per_rank) > 0.1
    assert abs(kl - clamped_per_pair) > 0.1


def test_a_negative_reference_point_is_clamped_and_shown():
    kl, kl_raw = kl_reference_point(doubles(-3.0).sum(), torch.tensor(4))
    assert (kl.item(), kl_raw.item()) == (0.0, -0.75)


def test_no_gradient_flows_into_the_reference_point():
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    logratios = LOGRATIOS.clone().requires_grad_()
    kto_losses(logratios, LABELS, kl, beta=BETA, weights=ONES).sum().backward()
    assert kl.grad is None
    assert logratios.grad.abs().min() > 0.01


def losses_split_by_class(logratios, labels, kl, beta, desirable, undesirable):
    """The paper as written: v = lambda * sigmoid(beta * (r - z0)), mirrored for bad rows; loss = lambda - v."""
    losses = torch.empty_like(logratios)
    good, bad = logratios[labels], logratios[~labels]
    losses[labels] = desirable - desirable * torch.sigmoid(beta * (good - kl))
    losses[~labels] = undesirable - undesirable * torch.sigmoid(beta * (kl - bad))
    return losses


moderate = st.floats(-30, 30)


@given(
    st.lists(st.tuples(moderate, st.booleans()), min_size=1, max_size=12),
    st.floats(0, 10),
    st.floats(0.01, 1),
    st.floats(0, 4),
    st.floats(0, 4),
)
@settings(deadline=None)  # the first call of an operation takes torch long
def test_the_sign_form_equals_the_split_by_class(rows, kl, beta, desirable, undesirable):
    logratios, labels = doubles(*(r for r, _ in rows)), torch.tensor([label for _, label in rows])
    weights = doubles(*(desirable if label else undesirable for _, label in rows))
    ours = kto_losses(logratios, labels, doubles(kl).sum(), beta=beta, weights=weights)
    naive = losses_split_by_class(logratios, labels, kl, beta, desirable, undesirable)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturation_stays_finite_and_on_the_right_side(dtype):
    extremes = torch.tensor([-1e30, -1e4, 1e4, 1e30], dtype=dtype)
    for label, expected in ((True, [1, 1, 0, 0]), (False, [0, 0, 1, 1])):
        logratios = extremes.clone().requires_grad_()
        labels = torch.full((4,), label)
        losses = kto_losses(
            logratios, labels, torch.zeros((), dtype=dtype), beta=0.5, weights=torch.ones(4, dtype=dtype)
        )
        losses.sum().backward()
        assert losses.dtype == dtype
        assert losses.tolist() == pytest.approx(expected)
        assert torch.isfinite(logratios.grad).all()


def test_a_saturated_loss_keeps_its_digits():
    """`1 - sigmoid(t)` would be 0 here."""
    (loss,) = kto_losses(doubles(100.0), torch.tensor([True]), doubles(0.0)[0], beta=1.0, weights=doubles(1.0))
    assert loss.item() == pytest.approx(3.720076e-44, rel=1e-6, abs=0)


def test_class_weights_keep_their_digits():
    assert class_weights(LABELS, 4 / 3, 0.1).tolist() == [4 / 3, 4 / 3, 0.1, 0.1]


def test_weights_scale_losses_and_gradients_of_their_rows():
    weights = class_weights(LABELS, 2.0, 0.5)
    assert weights.tolist() == [2.0, 2.0, 0.5, 0.5]
    assert weights.dtype == torch.float64
    plain = kto_losses(LOGRATIOS, LABELS, doubles(0.1)[0], beta=BETA, weights=ONES)
    weighted = kto_losses(LOGRATIOS, LABELS, doubles(0.1)[0], beta=BETA, weights=weights)
    torch.testing.assert_close(weighted, plain * doubles(2, 2, 0.5, 0.5))


def test_where_policy_and_reference_agree_the_loss_is_half_the_weight():
    weights = class_weights(LABELS, 1.4, 0.6)
    losses = kto_losses(torch.zeros(4, dtype=torch.float64), LABELS, doubles(0.0)[0], beta=BETA, weights=weights)
    torch.testing.assert_close(losses, weights / 2)
