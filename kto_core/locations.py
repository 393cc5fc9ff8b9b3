"""Where something lies: a local folder, or the URL of a remote one."""

from pathlib import Path

Location = Path | str
"""A local folder, or the URL of a remote one (which a `Path` would spoil: it makes one slash of two)."""


def is_url(location: Location) -> bool:
    """Whether this names a remote folder."""
    return "://" in str(location)


def to_location(text: str | Path) -> Location:
    """A folder as it is given on a command line or in YAML."""
    text = str(text).removeprefix("file://")
    return text if is_url(text) else Path(text)
