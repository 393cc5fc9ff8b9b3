"""Normalise the weights of the rows that are kept, and give all rows the same objectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.judgements import Judgement, Masses

# Relative to the mean: what the plan warns of, and what is refused, as such a row counts for nothing.
EXTREME, _LEAST = 100.0, 1e-9
_NOT_JUDGED = Masses(0.0, 0.0)


@dataclass
class Weights:
    """The weights of the rows that are kept, in their order; empty if no row has one.

    Attributes:
        values: None for a row without a weight.
        places: of the rows.
    """

    values: list[float | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    _given: bool = False

    def add(self, row: FeedbackRow) -> None:
        """Add the weight of a row."""
        self.values.append(row.weight)
        self.places.append(row.where)
        self._given = self._given or row.weight is not None

    def __bool__(self) -> bool:
        return self._given

    def factors(self, data: str) -> list[float]:
        """Return what each row's masses are multiplied by, with a mean of 1; empty without weights.

        Args:
            data: the file, for errors.

        Raises:
            FeedbackError: some rows have no weight, or one that is nothing beside the others.
        """
        if not self:
            return []
        given = [value for value in self.values if value is not None]
        if len(given) < len(self.values):
            first = self.places[self.values.index(None)]
            raise FeedbackError(
                f"{data}: rows without a weight: {len(self.values) - len(given):,} of {len(self.values):,} (first: {first}). Give "
                "every row a weight, or 0 to leave it out."
            )
        mean = math.fsum(given) / len(given)
        if min(given) == max(given):
            return [1.0] * len(given)
        factors = [value / mean for value in given]
        if min(factors) < _LEAST:
            where = self.places[factors.index(min(factors))]
            raise FeedbackError(
                f"{where}: the weight {min(given):g} is nothing beside the mean of {mean:g}. Correct it, or write 0 to leave the row "
                "out."
            )
        return factors

    def in_words(self) -> str:
        """Return the range of the weights relative to their mean."""
        given = [value for value in self.values if value is not None]
        mean = math.fsum(given) / len(given)
        return f"{min(given) / mean:.3g} to {max(given) / mean:.3g} after normalisation to a mean of 1 (as read: mean {mean:.3g})"

    def extreme(self) -> str | None:
        """Return a sentence about the largest weight if it is more than 100 times the mean; None otherwise."""
        given = [value for value in self.values if value is not None]
        if not given or max(given) * len(given) <= EXTREME * math.fsum(given):
            return None
        where = self.places[self.values.index(max(given))]
        return (
            f"the largest weight is {max(given) * len(given) / math.fsum(given):,.0f} times the mean ({where}): its batch learns from "
            "that row alone. Cap the weights unless this is intended."
        )


def settled(judgements: Sequence[Judgement], factors: Sequence[float]) -> list[Judgement]:
    """Return judgements with their weights, all with the same objectives, sorted by name; (0, 0) where one is not judged.

    Args:
        factors: of the rows; empty without weights.
    """
    names = sorted({name for one in judgements for name in one.objectives})
    if not names and not factors:
        return [*judgements]
    weights = factors or [1.0] * len(judgements)
    return [_settled(one, weight, names) for one, weight in zip(judgements, weights, strict=True)]


def _settled(judgement: Judgement, weight: float, names: Sequence[str]) -> Judgement:
    objectives = {name: _weighted(judgement.objectives.get(name, _NOT_JUDGED), weight) for name in names}
    return Judgement(_weighted(judgement.masses, weight), objectives)


def _weighted(masses: Masses, weight: float) -> Masses:
    return Masses(masses.desirable * weight, masses.undesirable * weight)
