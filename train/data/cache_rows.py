"""Verify a reference cache, and read its rows at random."""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from offline_kto.kto_core.cache.arrow_lists import numbers
from offline_kto.kto_core.cache.manifest import Manifest, read_manifest
from offline_kto.kto_core.cache.places import PLACE, files_of, place_in_words
from offline_kto.kto_core.cache.repeats import Repeats
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.cache.verified_shards import VerifiedShards
from offline_kto.kto_core.equal_ids import index_type
from offline_kto.kto_core.errors import CacheError, TrainingError
from offline_kto.kto_core.hashing import ID
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES, ONE_BIT, Masses
from offline_kto.kto_core.launch import read_launch
from offline_kto.kto_core.losses.objective_masses import weighted_masses
from offline_kto.kto_core.progress import Progress
from offline_kto.kto_core.runtime import return_freed_memory
from offline_kto.train.data.objectives import check_objectives
from offline_kto.train.data.row_ids import RowIds, as_ids, id_array_of
from offline_kto.train.data.row_reader import RowReader, StoredRow
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.data.shard_files import ShardFiles
from offline_kto.train.data.verified_file import VerifiedFile, allow_open_files
from offline_kto.train.run_records import SampledLengths, Shortened

# Row groups sampled for the lengths in the report; kto-precompute writes 64 rows into each.
_GROUPS_SAMPLED = 64


@dataclass(frozen=True)
class TrainingRow:
    """A labelled sequence with its mismatched one of this epoch.

    Attributes:
        index: position in the cache.
        masses: desirable and undesirable mass; (1, 0) or (0, 1) if only a label is known.
    """

    index: int
    row_id: str
    masses: Masses
    matched: ScoredSequence
    mismatched: ScoredSequence

    @property
    def label(self) -> bool:
        """Return whether the desirable mass is at least the undesirable one."""
        return self.masses.label


def total_mass(rows: Sequence[TrainingRow]) -> float:
    """Return the sum of all masses of some rows, by which their losses are averaged."""
    return sum(row.masses.total for row in rows)


@dataclass(frozen=True)
class RowKey:
    """The index of a row and of the mismatched completion to read with it."""

    index: int
    partner: int


class SourceFiles(NamedTuple):
    """The source files of some rows.

    Attributes:
        names: of the files of a cache, each once.
        numbers: which of them each row is from, int32, shape (rows,).
    """

    names: list[str]
    numbers: np.ndarray


class CacheRows(Dataset[TrainingRow]):
    """The rows of a cache, read from Parquet on access.

    Args:
        folder: the cache; it is verified first.
        max_length: length to shorten rows to, tokens; rows whose prompt fills it are dropped.
        mapped: map the files into memory, which the workers of a sweep share.
        trust_unchanged: do not read files again that were verified on this machine and did not change since. Their metadata
            show every write, but not damage by the disk itself.

    Attributes:
        labels: bool, shape (rows,): whether the desirable mass is at least the undesirable one.
        masses: float64, shape (rows, 2); None if every row is one bit of weight 1.
        dropped: number of rows whose prompt fills `max_length`.
        cut: bool, shape (rows,): whether it shortens the completion.
        kl_cut: how many mismatched completions it shortens.
        largest_id: the largest token id, among the rows that this process checked.
        seconds: duration of the check.

    Raises:
        CacheError: damaged.
        TrainingError: `max_length` is above the cached one, or leaves no row.
    """

    def __init__(
        self, folder: Path, *, max_length: int | None = None, mapped: bool = False, trust_unchanged: bool = False
    ) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        cached = int(self.manifest.tokenization["max_length"])
        if max_length is not None and max_length > cached:
            raise TrainingError(
                f"--max-length {max_length}: the rows of the cache {folder} were cut at {cached} tokens, and scores of the rest do not "
                f"exist. Use --max-length {cached} or less, or score again with kto-precompute --max-length {max_length}."
            )
        self.max_length = max_length or cached
        self.partners = self.manifest.partners
        started = time.monotonic()
        with Progress("verifying", self.manifest.rows, "rows") as progress:
            share = read_launch().local_share
            known = VerifiedShards(folder, self.manifest, share=share, trust_unchanged=trust_unchanged)
            found = verify_cache(folder, self.manifest, share=share, on_rows=progress.add, known=known)
        self.largest_id, self.seconds = found.largest_id, time.monotonic() - started
        allow_open_files(len(self.manifest.shards))
        shards = [
            VerifiedFile(folder / shard["file"], shard["sha256"], state, mapped=mapped)
            for shard, state in zip(self.manifest.shards, found.states, strict=True)
        ]
        self._files = ShardFiles(shards, found.groups)
        if read_manifest(folder) != self.manifest:  # a writer removes the manifest before it changes a shard
            raise CacheError(f"{folder}: was updated while it was read. Start again.")
        # Position in the files of each row here.
        self._fitting = np.arange(len(found.labels), dtype=index_type(len(found.labels)))
        self.cut, self.kl_cut = np.zeros(len(found.labels), dtype=bool), 0
        if self.max_length < cached:
            prompts, completions = (
                numbers(self.column(column, pc.list_value_length)) for column in ("prompt_ids", "completion_ids")
            )
            self._fitting = self._fitting[prompts < self.max_length]
            self.cut = (prompts + completions)[self._fitting] > self.max_length
            partners = numbers(self.column("kl_completion_ids", lambda lists: pc.list_value_length(lists.flatten())))
            whole = prompts[:, None] + partners.reshape(len(prompts), self.partners)
            self.kl_cut = int((whole[self._fitting] > self.max_length).sum())
        self.dropped, self.labels = len(found.labels) - len(self._fitting), found.labels[self._fitting]
        self.masses: np.ndarray | None = None
        if self.manifest.columns:
            self.masses = np.stack([numbers(self._of_rows(name)) for name in MASS_COLUMNS], axis=1)
        self._reader = RowReader(self._files)
        self._as_scored = not self.dropped
        return_freed_memory()
        if not len(self):
            raise TrainingError(
                f"--max-length {self.max_length}: every prompt in {folder} has at least that many tokens; no row is left."
            )

    def column(self, column: str, summary: Callable[[pa.Array], pa.Array] = lambda values: values) -> pa.ChunkedArray:
        """Read a column of all files, regardless of `max_length`, and summarize it chunk by chunk."""
        return self._files.column(column, summary)

    @functools.cached_property
    def prompt_ids(self) -> RowIds:
        """Prompt id of each row; read when a hold-out needs it."""
        return RowIds(self._of_rows("prompt_id", as_ids))

    @property
    def prompts(self) -> int:
        """Number of distinct prompts."""
        return len(self.prompt_ids.distinct)

    @property
    def repeats(self) -> Repeats | None:
        """Numbers of repeated rows, as kto-precompute counted them; None if they have to be counted.

        It did not count them before it wrote these fields, and `max_length` and a weighting of objectives change them.
        """
        data = self.manifest.data
        if not self._as_scored or "duplicates" not in data or "contradictions" not in data:
            return None
        return Repeats(data["duplicates"], data["contradictions"])

    def parts(self, columns: list[str], rows: np.ndarray) -> Iterator[tuple[slice, pa.Table]]:
        """Yield columns of some rows, a few thousand rows at a time.

        Args:
            rows: ascending positions.

        Yields:
            Which of `rows`, and their columns.
        """
        stored, first = self._fitting[rows], 0
        for table in self._files.tables(columns):
            inside = slice(*np.searchsorted(stored, [first, first + len(table)]).tolist())
            if inside.stop > inside.start:
                yield inside, table.take(pa.array(stored[inside] - first))
            first += len(table)

    def row_ids(self) -> np.ndarray:
        """Read the ids of all rows, dtype `hashing.ID`."""
        found = np.empty(len(self), dtype=ID)
        for inside, table in self.parts(["row_id"], self.positions):
            found[inside] = id_array_of(pa.chunked_array([as_ids(one) for one in table.column(0).chunks]))
        return found

    def places(self, rows: np.ndarray) -> list[str]:
        """Return the places in the feedback of the rows at some positions, or their numbers if the cache has no places."""
        columns = ["source", *([PLACE] if self.manifest.has_places else [])]
        found: list[str] = []
        read: dict[int, pa.Table] = {}
        for number in self._fitting[rows].tolist():
            group, at = self._files.find(number)
            if group not in read:
                read[group] = self._files.read(group, columns)
            values = {name: read[group].column(name)[at].as_py() for name in columns}
            found.append(place_in_words(values.get(PLACE), values["source"]))
        return found

    def source_files(self, rows: np.ndarray) -> "SourceFiles | None":
        """Return the files of the rows at some positions; None if there is one file, or the cache has no places."""
        if not self.manifest.has_places or len(self.manifest.data.get("files") or []) < 2:
            return None
        files = self.column(PLACE, lambda places: files_of(places).dictionary_encode()).unify_dictionaries()
        numbers_of_rows = np.concatenate([numbers(chunk.indices) for chunk in files.chunks])[self._fitting[rows]]
        return SourceFiles(files.chunk(0).dictionary.to_pylist(), numbers_of_rows)

    @functools.cached_property
    def pair_ids(self) -> RowIds:
        """Preference pair of each row; read when a loss needs it."""
        return RowIds(self._of_rows("pair_id", as_ids))

    @functools.cached_property
    def objectives(self) -> dict[str, np.ndarray]:
        """Masses of the rows by the name of an objective, float64, shape (rows, 2) each; empty without objectives."""
        if not self.manifest.objectives:
            return {}
        column = self._of_rows(OBJECTIVES)
        return {
            name: np.stack([numbers(pc.struct_field(column, [name, side])) for side in Masses._fields], axis=1)
            for name in self.manifest.objectives
        }

    def judged_by(self, weights: Mapping[str, float] | None) -> "CacheRows":
        """Return the same rows with the masses that a weighting of their objectives gives them.

        A row that was judged by none of these objectives has masses (0, 0).

        Args:
            weights: by the name of an objective; None for the rows' own masses.

        Raises:
            TrainingError: an objective that the cache does not have.
        """
        if weights is None:
            return self
        check_objectives(weights, self.manifest, self.folder)
        found = copy.copy(self)  # shares the open files
        found._as_scored = False
        found.masses = weighted_masses(self.objectives, weights)
        found.labels = found.masses[:, 0] >= found.masses[:, 1]
        return found

    def masses_of(self, rows: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """Return the masses of the rows at some positions, float64, shape (len(rows), 2)."""
        if self.masses is not None:
            return self.masses[rows]
        return np.array(ONE_BIT)[self.labels[rows].astype(np.int64)]

    def are_judged(self, rows: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """Return whether the rows at some positions have any mass, bool, shape (len(rows),)."""
        if self.masses is None:
            return np.ones(len(self.labels[rows]), dtype=bool)
        return self.masses_of(rows).sum(axis=1) > 0

    @property
    def shortened(self) -> Shortened:
        """Counts of rows that `max_length` dropped or truncated."""
        return {"dropped": self.dropped, "cut": int(self.cut.sum()), "kl_cut": self.kl_cut}

    def _of_rows(self, column: str, summary: Callable[[pa.Array], pa.Array] = lambda values: values) -> pa.ChunkedArray:
        return _taken(self.column(column, summary), self._fitting)

    @functools.cached_property
    def lengths(self) -> SampledLengths:
        """Lengths in tokens of a few thousand rows from the whole cache, as stored."""
        groups = self._files.group_count
        chosen = np.unique(np.linspace(0, groups - 1, min(groups, _GROUPS_SAMPLED)).astype(int))
        of_rows = []
        for group in chosen.tolist():
            table = self._files.read(group, ["prompt_ids", "completion_ids", "label"], keep=False)
            lists = [numbers(pc.list_value_length(table.column(name))) for name in ("prompt_ids", "completion_ids")]
            of_rows.append(np.stack([*lists, numbers(table.column("label")).astype(np.int64)]))
        prompts, completions, labels = np.concatenate(of_rows, axis=1)
        kept = prompts < self.max_length
        prompts, completions, labels = prompts[kept], completions[kept], labels[kept].astype(bool)
        completions = np.minimum(completions, self.max_length - prompts)
        return {
            "sample": len(prompts),
            "truncated": int((prompts + completions >= self.max_length).sum()),
            "lengths": {
                "prompt": prompts.tolist(),
                "desirable": completions[labels].tolist(),
                "undesirable": completions[~labels].tolist(),
            },
        }

    @property
    def positions(self) -> np.ndarray:
        """Positions of all rows, int32 where it suffices, shape (rows,)."""
        return np.arange(len(self), dtype=self._fitting.dtype)

    def __len__(self) -> int:
        return len(self._fitting)

    def __getitem__(self, key: "int | RowKey") -> TrainingRow:
        key = key if isinstance(key, RowKey) else RowKey(int(key), 0)
        number = int(self._fitting[key.index])
        (stored,) = self._reader.read([number], key.partner % self.partners, in_order=False)
        return self._row(key.index, stored)

    def __getitems__(self, keys: Sequence[RowKey]) -> list[TrainingRow]:
        """Return the rows of a batch, the next one of what is expected, if that is known; torch calls it."""
        found = self._reader.read(self._fitting[[key.index for key in keys]].tolist(), keys[0].partner % self.partners)
        return [self._row(key.index, stored) for key, stored in zip(keys, found, strict=True)]

    def together(self, indices: np.ndarray) -> list[TrainingRow]:
        """Return the rows at some positions with their first mismatched completion; they keep no other row in memory."""
        found = self._reader.read_together(self._fitting[indices].tolist(), 0)
        return [self._row(index, stored) for index, stored in zip(indices.tolist(), found, strict=True)]

    def expect(self, indices: np.ndarray, partner: int) -> None:
        """Prepare for reading some rows once each, in this order and with this mismatched completion."""
        self._reader.expect(self._fitting[indices], partner % self.partners)

    def expect_nothing(self) -> None:
        """Release the rows that were read ahead."""
        self._reader.expect_nothing()

    def _row(self, index: int, stored: StoredRow) -> TrainingRow:
        return TrainingRow(
            index=index,
            row_id=stored.row_id,
            masses=ONE_BIT[stored.label] if self.masses is None else Masses(*self.masses[index].tolist()),
            matched=stored.matched.shortened(self.max_length),
            mismatched=stored.mismatched.shortened(self.max_length),
        )


def _taken(column: pa.ChunkedArray, positions: np.ndarray) -> pa.ChunkedArray:
    """Return the values at some positions, ascending if they are all of them."""
    return column if len(positions) == len(column) and _is_range(positions) else column.take(pa.array(positions))


def _is_range(positions: np.ndarray) -> bool:
    return bool((positions == np.arange(len(positions))).all())
