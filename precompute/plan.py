"""Plan the scoring: which rows are kept, how they are paired, and which sequences have to be scored.

Rows are immutable. A completion is truncated where it is used, so that it can be shortened for one prompt and
complete for another.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.cache.manifest import PROMPT_TOO_LONG
from offline_kto.kto_core.cache.places import place_of
from offline_kto.kto_core.errors import FeedbackError, PairingError, TokenizationError
from offline_kto.kto_core.feedback.pairing import PairableRows, Pairing, pair_rotate, pair_shuffled
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.tokenization import Tokenizing, Tokens
from offline_kto.kto_core.hashing import id_array, ids_id, json_hash, sequence_id
from offline_kto.kto_core.judgements import Judgement, Masses, mass_columns
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.runtime import no_garbage_collection
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.mistakes import without_effect
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.feedback.weights import Weights, settled
from offline_kto.precompute.records.sources import SourceFile, describe_source, warnings_about

# Rows tokenized in one call of the tokenizer.
_TOKENIZE_ROWS = 1024
_TOKENIZE_CHARACTERS = 16 * 2**20
# Rows of each class that the plan shows.
_EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row that will be scored.

    Attributes:
        source: row number in the input, from 0; the two rows of a pair have two numbers.
        prompt_ids: int32.
        full_completion_ids: int32, before it is truncated to fit after this prompt.
        completion_ids: int32, as scored.
        judgement: its masses, with its weight; the label is `judgement.masses.label`.
        place: of its record in the feedback, as error messages name it; rows of one record share it.
    """

    source: int
    row_id: str
    prompt_id: str
    pair_id: str | None
    label: bool
    prompt_ids: np.ndarray
    full_completion_ids: np.ndarray
    completion_ids: np.ndarray
    judgement: Judgement
    place: str


@dataclass(frozen=True)
class Plan:
    """Rows with their partners, and how they were read.

    Attributes:
        feedback: how the rows were read, with counts.
        examples: the first rows of each class, with their places.
        notes: sentences on how the rows were rendered and tokenized.
        rendered_on: the time that the chat template wrote into them; None if it writes none.
        weights: of the rows, as read.
    """

    rows: list[PlannedRow]
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
        room = self.max_length - len(self.rows[index].prompt_ids)
        return [self.rows[t].full_completion_ids[:room] for t in self.pairing.partners[index]]

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the sequences that are scored for a row: (x, y), then each (x, y')."""
        row = self.rows[index]
        return [
            (row.prompt_ids, row.completion_ids),
            *((row.prompt_ids, y) for y in self.kl_completions(index)),
        ]

    @functools.cached_property
    def mass_columns(self) -> list[str]:
        """The optional columns of the cache; empty if every row is one bit of weight 1."""
        return mass_columns(row.judgement for row in self.rows)

    def labels(self, rows: range) -> list[list[object]]:
        """Return what the scores do not depend on, for hashes: label, masses that a label does not say, pair and source."""
        found: list[list[object]] = []
        for row in map(self.rows.__getitem__, rows):
            masses = [row.judgement.masses, row.judgement.objectives] if self.mass_columns else []
            found.append([row.label, row.pair_id, row.source, *masses])
        return found

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
    contradictions: int
    masses: Masses
    objectives: dict[str, Masses]

    @classmethod
    def of(cls, plan: Plan) -> "PlanCounts":
        rows = plan.rows
        lengths: dict[str, int] = {}
        truncated = kl_truncated = 0
        for i, row in enumerate(rows):
            truncated += len(row.completion_ids) < len(row.full_completion_ids)
            lengths[row.row_id] = len(row.prompt_ids) + len(row.completion_ids)
            for t, y in zip(plan.pairing.partners[i], plan.kl_completions(i), strict=True):
                kl_truncated += len(y) < len(rows[t].full_completion_ids)
                lengths[sequence_id(row.prompt_ids, y)] = len(row.prompt_ids) + len(y)
        wanted, unwanted = ({row.row_id for row in rows if row.label is label} for label in (True, False))
        desirable = sum(row.label for row in rows)
        return cls(
            read=plan.read,
            kept=len(rows),
            dropped=plan.dropped,
            desirable=desirable,
            undesirable=len(rows) - desirable,
            truncated=truncated,
            kl_truncated=kl_truncated,
            prompts=len({row.prompt_id for row in rows}),
            sequences=len(lengths),
            tokens=sum(lengths.values()),
            rows_hash=json_hash(sorted(lengths)),
            duplicates=len(rows) - len(wanted | unwanted),
            contradictions=len(wanted & unwanted),
            masses=_total([row.judgement.masses for row in rows]),
            objectives={
                name: _total([row.judgement.objectives[name] for row in rows]) for name in rows[0].judgement.objectives
            },
        )


def _total(masses: Sequence[Masses]) -> Masses:
    return Masses(*map(math.fsum, zip(*masses, strict=True)))


class ReadRows(NamedTuple):
    """The rows that are kept with their weights, how many were read and dropped by reason, and examples with their places."""

    rows: list[PlannedRow]
    read: int
    dropped: dict[str, int]
    examples: list[tuple[str, PlannedRow]]
    weights: Weights


def read_rows(config: PrecomputeConfig, feedback: Feedback, tokenizing: Tokenizing) -> ReadRows:
    """Read, parse and tokenize the feedback; drop prompts that leave no room for a completion.

    Raises:
        FeedbackError, TokenizationError: naming file and line.
    """
    rows: list[PlannedRow] = []
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
                rows.append(_planned(row, read, tokens.prompt_ids, tokens.completion_ids, room, config.max_length))
                weights.add(row)
                if len(examples[row.label]) < _EXAMPLES:
                    examples[row.label].append((row.where, len(rows) - 1))
            read += 1
    finally:
        feedback.write_left_out()  # also if the run ends here, where it is needed most
    feedback.finish()
    if (error := without_effect(config, feedback.label_rule, feedback.found)) is not None:
        raise error
    tokenizing.check()
    if not rows:
        raise FeedbackError(
            f"{config.data}: no row is left of {read:,}: every prompt has {config.max_length} tokens or more. "
            "Raise --max-length."
        )
    judgements = settled([row.judgement for row in rows], weights.factors(config.data))
    rows = [
        row if judgement is row.judgement else replace(row, judgement=judgement)
        for row, judgement in zip(rows, judgements, strict=True)
    ]
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
    rows, read, dropped, examples, weights = read_rows(config, feedback, tokenizing)
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


def _pair(config: PrecomputeConfig, rows: Sequence[PlannedRow]) -> Pairing:
    pairable = PairableRows(
        id_array(row.row_id for row in rows),
        id_array(row.prompt_id for row in rows),
        id_array(ids_id(row.full_completion_ids) for row in rows),
        np.array([row.label for row in rows], dtype=bool),
    )
    if config.pairing == "rotate":
        return pair_rotate(pairable, partners=config.kl_partners, block=config.pairing_block)
    return pair_shuffled(pairable, partners=config.kl_partners, seed=config.seed)


def shard_rows(plan: Plan, rows_per_shard: int) -> Sequence[range]:
    """Return the row ranges of the shards."""
    return [
        range(start, min(start + rows_per_shard, len(plan.rows))) for start in range(0, len(plan.rows), rows_per_shard)
    ]
