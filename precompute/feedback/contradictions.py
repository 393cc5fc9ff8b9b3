"""Compare the label with other columns that look like a verdict, as ratings and thumbs do, for the warnings of the plan."""

import functools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from offline_kto.kto_core.feedback.labels import Scale, has_no_value
from offline_kto.kto_core.feedback.quoting import counted, quoted

# Columns that say the same as a label, if they are there.
_NAMES: Final = (
    *("label", "kto_tag", "rating", "score", "stars", "thumb", "thumbs", "vote", "reward", "feedback"),
    *("user_rating", "user_feedback"),
)
VERDICTS: Final = frozenset(_NAMES)
# Numbers with more different values are no scale on which a middle is known.
_MOST_VALUES = 12

_shown = functools.lru_cache(maxsize=4096, typed=True)(quoted)


@dataclass
class Contradictions:
    """The values of other columns that look like a verdict, by the label of their row.

    Attributes:
        seen: number of rows by column and (value as shown, label).
        first: place of the first row of each.
    """

    seen: dict[str, Counter[tuple[str, bool]]] = field(default_factory=dict)
    first: dict[tuple[str, str, bool], str] = field(default_factory=dict)

    def add(self, record: Mapping[str, object], label: bool, where: str) -> None:
        """Note the values of a record that became one row."""
        for name in record.keys() & VERDICTS:
            value = record[name]
            if has_no_value(value) or not isinstance(value, bool | int | float | str):
                continue
            counts = self.seen.setdefault(name, Counter())
            shown = _shown(value)
            if (shown, label) in counts or len(counts) < 2 * (_MOST_VALUES + 1):
                counts[shown, label] += 1
                self.first.setdefault((name, shown, label), where)

    def in_words(self, unused: Collection[str]) -> list[str]:
        """Return a sentence for each column that was not read and contradicts the label in some rows."""
        there = [name for name in _NAMES if name in unused and name in self.seen]
        return [text for name in there if (text := self._sentence(name, self.seen[name]))]

    def _sentence(self, name: str, counts: Counter[tuple[str, bool]]) -> str:
        scale = Scale(Counter({shown: 1 for shown, _ in counts}))
        if len(scale.counts) > _MOST_VALUES:
            return ""
        against = {(shown, label): n for (shown, label), n in counts.items() if scale.verdict(shown) is (not label)}
        if not against:
            return ""
        (shown, label), _ = next(iter(against.items()))
        proposal = "" if scale.is_usual else f" {scale.proposal()}"
        return (
            f"'{name}' contradicts the label that was read in {sum(against.values()):,} of {counted(counts.total(), 'row')} "
            f"(first: {self.first[name, shown, label]}: {'desirable' if label else 'undesirable'}, but '{name}' is {shown}). If "
            f"'{name}' is the feedback, pass --label-field {name}{proposal}."
        )
