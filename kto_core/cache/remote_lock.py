"""Lock a remote folder with a file, so that only one process writes there."""

import contextlib
import json
import threading
import time
import uuid

from offline_kto.kto_core.cache.remote_folder import Remote
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import CacheError, printable
from offline_kto.kto_core.lock import LOCK, holder_name

# A lock that is not refreshed for this long is stale: its owner has ended.
REFRESH_SECONDS, STALE_SECONDS = 10.0, 35.0


class RemoteLock:
    """A lock file that its owner rewrites regularly. It is stale if it does not change for `STALE_SECONDS`.

    Another process waits for a change, so no two machines' clocks are compared.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote, self._token = remote, uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> "RemoteLock":
        self._wait_for_stale()
        self._write(0)
        time.sleep(REFRESH_SECONDS / 10)  # of several concurrent writers the last one gets the lock
        self.check()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(CacheError):  # the store cannot be reached; the lock becomes stale
            self.check()
            self._remote.remove(LOCK)

    def check(self) -> None:
        """Check that this process still holds the lock. Raises: CacheError: another process took it over."""
        now = self._remote.read(LOCK)
        if now is None or self._token.encode() not in now:
            raise self._taken(now or b"")

    def _wait_for_stale(self) -> None:
        first = self._remote.read(LOCK)
        if first is None:
            return
        url, holder = self._remote.url, _holder(first)
        tell(f"locked      {url}: {holder} holds the lock, or has crashed; waiting for {STALE_SECONDS:.0f} s")
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(REFRESH_SECONDS / 10)
            now = self._remote.read(LOCK)
            if now is None:
                return
            if now != first:
                raise self._taken(now)
        tell(f"locked      {holder} has ended; continuing")

    def _refresh(self) -> None:
        beat = 0
        while not self._stop.wait(REFRESH_SECONDS):
            beat += 1
            with contextlib.suppress(CacheError):  # lost or unreachable: `check` refuses the next change
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
