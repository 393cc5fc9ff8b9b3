"""Download the shards of a remote cache: several at a time, and none gets its name before its sha256 is verified.

The whole cache is downloaded before training begins. Batches are drawn from all shards: with 245 shards (a million rows)
and 32 rows in a batch, the first batch needs 27 shards, and the first twelve need three quarters of all
(`benchmarks/remote_cache.py`). Training on those that have arrived would therefore begin only about ten updates
earlier. Moreover, labels and prompts of all rows choose the first batch, and they stand in every row group of every shard.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from offline_kto.kto_core.cache.manifest import AGAIN
from offline_kto.kto_core.cache.manifest_fields import ShardFields
from offline_kto.kto_core.cache.remote_folder import Remote
from offline_kto.kto_core.durable_files import OF_THE_DISK
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash

# Fewer than the 10 connections that botocore keeps open. AWS counts on 85 to 90 MB/s for each.
_AT_ONCE = 8

# Clients retry single requests themselves; this is for a download that broke off for good.
_TRIES, _SECONDS_BETWEEN = 3, 1.0

# What a thread may need to notice that it should end. One that waits for its store longer is left behind.
SECONDS_TO_END = 2.0


class _StoppedError(CacheError):
    """The download is no longer needed."""


class _DamagedError(CacheError):
    """The downloaded bytes are not those of the manifest."""


def download_shards(
    remote: Remote,
    shards: Sequence[tuple[Path, ShardFields]],
    *,
    on_bytes: Callable[[int], None],
    stop: threading.Event,
    is_current: Callable[[], bool],
) -> None:
    """Download shards, the first in the list first; each path exists only once its content was verified.

    Args:
        remote: the cache.
        shards: local path and entry of the manifest.
        on_bytes: called with the number of bytes that arrived since the last call, negative if they have to come again.
        stop: ends the download early when set; the function then returns.
        is_current: whether the cache still has the manifest that lists these shards.

    Raises:
        CacheError: naming the first shard that could not be downloaded; those that arrived stay.
    """
    waiting, lock, ended = iter(shards), threading.Lock(), threading.Event()
    failures: list[Exception] = []

    def count(size: int) -> None:
        if stop.is_set() or ended.is_set():
            raise _StoppedError("The download was stopped.")
        with lock:
            on_bytes(size)

    def work() -> None:
        try:
            for path, shard in _taken(waiting, lock):
                count(0)
                _download(remote, path, shard, on_bytes=count, is_current=is_current)
        except _StoppedError:
            pass
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            failures.append(error)
            ended.set()

    # Daemons: the end of the process must not wait for a store that does not answer.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(shards)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not (stop.is_set() or ended.is_set()):
                thread.join(0.1)
    finally:
        ended.set()
        deadline = time.monotonic() + SECONDS_TO_END
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]


def _taken(waiting: Iterator[tuple[Path, ShardFields]], lock: threading.Lock) -> Iterator[tuple[Path, ShardFields]]:
    """Yield the shards that this thread takes from those that wait."""
    while True:
        with lock:
            found = next(waiting, None)
        if found is None:
            return
        yield found


def _download(
    remote: Remote,
    path: Path,
    shard: ShardFields,
    *,
    on_bytes: Callable[[int], None],
    is_current: Callable[[], bool],
) -> None:
    """Download one shard, again if it breaks off or arrives damaged."""
    arrived = 0

    def count(size: int) -> None:
        nonlocal arrived
        arrived += size
        on_bytes(size)

    def verify(temporary: Path) -> None:
        if file_hash(temporary) != shard["sha256"]:
            raise _DamagedError(
                f"{remote.url}/{shard['file']}: its content changed since it was written (sha256 differs). {AGAIN}"
            )

    for left in reversed(range(_TRIES)):
        try:
            remote.download(shard["file"], path, on_bytes=count, check=verify)
            count(shard["bytes"] - arrived)  # a client may not report every byte
            return
        except _StoppedError:
            raise
        except CacheError as error:
            if isinstance(error, _DamagedError) and not is_current():
                raise CacheError(f"{remote.url}: was updated while it was read. Start again.") from None
            if not left or _is_final(error.__cause__):
                raise
        count(-arrived)
        time.sleep(_SECONDS_BETWEEN)


def _is_final(error: BaseException | None) -> bool:
    """Return whether an error will occur again: a file or a permission is missing, or the local disk is full."""
    return isinstance(error, FileNotFoundError | PermissionError) or (
        isinstance(error, OSError) and error.errno in OF_THE_DISK
    )
