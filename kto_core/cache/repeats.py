"""Count rows with equal ids: duplicates with one label, contradictions with both."""

from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.equal_ids import EqualIds


class Repeats(NamedTuple):
    """Numbers of distinct ids that several rows have: rows of one label, and rows of both."""

    duplicates: int
    contradictions: int


def have_both_labels(rows: EqualIds, labels: np.ndarray) -> np.ndarray:
    """Return whether rows of both labels have an id, for each distinct id; bool.

    Args:
        rows: by their ids.
        labels: bool, shape (rows,).
    """
    desirable = rows.sums(labels)
    return (desirable > 0) & (desirable < rows.sizes)


def count_repeats(rows: EqualIds, labels: np.ndarray) -> Repeats:
    """Count the ids that several rows have. Args: as for `have_both_labels`."""
    both = have_both_labels(rows, labels)
    return Repeats(int(((rows.sizes > 1) & ~both).sum()), int(both.sum()))
