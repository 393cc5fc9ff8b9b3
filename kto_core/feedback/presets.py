"""Read the mappings of recognised formats in configs/formats, and the user's own."""

import functools
from collections.abc import Mapping as AnyMapping
from pathlib import Path

from offline_kto.kto_core.errors import ConfigError, FeedbackError, nearest
from offline_kto.kto_core.feedback.mapping import Mapping
from offline_kto.kto_core.feedback.mapping_file import mapping_from
from offline_kto.kto_core.feedback.paths import Path as JMESPath
from offline_kto.kto_core.yaml_files import read_yaml

_FOLDER = Path(__file__).parents[2] / "configs/formats"


@functools.cache
def presets() -> dict[str, Mapping]:
    """Return the package's mappings by name, in the order in which they are tried."""
    return {path.stem: _read(path, path.stem) for path in sorted(_FOLDER.glob("*.yaml"))}


def named_mapping(name: str) -> Mapping:
    """Return the mapping of `--map`: a file of the user's, or one of the package's.

    Raises:
        ConfigError: no such file and no such name, or a mistake in it.
    """
    path = Path(name)
    if (path.suffix or path.parent != Path()) and path.is_file():
        return _read(path, name)
    if name in presets():
        return presets()[name]
    raise ConfigError(
        f"--map {name}: neither a file nor the name of a format. Formats: {', '.join(presets())}."
        f"{nearest(name, list(presets()))}"
    )


def recognised(record: AnyMapping[str, object], where: str) -> Mapping | None:
    """Return the format of a record; None if it is not recognised."""
    for mapping in presets().values():
        if mapping.recognise is not None and _fits(mapping.recognise, record, where):
            return mapping
    return None


def _fits(keys: JMESPath, record: AnyMapping[str, object], where: str) -> bool:
    try:
        return keys.find(record, where) is True
    except FeedbackError:  # a value of another type, so another format
        return False


def _read(path: Path, source: str) -> Mapping:
    return mapping_from(read_yaml(path), source)
