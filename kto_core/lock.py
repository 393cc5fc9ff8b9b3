"""Lock a folder, so that only one process writes there. The lock is released whenever the process ends."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import KTOError, printable
from offline_kto.kto_core.foreign_files import MEGABYTE, open_foreign, read_foreign

LOCK = ".lock"

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def only_writer(
    folder: Path,
    error: type[KTOError],
    *,
    wait: bool = False,
    name: str = LOCK,
    busy: str = "is writing here. Wait for it, or choose another --out.",
) -> Iterator[None]:
    """Hold a lock of the folder while the block runs.

    Args:
        folder: exists.
        error: raised if another process holds the lock, with that process's host and id, or if the folder cannot be
            written.
        wait: wait until the other process is done, instead of raising.
        name: of the lock file.
        busy: said of the other process in the error.
    """
    path = folder / name
    try:
        file = _held(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(path)
        raise error(f"{folder}: {printable(holder) or 'another process'} {busy}") from None
    except OSError as problem:
        raise error(f"{folder}: cannot be written: {problem}.") from problem
    with file:
        try:
            file.truncate(0)
            file.write(f"{holder_name()}\n".encode())
        except OSError as problem:
            path.unlink(missing_ok=True)
            raise error(f"{folder}: cannot be written: {problem}.") from problem
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Return whether a process writes there now; a lock file left by a crash does not count."""
    try:
        with open_foreign(folder / LOCK, most=MEGABYTE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES, *_NO_LOCKS)  # held, or on a file system without locks
    return False


def holder_name() -> str:
    """Return the name of this process as other processes report it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    try:
        return read_foreign(path, most=MEGABYTE).decode("utf-8", errors="replace").strip()[:200]
    except OSError:  # it was just removed
        return ""


def _held(path: Path, operation: int) -> FileIO:
    """Return the lock file, open and locked.

    Raises:
        BlockingIOError: another process holds it, and `operation` does not wait.
    """
    while True:
        # A symbolic link could point to another user's file.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, operation)
            # The previous holder has removed the file, and another process may have created a new one.
            if _is_at(file, path):
                return file
        except BaseException as error:  # Ctrl-C while it waits
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                tell(
                    f"unlocked    {printable(str(path.parent))}: this file system supports no locks; let one process write at a time"
                )
                return file
            file.close()
            raise
        file.close()


def _is_at(file: FileIO, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
