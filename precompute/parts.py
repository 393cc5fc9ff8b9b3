"""Write parts of a shard: the scores of an incomplete shard, about once a minute.

A part is a shard of format 1 whose rows have one sequence each, and no mismatched completions. The same code writes,
checks and reads it.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.hashing import ids_id, sequence_id
from offline_kto.kto_core.scoring.sequences import TokenIds

# A kill loses at most this much scoring.
SECONDS_BETWEEN_PARTS = 60.0


class Pace:
    """The time at which the next part is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= SECONDS_BETWEEN_PARTS

    def restart(self) -> None:
        self._last = time.monotonic()


class ShardScores:
    """Collects the scores of one shard, and writes them in parts.

    Args:
        sequences: the sequences to be scored, by id.
        before: scores that an earlier run wrote in parts of this shard.
        write: writes the rows of one part.
        pace: shared by all shards of a run.

    Attributes:
        scores: by id.
        kept: ids of those that are on disk.
    """

    def __init__(
        self,
        sequences: Mapping[str, TokenIds],
        before: Mapping[str, np.ndarray],
        write: Callable[[Sequence[CacheRow]], None],
        pace: Pace,
    ) -> None:
        self.scores = {one: before[one] for one in sequences if one in before}
        self.kept = set(self.scores)
        self._sequences, self._ids = sequences, list(sequences)
        self._write, self._pace = write, pace

    @property
    def known(self) -> frozenset[int]:
        """Positions of the sequences that have a score."""
        return frozenset(i for i, one in enumerate(self._ids) if one in self.scores)

    def add(self, done: Sequence[int], scores: Sequence[np.ndarray]) -> None:
        """Add the scores of the sequences at some positions. Raises: CacheError: a part cannot be written."""
        self.scores.update((self._ids[i], one) for i, one in zip(done, scores, strict=True))
        if self._pace.is_due():
            self.flush()

    def flush(self) -> None:
        """Write the scores that are not in a part yet. Raises: CacheError: they cannot be written."""
        fresh = [one for one in self.scores if one not in self.kept]
        if fresh:
            self._write([_row(self._sequences[one], self.scores[one]) for one in fresh])
            self.kept.update(fresh)
        self._pace.restart()


def _row(sequence: TokenIds, scores: np.ndarray) -> CacheRow:
    """Return a sequence as a row of a shard; only its ids and scores are ever read."""
    prompt_ids, completion_ids = sequence
    return {
        "row_id": sequence_id(prompt_ids, completion_ids),
        "prompt_id": ids_id(prompt_ids),
        "pair_id": None,
        "source": 0,
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "label": False,
        "ref_logps": float(scores.sum(dtype=np.float64)),
        "ref_token_logps": scores,
        "kl_completion_ids": [],
        "ref_kl_logps": [],
        "ref_kl_token_logps": [],
    }
