"""Define locations: a local folder, or the URL of a remote one."""

from pathlib import Path

Location = Path | str
"""A local folder, or the URL of a remote one as text (a `Path` would merge its double slash into one)."""


def is_url(location: Location) -> bool:
    """Return whether a location is the URL of a remote folder."""
    return "://" in str(location)


def to_location(text: str | Path) -> Location:
    """Return a location from a command line or YAML: a path, or a URL as text."""
    text = str(text).removeprefix("file://")
    return text if is_url(text) else Path(text)
