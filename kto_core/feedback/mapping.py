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
    label:                          several scores, of which --label-field names the one that counts:
      scores: feedback_stats        an object from names to values, or a list of objects with `name` and `value`
      value: avg                    where a score that is an object has its value
    each: completions               a list; `item` is then one of its items, and `index` its number from 0
    zip: {text: texts, score: scores}   parallel lists; `item` has one value of each
    strip: ['<details.*?</details>']    patterns removed from what the assistant wrote
    join: conversationId            records with the same value become one, in which `rows` lists them
    chat: never                     auto, always: text becomes a user's message and an assistant's
    warn:                           the plan counts the records for which `when` is true
      when: "length(output) == `500`"
      say: answers are cut
    refuse: it holds no verdicts    a recognised format that cannot be used, and why

Every path is JMESPath (see `paths`). Keys that are not needed are left out.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from typing import Any

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.conversations import part_early
from offline_kto.kto_core.feedback.exports import opened
from offline_kto.kto_core.feedback.labels import (
    ELSE,
    MOST_VALUES,
    REFUSE,
    LabelRule,
    Scale,
    UnknownLabelError,
    has_no_value,
    is_tie,
)
from offline_kto.kto_core.feedback.left_out import DEAD_ZONE, EMPTY, MEDIA, NO_PROMPT, TIE, LeftOut
from offline_kto.kto_core.feedback.messages import Message, Turns, as_turns
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
        value: of a score that is an object.
        name: of the score that counts, or a path; needed if there are several.
        seen: how often each score had a value, by name; for errors.
    """

    path: Path | None
    scores: Path | None
    value: Path | None
    name: str | None
    rule: LabelRule
    seen: dict[str, Counter[str]] = field(default_factory=dict, compare=False, repr=False)

    def verdict(self, data: Record, where: str) -> bool:
        """Return whether the row is desirable. Raises: see `LabelRule.verdict`."""
        if self.scores is None:
            assert self.path is not None
            return self.rule.verdict(self.path.open(data, where), where, self.path.text)
        scores = self.named_scores(data, where)
        for name, value in scores.items():
            counts = self.seen.setdefault(name, Counter())
            shown = (quoted(one, 30) for one in _each(value))
            counts.update(one for one in shown if len(counts) < MOST_VALUES or one in counts)
        if self.name is None and len(scores) > 1:
            raise SeveralScoresError(f"{where}: several scores: {', '.join(scores)}. {_NAME_IT}")
        name = self.name if self.name is not None else next(iter(scores), "score")
        if name not in scores and (name in data or self.path is not None):
            found = data[name] if self.path is None or name in data else self.path.find(data, where)
            return self.rule.verdict(opened(found), where, name)
        return self.rule.verdict(scores.get(name), where, name)

    def named_scores(self, data: Record, where: str) -> dict[str, Any]:
        """Return the values of a record's scores by name, those without a value left out.

        A score that several raters gave has the list of their values.
        """
        assert self.scores is not None
        found = self.scores.open(data, where)
        pairs: list[tuple[object, object]] = []
        if isinstance(found, dict):
            pairs = list(found.items())
        elif isinstance(found, list):
            pairs = [(one.get("name"), one.get("value")) for one in found if isinstance(one, dict)]
        scores: dict[str, Any] = {}
        for name, value in pairs:
            values = [one for item in _each(opened(value)) for one in _each(self._value(item, where))]
            kept = [one for one in values if not has_no_value(one)]
            if kept:
                scores.setdefault(str(name), []).extend(kept)
        return {name: values[0] if len(values) == 1 else values for name, values in scores.items()}

    def _value(self, item: object, where: str) -> object:
        return self.value.find(item, where) if self.value is not None and isinstance(item, dict) else item

    def several(self, where: str) -> "SeveralScoresError | None":
        """Return the error of a file with several scores of which none is named, or without the one that is.

        Args:
            where: the file.
        """
        if self.scores is None or not self.seen:
            return None
        shown = "".join(f"\n  {name}: {Scale(values).in_words()}" for name, values in self.seen.items())
        if self.name is None and len(self.seen) > 1:
            return SeveralScoresError(f"{where}: several scores, and nothing says which one counts:{shown}\n{_NAME_IT}")
        valued = any(destination != "left out" for _, destination in self.rule.seen)  # a column of that name
        if self.name is not None and self.path is None and self.name not in self.seen and not valued:
            return SeveralScoresError(
                f"{where}: no record has a score {quoted(self.name)}; there are:{shown}\n{_NAME_IT}"
            )
        return None


_NAME_IT = "Name the one that counts with --label-field NAME."


def _each(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


class SeveralScoresError(FeedbackError):
    """A record has several scores, and nothing says which one counts."""


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
        """Return (chosen, rejected).

        Raises:
            LeftOut: neither is better.
            UnknownLabelError: `better` is neither a nor b, and no word for a tie.
        """
        a_is_better = True if self.better is None else self._a_is_better(self.better, data, where)
        first, second = self.first.find(data, where), self.second.find(data, where)
        return (first, second) if a_is_better else (second, first)

    def _a_is_better(self, better: Path, data: Record, where: str) -> bool:
        value = better.find(data, where)
        try:
            return self.rule.verdict(value, where, better.text)
        except LeftOut as left:
            raise LeftOut(TIE if left.reason == DEAD_ZONE else left.reason, left.detail) from None
        except UnknownLabelError:
            if is_tie(value):
                raise LeftOut(TIE, quoted(value)) from None
            raise


@dataclass(frozen=True)
class JudgedTurns:
    """A conversation in which some of the assistant's turns are judged; each becomes a row of its own.

    Attributes:
        messages: to the list of turns, or to an object of them.
        id, parent: of a turn, if the turns are a tree; otherwise each follows the one before.
        rated: to the id (or the number, from 0) of the only judged turn, in the record.
        role, text: of a turn.
        roles: the assistant's and others' values of `role`, if they are no usual names.
        children: of a turn, to the turns that follow it, if the tree is written as one.
        leave_out: (reason, path to a value that a turn must not have, such as attached files).
        rank: of the assistant's answers to one turn, in place of a label: the least makes a pair with each of the others.
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
    warn: tuple[Path, str] | None = None
    refuse: str | None = None

    @property
    def has_label(self) -> bool:
        """Whether a label of a record or a turn is judged, which options may change; a pair has its own verdict."""
        return (self.turns.label if self.turns is not None else self.label) is not None

    def fits(self, record: Record, where: str) -> bool:
        """Return whether a record has anything where the mapping looks for prompts and answers."""
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
        except FeedbackError:  # a function that was given nothing
            return False

    def rows(self, record: Record, where: str) -> Iterator[Native | LeftOut]:
        """Yield the rows of a record in a format that `parse_record` reads, with true or false as label.

        Of a mapping with `turns`, `turns.mapped_rows` yields them.

        Raises:
            FeedbackError: the mapping does not fit the record; the message names file, key and record.
        """
        for data in self._items(record, where):
            try:
                yield from self._rows(data, where)
            except LeftOut as left:
                yield left

    def _items(self, record: Record, where: str) -> Iterator[Record]:
        """Yield the record, or a record for each of its items, with `item` and `index` added."""
        if self.each is not None:
            items = self.each.open(record, where)
            if not isinstance(items, list) and items is not None:
                raise FeedbackError(f"{where}: {self.each.source}: no list, got {quoted(items)}.")
            if not items:
                raise LeftOut(EMPTY, f"{self.each.source}: nothing at {quoted(self.each.text)}")
            for index, item in enumerate(items):
                yield {**record, "item": item, "index": index}
        elif self.zip:
            columns = {name: path.open(record, where) for name, path in self.zip.items()}
            lists = {name: value for name, value in columns.items() if isinstance(value, list)}
            sizes = {name: len(value) for name, value in lists.items()}
            for name in columns.keys() - lists.keys():  # nobody rated, say
                lists[name] = [None] * max(sizes.values(), default=0)
            if len(set(sizes.values())) > 1:
                raise FeedbackError(f"{where}: {self.name}: zip: lists of different lengths, {quoted(sizes)}.")
            for index in range(next(iter(sizes.values()), 0)):
                yield {**record, "item": {name: value[index] for name, value in lists.items()}, "index": index}
        else:
            yield record

    def _rows(self, data: Record, where: str) -> Iterator[Native]:
        """Yield a row; two of them if the sides of a pair are conversations that part before their last answers."""
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
            row["chosen"] = self.answer(chosen, where, self.pair.first)
            row["rejected"] = self.answer(rejected, where, self.pair.second)
        else:
            assert self.label is not None
            row["label"] = self.label.verdict(data, where)
        if self.conversation is not None:
            value = self._asked(self.conversation, data, where)
            row["messages"] = self.answer(value, where, self.conversation)
        if self.completion is not None:
            row["completion"] = self.answer(self.completion.find(data, where), where, self.completion)
        if self.prompt is not None:
            row["prompt"] = as_turns(self._asked(self.prompt, data, where), where, self.prompt.text)
        return {**row, **self.beside(data, where)}

    def beside(self, data: Record, where: str) -> Native:
        """Return what goes with every row of a record: `system` and `tools`."""
        found = {"system": self.system, "tools": self.tools}
        values = {name: path.find(data, where) for name, path in found.items() if path is not None}
        return {name: value for name, value in values.items() if value}

    def keys(self) -> set[str]:
        """Return all keys that the mapping's paths name."""
        return set().union(*(path.keys() for path in _paths_in(self)))

    def _asked(self, path: Path, data: Record, where: str) -> Any:
        """Return what a path leads to. Raises: LeftOut: nothing."""
        value = path.find(data, where)
        if value in (None, "", [], {}):
            raise LeftOut(NO_PROMPT, f"{path.source}: nothing at {quoted(path.text)}")
        return value

    def answer(self, value: object, where: str, path: Path) -> Turns:
        """Return what an assistant wrote, with what `strip` matches removed from it. Raises: LeftOut: nothing."""
        if value in (None, [], {}):
            raise LeftOut(EMPTY, f"{path.source}: nothing at {quoted(path.text)}")
        return self.stripped(as_turns(value, where, path.text))

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


def _paths_in(value: object) -> Iterator[Path]:
    """Yield the paths in a mapping, those of its parts included."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _paths_in(one)
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from _paths_in(getattr(value, one.name))


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
        warn=_warn(keys.take("warn"), f"{source}: warn"),
        refuse=keys.text("refuse"),
        **{name: keys.path(name) for name in _PATHS},
        zip={name: compiled(text, f"{source}: zip: {name}") for name, text in keys.texts("zip").items()},
        label=_label(keys.take("label"), f"{source}: label"),
        pair=_pair(keys.take("pair"), f"{source}: pair"),
        turns=_turns(keys.take("turns"), f"{source}: turns"),
        strip=_patterns(keys.take("strip"), f"{source}: strip"),
        chat=keys.choice("chat", CHAT),
    )
    keys.finish()
    if mapping.refuse is None:
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
    if mapping.pair is not None:
        if name is not None or rule is not None:
            raise ConfigError(
                f"{mapping.name}: holds pairs, whose label is which of the two is better. Leave --label-field, --up, --down "
                "and --rating-threshold out, or describe the file with --map FILE."
            )
        return dataclasses.replace(mapping, pair=dataclasses.replace(mapping.pair, rule=_unused(mapping.pair.rule)))
    holder = mapping.turns.label if mapping.turns is not None else mapping.label
    if holder is None:
        return mapping
    changed = dataclasses.replace(holder, rule=_unused(rule or holder.rule), seen={})
    if name is not None:
        path = option_path(name, "--label-field")
        changed = dataclasses.replace(changed, name=name, path=path if holder.scores is None or "." in name else None)
    if mapping.turns is not None:
        return dataclasses.replace(mapping, turns=dataclasses.replace(mapping.turns, label=changed))
    return dataclasses.replace(mapping, label=changed)


def _unused(rule: LabelRule) -> LabelRule:
    """Return a rule that has counted nothing yet: the package's mappings are shared."""
    return dataclasses.replace(rule, seen=Counter())


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
        return LabelPaths(compiled(value, source), None, None, None, LabelRule())
    keys = _Keys(value, source)
    path, scores, inner, name = keys.path("path"), keys.path("scores"), keys.path("value"), keys.text("name")
    rule = _rule(keys.values("up"), keys.values("down"), keys.choice("else", ELSE) or REFUSE, source)
    keys.finish()
    if (path is None) == (scores is None):
        raise ConfigError(f"{source}: give either path or scores.")
    return LabelPaths(path, scores, inner, name, rule)


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
    rule = _rule(keys.values("a_when"), keys.values("b_when"), REFUSE, source)
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
    rank = keys.path("rank")
    if messages is None or (label is None) == (rank is None):
        raise ConfigError(f"{source}: give at least messages, and either label or rank.")
    turns = JudgedTurns(
        messages=messages,
        id=keys.path("id"),
        parent=keys.path("parent"),
        rated=keys.path("rated"),
        role=keys.path("role") or compiled("role", source),
        roles={name.lower(): role for name, role in keys.texts("roles").items()},
        text=keys.path("text"),
        label=label,
        children=keys.path("children"),
        leave_out=_reasons(keys.take("leave-out"), f"{source}: leave-out"),
        rank=rank,
    )
    keys.finish()
    if turns.parent is not None and turns.children is not None:
        raise ConfigError(f"{source}: give parent or children, not both.")
    if turns.parent is not None and turns.id is None:
        raise ConfigError(f"{source}: parent needs an id beside it.")
    if rank is not None and turns.parent is None:
        raise ConfigError(f"{source}: rank needs a parent beside it.")
    return turns


def _warn(value: object, source: str) -> tuple[Path, str] | None:
    if value is None:
        return None
    keys = _Keys(value, source)
    when, say = keys.path("when"), keys.text("say")
    keys.finish()
    if when is None or say is None:
        raise ConfigError(f"{source}: give when and say.")
    return when, say


def _reasons(value: object, source: str) -> tuple[tuple[str, Path], ...]:
    """Return (reason, path) of what is left out; a path alone is that of images and other media."""
    if value is None:
        return ()
    if isinstance(value, str):
        return ((MEDIA, compiled(value, source)),)
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ConfigError(f"{source}: a path, or reasons and paths, got {quoted(value)}.")
    return tuple((str(reason), compiled(text, f"{source}: {reason}")) for reason, text in value.items())


def _patterns(value: object, source: str) -> tuple[re.Pattern[str], ...]:
    found: list[re.Pattern[str]] = []
    for text in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(text, str):
            raise ConfigError(f"{source}: must be a regular expression, got {quoted(text)}.")
        try:
            found.append(re.compile(text, re.DOTALL))
        except re.error as error:
            raise ConfigError(f"{source}: {quoted(text)} is not a regular expression: {error}") from None
    return tuple(found)


class _Keys:
    """The keys of one table of a mapping; what is taken is removed, and the rest is unknown."""

    def __init__(self, table: object, source: str) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: must hold keys like `prompt: input.messages`, got {quoted(table)}.")
        self._left, self._source = dict(table), source
        self._known: list[str] = []

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
