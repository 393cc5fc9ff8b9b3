"""Represent what was judged of a completion as two masses: how much speaks for it, and how much against it.

One bit is (1, 0) or (0, 1). Votes, ratings and weights give other masses; several objectives give one pair of masses
each. Masses decide what training makes of a row. They change no score.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

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
        """Return whether the row counts as desirable where a row has one class: batch order, hold-outs and balance."""
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
        """Return whether a label says the same."""
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
