"""One writer for a folder: a lock that the system releases when its process ends, however it ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kto_core.errors import KTOError

_NAME = ".lock"


@contextlib.contextmanager
def only_writer(folder: Path, error: type[KTOError]) -> Iterator[None]:
    """Hold the folder's lock.

    Args:
        folder: exists and is writable.
        error: raised where another process holds it, with that process's host and id.
    """
    path = folder / _NAME
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise error(f"{folder}: {holder} is writing here. Wait for it, or choose another --out.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
