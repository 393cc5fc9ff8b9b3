"""Decide from the values of feedback (words, thumbs, ratings) whether a completion is desirable."""

import functools
import json
import math
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.left_out import DEAD_ZONE, RATERS_DISAGREE, UNRATED, LeftOut
from offline_kto.kto_core.feedback.quoting import quoted

KeyT = TypeVar("KeyT")

_UP = (
    *("true", "1", "1.0", "yes", "y", "good", "desirable", "chosen", "preferred", "up", "upvote", "upvoted"),
    *("thumbsup", "thumbup", "like", "liked", "love", "positive", "accepted", "accept", "pass", "passed"),
    *("correct", "helpful", "wahr", "\U0001f44d", ":+1:"),
)
_DOWN = (
    *("false", "0", "0.0", "no", "n", "bad", "undesirable", "rejected", "reject", "down", "downvote", "downvoted"),
    *("thumbsdown", "thumbdown", "dislike", "disliked", "negative", "fail", "failed", "incorrect"),
    *("unhelpful", "falsch", "\U0001f44e", ":-1:"),
)
# The words that are labels, as `_word` writes them.
LABEL_WORDS: Final[Mapping[str, bool]] = {**dict.fromkeys(_UP, True), **dict.fromkeys(_DOWN, False)}

# Texts with which programs write a missing value.
_NO_VALUE = {"", "nan", "none", "null", "n/a", "na", "<na>", "unrated", "norating", "--", r"\n", "(null)", "<null>"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# A number that is refused with advice: it may also be two of them.
DECIMAL_COMMA: Final = re.compile(r"[+-]?[0-9]+,[0-9]+")
_COMPARISON = re.compile(r"(>=|<=|>|<|==|=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII)
_COMPARED: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "=": operator.eq,
}

# How Slack writes the skin tone of an emoji: ":+1::skin-tone-3:".
_SKIN_TONE = re.compile(r":skin-tone-\d:")

# Beginnings of verdicts on two answers that prefer neither.
_TIE = re.compile(r"tie|draw|both|equal|same|neither|neutral|similar|no[ _-]?preference", re.IGNORECASE)

# Names of columns whose numbers are usually on a scale from 1 to 5 or 10.
_RATING = re.compile(
    r"rating|(?<![a-z])stars?(?![a-z])|score|grade|points|likert|quality|(?<![a-z])(?:nps|csat)(?![a-z])", re.IGNORECASE
)

# Limit on the number of different values that are counted: a column of free text has one per row.
_SHORT = 30  # characters of a value that are shown
MOST_VALUES = 1000

# What happens to a value that is neither up nor down.
REFUSE, LEAVE_OUT, UP, DOWN = "refuse", "leave-out", "up", "down"
ELSE = (REFUSE, LEAVE_OUT, UP, DOWN)
# Destinations of a value besides UP and DOWN.
LEFT, GRADED, UNKNOWN = "left out", "graded", "unknown"

# What the votes of several raters become: their shares, their numbers, or nothing if they disagree.
SHARE, COUNT, UNANIMOUS = "share", "count", "unanimous"


class UnknownLabelError(FeedbackError):
    """A value that no rule knows.

    Attributes:
        field: the column or path.
        rule: the rule that has counted the field's values.
    """

    def __init__(self, message: str, field: str, rule: "LabelRule") -> None:
        super().__init__(message)
        self.field, self.rule = field, rule

    def about(self, field: str | None) -> "UnknownLabelError":
        """Return the error with another name of the field; the same error if there is none."""
        if field is None or field == self.field:
            return self
        return UnknownLabelError(str(self).replace(f"'{self.field}'", f"'{field}'", 1), field, self.rule)

    def of_pair(self) -> "UnknownLabelError":
        """Return the error about a value that should name the better one of two answers."""
        return UnknownLabelError(
            str(self).replace("is neither up nor down", "names neither answer"), self.field, self.rule
        )


@dataclass(frozen=True)
class LabelRule:
    """Which values are desirable (up), which are undesirable (down), and what happens to all others.

    Attributes:
        up, down: a word, a number, true or false, or a comparison such as ">=4". Both empty for the usual words.
        scale: the lowest and the highest number of the scale; other numbers are unknown. Empty for any.
        otherwise: REFUSE, LEAVE_OUT, UP or DOWN; numbers between comparisons are left out unless it is UP or DOWN.
        graded: the ratings that are wholly undesirable and wholly desirable; all values are then ratings. Empty for labels.
        scale_from: after `graded` in errors, where it comes from; empty where there is no doubt.
        votes: SHARE, COUNT or UNANIMOUS, for several raters (`judging.judge`).
        seen: how often a value was seen, by (value, UP, DOWN, LEFT, GRADED or UNKNOWN); for the plan.
        numbers: numbers that were read as the usual words for up and down, 1 and 0, by field; None for any other value.
        most: limit on the number of different values in `seen`.
    """

    up: tuple[object, ...] = ()
    down: tuple[object, ...] = ()
    otherwise: str = REFUSE
    scale: tuple[float, ...] = ()
    graded: tuple[float, ...] = ()
    scale_from: str = field(default="", compare=False)
    votes: str = SHARE
    seen: Counter[tuple[str, str]] = field(default_factory=Counter, compare=False, repr=False)
    numbers: dict[str, set[float | None]] = field(default_factory=dict, compare=False, repr=False)
    most: int = field(default=MOST_VALUES, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, values in (("up", self.up), ("down", self.down)):
            for value in values:
                if not isinstance(value, bool | int | float | str) or value == "":
                    raise ConfigError(f"{name}: a word, a number or a comparison such as >=4, got {quoted(value)}.")
        both = [value for value in self.up if not is_comparison(value) and matches(value, self.down)]
        if both:
            raise ConfigError(f"{quoted(both[0])} is in up and in down. Remove it from one of them.")
        if self.otherwise not in ELSE:
            raise ConfigError(f"else: one of {', '.join(ELSE)}, got {quoted(self.otherwise)}.")

    @classmethod
    def at_least(cls, threshold: float) -> "LabelRule":
        """Return the rule of `--rating-threshold`."""
        return cls(up=(f">={threshold!r}",), down=(f"<{threshold!r}",))

    @property
    def has_comparison(self) -> bool:
        """Return whether values are numbers on a scale."""
        return any(map(is_comparison, (*self.up, *self.down)))

    def verdict(self, value: object, where: str, field: str) -> bool:
        """Return whether a value means desirable.

        Args:
            value: as read; of several raters, a list of their values.
            field: name of the column or path, for errors.

        Raises:
            UnknownLabelError: a value that is neither up nor down, unless `otherwise` decides.
            LeftOut: no value, a number in the dead zone, raters who disagree.
            ConfigError: a value that is up and down.
        """
        if isinstance(value, list | tuple):
            found = {self.verdict(one, where, field) for one in value if not has_no_value(one)}
            if len(found) > 1:
                raise LeftOut(RATERS_DISAGREE, quoted(value))
            if found:
                return found.pop()
            raise LeftOut(UNRATED)
        if has_no_value(value):
            self.count(None, LEFT)
            raise LeftOut(UNRATED)
        number = number_in(value)
        if number is not None and self.scale and not self.scale[0] <= number <= self.scale[1]:
            self.count(value, UNKNOWN)
            raise UnknownLabelError(
                f"{where}: '{field}' is {quoted(value)}, which is not on the scale from {self.scale[0]:g} to "
                f"{self.scale[1]:g}.",
                field,
                self,
            )
        known = self._known(value, where, field)
        if known is None and self.otherwise in (UP, DOWN):
            known = self.otherwise == UP
        if known is not None:
            self.count(value, UP if known else DOWN)
            if not self.up and not self.down:
                self.numbers.setdefault(field, set()).add(number_in(value))
            return known
        if self.otherwise == LEAVE_OUT or (self.has_comparison and number is not None):
            self.count(value, LEFT)
            raise LeftOut(DEAD_ZONE, quoted(value))
        self.count(value, UNKNOWN)
        raise UnknownLabelError(f"{where}: '{field}' is {quoted(value)}, which is neither up nor down.", field, self)

    def unclear_rating(self) -> str | None:
        """Return a field that is named like a rating and has the value 1 only: the best of 0 and 1, or the worst of 1 to 5."""
        fields = (name for name, numbers in self.numbers.items() if numbers == {1.0} and is_rating_name(name))
        return next(fields, None)

    def count(self, value: object, destination: str) -> None:
        """Count a value by where it goes."""
        if value is None:
            shown = "(none)"
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < _SHORT):
            shown = _shown(type(value).__name__, value)
        else:
            shown = quoted(value, _SHORT)
        count_first(self.seen, (shown, destination), self.most)

    def merge(self, seen: Counter[tuple[str, str]], numbers: Mapping[str, set[float | None]]) -> None:
        """Add what the same rule has counted, without a limit, in rows that come after all others."""
        for value, count in seen.items():
            count_first(self.seen, value, self.most, count)
        for name, values in numbers.items():
            self.numbers.setdefault(name, set()).update(values)

    def _known(self, value: object, where: str, field: str) -> bool | None:
        if not self.up and not self.down:
            return usual_label(value)
        up, down = matches(value, self.up), matches(value, self.down)
        if up and down:
            raise ConfigError(
                f"{where}: '{field}' is {quoted(value)}, which is up ({_listed(self.up)}) and down ({_listed(self.down)}). "
                "Change one of them so that no value is both."
            )
        return up if up or down else None


def count_first(counts: Counter[KeyT], key: KeyT, most: int, count: int = 1) -> None:
    """Add to the count of a key that is among the first different ones.

    Args:
        most: number of keys that are counted.
    """
    if len(counts) < most or key in counts:
        counts[key] += count


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


@functools.lru_cache(maxsize=1024)
def _shown(kind: str, value: bool | int | float | str) -> str:
    """Return a value as the plan shows it; `kind` tells 1 from true."""
    return quoted(value, _SHORT)


def is_rating_name(name: str) -> bool:
    """Return whether a column's numbers are usually on a scale, by its name."""
    return _RATING.search(name) is not None


def usual_label(value: object) -> bool | None:
    """Return what a bool, 1 or 0, or one of the usual words means; None for any other value.

    A value is never a label because it is not empty or not zero.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    return LABEL_WORDS.get(_word(value)) if isinstance(value, str) else None


def has_no_value(value: object) -> bool:
    """Return whether a value means unrated: None, NaN, an empty text, "N/A" and similar texts, an empty list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return value.strip().lower() in _NO_VALUE
    return isinstance(value, list | tuple | dict) and not value


def holds(value: object) -> bool:
    """Return whether a condition is true, or a column has any content; of a list whether one of its values does.

    Tables write what is false, and what is empty, as text: "[]", "false". An object must have a value, whatever it is.
    """
    found = _unwritten(value)
    if isinstance(found, list | tuple):
        return any(map(holds, found))
    if isinstance(found, Mapping):
        return not _is_blank(found)
    return not has_no_value(found) and bool(found) and not (isinstance(found, str) and found.strip().lower() == "false")


def _is_blank(value: object) -> bool:
    found = _unwritten(value)
    if isinstance(found, list | tuple):
        return all(map(_is_blank, found))
    if isinstance(found, Mapping):
        return all(map(_is_blank, found.values()))
    return has_no_value(found) or found == b""


def _unwritten(value: object) -> object:
    """Return the list or the object in a JSON text; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_tie(value: object) -> bool:
    """Return whether a verdict on two answers prefers neither: "tie (bothbad)", "equal", a number in between."""
    number = number_in(value)
    if number is not None:
        return 0 < number < 1
    return isinstance(value, str) and _TIE.match(value.strip()) is not None


def number_in(value: object) -> float | None:
    """Return a finite float, or None. Text must be a decimal number: float() would also accept "nan" and "1_0".

    A percentage is the number before the sign.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        value = value.strip().removesuffix("%")
        if _NUMBER.fullmatch(value) is None:
            return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 300 digits
        return None
    return number if math.isfinite(number) else None


def _word(text: str) -> str:
    """Return a word in normal form: "Thumbs Up", ":thumbs_up:" and "thumbsUp" are the same; skin tones are removed."""
    text = _SKIN_TONE.sub("", text.strip().lower())
    if any(c.isdigit() for c in text):  # a sign is part of a number: ":-1:" is not 1
        return text
    return "".join(c for c in text if c not in " _-:" and not _is_variant(c))


def _is_variant(character: str) -> bool:
    return "\U0001f3fb" <= character <= "\U0001f3ff" or unicodedata.category(character) == "Mn"


def is_comparison(value: object) -> bool:
    """Return whether a value of --up or --down is a comparison, such as ">=4"."""
    return isinstance(value, str) and _COMPARISON.fullmatch(value.strip()) is not None


def matches(value: object, wanted: Sequence[object]) -> bool:
    """Return whether a value is one of those of --up or --down."""
    return any(_is_one(value, one) for one in wanted)


def _is_one(value: object, wanted: object) -> bool:
    compared = _COMPARISON.fullmatch(wanted.strip()) if isinstance(wanted, str) else None
    number = number_in(value)
    if compared is not None:
        return number is not None and _COMPARED[compared[1]](number, float(compared[2]))
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted or (str(value).lower() == str(wanted).strip().lower())
    other = number_in(wanted)
    if number is not None or other is not None:
        return number == other
    return isinstance(value, str) and _word(value) == _word(str(wanted))


# A class with a smaller share of the rows is nearly absent: 1 in 20 is far from the published 1:1 to 4:3.
_RARE = 0.05


def rare_class(desirable: int, undesirable: int) -> str | None:
    """Return a sentence about a class that is nearly absent; None if neither is, or if one is missing altogether."""
    rarer, total = min(desirable, undesirable), desirable + undesirable
    if not rarer or rarer >= _RARE * total:
        return None
    name = "desirable" if desirable < undesirable else "undesirable"
    return f"only {rarer:,} of {total:,} rows are {name} ({rarer / total:.1%})."
