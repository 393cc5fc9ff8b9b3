"""Choose the folder of the spool: on a disk of this machine, with room for the tokenized rows."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from offline_kto.kto_core.locations import Location, is_url

# File systems in memory, where a file is no gain.
_IN_MEMORY = {"tmpfs", "ramfs"}
# Space to look for, in sizes of the data: tokens of 4 bytes are as large as their text; compressed files grow.
_ROOM = 4


def spool_folders(out: Location, data_bytes: int) -> list[Path]:
    """Return the folders in which the rows may be kept, first the one to choose.

    They are the system's folder for temporary files (TMPDIR) and the one that `--out` is in, if that has more room.

    Args:
        data_bytes: size of the feedback's files.
    """
    folders = [Path(tempfile.gettempdir())]
    if not is_url(out):
        folders += [folder for folder in Path(os.path.abspath(out)).parents if folder.is_dir()][:1]
    folders = [folder for folder in folders if os.access(folder, os.W_OK | os.X_OK)] or folders[:1]
    disks = [folder for folder in folders if not _is_in_memory(folder)] or folders
    roomy = (folder for folder in disks if _free(folder) >= _ROOM * data_bytes)
    chosen = next(roomy, max(disks, key=_free))
    return [chosen, *(folder for folder in disks if folder != chosen)]


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _is_in_memory(folder: Path) -> bool:
    """Return whether Linux says that a folder is in memory; elsewhere False."""
    path, longest, kind = os.path.realpath(folder), -1, ""
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            point, name = line.split(" ")[1:3]
            inside = os.path.commonpath([path, point]) == point
            if inside and len(point) >= longest:
                longest, kind = len(point), name
    return kind in _IN_MEMORY
