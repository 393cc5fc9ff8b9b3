"""Read the rows of `--data`: recognise its format, leave out what cannot be used, and report every mistake at once."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from offline_kto.kto_core.durable_files import write_text, written_to
from offline_kto.kto_core.errors import ConfigError, FeedbackError, KTOError
from offline_kto.kto_core.feedback.chat_markers import RenderedText
from offline_kto.kto_core.feedback.labels import LabelRule, Scale, UnknownLabelError
from offline_kto.kto_core.feedback.left_out import DEFECTIVE, OTHER_SPLIT, UNRATED, LeftOut, LeftOutRows
from offline_kto.kto_core.feedback.llama_factory import DatasetInfo, entry_for
from offline_kto.kto_core.feedback.mapping import LabelPaths, Mapping, SeveralScoresError, option_path, with_label
from offline_kto.kto_core.feedback.messages import Turns
from offline_kto.kto_core.feedback.paths import Path as JMESPath
from offline_kto.kto_core.feedback.presets import named_mapping, recognised
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.records import (
    COLUMNS,
    FeedbackFields,
    FeedbackRow,
    parse_record,
    resolve_threshold,
)
from offline_kto.kto_core.feedback.turns import mapped_rows
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.records.documents import Records, records_in, table_in
from offline_kto.precompute.records.feedback_columns import feedback_columns
from offline_kto.precompute.records.sources import format_of, read_records
from offline_kto.precompute.records.text_files import Located

# How programs write a missing value into a table; as a text it would be trained on.
_MISSING = {"NaN", "nan", "None", "null", "NULL", "<NA>"}

# Keys of the native formats: an object that has one is a record, not a document of records.
_OWN_KEYS = (
    *("prompt", "completion", "response", "answer", "chosen", "rejected", "question", "query"),
    *("messages", "conversations", "instruction"),
)

# Records whose keys are looked at to recognise a format: those of the first may be missing where nobody rated.
_LOOKED_AT = 2000
# Mistakes shown with their place; the others are counted.
_SHOWN = 20


@dataclass
class Found:
    """What was found in the feedback, for the plan.

    The rows are those that could be rendered, also where their prompts are too long.

    Attributes:
        records: number of records read.
        forms: rows by the format that they were read in.
        left_out: rows that cannot be used.
        columns: columns with a value, by the number of records that have one.
        chat, plain: rows of messages, and of text.
        system: rows with a system message.
        from_text: rows whose text became messages.
        rendered: rows of text that a chat template had written before; they stay text.
        moved_results: rows in which results of tools were moved to the prompt.
        labels: rows by label.
        splits: records by the value of their column `split`.
        missing: rows that hold the name of a missing value in place of a text, and where the first is.
        notes: sentences on how the records were found.
        warned: records for which the mapping has a warning.
    """

    records: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    left_out: LeftOutRows = field(default_factory=LeftOutRows)
    columns: Counter[str] = field(default_factory=Counter)
    chat: int = 0
    plain: int = 0
    system: int = 0
    from_text: int = 0
    rendered: int = 0
    moved_results: int = 0
    labels: Counter[bool] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warned: int = 0

    def add(self, row: FeedbackRow) -> None:
        """Count a row."""
        self.forms[row.form] += 1
        if isinstance(row.prompt, str):
            self.plain += 1
        else:
            self.chat += 1
            self.system += any(message["role"] in ("system", "developer") for message in row.prompt)
        self.from_text += row.from_text
        self.rendered += row.rendered
        self.moved_results += row.moved_results
        self.labels[row.label] += 1
        if _names_no_value(row.completion) or _names_no_value(row.prompt):
            self.missing.append(row.where)


class Feedback:
    """The rows of `--data`, read as the options say or as the file's keys do.

    Args:
        config: options of `kto-precompute`.
        has_template: whether the tokenizer has a chat template.
        rendered: how text looks that its chat template has written.

    Attributes:
        mapping: the mapping of `--map`, or of the recognised format; None where each record's keys decide.
        rule: which labels are desirable; it counts the values that it was given.
        found: what was found, once the rows are read.

    Raises:
        KTOError: an option that cannot be used, or a file that cannot be read.
    """

    def __init__(self, config: PrecomputeConfig, *, has_template: bool, rendered: RenderedText | None = None) -> None:
        self._config = config
        self.found = Found()
        self._mistakes: list[tuple[str, KTOError]] = []
        self._document: tuple[str, Records] | None = None
        self._info: DatasetInfo | None = None
        self.mapping: Mapping | None = None
        self.mapping, self.why = self._choose_mapping()
        self.rule = self._rule()
        chat = config.chat if self.mapping is None or self.mapping.chat is None else self.mapping.chat
        if config.left_out is not None and (config.left_out.is_dir() or not config.left_out.parent.is_dir()):
            what = "is a folder" if config.left_out.is_dir() else "there is no such folder"
            raise ConfigError(f"--left-out {config.left_out}: {what}. Name a file.")
        if config.chat == "always" and not has_template:
            raise ConfigError("--chat always: this tokenizer has no chat template. Pass one with --chat-template FILE.")
        self._fields = FeedbackFields(
            prompt=None if self.mapping else _path(config.prompt_field, "--prompt-field"),
            completion=None if self.mapping else _path(config.completion_field, "--completion-field"),
            label=None if self.mapping else _path(config.label_field, "--label-field"),
            rule=LabelRule() if self.mapping else self.rule,
            chat=has_template and chat != "never",
            chat_template=has_template,
            rendered=rendered or RenderedText(),
        )

    def rows(self) -> Iterator[FeedbackRow]:
        """Yield the rows; each is given to `keep` or `reject` before `finish`.

        Raises:
            FeedbackError: the file cannot be read any further; `finish` raises the other mistakes.
        """
        for where, record in self._records():
            yield from self._rows_of(record, where)

    @property
    def chat(self) -> bool:
        """Whether text becomes messages."""
        return self._fields.chat

    @property
    def label_rule(self) -> LabelRule:
        """The rule that the labels were judged by; it has counted their values."""
        if self.mapping is None:
            return self.rule
        if self.mapping.pair is not None:
            return self.mapping.pair.rule
        label = self._label_paths()
        return LabelRule() if label is None else label.rule

    @property
    def used_columns(self) -> frozenset[str]:
        """The columns that the rows come from."""
        if self.mapping is not None:
            return frozenset(self.mapping.keys())
        paths = (self._fields.prompt, self._fields.completion, self._fields.label)
        return COLUMNS.union(*(path.keys() for path in paths if path is not None))

    def keep(self, row: FeedbackRow) -> None:
        """Count a row that can be rendered."""
        self.found.add(row)

    def reject(self, where: str, error: KTOError) -> None:
        """Note that a row, or a pair, is defective: it is left out, or reported by `finish`."""
        if self._config.on_bad_row == "skip":
            self.found.left_out.add(where, DEFECTIVE, str(error))
        else:
            self._mistakes.append((where, error))

    def write_left_out(self) -> None:
        """Write the file of `--left-out`, in the order of the data; rows are rejected later than their neighbours are read."""
        if self._config.left_out is None:
            return
        lines = [
            json.dumps({"where": where, "reason": reason, **({"detail": detail} if detail else {})}, ensure_ascii=False)
            for where, reason, detail in sorted(self.found.left_out.rows, key=lambda one: _place(one[0]))
        ]
        with written_to(self._config.left_out.parent, ConfigError, "Name another file with --left-out."):
            write_text(self._config.left_out, "".join(f"{line}\n" for line in lines))

    def finish(self) -> None:
        """Report the mistakes.

        Raises:
            FeedbackError: all mistakes, the first of them with their places; no row; one class only.
        """
        if self.mapping is not None and (several := self._several_scores()) is not None:
            raise several
        mistakes = [error for _, error in sorted(self._mistakes, key=lambda one: _place(one[0]))]
        unknown = [one for one in mistakes if isinstance(one, UnknownLabelError)]
        others = [one for one in mistakes if not isinstance(one, UnknownLabelError)]
        if unknown:
            others.insert(0, self._unknown_labels(unknown))
        if len(others) == 1:
            raise others[0]
        if others:
            shown = "\n".join(f"  {one}" for one in others[:_SHOWN])
            more = f"\n  and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else ""
            raise FeedbackError(
                f"{self._config.data}: {len(others):,} rows cannot be used:\n{shown}{more}\n"
                "Mend them, or leave them out with --on-bad-row skip (they are listed in --left-out FILE)."
            )
        if not self.found.forms:
            raise self._no_rows()
        if len(self.found.labels) == 1 < self.found.labels.total() and not self._config.one_class:
            raise self._one_class()
        if self.found.missing:
            self.found.notes.append(
                f"a prompt or an answer reads NaN, None or null, as programs write a missing value, in {len(self.found.missing):,}"
                f" rows; the first is {self.found.missing[0]}. They are scored as text: remove them if they are none."
            )

    def _no_rows(self) -> FeedbackError:
        """Return the error about data without a row that can be trained on."""
        data, left_out = self._config.data, self.found.left_out
        reasons = ", ".join(left_out.in_words()) or "none was found"
        if left_out.counts[OTHER_SPLIT]:
            named = next((split for split in self.found.splits if re.fullmatch(r"[\w.-]{1,60}", split)), "NAME")
            splits = Scale(Counter({quoted(split): count for split, count in self.found.splits.items()}))
            return FeedbackError(
                f"{data}: no row of the split {quoted(self._config.split)} can be used ({reasons}); the column 'split' has "
                f"{splits.in_words()}. Name the one to read: --split {named}, or all."
            )
        if not left_out.counts[UNRATED]:
            where, reason, detail = left_out.rows[0] if left_out.rows else (data, "not there", "")
            first = f"{where}, is {reason}{f' ({detail})' if detail else ''}"
            return FeedbackError(
                f"{data}: no row can be used: {reasons}; the first, {first}. --left-out FILE lists them."
            )
        label = self._label_paths()
        if label is not None and self._config.map is None and self._config.label_field is None:
            path = label.path or label.scores  # a recognised format says where the feedback is: nobody gave any
            assert self.mapping is not None
            assert path is not None
            return FeedbackError(
                f"{data}: no record has a label ({reasons}). {self.mapping.name}: the feedback is read from "
                f"{quoted(path.text, 200)}. Check that the export holds it, or name another with --label-field."
            )
        lines = feedback_columns(one for where, record in self._source(None) for one in self._inner(where, record))
        if lines:
            shown = "\n".join(f"  {line}" for line in lines)
            return FeedbackError(
                f"{data}: no record has a label ({reasons}). These columns look like feedback:\n{shown}\n"
                "Pass the option of the one that counts, or say what is where: --map FILE."
            )
        names = quoted([name for name, _ in self.found.columns.most_common()], 200)
        return FeedbackError(
            f"{data}: no record has a label ({reasons}); found {names}. Name the column with --label-field, or say what is "
            "where: --map FILE."
        )

    def _one_class(self) -> FeedbackError:
        name = "desirable" if self.found.labels[True] else "undesirable"
        scale = Scale.of(self.label_rule)
        values = f" (the values: {scale.in_words()})" if scale.counts else ""
        left_out = ", ".join(self.found.left_out.in_words())
        more = f" Left out: {left_out}." if left_out else ""
        proposal = scale.proposal()
        advice = f"pass {proposal} if these are the marks" if proposal else "--up and --down say which values mean what"
        return FeedbackError(
            f"{self._config.data}: every row is {name}{values}: KTO needs both classes.{more} Check the labels: {advice}. "
            "Pass --one-class if this is meant."
        )

    def _records(self) -> Iterator[Located]:
        columns = None if self.mapping or self._info else self._columns()
        records = (one for where, record in self._source(columns) for one in self._inner(where, record))
        counted = self._counted(itertools.islice(records, self._config.limit))
        return (
            counted if self.mapping is None or self.mapping.join is None else self._joined(counted, self.mapping.join)
        )

    def _source(self, columns: set[str] | None) -> Iterator[Located]:
        """Yield the records of the file, or of the document that it is."""
        if self._document is not None:
            where, found = self._document
            yield from ((f"{where} (record {number})", one) for number, one in enumerate(found.records, 1))
            return
        for where, record in read_records(self._config.data, columns=columns, split=self._config.split):
            yield where, record if self._info is None else self._info.record(record)

    def _split_of(self, record: AnyMapping[str, object]) -> str | None:
        """Return the split that a record says it is of; None if it says none, or if its column `split` does not count."""
        split, wanted = record.get("split"), self._config.split.lower()
        if not isinstance(split, str) or not split.strip() or wanted == "all":
            return None
        if self.mapping is not None and self.mapping.where is not None and "split" in self.mapping.where.text:
            return None
        # Of a folder or a data set, the option names one of its splits.
        return split if wanted == "train" or FilePath(self._config.data).is_file() else None

    def _is_wanted(self, split: str | None) -> bool:
        return split is None or split.strip().lower() == self._config.split.lower()

    def notes(self) -> list[str]:
        """Return what the plan should say about the rows."""
        warn = None if self.mapping is None else self.mapping.warn
        warned = [f"{self.found.warned:,} {warn[1]}"] if warn is not None and self.found.warned else []
        return [*self.found.notes, *warned]

    def _several_scores(self) -> FeedbackError | None:
        label = self._label_paths()
        return None if label is None else label.several(self._config.data)

    def _label_paths(self) -> LabelPaths | None:
        if self.mapping is None:
            return None
        return self.mapping.turns.label if self.mapping.turns is not None else self.mapping.label

    def _counted(self, records: Iterable[Located]) -> Iterator[Located]:
        for where, record in records:
            self.found.records += 1
            self.found.columns.update(key for key, value in record.items() if value is not None)
            split = self._split_of(record)
            if split is not None:
                self.found.splits[split] += 1
            if self._is_wanted(split):
                yield where, record
            else:
                self.found.left_out.add(where, OTHER_SPLIT, quoted(split))

    def _joined(self, records: Iterable[Located], join: JMESPath) -> Iterator[Located]:
        """Yield a record for all that have the same value: `rows` lists them in the order of the file.

        They may stand anywhere in the file, so all of it is held in memory.
        """
        joined: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        for where, record in records:
            key = join.find(record, where)
            if key is None:
                self.reject(where, FeedbackError(f"{where}: {join.source}: nothing at {quoted(join.text)}."))
                continue
            joined.setdefault(json.dumps(key, sort_keys=True, default=str), (where, []))[1].append(record)
        for where, rows in joined.values():
            yield where, {"rows": rows}

    def _inner(self, where: str, record: dict[str, Any]) -> Iterator[Located]:
        """Yield the records in a document, where the mapping says that it has them."""
        if self.mapping is None or self.mapping.records is None:
            yield where, record
            return
        inner = self.mapping.records.open(record, where)
        if not isinstance(inner, list):
            raise FeedbackError(f"{where}: {self.mapping.records.source}: no list of records there.")
        for number, one in enumerate(inner, 1):
            if not isinstance(one, dict):
                raise FeedbackError(f"{where} (record {number}): a record must be an object, got {quoted(one)}.")
            yield f"{where} (record {number})", one

    def _columns(self) -> set[str]:
        named = (self._config.prompt_field, self._config.completion_field, self._config.label_field)
        roots = (re.split(r"[.\[|]", name, maxsplit=1)[0].strip('" ') for name in named if name)
        return {*COLUMNS, "split", *roots, *(name for name in named if name)}

    def _rows_of(self, record: AnyMapping[str, object], where: str) -> Iterator[FeedbackRow]:
        try:
            if self.mapping is None:
                yield from parse_record(record, where, self._fields)
                return
            for native in mapped_rows(self.mapping, record, where):
                yield from self._native_rows(native, where)
            if self.mapping.warn is not None and self.mapping.warn[0].find(record, where):
                self.found.warned += 1
        except LeftOut as left:
            self.found.left_out.add(where, left.reason, left.detail)
        except SeveralScoresError:
            pass  # `finish` lists the scores of the whole file
        except FeedbackError as error:
            self.reject(where, error)

    def _native_rows(self, native: dict[str, Any] | LeftOut, where: str) -> Iterator[FeedbackRow]:
        if isinstance(native, LeftOut):
            self.found.left_out.add(where, native.reason, native.detail)
            return
        try:
            yield from parse_record(native, where, self._fields)
        except LeftOut as left:
            self.found.left_out.add(where, left.reason, left.detail)

    def _choose_mapping(self) -> tuple[Mapping | None, str]:
        """Return the mapping, and why it was chosen."""
        config = self._config
        options = {"--prompt-field": config.prompt_field, "--completion-field": config.completion_field}
        given = [name for name, value in options.items() if value is not None]
        if config.map is not None:
            if given:
                raise ConfigError(f"--map {config.map}: says itself where the prompt is; leave {given[0]} out.")
            mapping = named_mapping(config.map)
            self._open(mapping, given=[])
            if self._label_options and not mapping.has_label:
                raise ConfigError(
                    f"--map {config.map}: has no label that {' and '.join(self._label_options)} could change. Leave it out."
                )
            return self._with_label(mapping), f"--map {config.map}"
        self._open(None, given=[path for path in options.values() if path])
        if given:
            return None, f"by {' and '.join(given)}"
        self._info = self._dataset_info()
        if self._info is not None:
            return None, f"dataset_info.json: {self._info.name}"
        looked_at = _LOOKED_AT if config.limit is None else min(config.limit, _LOOKED_AT)
        seen: set[object] = set()  # most records have the same keys
        for where, record in itertools.islice(self._source(None), looked_at):
            if (shape := _shape(record)) in seen:
                continue
            seen.add(shape)
            found = recognised(record, where)
            if found is not None and (found.has_label or not self._label_options):
                return self._with_label(found), "recognised by its keys"
        return None, ""  # also where a label is named, and the format has none: an option counts more than its keys

    def _open(self, mapping: Mapping | None, given: list[str]) -> None:
        """Note whether the file is one object that holds the records.

        Args:
            given: the paths of --prompt-field and --completion-field.
        """
        config = self._config
        begin = list(itertools.islice(read_records(config.data, columns=None, split=config.split), 2))
        if len(begin) != 1 or format_of(config.data) not in (".json", ".jsonl", ".ndjson"):
            return
        (where, document), *_ = begin
        if mapping is not None and (mapping.records is not None or mapping.fits(document, where)):
            return
        if mapping is None and not given and recognised(document, where) is not None:
            return
        paths = [option_path(text, "--prompt-field or --completion-field") for text in given]
        is_record = any(path.find(document, where) is not None for path in paths) or (
            not given and mapping is None and any(document.get(key) is not None for key in _OWN_KEYS)
        )
        found = table_in(document, where) if is_record else records_in(document, where)
        if found is None:
            return
        self._document = where, found
        self.found.notes.append(f"{where}: one object; its records are read {found.place}: {len(found.records):,}.")

    def _dataset_info(self) -> DatasetInfo | None:
        """Return what LLaMA-Factory's dataset_info.json beside the file says about it."""
        path = FilePath(self._config.data)
        beside = path.parent / "dataset_info.json"
        if not path.is_file() or not beside.is_file() or beside == path:
            return None
        try:
            table = json.loads(beside.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            return None  # it is not what was asked for, and may be of another program
        return entry_for(path.name, table, str(beside))

    def _with_label(self, mapping: Mapping) -> Mapping:
        if mapping.refuse is not None:
            raise FeedbackError(f"{self._config.data}: {mapping.name}: {mapping.refuse}")
        rule = self._rule() if self._names_labels else None
        return with_label(mapping, self._config.label_field, rule)

    @property
    def _label_options(self) -> list[str]:
        """The options about labels that are given."""
        config = self._config
        options = {
            "--label-field": config.label_field,
            "--up": config.up,
            "--down": config.down,
            "--rating-threshold": config.rating_threshold,
        }
        return [name for name, value in options.items() if value is not None]

    @property
    def _names_labels(self) -> bool:
        config = self._config
        return any(value is not None for value in (config.up, config.down, config.rating_threshold))

    def _rule(self) -> LabelRule:
        config = self._config
        if config.rating_threshold is not None:
            if config.up is not None or config.down is not None:
                raise ConfigError("--rating-threshold and --up or --down say the same; leave one of them out.")
            label = _path(config.label_field, "--label-field")
            try:
                read = itertools.islice(self._source(None), config.limit)
                records = (one for one in read if self._is_wanted(self._split_of(one[1])))
                return LabelRule.at_least(resolve_threshold(config.rating_threshold, records, label))
            except ConfigError as error:
                raise ConfigError(f"{config.data}: {error}") from error
        return LabelRule(_words(config.up), _words(config.down))

    def _unknown_labels(self, unknown: list[UnknownLabelError]) -> KTOError:
        """Return one error about all values that are neither up nor down, with options that fit them."""
        first = unknown[0]
        if len({one.field for one in unknown}) > 1:
            return first
        scale = Scale.of(first.rule)
        proposal = scale.proposal()
        usual = first.field in ("label", "kto_tag") and not any(mark in proposal for mark in "<>")  # else of `rating`
        name = "" if self.mapping or usual or self._config.label_field else f"--label-field {first.field} "
        advice = (
            f"If these are the marks, pass {name}{proposal}."
            if proposal
            else f"Say which are up and which are down with --up and --down{', or with --rating-threshold' * scale.is_numbers}."
        )
        return FeedbackError(f"{first} '{first.field}' has {scale.in_words()}. {advice}")


def _shape(record: AnyMapping[str, object]) -> object:
    """Return the keys of a record that have a value, with the keys of the objects among them."""
    return frozenset(
        (key, tuple(value) if isinstance(value, dict) else None) for key, value in record.items() if value is not None
    )


def _place(where: str) -> list[int | str]:
    """Return a key that sorts places as they follow each other in the data: line 9 comes before line 10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", where))]


def _path(name: str | None, option: str) -> Any:
    return None if name is None else option_path(name, option)


def _words(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _names_no_value(side: Turns) -> bool:
    """Return whether a text, or the last message, is how programs write that there is no value."""
    text = side if isinstance(side, str) else side[-1]["content"] if side else ""
    return isinstance(text, str) and text.strip() in _MISSING
