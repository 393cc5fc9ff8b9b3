"""Write files atomically and durably: after a kill, a full disk or a power cut a file is the old one or the new one.

A file is written to a temporary file in its folder, flushed to the disk and renamed. Then its folder is flushed.
The content is flushed before the rename, so that the name never refers to missing content.
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
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Flush every file and folder in a folder, then the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def give_usual_modes(folder: Path) -> None:
    """Give every file in a folder the mode of a newly created file; some libraries make theirs private to the owner."""
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
    """Yield a temporary path beside `path`; it replaces `path` when the block ends without an error.

    Raises:
        OSError: the file cannot be written; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # otherwise a symbolic link placed there would be followed
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file. Raises: OSError: it cannot be written; `path` is unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write an indented JSON file. Raises: OSError: as `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")  # as ASCII: a path need not be valid Unicode


# Errors of the disk itself, as opposed to a missing file or a broken connection.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def written_to(folder: Path, error: type[KTOError], advice: str) -> Iterator[None]:
    """Re-raise operating system errors of writing into a folder as one message with advice."""
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
    """Remove a folder as far as possible; of a symbolic link only the link, never its target."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Remove temporary files that killed processes left behind in `replacing`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
