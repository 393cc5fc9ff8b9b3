"""Name the folder of the user's own files about caches: downloads, working folders, and what was verified."""

import os
from pathlib import Path


def own_files() -> Path:
    """Return the folder. Raises: RuntimeError: a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offline-kto"
