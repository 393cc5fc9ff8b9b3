"""Find rows with the same prompt and completion: duplicates with one label, contradictions with both."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.cache.shards import numbers
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
    judged = np.flatnonzero(rows.are_judged(np.arange(len(rows))))
    ids = rows.ids("row_id", judged).combine_chunks()
    table = pa.table({"id": ids, "label": pa.array(rows.labels[judged], pa.bool_()), "at": pa.array(judged)})
    counted = table.group_by("id").aggregate([("at", "count"), ("at", "min"), ("label", "min"), ("label", "max")])
    repeated = counted.filter(pc.greater(counted["at_count"], 1))
    alike = pc.equal(repeated["label_min"], repeated["label_max"])
    return RepeatedRows(
        *(_listed(table, repeated.filter(chosen).sort_by("at_min"), most) for chosen in (alike, pc.invert(alike)))
    )


def _listed(table: pa.Table, repeated: pa.Table, most: int) -> Repeated:
    first = repeated.slice(0, most)["id"].combine_chunks()
    if not len(first):
        return Repeated([], repeated.num_rows)
    found = table.filter(pc.is_in(table["id"], value_set=first))
    group = numbers(pc.index_in(found["id"], value_set=first))
    positions = numbers(found["at"])
    return Repeated([positions[group == number] for number in range(len(first))], repeated.num_rows)
