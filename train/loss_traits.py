"""List the losses of kto-train and their traits.

The formulas are in `kto_core/losses/preference_losses.py`, and `trainer/objective.py` selects one by its name.
CONTRIBUTING.md ("Add a loss") lists every place that a new loss changes.
"""

from dataclasses import dataclass
from typing import Literal

# The point that a loss measures a row's log-ratio from.
Origin = Literal["z0", "reward shift", "0", "other row"]


@dataclass(frozen=True)
class LossTraits:
    """The properties of a loss that the rest of training depends on.

    Attributes:
        unit: rows that share one loss: 1, or 2 for the rows of a pair.
        measured_from: z0 (from mismatched rows), the reward shift (running mean of the rewards of the loss's own rows),
            0, or the other row of the pair.
        sigmoid: whether the gradient is a sigmoid of rewards. Only then do the diagnostics check the size of rewards.
        limits_tokens: whether a row's log-ratio is a sum of clipped token log-ratios.
        clips_ratios: whether the loss is a mean of clipped probability ratios of tokens.
        ignores_reference: whether the loss depends on the policy's log-probs alone. Rewards and accuracy are those of log-ratios all
            the same, so they compare with other losses.
        options: options of kto-train that only this loss has; others refuse them.
    """

    unit: int
    measured_from: Origin
    sigmoid: bool = True
    limits_tokens: bool = False
    clips_ratios: bool = False
    ignores_reference: bool = False
    options: tuple[str, ...] = ()

    @property
    def needs_mismatched(self) -> bool:
        """Return whether mismatched rows are scored before each update."""
        return self.measured_from == "z0"

    @property
    def needs_shift(self) -> bool:
        """Return whether the rows of a batch are scored before the pass that trains on them, to update the reward shift."""
        return self.measured_from == "reward shift"


LOSS_TRAITS = {
    "kto": LossTraits(unit=1, measured_from="z0"),
    "humanline": LossTraits(
        unit=1, measured_from="z0", limits_tokens=True, options=("humanline_low", "humanline_high")
    ),
    "apo_zero": LossTraits(unit=1, measured_from="0"),
    "bco": LossTraits(unit=1, measured_from="reward shift"),
    "ppo_clip": LossTraits(unit=1, measured_from="0", sigmoid=False, clips_ratios=True, options=("clip_epsilon",)),
    "dpo": LossTraits(unit=2, measured_from="other row"),
    "robust": LossTraits(unit=2, measured_from="other row", sigmoid=False, options=("label_smoothing",)),
    "ipo": LossTraits(unit=2, measured_from="other row", sigmoid=False),
    "slic": LossTraits(unit=2, measured_from="other row", sigmoid=False),
    "nca": LossTraits(unit=2, measured_from="0"),
    "cpo": LossTraits(unit=2, measured_from="other row", sigmoid=False, ignores_reference=True),
    "simpo": LossTraits(
        unit=2, measured_from="other row", sigmoid=False, ignores_reference=True, options=("simpo_gamma",)
    ),
    "orpo": LossTraits(unit=2, measured_from="other row", sigmoid=False, ignores_reference=True),
}
LOSSES = tuple(LOSS_TRAITS)
# The only loss that an option has a meaning for.
LOSS_OF_OPTION = {option: name for name, traits in LOSS_TRAITS.items() for option in traits.options}
PAIRED_LOSSES = tuple(name for name, traits in LOSS_TRAITS.items() if traits.unit == 2)
