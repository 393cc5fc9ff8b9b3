"""Count rows with equal ids: duplicates with one label, contradictions with both."""

from typing import NamedTuple

import numpy as np


class Repeats(NamedTuple):
    """Numbers of distinct ids that several rows have: rows of one label, and rows of both."""

    duplicates: int
    contradictions: int


class EqualRows(NamedTuple):
    """Rows grouped by their ids.

    Attributes:
        order: positions of all rows, those with equal ids together and the first of them first, shape (rows,).
        starts: where each group starts in `order`, shape (groups,).
    """

    order: np.ndarray
    starts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Number of rows in each group, shape (groups,)."""
        return np.diff(self.starts, append=len(self.order))

    def desirable(self, labels: np.ndarray) -> np.ndarray:
        """Return how many rows of each group have label true, shape (groups,)."""
        return np.add.reduceat(labels[self.order].astype(np.int64), self.starts)


def equal_rows(ids: np.ndarray) -> EqualRows:
    """Group rows by their ids.

    Args:
        ids: shape (rows,): whole numbers, or bytes of one length (a multiple of 8).
    """
    words = np.ascontiguousarray(ids).view(np.uint64).reshape(len(ids), -1) if len(ids) else np.empty((0, 1), np.uint64)
    order = np.lexsort(words.T)
    words = words[order]
    new = np.ones(len(ids), dtype=bool)
    new[1:] = (words[1:] != words[:-1]).any(axis=1)
    return EqualRows(order, np.flatnonzero(new))


def count_repeats(ids: np.ndarray, labels: np.ndarray) -> Repeats:
    """Count the ids that several rows have.

    Args:
        ids: of the rows; see `equal_rows`.
        labels: bool, shape (rows,).
    """
    groups = equal_rows(ids)
    if not len(groups.starts):
        return Repeats(0, 0)
    repeated, desirable = groups.sizes > 1, groups.desirable(labels)
    both = (desirable > 0) & (desirable < groups.sizes)
    return Repeats(int((repeated & ~both).sum()), int(both.sum()))
