"""Check a cache: every byte against the manifest's hashes, every row against the rules of the format.

A shard's sha256 finds changed bytes. The checks of its rows find a shard that another program wrote and declared in
the manifest. Shards are checked in parallel threads, in little memory.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from offline_kto.kto_core.cache.arrow_lists import numbers
from offline_kto.kto_core.cache.labels_hash import LabelsHash, encoded_labels
from offline_kto.kto_core.cache.manifest import AGAIN, MANIFEST, Manifest, check_places, differences, readable
from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.row_schema import has_places, optional_columns
from offline_kto.kto_core.cache.shards import check_packing, open_shard, read_groups, read_metadata
from offline_kto.kto_core.cache.verified_shards import CheckedShard, FileState, VerifiedShards
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash

# Size in memory of the row groups decoded at a time, bytes: enough that the time depends on rows, not on reads.
_BYTES_AT_ONCE = 2**20

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Verified:
    """The result of a check of all rows.

    Attributes:
        labels: bool, shape (rows,).
        largest_id: the largest token id in the shards whose content was checked here.
        groups: rows of each row group, by shard.
        states: `state_of` each shard, from before it was checked.
    """

    labels: np.ndarray
    largest_id: int
    groups: list[list[int]]
    states: list[list[int]]


def verify_cache(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int] = (0, 1),
    on_rows: Callable[[int], None] | None = None,
    known: VerifiedShards | None = None,
) -> Verified:
    """Check a cache completely.

    Args:
        folder: the cache.
        manifest: its own.
        share: (i, n) checks the content of every n-th shard, starting with the i-th; other processes check the rest.
        on_rows: called with the number of rows checked since the last call.
        known: shards that were verified before, and need not be checked again; None checks all of them.

    Raises:
        CacheError: naming the file and what is wrong with it.
    """
    with readable(folder):
        check_places(folder, manifest)
        shards = _Shards(folder, manifest, share, known)
        hasher = LabelsHash(manifest.columns) if shards.should_hash_labels else None
        found = []
        for path, (rows, encoded) in zip(
            shards.paths, _in_threads(shards.check, range(len(shards.paths))), strict=True
        ):
            found.append(rows)
            if on_rows is not None:
                on_rows(len(rows.labels))
            if hasher is not None and encoded is not None:
                hasher.add_encoded(encoded)
            elif hasher is not None:  # known from before, or checked by another process
                hasher.add(path)
    labels = np.concatenate([one.labels for one in found])
    _check_labels(folder, manifest, int(labels.sum()), hasher)
    if not manifest.intact:
        raise CacheError(f"{folder / MANIFEST}: was edited or damaged since kto-precompute wrote it. {AGAIN}")
    if known is not None:
        known.write()
    largest = max(one.largest_id for one in found)
    return Verified(labels, largest, [one.groups for one in found], [one.state for one in shards.states])


def _check_labels(folder: Path, manifest: Manifest, desirable: int, hasher: LabelsHash | None) -> None:
    """Check the labels of all rows, in their order: a shard that the manifest vouches for may have labels that were swapped."""
    if desirable != manifest.data["desirable"]:
        raise CacheError(
            f"{folder / MANIFEST}: has {manifest.data['desirable']} desirable rows, the shards have {desirable}. {AGAIN}"
        )
    if hasher is not None and hasher.hexdigest() != manifest.data["labels_hash"]:
        raise CacheError(
            f"{folder / MANIFEST}: labels, masses, pairs, sources or the order of the rows in the shards are not those that "
            f"kto-precompute wrote (labels_hash differs). {AGAIN}"
        )


class _Shards:
    """The shards of a cache while they are checked, in several threads.

    Args:
        folder, manifest, share, known: as in `verify_cache`.

    Attributes:
        paths: of the shards.
        states: of their files, before they are read.

    Raises:
        CacheError: a footer that says another reference, or the same rows as another one.
    """

    def __init__(self, folder: Path, manifest: Manifest, share: tuple[int, int], known: VerifiedShards | None) -> None:
        self._manifest, self._known = manifest, known
        self._first, self._every = share
        self.paths = [folder / shard["file"] for shard in manifest.shards]
        self.states = [FileState.of(path) for path in self.paths]
        self._unchanged = [
            None if known is None else known.unchanged(path, shard)
            for path, shard in zip(self.paths, manifest.shards, strict=True)
        ]
        self._keys = self._check_footers()

    @property
    def should_hash_labels(self) -> bool:
        """Return whether this process hashes the labels of all rows: the first one, if it checks rows that it does not know."""
        if self._first or self._manifest.data.get("labels_hash") is None:
            return False
        known = self._known
        return known is None or any(known.content(shard) is None for shard in self._manifest.shards[:: self._every])

    def check(self, number: int) -> tuple[CheckedShard, bytes | None]:
        """Check a shard, and return its `encoded_labels`, too, if all its rows were read.

        Raises:
            CacheError: other bytes than those that were written, or a broken rule.
        """
        found = self._unchanged[number]
        if found is not None:
            return found, None
        path, shard = self.paths[number], self._manifest.shards[number]
        with readable(path):
            if number % self._every != self._first:
                return self._check_content(number, whole=False)
            if file_hash(path) != shard["sha256"]:
                raise CacheError(f"{path}: its content changed since it was written (sha256 differs). {AGAIN}")
            found, encoded = None if self._known is None else self._known.content(shard), None
            if found is None:
                found, encoded = self._check_content(number, whole=True)
            if self._known is not None:
                self._known.add(path, shard, found, before=self.states[number])
        return found, encoded

    def _check_footers(self) -> list[str | None]:
        """Check that each footer has the manifest's reference, and that no two shards contain the same rows.

        Returns:
            What each shard was made from.
        """
        paths, unchanged = self.paths, self._unchanged
        unread = [number for number, known in enumerate(unchanged) if known is None]
        read = dict(zip(unread, _in_threads(lambda number: read_metadata(paths[number]) or {}, unread), strict=True))
        keys: list[str | None] = []
        made_from: dict[str, Path] = {}
        for number, (path, known) in enumerate(zip(paths, unchanged, strict=True)):
            metadata = {"key": known.key} if known is not None else read[number]
            identity = metadata.get("identity")
            lines = differences(identity, self._manifest.identity) if isinstance(identity, dict) else []
            if lines:
                raise CacheError(f"{path}: was scored under another reference ({'; '.join(lines)}). {AGAIN}")
            key = metadata.get("key")
            keys.append(key if isinstance(key, str) else None)
            if isinstance(key, str) and made_from.setdefault(key, path) != path:
                raise CacheError(f"{path}: contains the same rows as {made_from[key].name}. {AGAIN}")
        return keys

    def _check_content(self, number: int, *, whole: bool) -> tuple[CheckedShard, bytes | None]:
        """Check all rows of a shard, or count its rows and read their labels."""
        path, manifest = self.paths[number], self._manifest
        file = open_shard(path)
        if file.metadata.num_rows != manifest.shards[number]["rows"]:
            said = manifest.shards[number]["rows"]
            raise CacheError(f"{path}: {file.metadata.num_rows} rows, the manifest says {said}. {AGAIN}")
        if optional_columns(file.schema_arrow, path) != (manifest.columns, manifest.objectives):
            raise CacheError(f"{path}: its masses or objectives are not those that the manifest lists. {AGAIN}")
        if has_places(file.schema_arrow, path) != manifest.has_places:
            raise CacheError(f"{path}: has places and the manifest lists none, or the other way round. {AGAIN}")
        sizes = check_packing(path, file)
        labels, encoded, largest = [np.empty(0, dtype=bool)], [], 0
        for groups in _together(sizes):
            columns = None if whole else ["label"]
            (table,) = read_groups(path, file, columns=columns, groups=groups, at_once=len(groups))
            if whole:
                rules = {"vocabulary": manifest.vocabulary, "partners": manifest.partners}
                largest = max(largest, check_table(table, str(path), **rules))
                encoded.append(encoded_labels(table, manifest.columns))
            labels.append(numbers(table.column("label")))
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        checked = CheckedShard(self._keys[number], np.concatenate(labels), rows, largest)
        return checked, b",".join(filter(None, encoded)) if whole else None


def _together(sizes: Sequence[int]) -> Iterator[range]:
    """Yield row groups that are decoded together, by their sizes in memory."""
    start, size = 0, 0
    for number, more in enumerate(sizes):
        if number > start and size + more > _BYTES_AT_ONCE:
            yield range(start, number)
            start, size = number, 0
        size += more
    if sizes:
        yield range(start, len(sizes))


def _in_threads(check: Callable[[int], _Result], numbers: Sequence[int]) -> Iterator[_Result]:
    """Yield the results in order; of several errors the first in order is raised."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        tasks = deque(pool.submit(check, number) for number in numbers)
        try:
            while tasks:
                yield tasks.popleft().result()  # nothing else keeps the results
        finally:
            pool.shutdown(cancel_futures=True)  # the first error cancels the rest
