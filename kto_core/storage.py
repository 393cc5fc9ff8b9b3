"""Caches behind a URL: `s3://`, `gs://`, `hf://` and whatever else fsspec opens.

A remote cache is worked on in a local folder, by the same code as any other:

    written    remote -> a working folder, whose remote follows it shard by shard (`Mirror`)
    read       remote -> a folder of downloads, named by the manifest's content, used again by later runs

An object store shows a file only when it is whole, so the order of changes is all that crash safety needs: the
manifest goes first where it is not valid any more, and comes last. Credentials come from the environment, where each
store's own tools look for them; a URL that holds any is refused, because URLs are logged.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kto_core.console import tell
from kto_core.durable import OF_THE_DISK, replacing
from kto_core.errors import CacheError, KTOError, in_one_line, printable
from kto_core.identity import file_hash
from kto_core.lock import LOCK, holder_name, only_writer
from kto_core.manifest import MANIFEST, no_manifest, parse_manifest
from kto_core.options import Location, is_url
from kto_core.progress import Progress
from kto_core.redaction import bare_url, has_credentials

# A lock that is not refreshed for this long belongs to a process that is gone.
REFRESH_SECONDS, STALE_SECONDS = 10.0, 35.0

# Stores without folders; there "making the folder" would make the bucket that somebody misspelt.
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf")


class Remote:
    """A folder behind a URL.

    Raises (here and in every method):
        CacheError: the URL holds credentials, nothing installed opens it, or the store refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(url)
        if has_credentials(self.url):
            raise CacheError(
                f"{bare_url(self.url)}: leave credentials out of the URL, which is logged; put them into the environment."
            )
        if not parts.netloc and not parts.path.strip("/"):
            raise CacheError(f"{url}: names no folder.")
        import fsspec

        with self._asking():
            try:
                self._files, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
            except ImportError as error:
                hint = {"s3": " (pip install 's3fs')", "gs": " (pip install 'gcsfs')"}.get(parts.scheme, "")
                raise CacheError(f"{self.url}: {in_one_line(error)}{hint}") from error
        self._root, self._has_buckets = str(root).rstrip("/"), parts.scheme in _BUCKETS

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """What fsspec and its drivers raise has no common base: any of it is the store's answer."""
        try:
            yield
        except KTOError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise _no_room(error) from error
            raise CacheError(
                f"{self.url}: {type(error).__name__}: {in_one_line(error)}. Check the address, the permissions and the "
                "credentials in the environment."
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _with_folder(self, name: str) -> str:
        """Where a file is written; its folder is made, where the store has folders."""
        path = self._at(name)
        if not self._has_buckets:
            self._files.makedirs(self._files._parent(path), exist_ok=True)
        return path

    def files(self) -> dict[str, int]:
        """Sizes by name, relative to the folder; empty where there is none."""
        with self._asking():
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(self._root) :].lstrip("/"): int(entry["size"] or 0) for path, entry in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None where it does not exist."""
        with self._asking():
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._asking():
            self._files.pipe_file(self._with_folder(name), content)

    def remove(self, name: str) -> None:
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(name))

    def copy(self, name: str, target: str) -> None:
        """Within the store."""
        with self._asking():
            self._files.cp_file(self._at(name), self._with_folder(target))

    def download(self, name: str, path: Path) -> None:
        """Fetch one file; `path` is there only when it is whole."""
        with self._asking():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                self._files.get_file(self._at(name), str(temporary))

    def upload(self, path: Path, name: str) -> None:
        with self._asking():
            self._files.put_file(str(path), self._with_folder(name))


class Mirror:
    """A local folder that a remote one follows.

    Args:
        remote: its files are fetched into the folder first.
        folder: what an earlier run left here stays, in `.kept`, for its scores.
        check: called before the remote is changed; raises where this process must not any more.
    """

    def __init__(self, remote: Remote, folder: Path, *, kept: str, check: Callable[[], None]) -> None:
        self._remote, self._folder, self._check = remote, folder, check
        for path in [*folder.rglob("*.parquet")]:
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
        """Bring the remote up to date. A manifest that changed is away meanwhile, and comes last."""
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
        """The cache's files, with what tells that one was changed or renamed."""
        found = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and _is_part(name):
                state = path.stat()
                found[name] = (state.st_size, state.st_mtime_ns, state.st_ino)
        return found


def _is_part(name: str) -> bool:
    """Whether a file belongs to a cache: the manifest, or a shard, in use or not yet."""
    folder, _, last = name.rpartition("/")
    shard = folder.split("/")[-1] == "train" and last.endswith(".parquet") and not last.startswith(".")
    return name == MANIFEST or shard


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CacheError(f"{printable(name)}: lies outside of the cache folder; it is not read.")
    return path


def check_remote(url: str) -> None:
    """Refuse a remote folder that cannot be read, or that has something else in it, before any work is done."""
    names = Remote(url).files()
    foreign = [name for name in names if not _is_part(name) and not name.startswith(".")]
    if foreign and MANIFEST not in names:
        raise CacheError(
            f"--out {url}: holds {printable(foreign[0])}, which is no part of a reference cache. Choose an empty folder."
        )


@contextlib.contextmanager
def working_folder(url: str, *, kept: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Where a remote cache is written, by this process alone.

    Args:
        url: the remote folder.
        kept: name of the folder for shards that are kept for their scores.

    Yields:
        the folder, and what to call when a change in it is finished.

    Raises:
        CacheError: another process writes there, or the store refuses.
    """
    remote = Remote(url)
    folder = _own_folder("working", remote.url)
    try:
        with speaking_of(url, folder), only_writer(folder, CacheError):
            with RemoteLock(remote) as lock:
                yield folder, Mirror(remote, folder, kept=kept, check=lock.check).push
            shutil.rmtree(folder)  # all of it is where it belongs; after an error it stays
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in OF_THE_DISK:
            raise _no_room(error.__cause__) from error
        raise


@contextlib.contextmanager
def speaking_of(location: Location, folder: Path) -> Iterator[None]:
    """Errors name what the user named, not the folder that stands for it."""
    try:
        yield
    except KTOError as error:
        raise type(error)(str(error).replace(str(folder), str(location).rstrip("/"))) from error.__cause__


class RemoteLock:
    """A file that its owner keeps refreshing. Who finds one watches it: unchanged for long enough, it is stale.

    No clock is compared with another machine's.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote, self._token = remote, uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> "RemoteLock":
        self._wait_for_stale()
        self._write(0)
        time.sleep(REFRESH_SECONDS / 10)  # of several that write at the same moment the last one keeps it
        self.check()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(CacheError):  # a store that is gone; the lock goes stale by itself
            self.check()
            self._remote.remove(LOCK)

    def check(self) -> None:
        """Raises: CacheError: another process took the lock over."""
        now = self._remote.read(LOCK)
        if now is None or self._token.encode() not in now:
            raise self._taken(now or b"")

    def _wait_for_stale(self) -> None:
        first = self._remote.read(LOCK)
        if first is None:
            return
        url, holder = self._remote.url, _holder(first)
        tell(f"locked      {url}: {holder} is writing there, or died there; watching for {STALE_SECONDS:.0f} s")
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(REFRESH_SECONDS / 10)
            now = self._remote.read(LOCK)
            if now is None:
                return
            if now != first:
                raise self._taken(now)
        print(f"locked      {holder} is gone; going on", flush=True)

    def _refresh(self) -> None:
        beat = 0
        while not self._stop.wait(REFRESH_SECONDS):
            beat += 1
            with contextlib.suppress(CacheError):  # lost, or out of reach: the next change to the remote is refused
                self.check()
                self._write(beat)

    def _write(self, beat: int) -> None:
        content = {"holder": holder_name(), "token": self._token, "beat": beat}
        self._remote.write(LOCK, json.dumps(content).encode())

    def _taken(self, content: bytes) -> CacheError:
        return CacheError(
            f"{self._remote.url}: {_holder(content)} is writing here. Wait for it, or choose another --out."
        )


def _holder(content: bytes) -> str:
    try:
        return printable(str(json.loads(content)["holder"]))[:100]
    except (ValueError, TypeError, KeyError):
        return "another process"


def local_copy(location: Location, *, anew: bool = False) -> Path:
    """A local folder with a cache's files: itself, or a download that later runs use again.

    Args:
        anew: download all of it, whatever is here already: to look at the remote files themselves.

    Raises:
        CacheError: no cache there, or the store refuses.
    """
    if not is_url(location):
        return Path(location)
    remote = Remote(str(location))
    content = remote.read(MANIFEST)
    if content is None:
        raise no_manifest(remote.url, unfinished=any(map(_is_part, remote.files())))
    manifest = parse_manifest(f"{remote.url}/{MANIFEST}", content)
    listed = {shard["file"] for shard in manifest.shards}
    strays = [name for name in remote.files() if name.startswith("train/") and _is_part(name) and name not in listed]
    if strays:
        raise CacheError(f"{remote.url}/{printable(strays[0])}: in the folder, but not in the manifest. Remove it.")
    folder = _own_folder("downloads", hashlib.sha256(content).hexdigest())
    with only_writer(folder, CacheError, wait=True):
        places = {_inside(folder, shard["file"]): shard for shard in manifest.shards}
        lacking = {p: s for p, s in places.items() if anew or not p.exists() or file_hash(p) != s["sha256"]}
        with Progress("downloading", sum(shard["bytes"] for shard in lacking.values()), "B") as progress:
            for path, shard in lacking.items():
                remote.download(shard["file"], path)
                progress.add(shard["bytes"])
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_bytes(content)
    return folder


def _own_folder(kind: str, name: str) -> Path:
    """A folder of the user's, made if need be, that stands for something remote."""
    try:
        folder = _home() / kind / hashlib.sha256(name.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise _no_room(error) from error
    return folder


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offline-kto"


def _no_room(error: Exception) -> CacheError:
    return CacheError(
        f"The local folder that stands for a remote cache cannot be written: {error}. XDG_CACHE_HOME names another place."
    )
