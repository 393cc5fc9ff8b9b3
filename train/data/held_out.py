"""Define the held-out rows of a run."""

from dataclasses import dataclass

from offline_kto.train.data.cache_rows import CacheRows


@dataclass(frozen=True)
class HeldOutRows:
    """The cache and the indices of held-out rows; the two rows of a pair are neighbours."""

    cache: CacheRows
    indices: list[int]
