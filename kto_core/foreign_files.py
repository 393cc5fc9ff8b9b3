"""Read files of an untrusted folder, such as an unpacked archive, which may contain links, pipes and endless files.

Only regular files up to a size limit are opened. A link that leads out of the folder is not followed, because its
target's content would appear in a report. Links within the folder are followed, and links into the blobs of the hub's
cache, where every file is a link.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MEGABYTE = 1 << 20


def open_foreign(path: Path, *, most: int) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        most: largest size in bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, is larger, or is a link that leads out of its folder.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe would otherwise block
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
        raise OSError(f"it has {state.st_size:,} bytes, more than the limit of {most:,}")
    return file


def read_foreign(path: Path, *, most: int) -> bytes:
    """Return the content of a file. Raises: OSError: as `open_foreign`."""
    with open_foreign(path, most=most) as file:
        return file.read(most)


def check_kinds(folder: Path) -> None:
    """Refuse a folder that contains a pipe or a device, because a library that reads one would block forever.

    Raises:
        OSError: it contains a pipe or a device.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                mode = entry.stat().st_mode
            except OSError:  # a broken link; opening it fails with its own error
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise OSError(f"{entry.name} is neither a file nor a folder")


def _target(link: Path) -> Path:
    """Return the target of a link, if it is inside the link's folder or among the blobs of the hub's cache."""
    target, folder = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent))
    # models--me--run/snapshots/1a2b/config.yaml -> models--me--run/blobs/9f8e
    repository = next((up.parent for up in (folder, *folder.parents) if up.parent.name == "snapshots"), None)
    homes = [folder] if repository is None else [folder, repository.parent / "blobs"]
    if not any(target.is_relative_to(home) for home in homes):
        raise OSError("it is a link that leads out of its folder, and is not followed")
    return target
