"""Find out which sequences each missing shard has to score, which have a score, and which another shard scores.

The last bits of a score depend on the sequences that are scored together with it: its company. Every sequence belongs to
the company of one shard, the first that needs it, and later shards take its score from there. So neither the number of
workers nor the order in which shards end changes a score, and a resumed run computes what an undisturbed one does.

All tables are arrays over the sequences of the plan, so that a million rows take some tens of megabytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from offline_kto.kto_core.equal_ids import EqualIds, IdIndex
from offline_kto.kto_core.hashing import hex_ids
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.plan import Plan
from offline_kto.precompute.score_files import ScoredFile, read_scores

# Sequences whose scores were found in no file.
_NOWHERE = -1


class SequenceIds(NamedTuple):
    """The sequences of a plan: of each row (x, y), then each (x, y').

    Attributes:
        ids: `sequence_id` as 16 bytes, shape (rows, sequences of a row), dtype `hashing.ID`.
        tokens: prompt and completion together, int32, of the same shape.
    """

    ids: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, plan: Plan) -> "SequenceIds":
        return cls(plan.sequence_ids, plan.completion_lengths + plan.rows.prompt_lengths[:, None])


class Need(NamedTuple):
    """The sequences of one shard, row by row; equal ones say the same.

    Attributes:
        in_company: bool; whether a sequence is scored together with the others for which this is true.
        scores: in company or not; None for those without one.
        awaited: the shards that score the others without a score.
    """

    in_company: np.ndarray
    scores: list[np.ndarray | None]
    awaited: set[int]


class Needs:
    """The needs of all missing shards.

    Args:
        plan: the rows.
        table: the sequences of the plan.
        shards: row ranges of all shards; all but the last have the same number of rows.
        missing: numbers of the shards that are not complete.
        keys: of all shards.
        files: returns the scored files on disk.

    Attributes:
        width: number of sequences of each row.
        wanted: number of sequences in missing shards.
        known: how many of them have a score on disk.
        unknown_tokens: tokens in the others.
    """

    def __init__(
        self,
        plan: Plan,
        table: SequenceIds,
        shards: Sequence[range],
        *,
        missing: Sequence[int],
        keys: Sequence[str],
        files: Callable[[], Iterable[ScoredFile]],
    ) -> None:
        self._plan, self._shards, self._keys = plan, shards, keys
        self.width = table.ids.shape[1]
        self._ids, self._tokens = table.ids.reshape(-1), table.tokens.reshape(-1)
        self._per_shard = len(shards[0]) * self.width
        equal = EqualIds.of(self._ids)
        self._first = equal.firsts()
        # Of a sequence that several missing shards need, its place in the first of them, under its first place of all.
        self._in_missing = np.full(len(self._ids), _NOWHERE, dtype=np.int64)
        for number in reversed(missing):
            places = self._places(number)
            self._in_missing[self._first[places][::-1]] = places[::-1]
        self._found = _Found(len(self._ids))
        wanted = self._in_missing >= 0
        self.wanted = int(wanted.sum())
        if self.wanted:
            first = equal.order[equal.heads]
            self._search(files(), IdIndex(self._ids[first], first), wanted)
        have = self._found.file != _NOWHERE
        self.known = int((wanted & have).sum())
        self._unknown = wanted & ~have
        self.unknown_tokens = int(self._tokens[self._unknown].sum(dtype=np.int64))
        self._lent = self._lent_by_missing(missing)
        self._scores: dict[int, np.ndarray] = {}  # of sequences that are lent, by their first places

    def _places(self, number: int) -> np.ndarray:
        """Return the places of a shard's sequences in all sequences of the plan."""
        rows = self._shards[number]
        return np.arange(rows.start * self.width, rows.stop * self.width)

    def _search(self, files: Iterable[ScoredFile], index: IdIndex, wanted: np.ndarray) -> None:
        number_of = {key: number for number, key in enumerate(self._keys)}
        for file in files:
            ids, rows, slots = file.sequences()
            first = index.find(ids)
            keep = first >= 0
            keep[keep] = wanted[first[keep]]
            shard = number_of.get(file.part_of or file.key or "")
            is_part = file.part_of is not None and shard is not None
            if is_part:
                keep[keep] = first[keep] // self._per_shard == shard
            place = _FilePlaces(file.path, rows[keep], slots[keep])
            self._found.add(place, first[keep], ours=shard is not None, is_part=is_part)
            if not (wanted & (self._found.file == _NOWHERE)).any():
                return

    def _owner(self, first: np.ndarray) -> np.ndarray:
        """Return the shards in whose company sequences are, given their first places."""
        place = np.where(self._found.file[first] == _NOWHERE, self._in_missing[first], first)
        return place // self._per_shard

    def _lent_by_missing(self, missing: Sequence[int]) -> np.ndarray:
        """Return which sequences, by first place, a missing shard scores for others."""
        lent = np.zeros(len(self._ids), dtype=bool)
        for number in missing:
            first = self._first[self._places(number)]
            passing = self._unknown[first] | self._found.is_part[first]
            lent[first[(self._owner(first) != number) & passing]] = True
        return lent

    def of(self, number: int) -> Need:
        """Return the sequences of a shard; call it again when the shards that it awaits are complete."""
        first, where = np.unique(self._first[self._places(number)], return_inverse=True)
        owner = self._owner(first)
        in_company = (owner == number) & ~self._found.is_foreign(first)
        scores = self._found.read(first)
        for i in np.flatnonzero(self._lent[first]).tolist():
            if scores[i] is None:
                scores[i] = self._scores.get(int(first[i]))
        has_none = np.array([one is None for one in scores])
        return Need(in_company[where], [scores[i] for i in where.tolist()], {*owner[has_none & ~in_company].tolist()})

    def company(self, number: int, need: Need) -> dict[str, TokenIds]:
        """Return the sequences of a shard that are scored together, by id, in the order in which they appear."""
        found: dict[str, TokenIds] = {}
        sequences = (one for row in self._shards[number] for one in self._plan.sequences(row))
        for name, sequence, is_member in zip(self.ids_of(number), sequences, need.in_company.tolist(), strict=True):
            if is_member:
                found.setdefault(name, sequence)
        return found

    def ids_of(self, number: int) -> list[str]:
        """Return the ids of the sequences of a shard, row by row."""
        return hex_ids(self._ids[self._places(number)])

    def _name(self, place: int) -> str:
        return bytes(self._ids[place]).hex()

    def _scored_by(self, number: int) -> np.ndarray:
        """Return the first places of the sequences whose scores are in no complete file before a shard is complete."""
        first = np.unique(self._first[self._places(number)])
        passing = (self._found.file[first] == _NOWHERE) | self._found.is_part[first]
        return first[(self._owner(first) == number) & passing]

    def unknown_tokens_of(self, number: int) -> int:
        """Return the tokens of the sequences that a shard has to score."""
        first = self._scored_by(number)
        return int(self._tokens[first[self._unknown[first]]].sum(dtype=np.int64))

    def lent_by(self, number: int) -> np.ndarray:
        """Return which sequences of a shard, by their places in it, have scores that other missing shards need."""
        lent = self._lent_first(number)
        first, at = np.unique(self._first[self._places(number)], return_index=True)
        return at[np.searchsorted(first, lent)]

    def _lent_first(self, number: int) -> np.ndarray:
        first = self._scored_by(number)
        return first[self._lent[first]]

    def complete(self, number: int, scores: Sequence[np.ndarray]) -> None:
        """Note that a shard is complete.

        Args:
            scores: those of `lent_by`.
        """
        self._scores.update(zip(self._lent_first(number).tolist(), scores, strict=True))
        first = self._scored_by(number)
        self._unknown[first] = False
        self._found.forget(first)  # its parts are removed

    def unscored(self) -> "PlannedSequences":
        """Return the sequences that have no score, in the order of the plan."""
        return PlannedSequences(self._plan, self._in_missing[np.flatnonzero(self._unknown)], self.width)

    def shortest_unscored(self, count: int) -> list[TokenIds]:
        """Return the shortest sequences that have no score, the shortest first."""
        first = np.flatnonzero(self._unknown)
        shortest = first[np.argsort(self._tokens[first], kind="stable")[:count]]
        return [*PlannedSequences(self._plan, shortest, self.width)]

    def count_kept(self, ids: Mapping[int, set[str]]) -> tuple[int, int]:
        """Count what a stopped run leaves on disk.

        Args:
            ids: for each shard that was begun and is not complete, the sequences in its parts.

        Returns:
            Rows of these shards all of whose sequences have a score, and sequences without one.
        """
        for number, kept in ids.items():
            first = np.unique(self._first[self._places(number)])
            self._unknown[[place for place in first.tolist() if self._name(place) in kept]] = False
        begun = [(~self._unknown[self._first[self._places(number)]]).reshape(-1, self.width) for number in ids]
        return sum(int(rows.all(axis=1).sum()) for rows in begun), int(self._unknown.sum())


class PlannedSequences(Sequence[TokenIds]):
    """Some sequences of a plan, built on access.

    Args:
        places: in all sequences of the plan.
        width: sequences of each row.
    """

    def __init__(self, plan: Plan, places: np.ndarray, width: int) -> None:
        self._plan, self._at, self._width = plan, places, width

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, index: int) -> TokenIds: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenIds]: ...
    def __getitem__(self, index: int | slice) -> TokenIds | list[TokenIds]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, slot = divmod(int(self._at[index]), self._width)
        return self._plan.sequences(row)[slot]


class _FilePlaces(NamedTuple):
    """Sequences in a file, as `ScoredFile.sequences` returns them."""

    path: Path
    rows: np.ndarray
    slots: np.ndarray


class _Found:
    """Where the scores of sequences are on disk, by their first places."""

    def __init__(self, count: int) -> None:
        self._paths: list[Path] = []
        self.file = np.full(count, _NOWHERE, dtype=np.int32)
        self._row = np.zeros(count, dtype=np.int32)
        self._slot = np.zeros(count, dtype=np.int16)
        self._ours = np.zeros(count, dtype=bool)
        self.is_part = np.zeros(count, dtype=bool)

    def add(self, places: _FilePlaces, first: np.ndarray, *, ours: bool, is_part: bool) -> None:
        """Add sequences of a file.

        Args:
            first: their first places in the plan.
            ours: the file was scored for this plan, in the company that an undisturbed run would use. Scores of other
                files take precedence: this plan never puts their sequences into a company.
            is_part: the file is removed when its shard is complete. Files that stay take precedence.
        """
        rows, slots = places.rows, places.slots
        if ours:
            free = (self.file[first] == _NOWHERE) | (self._ours[first] & (self.is_part[first] | (not is_part)))
            first, rows, slots = first[free], rows[free], slots[free]
        self.file[first], self._row[first], self._slot[first] = len(self._paths), rows, slots
        self._ours[first], self.is_part[first] = ours, is_part
        self._paths.append(places.path)

    def forget(self, first: np.ndarray) -> None:
        """Forget sequences, whose files are about to be removed."""
        self.file[first], self._ours[first], self.is_part[first] = _NOWHERE, False, False

    def is_foreign(self, first: np.ndarray) -> np.ndarray:
        """Return which sequences have a score that was not made for this plan."""
        return (self.file[first] != _NOWHERE) & ~self._ours[first]

    def read(self, first: np.ndarray) -> list[np.ndarray | None]:
        """Return the scores of sequences; None for those without."""
        scores: list[np.ndarray | None] = [None] * len(first)
        files = self.file[first]
        for file in np.unique(files[files != _NOWHERE]).tolist():
            at = np.flatnonzero(files == file)
            found = read_scores(self._paths[file], self._row[first[at]], self._slot[first[at]])
            for i, one in zip(at.tolist(), found, strict=True):
                scores[i] = one
        return scores
