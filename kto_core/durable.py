"""Writing so that a kill, a full disk or a power cut leaves what was there before, or what was written, and never a part.

Written beside its place, flushed to the disk, renamed, and the folder flushed too: a rename that reached the disk
before the content would vouch for nothing.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """`flush` every file and folder in a folder, then the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What the block writes there takes its place, if the block ends well.

    Raises:
        OSError: the disk does not take it; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file. Raises: OSError: the disk does not take it; `path` is as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left of `replacing`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
