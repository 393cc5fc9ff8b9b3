"""Compute metrics as sums and counts, accumulated on the device and reduced over ranks once per logging step.

Rows count by their masses: a desirable and an undesirable mass each, (1, 0) or (0, 1) for a label.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Positions in the vector of sums.
_NAMES = (
    "loss",
    "mass",
    "desirable",
    "undesirable",
    "rewards_desirable",
    "rewards_undesirable",
    "logps_desirable",
    "logps_undesirable",
    "correct",
    "tokens",
    "fed_tokens",
    "padded_tokens",
    "desirable_rows",
    "undesirable_rows",
    "nll",  # only where the loss has it
)

# Nats. For a row nearer to z0 than this, float32 rounding decides on which side of z0 it is.
TIE = 1e-4


class Tokens(NamedTuple):
    """Token counts of a set of forward passes.

    Attributes:
        scored: tokens of all sequences, with the prompt counted in each.
        fed: tokens passed to the model; fewer if sequences shared a prompt.
        padded: `fed` plus padding.
    """

    scored: int
    fed: int
    padded: int

    def __add__(self, other: "Tokens") -> "Tokens":  # type: ignore[override]
        return Tokens(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class BatchOutcome:
    """Losses and log-ratios of one rank's rows of a batch; all tensors are float64 on one device.

    Attributes:
        losses, logratios, logps: nats (losses without unit), shape (rows,); losses are weighted by mass.
        masses: desirable and undesirable mass, shape (rows, 2).
        point: reference point of the accuracy, nats: z0 of the whole batch, or one for each row.
        tokens: of all forward passes, including mismatched pairs.
        nll: negative log-likelihood of each completion, mean over its tokens, shape (rows,); None if it is no part of the loss.
    """

    losses: Tensor
    logratios: Tensor
    logps: Tensor
    masses: Tensor
    point: Tensor
    tokens: Tokens
    nll: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """Return whether each row's loss, and what it was computed from, is finite; bool, shape (rows,)."""
        return self.logratios.isfinite() & self.losses.isfinite() & self.point.isfinite()

    def sums(self) -> Tensor:
        """Return the vector of sums over this rank's rows, shape (14,), or (15,) with `nll`, float64."""
        good, bad = self.masses.unbind(1)
        labels = good >= bad
        counted = [
            self.losses.sum(),
            good.sum() + bad.sum(),
            good.sum(),
            bad.sum(),
            (good * self.logratios).sum(),
            (bad * self.logratios).sum(),
            (good * self.logps).sum(),
            (bad * self.logps).sum(),
            right_mass(self.logratios - self.point, self.masses).sum(),
        ]
        # `torch.tensor` would copy the numbers from the host, which waits for all work queued on a GPU.
        constant = [torch.full_like(counted[0], float(number)) for number in self.tokens]
        of_likelihood = [] if self.nll is None else [(good * self.nll).sum()]
        return torch.stack([*counted, *constant, labels.sum().double(), (~labels).sum().double(), *of_likelihood])


def right_mass(distances: Tensor, masses: Tensor) -> Tensor:
    """Return the mass of each row that is on the right side of a point: desirable mass above it, undesirable mass below.

    Args:
        distances: of the rows from the point, nats, shape (..., rows).
        masses: shape (rows, 2).

    Returns:
        float64, shape (..., rows).
    """
    good, bad = masses.unbind(1)
    return good * on_the_right_side(distances) + bad * on_the_right_side(-distances)


def on_the_right_side(distances: Tensor) -> Tensor:
    """Return 1 for distances above 0 nats, 0 for those below and 1/2 near it: float64, same shape.

    Before the first update every row is at its reference point, up to rounding, and so counts for neither side.
    """
    return torch.where(distances.abs() < TIE, 0.5, (distances > 0).double())


def metrics_from(sums: Tensor, *, beta: float) -> dict[str, float]:
    """Return means from sums over all ranks; a class without mass is left out.

    Names follow TRL: chosen is desirable, rejected undesirable. `accuracy` is the share of mass on the right side of
    the row's reference point (z0); a row at the point counts half.

    Args:
        sums: from `BatchOutcome.sums`, added over batches and ranks.
        beta: turns log-ratios into rewards.
    """
    value = dict(zip(_NAMES[: len(sums)], sums.tolist(), strict=True))
    metrics = {"loss": value["loss"] / value["mass"]}
    for trl, ours in (("chosen", "desirable"), ("rejected", "undesirable")):
        if value[ours]:
            metrics[f"rewards/{trl}"] = beta * value[f"rewards_{ours}"] / value[ours]
            metrics[f"logps/{trl}"] = value[f"logps_{ours}"] / value[ours]
    if value["desirable"] and "nll" in value:
        metrics["nll"] = value["nll"] / value["desirable"]
    if value["desirable"] and value["undesirable"]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    for name in ("desirable", "undesirable"):
        metrics[f"num_{name}"] = int(value[f"{name}_rows"])
    metrics["accuracy"] = value["correct"] / value["mass"]
    if value["padded_tokens"]:
        metrics["padding"] = 1 - value["fed_tokens"] / value["padded_tokens"]
    return metrics


def tokens_of(sums: Tensor) -> float:
    """Return the number of scored tokens in the vector of sums."""
    return float(sums[_NAMES.index("tokens")])
