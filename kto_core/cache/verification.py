"""Check a cache: every byte against the manifest's hashes, every row against the rules of the format.

A shard's sha256 finds changed bytes. The checks of its rows find a shard that another program wrote and declared in
the manifest. Shards are checked in parallel threads, in little memory.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offline_kto.kto_core.cache.manifest import AGAIN, MANIFEST, Manifest, check_places, differences, readable
from offline_kto.kto_core.cache.shards import (
    check_packing,
    check_table,
    has_places,
    numbers,
    open_shard,
    optional_columns,
    read_groups,
    read_metadata,
)
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash

# Row groups decoded at a time: enough that the time depends on the number of rows, not of reads.
_GROUPS_AT_ONCE = 16


@dataclass(frozen=True)
class Verified:
    """The result of a check of all rows.

    Attributes:
        labels: bool, shape (rows,).
        largest_id: the largest token id in the shards whose content was checked here.
    """

    labels: np.ndarray
    largest_id: int


def verify_cache(
    folder: Path, manifest: Manifest, *, share: tuple[int, int] = (0, 1), on_rows: Callable[[int], None] | None = None
) -> Verified:
    """Check a cache completely, as far as possible without a model.

    Args:
        share: (i, n) checks the content of every n-th shard, starting with the i-th; other processes check the rest.
        on_rows: called with the number of rows checked since the last call.

    Raises:
        CacheError: naming the file and what is wrong with it.
    """
    first, every = share

    def check(number: int) -> Verified:
        found = _check_shard(folder, manifest, number, whole=number % every == first)
        if on_rows is not None:
            on_rows(len(found.labels))
        return found

    with readable(folder):
        check_places(folder, manifest)
        _check_footers(folder, manifest)
        found = _in_threads(check, len(manifest.shards))
    labels = np.concatenate([one.labels for one in found])
    desirable = manifest.data["desirable"]
    if int(labels.sum()) != desirable:
        raise CacheError(
            f"{folder / MANIFEST}: has {desirable} desirable rows, the shards have {labels.sum()}. {AGAIN}"
        )
    if not manifest.intact:
        raise CacheError(f"{folder / MANIFEST}: was edited or damaged since kto-precompute wrote it. {AGAIN}")
    return Verified(labels, max(one.largest_id for one in found))


def _in_threads(check: Callable[[int], Verified], count: int) -> list[Verified]:
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(check, number) for number in range(count)]
        try:
            return [task.result() for task in tasks]
        finally:
            pool.shutdown(cancel_futures=True)  # the first error cancels the rest


def _check_footers(folder: Path, manifest: Manifest) -> None:
    """Check that each shard's footer has the manifest's reference, and that no two shards contain the same rows."""
    made_from: dict[str, Path] = {}
    for shard in manifest.shards:
        path = folder / shard["file"]
        metadata = read_metadata(path) or {}
        identity = metadata.get("identity")
        lines = differences(identity, manifest.identity) if isinstance(identity, dict) else []
        if lines:
            raise CacheError(f"{path}: was scored under another reference ({'; '.join(lines)}). {AGAIN}")
        key = metadata.get("key")
        if isinstance(key, str) and made_from.setdefault(key, path) != path:
            raise CacheError(f"{path}: contains the same rows as {made_from[key].name}. {AGAIN}")


def _check_shard(folder: Path, manifest: Manifest, number: int, *, whole: bool) -> Verified:
    shard = manifest.shards[number]
    path = folder / shard["file"]
    if whole and file_hash(path) != shard["sha256"]:
        raise CacheError(f"{path}: its content changed since it was written (sha256 differs). {AGAIN}")
    file = open_shard(path)
    if file.metadata.num_rows != shard["rows"]:
        raise CacheError(f"{path}: {file.metadata.num_rows} rows, the manifest says {shard['rows']}. {AGAIN}")
    found = optional_columns(file.schema_arrow, path)
    if found != (manifest.columns, manifest.objectives):
        raise CacheError(f"{path}: its masses or objectives are not those that the manifest lists. {AGAIN}")
    if has_places(file.schema_arrow, path) != manifest.has_places:
        raise CacheError(f"{path}: has places and the manifest lists none, or the other way round. {AGAIN}")
    check_packing(path, file)
    labels, largest = [np.empty(0, dtype=bool)], 0
    for table in read_groups(path, file, columns=None if whole else ["label"], at_once=_GROUPS_AT_ONCE):
        if whole:
            rules = {"vocabulary": manifest.vocabulary, "partners": manifest.partners}
            largest = max(largest, check_table(table, str(path), **rules))
        labels.append(numbers(table.column("label")))
    return Verified(np.concatenate(labels), largest)
