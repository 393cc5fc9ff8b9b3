"""Parts of a shard: the scores of a shard that is not complete yet, flushed about once a minute.

A part is a shard of format 1 whose rows have one sequence each, and no mismatched completions: it is written, checked and
read by the same code.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from offline_kto.kto_core.cache.shards import CacheRow
from offline_kto.kto_core.hashing import ids_id, sequence_id
from offline_kto.kto_core.scoring.sequences import TokenIds

# How much scoring a kill may cost.
SECONDS_BETWEEN_PARTS = 60.0


class Pace:
    """Says when the next part is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= SECONDS_BETWEEN_PARTS

    def restart(self) -> None:
        self._last = time.monotonic()


class ShardScores:
    """The scores of one shard as they come, written down in parts.

    Args:
        sequences: what is to be scored, by id.
        before: scores that an earlier run left in parts of this shard.
        write: takes the rows of one part.
        pace: of all shards of a run.

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
        """Take the scores of the sequences at some positions. Raises: CacheError: the disk does not take a part."""
        self.scores.update((self._ids[i], one) for i, one in zip(done, scores, strict=True))
        if self._pace.is_due():
            self.flush()

    def flush(self) -> None:
        """Write what is in no part yet. Raises: CacheError: the disk does not take it."""
        fresh = [one for one in self.scores if one not in self.kept]
        if fresh:
            self._write([_row(self._sequences[one], self.scores[one]) for one in fresh])
            self.kept.update(fresh)
        self._pace.restart()


def _row(sequence: TokenIds, scores: np.ndarray) -> CacheRow:
    """A sequence as a row of a shard; only ids and scores of it are ever read."""
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
