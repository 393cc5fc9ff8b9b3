"""Write a cache behind a URL through a local working folder, and read it from a local copy."""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from offline_kto.kto_core.cache.manifest import MANIFEST, Manifest, no_manifest, parse_manifest
from offline_kto.kto_core.cache.manifest_fields import ShardFields
from offline_kto.kto_core.cache.own_files import own_files
from offline_kto.kto_core.cache.remote_folder import Remote, no_room
from offline_kto.kto_core.cache.remote_lock import RemoteLock
from offline_kto.kto_core.cache.remote_shards import SECONDS_TO_END, download_shards
from offline_kto.kto_core.cache.verified_shards import FileState
from offline_kto.kto_core.durable_files import OF_THE_DISK, remove_temporary, replacing
from offline_kto.kto_core.errors import CacheError, KTOError, printable
from offline_kto.kto_core.hashing import file_hash
from offline_kto.kto_core.locations import Location, is_url
from offline_kto.kto_core.lock import only_writer
from offline_kto.kto_core.progress import Progress


class Mirror:
    """A local folder whose changes are copied to a remote folder.

    Args:
        remote: its files are downloaded into the folder first.
        folder: the local folder; shards that an earlier run left here are moved to `kept`, so that their scores can be
            reused.
        kept: name of the folder for those shards.
        check: called before the remote is changed; raises if this process no longer holds the lock.
    """

    def __init__(self, remote: Remote, folder: Path, *, kept: str, check: Callable[[], None]) -> None:
        self._remote, self._folder, self._check = remote, folder, check
        for path in [path for path in folder.rglob("*.parquet") if _is_part(path.relative_to(folder).as_posix())]:
            aside = folder / kept / "train" / f"{file_hash(path)[:32]}.parquet"
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.replace(aside)
        (folder / MANIFEST).unlink(missing_ok=True)
        there = {name: size for name, size in remote.files().items() if _is_part(name)}
        with Progress("downloading", sum(there.values()), "B") as progress:
            for name, size in there.items():
                remote.download(name, _inside(folder, name))
                progress.add(size)
        self._pushed = {name: state for name, state in self._local().items() if name in there}

    def push(self) -> None:
        """Copy all changes to the remote. A changed manifest is removed first and uploaded last."""
        self._check()
        local = self._local()
        gone = self._pushed.keys() - local.keys()
        new = sorted(name for name, state in local.items() if self._pushed.get(name) != state)
        if MANIFEST in gone or MANIFEST in new:
            self._remote.remove(MANIFEST)
        for name in new:
            if name != MANIFEST:
                self._put(name, next((old for old in gone if self._pushed[old] == local[name]), None))
        for name in gone:
            self._remote.remove(name)
        if MANIFEST in new:
            self._put(MANIFEST, None)
        self._pushed = local

    def _put(self, name: str, renamed_from: str | None) -> None:
        if renamed_from is not None:
            self._remote.copy(renamed_from, name)
        else:
            self._remote.upload(self._folder / name, name)

    def _local(self) -> dict[str, tuple[int, int, int]]:
        """Return (size, mtime, inode) of the cache's files by name, which shows changes and renames."""
        found = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and _is_part(name):
                state = path.stat()
                found[name] = (state.st_size, state.st_mtime_ns, state.st_ino)
        return found


def _is_part(name: str) -> bool:
    """Return whether a file belongs to a cache: the manifest or a shard, whether it is listed there or not."""
    folder, _, last = name.rpartition("/")
    shard = folder.split("/")[-1] == "train" and last.endswith(".parquet") and not last.startswith(".")
    return name == MANIFEST or shard


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CacheError(f"{printable(name)}: is outside the cache folder; it is not read.")
    return path


def check_remote(url: str) -> None:
    """Refuse a remote folder that cannot be read or that contains other files, before any work is done."""
    names = Remote(url).files()
    foreign = [name for name in names if not _is_part(name) and not name.startswith(".")]
    if foreign and MANIFEST not in names:
        raise CacheError(
            f"--out {url}: contains {printable(foreign[0])}, which is not part of a reference cache. Choose an empty folder."
        )


@contextlib.contextmanager
def working_folder(url: str, *, kept: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Lock a remote cache, and yield the local folder where it is written.

    Args:
        url: the remote folder.
        kept: name of the folder for shards that are kept for their scores.

    Yields:
        the folder, and a function to call when a change in it is finished.

    Raises:
        CacheError: another process writes there, or the store reports an error.
    """
    remote = Remote(url)
    folder = _own_folder("working", remote.url)
    try:
        with speaking_of(url, folder), only_writer(folder, CacheError):
            with RemoteLock(remote) as lock:
                yield folder, Mirror(remote, folder, kept=kept, check=lock.check).push
            shutil.rmtree(folder)  # everything was uploaded; after an error the folder is kept
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in OF_THE_DISK:
            raise no_room(error.__cause__) from error
        raise


@contextlib.contextmanager
def speaking_of(location: Location, folder: Path) -> Iterator[None]:
    """Replace the local folder by the user's location in error messages."""
    try:
        yield
    except KTOError as error:
        raise type(error)(str(error).replace(str(folder), str(location).rstrip("/"))) from error.__cause__


def local_copy(location: Location, *, anew: bool = False) -> Path:
    """Return a local folder with a cache's files: the location itself, or a download that later runs reuse.

    Args:
        anew: download every file again, to check the remote files themselves.

    Raises:
        CacheError: no cache there, or the store reports an error.
    """
    if not is_url(location):
        return Path(location)
    return _copy(Remote(str(location)), anew=anew)


@contextlib.contextmanager
def begun_downloads(*locations: Location | None) -> Iterator[None]:
    """Download the caches that are behind URLs in the background while the block runs.

    `local_copy` waits for them, in this process and in others. It also reports what went wrong, because it then tries
    again. Leaving the block stops a download.

    Raises:
        CacheError: a URL that cannot be used.
    """
    # Created here: a library that is imported in two threads at once may be found half imported.
    remotes = [Remote(str(location)) for location in locations if location is not None and is_url(location)]
    stop = threading.Event()

    def download() -> None:
        with contextlib.suppress(KTOError):
            for remote in remotes:
                if not stop.is_set():
                    _copy(remote, stop=stop)

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(SECONDS_TO_END)


def remote_manifest(location: Location) -> Manifest:
    """Return the manifest of a cache behind a URL, without its shards. Raises: CacheError: no cache there."""
    return _read_manifest(Remote(str(location)))[1]


def _read_manifest(remote: Remote) -> tuple[bytes, Manifest]:
    content = remote.read(MANIFEST)
    if content is None:
        raise no_manifest(remote.url, unfinished=any(map(_is_part, remote.files())))
    return content, parse_manifest(f"{remote.url}/{MANIFEST}", content)


def _copy(remote: Remote, *, anew: bool = False, stop: threading.Event | None = None) -> Path:
    """Return the download folder of a remote cache, with every shard in it; incomplete if `stop` was set."""
    content, manifest = _read_manifest(remote)
    listed = {shard["file"] for shard in manifest.shards}
    strays = [name for name in remote.files() if name.startswith("train/") and _is_part(name) and name not in listed]
    if strays:
        raise CacheError(f"{remote.url}/{printable(strays[0])}: in the folder, but not in the manifest. Remove it.")
    folder = _own_folder("downloads", hashlib.sha256(content).hexdigest())
    with only_writer(folder, CacheError, wait=True):
        shards = [(_inside(folder, shard["file"]), shard) for shard in manifest.shards]
        for parent in {path.parent for path, _ in shards}:
            remove_temporary(parent)
        if not anew:
            shards = _lacking(shards)
        with Progress("downloading", sum(shard["bytes"] for _, shard in shards), "B") as progress:
            download_shards(
                remote,
                shards,
                on_bytes=progress.add,
                stop=stop or threading.Event(),
                is_current=lambda: remote.read(MANIFEST) == content,
            )
        if stop is None or not stop.is_set():
            with replacing(folder / MANIFEST) as temporary:
                temporary.write_bytes(content)
    return folder


# What this process knows of files that it downloaded or hashed: their state then, and the sha256.
_hashed: dict[Path, tuple[list[int], str]] = {}


def _lacking(shards: list[tuple[Path, ShardFields]]) -> list[tuple[Path, ShardFields]]:
    """Return the shards that are missing or damaged in the download folder."""

    def is_whole(entry: tuple[Path, ShardFields]) -> bool:
        path, shard = entry
        try:
            state = FileState.of(path).state
            if path.stat().st_size != shard["bytes"]:
                return False
            if path not in _hashed or _hashed[path][0] != state:
                _hashed[path] = state, file_hash(path)
        except FileNotFoundError:
            return False
        return _hashed[path][1] == shard["sha256"]

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [entry for entry, whole in zip(shards, pool.map(is_whole, shards), strict=True) if not whole]


def _own_folder(kind: str, name: str) -> Path:
    """Return the user's local folder for a remote location, and create it if needed."""
    try:
        folder = own_files() / kind / hashlib.sha256(name.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise no_room(error) from error
    return folder
