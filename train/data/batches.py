"""Split rows into training and held-out rows, and form the optimizer batches."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from torch.utils.data import DataLoader, Sampler

from offline_kto.train.data.cache_rows import CacheRows, RowKey, TrainingRow
from offline_kto.train.data.held_out import held_out_prompts

# Units are rows that share one loss: an int64 array of shape (units, rows in each). A unit is a single row, or a pair
# with the desirable row first.


def split_by_prompt(rows: CacheRows, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split off held-out rows by prompt, so that no prompt is on both sides.

    The prompts with the smallest keyed hashes are held out. Their share of all prompts is exact up to rounding, and
    adding rows changes few assignments.

    Returns:
        (training rows, held-out rows), in file order.
    """
    prompts = sorted(set(rows.prompt_ids), key=lambda p: hashlib.blake2b(f"{seed}/{p}".encode()).digest())
    held = set(prompts[: held_out_prompts(fraction, len(prompts))])
    train = [i for i, p in enumerate(rows.prompt_ids) if p not in held]
    return train, [i for i, p in enumerate(rows.prompt_ids) if p in held]


def units_of(rows: CacheRows, indices: Sequence[int], rows_in_unit: int) -> np.ndarray:
    """Return the units among some rows, in their order: shape (units, rows_in_unit).

    Only complete pairs are returned: a row without a partner, or whose partner was dropped or is not selected, is left
    out.
    """
    if rows_in_unit == 1:
        return np.asarray(indices, dtype=np.int64)[:, None]
    sides: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i in indices:
        pair_id = rows.pair_ids[i]
        if pair_id is not None:
            sides[pair_id][0 if rows.labels[i] else 1].append(i)
    # The same pair may occur in the data twice.
    pairs = sorted((pair for good, bad in sides.values() for pair in zip(good, bad, strict=False)), key=min)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


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
    """

    def __init__(self, strata: Sequence[np.ndarray], batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.strata, self.batch_size, self.shuffle, self.seed = list(strata), batch_size, shuffle, seed
        self.epoch, self.finished = 0, False
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
        for start, end in pairwise(range(len(ends))):
            parts = [stratum[quota[start] : quota[end]] for stratum, quota in zip(shuffled, quotas, strict=True)]
            yield [RowKey(row, self.epoch) for part in parts for row in part.ravel().tolist()]


class BatchLoader(DataLoader[TrainingRow]):
    """Loader whose items are optimizer batches, lists of `TrainingRow`; the next is read while the last one trains."""

    def __init__(self, rows: CacheRows, batches: EpochBatches) -> None:
        super().__init__(rows, batch_sampler=batches, collate_fn=list)

    def __iter__(self) -> Iterator[list[TrainingRow]]:  # type: ignore[override]
        batches = super().__iter__()
        with ThreadPoolExecutor(max_workers=1) as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
