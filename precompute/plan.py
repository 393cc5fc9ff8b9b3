"""Plan the scoring: which rows are kept, how they are paired, and which sequences have to be scored.

Rows are immutable and stay on disk (`offline_kto.precompute.spool`). A completion is truncated where it is used, so that
it can be shortened for one prompt and complete for another.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from offline_kto.kto_core.cache.repeats import Repeats, count_repeats
from offline_kto.kto_core.equal_ids import EqualIds
from offline_kto.kto_core.errors import PairingError
from offline_kto.kto_core.feedback.pairing import PairableRows, Pairing, pair_rotate, pair_shuffled
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.hashing import ID, ListHash, hex_ids, sequence_bytes
from offline_kto.kto_core.judgements import Masses
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.runtime import no_garbage_collection
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.places_found import place_key
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.feedback.weights import Weights, total
from offline_kto.precompute.parallel_reading import read_feedback
from offline_kto.precompute.reading import Reading, ReadRows
from offline_kto.precompute.records.sources import SourceFile, describe_source, warnings_about
from offline_kto.precompute.spool import PlannedRow, PlannedRows, RowColumns

# Rows, or ids, hashed at a time.
_HASH_ROWS = 4096


@dataclass(frozen=True)
class Plan:
    """Rows with their partners, and how they were read.

    Attributes:
        rows: decoded when they are asked for.
        feedback: how the rows were read, with counts.
        examples: the first rows of each class, with their places.
        notes: sentences on how the rows were rendered and tokenized.
        rendered_on: the time that the chat template wrote into them; None if it writes none.
        weights: of the rows, as read.
    """

    rows: PlannedRows
    pairing: Pairing
    max_length: int
    read: int
    dropped: dict[str, int]
    files: list[SourceFile]
    feedback: Feedback
    examples: list[tuple[str, PlannedRow]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rendered_on: str | None = None
    weights: Weights = field(default_factory=Weights)

    def kl_completions(self, index: int) -> list[np.ndarray]:
        """Return the mismatched completions of a row, truncated to fit after its prompt."""
        room = self.max_length - self.rows.prompt_lengths[index]
        return [self.rows.full_completion(t)[:room] for t in self.pairing.partners[index]]

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the sequences that are scored for a row: (x, y), then each (x, y')."""
        prompt = self.rows.prompt(index)
        return [(prompt, self.rows.completion(index)), *((prompt, y) for y in self.kl_completions(index))]

    @functools.cached_property
    def sequence_ids(self) -> np.ndarray:
        """The ids of the sequences of each row, in the order of `sequences`; shape (rows, 1 + K), dtype `hashing.ID`.

        `hex_ids` returns them as texts. The first of a row is its `row_id`.
        """
        found = np.empty((len(self.rows), 1 + self.pairing.partners.shape[1]), dtype=ID)
        found[:, 0] = self.rows.ids("row_id")
        for rows in shard_rows(self, _HASH_ROWS):
            ids = (
                sequence_bytes(prompt, y)
                for i in rows
                for prompt in [self.rows.prompt(i)]
                for y in self.kl_completions(i)
            )
            found[rows.start : rows.stop, 1:] = np.frombuffer(b"".join(ids), dtype=ID).reshape(len(rows), -1)
        return found

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens of the completions of each row as scored, in the order of `sequences`; int32, shape (rows, 1 + K)."""
        room = self.max_length - self.rows.prompt_lengths[:, None]
        partners = np.minimum(self.rows.full_lengths[self.pairing.partners], room)
        return np.concatenate([self.rows.lengths[:, None], partners], axis=1)

    @functools.cached_property
    def mass_columns(self) -> list[str]:
        """The optional columns of the cache; empty if every row is one bit of weight 1."""
        return self.rows.judgements.mass_columns()

    def labels(self, columns: RowColumns) -> list[list[object]]:
        """Return what the scores do not depend on, for hashes: label, pair, source, and masses that a label does not say."""
        labels = self.rows.labels[columns.rows.start : columns.rows.stop].tolist()
        found = [[*one] for one in zip(labels, columns.pair_ids, columns.sources, strict=True)]
        if self.mass_columns:
            for row, entry in zip(columns.rows, found, strict=True):
                judgement = self.rows.judgements[row]
                entry += [judgement.masses, judgement.objectives]
        return found

    @no_garbage_collection()
    def labels_and_places_hash(self) -> tuple[str, str]:
        """Return hashes of the fields that the fingerprint leaves out on purpose.

        The first is of order, labels, masses, pairs and source rows, the second of the places in the feedback.
        """
        labels, places = ListHash(), ListHash()
        for columns in self.rows.columns():
            entries = zip(columns.row_ids, self.labels(columns), strict=True)
            labels.add([[row_id, *entry] for row_id, entry in entries])
            places.add(columns.places)
        return labels.hexdigest(), places.hexdigest()

    def counts(self) -> "PlanCounts":
        return PlanCounts.of(self)


@dataclass(frozen=True)
class PlanCounts:
    """Counts of the plan, for the terminal and the manifest."""

    read: int
    kept: int
    dropped: dict[str, int]
    desirable: int
    undesirable: int
    truncated: int
    kl_truncated: int
    prompts: int
    sequences: int
    tokens: int
    rows_hash: str
    duplicates: int
    repeats: Repeats
    masses: Masses
    objectives: dict[str, Masses]

    @classmethod
    def of(cls, plan: Plan) -> "PlanCounts":
        rows, ids, lengths = plan.rows, plan.sequence_ids, plan.completion_lengths
        cut = lengths < np.concatenate([rows.full_lengths[:, None], rows.full_lengths[plan.pairing.partners]], axis=1)
        lengths += rows.prompt_lengths[:, None]
        sequences = tokens = 0
        hasher = ListHash()
        for some in EqualIds.of(ids.ravel()).distinct(_HASH_ROWS):
            sequences += len(some)
            tokens += int(lengths.ravel()[some].sum())
            hasher.add(hex_ids(ids.ravel()[some]))
        desirable = int(rows.labels.sum())
        equal_rows = EqualIds.of(ids[:, 0])
        return cls(
            read=plan.read,
            kept=len(rows),
            dropped=plan.dropped,
            desirable=desirable,
            undesirable=len(rows) - desirable,
            truncated=int(cut[:, 0].sum()),
            kl_truncated=int(cut[:, 1:].sum()),
            prompts=EqualIds.of(rows.ids("prompt_id")).group_count,
            sequences=sequences,
            tokens=tokens,
            rows_hash=hasher.hexdigest(),
            duplicates=len(rows) - equal_rows.group_count,
            repeats=count_repeats(equal_rows, rows.labels),
            masses=total(rows.judgements.masses),
            objectives={name: total(masses) for name, masses in rows.judgements.objectives.items()},
        )


@no_garbage_collection()
def make_plan(
    config: PrecomputeConfig, tokenizer: Tokenizer, day: datetime | None = None, *, folder: Path | None = None
) -> Plan:
    """Read the feedback and choose every row's mismatched completions.

    Args:
        day: for chat templates that write the date; None for today.
        folder: of the model, from which worker processes load the tokenizer. Without it this process reads all parts of large
            data, one after the other.

    Raises:
        FeedbackError, TokenizationError, PairingError: a row cannot be used; the message names it.
    """
    # Described when they are read, since they may change during scoring.
    files = describe_source(config.data, config.split)
    with read_feedback(config, tokenizer, files, day=day, model=folder) as found:
        read, reading = found.rows, found.reading
        pairing = _pair(config, reading, read)
    feedback, tokenizing = reading.feedback, reading.tokenizing
    rendered_on = found.day.isoformat() if tokenizing.dated else None
    notes = [*warnings_about(config.data, config.split), *feedback.notes(), *tokenizing.warnings()]
    if config.template_date is not None and rendered_on is None:
        notes.append("--template-date has no effect: the chat template writes no date.")
    return Plan(
        read.rows,
        pairing,
        config.max_length,
        read.read,
        read.dropped,
        files,
        feedback,
        read.examples,
        notes,
        rendered_on,
        read.weights,
    )


def _pair(config: PrecomputeConfig, reading: Reading, found: ReadRows) -> Pairing:
    rows = found.rows
    pairable = PairableRows(rows.ids("row_id"), rows.ids("prompt_id"), rows.ids("completion_id"), rows.labels)
    try:
        if config.pairing == "rotate":
            return pair_rotate(pairable, partners=config.kl_partners, block=config.pairing_block)
        return pair_shuffled(pairable, partners=config.kl_partners, seed=config.seed)
    except PairingError as error:
        # An error below may be caused by dropped rows, or by prompts with the same ids.
        before = [one[0].upper() + one[1:] for one in reading.tokenizing.warnings()]
        left_out = reading.feedback.found.left_out
        if reasons := list(left_out.in_words()):
            first = min((where for where, _, _ in left_out.rows), key=place_key)
            before.append(
                f"Rows were left out ({', '.join(reasons)}); the first is {first}. --left-out FILE lists them."
            )
        if lost := sum(found.dropped.values()):
            before.append(
                f"Of {counted(found.read, 'row')} read, {lost:,} {'was' if lost == 1 else 'were'} dropped before: their prompts leave no "
                f"room under --max-length {config.max_length}, which may be raised."
            )
        raise PairingError(" ".join([f"{config.data}: {error}", *(f"({one})" for one in before)])) from error


def shard_rows(plan: Plan, rows_per_shard: int) -> Sequence[range]:
    """Return the row ranges of the shards."""
    return [
        range(start, min(start + rows_per_shard, len(plan.rows))) for start in range(0, len(plan.rows), rows_per_shard)
    ]
