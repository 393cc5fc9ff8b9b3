"""Compare the sides of a preference pair with what the record says about them: ratings, ranks, verdicts and flags."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.labels import DECIMAL_COMMA, is_tie, number_in, usual_label
from offline_kto.kto_core.feedback.left_out import TIE, LeftOut
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import opened

_MARGIN = "margin"
# Objects with the rating of each side, or lists with both.
_BOTH_RATINGS = ("ratings", "scores", "rewards", "rating", "score", "reward")
# Columns with answers in an order of their own, in which such a list has their ratings.
_ORDERED = frozenset(("generations", "completions", "responses", "answers", "order"))
# What the two columns of a rating are called, besides the name of the rating.
_SIDES = (("chosen", "rejected"), ("Chosen", "Rejected"), ("CHOSEN", "REJECTED"))
_SHORT_SIDES = (("_c", "_r"), ("_w", "_l"))

# Kinds of numbers of the sides, by their names: those that rate neither; ranks, of which 1 is the best; single aspects; ratings.
_NO_RATING = re.compile(
    r"length|tokens?(?![a-z])|words|(?<!vote)(?<!votes)(?<!vote_)(?<!votes_)count|log_?p|logit|model|index|time|latency|cost|source|turn|"
    r"perplex|loss|(?<![a-z])(?:id|ids|ppl|min|max|std|var|num|n)(?![a-z])|down_?vote|dislike|harm(?!less)|toxic|error|bias|unsafe|confidence"
)
_RANK = re.compile(r"(?<![a-z])rank|(?<![a-z])place(?![a-z])")
_ASPECT = re.compile(
    r"helpful|correct|accura|coheren|honest|truthful|relevan|harmless|useful|utility|safe|complete|fluen|clarity|faithful|verbos|complex"
)
_RATING = re.compile(
    r"scor|rating|rated|reward|quality|vote|likes|grade|points|stars|overall|preference|win_?rate|(?<![a-z])(?:elo|wins?)(?![a-z])"
)

_BY = r"(?:(?:human|user|annotator|rater|judge|expert|crowd|majority|final|ai|llm|gpt4?|model)_)?"
_VERDICT = re.compile(
    rf"{_BY}(?:winner|preference|preferred|choice|verdict|vote|judge?ment|judge|better|best|picked|pick|selected|selection|decision|status)"
)
_STATUS = "status"  # which may be that of the record
_LONGEST_VERDICT = 30  # characters; a longer text is a reason
_TIE_FLAG = re.compile(r"(?:is_|was_)?(?:tie|tied|draw)")
_BETTER_FLAG = re.compile(r"(?:is_)?(chosen|rejected)_(?:is_|was_)?(?:better|best|preferred|winner|wins|won)")
# Words for the second of two answers, which may be those of another order than that of the columns.
_SECOND = re.compile(r"(?:(?:answer|response|completion|output|option|model|assistant)[_ -]?)?(?:b|2|second|right)")
# Flags that may say that the sides should be swapped: if true, and if false.
_SWAPPED = re.compile(r"(?:is_|was_)?(?:swap|swapped|flip|flipped|reversed|inverted)")
_AGREED = re.compile(r"(?:is_|was_)?(?:valid|correct|agree|agrees|agreed)")


class SideRatings(NamedTuple):
    """The two columns with a number of each side.

    Attributes:
        names: the columns of chosen and rejected.
        is_rank: whether the smaller number is the better one.
        is_aspect: whether it judges one aspect, in which the rejected side may be better.
    """

    names: tuple[str, str]
    is_rank: bool
    is_aspect: bool


@functools.lru_cache(maxsize=1024)
def ratings_of_sides(names: tuple[str, ...]) -> tuple[SideRatings, ...]:
    """Return the columns among some that rate both sides: `chosen_score` and `rejected_score`, `score_c` and `score_r`."""
    there = frozenset(names)
    return tuple(found for name in names if (found := _rating_of_chosen(name)) is not None and found.names[1] in there)


def _rating_of_chosen(name: str) -> SideRatings | None:
    for chosen, rejected in _SIDES:
        if chosen in name and name != chosen:
            return _kind(name.replace(chosen, "", 1), (name, name.replace(chosen, rejected, 1)))
    for chosen, rejected in _SHORT_SIDES:
        if name.endswith(chosen):
            rest = name.removesuffix(chosen)
            return _kind(rest, (name, rest + rejected))
    return None


def _kind(rest: str, names: tuple[str, str]) -> SideRatings | None:
    rest = _plain(rest)
    is_rank, is_aspect = _RANK.search(rest) is not None, _ASPECT.search(rest) is not None
    is_rating = is_aspect or _RATING.search(rest) is not None
    if _NO_RATING.search(rest) is not None or is_rank == is_rating:  # "rank_score" may have either direction
        return None
    return SideRatings(names, is_rank, is_aspect)


@functools.lru_cache(maxsize=4096)
def is_about_sides(name: str) -> bool:
    """Return whether a column may say which side of a pair is better, so that it is read beside `chosen` and `rejected`."""
    if name == _MARGIN or name in _BOTH_RATINGS or name in _ORDERED:
        return True
    if any(side in name for names in _SIDES for side in names) or name.endswith(("_c", "_r", "_w", "_l")):
        return True
    patterns = (_VERDICT, _TIE_FLAG, _BETTER_FLAG, _SWAPPED, _AGREED)
    return any(pattern.fullmatch(_plain(name)) is not None for pattern in patterns)


def is_verdict_on_sides(name: str) -> bool:
    """Return whether a column's name is that of a verdict on two answers, as `winner` is."""
    return _VERDICT.fullmatch(_plain(name)) is not None


def check_sides(present: Mapping[str, object], where: str, fields: FeedbackFields) -> None:
    """Compare a pair with its verdicts and ratings. Raises: LeftOut: a tie; FeedbackError: the rejected side is better."""
    for name, value in present.items():
        if (said := _said_by(name, value)) is None:
            continue
        if said in ("chosen", "tie"):
            fields.read.add(name)
        if said == "rejected":
            raise FeedbackError(
                f"{where}: '{name}' is {quoted(value)}, so 'rejected' is better than 'chosen'. Swap them, or remove '{name}' if it does "
                "not apply."
            )
        if said == "tie":
            raise LeftOut(TIE, f"'{name}' is {quoted(value)}")
    margin = _number(present, _MARGIN, _MARGIN, where)
    if margin is not None:
        fields.read.add(_MARGIN)
        if margin < 0:
            raise FeedbackError(
                f"{where}: '{_MARGIN}' is {quoted(present[_MARGIN])}, so 'rejected' is better than 'chosen'. Swap them, or remove "
                f"'{_MARGIN}' if it does not apply."
            )
    _check_ratings(present, where, fields)


def doubtful(record: Mapping[str, object]) -> list[str]:
    """Return the columns of a pair that may say that its rejected side is the better one, such as `swapped`."""
    if record.get("chosen") is None or record.get("rejected") is None:
        return []
    return [name for name, value in record.items() if _is_doubtful(name, value)]


def _is_doubtful(name: str, value: object) -> bool:
    if not isinstance(value, bool | int | float | str):
        return False
    plain = _plain(name)
    if _SWAPPED.fullmatch(plain) is not None:
        return usual_label(value) is True
    if _AGREED.fullmatch(plain) is not None:
        return usual_label(value) is False
    word = str(value).strip().lower()
    if plain == _STATUS:
        return word == "rejected"
    return _VERDICT.fullmatch(plain) is not None and _SECOND.fullmatch(word) is not None


def _said_by(name: str, value: object) -> str | None:
    """Return which side a column says to be better: "chosen", "rejected", "tie" for neither; None if it says nothing."""
    plain = _plain(name)
    if _TIE_FLAG.fullmatch(plain) is not None:
        return {True: "tie", False: "chosen", None: None}[usual_label(value)]
    if (flag := _BETTER_FLAG.fullmatch(plain)) is not None:
        label = usual_label(value)
        return None if label is None else flag[1] if label else ("rejected" if flag[1] == "chosen" else "chosen")
    if not isinstance(value, str) or len(value) > _LONGEST_VERDICT or _VERDICT.fullmatch(plain) is None:
        return None
    word = value.strip().lower()
    if word in ("chosen", "rejected"):
        return None if plain == _STATUS else word
    return "tie" if is_tie(value) else None


def _check_ratings(present: Mapping[str, object], where: str, fields: FeedbackFields) -> None:
    aspects: list[tuple[tuple[str, str], float, float]] = []
    is_rated = False
    for one, chosen, rejected in _ratings(present, where):
        fields.read.update(name.partition(".")[0].partition("[")[0] for name in one.names)
        if one.is_aspect:
            aspects.append((one.names, chosen, rejected))
            continue
        is_rated = True
        if chosen == rejected:
            raise LeftOut(TIE, f"both are {'ranked' if one.is_rank else 'rated'} {chosen:g}")
        if (chosen < rejected) is not one.is_rank:
            raise _contradiction(one.names, chosen, rejected, where, "ranked" if one.is_rank else "rated")
    against = [one for one in aspects if one[1] < one[2]]
    if against and not is_rated and not any(chosen > rejected for _, chosen, rejected in aspects):
        raise _contradiction(*against[0], where, "rated")


def _contradiction(names: tuple[str, str], chosen: float, rejected: float, where: str, how: str) -> FeedbackError:
    return FeedbackError(
        f"{where}: 'rejected' is {how} above 'chosen' ({names[1]} {rejected:g}, {names[0]} {chosen:g}). Swap them, "
        "or remove the ratings if they do not apply."
    )


def _ratings(present: Mapping[str, object], where: str) -> Iterator[tuple[SideRatings, float, float]]:
    """Yield (names, number of chosen, number of rejected) for each two numbers, in columns, in one object or in one list."""
    for one in ratings_of_sides(tuple(present)):
        chosen, rejected = (_number(present, name, name, where) for name in one.names)
        if chosen is not None and rejected is not None:
            yield one, chosen, rejected
    for name in _BOTH_RATINGS:
        both = opened(present[name]) if name in present else None
        names = (f"{name}.chosen", f"{name}.rejected")
        if isinstance(both, list) and len(both) == 2 and _ORDERED.isdisjoint(present):
            both = {"chosen": both[0], "rejected": both[1]}
            names = (f"{name}[0]", f"{name}[1]")
        if isinstance(both, Mapping):
            chosen, rejected = (
                _number(both, side, shown, where) for side, shown in zip(("chosen", "rejected"), names, strict=True)
            )
            if chosen is not None and rejected is not None:
                yield SideRatings(names, is_rank=False, is_aspect=False), chosen, rejected


def _number(ratings: Mapping[str, object], key: str, name: str, where: str) -> float | None:
    """Return the number at a key; None for other values. Raises: FeedbackError: a number with a decimal comma."""
    value = ratings.get(key)
    if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()) is not None:
        raise FeedbackError(f"{where}: '{name}' is {quoted(value)}. Write decimal numbers with a point.")
    return number_in(value)


@functools.lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    """Return a name as words in lower case: "chosenScore" and "chosen-score" as "chosen_score"."""
    return re.sub(r"[ .-]", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).lower().strip("_")
