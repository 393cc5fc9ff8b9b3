"""Say in a few lines of YAML where a file has its prompts, completions and labels.

    records: feedback_data          the list of records, in a document that is one object
    where: "type == 'rating'"       records that count
    system: params.system           text put before the prompt
    prompt: input.messages          text or messages
    completion: output              text or messages; or
    conversation: messages          all messages, of which the last is judged; or
    pair:                           two completions
      chosen: preferred             and rejected; or
      a: response_a                 and b, of which `better` names one:
      better: winner
      a_when: [model_a]
      b_when: [model_b]
    turns: ...                      a conversation with judged turns; see `JudgedTurns`
    label:                          a path, or
      path: rating
      up: [">=4"]
      down: ["<=2"]
      else: refuse                  leave-out, up or down
    each: completions               a list; `item` is then one of its items, and `index` its number from 0
    zip: {text: texts, score: scores}   parallel lists; `item` has one value of each
    strip: ['<details.*?</details>']    patterns removed from what the assistant wrote
    join: conversationId            records with the same value become one, in which `rows` lists them
    chat: never                     auto, always: text becomes a user's message and an assistant's

Every path is JMESPath (see `paths`). Keys that are not needed are left out.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping as AnyMapping
from dataclasses import dataclass, field
from typing import Any

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.labels import ELSE, REFUSE, LabelRule
from offline_kto.kto_core.feedback.left_out import NOT_CHOSEN, TIE, LeftOut
from offline_kto.kto_core.feedback.messages import Message, Turns, as_turns, said
from offline_kto.kto_core.feedback.paths import Path, compiled, key_path
from offline_kto.kto_core.feedback.quoting import quoted

Record = AnyMapping[str, Any]
# A row in one of the formats of `records`, or why there is none.
Native = dict[str, Any]

CHAT = ("auto", "always", "never")


@dataclass(frozen=True)
class LabelPaths:
    """Where the label is, and what its values mean.

    Attributes:
        path: to a value, or to a list with one for each rater. None if `scores` is given.
        scores: to an object from names to values, or to a list of objects with `name` and `value`.
        name: of the score that counts; needed if there are several.
    """

    path: Path | None
    scores: Path | None
    name: str | None
    rule: LabelRule

    def verdict(self, data: Record, where: str) -> bool:
        """Return whether the row is desirable. Raises: see `LabelRule.verdict`."""
        if self.path is not None:
            return self.rule.verdict(self.path.find(data, where), where, self.path.text)
        scores = self.named_scores(data, where)
        if self.name is None and len(scores) > 1:
            raise SeveralScoresError(where, scores)
        name = self.name if self.name is not None else next(iter(scores), "score")
        return self.rule.verdict(scores.get(name), where, name)

    def named_scores(self, data: Record, where: str) -> dict[str, Any]:
        """Return the values of a record's scores by name, those without a value left out."""
        assert self.scores is not None
        found = self.scores.find(data, where)
        pairs: list[tuple[object, object]] = []
        if isinstance(found, dict):
            pairs = list(found.items())
        elif isinstance(found, list):
            pairs = [(one.get("name"), one.get("value")) for one in found if isinstance(one, dict)]
        scores: dict[str, Any] = {}
        for name, value in pairs:
            if value is not None and value != []:
                scores[str(name)] = value
        return scores


class SeveralScoresError(FeedbackError):
    """A record has several scores, and nothing says which one counts."""

    def __init__(self, where: str, scores: AnyMapping[str, object]) -> None:
        self.names = list(scores)
        shown = ", ".join(f"{name} ({quoted(value, 20)})" for name, value in scores.items())
        super().__init__(f"{where}: several scores: {shown}. Name the one that counts with --label-field.")


@dataclass(frozen=True)
class PairPaths:
    """Two completions of one prompt: chosen and rejected, or a and b with a verdict.

    Attributes:
        first, second: chosen and rejected, or a and b.
        better: to the value that says which of a and b is better; None for chosen and rejected.
        rule: up for a, down for b.
    """

    first: Path
    second: Path
    better: Path | None
    rule: LabelRule

    def sides(self, data: Record, where: str) -> tuple[object, object]:
        """Return (chosen, rejected). Raises: LeftOut: neither is better."""
        first, second = self.first.find(data, where), self.second.find(data, where)
        if self.better is None:
            return first, second
        try:
            a_is_better = self.rule.verdict(self.better.find(data, where), where, self.better.text)
        except LeftOut as left:
            raise LeftOut(TIE, left.detail) from None
        return (first, second) if a_is_better else (second, first)


@dataclass(frozen=True)
class JudgedTurns:
    """A conversation in which some of the assistant's turns are judged; each becomes a row of its own.

    Attributes:
        messages: to the list of turns, or to an object of them.
        id, parent: of a turn, if the turns are a tree; otherwise each follows the one before.
        rated: to the id (or the number, from 0) of the only judged turn, in the record.
        role, text: of a turn.
        roles: the assistant's and others' values of `role`, if they are no usual names.
        refuse: to a value that a turn must not have, such as attached files.
    """

    messages: Path
    id: Path | None
    parent: Path | None
    rated: Path | None
    role: Path
    roles: dict[str, str]
    text: Path | None
    label: LabelPaths
    refuse: Path | None


@dataclass(frozen=True)
class Mapping:
    """Where a file has what a row needs.

    Attributes:
        name: of the format, as the plan shows it.
        recognise: true for a record of this format; None for a mapping that is only used when it is named.
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
    pair: PairPaths | None = None
    turns: JudgedTurns | None = None
    each: Path | None = None
    zip: dict[str, Path] = field(default_factory=dict)
    strip: tuple[re.Pattern[str], ...] = ()
    join: Path | None = None
    chat: str | None = None
    note: str = ""

    def rows(self, record: Record, where: str) -> Iterator[Native | LeftOut]:
        """Yield the rows of a record in a format that `parse_record` reads, with true or false as label.

        Raises:
            FeedbackError: the mapping does not fit the record; the message names file, key and record.
        """
        if self.where is not None and not self.where.find(record, where):
            yield LeftOut(NOT_CHOSEN)
            return
        if self.turns is not None:
            from offline_kto.kto_core.feedback.turns import judged_rows

            yield from judged_rows(self, self.turns, record, where)
            return
        for data in self._items(record, where):
            try:
                yield self._row(data, where)
            except LeftOut as left:
                yield left

    def _items(self, record: Record, where: str) -> Iterator[Record]:
        """Yield the record, or a record for each of its items, with `item` and `index` added."""
        if self.each is not None:
            items = self.each.find(record, where)
            for index, item in enumerate(items if isinstance(items, list) else []):
                yield {**record, "item": item, "index": index}
        elif self.zip:
            columns = {name: path.find(record, where) for name, path in self.zip.items()}
            lists = {name: value if isinstance(value, list) else [] for name, value in columns.items()}
            sizes = {name: len(value) for name, value in lists.items()}
            if len(set(sizes.values())) > 1:
                raise FeedbackError(f"{where}: {self.name}: zip: lists of different lengths, {quoted(sizes)}.")
            for index in range(next(iter(sizes.values()), 0)):
                yield {**record, "item": {name: value[index] for name, value in lists.items()}, "index": index}
        else:
            yield record

    def _row(self, data: Record, where: str) -> Native:
        row: Native = {}
        if self.pair is not None:
            chosen, rejected = self.pair.sides(data, where)
            row["chosen"] = self.answer(chosen, where, self.pair.first.text)
            row["rejected"] = self.answer(rejected, where, self.pair.second.text)
        else:
            assert self.label is not None
            row["label"] = self.label.verdict(data, where)
        if self.conversation is not None:
            row["messages"] = self.answer(self.conversation.find(data, where), where, self.conversation.text)
        if self.completion is not None:
            row["completion"] = self.answer(self.completion.find(data, where), where, self.completion.text)
        if self.prompt is not None:
            value = self.prompt.find(data, where)
            if value is None:
                raise FeedbackError(f"{where}: {self.prompt.source}: nothing at {quoted(self.prompt.text)}.")
            row["prompt"] = as_turns(value, where, self.prompt.text)
        return {**row, **self.beside(data, where)}

    def beside(self, data: Record, where: str) -> Native:
        """Return what goes with every row of a record: `system` and `tools`."""
        found = {"system": self.system, "tools": self.tools}
        values = {name: path.find(data, where) for name, path in found.items() if path is not None}
        return {name: value for name, value in values.items() if value not in (None, "", [])}

    def answer(self, value: object, where: str, field: str) -> Turns | None:
        """Return what an assistant wrote, with what `strip` matches removed from it."""
        if value is None:
            return None
        return self.stripped(as_turns(value, where, field))

    def stripped(self, turns: Turns) -> Turns:
        """Return turns without what `strip` matches in the assistant's words."""
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


def mapping_from(table: object, source: str) -> Mapping:
    """Check a mapping as read from YAML.

    Args:
        source: its file, for errors.

    Raises:
        ConfigError: an unknown key, a path that is none, keys that do not go together.
    """
    keys = _Keys(table, source)
    mapping = Mapping(
        name=keys.text("name") or source,
        note=keys.text("note") or "",
        **{name: keys.path(name) for name in _PATHS},  # type: ignore[arg-type]
        zip={name: compiled(text, f"{source}: zip: {name}") for name, text in keys.texts("zip").items()},
        label=_label(keys.take("label"), f"{source}: label"),
        pair=_pair(keys.take("pair"), f"{source}: pair"),
        turns=_turns(keys.take("turns"), f"{source}: turns"),
        strip=_patterns(keys.take("strip"), f"{source}: strip"),
        chat=keys.choice("chat", CHAT),
    )
    keys.finish()
    _check_whole(mapping, source)
    return mapping


_PATHS = ("recognise", "records", "where", "system", "tools", "prompt", "completion", "conversation", "each", "join")


def _check_whole(mapping: Mapping, source: str) -> None:
    answers = {name: getattr(mapping, name) is not None for name in ("completion", "conversation", "pair", "turns")}
    given = [name for name, there in answers.items() if there]
    if len(given) != 1:
        found = f"got {' and '.join(given)}" if given else "got none of them"
        raise ConfigError(f"{source}: give one of completion, conversation, pair and turns; {found}.")
    if mapping.completion is not None and mapping.prompt is None:
        raise ConfigError(f"{source}: completion needs a prompt beside it.")
    if mapping.label is None and mapping.pair is None and mapping.turns is None:
        raise ConfigError(f"{source}: label is missing: the path of the rating or the thumb.")
    if mapping.label is not None and (mapping.pair is not None or mapping.turns is not None):
        raise ConfigError(f"{source}: label stands beside {given[0]}, which has its own verdict. Remove it.")
    if mapping.each is not None and mapping.zip:
        raise ConfigError(f"{source}: each and zip exclude each other.")


def with_label(mapping: Mapping, name: str | None, rule: LabelRule | None) -> Mapping:
    """Return a mapping with another label, as `--label-field`, `--up` and `--down` give it.

    Args:
        name: of a score, if the mapping has several; otherwise a path.
    """
    holder = mapping.turns.label if mapping.turns is not None else mapping.label
    if holder is None or (name is None and rule is None):
        return mapping
    changed = dataclasses.replace(holder, rule=rule or holder.rule)
    if name is not None and holder.scores is not None:
        changed = dataclasses.replace(changed, name=name)
    elif name is not None:
        changed = dataclasses.replace(changed, path=option_path(name, "--label-field"))
    if mapping.turns is not None:
        return dataclasses.replace(mapping, turns=dataclasses.replace(mapping.turns, label=changed))
    return dataclasses.replace(mapping, label=changed)


def option_path(text: str, option: str) -> Path:
    """Return the path of an option such as --prompt-field: JMESPath, or a key whose name is no expression."""
    try:
        return compiled(text, option)
    except ConfigError:
        return compiled(key_path(text), option)


def _label(value: object, source: str) -> LabelPaths | None:
    if value is None:
        return None
    if isinstance(value, str):
        return LabelPaths(compiled(value, source), None, None, LabelRule())
    keys = _Keys(value, source)
    path, scores, name = keys.path("path"), keys.path("scores"), keys.text("name")
    rule = _rule(keys.values("up"), keys.values("down"), keys.choice("else", ELSE) or REFUSE, source)
    keys.finish()
    if (path is None) == (scores is None):
        raise ConfigError(f"{source}: give either path or scores.")
    return LabelPaths(path, scores, name, rule)


def _rule(up: tuple[object, ...], down: tuple[object, ...], otherwise: str, source: str) -> LabelRule:
    try:
        return LabelRule(up, down, otherwise)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _pair(value: object, source: str) -> PairPaths | None:
    if value is None:
        return None
    keys = _Keys(value, source)
    paths = {name: keys.path(name) for name in ("chosen", "rejected", "a", "b", "better")}
    rule = _rule(keys.values("a_when"), keys.values("b_when"), "leave-out", source)
    keys.finish()
    chosen, rejected, a, b, better = paths.values()
    if chosen is not None and rejected is not None and (a, b, better) == (None, None, None):
        return PairPaths(chosen, rejected, None, rule)
    if a is not None and b is not None and better is not None and (chosen, rejected) == (None, None) and rule.up:
        return PairPaths(a, b, better, rule)
    raise ConfigError(f"{source}: give chosen and rejected, or a, b, better, a_when and b_when.")


def _turns(value: object, source: str) -> JudgedTurns | None:
    if value is None:
        return None
    keys = _Keys(value, source)
    messages, label = keys.path("messages"), _label(keys.take("label"), f"{source}: label")
    if messages is None or label is None:
        raise ConfigError(f"{source}: give at least messages and label.")
    turns = JudgedTurns(
        messages=messages,
        id=keys.path("id"),
        parent=keys.path("parent"),
        rated=keys.path("rated"),
        role=keys.path("role") or compiled("role", source),
        roles={name.lower(): role for name, role in keys.texts("roles").items()},
        text=keys.path("text"),
        label=label,
        refuse=keys.path("refuse"),
    )
    keys.finish()
    if turns.parent is not None and turns.id is None:
        raise ConfigError(f"{source}: parent needs an id beside it.")
    return turns


def _patterns(value: object, source: str) -> tuple[re.Pattern[str], ...]:
    found = []
    for text in value if isinstance(value, list) else [] if value is None else [value]:
        try:
            found.append(re.compile(text, re.DOTALL))
        except (re.error, TypeError) as error:
            raise ConfigError(f"{source}: {quoted(text)} is not a regular expression: {error}") from None
    return tuple(found)


class _Keys:
    """The keys of one table of a mapping; what is taken is removed, and the rest is unknown."""

    def __init__(self, table: object, source: str) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: must hold keys like `prompt: input.messages`, got {quoted(table)}.")
        self._left, self._known, self._source = dict(table), [], source

    def take(self, name: str) -> object:
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self._source}: {name}: must be text, got {quoted(value)}.")
        return value

    def path(self, name: str) -> Path | None:
        text = self.text(name)
        return None if text is None else compiled(text, f"{self._source}: {name}")

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        text = self.text(name)
        if text is not None and text not in choices:
            raise ConfigError(f"{self._source}: {name}: one of {', '.join(choices)}, got {quoted(text)}.")
        return text

    def values(self, name: str) -> tuple[object, ...]:
        value = self.take(name)
        return tuple(value) if isinstance(value, list) else () if value is None else (value,)

    def texts(self, name: str) -> dict[str, str]:
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise ConfigError(f"{self._source}: {name}: must hold names and texts, got {quoted(value)}.")
        return {str(key).lower() if isinstance(key, bool) else str(key): one for key, one in value.items()}

    def finish(self) -> None:
        """Refuse what was not taken."""
        from offline_kto.kto_core.errors import nearest

        for name in self._left:
            raise ConfigError(f"{self._source}: unknown key {quoted(name)}.{nearest(str(name), self._known)}")
