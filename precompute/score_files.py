"""Read and write files of scores: shards, and parts of shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.cache.shards import open_shard, read_groups, read_metadata, read_unlisted, write_shard
from offline_kto.kto_core.cache.table_rows import Rows
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import json_hash, sequence_id
from offline_kto.precompute.out_folder import PARTS


class ScoredFile(NamedTuple):
    """A whole file with scores.

    Attributes:
        key: of the shard, if the file is one.
        part_of: key of the shard, if the file is a part of one.
    """

    path: Path
    key: str | None
    part_of: str | None

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, object]) -> "ScoredFile":
        key, part_of = (str(metadata[name]) if name in metadata else None for name in ("key", "part_of"))
        return cls(path, key, part_of)

    def sequences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the ids of its sequences as 16 bytes (V16), the row of each, and its place in that row."""
        ids, rows, slots = [], [], []
        number = 0
        for table in read_groups(self.path, open_shard(self.path)):
            for row in Rows(table):
                for slot, completion in enumerate((row["completion_ids"], *row["kl_completion_ids"])):
                    ids.append(bytes.fromhex(sequence_id(row["prompt_ids"], completion)))
                    rows.append(number)
                    slots.append(slot)
                number += 1
        return (
            np.frombuffer(b"".join(ids), dtype="V16"),
            np.array(rows, dtype=np.int64),
            np.array(slots, dtype=np.int64),
        )


def read_scores(path: Path, rows: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """Return the scores of some sequences of a file.

    Args:
        rows, slots: as `ScoredFile.sequences` returns them.
    """
    file = open_shard(path)
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    of = np.searchsorted(ends, rows, side="right")
    found: dict[int, np.ndarray] = {}
    groups: list[int] = np.unique(of).tolist()
    for group, table in zip(groups, read_groups(path, file, groups=groups), strict=True):
        content = Rows(table)
        start = int(ends[group]) - len(content)
        for i in np.flatnonzero(of == group).tolist():
            row, slot = content[int(rows[i]) - start], int(slots[i])
            # A copy, because a view would keep the whole group in memory.
            found[i] = (row["ref_token_logps"] if slot == 0 else row["ref_kl_token_logps"][slot - 1]).copy()
    return [found[i] for i in range(len(rows))]


def is_whole(path: Path, *, vocabulary: int) -> bool:
    """Return whether a shard can be read and all its rows are valid. Invalid shards are rescored."""
    return read_whole(path, vocabulary=vocabulary) is not None


def read_whole(path: Path, *, vocabulary: int, partners: int | None = None) -> pa.Table | None:
    """Return the rows of a shard; None if it cannot be read, or a row is invalid."""
    if path.is_symlink():
        return None
    try:
        table = read_unlisted(path)
        check_table(table, path.name, vocabulary=vocabulary, partners=partners)
    except (CacheError, MemoryError):
        return None
    return table


def write_part(out: Path, key: str, rows: Sequence[CacheRow], metadata: Mapping[str, object]) -> None:
    """Write some of the scores of a shard.

    Args:
        out: the folder of the cache; its folder for parts exists.
        metadata: see `Store.metadata`.

    Raises:
        CacheError: they cannot be written.
    """
    content = json_hash([row["row_id"] for row in rows])
    path = out / PARTS / "train" / _part_name(key, content[:32])
    write_shard(path, rows, {**metadata, "part_of": key})


def drop_parts(out: Path, key: str) -> None:
    """Remove the parts of a shard. Their folder stays, because another process may be writing into it."""
    for path in (out / PARTS / "train").glob(_part_name(key, "*")):
        path.unlink(missing_ok=True)


def read_parts(out: Path, key: str, identity: Mapping[str, object], *, vocabulary: int) -> dict[str, np.ndarray]:
    """Return the scores in the parts of a shard, by sequence id."""
    scores: dict[str, np.ndarray] = {}
    for path in sorted((out / PARTS / "train").glob(_part_name(key, "*"))):
        metadata = read_metadata(path) or {}
        ours = metadata.get("part_of") == key and metadata.get("identity") == identity
        if ours and is_whole(path, vocabulary=vocabulary):
            ids, rows, slots = ScoredFile.of(path, metadata).sequences()
            scores.update(zip((bytes(one).hex() for one in ids), read_scores(path, rows, slots), strict=True))
    return scores


def _part_name(key: str, content: str) -> str:
    return f"{key[:32]}-{content}.parquet"
