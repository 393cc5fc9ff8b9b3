"""Read the rows of `--data`, leave out those that cannot be used, and report all mistakes together."""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Mapping as AnyMapping
from typing import Any

from offline_kto.kto_core.cache.manifest import PROMPT_TOO_LONG
from offline_kto.kto_core.durable_files import write_text, written_to
from offline_kto.kto_core.errors import ConfigError, FeedbackError, KTOError, nearest, printable
from offline_kto.kto_core.feedback.chat_markers import RenderedText
from offline_kto.kto_core.feedback.columns import COLUMNS, FeedbackFields, columns_in_words
from offline_kto.kto_core.feedback.label_paths import SeveralScoresError
from offline_kto.kto_core.feedback.labels import LabelRule, UnknownLabelError
from offline_kto.kto_core.feedback.left_out import (
    DEFECTIVE,
    EMPTY_RECORD,
    OTHER_FORMAT,
    OTHER_SPLIT,
    LeftOut,
    OneCountLeftOut,
)
from offline_kto.kto_core.feedback.paths import Path as JMESPath
from offline_kto.kto_core.feedback.paths import label_path, option_path
from offline_kto.kto_core.feedback.presets import presets, recognised
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.records import FeedbackRow, nested_too_deeply, parse_record
from offline_kto.kto_core.feedback.turns import mapped_rows
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.contradictions import ColumnsToRead, Contradictions
from offline_kto.precompute.feedback.data_format import OWN_KEYS, DataFormat
from offline_kto.precompute.feedback.feedback_part import FeedbackPart, Mistake, OneCount
from offline_kto.precompute.feedback.found import Found, names_no_value
from offline_kto.precompute.feedback.mistakes import (
    missing_split,
    mistakes_in_rows,
    no_rows,
    one_class,
    options_of_pairs,
    turned_round,
    unclear_rating,
)
from offline_kto.precompute.feedback.mixed_formats import with_formats
from offline_kto.precompute.feedback.places_found import place_key
from offline_kto.precompute.feedback.suspicions import CONVERSATIONS, FAILURES, Suspicions
from offline_kto.precompute.feedback.used_columns import UsedColumns
from offline_kto.precompute.records.line_ranges import LineRange
from offline_kto.precompute.records.text_files import Located


class Feedback:
    """The rows of `--data`, read by the options or by the keys of the records.

    Args:
        config: options of `kto-precompute`.
        has_template: whether the tokenizer has a chat template.
        rendered: recognises text that its chat template has rendered.
        is_part: whether one part of the data is read, and `config` is that of `for_parts`.

    Attributes:
        mapping: the mapping of `--map`, or of the recognised format; None for the native formats.
        why: the reason for this choice, for the plan.
        found: what was found, once the rows are read.

    Raises:
        KTOError: an option that cannot be used, or a file that cannot be read.
    """

    def __init__(
        self,
        config: PrecomputeConfig,
        *,
        has_template: bool,
        rendered: RenderedText | None = None,
        is_part: bool = False,
    ) -> None:
        self._config = config
        self._bad_lines = 0
        self._first_bad = ""
        self._missing_inputs: set[str] = set()  # places of records
        self._mistakes: list[tuple[str, KTOError]] = []
        self._too_long: list[tuple[str, str, str]] = []
        self._one_counts: list[tuple[str, OneCountLeftOut]] = []
        self._objectives_left_out: list[dict[str, str]] = []  # of rows that are kept
        self._suspicions = Suspicions(is_part=is_part)
        self._contradictions = Contradictions()
        self._format = DataFormat(config, is_part=is_part)
        self.mapping, self.why = self._format.mapping, self._format.why
        self.found = Found(notes=self._format.notes, is_part=is_part)
        chat = config.chat if self.mapping is None or self.mapping.chat is None else self.mapping.chat
        if config.left_out is not None and (config.left_out.is_dir() or not config.left_out.parent.is_dir()):
            what = "is a folder" if config.left_out.is_dir() else "there is no such folder"
            raise ConfigError(f"--left-out {config.left_out}: {what}. Name a file.")
        if config.chat == "always" and not has_template:
            raise ConfigError("--chat always: this tokenizer has no chat template. Pass one with --chat-template FILE.")
        self._fields = FeedbackFields(
            prompt=None if self.mapping else _path(config.prompt_field, "--prompt-field"),
            completion=None if self.mapping else _path(config.completion_field, "--completion-field"),
            label=None if self.mapping or config.label_field is None else label_path(config.label_field),
            weight=None if self.mapping else _path(config.weight_field, "--weight-field"),
            rule=LabelRule() if self.mapping else self._format.rule,
            chat=has_template and chat != "never",
            chat_template=has_template,
            rendered=rendered or RenderedText(),
        )

        self._used = UsedColumns(self.mapping, self._fields, is_part=is_part)

    def rows(self, lines: LineRange | None = None) -> Iterator[FeedbackRow]:
        """Yield the rows. Call `keep` or `reject` for each of them, then `finish`, or `part` if one part is read.

        Args:
            lines: the part of the data to read; None for all of it.

        Raises:
            FeedbackError: the file cannot be read any further; `finish` raises the other mistakes.
        """
        for where, record in self._records(lines):
            yield from self._rows_of(record, where)

    def for_parts(self) -> PrecomputeConfig | None:
        """Return the options by which parts of the data are read; None if they cannot be read independently."""
        return None if self._config.limit is not None else self._format.for_parts()

    def part(self) -> FeedbackPart:
        """Return what was counted in one part of the data, for `merge`."""
        rules = self._rules
        return FeedbackPart(
            found=self.found,
            suspicions=self._suspicions,
            contradictions=self._contradictions,
            used=self._used.part(),
            rules=[(rule.seen, rule.numbers) for rule in rules],
            scores=[label.seen for label in self._format.labels],
            mistakes=[Mistake.of(where, error, rules) for where, error in self._mistakes],
            too_long=self._too_long,
            one_counts=[OneCount.of(*one) for one in self._one_counts],
            unused_counts=[OneCount.of(*one) for one in self._fields.one_count],
            objectives_left_out=self._objectives_left_out,
            read=self._fields.read,
            compared=self._fields.compared,
            bad_lines=self._bad_lines,
            first_bad=self._first_bad,
        )

    def merge(self, later: FeedbackPart) -> None:
        """Add what was counted in the next part of the data."""
        self.found.merge(later.found)
        self._suspicions.merge(later.suspicions)
        self._contradictions.merge(later.contradictions)
        self._used.merge(later.used)
        rules = self._rules
        for rule, counts in zip(rules, later.rules, strict=True):
            rule.merge(*counts)
        for label, seen in zip(self._format.labels, later.scores, strict=True):
            label.merge(seen)
        self._mistakes += [(one.where, one.error(rules)) for one in later.mistakes]
        self._too_long += later.too_long
        self._one_counts += [(one.where, one.left_out) for one in later.one_counts]
        self._fields.one_count.extend((one.where, one.left_out) for one in later.unused_counts)
        self._objectives_left_out += later.objectives_left_out
        self._fields.read.update(later.read)
        self._fields.compared.update(later.compared)

    @property
    def _rules(self) -> list[LabelRule]:
        """All rules that count the values that they judge, always in the same order."""
        found = [*self._format.rules, self._fields.rule, self._fields.ratings]
        return list({id(rule): rule for rule in found}.values())

    @property
    def chat(self) -> bool:
        """Return whether text becomes messages."""
        return self._fields.chat

    @property
    def label_rule(self) -> LabelRule:
        """The rule that the labels were judged by; it has counted their values."""
        return self._format.label_rule

    @property
    def rating_scale(self) -> tuple[float, ...]:
        """The two ends of the scale that ratings were graded on; empty without one, or if objectives have different ones."""
        label = self._format.label_paths
        rules = [self.label_rule] if label is None else label.rules
        scales = {rule.graded for rule in rules}
        return scales.pop() if len(scales) == 1 else ()

    def unused_columns(self) -> list[str]:
        """Return the columns that are not read."""
        columns = self.found.columns
        used = self._used.columns(self.found.forms, columns) | self._format.renamed
        return [name for name, _ in columns.most_common() if name not in used]

    def unused_beside(self) -> list[str]:
        """Return the keys beside those that are read in objects, such as "input.system"."""
        unread = ((name, count) for name, count in self._used.beside.items() if name not in self._fields.read)
        return [name for name, _ in sorted(unread, key=lambda one: (-one[1], one[0]))]

    def columns_of_messages(self) -> set[str]:
        """Return the columns with a list of messages."""
        return self._used.with_messages

    def keep(self, row: FeedbackRow) -> None:
        """Count a row that can be rendered."""
        if row.where in self._missing_inputs:
            self._missing_inputs.remove(row.where)
            self.found.missing.add(row.where)
        self.found.add(row)
        self._suspicions.add(row)
        if (
            self._config.left_out is not None and row.reading is not None
        ):  # nothing else needs them, and there may be many
            self._objectives_left_out += [
                _entry(row.where, left.reason, left.detail, name) for name, left in row.reading.left_out.items()
            ]

    def reject(self, where: str, error: KTOError) -> None:
        """Note that a row, or a pair, is defective: it is left out, or reported by `finish`.

        An unknown label is always reported: it shows that the column is misread, and the rows that are left would
        have the wrong labels.
        """
        if self._config.on_bad_row == "skip" and not isinstance(error, UnknownLabelError):
            self.found.left_out.add(where, DEFECTIVE, str(error))
        else:
            self._mistakes.append((where, error))

    def drop(self, row: FeedbackRow, detail: str) -> None:
        """Note that the prompt of a row is too long; the plan counts these rows apart from those that are left out."""
        self._too_long.append((row.where, PROMPT_TOO_LONG.replace("_", " "), detail))

    def write_left_out(self) -> None:
        """Write the file of `--left-out`, in the order of the data: rows are not rejected in that order."""
        if self._config.left_out is None:
            return
        self._settle_one_counts()
        of_rows = [_entry(*one) for one in (*self.found.left_out.rows, *self._too_long)]
        entries = sorted([*of_rows, *self._objectives_left_out], key=lambda one: place_key(one["where"]))
        lines = [json.dumps(one, ensure_ascii=False) for one in entries]
        with written_to(self._config.left_out.parent, ConfigError, "Name another file with --left-out."):
            write_text(self._config.left_out, "".join(f"{line}\n" for line in lines))

    def _settle_one_counts(self) -> None:
        """Decide on rows with one of two numbers of votes: defective if other rows have both, as a `null` in them would be.

        Without the other column in the whole file there are no votes: such a row is unrated, and one with a label has that.
        """
        for where, one in self._one_counts:
            if self.found.columns[one.missing]:
                self.reject(where, one.error)
            else:
                self.found.one_count = self.found.one_count or one
                self.found.left_out.add(where, one.reason, one.detail)
        for where, one in self._fields.one_count if self._config.on_bad_row == "error" else ():
            if self.found.columns[one.missing]:
                self.reject(where, one.error)
        self._one_counts.clear()
        self._fields.one_count.clear()

    def finish(self) -> None:
        """Report the mistakes.

        Raises:
            FeedbackError: all mistakes, the first of them with their places; no row; one class only.
        """
        try:
            self._finish()
        except FeedbackError as error:
            raise with_formats(error, self._config, self._format) from None

    def _finish(self) -> None:
        config, found = self._config, self.found
        self._settle_one_counts()
        if (
            error := missing_split(config, self._format, found) or options_of_pairs(config, self._format, found)
        ) is not None:
            raise error
        label = self._format.label_paths
        if label is not None and (several := label.several(config.data)) is not None:
            raise several
        if (self._mistakes or not found.forms) and (nowhere := self._nowhere()) is not None:
            raise nowhere
        if self._mistakes:
            mistakes = [error for _, error in sorted(self._mistakes, key=lambda one: place_key(one[0]))]
            raise mistakes_in_rows(mistakes, config, self._format)
        if len(self._fields.compared) > 1:
            raise FeedbackError(
                f"{config.data}: numbers are compared, but some records have a {' and others a '.join(sorted(self._fields.compared))}. "
                "Name the column with --label-field."
            )
        if (missing := next(iter(self._used.missing_objectives()), None)) is not None:
            raise self._nothing_at(missing)
        if self._is_own_label and (error := turned_round(config, self.label_rule)) is not None:
            raise error
        if self._is_own_label and (name := self.label_rule.unclear_rating()) is not None:
            raise unclear_rating(config, name)
        if not found.forms:
            raise no_rows(config, self._format, found)
        if len(found.labels) == 1 < found.labels.total() and not found.is_mixed and not config.one_class:
            raise one_class(config, self._format, found)
        if found.missing:
            found.notes.append(
                r"rows with NaN, None, null, \N or N/A as a prompt, an answer or another text, as programs write missing values: "
                f"{found.missing}. They are scored as text; remove these rows if the values "
                "are missing."
            )

    def _nowhere(self) -> FeedbackError | None:
        """Return the error about a path of the weight or of the votes that no record has; None without one."""
        path = next(iter(self._used.nowhere()), None)
        return None if path is None else self._nothing_at(path)

    def _nothing_at(self, path: JMESPath) -> FeedbackError:
        last = path.text.rpartition(".")[2].strip('"')
        return FeedbackError(
            f"{self._config.data}: {path.source}: no record has a value at {quoted(path.text)}."
            f"{nearest(last, self._used.keys_beside(path))}"
        )

    def notes(self) -> list[str]:
        """Return sentences about the rows, for the plan. Control characters of the names in them are escaped."""
        warn = None if self.mapping is None else self.mapping.warn
        warned = [f"{self.found.warned:,} {warn[1]}"] if warn is not None and self.found.warned else []
        own = self._config.map is not None and self._config.map not in presets()
        unmatched = [
            f"{path.source}: nothing at {quoted(path.text)} in any record." for path in self._used.unmatched() if own
        ]
        unused = self.unused_columns()
        aside = {*(() if self.mapping is None else self.mapping.aside)}
        for label in self._format.labels:
            aside |= label.seen.keys()  # scores, of which one was chosen: the others may judge something else
        compared = [name for name in [*unused, *self.unused_beside()] if name not in aside]
        contradictions = self._contradictions.in_words(compared)
        notes = [*self.found.notes, *warned, *unmatched, *contradictions, *self._suspicions.in_words(unused)]
        return [printable(note) for note in notes]

    @property
    def _is_own_label(self) -> bool:
        """Return whether no recognised format defines what the numbers of the label mean."""
        label = self._format.label_paths
        preset = self.mapping is not None and (self._config.map is None or self._config.map in presets())
        return not preset or self._config.label_field is not None or (label is not None and label.scores is not None)

    def _records(self, lines: LineRange | None) -> Iterator[Located]:
        records = self._format.records(self._columns() if self._format.is_native else None, self._reject_line, lines)
        counted = self._counted(itertools.islice(records, self._config.limit))
        return (
            counted if self.mapping is None or self.mapping.join is None else self._joined(counted, self.mapping.join)
        )

    def _reject_line(self, where: str, error: FeedbackError) -> None:
        """Note that a line is no record."""
        self.found.records += 1
        self._first_bad = self._first_bad or str(error)
        self._bad_lines += 1
        self.reject(where, error)

    def _counted(self, records: Iterable[Located]) -> Iterator[Located]:
        for where, record in records:
            self.found.records += 1
            if record and all(map(_is_blank, record.values())):  # spreadsheets write rows without any value
                self.found.left_out.add(where, EMPTY_RECORD)
                continue
            self.found.columns.update(key for key, value in record.items() if value is not None)
            split = self._format.split_of(record)
            self._used.add(record)
            self._suspicions.add_record(record, where)
            if split is not None or self._config.split.lower() == "all":
                self._used.name("split")
            if split is not None:
                self.found.splits[split] += 1
            if self._format.is_wanted(split):
                yield where, record
            else:
                self.found.left_out.add(where, OTHER_SPLIT, quoted(split))

    def _joined(self, records: Iterable[Located], join: JMESPath) -> Iterator[Located]:
        """Yield one record for all records with the same value; `rows` lists them in the order of the file.

        They may be anywhere in the file, so all records are kept in memory.
        """
        joined: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        for where, record in records:
            try:
                key = join.find(record, where)
            except FeedbackError as error:
                self.reject(where, error)
                continue
            if key is None:
                self.reject(where, FeedbackError(f"{where}: {join.nothing(record)}."))
                continue
            joined.setdefault(json.dumps(key, sort_keys=True, default=str), (where, []))[1].append(record)
        for where, rows in joined.values():
            yield where, {"rows": rows}

    def _columns(self) -> Collection[str]:
        config = self._config
        named = (config.prompt_field, config.completion_field, config.label_field, config.weight_field)
        roots = (word.strip('" ') for name in named if name for word in (*re.split(r"[.\[|]", name), *_words(name)))
        ours = {*COLUMNS, *CONVERSATIONS, *FAILURES, "split"}
        return ColumnsToRead({*ours, *roots, *(name for name in named if name)})

    def _rows_of(self, record: AnyMapping[str, object], where: str) -> Iterator[FeedbackRow]:
        try:
            if self.mapping is None:
                self._used.look_up(record, where)
                rows = parse_record(record, where, self._fields)
                self._contradictions.add(record, rows)
                if "instruction" in record and names_no_value(record.get("input")):  # a part of the user's message
                    self._missing_inputs.add(where)
                yield from rows
                return
            self._used.look_up(record, where)
            rows = []
            for native in mapped_rows(self.mapping, record, where):
                is_other = isinstance(native, LeftOut) and self._has_another_format(record, where)
                found = self._native_rows(_other_format(record) if is_other else native, where)
                rows += found
                yield from found
            if self.mapping.judges_records:
                self._contradictions.add_mapped(record, rows)
            if self.mapping.warn is not None and self.mapping.warn[0].find(record, where):
                self.found.warned += 1
        except OneCountLeftOut as one:
            self._one_counts.append((where, one.with_traceback(None)))  # whose frames would keep the record
        except LeftOut as left:
            shown = _other_format(record) if self._has_another_format(record, where) else left
            self.found.left_out.add(where, shown.reason, shown.detail)
        except SeveralScoresError:
            pass  # `finish` lists the scores of the whole file
        except RecursionError:
            self.reject(where, nested_too_deeply(where))
        except FeedbackError as error:
            self.reject(where, error)

    def _has_another_format(self, record: AnyMapping[str, object], where: str) -> bool:
        """Return whether a record has no prompt and no answer of the recognised format, but the columns of another."""
        mapping = self.mapping
        if mapping is None or mapping.join is not None or self._config.map is not None or mapping.fits(record, where):
            return False
        present = {key: value for key, value in record.items() if value not in (None, "")}
        other = recognised(present, where)
        return not present.keys().isdisjoint(OWN_KEYS) or (other is not None and other.name != mapping.name)

    def _native_rows(self, native: dict[str, Any] | LeftOut, where: str) -> list[FeedbackRow]:
        try:
            if isinstance(native, LeftOut):
                raise native
            return parse_record(native, where, self._fields)
        except LeftOut as left:
            self.found.left_out.add(where, left.reason, left.detail)
            return []


def _entry(where: str, reason: str, detail: str, objective: str = "") -> dict[str, str]:
    """Return a line of the file of `--left-out`; with the name of an objective, the row itself is kept."""
    found = {"where": where, "reason": reason, "objective": objective, "detail": detail}
    return {name: value for name, value in found.items() if value}


def _other_format(record: AnyMapping[str, object]) -> LeftOut:
    return LeftOut(OTHER_FORMAT, columns_in_words(record))


def _words(path: str) -> list[str]:
    """Return the names in a path, quoted or not; words of other kinds do no harm."""
    return re.findall(r'"[^"]*"|\w+', path)


def _is_blank(value: object) -> bool:
    """Return whether a cell has no value: None, NaN, or a text without characters."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _path(name: str | None, option: str) -> JMESPath | None:
    return None if name is None else option_path(name, option)
