"""Describe the values of a label field with their counts, and propose the options that say what they mean."""

import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from offline_kto.kto_core.feedback.labels import LabelRule, is_comparison, is_tie, matches, number_in, usual_label

# Ratings with their highest value: "4/5", "4 out of 5".
_FRACTION = re.compile(r"(\d{1,3})(\s?/\s?|\s+(?:out\s+)?of\s+)([1-9]\d{0,2})", re.ASCII | re.IGNORECASE)
# Ratings as rows of stars: filled ones, and perhaps empty ones up to the highest value. An emoji may have a variation selector.
_STARS = re.compile("((?:[★⭐🌟]\ufe0f?){1,10})((?:[☆✩]\ufe0f?)*)")
# The highest value of a row of stars without empty ones.
_MOST_STARS = 5

# Words for a judgement that is neither good nor bad, or for none.
_BETWEEN = re.compile(
    r"[^\w+]*|mixed|medium|average|so[ _-]?so|ok(?:ay)?|maybe|partial(?:ly)?|unsure|unknown|unclear|undecided|other|pending"
    r"|offered|skip(?:ped)?|(?:not|un)[ _-]?(?:rated|judged|scored|answered|set|available|applicable|sure)"
    r"|no[ _-]?(?:rating|feedback|vote|answer|opinion)",
    re.IGNORECASE,
)


# Ends of the usual scales of ratings.
_ENDS = (1, 5, 10, 100)
# In fewer ratings, nothing is far from the others.
_MANY = 10


@dataclass(frozen=True)
class Scale:
    """The values of a label field, with their counts."""

    counts: Counter[str]

    @classmethod
    def of(cls, rule: LabelRule) -> "Scale":
        """Return the values that a rule was given."""
        counts: Counter[str] = Counter()
        for (value, _), count in rule.seen.items():
            counts[value] += count
        return cls(counts)

    def in_words(self) -> str:
        """Return the most frequent values with their counts."""
        shown = [
            f"{value} ({count:,} {'time' if count == 1 else 'times'})" for value, count in self.counts.most_common(8)
        ]
        more = len(self.counts) - len(shown)
        return ", ".join(shown) + (f", and {more:,} more" if more > 0 else "")

    @property
    def is_usual(self) -> bool:
        """Return whether all values are true, false, 1, 0 or usual words, or say that there is none."""
        return all(value == "(none)" or usual_label(_parsed(value)) is not None for value in self.counts)

    @property
    def is_numbers(self) -> bool:
        """Return whether all values are numbers, or say that there is none."""
        return all(value == "(none)" or number_in(value.strip('"')) is not None for value in self.counts)

    def verdict(self, shown: str, *, is_rating: bool = True) -> bool | None:
        """Return what a value, as `in_words` shows it, probably means on this scale; None if that is not clear.

        Args:
            is_rating: whether a 1 without other numbers may be the worst of a scale.
        """
        value = _parsed(shown)
        number, counts = number_in(value), self._numbers()
        if number is None:
            return usual_label(value)
        if len(counts) == 1:
            return _alone(number, is_rating=is_rating)
        cut = _cut(counts)
        if cut is None or cut.other_way or number in _outliers(counts):
            return None
        up, down = matches(value, (cut.up,)), matches(value, (cut.down,))
        return up if up or down else None

    def _numbers(self) -> Counter[float]:
        """Return the numbers among the values, which may be text."""
        counts: Counter[float] = Counter()
        for shown, count in self.counts.items():
            if (number := number_in(shown.strip('"'))) is not None:
                counts[number] += count
        return counts

    def strays(self, least: float, most: float) -> str:
        """Return the values that are far off a scale on which most values are, with their counts; empty if another scale fits."""
        counts = self._numbers()
        off = [number for number in counts if not least <= number <= most]
        is_other_scale = (
            any(0 <= number <= 2 * most for number in off) or 2 * sum(counts[n] for n in off) > counts.total()
        )
        return _with_counts(counts, off) if off and not is_other_scale else ""

    def proposal(self) -> str:
        """Return options that fit the values and can be pasted into a shell; empty if that is not clear."""
        shown = [value for value in self.counts if value != "(none)"]
        values = [text for value in shown if (text := _as_option(value)) is not None]
        if len(values) < len(shown):
            return ""
        numbers = self._numbers()
        words = [value for value in values if number_in(value) is None]
        if words and numbers:
            return ""
        if numbers:
            return _proposed_cut(numbers)
        grades = {word: grade for word in words if (grade := _Grade.of(word)) is not None}
        return _proposed_grades(grades) if words and len(grades) == len(words) else _proposed_words(words)


def _parsed(shown: str) -> object:
    """Return a value that is given as JSON; None for one that is cut, because it is long."""
    try:
        return json.loads(shown)
    except ValueError:
        return None


def _as_option(shown: str) -> str | None:
    """Return a value, given as JSON, as an option has it; None for one that no option can name."""
    value = _parsed(shown)
    if isinstance(value, str):
        return None if is_comparison(value) or "," in value else value
    return shown if isinstance(value, bool | int | float) else None


class _Cut(NamedTuple):
    """The values of --up and --down for ratings, what happens to the others, and whether the order is a guess."""

    up: str
    down: str
    note: str
    other_way: bool = False


def _proposed_cut(counts: Counter[float]) -> str:
    """Return options for ratings; empty for a single one."""
    cut = _cut(counts)
    if cut is None:
        return ""
    up, down = _option([cut.up]), _option([cut.down])
    return f"--up {up} --down {down}" + (f" ({cut.note})" if cut.note else "")


def _cut(counts: Counter[float]) -> _Cut | None:
    """Return the cut for ratings, which outliers do not move."""
    outliers = _outliers(counts)
    cut = _usual_cut(Counter({number: count for number, count in counts.items() if number not in outliers}))
    if cut is None or not outliers:
        return cut
    far = f"{_with_counts(counts, outliers)} {'is' if len(outliers) == 1 else 'are'} far from the others: correct such ratings first, "
    far += "or clear them if they mean that nobody rated"
    return cut._replace(note=f"{cut.note}; {far}" if cut.note else far)


def _alone(number: float, *, is_rating: bool) -> bool | None:
    """Return what a number means without others: an end of a usual scale is a verdict, and any other number is not clear."""
    if number == 1:
        return None if is_rating else True
    return True if number in _ENDS else False if number in (0, -1) else None


def _with_counts(counts: Counter[float], numbers: Collection[float]) -> str:
    return Scale(Counter({f"{number:g}": counts[number] for number in sorted(numbers)})).in_words()


def _outliers(counts: Counter[float]) -> set[float]:
    """Return ratings that are not on the scale of the others: mistakes such as 85 among 1 to 10, or a code such as -1 or 99."""
    total = counts.total()
    below = {number for number in counts if number < 0}
    rest = Counter({number: count for number, count in counts.items() if number >= 0})
    if below:
        is_code = len(below) == 1 and (
            (0 not in rest and len(rest) >= 3 and max(rest) >= 3)
            or (len(rest) >= 2 and total >= _MANY and -min(below) > 2 * max(rest))
        )
        if not is_code:
            return set()  # votes, which may be negative
    for end in _ENDS:
        above = {number: count for number, count in rest.items() if number > end}
        if above and len(rest) - len(above) >= 2 and _is_few(above, end, total):
            return {*above, *below}
    return below


def _is_few(above: Mapping[float, int], end: float, total: int) -> bool:
    """Return whether the ratings above the end of a scale are so few, or so far away, that no larger scale explains them."""
    few, is_far = sum(above.values()), min(above) > 2 * end
    is_code = len(above) == 1 and 100 not in above and total >= _MANY
    return few <= 0.01 * total or (is_far and (few <= 0.05 * total or is_code))


def _usual_cut(counts: Counter[float]) -> _Cut | None:
    """Return the cut of the smallest usual scale that contains all ratings; else one at their median."""
    if len(counts) < 2:
        return None
    numbers = sorted(counts)
    least, most = numbers[0], numbers[-1]
    if set(numbers) <= {-1.0, 0.0, 1.0} and (-1.0 not in numbers or 0.0 not in numbers):
        return _Cut("1", f"{least:g}", "")
    if least < 0:
        return _Cut(">0", "<0", "0 is left out")
    if most <= 1:
        return _Cut(">0.5", "<0.5", "0.5 is left out")
    if numbers == [1, 2]:
        return _Cut("2", "1", "or the other way round", other_way=True)
    # Scales: 0 to 2, 1 to 3, 0 to 4, 1 to 5, 1 to 10, 0 to 100. Values in the middle are left out.
    small = (2, 2, 0) if least == 0 and most <= 2 else (3, 3, 1)
    for end, up, down in (small, (4, 3, 1) if least == 0 else (5, 4, 2), (5, 4, 2), (10, 7, 4), (100, 70, 40)):
        if most <= end:
            return _Cut(f">={up}", f"<={down}", "values between them are left out")
    middle = max(statistics.median_low(counts.elements()), numbers[1])  # of which at least one is below
    return _Cut(f">={middle:g}", f"<{middle:g}", "")


class _Grade(NamedTuple):
    """A rating that is written with its highest value.

    Attributes:
        words: how each rating from 0, or from 1 for stars, to the highest is written, by its number.
    """

    number: int
    most: int
    words: dict[int, str]

    @classmethod
    def of(cls, word: str) -> "_Grade | None":
        """Return the rating that a word says; None for another word."""
        text = word.strip()
        if (found := _FRACTION.fullmatch(text)) is not None:
            number, most = int(found[1]), int(found[3])
            return cls(number, most, {one: f"{one}{found[2]}{most}" for one in range(min(most, _MANY) + 1)})
        if (found := _STARS.fullmatch(text)) is None:
            return None
        filled, empty = (side.replace("\ufe0f", "") for side in found.groups())
        most = len(filled) + len(empty) if empty else max(len(filled), _MOST_STARS)
        return cls(len(filled), most, {one: filled[0] * one + empty[:1] * (most - one) for one in range(1, most + 1)})


def _proposed_grades(grades: Mapping[str, _Grade]) -> str:
    """Return options for ratings such as "4/5" or "★★★★", by the words for them.

    A side without a value is that of the whole scale, if there is one scale.
    """
    shares = {word: grade.number / grade.most for word, grade in grades.items()}
    some = next(iter(grades.values()))
    is_one_scale = all(grade.most == some.most for grade in grades.values())
    written = {number / some.most: word for number, word in some.words.items()} if is_one_scale else {}
    up = sorted(word for word, share in shares.items() if _is_good(share))
    down = sorted(word for word, share in shares.items() if _is_bad(share))
    up = up or [word for share, word in written.items() if _is_good(share)]
    down = down or [word for share, word in written.items() if _is_bad(share)]
    between = sorted(word for word, share in shares.items() if not _is_good(share) and not _is_bad(share))
    if not up or not down:
        return ""
    return f"--up {_option(up)} --down {_option(down)}" + (
        f", with {', '.join(between)} added to one of them" * bool(between)
    )


def _is_good(share: float) -> bool:
    return share >= 0.7


def _is_bad(share: float) -> bool:
    return share <= 0.4


def _proposed_words(words: Sequence[str]) -> str:
    """Return options for words; empty if their meaning is not clear."""
    known = {word: usual_label(word) for word in words}
    up = [word for word, label in known.items() if label is True]
    down = [word for word, label in known.items() if label is False]
    others = [word for word, label in known.items() if label is None]
    if len(others) == 2 and not up and not down and not any(map(_is_between, others)):
        return f"--up {_option(others[:1])} --down {_option(others[1:])} (or the other way round)"
    if len(others) == 1 and len(up + down) == 1 and not _is_between(others[0]):
        return f"--up {_option(up or others)} --down {_option(down or others)}"
    if not up or not down:
        return ""
    named = ", ".join(others) if len(others) <= 4 else "the others"
    added = f", with {named} added to one of them, or left out by a mapping (--map FILE) with `else: leave-out`"
    return f"--up {_option(up)} --down {_option(down)}{added if others else ''}"


def _is_between(word: str) -> bool:
    """Return whether a word says neither good nor bad: "mixed", "not rated", "-"."""
    return is_tie(word) or _BETWEEN.fullmatch(word.strip()) is not None


def _option(words: Sequence[str]) -> str:
    """Return words as the value of an option on a command line."""
    text = ",".join(words)
    return text if re.fullmatch(r"\w[\w,.+:/-]*|-1", text) else shlex.quote(text)
