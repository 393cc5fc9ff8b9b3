"""Plan the scoring: which rows are kept, how they are paired, and which sequences have to be scored.

Rows are immutable and stay on disk (`offline_kto.precompute.spool`). A completion is truncated where it is used, so that
it can be shortened for one prompt and complete for another.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.cache.manifest import PROMPT_TOO_LONG
from offline_kto.kto_core.cache.places import place_of
from offline_kto.kto_core.cache.repeats import Repeats, count_repeats
from offline_kto.kto_core.equal_ids import EqualIds
from offline_kto.kto_core.errors import FeedbackError, PairingError, TokenizationError
from offline_kto.kto_core.feedback.pairing import PairableRows, Pairing, pair_rotate, pair_shuffled
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.tokenization import Tokenizing, Tokens
from offline_kto.kto_core.hashing import ID, ListHash, hex_ids, ids_id, sequence_bytes, sequence_id
from offline_kto.kto_core.judgements import Masses
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.runtime import no_garbage_collection
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.mistakes import without_effect
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.feedback.weights import Weights, total
from offline_kto.precompute.records.sources import SourceFile, describe_source, warnings_about
from offline_kto.precompute.spool import PlannedRow, PlannedRows, RowColumns, Spool
from offline_kto.precompute.spool_folder import spool_folder

# Rows tokenized in one call of the tokenizer.
_TOKENIZE_ROWS = 1024
_TOKENIZE_CHARACTERS = 16 * 2**20
# Rows, or ids, hashed at a time.
_HASH_ROWS = 4096
# Rows of each class that the plan shows.
_EXAMPLES = 2


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


class ReadRows(NamedTuple):
    """The rows that are kept with their weights, how many were read and dropped by reason, and examples with their places."""

    rows: PlannedRows
    read: int
    dropped: dict[str, int]
    examples: list[tuple[str, PlannedRow]]
    weights: Weights


def read_rows(config: PrecomputeConfig, feedback: Feedback, tokenizing: Tokenizing, *, spool: Spool) -> ReadRows:
    """Read, parse and tokenize the feedback; drop prompts that leave no room for a completion.

    Args:
        spool: empty; the rows are written to it.

    Raises:
        FeedbackError, TokenizationError: naming file and line.
        CacheError: the disk of the spool is full.
    """
    dropped: Counter[str] = Counter()
    examples: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    weights = Weights()
    read = 0
    try:
        for row, tokens in _usable(feedback, tokenizing):
            room = config.max_length - len(tokens.prompt_ids)
            if room < 1:
                dropped[PROMPT_TOO_LONG] += 1
                feedback.drop(
                    row, f"a prompt of {counted(len(tokens.prompt_ids), 'token')}, --max-length {config.max_length}"
                )
            else:
                spool.add(_planned(row, read, tokens.prompt_ids, tokens.completion_ids, room, config.max_length))
                weights.add(row)
                if len(examples[row.label]) < _EXAMPLES:
                    examples[row.label].append((row.where, len(spool) - 1))
            read += 1
    finally:
        feedback.write_left_out()  # also if the run ends here, where it is needed most
    feedback.finish()
    if (error := without_effect(config, feedback.label_rule, feedback.found)) is not None:
        raise error
    tokenizing.check()
    if not len(spool):
        raise FeedbackError(
            f"{config.data}: no row is left of {read:,}: every prompt has {config.max_length} tokens or more. "
            "Raise --max-length."
        )
    rows = spool.finish(weights.factors(config.data))
    shown = [(where, rows[number]) for where, number in (*examples[True], *examples[False])]
    return ReadRows(rows, read, dict(dropped), shown, weights)


def _usable(feedback: Feedback, tokenizing: Tokenizing) -> Iterator[tuple[FeedbackRow, Tokens]]:
    """Yield the rows that can be rendered with their tokens; of a pair both sides or none, as the losses of pairs need."""
    for chunk, tokenized in tokenizing.tokenize_chunks(_chunks(feedback.rows())):
        for (where, pair_id), group in groupby(zip(chunk, tokenized, strict=True), key=lambda one: _record_of(one[0])):
            found = list(group)
            errors = [tokens for _, tokens in found if isinstance(tokens, TokenizationError)]
            if pair_id is not None and errors:
                feedback.reject(where, errors[0])
                continue
            for error in errors:
                feedback.reject(where, error)
            for row, tokens in found:
                if not isinstance(tokens, TokenizationError):
                    feedback.keep(row)
                    yield row, tokens


def _chunks(rows: Iterator[FeedbackRow]) -> Iterator[list[FeedbackRow]]:
    """Yield rows for one call of the tokenizer, with limits on their number and their text; a pair stays together."""
    chunk: list[FeedbackRow] = []
    size = 0
    for row in rows:
        is_full = len(chunk) >= _TOKENIZE_ROWS or size > _TOKENIZE_CHARACTERS
        if is_full and (row.pair_id is None or _record_of(row) != _record_of(chunk[-1])):
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += row.characters
    if chunk:
        yield chunk


def _record_of(row: FeedbackRow) -> tuple[str, str | None]:
    """Return what the two rows of a pair share; equal pairs of other records have the same `pair_id`."""
    return row.where, row.pair_id


def _planned(
    row: FeedbackRow, source: int, prompt: np.ndarray, completion: np.ndarray, room: int, max_length: int
) -> PlannedRow:
    cut = completion[:room]
    return PlannedRow(
        source=source,
        row_id=sequence_id(prompt, cut),
        prompt_id=ids_id(prompt),
        pair_id=row.pair_id,
        label=row.label,
        prompt_ids=prompt,
        # No prompt leaves room for more, so a longer tail is never used.
        full_completion_ids=completion[:max_length],
        completion_ids=cut,
        judgement=row.judgement,
        place=place_of(row.where),
    )


@no_garbage_collection()
def make_plan(config: PrecomputeConfig, tokenizer: Tokenizer, day: datetime | None = None) -> Plan:
    """Read the feedback and choose every row's mismatched completions.

    Args:
        day: for chat templates that write the date; None for today.

    Raises:
        FeedbackError, TokenizationError, PairingError: a row cannot be used; the message names it.
    """
    files = describe_source(
        config.data, config.split
    )  # described when they are read, since they may change during scoring
    day = day or datetime.now().replace(microsecond=0)
    tokenizing = Tokenizing(tokenizer, now=day)
    feedback = Feedback(
        config,
        has_template=bool(getattr(tokenizer, "chat_template", None)),
        rendered=tokenizing.rendered_text(),
    )
    folder = spool_folder(config.out, sum(file.bytes for file in files))
    with Spool(folder, config.max_length) as spool:
        rows, read, dropped, examples, weights = read_rows(config, feedback, tokenizing, spool=spool)
    try:
        pairing = _pair(config, rows)
    except PairingError as error:
        # An error below may be caused by dropped rows, or by prompts with the same ids.
        before = [one[0].upper() + one[1:] for one in tokenizing.warnings()]
        if left_out := list(feedback.found.left_out.in_words()):
            first = feedback.found.left_out.rows[0][0]
            before.append(
                f"Rows were left out ({', '.join(left_out)}); the first is {first}. --left-out FILE lists them."
            )
        if lost := sum(dropped.values()):
            before.append(
                f"Of {counted(read, 'row')} read, {lost:,} {'was' if lost == 1 else 'were'} dropped before: their prompts leave no room "
                f"under --max-length {config.max_length}."
            )
        raise PairingError(" ".join([f"{config.data}: {error}", *(f"({one})" for one in before)])) from error
    rendered_on = day.isoformat() if tokenizing.dated else None
    notes = [*warnings_about(config.data, config.split), *feedback.notes(), *tokenizing.warnings()]
    if config.template_date is not None and rendered_on is None:
        notes.append("--template-date has no effect: the chat template writes no date.")
    return Plan(rows, pairing, config.max_length, read, dropped, files, feedback, examples, notes, rendered_on, weights)


def _pair(config: PrecomputeConfig, rows: PlannedRows) -> Pairing:
    pairable = PairableRows(rows.ids("row_id"), rows.ids("prompt_id"), rows.ids("completion_id"), rows.labels)
    if config.pairing == "rotate":
        return pair_rotate(pairable, partners=config.kl_partners, block=config.pairing_block)
    return pair_shuffled(pairable, partners=config.kl_partners, seed=config.seed)


def shard_rows(plan: Plan, rows_per_shard: int) -> Sequence[range]:
    """Return the row ranges of the shards."""
    return [
        range(start, min(start + rows_per_shard, len(plan.rows))) for start in range(0, len(plan.rows), rows_per_shard)
    ]
