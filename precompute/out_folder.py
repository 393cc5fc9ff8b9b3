"""Check whether a cache may be written to --out, and open it for one process."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from offline_kto.kto_core.cache.manifest import CHAT, MANIFEST, Manifest, parse_manifest, read_manifest
from offline_kto.kto_core.cache.remote_cache import check_remote, working_folder
from offline_kto.kto_core.cache.remote_folder import Remote
from offline_kto.kto_core.cache.remote_lock import RemoteLock
from offline_kto.kto_core.cache.shards import WRITE_AGAIN, read_metadata
from offline_kto.kto_core.durable_files import written_to
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.locations import Location, is_url
from offline_kto.kto_core.lock import LOCK, only_writer


def check_out(location: Location) -> None:
    """Refuse a folder that cannot or must not be written, before any work is done. Create nothing.

    Raises:
        CacheError: a file, not writable, or a folder with other files in it.
    """
    if is_url(location):
        check_remote(str(location))
        return
    out = Path(location)
    if any("\ud800" <= character <= "\udfff" for character in str(out)):  # bytes of a name that are not UTF-8
        raise CacheError(f"--out {out}: the name is not UTF-8, which Arrow cannot open. Choose another folder.")
    if out.exists() and not out.is_dir():
        raise CacheError(f"--out {out}: a file of that name exists; choose another folder.")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if parent.is_dir():
        _check_writable(out, parent)
    if not parent.is_dir():
        raise CacheError(f"--out {out}: {parent} is a file.")
    if (out / "train").is_file() or (out / "train").is_symlink():
        raise CacheError(f"--out {out}: {out / 'train'} is a file or a link, where a cache has a folder. Remove it.")
    if (out / "train").exists():
        _check_writable(out, out / "train")
    for path in (out / MANIFEST, *(out / "train").glob("*")):
        if path.exists() and not path.is_file():
            raise CacheError(f"--out {out}: {path} is not a regular file. Remove it.")
    if not out.exists() or (out / MANIFEST).exists():
        return
    readable = [path for path in shards_in(out) if read_metadata(path) is not None]
    # Next to readable shards, an unreadable one is a damaged shard.
    foreign = [] if readable else [path.name for path in shards_in(out)]
    foreign += [p.name for p in out.iterdir() if p.name != "train" and not p.name.startswith(".")]
    if foreign:
        raise CacheError(
            f"--out {out}: contains {sorted(foreign)[0]}, which is not part of a reference cache. Choose an empty folder."
        )


def _check_writable(out: Path, folder: Path) -> None:
    if os.access(folder, os.W_OK | os.X_OK):
        return
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise CacheError(f"--out {out}: {folder} is on a file system that is mounted read-only. Choose another folder.")
    raise CacheError(f"--out {out}: no permission to write in {folder}. Choose another folder.")


def check_free(location: Location) -> None:
    """Refuse a folder where another process is writing, or a URL where nothing can be written, before any work is done.

    The lock is taken for a moment.

    Raises:
        CacheError: naming the other process, or what the store reports.
    """
    if is_url(location):
        with RemoteLock(Remote(str(location))):
            return
    out = Path(location)
    if (out / LOCK).exists():
        with only_writer(out, CacheError):
            return


def rendered_on(location: Location) -> datetime | None:
    """Return the time for which a chat template that writes the date rendered the rows in `--out`.

    With it, the same command makes the same rows on a later day. A finished cache without that field was rendered when
    it was created.
    """
    manifest = manifest_in(location)
    said: object
    if manifest is not None:
        said = manifest.tokenization.get("rendered_on") or manifest.created
    else:
        said = next((one["rendered_on"] for one in _metadata_in(location) if one.get("rendered_on")), None)
    try:
        day = datetime.fromisoformat(str(said)) if said else None
    except ValueError:
        return None
    return day.astimezone().replace(tzinfo=None) if day is not None and day.tzinfo else day


def keeps_text(location: Location) -> bool:
    """Return whether `--out` holds rows that were made without turning plain text into conversations."""
    manifest = manifest_in(location)
    if manifest is not None:
        return CHAT not in manifest.identity
    identities = (one.get("identity") for one in _metadata_in(location))
    return any(isinstance(identity, dict) and CHAT not in identity for identity in identities)


def manifest_in(location: Location) -> Manifest | None:
    """Return the manifest of the cache in `--out`; None if there is none that can be read."""
    try:
        if is_url(location):
            content = Remote(str(location)).read(MANIFEST)
            return parse_manifest(str(location), content) if content is not None else None
        return read_manifest(Path(location)) if (Path(location) / MANIFEST).exists() else None
    except CacheError:
        return None


def _metadata_in(location: Location) -> Iterator[dict[str, Any]]:
    """Yield the metadata of the shards in a local folder, unfinished ones too."""
    if is_url(location):
        return
    out = Path(location)
    shards = (path for name in ("", NEXT, KEPT, PARTS) for path in shards_in(out / name))
    for path in itertools.chain(shards, done_in(out), sorted((out / PLAN).glob("[!.]*.parquet"))):
        yield read_metadata(path) or {}


@contextlib.contextmanager
def opened_out(location: Location) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Lock `--out` for this process while the block runs.

    Yields:
        the local folder to write, and a function to call when a change in it is finished.

    Raises:
        CacheError: another process writes there, or the system does not allow it.
    """
    if is_url(location):
        with working_folder(str(location), kept=KEPT) as opened, made(opened[0] / "train"), _written_to(opened[0]):
            yield opened
    else:
        out = Path(location)
        with made(out), only_writer(out, CacheError), made(out / "train"), _written_to(out):
            yield out, lambda: None


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Create the folder; if nothing was written into it when the block ends, remove it again.

    Raises:
        CacheError: the system does not allow it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"--out {folder}: cannot be written: {error}. Choose another folder.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # files were written there
            folder.rmdir()


def _written_to(out: Path) -> contextlib.AbstractContextManager[None]:
    return written_to(out, CacheError, WRITE_AGAIN)


NEXT = ".next"
KEPT = ".kept"
PARTS = ".parts"
PLAN = ".plan"
DONE = ".done"
# Folder of the model with its adapter merged, for an engine that reads it from disk; removed when the run ends.
MERGED = ".merged"


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "train").glob("[!.]*.parquet") if path.is_file())


def done_in(out: Path) -> list[Path]:
    """Return the shards that workers finished and nobody has moved into place."""
    return sorted(path for path in (out / DONE).glob("*/[!.]*.parquet") if path.is_file())
