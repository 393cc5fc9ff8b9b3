"""Verify a reference cache, and read its rows at random."""

import copy
import functools
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from offline_kto.kto_core.cache.manifest import Manifest, read_manifest
from offline_kto.kto_core.cache.places import PLACE, files_of, place_in_words
from offline_kto.kto_core.cache.shards import Rows, numbers, open_shard, read_groups
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES, ONE_BIT, Masses
from offline_kto.kto_core.launch import read_launch
from offline_kto.kto_core.losses.objective_masses import weighted_masses
from offline_kto.kto_core.progress import Progress
from offline_kto.train.data.objectives import check_objectives
from offline_kto.train.run_records import SampledLengths, Shortened

# Row groups sampled for the lengths in the report; kto-precompute writes 64 rows into each.
_GROUPS_SAMPLED = 64

# Memory for decoded row groups: a small cache fits completely, a large one does not.
_BYTES_IN_MEMORY = 256 * 2**20


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
        """Prompt ids and completion ids."""
        return self.prompt_ids, self.completion_ids

    def shortened(self, max_length: int) -> "ScoredSequence":
        """Return the sequence with its completion cut to fit; its score is a prefix sum."""
        room = max_length - len(self.prompt_ids)
        if len(self.completion_ids) <= room:
            return self
        logps = self.ref_token_logps[:room]
        return ScoredSequence(self.prompt_ids, self.completion_ids[:room], float(logps.sum(dtype=np.float64)), logps)


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


class CacheRows(Dataset[TrainingRow]):
    """The rows of a cache, read from Parquet on access.

    Args:
        folder: the cache; every byte and every row of it is checked first.
        max_length: length to shorten rows to, tokens; rows whose prompt fills it are dropped.
        mapped: map the files into memory, which the workers of a sweep share.

    Attributes:
        labels: bool, shape (rows,): whether the desirable mass is at least the undesirable one.
        masses: float64, shape (rows, 2); None if every row is one bit of weight 1.
        dropped: number of rows whose prompt fills `max_length`.
        cut: bool, shape (rows,): whether it shortens the completion.
        kl_cut: how many mismatched completions it shortens.
        largest_id: the largest token id, among the rows that this process checked.
        seconds: duration of the check.

    Raises:
        CacheError: damaged, or `max_length` above the cached one.
    """

    def __init__(self, folder: Path, *, max_length: int | None = None, mapped: bool = False) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        cached = int(self.manifest.tokenization["max_length"])
        if max_length is not None and max_length > cached:
            raise CacheError(
                f"--max-length {max_length}: the rows of the cache {folder} were cut at {cached} tokens, and scores of the rest do not "
                f"exist. Use --max-length {cached} or less, or score again with kto-precompute --max-length {max_length}."
            )
        self.max_length = max_length or cached
        self.partners = self.manifest.partners
        started = time.monotonic()
        with Progress("verifying", self.manifest.rows, "rows") as progress:
            found = verify_cache(folder, self.manifest, share=read_launch().local_share, on_rows=progress.add)
        self.largest_id, self.seconds = found.largest_id, time.monotonic() - started
        self._paths = [folder / shard["file"] for shard in self.manifest.shards]
        _allow_open_files(len(self._paths))
        self._files = [open_shard(path, mapped=mapped) for path in self._paths]
        if read_manifest(folder) != self.manifest:  # a writer removes the manifest before it changes a shard
            raise CacheError(f"{folder}: was updated while it was read. Start again.")
        groups = [(k, g) for k, file in enumerate(self._files) for g in range(file.num_row_groups)]
        counts = [self._files[k].metadata.row_group(g).num_rows for k, g in groups]
        self._groups, self._group_ends = groups, np.cumsum(counts)
        self._fitting = np.arange(len(found.labels))  # position in the files of each row here
        self.cut, self.kl_cut = np.zeros(len(found.labels), dtype=bool), 0
        if self.max_length < cached:
            prompts, completions = (
                numbers(self.column(column, pc.list_value_length)) for column in ("prompt_ids", "completion_ids")
            )
            self._fitting = np.flatnonzero(prompts < self.max_length)
            self.cut = (prompts + completions)[self._fitting] > self.max_length
            partners = numbers(self.column("kl_completion_ids", lambda lists: pc.list_value_length(lists.flatten())))
            whole = prompts[:, None] + partners.reshape(len(prompts), self.partners)
            self.kl_cut = int((whole[self._fitting] > self.max_length).sum())
        self.dropped, self.labels = len(found.labels) - len(self._fitting), found.labels[self._fitting]
        self.masses: np.ndarray | None = None
        if self.manifest.columns:
            self.masses = np.stack([numbers(self._of_rows(name)) for name in MASS_COLUMNS], axis=1)
        self._decoded = _DecodedGroups()
        if not len(self):
            raise CacheError(
                f"--max-length {self.max_length}: every prompt in {folder} has at least that many tokens; no row is left."
            )

    def column(self, column: str, summary: Callable[[pa.Array], pa.Array] = lambda values: values) -> pa.ChunkedArray:
        """Read a column of all files, regardless of `max_length`, and summarize it chunk by chunk."""
        pieces: list[pa.Array] = []
        for path, file in zip(self._paths, self._files, strict=True):
            for table in read_groups(path, file, columns=[column], at_once=16):
                pieces += [summary(chunk) for chunk in table.column(column).chunks]
        return pa.chunked_array(pieces)

    @functools.cached_property
    def prompt_ids(self) -> list[str]:
        """Prompt id of each row; read when a hold-out needs it."""
        found: list[str] = self._of_rows("prompt_id").to_pylist()
        return found

    def ids(self, column: str, rows: np.ndarray) -> pa.ChunkedArray:
        """Return `row_id` or `prompt_id` of the rows at some positions."""
        return self.column(column).take(pa.array(self._fitting[rows]))

    def places(self, rows: np.ndarray) -> list[str]:
        """Return the places in the feedback of the rows at some positions, or their numbers if the cache has no places."""
        columns = ["source", *([PLACE] if self.manifest.has_places else [])]
        found: list[str] = []
        read: dict[int, pa.Table] = {}
        for number in self._fitting[rows].tolist():
            group = int(np.searchsorted(self._group_ends, number, side="right"))
            if group not in read:
                shard, position = self._groups[group]
                (read[group],) = read_groups(self._paths[shard], self._files[shard], columns=columns, groups=[position])
            at = number - (int(self._group_ends[group]) - read[group].num_rows)
            values = {name: read[group].column(name)[at].as_py() for name in columns}
            found.append(place_in_words(values.get(PLACE), values["source"]))
        return found

    def source_files(self, rows: np.ndarray) -> list[str] | None:
        """Return the file of each of the rows at some positions; None if there is one file, or the cache has no places."""
        if not self.manifest.has_places or len(self.manifest.data.get("files") or []) < 2:
            return None
        # Every row repeats its file's name, and as a dictionary ten million of them take little memory.
        files = self.column(PLACE, lambda places: files_of(places).dictionary_encode()).unify_dictionaries()
        found: list[str] = files.take(pa.array(self._fitting[rows])).to_pylist()
        return found

    @functools.cached_property
    def pair_ids(self) -> list[str | None]:
        """Preference pair of each row; read when a loss needs it."""
        found: list[str | None] = self._of_rows("pair_id").to_pylist()
        return found

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
        found.masses = weighted_masses(self.objectives, weights)
        found.labels = found.masses[:, 0] >= found.masses[:, 1]
        return found

    def masses_of(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the masses of the rows at some positions, float64, shape (len(rows), 2)."""
        if self.masses is not None:
            return self.masses[rows]
        return np.array(ONE_BIT)[self.labels[rows].astype(np.int64)]

    def are_judged(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return whether the rows at some positions have any mass, bool, shape (len(rows),)."""
        return self.masses_of(rows).sum(axis=1) > 0

    @property
    def shortened(self) -> Shortened:
        """Counts of rows that `max_length` dropped or truncated."""
        return {"dropped": self.dropped, "cut": int(self.cut.sum()), "kl_cut": self.kl_cut}

    def _of_rows(self, column: str) -> pa.ChunkedArray:
        return self.column(column).take(pa.array(self._fitting))

    @functools.cached_property
    def lengths(self) -> SampledLengths:
        """Lengths in tokens of a few thousand rows from the whole cache, as stored."""
        groups = len(self._groups)
        chosen = np.unique(np.linspace(0, groups - 1, min(groups, _GROUPS_SAMPLED)).astype(int))
        of_rows = []
        for number, position in (self._groups[group] for group in chosen):
            path, file = self._paths[number], self._files[number]
            (table,) = read_groups(path, file, groups=[position], columns=["prompt_ids", "completion_ids", "label"])
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

    def __len__(self) -> int:
        return len(self._fitting)

    def __getitem__(self, key: "int | RowKey") -> TrainingRow:
        key = RowKey(key, 0) if isinstance(key, int) else key
        number = int(self._fitting[key.index])
        group = int(np.searchsorted(self._group_ends, number, side="right"))
        rows = self._group(group)
        row = rows[number - (int(self._group_ends[group]) - len(rows))]
        k = key.partner % self.partners
        prompt = row["prompt_ids"]
        matched = ScoredSequence(prompt, row["completion_ids"], row["ref_logps"], row["ref_token_logps"])
        mismatched = ScoredSequence(
            prompt, row["kl_completion_ids"][k], float(row["ref_kl_logps"][k]), row["ref_kl_token_logps"][k]
        )
        return TrainingRow(
            index=key.index,
            row_id=row["row_id"],
            masses=ONE_BIT[row["label"]] if self.masses is None else Masses(*self.masses[key.index].tolist()),
            matched=matched.shortened(self.max_length),
            mismatched=mismatched.shortened(self.max_length),
        )

    def _group(self, group: int) -> Rows:
        """Return a row group, from memory if it was read recently."""

        def read() -> Rows:
            number, position = self._groups[group]
            file = self._files[number]
            columns = [name for name in file.schema_arrow.names if name != PLACE]  # no update needs it
            (table,) = read_groups(self._paths[number], file, columns=columns, groups=[position])
            return Rows(table)

        return self._decoded.get(group, read)


class _DecodedGroups:
    """The row groups that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the next batch is read in its own thread
        self._rows: OrderedDict[int, Rows] = OrderedDict()
        self._bytes = 0

    def get(self, group: int, read: Callable[[], Rows]) -> Rows:
        with self._lock:
            if group in self._rows:
                self._rows.move_to_end(group)
                return self._rows[group]
            rows = self._rows[group] = read()
            self._bytes += rows.nbytes
            while self._bytes > _BYTES_IN_MEMORY and len(self._rows) > 1:
                self._bytes -= self._rows.popitem(last=False)[1].nbytes
            return rows


def _allow_open_files(count: int) -> None:
    """Raise the limit on open files, so that all shards stay open, and the files that are read are the verified ones.

    Raises:
        CacheError: the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + 256 if Path("/proc/self/fd").exists() else 2 * count + 512
    if resource.RLIM_INFINITY in (soft, hard) or wanted <= soft:
        return
    if wanted > hard:
        raise CacheError(
            f"The cache has {count:,} shards, and this system allows {hard:,} open files (ulimit -Hn). Make fewer shards: "
            "kto-precompute --rows-per-shard 65536 into another folder."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
