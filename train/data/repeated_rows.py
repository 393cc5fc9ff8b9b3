"""Find rows with the same prompt and completion: duplicates with one label, contradictions with both."""

from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.cache.repeats import Repeats, have_both_labels
from offline_kto.kto_core.equal_ids import EqualIds
from offline_kto.train.data.cache_rows import CacheRows


class Repeated(NamedTuple):
    """Rows that occur several times.

    Attributes:
        groups: positions of the rows that are equal, the first in the data first; not all groups if there are many.
        total: number of groups.
    """

    groups: list[np.ndarray]
    total: int


class RepeatedRows(NamedTuple):
    """Equal rows with one label, and equal rows with both."""

    duplicates: Repeated
    contradictions: Repeated


def repeated_rows(rows: CacheRows, *, most: int) -> RepeatedRows:
    """Return the rows of a cache that were scored with equal token ids.

    Args:
        most: groups of each to list.
    """
    if rows.repeats == Repeats(0, 0):
        return RepeatedRows(Repeated([], 0), Repeated([], 0))
    judged = rows.positions[rows.are_judged(slice(None))]
    equal = EqualIds.of(rows.row_ids()[judged])
    all_starts, sizes = equal.starts, equal.sizes
    both = have_both_labels(equal, rows.labels[judged])

    def listed(chosen: np.ndarray) -> Repeated:
        starts, counts = all_starts[chosen], sizes[chosen]
        found = np.argsort(equal.order[starts])[:most]
        return Repeated([judged[equal.order[starts[at] : starts[at] + counts[at]]] for at in found], len(starts))

    return RepeatedRows(listed((sizes > 1) & ~both), listed(both))


def contradictions(rows: CacheRows) -> int:
    """Return how many distinct rows (prompt and completion) carry both labels."""
    return repeated_rows(rows, most=0).contradictions.total if rows.repeats is None else rows.repeats.contradictions
