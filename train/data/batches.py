"""Split rows into training and held-out rows, and form the optimizer batches."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Sampler

from offline_kto.kto_core.hashing import ID
from offline_kto.train.data.cache_rows import CacheRows, RowKey, TrainingRow
from offline_kto.train.data.held_out import held_out_prompts

# Units are rows that share one loss: an array of positions, shape (units, rows in each). A unit is a single row, or a pair
# with the desirable row first.


def split_by_prompt(rows: CacheRows, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off held-out rows by prompt, so that no prompt is on both sides.

    The prompts with the smallest keyed hashes are held out. Their share of all prompts is exact up to rounding, and
    adding rows changes few assignments.

    Returns:
        (training rows, held-out rows), in file order.
    """
    prompts = rows.prompt_ids
    digests = (hashlib.blake2b(f"{seed}/{prompt}".encode()).digest()[:16] for prompt in prompts.texts())
    words = np.fromiter(digests, dtype=ID, count=len(prompts.distinct)).view(">u8").reshape(-1, 2)
    held = np.zeros(len(words), dtype=bool)
    held[np.lexsort(words.T[::-1])[: held_out_prompts(fraction, len(words))]] = True
    is_held = held[prompts.codes]
    return rows.positions[~is_held], rows.positions[is_held]


def units_of(rows: CacheRows, chosen: np.ndarray, rows_in_unit: int) -> np.ndarray:
    """Return the units among some rows, in their order: shape (units, rows_in_unit).

    Only complete pairs are returned: a row without a partner, or whose partner was dropped or is not selected, is left
    out.
    """
    if rows_in_unit == 1:
        return chosen[:, None]
    codes = rows.pair_ids.codes[chosen]
    chosen, codes = chosen[codes >= 0], codes[codes >= 0]
    labels = rows.labels[chosen]
    # The same pair may occur in the data twice: the first desirable row goes with the first undesirable one.
    good, bad = (_numbered(chosen[labels == side], codes[labels == side]) for side in (True, False))
    _, at_good, at_bad = np.intersect1d(good.keys, bad.keys, assume_unique=True, return_indices=True)
    pairs = np.stack([good.rows[at_good], bad.rows[at_bad]], axis=1)
    return pairs[np.argsort(pairs.min(axis=1), kind="stable")]


class _Numbered(NamedTuple):
    """Rows with keys, both of shape (rows,)."""

    rows: np.ndarray
    keys: np.ndarray


def _numbered(rows: np.ndarray, codes: np.ndarray) -> _Numbered:
    """Return rows, sorted by their pair, with a key of the pair and of how many of its rows come before."""
    order = np.argsort(codes, kind="stable")
    rows, codes = rows[order], codes[order].astype(np.int64)
    first = np.searchsorted(codes, codes)
    return _Numbered(rows, codes << 32 | (np.arange(len(codes)) - first))


def strata_of(rows: CacheRows, units: np.ndarray, *, balance: bool) -> list[np.ndarray]:
    """Return the units of each class, or all units together if they are pairs or `balance` is off."""
    if not balance or units.shape[1] > 1:
        return [units]
    desirable = rows.labels[units[:, 0]]
    return [of_class for of_class in (units[desirable], units[~desirable]) if len(of_class)]


class EpochBatches(Sampler[list[RowKey]]):
    """Optimizer batches, the same on every rank.

    The order depends only on seed and epoch. Epoch e uses mismatched completion e mod K. Every batch contains each
    stratum in proportion, to the nearest unit.

    Args:
        strata: units, each of shape (units, rows in each); one unless batches are to be balanced.
        batch_size: rows in a batch, a multiple of a unit's.
        shuffle: in every epoch, within each stratum.

    Attributes:
        on_order: called with the rows of an epoch in their order, and the number of their mismatched completion.
    """

    def __init__(self, strata: Sequence[np.ndarray], batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.strata, self.batch_size, self.shuffle, self.seed = list(strata), batch_size, shuffle, seed
        self.epoch, self.finished = 0, False
        self.on_order: Callable[[np.ndarray, int], None] | None = None
        self._units = sum(map(len, self.strata))
        self._units_in_batch = batch_size // self.strata[0].shape[1]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def finish(self) -> None:
        """Yield no further batch, because the resumed run has already made all its updates."""
        self.finished = True

    def __len__(self) -> int:
        return -(-self._units // self._units_in_batch)

    def __iter__(self) -> Iterator[list[RowKey]]:
        if self.finished:
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = [rng.permutation(stratum) if self.shuffle else stratum for stratum in self.strata]
        # Units of each stratum in the first n batches, rounded; the last stratum gets the remainder.
        ends = np.minimum(np.arange(len(self) + 1) * self._units_in_batch, self._units)
        quotas = [np.floor(ends * len(stratum) / self._units + 0.5).astype(np.int64) for stratum in self.strata[:-1]]
        quotas.append(ends - sum(quotas))

        order = np.empty((self._units, self.strata[0].shape[1]), dtype=self.strata[0].dtype)
        spans = [slice(start, end) for start, end in itertools.pairwise(ends.tolist())]
        for number, span in enumerate(spans):
            parts = zip(shuffled, quotas, strict=True)
            order[span] = np.concatenate([stratum[quota[number] : quota[number + 1]] for stratum, quota in parts])
        del shuffled
        if self.on_order is not None:
            self.on_order(order.ravel(), self.epoch)
        for span in spans:
            yield [RowKey(row, self.epoch) for row in order[span].ravel().tolist()]


class BatchLoader(DataLoader[TrainingRow]):
    """Loader whose items are optimizer batches, lists of `TrainingRow`; the next is read while the last one trains."""

    def __init__(self, rows: CacheRows, batches: EpochBatches) -> None:
        self._rows = rows
        batches.on_order = rows.expect
        super().__init__(rows, batch_sampler=batches, collate_fn=list)

    def __iter__(self) -> Iterator[list[TrainingRow]]:  # type: ignore[override]
        batches = super().__iter__()
        try:
            with ThreadPoolExecutor(max_workers=1) as pool:
                coming = pool.submit(next, batches, None)
                while (batch := coming.result()) is not None:
                    coming = pool.submit(next, batches, None)
                    yield batch
        finally:
            self._rows.expect_nothing()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
