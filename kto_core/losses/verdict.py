"""Decide whether training made a model better, from the changes of its held-out values since before training."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["better", "no difference", "worse"]

# With five clusters every sign may be equal by chance in 1 of 16 cases, with six in 1 of 32, less than 5 %.
LEAST_PROMPTS = 6

# A smaller change of the margin is none, however sure it is: it changes a row's loss of 0.5 by at most 0.0025.
LEAST_MARGIN = 0.01
LEAST_LOSS = LEAST_MARGIN / 4

# Where the sigmoid of the losses is flat. Desirable rows that have fallen below it are lost to the loss as well: their gradient
# has vanished, and the loss can no longer say how much less likely they have become.
_COLLAPSED = -4.0


@dataclass(frozen=True)
class Change:
    """The change of a held-out value since before training, with its paired interval; None if there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def is_above(self, least: float) -> bool:
        """Return whether the value rose, by at least `least` and beyond chance."""
        return self.low is not None and self.low > 0 and self.value >= least

    def is_below(self, least: float) -> bool:
        """Return whether the value fell, by at least `least` and beyond chance."""
        return self.high is not None and self.high < 0 and self.value <= -least

    @property
    def without_sign(self) -> str:
        """Return a change whose direction has been said; its interval lies on one side of 0."""
        ends = sorted(abs(end) for end in (self.low, self.high) if end is not None)
        return f"{abs(self.value):.4f} [{ends[0]:.4f}, {ends[1]:.4f}]"

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.value:+.4f}{ends}"


@dataclass(frozen=True)
class Verdict:
    """Whether a model is better than before training, and the change that says so.

    Attributes:
        outcome: better, no difference or worse.
        by: name of the metric that decided; empty if there were too few prompts.
        reason: one sentence.
    """

    outcome: Outcome
    by: str
    reason: str


def judge(*, margin: Change | None, loss: Change, desirable: Change | None, prompts: int) -> Verdict:
    """Return the verdict on a run.

    The margin decides, because it is the same quantity for all losses, does not depend on z0, and does not saturate. A loss
    can fall although the model tells nothing apart: if one class has more rows, it falls when both classes move that way. The
    loss has a veto: where it rose, a margin may stem from a few rows that were moved very far, and the model is not
    better. And a model that has lost its desirable replies is worse whatever its margin, which then measures in which class
    the rows are longer.

    Args:
        margin: change of the reward margin; None if a class has no held-out rows, and the loss decides.
        loss: change of the loss.
        desirable: change of the mean reward of desirable rows; None without such rows.
        prompts: held-out prompts of the class that has fewer of them.
    """
    if prompts < LEAST_PROMPTS:
        return Verdict("no difference", "", f"{prompts} held-out prompts of a class are too few to tell")
    if desirable is not None and desirable.high is not None and desirable.high < _COLLAPSED:
        return Verdict(
            "worse",
            "rewards/chosen",
            f"desirable completions became far less likely: their reward changed by {desirable}",
        )
    if margin is None:
        return _by_loss(loss)
    if margin.is_below(LEAST_MARGIN):
        return Verdict("worse", "rewards/margins", f"the held-out margin fell by {margin.without_sign}")
    loss_rose = loss.is_above(LEAST_LOSS)
    if margin.is_above(LEAST_MARGIN):
        if loss_rose:
            return Verdict(
                "no difference",
                "loss",
                f"the held-out margin rose ({margin}), but so did the loss ({loss}): a few rows moved too far",
            )
        return Verdict("better", "rewards/margins", f"the held-out margin rose by {margin.without_sign}")
    if loss_rose:
        return Verdict(
            "worse", "loss", f"the held-out loss rose by {loss.without_sign}, and the margin did not ({margin})"
        )
    small = margin.low is not None and abs(margin.value) < LEAST_MARGIN
    what = "hardly changed" if small else "may have changed by chance"
    return Verdict("no difference", "rewards/margins", f"the held-out margin {what}: {margin}")


def _by_loss(loss: Change) -> Verdict:
    if loss.is_below(LEAST_LOSS):
        return Verdict("better", "loss", f"the held-out loss fell by {loss.without_sign}")
    if loss.is_above(LEAST_LOSS):
        return Verdict("worse", "loss", f"the held-out loss rose by {loss.without_sign}")
    return Verdict("no difference", "loss", f"the held-out loss may have changed by chance: {loss}")
