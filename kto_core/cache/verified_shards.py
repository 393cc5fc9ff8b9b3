"""Remember which shards were verified, in the user's own folder: `~/.cache/offline-kto/verified/`.

Two facts about a shard are remembered. Its content, known by its sha256, keeps the rules of the format: the same bytes
need not be decoded again. A file with a certain device, inode, size, modification time and change time had that sha256:
`--verify changed` believes that it still has it.

The second fact cannot notice a disk that returns other bytes for a file that nobody wrote to, or a program that writes
to the disk below the file system. It notices every write, rename, copy and restored backup: each sets the change time,
which programs cannot choose.
"""

import base64
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.cache.manifest_fields import ShardFields
from offline_kto.kto_core.cache.own_files import own_files
from offline_kto.kto_core.durable_files import replacing
from offline_kto.kto_core.hashing import file_hash, json_hash

# A file that changed more recently may change again within one tick of the file system's clock. Nanoseconds.
_SETTLED = 2_000_000_000

# Larger files are not read; ten million rows take 3 MB.
_LARGEST = 256 * 2**20

# What decides whether the rows of a shard keep the rules.
_CODE_OF_CHECKS = ("shards.py", "row_rules.py", "row_schema.py", "arrow_lists.py")

# What was not written for so long is removed: the cache may be gone. Seconds.
_LONGEST_KEPT = 90 * 86_400


@dataclass(frozen=True)
class CheckedShard:
    """The result of a check of one shard.

    Attributes:
        key: what its footer says that it was made from.
        labels: bool, shape (rows,).
        groups: rows of each of its row groups.
        largest_id: its largest token id; 0 if its content was not checked here.
    """

    key: str | None
    labels: np.ndarray
    groups: list[int]
    largest_id: int


@dataclass
class _Remembered:
    """What the file has on one shard.

    Attributes:
        rules: hash of everything that the check of its content depended on.
        labels: packed bits, in base64.
        file: device, inode, size, modification time and change time in nanoseconds; None if they cannot be relied on.
    """

    rules: str
    key: str | None
    rows: int
    labels: str
    groups: list[int]
    largest_id: int
    file: list[int] | None

    def checked(self) -> CheckedShard:
        bits = np.frombuffer(base64.b64decode(self.labels), dtype=np.uint8)
        return CheckedShard(
            self.key, np.unpackbits(bits, count=self.rows).view(bool), list(self.groups), self.largest_id
        )


class VerifiedShards:
    """The shards of one cache that were verified before.

    Args:
        folder: the cache.
        manifest: its own.
        share: of the processes of a launch, which remember apart from each other.
        trust_unchanged: believe that files whose metadata did not change have their old content.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, share: tuple[int, int], trust_unchanged: bool) -> None:
        self._trusts, self._path = trust_unchanged, _path_of(folder, share)
        self._rules = _rules_of(manifest)
        self._found = {**_read(_path_of(folder, (0, 1))), **_read(self._path)}
        self._kept: dict[str, _Remembered] = {}

    def unchanged(self, path: Path, shard: ShardFields) -> CheckedShard | None:
        """Return the result for a file that did not change since it was verified, if that is believed."""
        known = self._known(shard)
        if not self._trusts or known is None or known.file is None or known.file != state_of(path.stat()):
            return None
        self._kept[shard["sha256"]] = known
        return known.checked()

    def content(self, shard: ShardFields) -> CheckedShard | None:
        """Return the result for a content; None if it was not checked by the same rules."""
        known = self._known(shard)
        return None if known is None else known.checked()

    def _known(self, shard: ShardFields) -> _Remembered | None:
        known = self._found.get(shard["sha256"])
        same = known is not None and known.rules == self._rules and known.rows == shard["rows"]
        return known if same else None

    def add(self, path: Path, shard: ShardFields, checked: CheckedShard, *, before: "FileState") -> None:
        """Remember a shard whose whole content was checked.

        Args:
            before: of the file, before it was read.
        """
        settled = before.taken_at - max(before.state[-2:]) > _SETTLED and before.state == state_of(path.stat())
        self._kept[shard["sha256"]] = _Remembered(
            rules=self._rules,
            key=checked.key,
            rows=len(checked.labels),
            labels=base64.b64encode(np.packbits(checked.labels).tobytes()).decode(),
            groups=checked.groups,
            largest_id=checked.largest_id,
            file=before.state if settled else None,
        )

    def write(self) -> None:
        """Write what is known of the shards of this cache; nothing is remembered where that is not possible."""
        if self._kept == self._found:
            return
        content = {name: asdict(one) for name, one in self._kept.items()}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps({"sha256": json_hash(content), "shards": content}), encoding="ascii")
            for path in self._path.parent.glob("*.json"):
                if time.time() - path.stat().st_mtime > _LONGEST_KEPT:
                    path.unlink()


@dataclass(frozen=True)
class FileState:
    """A file's metadata, and the time at which they were read, in nanoseconds."""

    state: list[int]
    taken_at: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        taken_at = time.time_ns()
        return cls(state_of(path.stat()), taken_at)


def state_of(found: os.stat_result) -> list[int]:
    """Return what changes in the metadata of a file whenever it is written, renamed, copied or replaced."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _path_of(folder: Path, share: tuple[int, int]) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    try:
        return own_files() / "verified" / f"{name}-{share[0]}-{share[1]}.json"
    except RuntimeError:  # without a home nothing is remembered: a file cannot contain one
        return Path(os.devnull) / name


def _rules_of(manifest: Manifest) -> str:
    """Return a hash of the code that checks a shard's rows, and of what it compares them with."""
    return json_hash(
        [
            [file_hash(Path(__file__).with_name(name)) for name in _CODE_OF_CHECKS],
            manifest.identity,
            manifest.vocabulary,
            manifest.partners,
            manifest.columns,
            manifest.objectives,
            manifest.has_places,
        ]
    )


def _read(path: Path) -> Mapping[str, _Remembered]:
    """Return what a file remembers; nothing if it is damaged, missing, or another user's."""
    try:
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_size > _LARGEST:
            return {}
        content = json.loads(path.read_text(encoding="ascii"))
        if content["sha256"] != json_hash(content["shards"]):
            return {}
        return {name: _Remembered(**one) for name, one in content["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
