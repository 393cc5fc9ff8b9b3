"""Compute the preference losses and KTO's reference point, as functions of tensors.

Most losses depend on the policy through log-ratios r = log pi(y|x) - log pi_ref(y|x), nats; ORPO, SimPO and CPO through
log pi(y|x) alone. Losses of single rows are written with a sign, s = +1 for desirable and -1 for undesirable rows. Losses
of pairs take both rows of each pair.
A row that is judged by more than one bit has a desirable mass a and an undesirable mass b, and the loss
`a l(+1) + b l(-1)`; a batch's loss is the sum over its rows divided by their total mass.

Training selects a loss in `train/trainer/objective.py`, and computes z0 over all ranks in `train/trainer/reference_point.py`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_reference_point(kl_logratio_sum: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return `z0 = max(0, mean of log pi(y'|x) - log pi_ref(y'|x))` over mismatched pairs (KTO paper, section 4.1).

    Sums and counts are those of the whole batch, over all ranks: the clamp is applied once, after the global mean.

    Args:
        kl_logratio_sum: scalar, nats, without gradient.
        count: mismatched pairs in the sum, above 0; if the log-ratios are weighted by mass, the sum of the masses.

    Returns:
        (kl, kl_raw): the clamped value, which the loss uses, and the value before the clamp.
    """
    kl_raw = kl_logratio_sum / count
    return kl_raw.clamp(min=0), kl_raw


def kto_losses(logratios: Tensor, labels: Tensor, kl: Tensor, *, beta: float, weights: Tensor) -> Tensor:
    """Return `w (1 - sigmoid(beta s (r - z0)))`.

    KTO (arXiv 2402.01306), eq. 7 and 8: the value of an outcome is measured from the
    reference point z0, and losses are mirrored gains. `1 - sigmoid(t)` is computed as
    `sigmoid(-t)`, which keeps its precision where the sigmoid saturates.

    Args:
        logratios: r, nats, shape (batch,).
        labels: bool, shape (batch,), true for desirable.
        kl: z0, nats, scalar (or a shape that broadcasts), no gradient flows into it.
        beta: how fast the value saturates, per nat.
        weights: lambda_D or lambda_U of each row, shape (batch,).

    Returns:
        Loss of each row, shape (batch,); the batch loss is their mean over the whole batch.
    """
    return weights * torch.sigmoid(-beta * _signs(labels, logratios) * (logratios - kl.detach()))


def apo_zero_losses(logratios: Tensor, labels: Tensor, *, beta: float, weights: Tensor) -> Tensor:
    """Return `w (1 - sigmoid(beta s r))`, which makes desirable rows likelier than under the reference, and others less likely.

    Anchored preference optimization (arXiv 2408.06266), the "zero" objective, on single rows (TRL:
    `apo_zero_unpaired`): KTO with the reference point fixed at 0.

    Args, returns: as `kto_losses`, without its `kl`.
    """
    return kto_losses(logratios, labels, logratios.new_zeros(()), beta=beta, weights=weights)


def bco_losses(logratios: Tensor, labels: Tensor, shift: Tensor, *, beta: float, weights: Tensor) -> Tensor:
    """Return `-w log sigmoid(s (beta r - delta))`, the loss of a binary classifier whose logit is the reward.

    Binary classifier optimization (arXiv 2404.04656); delta, the reward shift, is a mean of rewards over the
    updates so far.

    Args:
        shift: delta / beta, nats, scalar: the decision boundary on the scale of log-ratios.

    Other arguments and returns: as `kto_losses`.
    """
    return -weights * F.logsigmoid(beta * _signs(labels, logratios) * (logratios - shift.detach()))


def dpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return `-log sigmoid(beta (r_chosen - r_rejected))`.

    Direct preference optimization (arXiv 2305.18290), eq. 7.

    Args:
        chosen, rejected: log-ratios of the two completions of each pair, nats, shape (pairs,).
        beta: per nat.

    Returns:
        Loss of each pair, shape (pairs,).
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return `(r_chosen - r_rejected - 1 / (2 beta))^2`, which is smallest at a fixed margin.

    Identity preference optimization (arXiv 2310.12036), eq. 17; its tau is beta. Its authors divide each log-ratio by
    the completion's number of tokens, and so does TRL: with sums, the margin would depend on length.

    Args:
        chosen, rejected: log-ratios per token (sum over the completion / its tokens), nats, shape (pairs,).

    Other arguments and returns: as `dpo_losses`.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def slic_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return `max(0, 1 - beta (r_chosen - r_rejected))`, which is zero if the margin is at least 1 / beta.

    SLiC-HF's calibration (arXiv 2305.10425) on log-ratios instead of log-probs, as in RSO (arXiv 2309.06657,
    hinge-norm); the reference replaces SLiC's regularization.

    Args, returns: as `dpo_losses`.
    """
    return F.relu(1 - beta * (chosen - rejected))


def robust_losses(chosen: Tensor, rejected: Tensor, *, beta: float, smoothing: float) -> Tensor:
    """Return `(-(1 - e) log sigmoid(t) + e log sigmoid(-t)) / (1 - 2 e)` with `t = beta (r_chosen - r_rejected)`.

    Robust DPO (arXiv 2403.00409): the mean of this loss over pairs that are labelled the wrong way round with
    probability e is the mean of DPO's loss over the true labels.

    Args:
        smoothing: e, at least 0 and below 1/2; 0 is DPO.

    Other arguments and returns: as `dpo_losses`.
    """
    margins = beta * (chosen - rejected)
    as_labelled, flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1 - smoothing) * as_labelled - smoothing * flipped) / (1 - 2 * smoothing)


def nca_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return `-log sigmoid(beta r_chosen) - 1/2 log sigmoid(-beta r_chosen) - 1/2 log sigmoid(-beta r_rejected)`.

    Noise contrastive alignment (arXiv 2402.05369), the pairwise NCA loss: each reward is measured from 0, so that the chosen
    completion does not become less likely together with the rejected one.

    Args, returns: as `dpo_losses`.
    """
    good, bad = beta * chosen, beta * rejected
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def cpo_losses(chosen: Tensor, rejected: Tensor, nll: Tensor, *, beta: float) -> Tensor:
    """Return `-log sigmoid(beta (log pi(y_chosen) - log pi(y_rejected))) + nll`.

    Contrastive preference optimization (arXiv 2401.08417): DPO with a uniform reference, which cancels, and the
    likelihood of the chosen completion. TRL's `cpo_alpha`, the weight of `nll`, is 1 by default, as in the paper.

    Args:
        chosen, rejected: `logps` of the two completions of each pair, nats, shape (pairs,).
        nll: `sft_losses` of the chosen completions, shape (pairs,).

    Other arguments and returns: as `dpo_losses`.
    """
    return dpo_losses(chosen, rejected, beta=beta) + nll


def simpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Return `-log sigmoid(beta (chosen - rejected) - gamma)`.

    Simple preference optimization (arXiv 2405.14734), eq. 6.

    Args:
        chosen, rejected: log-probs per token (`logps` / tokens) of the two completions of each pair, nats, shape (pairs,).
        gamma: the margin that a pair should have, on the scale of beta times log-probs.

    Other arguments and returns: as `dpo_losses`.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return `-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected))`, with `odds = p / (1 - p)`, `p = exp(log-prob per token)`.

    Odds ratio preference optimization (arXiv 2403.07691), eq. 6 and 7; its lambda is beta. The first term is the likelihood of
    the chosen completion, mean over its tokens.

    Args:
        chosen, rejected: as `simpo_losses`.
        beta: weight of the odds ratio.

    Returns:
        Loss of each pair, shape (pairs,).
    """
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def sft_losses(logps: Tensor, tokens: Tensor) -> Tensor:
    """Return the negative log-likelihood of each completion, mean over its tokens.

    The mean is taken row by row, as in Iterative RPO (arXiv 2404.19733, eq. 1) and in LLaMA-Factory's `pref_ftx`. TRL's `rpo_alpha`
    and `sft` take the mean over all chosen tokens of a micro-batch: there a row's weight depends on the rows beside it.

    Args:
        logps: nats, shape (rows,).
        tokens: of each completion, shape (rows,).
    """
    return -logps / tokens


def clipped_ratios(token_logratios: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `min(q, 1 + epsilon)` and `max(q, 1 - epsilon)` of each token, q = pi / pi_ref.

    They are what PPO-clip's `min(q A, clip(q, 1 - epsilon, 1 + epsilon) A)` is for an advantage A of +1, and its negative for -1. A
    token beyond the limit gets no gradient.

    Args:
        token_logratios: log q, nats, any shape.
        epsilon: above 0 and below 1.
    """
    # Clipped before `exp`, which overflows: its gradient would be 0 * inf.
    high, low = math.log1p(epsilon), math.log1p(-epsilon)
    return token_logratios.clamp(max=high).exp(), token_logratios.clamp(min=low).exp()


def ppo_clip_losses(raised: Tensor, lowered: Tensor, labels: Tensor, *, weights: Tensor) -> Tensor:
    """Return `-w mean over tokens of min(q A, clip(q, 1 - epsilon, 1 + epsilon) A)`, with A = +1 for desirable rows and -1 for others.

    The KTO paper's offline PPO-clip (arXiv 2402.01306, section 3.3) with its +1/-1 rewards: the reference is the old policy of
    PPO (arXiv 1707.06347, eq. 7), and q a token's probability ratio. The reward is the advantage of each token: no value function is
    learned, and no KL penalty is added. The mean over tokens is taken row by row, so that all rows count alike.

    Args:
        raised, lowered: means of `clipped_ratios` over the tokens of each row, shape (batch,).
        labels: bool, shape (batch,), true for desirable.
        weights: lambda_D or lambda_U of each row, shape (batch,).

    Returns:
        Loss of each row, shape (batch,); -w or +w where policy and reference agree.
    """
    return weights * torch.where(labels, -raised, lowered)


def humanline_logratios(token_logratios: Tensor, low: float, high: float) -> Tensor:
    """Return `clamp(log pi - log pi_ref, low, high)` of each token; the row's log-ratio is their sum.

    Humanline variants (arXiv 2509.24207): a token whose log-ratio is outside the limits counts as the limit, and
    gets no gradient. HALOs uses -1 and 1.5.

    Args:
        token_logratios: nats, any shape.
        low, high: limits, nats.
    """
    return token_logratios.clamp(low, high)


def class_weights(labels: Tensor, desirable: float, undesirable: float) -> Tensor:
    """Return lambda_D or lambda_U for each row, float64, shape (batch,)."""
    # Filled on the device: a tensor of given numbers would be copied there, and the host would wait for it.
    of_desirable, of_undesirable = (
        torch.full_like(labels, weight, dtype=torch.float64) for weight in (desirable, undesirable)
    )
    return torch.where(labels, of_desirable, of_undesirable)


def judged_losses(losses: Callable[[Tensor, Tensor], Tensor], masses: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return `a lambda_D l(+1) + b lambda_U l(-1)`, the loss of rows that are judged by masses instead of one bit.

    It is the loss of a rows that are desirable and b that are undesirable, and linear in both. A share of votes
    is a soft label (Peterson et al., ICCV 2019, arXiv 1908.07086; for preferences: Furuta et al., arXiv 2409.06691). Masses
    (1, 0) and (0, 1) give the loss of the label exactly, in value and gradient.

    Args:
        losses: a loss of single rows, as a function of labels (bool, shape (batch,)) and weights (float64, shape (batch,)).
        masses: a and b of each row, float64, shape (batch, 2).
        weights: lambda_D and lambda_U.

    Returns:
        Loss of each row; the batch loss is their sum over the whole batch divided by the sum of all masses.
    """
    desirable, undesirable = masses.unbind(1)
    labels = torch.ones_like(desirable, dtype=torch.bool)
    good = losses(labels, class_weights(labels, *weights) * desirable)
    return good + losses(~labels, class_weights(~labels, *weights) * undesirable)


def pair_masses(masses: Tensor) -> Tensor:
    """Return the weight of each pair: the mean of its two rows' total masses.

    Args:
        masses: of the rows, float64, shape (2 * pairs, 2); the rows of a pair are neighbours.

    Returns:
        Shape (pairs,).
    """
    return masses.sum(1).view(-1, 2).mean(1)


def _log_odds(log_probs: Tensor) -> Tensor:
    """Return `log(p / (1 - p))`; a p of 1, which has no odds, counts as 1 - 1e-6."""
    log_probs = log_probs.clamp(max=-1e-6)
    return log_probs - torch.log(-torch.expm1(log_probs))


def _signs(labels: Tensor, like: Tensor) -> Tensor:
    return torch.where(labels, 1.0, -1.0).to(like.dtype)
