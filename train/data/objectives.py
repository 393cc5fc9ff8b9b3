"""Check that a cache has the objectives that options weigh; light to import."""

from collections.abc import Iterable

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.errors import TrainingError, printable
from offline_kto.kto_core.locations import Location


def check_objectives(names: Iterable[str], manifest: Manifest, cache: Location) -> None:
    """Check that a cache has objectives of these names. Raises: TrainingError: it has not."""
    there = manifest.objectives
    for name in names:
        if name not in there:
            found = (
                f"the cache {cache} has no such objective; it has {printable(', '.join(there))}."
                if there
                else f"the cache {cache} has no objectives. They come from feedback such as "
                '"labels": {"helpful": true, "harmless": false}.'
            )
            raise TrainingError(f"--objective {printable(name)}: {found}")
