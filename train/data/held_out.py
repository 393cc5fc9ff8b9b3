"""Held-out rows."""

from dataclasses import dataclass

from offline_kto.train.data.cache_rows import CacheRows


@dataclass(frozen=True)
class HeldOutRows:
    """Which rows of which cache are held out; of pairs the two rows stand side by side."""

    cache: CacheRows
    indices: list[int]
