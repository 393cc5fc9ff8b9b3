"""Write the folder of a reference cache: find the shards that exist or can be reused, and complete it with the manifest.

refs/manifest.json          written last; without it the cache is not complete
refs/train/00000.parquet    complete shards; an interrupted run resumes at the first missing one
refs/.next/train/...        new shards while a finished cache is updated; the old one stays valid meanwhile
refs/.kept/train/...        shards of an unfinished run with other rows, kept for their scores
refs/.parts/train/...       scores of shards in progress (`offline_kto.precompute.parts`)
refs/.plan/...              shards without their scores, for workers (`offline_kto.precompute.plan_files`)
refs/.done/TOKEN/...        shards that workers finished, until they are moved to `train`
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa

from offline_kto.kto_core.cache.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    differences,
    read_manifest,
    write_manifest,
)
from offline_kto.kto_core.cache.manifest_fields import Identity, OptionalEntries, PairingFields, Sections, ShardFields
from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.cache.shards import open_shard, read_groups, read_metadata, shard_name, write_table
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import flush, remove_temporary, replacing
from offline_kto.kto_core.errors import CacheError, NewerFormatError
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.hashing import ID, file_hash
from offline_kto.precompute.out_folder import DONE, KEPT, NEXT, PARTS, PLAN, done_in, made, shards_in
from offline_kto.precompute.score_files import ScoredFile, drop_parts, is_whole, read_whole, write_part
from offline_kto.precompute.shard_tables import other_columns

# An id as hexadecimal digits.
_HEX = np.dtype(f"S{2 * ID.itemsize}")

# Row groups whose ids are read together.
_GROUPS_AT_ONCE = 64


class Store:
    """One run's access to `--out`.

    Args:
        out: the folder.
        identity: the fields that determine a score (`identity_of`).
        pairing: the manifest's section.
        vocabulary: vocabulary size of the reference.
        rendered_on: the time that the chat template wrote into the rows.
        on_change: called when a shard, or the cache, is finished.
    """

    def __init__(
        self,
        out: Path,
        identity: Identity,
        pairing: PairingFields,
        *,
        vocabulary: int,
        rendered_on: str | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.out, self.identity, self.pairing, self._on_change = out, dict(identity), pairing, on_change
        self.vocabulary, self.target, self._rendered_on = vocabulary, out, rendered_on
        self._entries: dict[str, ShardFields] = {}  # of shards whose hash is known

    def open(
        self,
        *,
        overwrite: bool,
        mark: str,
        labels_hash: str,
        places_hash: str,
        rows_per_shard: int,
        row_ids: np.ndarray,
    ) -> bool:
        """Prepare the folder for writing.

        With `overwrite`, existing shards may be replaced; scores of the same reference are still reused. A cache of a version
        that stored no places gets them only then: rewriting it is work that nobody asked for.

        Args:
            row_ids: of the rows to come, dtype `hashing.ID`.

        Returns:
            False if a complete cache with exactly this content already exists.

        Raises:
            CacheError: a cache of another reference exists and `overwrite` is off.
        """
        old = self._finished_cache(overwrite)
        if overwrite:
            self._drop_others(old)
        elif old is not None:
            self._refuse_other(old.identity, old.pairing)
        else:
            for path in (*shards_in(self.out), *shards_in(self.out / PARTS), *done_in(self.out)):
                if metadata := read_metadata(path):  # a damaged shard has no metadata; it is rescored
                    self._refuse_other(cast("Identity", metadata.get("identity", {})))
        if old is not None and not self._drop_damaged(old):
            placed = old.data.get("places_hash") == places_hash or not (old.has_places or overwrite)
            if placed and _is_same(old, mark, labels_hash, rows_per_shard):
                self._remove_strays([shard["file"] for shard in old.shards])
                self._remove_folders()
                self._on_change()
                return False
            self.target = self.out / NEXT
            as_text = np.frombuffer(row_ids.tobytes().hex().encode(), dtype=_HEX)
            gone = len(np.setdiff1d(self._row_ids(old), as_text)) if old.identity == self.identity else 0
            if gone:
                tell(
                    f"drops       {counted(gone, 'scored row')} that {'is' if gone == 1 else 'are'} no longer in the data"
                )
        (self.target / "train").mkdir(parents=True, exist_ok=True)
        return True

    def _row_ids(self, old: Manifest) -> np.ndarray:
        """Return the ids of the rows of a cache, as texts."""
        found = []
        for path in [self.out / shard["file"] for shard in old.shards]:
            for table in read_groups(path, open_shard(path), columns=["row_id"], at_once=_GROUPS_AT_ONCE):
                found.append(np.array([one.encode() for one in table.column("row_id").to_pylist()], dtype=_HEX))
        return np.concatenate(found)

    def _finished_cache(self, overwrite: bool) -> Manifest | None:
        """Return the existing manifest. A damaged one is removed; the shards are then checked one by one."""
        if not (self.out / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(self.out)
            if not manifest.intact:
                raise CacheError(f"{self.out / MANIFEST}: was edited or damaged.")
            return manifest
        except NewerFormatError:
            if not overwrite:
                raise
            self._drop_manifest()
            return None
        except CacheError as error:
            if not any(read_metadata(path) for path in shards_in(self.out)):
                raise  # the folder may not be a cache, so nothing is removed
            tell(f"damaged     {error} Its shards are checked one by one.")
            self._drop_manifest()
            return None

    def _drop_manifest(self) -> None:
        """Remove the manifest, before the first of its files changes."""
        (self.out / MANIFEST).unlink(missing_ok=True)
        flush(self.out)

    def _drop_others(self, old: Manifest | None) -> None:
        """Remove shards of another reference, except those of a finished cache until the new one is finished."""
        folders = (self.out, *self._folders) if old is None else self._folders
        for path in itertools.chain(*map(shards_in, folders), done_in(self.out)):
            metadata = read_metadata(path)
            if metadata and metadata.get("identity") != self.identity:
                path.unlink()

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.out / NEXT, self.out / KEPT, self.out / PARTS

    def _remove_folders(self) -> None:
        for folder in (*self._folders, self.out / PLAN, self.out / DONE):
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_strays(self, names: Sequence[str]) -> None:
        """Remove shards that are not in the manifest: programs that read the folder directly would read them."""
        for path in shards_in(self.out):
            if f"train/{path.name}" not in names:
                path.unlink()

    def _refuse_other(self, identity: Identity, pairing: PairingFields | None = None) -> None:
        lines = differences(identity, self.identity)
        if pairing is not None:
            # More partners only extend the cache: existing pairs stay the same.
            old, new = ({f"pairing.{k}": v for k, v in p.items() if k != "partners"} for p in (pairing, self.pairing))
            lines += differences(old, new)
        if lines:
            raise CacheError(
                f"--out {self.out}: contains a cache with other settings:\n  "
                + "\n  ".join(lines)
                + "\nChoose another --out, or replace it with --overwrite."
            )

    def _drop_damaged(self, old: Manifest) -> bool:
        """Remove shards that differ from what was written, and the manifest. Return whether there were any."""
        try:
            verify_cache(self.out, old)
        except CacheError as error:
            tell(f"damaged     {error}")
            self._drop_manifest()
            for shard in old.shards:
                path = self.out / shard["file"]
                if not (path.exists() and file_hash(path) == shard["sha256"]):
                    path.unlink(missing_ok=True)
            return True
        return False

    def has(self, index: int, key: str, content: Callable[[], pa.Table]) -> bool:
        """Return whether a complete shard with this content exists.

        A shard that says so in its footer but is damaged, or contains other rows, is removed from the folder that this run
        writes. If a crash interrupted the move of new shards into place, some are already in the final folder; these are
        copied back.

        Args:
            content: returns the rows of the plan, without scores.
        """
        for folder in dict.fromkeys((self.target, self.out)):
            path = folder / shard_name(index)
            metadata = read_metadata(path) if path.exists() else {}
            if metadata is not None and (metadata.get("key"), metadata.get("identity")) != (key, self.identity):
                continue
            if why := self._defect(path, content()):
                tell(f"damaged     {path}: {why}; this shard is scored again")
                if folder == self.target:
                    path.unlink()
                continue
            if folder != self.target:
                with replacing(self.target / shard_name(index)) as temporary:
                    shutil.copyfile(path, temporary)
            return True
        return False

    def _defect(self, path: Path, planned: pa.Table) -> str:
        """Return what keeps a shard from being used for rows of the plan; empty if it can be."""
        table = read_whole(path, vocabulary=self.vocabulary, partners=self.pairing["partners"])
        if table is None:
            return "cannot be read, or a row breaks a rule of the format"
        names = other_columns(table, planned)
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not as planned" if names else ""

    def adopt_done(self, keys: Sequence[str]) -> None:
        """Move shards that workers of earlier runs finished into place, and keep the others for their scores.

        Args:
            keys: of all shards.
        """
        number_of = {key: number for number, key in enumerate(keys)}
        for path in done_in(self.out):
            metadata = read_metadata(path) or {}
            number = number_of.get(str(metadata.get("key")))
            if metadata.get("identity") != self.identity or not is_whole(path, vocabulary=self.vocabulary):
                tell(f"damaged     {path}: cannot be used; its shard is scored again")
                path.unlink()
            elif number is not None and not (self.target / shard_name(number)).exists():
                path.replace(self.target / shard_name(number))  # checked again as any other shard
            else:
                self._keep(path)
        shutil.rmtree(self.out / DONE, ignore_errors=True)

    def set_aside(self, indices: Sequence[int]) -> None:
        """Keep the scores of shards that are about to be overwritten, until the cache is complete."""
        for index in indices:
            path = self.target / shard_name(index)
            if path.exists():
                self._keep(path)

    def _keep(self, path: Path) -> None:
        kept = self.out / KEPT / "train"
        kept.mkdir(parents=True, exist_ok=True)
        path.replace(kept / f"{file_hash(path)[:32]}.parquet")

    def scored_files(self) -> Iterator["ScoredFile"]:
        """Yield the whole files on disk with scores of the same reference."""
        for folder in (self.out, *self._folders):
            for path in shards_in(folder):
                metadata = read_metadata(path) or {}
                if metadata.get("identity") == self.identity and is_whole(path, vocabulary=self.vocabulary):
                    yield ScoredFile.of(path, metadata)

    def write(self, index: int, key: str, table: pa.Table) -> None:
        """Write one shard, and remove its parts. Raises: CacheError: it cannot be written."""
        write_table(self.target / shard_name(index), table, {**self.metadata, "key": key})
        self.drop_parts(key)
        self._on_change()

    def adopt(self, index: int, key: str, path: Path, entry: "ShardSize") -> Path:
        """Move a shard that a worker finished into place, and remove its parts.

        Args:
            path: in the same file system.
            entry: its size and hash, as the worker read them.

        Returns:
            Its new path.

        Raises:
            CacheError: the file is not the one that the worker wrote.
        """
        found = path.stat().st_size if path.exists() else None
        if found != entry.bytes:
            raise CacheError(
                f"{path}: should have {entry.bytes:,} bytes, as its worker wrote, found "
                f"{'no file' if found is None else f'{found:,}'}. Do all workers see the same --out?"
            )
        name = shard_name(index)
        path.replace(self.target / name)
        flush(self.target / "train")
        self._entries[name] = {"file": name, "rows": entry.rows, "bytes": entry.bytes, "sha256": entry.sha256}
        drop_parts(self.out, key)
        self._on_change()
        return self.target / name

    def changed(self) -> None:
        """Note that workers have written parts."""
        self._on_change()

    def write_part(self, key: str, rows: Sequence[CacheRow]) -> None:
        """Write some of the scores of a shard. Raises: CacheError: they cannot be written."""
        folder = self.out / PARTS / "train"
        with made(folder.parent), made(folder):
            write_part(self.out, key, rows, self.metadata)
        self._on_change()

    @property
    def metadata(self) -> dict[str, object]:
        """The footer that all shards have in common."""
        day = {"rendered_on": self._rendered_on} if self._rendered_on else {}
        return {"format": FORMAT, "identity": self.identity, **day}

    def drop_parts(self, key: str) -> None:
        """Remove the parts of a shard, and their folders if they are empty."""
        drop_parts(self.out, key)
        for folder in (self.out / PARTS / "train", self.out / PARTS):
            with contextlib.suppress(OSError):  # missing, or not empty
                folder.rmdir()

    def publish(self, count: int, sections: Sections, mark: str, *, optional: OptionalEntries | None = None) -> None:
        """Move shards 0 to `count` - 1 into place, and write the manifest, which completes the cache.

        Args:
            optional: entries of the manifest that only some caches have.
        """
        names = [shard_name(i) for i in range(count)]
        if self.target != self.out:
            # From here until the manifest is written the cache is incomplete; a crash in between loses no shard.
            self._drop_manifest()
            for name in names:
                (self.target / name).replace(self.out / name)
        self._remove_strays(names)
        for folder in (self.out, self.out / "train"):
            remove_temporary(folder)
        self._remove_folders()
        flush(self.out / "train")  # the manifest must not reach the disk before the shards that it lists
        write_manifest(self.out, sections, [self._entry(name) for name in names], mark, optional=optional)
        self._on_change()

    def _entry(self, name: str) -> ShardFields:
        path = self.out / name
        if name in self._entries:
            return self._entries[name]
        rows = open_shard(path).metadata.num_rows
        return {"file": name, "rows": rows, "bytes": path.stat().st_size, "sha256": file_hash(path)}


class ShardSize(NamedTuple):
    """Rows, bytes and hash of a shard's file."""

    rows: int
    bytes: int
    sha256: str


def _is_same(old: Manifest, mark: str, labels_hash: str, rows_per_shard: int) -> bool:
    fits = max(shard["rows"] for shard in old.shards) <= rows_per_shard
    return fits and old.fingerprint == mark and old.data.get("labels_hash") == labels_hash
