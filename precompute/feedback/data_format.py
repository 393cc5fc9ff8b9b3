"""Choose the format of `--data`, and open its records: by options, by dataset_info.json, or by the keys of its records."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Collection, Iterator
from collections.abc import Mapping as AnyMapping
from pathlib import Path as FilePath
from typing import Any

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.columns import CONVERSATIONS
from offline_kto.kto_core.feedback.label_paths import LabelPaths
from offline_kto.kto_core.feedback.labels import LabelRule
from offline_kto.kto_core.feedback.llama_factory import DatasetInfo, entry_for
from offline_kto.kto_core.feedback.mapping import Mapping, with_label
from offline_kto.kto_core.feedback.paths import label_path, option_path
from offline_kto.kto_core.feedback.preference_pairs import check_sides_are_answers
from offline_kto.kto_core.feedback.presets import named_mapping, presets, recognised
from offline_kto.kto_core.feedback.quoting import counted, quoted
from offline_kto.kto_core.feedback.rating_threshold import resolve_threshold
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.records.documents import Records, columns_in, pandas_table, records_in
from offline_kto.precompute.records.line_ranges import LineRange
from offline_kto.precompute.records.sources import file_of, files_of, format_of, read_range, read_records
from offline_kto.precompute.records.text_files import Located, OnBadLine

# Keys of the native formats: an object with one of them is a record, not a document of records.
OWN_KEYS = (
    *("prompt", "completion", "response", "answer", "chosen", "rejected", "question", "query"),
    *(*CONVERSATIONS, "instruction"),
)

# Records that are tried to recognise a format: keys may be missing in the first records if nobody rated them.
_LOOKED_AT = 2000


class DataFormat:
    """The format of `--data`.

    Args:
        config: options of `kto-precompute`.
        is_part: whether parts of the data are read, and `config` is that of `for_parts`: the format is chosen already.

    Attributes:
        mapping: the mapping of `--map`, or of the recognised format; None for the native formats.
        why: the reason for this choice, for the plan.
        rule: which labels are desirable, by the options.
        notes: sentences on how the records were found.
        passed_over: a recognised format that is not used because it has no label, and options name one.

    Raises:
        KTOError: an option that cannot be used, or a file that cannot be read.
    """

    def __init__(self, config: PrecomputeConfig, *, is_part: bool = False) -> None:
        self._config = config
        self._is_part = is_part
        self._preset: str | None = None  # the name of a recognised format
        self._threshold: float | None = None  # of --rating-threshold
        self._document: tuple[str, Records] | None = None
        self._infos: dict[str, DatasetInfo] = {}
        self.notes: list[str] = []
        self.mapping: Mapping | None = None
        self.passed_over: Mapping | None = None
        self.mapping, self.why = self._choose_mapping()
        self.rule = self._rule()
        if is_part:
            self.mapping = self.mapping and self.mapping.ruled(_without_limit)
            self.rule = _without_limit(self.rule)

    def for_parts(self) -> PrecomputeConfig | None:
        """Return the options by which parts of the data are read in the format that was chosen.

        Returns:
            None if parts cannot be read independently: records are joined, or are inside of one document.
        """
        mapping = self.mapping
        if self._document is not None or (mapping is not None and (mapping.join or mapping.records) is not None):
            return None
        config = self._config
        if self._preset is not None:
            config = dataclasses.replace(config, map=self._preset)
        if self._threshold is not None:  # "median" is that of all records
            config = dataclasses.replace(config, rating_threshold=repr(self._threshold))
        return config

    @property
    def rules(self) -> list[LabelRule]:
        """All rules that count the values that they judge, always in the same order."""
        pair = None if self.mapping is None else self.mapping.pair
        found = [self.rule, *(one.rule for one in self.labels), *([] if pair is None else [pair.rule])]
        return list({id(rule): rule for rule in found}.values())

    @property
    def labels(self) -> list[LabelPaths]:
        """All places of labels that count the scores in them, always in the same order."""
        return [] if self.label_paths is None else self.label_paths.each

    @property
    def is_native(self) -> bool:
        """Return whether the native formats are read, whose columns are known."""
        return self.mapping is None and not self._infos

    @property
    def renamed(self) -> set[str]:
        """The file's own names of columns that are read under others, by dataset_info.json."""
        return {column for info in self._infos.values() for column in info.columns.values()}

    @property
    def label_paths(self) -> LabelPaths | None:
        """Return where the mapping has the label; None without a mapping, and for pairs."""
        if self.mapping is None:
            return None
        return self.mapping.turns.label if self.mapping.turns is not None else self.mapping.label

    @property
    def label_rule(self) -> LabelRule:
        """The rule that the labels are judged by; it counts their values."""
        if self.mapping is None:
            return self.rule
        if self.mapping.pair is not None:
            return self.mapping.pair.rule
        return LabelRule() if self.label_paths is None else self.label_paths.whole_rule

    def records(
        self, columns: Collection[str] | None, on_bad: OnBadLine | None = None, lines: LineRange | None = None
    ) -> Iterator[Located]:
        """Yield the records of the data, also those inside a document.

        Args:
            columns: the columns of tables to read; None for all.
            on_bad: called for lines that are no records; by default they are passed over.
            lines: the part of the data to read; None for all of it.
        """
        for where, record in self._source(columns, on_bad, lines):
            yield from self._inner(where, record)

    def split_of(self, record: AnyMapping[str, object]) -> str | None:
        """Return the split in a record's column `split`; None without one, or if the column is not used."""
        split, wanted = record.get("split"), self._config.split.lower()
        if not isinstance(split, str) or not split.strip() or wanted == "all":
            return None
        if self.mapping is not None and self.mapping.where is not None and "split" in self.mapping.where.text:
            return None
        # For a folder or a data set, --split chooses one of its splits.
        return split if wanted == "train" or FilePath(self._config.data).is_file() else None

    def has_splits(self, found: Collection[str]) -> bool:
        """Return whether `--split` chooses among splits of the data.

        Args:
            found: the values of the records' column `split`.
        """
        in_document = self._document is not None and self._document[1].of_split
        in_mapping = self.mapping is not None and self.mapping.where is not None and "split" in self.mapping.where.text
        return bool(found) or in_document or in_mapping or not FilePath(self._config.data).is_file()

    def is_wanted(self, split: str | None) -> bool:
        """Return whether records of a split are read."""
        return split is None or split.strip().lower() == self._config.split.lower()

    def _source(
        self, columns: Collection[str] | None, on_bad: OnBadLine | None = None, lines: LineRange | None = None
    ) -> Iterator[Located]:
        """Yield the records of the file, of some of its lines, or those in its only JSON object."""
        for where, record in self._stored(columns, on_bad or _pass_over, lines):
            info = self._infos.get(file_of(where))
            yield where, record if info is None else info.record(record)

    def _stored(self, columns: Collection[str] | None, on_bad: OnBadLine, lines: LineRange | None) -> Iterator[Located]:
        """Yield the records of the source as they are stored."""
        if self._document is not None:
            where, found = self._document
            yield from ((f"{where} (record {number})", one) for number, one in enumerate(found.records, 1))
            return
        config = self._config
        yield from (
            read_records(config.data, columns=columns, split=config.split, on_bad=on_bad)
            if lines is None
            else read_range(lines, on_bad)
        )

    def _inner(self, where: str, record: dict[str, Any]) -> Iterator[Located]:
        """Yield the records inside a document, at the path that the mapping names."""
        if self.mapping is None or self.mapping.records is None:
            yield where, record
            return
        inner = self.mapping.records.open(record, where)
        if inner is None:
            raise FeedbackError(f"{where}: {self.mapping.records.nothing(record)}.")
        if not isinstance(inner, list):
            raise FeedbackError(f"{where}: {self.mapping.records.source}: not a list of records: {quoted(inner)}.")
        for number, one in enumerate(inner, 1):
            if not isinstance(one, dict):
                raise FeedbackError(f"{where} (record {number}): a record must be an object, got {quoted(one)}.")
            yield f"{where} (record {number})", one

    def _choose_mapping(self) -> tuple[Mapping | None, str]:
        """Return the mapping, and why it was chosen."""
        config = self._config
        options = {"--prompt-field": config.prompt_field, "--completion-field": config.completion_field}
        given = [name for name, value in options.items() if value is not None]
        if config.map is not None:
            if given:
                raise ConfigError(f"--map {config.map}: the mapping defines where the prompt is. Remove {given[0]}.")
            mapping = named_mapping(config.map)
            self._open(mapping, given=[])
            if self.label_options and not mapping.has_label:
                raise ConfigError(
                    f"--map {config.map}: the mapping has no label, so remove {' and '.join(self.label_options)}."
                )
            return self._with_label(mapping), f"--map {config.map}"
        self._open(None, given=[path for path in options.values() if path])
        if given:
            return None, f"by {' and '.join(given)}"
        self._infos = self._dataset_infos()
        if self._infos:
            return None, f"dataset_info.json: {', '.join(info.name for info in self._infos.values())}"
        if self._is_part:
            return None, ""
        looked_at = _LOOKED_AT if config.limit is None else min(config.limit, _LOOKED_AT)
        seen: set[object] = set()  # most records have the same keys
        for where, record in itertools.islice(self._source(None), looked_at):
            if (keys := shape(record)) in seen:
                continue
            seen.add(keys)
            found = recognised(record, where)
            if found is None:
                check_sides_are_answers(record, where)
            if found is not None and (found.has_label or not self.label_options):
                self._preset = next(name for name, one in presets().items() if one is found)
                return self._with_label(found), "recognised by its keys"
            self.passed_over = self.passed_over or found
        return None, ""  # also if a label is named and the format has none: options take precedence over recognition

    def _open(self, mapping: Mapping | None, given: list[str]) -> None:
        """Check whether the file is one JSON object that contains the records.

        Args:
            given: the paths of --prompt-field and --completion-field.
        """
        if self._is_part:
            return
        config = self._config
        read = read_records(config.data, columns=None, split=config.split, on_bad=_pass_over)
        begin = list(itertools.islice(read, 2))
        if len(begin) != 1 or format_of(config.data) not in (".json", ".jsonl", ".ndjson"):
            return
        (where, document), *_ = begin
        if mapping is not None and mapping.records is not None:
            return
        found = pandas_table(document, where) or self._records_in(document, where, mapping, given)
        if found is None:
            return
        self._document = where, found
        count = len(found.records)
        were = "was" if count == 1 else "were"
        self.notes.append(f"{where} is one JSON object; its {counted(count, 'record')} {were} read {found.place}.")

    def _records_in(
        self, document: dict[str, Any], where: str, mapping: Mapping | None, given: list[str]
    ) -> Records | None:
        """Return the records in an object that is no table of pandas; None if it is itself a record."""
        if mapping is not None and mapping.fits(document, where):
            return None
        if mapping is None and not given and recognised(document, where) is not None:
            return None
        paths = [option_path(text, "--prompt-field or --completion-field") for text in given]
        is_record = any(path.find(document, where) is not None for path in paths) or (
            not given and mapping is None and any(document.get(key) is not None for key in OWN_KEYS)
        )
        return columns_in(document) if is_record else records_in(document, where, self._config.split)

    def _dataset_infos(self) -> dict[str, DatasetInfo]:
        """Return the entries about the files of `--data` in a dataset_info.json of LLaMA-Factory, by the files' names."""
        tables: dict[FilePath, object] = {}
        found: dict[str, DatasetInfo] = {}
        for file, name in files_of(self._config.data, self._config.split):
            for folder in (file.parent, file.parent.parent):
                table = folder / "dataset_info.json"
                if table not in tables:
                    tables[table] = _json_in(table)
                info = entry_for(file.relative_to(folder).as_posix(), tables[table], str(table))
                if info is not None:
                    found.setdefault(name, info)
        return found

    def _with_label(self, mapping: Mapping) -> Mapping:
        if mapping.refuse is not None:
            raise FeedbackError(f"{self._config.data}: {mapping.name}: {mapping.refuse}")
        rule = self._rule() if self._names_labels else None
        mapping = with_label(mapping, self._config.label_field, rule, self._config.votes)
        if self._config.weight_field is not None:
            return dataclasses.replace(mapping, weight=option_path(self._config.weight_field, "--weight-field"))
        return mapping

    @property
    def label_options(self) -> list[str]:
        """The options about labels that are given."""
        config = self._config
        options = {
            "--label-field": config.label_field,
            "--up": config.up,
            "--down": config.down,
            "--rating-threshold": config.rating_threshold,
            "--rating-scale": config.rating_scale,
        }
        return [name for name, value in options.items() if value is not None]

    @property
    def _names_labels(self) -> bool:
        config = self._config
        options = (config.up, config.down, config.rating_threshold, config.rating_scale)
        return any(value is not None for value in options)

    def _rule(self) -> LabelRule:
        config = self._config
        if config.rating_scale is not None:
            others = {"--up": config.up, "--down": config.down, "--rating-threshold": config.rating_threshold}
            if given := [name for name, value in others.items() if value is not None]:
                raise ConfigError(f"--rating-scale excludes {' and '.join(given)}. Remove one of them.")
            return LabelRule(graded=config.graded, votes=config.votes)
        if config.rating_threshold is not None:
            if config.up is not None or config.down is not None:
                raise ConfigError("--rating-threshold excludes --up and --down. Remove one of them.")
            label = None if config.label_field is None else label_path(config.label_field)
            try:
                read = itertools.islice(self._source(None), config.limit)
                records = (one for one in read if self.is_wanted(self.split_of(one[1])))
                self._threshold = resolve_threshold(config.rating_threshold, records, label)
                return dataclasses.replace(LabelRule.at_least(self._threshold), votes=config.votes)
            except ConfigError as error:
                raise ConfigError(f"{config.data}: {error}") from error
        try:
            return LabelRule(_words(config.up), _words(config.down), votes=config.votes)
        except ConfigError as error:
            raise ConfigError(f"--up and --down: {error}") from None


def _json_in(path: FilePath) -> object:
    """Return the content of a file; None if there is none, or if it belongs to another program."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None


def _without_limit(rule: LabelRule) -> LabelRule:
    """Return a rule that counts all values: limits apply to all parts together."""
    return dataclasses.replace(rule, most=sys.maxsize)


def _pass_over(where: str, error: FeedbackError) -> None:
    """Do nothing about a line that is no record: it is reported where the rows are read."""


def shape(record: AnyMapping[str, object]) -> object:
    """Return the keys of a record that have a value, with the keys of the objects among them."""
    return frozenset(
        (key, tuple(value) if isinstance(value, dict) else None) for key, value in record.items() if value is not None
    )


def _words(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())
