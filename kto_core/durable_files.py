"""Writing so that a kill, a full disk or a power cut leaves what was there before, or what was written, and never a part.

Written beside its place, flushed to the disk, renamed, and the folder flushed too: a rename that reached the disk
before the content would vouch for nothing.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from offline_kto.kto_core.errors import KTOError


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


def give_usual_modes(folder: Path) -> None:
    """Give every file in a folder the mode that a new file gets there; some libraries make theirs for the owner alone."""
    probe = folder / f".mode.{os.getpid()}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # umask and default ACLs apply
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What the block writes there takes its place, if the block ends well.

    Raises:
        OSError: the disk does not take it; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a link that somebody put there would be written through
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


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file that people read as well. Raises: OSError: as `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")  # as ASCII: a path need not be text


# What the system says of a disk, rather than of a file that is not there or a connection that broke.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def written_to(folder: Path, error: type[KTOError], advice: str) -> Iterator[None]:
    """Turns what the system says of writing into a folder into one message."""
    try:
        yield
    except OSError as problem:
        inside = problem.filename is not None and Path(os.fsdecode(problem.filename)).is_relative_to(folder)
        if not inside and problem.errno not in OF_THE_DISK:
            raise
        elsewhere = problem.filename is not None and not inside  # a temporary file, on another disk
        what = (
            f"{os.fsdecode(problem.filename)}: {problem.strerror}"
            if elsewhere
            else f"{folder}: cannot be written: {problem}"
        )
        raise error(f"{what}. {advice}") from problem


def remove_tree(path: Path) -> None:
    """Remove a folder, as far as possible; of a link the link alone, never what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left of `replacing`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
