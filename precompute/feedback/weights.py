"""Normalise the weights of the rows that are kept, and multiply their judgements by them."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.judgements import ONE_BIT, Judgement, Masses, mass_columns

# A class of arrays takes no type of items before Python 3.12.
if TYPE_CHECKING:
    Doubles: TypeAlias = array[float]
else:
    Doubles = array

# Relative to the mean: what the plan warns of, and what is refused, as such a row counts for nothing.
EXTREME, _LEAST = 100.0, 1e-9


@dataclass
class Weights:
    """The weights of the rows that are kept, as read.

    Attributes:
        values: in the order of the rows, without the rows that have none.
        without: number of those rows.
        first_without, least, largest: places of the first row without a weight, and of the first with the least and the
            largest weight.
    """

    values: Doubles = field(default_factory=lambda: array("d"))
    without: int = 0
    first_without: str = ""
    least: str = ""
    largest: str = ""
    _range: tuple[float, float] = (math.inf, -math.inf)

    def add(self, row: FeedbackRow) -> None:
        """Add the weight of a row."""
        weight = row.weight
        if weight is None:
            self.first_without = self.first_without or row.where
            self.without += 1
            return
        self.values.append(weight)
        least, largest = self._range
        if weight < least:
            self.least, least = row.where, weight
        if weight > largest:
            self.largest, largest = row.where, weight
        self._range = least, largest

    def merge(self, later: "Weights") -> None:
        """Add the weights of rows that come after all others."""
        self.values += later.values
        self.first_without = self.first_without or later.first_without
        self.without += later.without
        least, largest = self._range
        if later._range[0] < least:
            self.least, least = later.least, later._range[0]
        if later._range[1] > largest:
            self.largest, largest = later.largest, later._range[1]
        self._range = least, largest

    def __bool__(self) -> bool:
        return bool(self.values)

    def factors(self, data: str) -> np.ndarray | None:
        """Return what each row's masses are multiplied by, float64, with a mean of 1; None without weights.

        Args:
            data: the file, for errors.

        Raises:
            FeedbackError: some rows have no weight, or one that is nothing beside the others.
        """
        if not self:
            return None
        if self.without:
            raise FeedbackError(
                f"{data}: rows without a weight: {self.without:,} of {len(self.values) + self.without:,} (first: "
                f"{self.first_without}). Give every row a weight, or 0 to leave it out."
            )
        least, largest = self._range
        if least == largest:
            return np.ones(len(self.values))
        mean = self._mean()
        factors = np.asarray(self.values) / mean
        if factors.min() < _LEAST:
            raise FeedbackError(
                f"{self.least}: the weight {least:g} is nothing beside the mean of {mean:g}. Correct it, or write 0 to leave the row "
                "out."
            )
        return factors

    def in_words(self) -> str:
        """Return the range of the weights relative to their mean."""
        mean = self._mean()
        least, largest = self._range
        return (
            f"{least / mean:.3g} to {largest / mean:.3g} after normalisation to a mean of 1 (as read: mean {mean:.3g})"
        )

    def extreme(self) -> str | None:
        """Return a sentence about the largest weight if it is more than 100 times the mean; None otherwise."""
        if not self:
            return None
        count, total, largest = len(self.values), math.fsum(self.values), self._range[1]
        if largest * count <= EXTREME * total:
            return None
        return (
            f"the largest weight is {largest * count / total:,.0f} times the mean ({self.largest}): its batch learns from "
            "that row alone. Cap the weights unless this is intended."
        )

    def _mean(self) -> float:
        return math.fsum(self.values) / len(self.values)


class Judgements:
    """The judgements of all rows with their weights; all rows have the same objectives, sorted by name.

    Args:
        masses: as read, float64, shape (rows, 2).
        objectives: masses by name, each of that shape; (0, 0) where one is not judged.
        factors: of the rows; None without weights.

    Attributes:
        masses, objectives: multiplied by the factors.
    """

    def __init__(self, masses: np.ndarray, objectives: Mapping[str, np.ndarray], factors: np.ndarray | None) -> None:
        if factors is not None:
            for one in (masses, *objectives.values()):
                one *= factors[:, None]
        self.masses, self.objectives = masses, {name: objectives[name] for name in sorted(objectives)}

    def __getitem__(self, row: int) -> Judgement:
        masses = Masses(*self.masses[row].tolist())
        if not self.objectives and masses in ONE_BIT:
            return Judgement.of_label(masses.label)
        return Judgement(masses, {name: Masses(*one[row].tolist()) for name, one in self.objectives.items()})

    def mass_columns(self) -> list[str]:
        """Return the optional columns of a cache that the rows need."""
        is_one_bit = (self.masses[:, None] == np.array(ONE_BIT)).all(axis=2).any(axis=1)
        return mass_columns([self[int(is_one_bit.argmin())]])  # a row that is not one bit, if there is one


def total(masses: np.ndarray) -> Masses:
    """Return the sum of masses, correctly rounded. Args: masses: shape (rows, 2)."""
    return Masses(*map(math.fsum, masses.T))
