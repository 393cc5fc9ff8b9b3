"""One writer for a folder: a lock that the system releases when its process ends, however it ends."""

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

# What file systems say that keep no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def only_writer(folder: Path, error: type[KTOError], *, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock.

    Args:
        folder: exists.
        error: raised where another process holds it, with that process's host and id, or where the folder cannot be
            written.
        wait: until the other process is done, instead.
    """
    path = folder / LOCK
    try:
        file = _held(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(path)
        raise error(
            f"{folder}: {printable(holder) or 'another process'} is writing here. Wait for it, or choose another --out."
        ) from None
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
    """Whether somebody writes there now; a lock file that a crash left says nothing."""
    try:
        with open_foreign(folder / LOCK, most=MEGABYTE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES, *_NO_LOCKS)  # held, or on a file system without locks
    return False


def holder_name() -> str:
    """This process, as the other one is told."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    try:
        return read_foreign(path, most=MEGABYTE).decode("utf-8", errors="replace").strip()[:200]
    except OSError:  # it has just gone
        return ""


def _held(path: Path, operation: int) -> FileIO:
    """The lock file, locked.

    Raises:
        BlockingIOError: another process holds it, and `operation` does not wait.
    """
    while True:
        # A link could lead to a file of somebody's.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, operation)
            # Whoever held it until now has removed the file, and somebody may have made a new one.
            if _is_at(file, path):
                return file
        except OSError as error:
            if error.errno in _NO_LOCKS:
                tell(
                    f"unlocked    {printable(str(path.parent))}: this file system keeps no locks; let one process write at a time"
                )
                return file
            file.close()
            raise
        file.close()


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
