"""Keep a verified shard open, and refuse to read it once its content is another one.

A run reads a cache for days. Kept open, a shard that is deleted or replaced under its name stays what it was. One that is
written in place does not: its metadata are compared before and after every read, and where they changed the file is hashed
again. A touched file is read on, a changed one ends the run.
"""

import contextlib
import hashlib
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from offline_kto.kto_core.cache.manifest import AGAIN
from offline_kto.kto_core.cache.shards import read_groups, unreadable
from offline_kto.kto_core.cache.verified_shards import state_of
from offline_kto.kto_core.errors import CacheError

_HASHED_AT_ONCE = 2**20


class VerifiedFile:
    """An open shard.

    Args:
        path: of the shard.
        sha256: of its verified content.
        state: `state_of` the file, from before it was verified.
        mapped: map the file into memory.

    Raises:
        CacheError: the file cannot be opened.
    """

    def __init__(self, path: Path, sha256: str, state: Sequence[int], *, mapped: bool) -> None:
        self._path, self._sha256, self._state = path, sha256, list(state)
        try:
            self._source = pa.memory_map(str(path)) if mapped else pa.OSFile(str(path))
        except OSError as error:
            raise unreadable(path, error) from error

    def parsed(self) -> pq.ParquetFile:
        """Return the file with its footer; the pages that are read from it are compared with their checksums.

        Raises:
            CacheError: its content cannot be read, or changed since it was verified.
        """
        with self._as_verified():
            try:
                return pq.ParquetFile(self._source, pre_buffer=False, page_checksum_verification=True)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise unreadable(self._path, error) from error

    def tables(
        self, file: pq.ParquetFile, columns: list[str], *, groups: Sequence[int] | None = None, at_once: int = 1
    ) -> Iterator[pa.Table]:
        """Yield row groups (all of them by default), `at_once` together.

        Args:
            file: from `parsed`.

        Raises:
            CacheError: as `parsed`.
        """
        wanted = range(file.num_row_groups) if groups is None else groups
        for start in range(0, len(wanted), at_once):
            with self._as_verified():
                (table,) = read_groups(
                    self._path, file, columns=columns, groups=wanted[start : start + at_once], at_once=at_once
                )
            yield table

    @contextlib.contextmanager
    def _as_verified(self) -> Iterator[None]:
        """Check the content before a read, which a truncated mapped file would not survive, and after it."""
        self._check()
        try:
            yield
        finally:
            self._check()

    def _check(self) -> None:
        try:
            state = state_of(os.fstat(self._source.fileno()))
            same = state == self._state or self._hash() == self._sha256
        except OSError as error:
            raise unreadable(self._path, error) from error
        if not same:
            raise CacheError(
                f"{self._path}: its content changed after it was verified (sha256 differs); nothing was computed from the new one. "
                f"{AGAIN} Then continue, kto-train with --resume, kto-sweep with the same command."
            )
        self._state = state

    def _hash(self) -> str:
        hasher, at = hashlib.sha256(), 0
        while block := os.pread(self._source.fileno(), _HASHED_AT_ONCE, at):
            hasher.update(block)
            at += len(block)
        return hasher.hexdigest()


def allow_open_files(count: int) -> None:
    """Raise the limit on open files, so that all shards stay open, and the files that are read are the verified ones.

    Raises:
        CacheError: the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + 256 if Path("/proc/self/fd").exists() else 2 * count + 512
    if resource.RLIM_INFINITY in (soft, hard) or wanted <= soft:
        return
    if wanted > hard:
        raise CacheError(
            f"The cache has {count:,} shards, and this system allows {hard:,} open files (ulimit -Hn). Make fewer shards: "
            "kto-precompute --rows-per-shard 65536 into another folder."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
