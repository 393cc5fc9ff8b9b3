"""Resolve the paths in a config file: they are relative to the file's folder, wherever a command is started."""

import os
from pathlib import Path
from typing import TypeVar

from offline_kto.kto_core.errors import ConfigError, shown
from offline_kto.kto_core.locations import is_url

LocationT = TypeVar("LocationT", Path, str)


def located(value: LocationT, folder: Path, *, where: str, or_name: bool) -> LocationT:
    """Return the absolute path that a config file means.

    Args:
        value: as written. URLs, absolute paths and `~` are returned unchanged.
        folder: of the config file.
        where: the file and the key, for messages.
        or_name: whether it may also be a name, such as a hub id; then it is a path if it exists or begins with a dot.

    Raises:
        ConfigError: it does not exist in the folder of the file, but in the current folder, which it may be meant for.
    """
    text = str(value)
    if not _is_relative(text):
        return value
    there = os.path.normpath(folder.resolve() / text)
    if os.path.exists(there):
        return type(value)(there)
    if os.path.exists(text):
        raise ConfigError(
            f"{where}: {shown(text)!r} is relative to the folder of this file, where it does not exist ({there}); in the "
            f"current folder it does. Write {os.path.relpath(text, folder)}, or an absolute path."
        )
    return value if or_name and not text.startswith(".") else type(value)(there)


def absolute(value: LocationT, *, or_name: bool) -> LocationT:
    """Return the path that a command line means, for a file that is read from another folder.

    An empty path, which stands for a missing option, is returned unchanged.

    Args:
        or_name: as in `located`.
    """
    text = str(value)
    if not _is_relative(text) or value == Path() or (or_name and not os.path.exists(text)):
        return value
    return type(value)(os.path.abspath(text))


def _is_relative(text: str) -> bool:
    return text != "" and not is_url(text) and not os.path.isabs(text) and not text.startswith("~")
