"""Rows of a reference cache: random access, hold-outs, and optimizer batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import DataLoader, Dataset, Sampler

from kto_core.errors import CacheError
from kto_core.manifest import Manifest, check_files, read_manifest
from kto_core.shards import decode_rows, open_shard

# Row groups kept decoded: a small cache ends up in memory, a large one does not.
_GROUPS_IN_MEMORY = 1024

_ID_COLUMNS = ("prompt_ids", "completion_ids", "kl_completion_ids")


@dataclass(frozen=True)
class ScoredSequence:
    """A prompt with one completion and its reference score.

    Attributes:
        prompt_ids, completion_ids: int32.
        ref_logps: sum over completion tokens under the reference, nats.
        ref_token_logps: float32, one for each completion token.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    ref_logps: float
    ref_token_logps: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids, completion ids)"""
        return self.prompt_ids, self.completion_ids

    def shortened(self, max_length: int) -> "ScoredSequence":
        """Cut the completion to fit; the score of the rest is a prefix sum."""
        room = max_length - len(self.prompt_ids)
        if len(self.completion_ids) <= room:
            return self
        logps = self.ref_token_logps[:room]
        return ScoredSequence(self.prompt_ids, self.completion_ids[:room], float(logps.sum(dtype=np.float64)), logps)


@dataclass(frozen=True)
class TrainingRow:
    """A labelled sequence with the mismatched one of this epoch."""

    row_id: str
    label: bool
    matched: ScoredSequence
    mismatched: ScoredSequence


@dataclass(frozen=True)
class RowKey:
    """Which row, with which of its mismatched completions."""

    index: int
    partner: int


class CacheRows(Dataset[TrainingRow]):
    """The rows of a cache, read from Parquet when they are asked for.

    Args:
        folder: the cache.
        max_length: shorten rows; rows whose prompt leaves no room are dropped.

    Raises:
        CacheError: damaged, or `max_length` above the cached one.
    """

    def __init__(self, folder: Path, *, max_length: int | None = None) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        check_files(folder, self.manifest)
        cached = int(self.manifest.tokenization["max_length"])
        if max_length is not None and max_length > cached:
            raise CacheError(
                f"--max-length {max_length}: the cache {folder} was cut at {cached} tokens, and scores of the rest do not "
                f"exist. Use --max-length {cached} or less, or score again with kto-precompute --max-length {max_length}."
            )
        self.max_length = max_length or cached
        self.partners = int(self.manifest.pairing["partners"])
        self._files = [open_shard(folder / shard["file"]) for shard in self.manifest.shards]
        self._index_rows()
        self._group = lru_cache(maxsize=_GROUPS_IN_MEMORY)(self._read_group)

    def _index_rows(self) -> None:
        """Where each row lies, its label, prompt and prompt length."""
        places, labels, prompts, lengths = [], [], [], []
        for number, (file, shard) in enumerate(zip(self._files, self.manifest.shards, strict=True)):
            if file.metadata.num_rows != shard["rows"]:
                raise CacheError(
                    f"{self.folder / shard['file']}: {file.metadata.num_rows} rows, the manifest says {shard['rows']}."
                )
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["label", "prompt_id", "prompt_ids"])
                places += [(number, group, i) for i in range(table.num_rows)]
                labels.append(table.column("label").to_numpy())
                prompts += table.column("prompt_id").to_pylist()
                lengths += pc.list_value_length(table.column("prompt_ids")).to_pylist()
        fits = [i for i, length in enumerate(lengths) if length < self.max_length]
        self.dropped = len(lengths) - len(fits)
        self._places = [places[i] for i in fits]
        self.labels = np.concatenate(labels)[fits].astype(bool)
        self.prompt_ids = [prompts[i] for i in fits]
        if not fits:
            raise CacheError(
                f"--max-length {self.max_length}: every prompt in {self.folder} is as long or longer; no row is left."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: "int | RowKey") -> TrainingRow:
        key = RowKey(key, 0) if isinstance(key, int) else key
        number, group, i = self._places[key.index]
        row = self._group(number, group)[i]
        k = key.partner % self.partners
        prompt = row["prompt_ids"]
        matched = ScoredSequence(prompt, row["completion_ids"], row["ref_logps"], row["ref_token_logps"])
        mismatched = ScoredSequence(
            prompt, row["kl_completion_ids"][k], float(row["ref_kl_logps"][k]), row["ref_kl_token_logps"][k]
        )
        return TrainingRow(
            row_id=row["row_id"],
            label=row["label"],
            matched=matched.shortened(self.max_length),
            mismatched=mismatched.shortened(self.max_length),
        )

    def _read_group(self, number: int, group: int) -> list[dict[str, Any]]:
        return decode_rows(self._files[number].read_row_group(group))

    def largest_id(self) -> int:
        """The largest token id in the cache, from the statistics in the Parquet footers."""
        largest = 0
        for file in self._files:
            for group in range(file.num_row_groups):
                columns = file.metadata.row_group(group)
                for i in range(columns.num_columns):
                    column = columns.column(i)
                    if column.path_in_schema.split(".")[0] in _ID_COLUMNS and column.statistics is not None:
                        largest = max(largest, int(column.statistics.max))
        return largest

    def class_counts(self, indices: Sequence[int]) -> tuple[int, int]:
        """(desirable, undesirable) among some rows."""
        desirable = int(self.labels[list(indices)].sum())
        return desirable, len(indices) - desirable


def split_by_prompt(rows: CacheRows, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Cut a hold-out by prompt, so that no prompt is on both sides.

    The prompts with the smallest keyed hashes are held out: an exact share of all prompts, rounded,
    that hardly moves when rows are added.

    Returns:
        (training rows, held-out rows), in file order.
    """
    prompts = sorted(set(rows.prompt_ids), key=lambda p: hashlib.blake2b(f"{seed}/{p}".encode()).digest())
    held = set(prompts[: round(fraction * len(prompts))])
    train = [i for i, p in enumerate(rows.prompt_ids) if p not in held]
    return train, [i for i, p in enumerate(rows.prompt_ids) if p in held]


class EpochBatches(Sampler[list[RowKey]]):
    """Optimizer batches, the same on every rank.

    The order depends on seed and epoch alone; epoch e uses mismatched completion e mod K.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.indices, self.batch_size, self.shuffle, self.seed = list(indices), batch_size, shuffle, seed
        self.epoch, self.finished = 0, False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def finish(self) -> None:
        """No further batch: the run that is resumed has made all its updates."""
        self.finished = True

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[RowKey]]:
        order = [] if self.finished else self.indices
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order).tolist()
        for start in range(0, len(order), self.batch_size):
            yield [RowKey(i, self.epoch) for i in order[start : start + self.batch_size]]


class BatchLoader(DataLoader[TrainingRow]):
    """One item is one optimizer batch: a list of `TrainingRow`."""

    def __init__(self, rows: CacheRows, batches: EpochBatches) -> None:
        super().__init__(rows, batch_sampler=batches, collate_fn=list)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
