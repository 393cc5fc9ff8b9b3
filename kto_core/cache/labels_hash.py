"""Compute the hash of the fields that no score depends on: order, labels, pairs, source rows and masses."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.cache.arrow_lists import numbers
from offline_kto.kto_core.cache.shards import open_shard, read_groups
from offline_kto.kto_core.hashing import ListHash, encoded_items
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES

_COLUMNS = ("row_id", "label", "pair_id", "source")
_GROUPS_AT_ONCE = 16


class LabelsHash:
    """Computes `data.labels_hash` of the rows in some shards, in the order in which they are added.

    Args:
        columns: those of masses, as the manifest lists them.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns, self._hasher = columns, ListHash()

    def add(self, path: Path) -> None:
        """Add the rows of a shard whose sizes were checked. Raises: CacheError: damaged content."""
        file = open_shard(path)
        for table in read_groups(path, file, columns=[*_COLUMNS, *self._columns], at_once=_GROUPS_AT_ONCE):
            self.add_encoded(encoded_labels(table, self._columns))

    def add_encoded(self, rows: bytes) -> None:
        """Add rows as `encoded_labels` returns them."""
        self._hasher.add_encoded(rows)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def labels_hash_of(paths: Iterable[Path], columns: Sequence[str]) -> str:
    """Return `data.labels_hash` of the rows in some shards; see `LabelsHash`."""
    hasher = LabelsHash(columns)
    for path in paths:
        hasher.add(path)
    return hasher.hexdigest()


def encoded_labels(table: pa.Table, columns: Sequence[str]) -> bytes:
    """Return the fields that are hashed of some rows, as JSON in canonical form without the brackets of the list.

    Args:
        table: rows of a shard.
        columns: those of masses, as the manifest lists them.
    """
    return encoded_items(_entries(table, columns)) if columns else _encoded(table)


def _encoded(table: pa.Table) -> bytes:
    """Return the entries of rows without masses as JSON, written by Arrow: a quarter of the time that Python takes."""
    # Ids are hexadecimal; one that JSON would escape is damaged, and its hash is another one either way.
    row_ids, labels, pair_ids, sources = (table.column(name).combine_chunks() for name in _COLUMNS)
    pairs = pc.fill_null(pc.binary_join_element_wise('"', pc.cast(pair_ids, pa.string()), '"', ""), "null")
    entries = pc.binary_join_element_wise(
        '["', row_ids, '",', pc.cast(labels, pa.string()), ",", pairs, ",", pc.cast(sources, pa.string()), "]", ""
    )
    return ",".join(entries.to_pylist()).encode()


def _entries(table: pa.Table, columns: Sequence[str]) -> list[list[object]]:
    found = [table.column(name).to_pylist() for name in _COLUMNS]
    found.append([*zip(*(numbers(table.column(name)).tolist() for name in MASS_COLUMNS), strict=True)])
    objectives = table.column(OBJECTIVES).to_pylist() if OBJECTIVES in columns else [{}] * table.num_rows
    found.append([{name: [*masses.values()] for name, masses in one.items()} for one in objectives])
    return [[*entry] for entry in zip(*found, strict=True)]
