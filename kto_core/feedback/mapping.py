"""Convert records to rows in a native format, by paths that name where prompts, completions and labels are.

`mapping_file` reads such a mapping from YAML; `turns` finds the judged turns of conversations.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from typing import Any

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.conversations import part_early
from offline_kto.kto_core.feedback.judging import WEIGHT, weight_in
from offline_kto.kto_core.feedback.label_paths import LabelPaths
from offline_kto.kto_core.feedback.labels import LabelRule, UnknownLabelError, is_tie, number_in
from offline_kto.kto_core.feedback.left_out import DEAD_ZONE, EMPTY, NO_PROMPT, TIE, LeftOut
from offline_kto.kto_core.feedback.message_trees import check_is_list
from offline_kto.kto_core.feedback.messages import Message, Turns, as_turns
from offline_kto.kto_core.feedback.pair_verdicts import ratings_of_sides
from offline_kto.kto_core.feedback.paths import Path, label_path
from offline_kto.kto_core.feedback.quoting import quoted

Record = AnyMapping[str, Any]
# Longer paths are not shown in errors.
_LONG = 60
# A row in one of the formats of `records`.
Native = dict[str, Any]


@dataclass(frozen=True)
class PairPaths:
    """Two completions of one prompt: chosen and rejected, or a and b with a verdict.

    Attributes:
        first, second: chosen and rejected, or a and b.
        better: to the value that names the better one; None for chosen and rejected.
        rule: up for a, down for b.
        scores: to the scores of a and of b, which must not contradict `better`; none without them.
    """

    first: Path
    second: Path
    better: Path | None
    rule: LabelRule
    scores: tuple[Path, ...] = ()

    def ratings(self, columns: Iterable[str]) -> list[str]:
        """Return the columns with ratings of the sides, which must fit: those of the usual names, for sides of these names."""
        named = self.better is None and "chosen" in self.first.text and "rejected" in self.second.text
        return [name for one in ratings_of_sides(tuple(columns)) for name in one.names] if named else []

    def sides(self, data: Record, where: str) -> tuple[object, object]:
        """Return (chosen, rejected).

        Raises:
            LeftOut: neither is better.
            FeedbackError: the other one has the higher score.
            UnknownLabelError: `better` is neither a nor b, nor a tie.
        """
        a_is_better = True if self.better is None else self._a_is_better(self.better, data, where)
        if self.scores:
            self._check_scores(a_is_better, data, where)
        first, second = self.first.find(data, where), self.second.find(data, where)
        return (first, second) if a_is_better else (second, first)

    def _check_scores(self, a_is_better: bool, data: Record, where: str) -> None:
        a, b = (number_in(path.find(data, where)) for path in self.scores)
        if a is None or b is None or a == b or (a > b) is a_is_better:
            return
        of_a, of_b = (path.text for path in self.scores)
        better, worse = (self.first.text, self.second.text) if a_is_better else (self.second.text, self.first.text)
        verdict = "" if self.better is None else f"by '{self.better.text}', "
        raise FeedbackError(
            f"{where}: {verdict}'{better}' is better than '{worse}', but '{of_a}' is {a:g} and '{of_b}' is {b:g}. Correct one of them, or "
            "remove the row."
        )

    def _a_is_better(self, better: Path, data: Record, where: str) -> bool:
        value = better.find(data, where)
        try:
            return self.rule.verdict(value, where, better.text if len(better.text) < _LONG else "the preference")
        except LeftOut as left:
            raise LeftOut(TIE if left.reason == DEAD_ZONE else left.reason, left.detail) from None
        except UnknownLabelError as error:
            if all(map(is_tie, value)) if isinstance(value, list) else is_tie(value):
                raise LeftOut(TIE, quoted(value)) from None
            raise error.of_pair().about(better.read_key(data)) from None


@dataclass(frozen=True)
class JudgedTurns:
    """A conversation in which some of the assistant's turns are judged; each becomes a row of its own.

    Attributes:
        messages: to the list of turns, or to an object of them.
        id, parent: of a turn, if the turns are a tree; without them they are a list. In records that are joined, `id` alone says
            which of them are one message.
        rated: to the id (or the number, from 0) of the only judged turn, in the record.
        role, text: of a turn.
        roles: roles by the file's own values of `role`.
        children: of a turn, to the turns that follow it, if the tree is written as one.
        leave_out: (reason, path to a value that a turn must not have, such as attached files).
        rank: of the assistant's answers to one turn, in place of a label: the lowest makes a pair with each of the others.
    """

    messages: Path
    id: Path | None
    parent: Path | None
    rated: Path | None
    role: Path
    roles: dict[str, str]
    text: Path | None
    label: LabelPaths | None
    children: Path | None
    leave_out: tuple[tuple[str, Path], ...]
    rank: Path | None = None


@dataclass(frozen=True)
class Mapping:
    """Paths to the prompt, the completion and the label in the records of a file.

    Attributes:
        name: of the format, as the plan shows it.
        weight: to the weight of a row.
        recognise: true for a record of this format; None for a mapping that is only used when it is named.
        aside: columns that this format has and does not need, whatever their names suggest.
    """

    name: str
    recognise: Path | None = None
    records: Path | None = None
    where: Path | None = None
    system: Path | None = None
    tools: Path | None = None
    prompt: Path | None = None
    completion: Path | None = None
    conversation: Path | None = None
    label: LabelPaths | None = None
    weight: Path | None = None
    pair: PairPaths | None = None
    turns: JudgedTurns | None = None
    each: Path | None = None
    zip: dict[str, Path] = field(default_factory=dict)
    strip: tuple[re.Pattern[str], ...] = ()
    join: Path | None = None
    chat: str | None = None
    warn: tuple[Path, str] | None = None
    refuse: str | None = None
    aside: tuple[str, ...] = ()

    @property
    def has_label(self) -> bool:
        """Return whether the mapping has a label, which options may change; pairs have none."""
        return (self.turns.label if self.turns is not None else self.label) is not None

    @property
    def judges_records(self) -> bool:
        """Return whether a record is one answer with one label, so that its columns are about that answer."""
        is_one_turn = self.turns is None or self.turns.rated is not None
        is_divided = self.pair is not None or self.each is not None or bool(self.zip) or self.join is not None
        return is_one_turn and not is_divided

    def ruled(self, rule: Callable[[LabelRule], LabelRule]) -> "Mapping":
        """Return the same mapping with other rules of the label or of the pair, and without counts."""
        changed = self
        if self.pair is not None:
            changed = dataclasses.replace(changed, pair=dataclasses.replace(self.pair, rule=rule(self.pair.rule)))
        if self.label is not None:
            changed = dataclasses.replace(changed, label=self.label.ruled(rule))
        if self.turns is not None and self.turns.label is not None:
            turns = dataclasses.replace(self.turns, label=self.turns.label.ruled(rule))
            changed = dataclasses.replace(changed, turns=turns)
        return changed

    def fits(self, record: Record, where: str) -> bool:
        """Return whether a record has a value at any path of a prompt or an answer."""
        firsts = (
            self.prompt,
            self.conversation,
            self.each,
            *self.zip.values(),
            None if self.turns is None else self.turns.messages,
            None if self.pair is None else self.pair.first,
        )
        try:
            return any(path is not None and path.find(record, where) not in (None, []) for path in firsts)
        except LeftOut:  # it has a value, with nothing to train on
            return True
        except FeedbackError:  # a function with an argument of another type
            return False

    def rows(self, record: Record, where: str) -> Iterator[Native | LeftOut]:
        """Yield the rows of a record in a format that `parse_record` reads, with a `Reading` as label.

        For a mapping with `turns`, call `turns.mapped_rows`.

        Raises:
            FeedbackError: the mapping does not fit the record; the message names file, key and record.
        """
        unknown: list[UnknownLabelError] = []
        for data in self.items(record, where):
            try:
                yield from self._rows(data, where)
            except LeftOut as left:
                yield left
            except UnknownLabelError as error:  # raised once the values of all items are counted
                unknown.append(error)
        if unknown:
            raise unknown[0]

    def items(self, record: Record, where: str) -> Iterator[Record]:
        """Yield the record, or a record for each of its items, with `item` and `index` added."""
        if self.each is not None:
            items = self.each.open(record, where)
            if not isinstance(items, list) and items is not None:
                raise FeedbackError(f"{where}: {self.each.source}: must be a list, got {quoted(items)}.")
            if not items:
                raise LeftOut(EMPTY, self.each.nothing(record))
            for index, item in enumerate(items):
                yield {**record, "item": item, "index": index}
        elif self.zip:
            columns = {name: path.open(record, where) for name, path in self.zip.items()}
            lists = {name: value for name, value in columns.items() if isinstance(value, list)}
            values = [value for value in columns.values() if value is not None]
            if values and not lists:
                raise FeedbackError(f"{where}: {self.name}: zip: must be lists, got {quoted(columns)}.")
            sizes = {name: len(value) for name, value in lists.items()}
            for name in columns.keys() - lists.keys():  # for example an unrated record
                lists[name] = [None] * max(sizes.values(), default=0)
            if len(set(sizes.values())) > 1:
                raise FeedbackError(f"{where}: {self.name}: zip: the lists have different lengths: {quoted(sizes)}.")
            for index in range(next(iter(sizes.values()), 0)):
                yield {**record, "item": {name: value[index] for name, value in lists.items()}, "index": index}
        else:
            yield record

    def _rows(self, data: Record, where: str) -> Iterator[Native]:
        """Yield a row; two if the sides of a pair are conversations that differ before their last answers."""
        row = self._row(data, where)
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if self.pair is None or self.prompt is not None or not part_early(chosen, rejected):
            yield row
            return
        for conversation, label in ((chosen, True), (rejected, False)):
            yield {"messages": conversation, "label": label, **self.beside(data, where)}

    def _row(self, data: Record, where: str) -> Native:
        row: Native = {}
        if self.pair is not None:
            chosen, rejected = self.pair.sides(data, where)
            row["chosen"] = self.answer(chosen, self.pair.first, data, where)
            row["rejected"] = self.answer(rejected, self.pair.second, data, where)
            row |= {name: data[name] for name in self.pair.ratings(data) if data.get(name) is not None}
        else:
            assert self.label is not None
            row["label"] = self.label.read(data, where)
        if self.conversation is not None:
            value = self._asked(self.conversation, data, where)
            row["messages"] = self._messages(value, where, self.conversation, data)
        if self.completion is not None:
            row["completion"] = self.answer(self.completion.find(data, where), self.completion, data, where)
        if self.prompt is not None:
            row["prompt"] = _turns_at(self.prompt, self._asked(self.prompt, data, where), data, where)
        if self._is_one_conversation(row):
            row["messages"] = row.pop("prompt")
            del row["completion"]
        return {**row, **self.beside(data, where)}

    def _is_one_conversation(self, row: Native) -> bool:
        """Return whether prompt and answer were looked for in one object, and are one conversation, such as a chat field."""
        if self.prompt is None or self.completion is None:
            return False
        asked, answered = row["prompt"], row["completion"]
        is_chat = isinstance(asked, tuple) and isinstance(answered, tuple) and len(answered) > 1
        source = self.prompt.text.removeprefix("asked")
        return (
            is_chat and source == self.completion.text.removeprefix("answered") and asked[-len(answered) :] == answered
        )

    def beside(self, data: Record, where: str) -> Native:
        """Return `system`, `tools` and the weight, which all rows of a record share.

        Raises:
            FeedbackError: the weight is none.
            LeftOut: it is 0.
        """
        found = {"system": self.system, "tools": self.tools}
        values = {name: path.find(data, where) for name, path in found.items() if path is not None}
        weight = {} if self.weight is None else {WEIGHT: self._weight(self.weight, data, where)}
        return {name: value for name, value in values.items() if value} | weight

    def _weight(self, path: Path, data: Record, where: str) -> float:
        return weight_in(path.find(data, where), where, path.text)

    def _asked(self, path: Path, data: Record, where: str) -> Any:
        """Return the value at a path. Raises: LeftOut: there is none."""
        value = path.find(data, where)
        if value in (None, "", [], {}):
            raise LeftOut(NO_PROMPT, path.nothing(data))
        return value

    def _messages(self, value: object, where: str, path: Path, data: Record) -> Turns:
        """Return a conversation without the text that `strip` matches. Raises: FeedbackError: it is text."""
        label = None if self.label is None else self.label.path
        check_is_list(value, where, path.text, label="PATH" if label is None else label.text)
        turns = _turns_at(path, value, data, where)
        if isinstance(turns, str):
            raise FeedbackError(
                f"{where}: {path.source}: {quoted(path.name_in(data))} must be a list of messages, got {quoted(turns)}."
            )
        return self.stripped(turns)

    def answer(self, value: object, path: Path, data: Record, where: str) -> Turns:
        """Return an answer without the text that `strip` matches. Raises: LeftOut: there is no value."""
        if value in (None, [], {}):
            raise LeftOut(EMPTY, path.nothing(data))
        return self.stripped(_turns_at(path, value, data, where))

    def stripped(self, turns: Turns) -> Turns:
        """Return turns without the text of the assistant that `strip` matches."""
        if not self.strip:
            return turns
        if isinstance(turns, str):
            return self._strip(turns)
        return tuple(self._strip_message(message) for message in turns)

    def _strip_message(self, message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        return {**message, "content": self._strip(message["content"])}

    def _strip(self, text: str) -> str:
        for pattern in self.strip:
            text = pattern.sub("", text)
        return text


def _turns_at(path: Path, value: object, data: Record, where: str) -> Turns:
    """Return the value at a path as `as_turns` does; errors name the keys that the path reads."""
    try:
        return as_turns(value, where, path.text)
    except (FeedbackError, LeftOut):
        return as_turns(value, where, path.name_in(data))  # raises the same error; finding the name takes time


def with_label(mapping: Mapping, name: str | None, rule: LabelRule | None, votes: str) -> Mapping:
    """Return a mapping with another label, as `--label-field`, `--up`, `--down`, `--rating-scale` and `--votes` give it.

    Args:
        name: of a score, if the mapping has scores, or a path.
        rule: None for those of the mapping.
        votes: what the votes of several raters become.
    """
    if mapping.pair is not None:
        if name is not None or rule is not None:
            raise ConfigError(
                f"{mapping.name}: preference pairs have no label. Remove --label-field, --up, --down, --rating-threshold and "
                "--rating-scale, or describe the file with --map FILE."
            )
        return dataclasses.replace(mapping, pair=dataclasses.replace(mapping.pair, rule=_unused(mapping.pair.rule)))
    holder = mapping.turns.label if mapping.turns is not None else mapping.label
    if holder is None:
        return mapping
    changed = holder.ruled(lambda own: dataclasses.replace(_given(rule, own, mapping.name), votes=votes))
    if name is not None:
        path = label_path(name)
        is_path = holder.scores is None or "." in name or name.startswith("{")
        changed = dataclasses.replace(changed, name=name, path=path if is_path else None, votes={}, objectives={})
    if mapping.turns is not None:
        return dataclasses.replace(mapping, turns=dataclasses.replace(mapping.turns, label=changed))
    return dataclasses.replace(mapping, label=changed)


def _given(rule: LabelRule | None, own: LabelRule, mapping: str) -> LabelRule:
    """Return the rule of options, which comes before a mapping's own; without one, its own."""
    if rule is None:
        return _unused(own)
    if rule.graded and own.graded not in ((), rule.graded):
        least, most = own.graded
        instead = f" (--rating-scale, in place of {least:g} to {most:g} in {mapping})"
        rule = dataclasses.replace(rule, scale_from=instead)
    return _unused(rule)


def _unused(rule: LabelRule) -> LabelRule:
    """Return a copy of a rule without counts: the package's mappings are shared."""
    return dataclasses.replace(rule, seen=Counter(), numbers={})
