"""Compare the label with other columns that look like a verdict, as ratings and thumbs do, for the warnings of the plan."""

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from offline_kto.kto_core.feedback.columns import COMPLETIONS, CONVERSATIONS
from offline_kto.kto_core.feedback.judging import COUNTS
from offline_kto.kto_core.feedback.labels import has_no_value, is_rating_name
from offline_kto.kto_core.feedback.own_answers import is_own_answer
from offline_kto.kto_core.feedback.pair_verdicts import is_about_sides
from offline_kto.kto_core.feedback.quoting import counted, quoted
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.scales import Scale
from offline_kto.kto_core.feedback.stored_values import opened
from offline_kto.precompute.records.feedback_columns import is_turned_round, is_undesirable, reversed_options

# Columns that say the same as a label, if they are there.
_NAMES: Final = (
    *("label", "kto_tag", "rating", "score", "stars", "thumb", "thumbs", "vote", "reward", "feedback"),
    *("user_rating", "user_feedback"),
)
VERDICTS: Final = frozenset(_NAMES)
# Other names of a verdict. Such a column may judge something else, so it counts only if most rows contradict.
_SIMILAR: Final = re.compile(
    r"(?<![a-z])(?:label\d*|verdict|ratings?|thumbs?_?up|votes?|gold|judge?ment|(?:is|was)_?(?:correct|valid|good|ok|helpful|accepted|"
    r"approved|safe|useful)|correct|valid|helpful|accepted|approved|passed|preferred)(?![a-z])",
    re.IGNORECASE,
)
# Columns that count votes, which say nothing alone.
_COUNTS: Final = frozenset(name for names in COUNTS for name in names)
_IDENTIFIES: Final = re.compile(r"[_.-](?:ids?|date|at|time|timestamp|by|counts?|reason|type|source)$", re.IGNORECASE)
_OF_MESSAGES: Final = "[]."
# Numbers with more different values are no scale on which a middle is known.
_MOST_VALUES = 12

_shown = functools.lru_cache(maxsize=4096, typed=True)(quoted)


@functools.lru_cache(maxsize=4096)
def is_verdict(name: str) -> bool:
    """Return whether a column's name is that of a verdict, also of one on what is undesirable."""
    if name in VERDICTS or name in _COUNTS:
        return name in VERDICTS
    return (_SIMILAR.search(name) is not None or is_undesirable(name)) and _IDENTIFIES.search(name) is None


@functools.lru_cache(maxsize=1024)
def _verdicts_among(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(is_verdict, names))


def _verdicts_in(record: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the columns that look like a verdict."""
    for name in _verdicts_among(tuple(record)):
        value = opened(record[name])
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", value[key]) for key in _verdicts_among(tuple(value)))
        else:
            yield name, value


def _only_one(value: object) -> object:
    """Return the value that all raters in a list gave; None if they gave several. Any other value as it is."""
    if not isinstance(value, list | tuple):
        return value
    given = [one for one in value if not has_no_value(one)]
    return given[0] if given and all(quoted(one) == quoted(given[0]) for one in given) else None


def _verdicts_of_message(record: Mapping[str, object], number: int) -> Iterator[tuple[str, object]]:
    """Yield the keys of a message that look like a verdict, as "messages[].user_feedback".

    Args:
        number: of the message in its conversation; -1 for the last one, of the answer's own column if there is one.
    """
    has_answer = number == -1 and any(record.get(name) is not None for name in COMPLETIONS)
    for column in COMPLETIONS if has_answer else CONVERSATIONS:
        turns = opened(record.get(column))
        judged = turns[number] if isinstance(turns, list | tuple) and number < len(turns) and turns else None
        if isinstance(judged, Mapping):
            yield from ((f"{column}{_OF_MESSAGES}{name}", value) for name, value in _verdicts_in(judged))


class ColumnsToRead(frozenset[str]):
    """The names of columns to read; names of verdicts, also on sides of pairs, and of models' own answers are among them."""

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or not isinstance(name, str):
            return super().__contains__(name)
        return is_verdict(name) or is_own_answer(name) or is_about_sides(name)


@dataclass
class Contradictions:
    """The values of other columns that look like a verdict, by the label of their row.

    Attributes:
        seen: number of rows by column and (value as shown, label).
        first: place of the first row of each.
    """

    seen: dict[str, Counter[tuple[str, bool]]] = field(default_factory=dict)
    first: dict[tuple[str, str, bool], str] = field(default_factory=dict)

    def add(self, record: Mapping[str, object], rows: Sequence[FeedbackRow]) -> None:
        """Note the values of a record beside the labels of its rows.

        A row that judges a message is compared with that message, and a row of a whole conversation with its last one. The columns
        of the record are about a row only if it is the only one.
        """
        for row in rows if len(rows) == 1 or rows[0].turn is not None else ():  # else of a pair
            values = [*_verdicts_of_message(record, -1 if row.turn is None else row.turn)]
            self._compare([*_verdicts_in(record), *values] if len(rows) == 1 else values, row)

    def add_mapped(self, record: Mapping[str, object], rows: Sequence[FeedbackRow]) -> None:
        """Note the columns of a record beside the label of its only row, which a mapping has read.

        Its messages may be anywhere in the record, so their keys are not compared.
        """
        if len(rows) == 1:
            self._compare(_verdicts_in(record), rows[0])

    def _compare(self, values: Iterable[tuple[str, object]], row: FeedbackRow) -> None:
        for name, value in values:
            verdict = _only_one(value)
            if not has_no_value(verdict) and isinstance(verdict, bool | int | float | str):
                self._count(name, _shown(verdict), row.label, 1, row.where)

    def _count(self, name: str, shown: str, label: bool, count: int, where: str) -> None:
        counts = self.seen.setdefault(name, Counter())
        if (shown, label) in counts or len(counts) < 2 * (_MOST_VALUES + 1):
            counts[shown, label] += count
            self.first.setdefault((name, shown, label), where)

    def merge(self, later: "Contradictions") -> None:
        """Add the values in the next part of the data. A column that reached the limit there has too many values anyway."""
        for name, counts in later.seen.items():
            for (shown, label), count in counts.items():
                self._count(name, shown, label, count, later.first[name, shown, label])

    def in_words(self, unused: Collection[str]) -> list[str]:
        """Return a sentence for each column that was not read and contradicts the label in some rows."""
        there = sorted(
            (name for name in self.seen if name in unused or name.rpartition(".")[0] in unused),
            key=lambda name: _NAMES.index(name) if name in VERDICTS else 99,
        )
        return [text for name in there if (text := self._sentence(name, self.seen[name]))]

    def _sentence(self, name: str, counts: Counter[tuple[str, bool]]) -> str:
        values: Counter[str] = Counter()
        for (shown, _), count in counts.items():
            values[shown] += count
        scale, key = Scale(values), name.rpartition(_OF_MESSAGES)[2]
        if len(scale.counts) > _MOST_VALUES:
            return ""
        is_judged_by_name = scale.is_numbers or is_undesirable(key)
        if is_judged_by_name and len(scale.counts) == 1 and len({label for _, label in counts}) == 2:
            return ""  # one number, or one flag such as "deleted", beside both labels judges nothing
        turned = is_turned_round(key, scale.counts)
        if is_undesirable(key) and not turned:  # a scale of unknown direction, or words
            return ""
        verdicts = {one: scale.verdict(one[0], is_rating=is_rating_name(key)) for one in counts}
        judged = sum(counts[one] for one, verdict in verdicts.items() if verdict is not None)
        against = {
            one: counts[one]
            for one, verdict in verdicts.items()
            if verdict is not None and (verdict is one[1]) is turned
        }
        if not against or (key not in VERDICTS and 2 * sum(against.values()) <= judged):
            return ""
        (shown, label), _ = next(iter(against.items()))
        proposal = (
            reversed_options(scale.counts)
            if turned
            else ""
            if scale.is_usual
            else scale.proposal() or "--up ... --down ... for its values"
        )
        proposal = proposal and f" {proposal}"
        return (
            f"'{name}' contradicts the label that was read in {sum(against.values()):,} of {counted(counts.total(), 'row')} "
            f"(first: {self.first[name, shown, label]}: {'desirable' if label else 'undesirable'}, but '{name}' is {shown}). If "
            f"'{name}' is the feedback, pass --label-field {key}{proposal}."
        )
