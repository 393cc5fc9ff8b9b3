"""Convert labels, votes, ratings and several objectives to masses: how much speaks for a completion, and how much against it."""

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.labels import (
    COUNT,
    GRADED,
    UNANIMOUS,
    UNKNOWN,
    LabelRule,
    UnknownLabelError,
    has_no_value,
    number_in,
    usual_label,
)
from offline_kto.kto_core.feedback.left_out import (
    NO_WEIGHT,
    RATERS_DISAGREE,
    UNRATED,
    LeftOut,
    ObjectivesLeftOut,
    OneCountLeftOut,
)
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import is_printed, opened
from offline_kto.kto_core.judgements import Judgement, Masses

# Names of the two counts of votes, in a record or in an object.
COUNTS = (("up", "down"), ("upvotes", "downvotes"), ("votes_up", "votes_down"))
# The column with the labels of several raters, or with an object that has a label for each objective.
SEVERAL = "labels"
WEIGHT = "weight"
# Keys of an object that is one vote.
_VOTE_KEYS = ("label", "vote", "rating", "score", "value", "thumbs", "thumb", "reaction", "feedback")
# One vote, or none, as a table writes it.
_FLAGS = {"true": True, "false": False}
_FIRST_COUNTS = frozenset(names[0] for names in COUNTS)
_ALL_COUNTS = frozenset(name for names in COUNTS for name in names)
# A larger number of votes, or a larger weight, is a mistake.
_MOST = 2.0**53
_LONGEST_NAME = 200
# A list of labels that is not JSON.
_PRINTED = re.compile(r"\s*[\[(]\s*(?:(?:True|False|None|nan|[+-]?[\d.]+)(?:\s*,\s*|\s+|(?=[\])])))+[\])]\s*")
# Characters of a printed value that a message writes as JSON.
_LONGEST_PRINTED = 200

# The votes of a row: 1 for up, 0 for down, a share for a graded rating, each with the number of raters who gave it.
Ballots = tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The judgement of one row, and the votes that it comes from.

    Attributes:
        ballots: by the name of an objective, "" for the votes on the row as a whole; empty without votes.
        left_out: why an objective that has a value counts as not judged, by its name.
    """

    judgement: Judgement
    ballots: Mapping[str, Ballots] = field(default_factory=dict)
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    @property
    def label(self) -> bool:
        """Return whether the row counts as desirable."""
        return self.judgement.masses.label

    @property
    def is_label(self) -> bool:
        """Return whether a label says the same: there are no votes, and the row is one bit."""
        if self is _OF_LABEL[True] or self is _OF_LABEL[False]:
            return True
        return not self.ballots and not self.left_out and self.judgement.is_one_bit

    @property
    def is_decided(self) -> bool:
        """Return whether one mass is greater than the other."""
        good, bad = self.judgement.masses
        return good != bad


_OF_LABEL = {label: Reading(Judgement.of_label(label)) for label in (True, False)}


def of_label(label: bool) -> Reading:
    """Return the reading of one bit."""
    return _OF_LABEL[label]


def judge(rule: LabelRule, value: object, where: str, field: str, *, one: bool = False) -> Reading:
    """Return the reading of a value.

    Args:
        value: a label or a rating; a list with those of several raters; an object with two numbers of votes; or an object with
            a value of any of these kinds for each objective.
        field: name of the column or path, for errors.
        one: whether an object of objectives is refused.

    Raises:
        UnknownLabelError: a label that is neither up nor down.
        FeedbackError: a rating outside of its scale, or a number of votes that is none.
        LeftOut: no value, no votes, a rating between up and down, or raters who disagree under `--votes unanimous`.
    """
    if isinstance(value, bool) and not rule.graded:
        return of_label(rule.verdict(value, where, field))
    if isinstance(value, Reading):
        return value
    value = opened(value)
    if is_printed_label(value):
        raise FeedbackError(f"{where}: '{field}' is {quoted(value)}, as Python prints it. {_as_json(str(value))}")
    if isinstance(value, Mapping) and value and _counts_in(value) is None:
        if one:
            raise FeedbackError(
                f"{where}: '{field}' is {quoted(value)}, an object. If one of its values is the label, name it: --label-field "
                f"{field}.{_key_of_vote(value)}. Write labels of several objectives in a column '{SEVERAL}'."
            )
        return _of_objectives(rule, value, where, field)
    masses, ballots = _masses(rule, value, where, field)
    if not ballots and not rule.graded:  # of a label
        return of_label(masses.label)
    return Reading(Judgement(masses), {"": ballots} if ballots else {})


def counted_votes(rule: LabelRule, record: Mapping[str, object], where: str) -> Reading | None:
    """Return the reading of the numbers of votes in a record's columns; None without a value in them.

    Raises: see `judge`.
    """
    names = _counts_in(record)
    if names is None or all(has_no_value(record[name]) for name in names):
        return None
    for other in COUNTS:
        if other != names and all(name in record and not has_no_value(record[name]) for name in other):
            _check_same_counts(record, names, other, where)
    masses, ballots = _of_counts(rule, record, names, where, "")
    return Reading(Judgement(masses), {"": ballots} if ballots else {})


def _check_same_counts(
    record: Mapping[str, object], names: tuple[str, str], other: tuple[str, str], where: str
) -> None:
    if [number_in(record[name]) for name in names] != [number_in(record[name]) for name in other]:
        shown = [
            f"'{up}' and '{down}' are {quoted(record[up])} and {quoted(record[down])}" for up, down in (names, other)
        ]
        raise FeedbackError(
            f"{where}: {', but '.join(shown)}. Name those to read with --label-field '{{up: {names[0]}, down: {names[1]}}}', "
            "or correct them."
        )


def names_of_counts(record: Mapping[str, object]) -> tuple[str, ...]:
    """Return the columns with the numbers of votes; empty without them."""
    return () if _FIRST_COUNTS.isdisjoint(record) else _counts_in(record) or ()


def one_count(record: Mapping[str, object], where: str) -> OneCountLeftOut | None:
    """Return what is wrong with a record that has one of the two numbers of votes; None for any other record."""
    if _ALL_COUNTS.isdisjoint(record) or _counts_in(record) is not None:
        return None
    for names in COUNTS:
        for given, missing in (names, names[::-1]):
            if given in record and number_in(record[given]) is not None:
                return OneCountLeftOut(given, missing, _missing_count(given, record[given], missing, where))
    return None


def _missing_count(given: str, count: object, missing: str, where: str) -> FeedbackError:
    return FeedbackError(
        f"{where}: '{given}' is {quoted(count)}, but '{missing}' is missing. Votes need both numbers: write 0 if there are none."
    )


def weight_in(value: object, where: str, field: str) -> float:
    """Return the weight of a row.

    Raises:
        FeedbackError: it is no finite number of at least 0.
        LeftOut: it is 0.
    """
    weight = number_in(value)
    if weight is None or not 0 <= weight <= _MOST:
        raise FeedbackError(
            f"{where}: '{field}' is {quoted(value)}. A weight is a finite number of at least 0 and at most {_MOST:g}; a row of weight 0 "
            "is left out."
        )
    if weight == 0:
        raise LeftOut(NO_WEIGHT)
    return weight


def of_objectives(readings: Mapping[str, Reading | LeftOut]) -> Reading:
    """Return the reading of a row by those of its objectives, which count the same. Objectives that are not judged are left out.

    Args:
        readings: of an objective that is not judged, the reason.

    Raises:
        ObjectivesLeftOut: none is judged.
    """
    judged = {name: one for name, one in readings.items() if isinstance(one, Reading)}
    others = {name: one for name, one in readings.items() if isinstance(one, LeftOut)}
    if not judged:
        raise ObjectivesLeftOut(others)
    masses = {name: one.judgement.masses for name, one in judged.items()}
    total = Masses(*map(math.fsum, zip(*masses.values(), strict=True)))
    ballots = {name: one.ballots[""] for name, one in judged.items() if "" in one.ballots}
    return Reading(Judgement(total, masses), ballots, with_value(others))


def with_value(left_out: Mapping[str, LeftOut]) -> dict[str, LeftOut]:
    """Return the objectives that have a value, but are not judged by it: split votes, a rating between up and down."""
    return {name: one for name, one in left_out.items() if one.reason != UNRATED}


def _of_objectives(rule: LabelRule, values: Mapping[object, object], where: str, field: str) -> Reading:
    readings: dict[str, Reading | LeftOut] = {}
    unknown: list[UnknownLabelError] = []
    for name, value in values.items():
        check_objective(name, where)
        try:
            masses, ballots = _masses(rule, opened(value), where, f"{field}.{name}")
        except LeftOut as left:
            readings[str(name)] = left.with_traceback(None)  # whose frames would keep the record
        except UnknownLabelError as error:  # raised once all values of the record are counted
            unknown.append(UnknownLabelError(str(error), field, error.rule))
        else:
            readings[str(name)] = Reading(Judgement(masses), {"": ballots} if ballots else {})
    if unknown:
        raise unknown[0]
    return of_objectives(readings)


def check_objective(name: object, where: str) -> None:
    """Check that a key can name an objective, also on a command line. Raises: FeedbackError: it cannot."""
    fits = isinstance(name, str) and name.isprintable() and name.strip() == name and 0 < len(name) <= _LONGEST_NAME
    if not fits or set(str(name)) & set("=,"):
        raise FeedbackError(
            f"{where}: {quoted(name)} cannot be the name of an objective. Use printable text without '=', ',' and spaces at "
            "its ends."
        )


def is_printed_label(value: object) -> bool:
    """Return whether a text is a list or an object of labels as Python or NumPy prints it: "[True, None]", "(1, 0)", "[1 0]"."""
    return is_printed(value) or (isinstance(value, str) and _PRINTED.fullmatch(value) is not None)


def _masses(rule: LabelRule, value: object, where: str, field: str) -> tuple[Masses, Ballots]:
    """Return the masses of one value, and the votes in it."""
    if isinstance(value, list | tuple):
        return _of_raters(rule, value, where, field)
    if isinstance(value, Mapping) and value:
        names = _counts_in(value)
        if names is None:
            raise FeedbackError(
                f"{where}: '{field}' is {quoted(value)}. Write a label, a list of labels, or an object with the numbers of votes, "
                "`up` and `down`."
            )
        return _of_counts(rule, value, names, where, f"{field}.")
    return _of_share(_share(rule, value, where, field)), ()


def _counts_in(record: Mapping[str, object] | Mapping[object, object]) -> tuple[str, str] | None:
    return next((names for names in COUNTS if names[0] in record and names[1] in record), None)


def _of_counts(
    rule: LabelRule,
    record: Mapping[str, object] | Mapping[object, object],
    names: tuple[str, str],
    where: str,
    before: str,
) -> tuple[Masses, Ballots]:
    given = [record.get(name) for name in names]
    flags = [flag for value in given if (flag := _flag_in(value)) is not None]
    up, down = (
        map(float, flags)
        if len(flags) == 2
        else (_votes(value, where, f"{before}{name}") for name, value in zip(names, given, strict=True))
    )
    if up == down == 0:
        raise LeftOut(UNRATED, "no votes")
    if rule.votes == UNANIMOUS and up and down:
        raise LeftOut(RATERS_DISAGREE, f"{up:g} up, {down:g} down")
    ballots = tuple((share, int(count)) for share, count in ((1.0, up), (0.0, down)) if count)
    return _by_rule(rule, up, down), ballots


def is_count_of_votes(value: object) -> bool:
    """Return whether a value is a number of votes: a whole number, or true and false for one vote and none."""
    return _flag_in(value) is not None or _whole_number_in(value) is not None


def _flag_in(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def _whole_number_in(value: object) -> float | None:
    number = number_in(value)
    return number if number is not None and number.is_integer() and 0 <= number <= _MOST else None


def _votes(value: object, where: str, field: str) -> float:
    number = _whole_number_in(value)
    if number is None:
        raise FeedbackError(
            f"{where}: '{field}' is {quoted(value)}. Write a whole number of votes of at least 0 and at most {_MOST:g}, and 0 if there "
            "are none."
        )
    return number


def _of_raters(rule: LabelRule, values: Sequence[object], where: str, field: str) -> tuple[Masses, Ballots]:
    """Return the masses of the labels of several raters, or of ratings on a scale. A rater without a label does not vote."""
    rated = [one for one in values if not has_no_value(one)]
    if not rated:
        raise LeftOut(UNRATED)
    if (vote := next((one for one in rated if isinstance(one, Mapping)), None)) is not None:
        raise FeedbackError(
            f"{where}: '{field}' is a list of objects, {quoted(vote)}. Name what is the vote in them: --label-field "
            f"'{field}[].{_key_of_vote(vote)}'."
        )
    shares: list[float] = []
    between: LeftOut | None = None
    unknown: list[UnknownLabelError] = []
    for one in rated:
        try:
            shares.append(_share(rule, one, where, field))
        except LeftOut as left:
            between = left
        except UnknownLabelError as error:  # raised once the values of all raters are counted
            unknown.append(error)
    if unknown:
        raise unknown[0]
    if between is not None and (not shares or rule.votes == UNANIMOUS):
        raise between
    counts = Counter(shares)
    if rule.votes == UNANIMOUS and len(counts) > 1:
        raise LeftOut(RATERS_DISAGREE, quoted(rated))
    up = math.fsum(shares)
    return _by_rule(rule, up, len(shares) - up), tuple(counts.items())


def _key_of_vote(vote: Mapping[object, object]) -> str:
    """Return the key of an object that seems to have the vote."""
    usual = next((name for name in _VOTE_KEYS if not has_no_value(vote.get(name))), None)
    valued = [str(key) for key, value in vote.items() if usual_label(value) is not None]
    return usual or (valued[0] if len(valued) == 1 and valued[0].isidentifier() else "KEY")


def _by_rule(rule: LabelRule, up: float, down: float) -> Masses:
    """Return the masses of votes: their numbers under `--votes count`, otherwise their shares."""
    return Masses(up, down) if rule.votes == COUNT else Masses(up / (up + down), down / (up + down))


def _of_share(share: float) -> Masses:
    return Masses(share, 1 - share)


def _share(rule: LabelRule, value: object, where: str, field: str) -> float:
    """Return how desirable a value is, from 0 to 1."""
    if not rule.graded or has_no_value(value):
        return float(rule.verdict(value, where, field))
    least, most = rule.graded
    number = number_in(value)
    if number is None:
        rule.count(value, UNKNOWN)
        raise UnknownLabelError(
            f"{where}: '{field}' is {quoted(value)}, which is no number from {least:g} to {most:g}.", field, rule
        )
    if not least <= number <= most:
        raise FeedbackError(
            f"{where}: '{field}' is {quoted(value)}, which is not on the scale from {least:g} to {most:g}{rule.scale_from}. Correct "
            "the rating, or the scale."
        )
    rule.count(value, GRADED)
    return (number - least) / (most - least)


def _as_json(text: str) -> str:
    """Return how to write a value that Python has printed."""
    try:
        found = json.dumps(ast.literal_eval(text), ensure_ascii=False) if len(text) < _LONGEST_PRINTED else ""
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        found = ""
    return f"Write JSON{f': {found}' if found else ''} (json.dumps makes it), or save the data as JSON Lines."
