"""Represent what was judged of a completion as two masses: how much speaks for it, and how much against it.

One bit is (1, 0) or (0, 1). Votes, ratings and weights give other masses; several objectives give one pair of masses
each. Masses decide what training makes of a row. They change no score.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

MASS_COLUMNS = ("desirable_mass", "undesirable_mass")
OBJECTIVES: Final = "objectives"


class Masses(NamedTuple):
    """Desirable and undesirable mass of a row: finite, not negative, not both 0."""

    desirable: float
    undesirable: float

    @property
    def total(self) -> float:
        return self.desirable + self.undesirable

    @property
    def label(self) -> bool:
        """Whether the row counts as desirable where a row has one class: batch order, hold-outs and balance."""
        return self.desirable >= self.undesirable


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was judged of one completion.

    Attributes:
        masses: of the row.
        objectives: masses by the name of an objective; (0, 0) for one that was not judged. Empty without objectives.
    """

    masses: Masses
    objectives: Mapping[str, Masses] = field(default_factory=dict)

    @classmethod
    def of_label(cls, label: bool) -> "Judgement":
        """Return one bit of weight 1."""
        return _OF_LABEL[label]

    @property
    def is_one_bit(self) -> bool:
        """Whether a label says the same."""
        return not self.objectives and self.masses in ONE_BIT


# By label; rows share one object each.
ONE_BIT = (Masses(0.0, 1.0), Masses(1.0, 0.0))
_OF_LABEL = tuple(map(Judgement, ONE_BIT))


def mass_columns(judgements: Iterable[Judgement]) -> list[str]:
    """Return the optional columns of a cache that these judgements need, in the cache's order; empty for one bit each."""
    needed: tuple[str, ...] = ()
    for judgement in judgements:
        if judgement.objectives:
            return [*MASS_COLUMNS, OBJECTIVES]
        needed = needed or (() if judgement.is_one_bit else MASS_COLUMNS)
    return [*needed]


def weighted_masses(masses: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return `sum_k w_k (a_k, b_k)`: the masses of rows under a weighting of their objectives.

    This is linear scalarization, the rule of multi-objective RLHF (Rame et al., arXiv 2306.04488) and of
    multi-objective DPO (Zhou et al., arXiv 2310.03708), applied to losses of single rows. A row's loss is linear in its
    masses, so the loss of the weighted masses is the weighted sum of the objectives' losses, all measured from one z0. An
    objective that was not judged in a row has masses (0, 0) and adds nothing.

    Args:
        masses: of each objective, float64, shape (rows, 2).
        weights: of the objectives to use, not negative.

    Returns:
        float64, shape (rows, 2).
    """
    return np.sum([weight * masses[name] for name, weight in weights.items()], axis=0)
