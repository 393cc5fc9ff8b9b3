"""Choose the rows that a person should look at: their reward contradicts their label, they are repeated, or they changed most.

A mislabelled row is hard to learn from the other rows, so the policy's reward for it tends to have the wrong sign. This shows
best before the policy has trained on the row itself. Held-out rows have the reward of the final policy. Training rows have that
of their last update, which costs no pass. Both are measured from the reference point of the accuracy.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from offline_kto.kto_core.durable_files import written_to
from offline_kto.kto_core.errors import WriteError
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.losses.metrics import TIE
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.held_out import HeldOutRows
from offline_kto.train.data.repeated_rows import repeated_rows
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.suspects_file import (
    CHANGED,
    CONTRADICTION,
    CONTRADICTS,
    DUPLICATE,
    KINDS,
    Suspect,
    write_suspects,
)
from offline_kto.train.trainer.evaluation import Scores, reference_points
from offline_kto.train.trainer.objective import Objective

# Rows that are listed: whose reward contradicts their label, that changed most, and groups of equal rows of each kind.
MOST_SUSPECTS, MOST_CHANGED, MOST_REPEATED = 50, 20, 200

# Rows whose masses are in memory at a time.
_AT_ONCE = 65_536

# Places of equal rows, and characters of a text: with what names its middle, no more than the report shows.
_MOST_OTHERS, _LONGEST_TEXT = 50, 1900


@dataclass(frozen=True)
class ScoredRows:
    """Rows of a cache with their log-ratios.

    Attributes:
        split: `train`, `held_out` or `evaluated`.
        indices: positions in the cache, shape (rows,).
        logratios: nats, NaN for a row that was not scored, float64, shape (rows,); so are the next two.
        points: the log-ratio at which each counts as neither desirable nor undesirable.
        before: before training, NaN where it is not known.
    """

    split: str
    cache: CacheRows
    indices: np.ndarray
    logratios: np.ndarray
    points: np.ndarray
    before: np.ndarray

    def contradictions(self) -> np.ndarray:
        """Return how far each log-ratio is on the wrong side for the row's masses: positive there, shape (rows,).

        It is what the row's masses lose: `(b - a) (r - point)`. A row with equal masses for and against is never suspect.
        """
        found = self.logratios - self.points
        found[~(np.abs(found) >= TIE)] = 0.0  # rounding decides on the side, or the row was never scored
        for start in range(0, len(found), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            desirable, undesirable = self.cache.masses_of(self.indices[some]).T
            found[some] *= undesirable - desirable
        return found

    def changes(self) -> np.ndarray:
        """Return how far each log-ratio moved, nats, shape (rows,); 0 where it is not known."""
        found = np.abs(self.logratios - self.before)
        found[~(found >= TIE)] = 0.0
        return found


@dataclass(frozen=True)
class Suspects:
    """The rows that a person should look at.

    Attributes:
        listed: the rows of suspects.csv.
        contradicting: rows whose reward contradicts their label, also those that are not listed.
        duplicates, contradictions: groups of equal rows, also those that are not listed.
    """

    listed: list[Suspect] = field(default_factory=list)
    contradicting: int = 0
    duplicates: int = 0
    contradictions: int = 0

    def write(self, path: Path) -> list[str]:
        """Write suspects.csv, and return the line for the console; without suspects there is neither.

        Raises:
            WriteError: it cannot be written.
        """
        with written_to(path.parent, WriteError, "Make room; the other files of the run are complete."):
            if not self.listed:
                path.unlink(missing_ok=True)  # of an earlier evaluation
                return []
            write_suspects(path, self.listed)
        listed = min(self.contradicting, MOST_SUSPECTS)
        of = f" of {self.contradicting:,}" if listed < self.contradicting else ""
        parts = [
            f"{listed:,}{of} {'row' if self.contradicting == 1 else 'rows'} whose reward contradicts their label"
            if listed
            else "",
            _groups(self.duplicates, "duplicate"),
            _groups(self.contradictions, "contradiction"),
        ]
        return [f"suspects    {', '.join(filter(None, parts))}: {path}"] if any(parts) else []


def _groups(count: int, noun: str) -> str:
    listed = f" ({MOST_REPEATED:,} listed)" if count > MOST_REPEATED else ""
    return f"{counted(count, noun)}{listed}" if count else ""


def find_suspects(parts: Sequence[ScoredRows], beta: float, tokenizer: Tokenizer) -> Suspects:
    """Choose the rows of suspects.csv.

    Args:
        parts: rows that were scored.
        tokenizer: that of the cache.
    """
    shown = _Shown(parts, beta, tokenizer)
    values = [part.contradictions() for part in parts]
    listed = [shown.row(CONTRADICTS, parts[number], at) for number, at in _largest(values, MOST_SUSPECTS)]
    counts = {CONTRADICTION: 0, DUPLICATE: 0}
    for cache in {id(part.cache): part.cache for part in parts}.values():
        repeated = repeated_rows(cache, most=MOST_REPEATED)
        for kind, found in ((CONTRADICTION, repeated.contradictions), (DUPLICATE, repeated.duplicates)):
            listed += [shown.equal_rows(kind, cache, group) for group in found.groups]
            counts[kind] += found.total
    listed.sort(key=lambda one: KINDS.index(one.kind))  # those of a second cache after those of the first
    changes = [part.changes() for part in parts]
    listed += [shown.row(CHANGED, parts[number], at) for number, at in _largest(changes, MOST_CHANGED)]
    contradicting = sum(int((one > 0).sum()) for one in values)
    return Suspects(listed, contradicting, counts[DUPLICATE], counts[CONTRADICTION])


def _largest(values: Sequence[np.ndarray], most: int) -> list[tuple[int, int]]:
    """Return where the largest positive values are, as (array, position), the largest first."""
    found: list[tuple[float, int, int]] = []
    for number, of_part in enumerate(values):
        chosen = np.argpartition(-of_part, most)[:most] if most < len(of_part) else np.arange(len(of_part))
        found += [(-float(of_part[at]), number, int(at)) for at in chosen if of_part[at] > 0]
    return [(number, at) for _, number, at in sorted(found)[:most]]


class _Shown:
    """Rows as suspects.csv shows them."""

    def __init__(self, parts: Sequence[ScoredRows], beta: float, tokenizer: Tokenizer) -> None:
        self._parts, self._beta, self._tokenizer = parts, beta, tokenizer

    @functools.cached_property
    def _orders(self) -> list[np.ndarray]:
        return [np.argsort(part.indices, kind="stable") for part in self._parts]

    def row(self, kind: str, part: ScoredRows, at: int) -> Suspect:
        """Return a row of a part."""
        position = int(part.indices[at])
        logratio, before = float(part.logratios[at]), float(part.before[at])
        found = self._row(kind, part.cache, position)._replace(split=part.split)
        if math.isnan(logratio):
            return found
        change = None if math.isnan(before) else logratio - before
        return found._replace(reward=self._beta * logratio, logratio=logratio, change=change)

    def equal_rows(self, kind: str, cache: CacheRows, positions: np.ndarray) -> Suspect:
        """Return the first of equal rows, with the places of the others."""
        first, others = int(positions[0]), positions[1:]
        found = self._scored(kind, cache, first) or self._row(kind, cache, first)
        more = f"; and {len(others) - _MOST_OTHERS:,} more" if len(others) > _MOST_OTHERS else ""
        return found._replace(others="; ".join(cache.places(others[:_MOST_OTHERS])) + more)

    def _scored(self, kind: str, cache: CacheRows, position: int) -> Suspect | None:
        for part, order in zip(self._parts, self._orders, strict=True):
            at = int(np.searchsorted(part.indices, position, sorter=order))
            if part.cache is cache and at < len(order) and part.indices[order[at]] == position:
                return self.row(kind, part, int(order[at]))
        return None

    def _row(self, kind: str, cache: CacheRows, position: int) -> Suspect:
        row = cache[position]
        return Suspect(
            kind=kind,
            place=cache.places(np.array([position]))[0],
            label=row.label,
            reward=None,
            change=None,
            logratio=None,
            tokens=len(row.matched.completion_ids),
            row_id=row.row_id,
            prompt=self._text(row.matched.prompt_ids),
            completion=self._text(row.matched.completion_ids),
            others="",
            split="",
        )

    def _text(self, ids: np.ndarray) -> str:
        """Return ids as text with special tokens, which show whose turn it is; a long text without its middle."""
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if len(text) <= _LONGEST_TEXT:
            return text
        half = _LONGEST_TEXT // 2
        return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def trained_rows(
    data: TrainingData,
    steps: np.ndarray,
    logratios: np.ndarray,
    objective: Objective,
    history: Sequence[Mapping[str, float]],
    *,
    starts_as_reference: bool,
) -> ScoredRows:
    """Return the training rows of a run with their log-ratios in their last update.

    Args:
        steps: updates before the last one that each row of the cache was in; -1 for none.
        logratios: of all rows of the cache, nats.
        history: the records that the run logged, for the reference points of its updates.
        starts_as_reference: whether log-ratios were 0 before training.
    """
    units = data.units
    seen = np.where(steps[units] >= 0, logratios[units].astype(np.float64), np.nan)
    if objective.rows_in_unit == 2:
        points = seen.mean(axis=1, keepdims=True).repeat(2, axis=1)
    else:
        points = _points_logged(steps[units], objective, history)
    before = np.broadcast_to(0.0 if starts_as_reference else np.nan, units.size)  # one value in memory
    return ScoredRows("train", data.rows, units.ravel(), seen.ravel(), points.ravel(), before)


def _points_logged(steps: np.ndarray, objective: Objective, history: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return the reference point of each update, nats: the mean of the log that its update was counted in."""
    name, scale = ("kl", 1.0) if objective.traits.needs_mismatched else ("reward_shift", 1 / objective.beta)
    logged = sorted({int(record["step"]): record[name] * scale for record in history if name in record}.items())
    if not logged:
        return np.broadcast_to(0.0, steps.shape)
    ends, points = np.array(logged).T
    return np.asarray(points[np.searchsorted(ends, steps + 1).clip(max=len(ends) - 1)])


def held_out_rows(
    held_out: HeldOutRows, scores: Scores, before: Scores | None, objective: Objective, *, split: str = "held_out"
) -> ScoredRows:
    """Return held-out rows with their log-ratios under the policy.

    Args:
        before: of the same rows before training; None if they are not known.
    """
    logratios = scores.logratios.numpy()
    points = reference_points(scores, objective).numpy()
    then = np.broadcast_to(np.nan, len(logratios)) if before is None else before.logratios.numpy()
    return ScoredRows(split, held_out.cache, held_out.indices, logratios, points, then)
