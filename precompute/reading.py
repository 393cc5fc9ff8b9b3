"""Read the feedback: check, render and tokenize its rows, and write them to a spool; all of it, or one part."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.cache.manifest import PROMPT_TOO_LONG
from offline_kto.kto_core.cache.places import place_of
from offline_kto.kto_core.errors import ConfigError, FeedbackError, KTOError, TokenizationError
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.tokenization import Tokenizing, TokenizingPart, Tokens
from offline_kto.kto_core.hashing import ids_id, sequence_id
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.feedback_part import FeedbackPart, SaidError
from offline_kto.precompute.feedback.mistakes import without_effect
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.feedback.weights import Weights
from offline_kto.precompute.records.line_ranges import LineRange
from offline_kto.precompute.records.sources import no_record, source_name
from offline_kto.precompute.spool import PlannedRow, PlannedRows, Spool, SpooledFile

# Rows tokenized in one call of the tokenizer.
_TOKENIZE_ROWS = 1024
_TOKENIZE_CHARACTERS = 16 * 2**20
# Rows of each class that the plan shows.
_EXAMPLES = 2


@dataclass
class Tally:
    """Counts of the rows that were read and tokenized.

    Attributes:
        read: number of rows.
        kept: number of those that are not dropped.
        dropped: number of the others, by reason.
        examples: place and number among the kept rows of the first rows of each class.
        weights: of the kept rows.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[bool, list[tuple[str, int]]] = field(default_factory=lambda: {True: [], False: []})
    weights: Weights = field(default_factory=Weights)

    def keep(self, row: FeedbackRow) -> None:
        """Count a row that is kept."""
        self._add_example(row.label, row.where, self.kept)
        self.weights.add(row)
        self.kept += 1

    def _add_example(self, label: bool, where: str, number: int) -> None:
        if len(self.examples[label]) < _EXAMPLES:
            self.examples[label].append((where, number))

    def merge(self, later: "Tally") -> None:
        """Add the rows of the next part of the data."""
        for label, examples in later.examples.items():
            for where, number in examples:
                self._add_example(label, where, self.kept + number)
        self.weights.merge(later.weights)
        self.dropped.update(later.dropped)
        self.kept += later.kept
        self.read += later.read


class ReadRows(NamedTuple):
    """The rows that are kept with their weights, how many were read and dropped by reason, and examples with their places."""

    rows: PlannedRows
    read: int
    dropped: dict[str, int]
    examples: list[tuple[str, PlannedRow]]
    weights: Weights


@dataclass(frozen=True)
class ReadPart:
    """What was counted in one part of the data, whose rows are in a spool file of their own.

    Attributes:
        error: what ended the reading; None if the part was read to its end.
    """

    feedback: FeedbackPart
    tokenizing: TokenizingPart
    tally: Tally
    largest_id: int
    error: SaidError | None = None


class Reading:
    """Reads feedback.

    Args:
        config: options of `kto-precompute`; for one part those of `Feedback.for_parts`.
        tokenizing: with the reference's tokenizer.
        is_part: whether one part of the data is read.

    Raises:
        KTOError: an option that cannot be used, or a file that cannot be read.
    """

    def __init__(self, config: PrecomputeConfig, tokenizing: Tokenizing, *, is_part: bool = False) -> None:
        self._config = config
        self.tokenizing = tokenizing
        self.feedback = Feedback(
            config, has_template=tokenizing.has_template, rendered=tokenizing.rendered_text(), is_part=is_part
        )
        self._tally = Tally()

    def read_all(self, spool: Spool) -> ReadRows:
        """Read the feedback; drop prompts that leave no room for a completion.

        Args:
            spool: empty; the rows are written to it.

        Raises:
            FeedbackError, TokenizationError: naming file and line.
            CacheError: the disk of the spool is full.
        """
        try:
            self._read(self.feedback.rows(), spool)
        finally:
            self.feedback.write_left_out()  # also if the run ends here, where it is needed most
        return self._finish([spool.map()])

    def read_part(self, lines: LineRange, spool: Spool) -> ReadPart:
        """Read one part of the data. Raises: CacheError: the disk of the spool is full."""
        error = None
        try:
            self._read(self.feedback.rows(lines), spool)
        except (FeedbackError, TokenizationError, ConfigError) as found:
            error = SaidError.of(found)
        file = spool.map()
        return ReadPart(self.feedback.part(), self.tokenizing.take_part(), self._tally, file.largest_id, error)

    def merge_all(self, parts: Iterable[tuple[LineRange, Path, ReadPart]]) -> ReadRows:
        """Return what `read_all` returns.

        Args:
            parts: of the data in their order, with the files of their rows.

        Raises:
            FeedbackError, TokenizationError: see `read_all`.
        """
        files: list[SpooledFile] = []
        try:
            for _, of_file in groupby(parts, key=lambda one: one[0].path):
                self._merge_file(of_file, files)
            if not self.feedback.found.records:
                raise no_record(source_name(self._config.data))
        finally:
            self.feedback.write_left_out()
        return self._finish(files)

    def _merge_file(self, parts: Iterator[tuple[LineRange, Path, ReadPart]], files: list[SpooledFile]) -> None:
        records = bad_lines = 0
        first_bad = ""
        for _, path, part in parts:
            if part.tally.kept:
                first_source = self._tally.read
                files.append(SpooledFile.open(path, part.tally.kept, part.largest_id, first_source=first_source))
            self.feedback.merge(part.feedback)
            self.tokenizing.merge(part.tokenizing)
            self._tally.merge(part.tally)
            if part.error is not None:
                raise part.error.error()
            records += part.feedback.found.records
            bad_lines += part.feedback.bad_lines
            first_bad = first_bad or part.feedback.first_bad
        if bad_lines and bad_lines == records:  # no line is a record: the file has another format
            raise FeedbackError(first_bad)

    def _finish(self, files: list[SpooledFile]) -> ReadRows:
        """Check all rows together, and return them."""
        config, tally = self._config, self._tally
        self.feedback.finish()
        if (error := without_effect(config, self.feedback.label_rule, self.feedback.found)) is not None:
            raise error
        self.tokenizing.check()
        if not tally.kept:
            raise FeedbackError(
                f"{config.data}: no row is left of {tally.read:,}: every prompt has {config.max_length} tokens or more. "
                "Raise --max-length."
            )
        rows = PlannedRows(files, config.max_length, tally.weights.factors(config.data))
        examples = [(where, rows[number]) for label in (True, False) for where, number in tally.examples[label]]
        return ReadRows(rows, tally.read, dict(tally.dropped), examples, tally.weights)

    def _read(self, rows: Iterator[FeedbackRow], spool: Spool) -> None:
        tally, config = self._tally, self._config
        for row, tokens in self._usable(rows):
            room = config.max_length - len(tokens.prompt_ids)
            if room < 1:
                tally.dropped[PROMPT_TOO_LONG] += 1
                self.feedback.drop(
                    row, f"a prompt of {counted(len(tokens.prompt_ids), 'token')}, --max-length {config.max_length}"
                )
            else:
                spool.add(_planned(row, tally.read, tokens.prompt_ids, tokens.completion_ids, room, config.max_length))
                tally.keep(row)
            tally.read += 1

    def _usable(self, rows: Iterator[FeedbackRow]) -> Iterator[tuple[FeedbackRow, Tokens]]:
        """Yield the rows that can be rendered with their tokens; of a pair both sides or none, as the losses of pairs need."""
        feedback = self.feedback
        for chunk, tokenized in self.tokenizing.tokenize_chunks(_chunks(rows)):
            for (where, pair_id), group in groupby(
                zip(chunk, tokenized, strict=True), key=lambda one: _record_of(one[0])
            ):
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
    failure: KTOError | None = None
    try:
        for row in rows:
            is_full = len(chunk) >= _TOKENIZE_ROWS or size > _TOKENIZE_CHARACTERS
            if is_full and (row.pair_id is None or _record_of(row) != _record_of(chunk[-1])):
                yield chunk
                chunk, size = [], 0
            chunk.append(row)
            size += row.characters
    except KTOError as error:
        failure = error
    if chunk:
        yield chunk  # also if the next row cannot be read
    if failure is not None:
        raise failure


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
