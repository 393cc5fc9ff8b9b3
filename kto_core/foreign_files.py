"""Read files of a folder that may come from anybody, as an archive unpacks it: with links, pipes and endless files.

Only regular files are opened, up to a size, and no link is followed that leads out of the folder: what it leads to
would be shown in a report. Links within the folder are followed, and those of the hub's cache, where each file is one.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MEGABYTE = 1 << 20


def open_foreign(path: Path, *, most: int) -> BinaryIO:
    """Open a file for reading.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is no regular file, is larger, or is a link that leads out of its folder.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would wait for its writer
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        descriptor = os.open(_target(path), flags)
    file = os.fdopen(descriptor, "rb")
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        file.close()
        raise OSError("it is not a regular file")
    if state.st_size > most:
        file.close()
        raise OSError(f"it has {state.st_size:,} bytes, of at most {most:,}")
    return file


def read_foreign(path: Path, *, most: int) -> bytes:
    """Return the content of a file. Raises: OSError: as `open_foreign`."""
    with open_foreign(path, most=most) as file:
        return file.read(most)


def check_kinds(folder: Path) -> None:
    """Refuse a folder that libraries would read, and wait for ever.

    Raises:
        OSError: a pipe or a device is in it.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                mode = entry.stat().st_mode
            except OSError:  # a link to nothing, which whoever wants the file will name
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise OSError(f"{entry.name} is neither a file nor a folder")


def _target(link: Path) -> Path:
    """Where a link leads, if that is inside its folder or among the blobs of the hub's cache."""
    target, folder = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent))
    # models--me--run/snapshots/1a2b/config.yaml -> models--me--run/blobs/9f8e
    repository = next((up.parent for up in (folder, *folder.parents) if up.parent.name == "snapshots"), None)
    homes = [folder] if repository is None else [folder, repository.parent / "blobs"]
    if not any(target.is_relative_to(home) for home in homes):
        raise OSError("it is a link that leads out of its folder, and is not followed")
    return target
