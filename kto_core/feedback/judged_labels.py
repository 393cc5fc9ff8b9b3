"""Read the label of a record in a native format: one label, votes, ratings of a scale or several objectives, and the weight."""

import contextlib
import re
from collections.abc import Callable, Mapping
from functools import partial

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import LABELS, FeedbackFields, columns_in_words
from offline_kto.kto_core.feedback.judging import (
    SEVERAL,
    WEIGHT,
    Reading,
    counted_votes,
    is_printed_label,
    judge,
    names_of_counts,
    one_count,
    weight_in,
    with_value,
)
from offline_kto.kto_core.feedback.labels import UnknownLabelError, has_no_value, usual_label
from offline_kto.kto_core.feedback.left_out import UNRATED, LeftOut, ObjectivesLeftOut
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import opened
from offline_kto.kto_core.judgements import Judgement

# What separates the votes of several raters in a text.
_SEPARATOR = re.compile(r"\s*[,;|/]\s*")


def is_unrated(present: Mapping[str, object], where: str, fields: FeedbackFields) -> bool:
    """Return whether a record has no label in any column."""
    if fields.label is not None:
        return has_no_value(fields.label.find(present, where))
    if not all(has_no_value(present.get(name)) for name in (*LABELS, "rating")):
        return False
    several = opened(present.get(SEVERAL))
    return not names_of_counts(present) and not isinstance(several, list | dict) and not is_printed_label(several)


def judged_row(
    record: Mapping[str, object], present: Mapping[str, object], where: str, fields: FeedbackFields
) -> Reading:
    """Return what is read of a record that becomes one row.

    Args:
        present: its columns with a value.

    Raises:
        UnknownLabelError: a label that is neither up nor down.
        FeedbackError: labels or votes that contradict each other, a rating outside of its scale.
        LeftOut: there is no label; an `OneCountLeftOut` if one of two numbers of votes is missing.
    """
    if fields.label is not None:
        return judge(fields.rule, fields.label.find(present, where), where, fields.label.text)
    one, reading = one_count(record, where), None
    try:
        reading = _judged(record, present, where, fields)
    except LeftOut as left:
        if one is None or left.reason != UNRATED:
            raise
    if reading is None:
        assert one is not None
        raise one  # outside of `except`, whose error would be kept with this one
    if one is not None:
        fields.one_count.append((where, one))
    return reading


def _judged(record: Mapping[str, object], present: Mapping[str, object], where: str, fields: FeedbackFields) -> Reading:
    rule = fields.rule
    names: tuple[str, ...] = LABELS
    if rule.has_comparison or rule.graded:
        names = ("rating",) if "rating" in record else LABELS
        fields.compared.update(name for name in names if name in present)
    if SEVERAL in present or names_of_counts(record):
        several = opened(present.get(SEVERAL))
        if isinstance(several, list | tuple | dict) or is_printed_label(several) or names_of_counts(record):
            return _detailed(record, present, several, names, where, fields)
    there = [name for name in names if name in present]
    rated = [name for name in there if not has_no_value(present[name])] or there
    labels = {name: judge(rule, present[name], where, name, one=True) for name in rated}
    if len(labels) > 1 and len({one.label for one in labels.values()}) > 1:
        raise FeedbackError(f"{where}: 'label' and 'kto_tag' contradict each other. Remove one of them.")
    if labels:
        return next(iter(labels.values()))
    if "rating" in present and not has_no_value(present["rating"]):
        with contextlib.suppress(UnknownLabelError):
            fields.ratings.verdict(present["rating"], where, "rating")
        message = f"{where}: there is a rating, {quoted(present['rating'])}, but no label."
        if names[0] in record:
            message += f" To leave out records without a label, pass --label-field {names[0]}."
        raise UnknownLabelError(message, "rating", fields.ratings)
    _check_is_no_vote(present.get(SEVERAL), where)
    what = f"'{names[0]}' is empty" if names[0] in record else f"there is no '{names[0]}'"
    raise LeftOut(UNRATED, f"{what}; {columns_in_words(present)}")


def _check_is_no_vote(several: object, where: str) -> None:
    """Refuse a text or a number in the column of several labels that is a vote, or several of them, as "up, down" is."""
    parts = _SEPARATOR.split(several.strip()) if isinstance(several, str) else [several]
    if several is not None and all(usual_label(part) is not None for part in parts):
        raise FeedbackError(
            f"{where}: '{SEVERAL}' is {quoted(several)}, which is no list and no object. Write a list with a label of each rater as JSON; "
            f"if it is one label, pass --label-field {SEVERAL}, or call the column 'label'."
        )


def row_weight(record: Mapping[str, object], where: str, fields: FeedbackFields) -> float | None:
    """Return the weight of a record; None if it has no such column.

    Raises:
        FeedbackError: it is no weight, or has no value.
        LeftOut: it is 0.
    """
    if fields.weight is not None:
        return weight_in(fields.weight.find(record, where), where, fields.weight.text)
    if WEIGHT not in record:
        return None
    fields.read.add(WEIGHT)
    return weight_in(record[WEIGHT], where, WEIGHT)


def _detailed(
    record: Mapping[str, object],
    present: Mapping[str, object],
    several: object,
    names: tuple[str, ...],
    where: str,
    fields: FeedbackFields,
) -> Reading:
    """Return what is read of a record with votes or objectives, which may also have a label.

    Args:
        several: the labels of several raters, or an object with one for each objective; else not read.
        names: columns of labels.
    """
    rule = fields.rule
    found: dict[str, Reading] = {}
    unrated: list[LeftOut] = []

    def add(name: str, read: Callable[[], Reading | None]) -> None:
        try:
            reading = read()
        except LeftOut as left:
            if left.reason != UNRATED:
                raise
            unrated.append(left)
        else:
            if reading is not None:
                found[name] = reading

    for name in names:
        if name in present:
            add(name, partial(judge, rule, present[name], where, name, one=True))
    if not found or not (rule.has_comparison or rule.graded):  # a rating that options name counts before votes
        counts = names_of_counts(record)
        fields.read.update(counts)
        add("' and '".join(counts), partial(counted_votes, rule, record, where))
    objectives: Reading | None = None
    split: dict[str, LeftOut] = {}
    if isinstance(several, list | tuple | dict) or is_printed_label(several):
        fields.read.add(SEVERAL)
        try:
            add(SEVERAL, partial(judge, rule, several, where, SEVERAL))
        except ObjectivesLeftOut as left:
            if not found:
                raise
            split = with_value(left.objectives)
        if SEVERAL in found and found[SEVERAL].judgement.objectives:
            objectives = found.pop(SEVERAL)
    if found:
        return _with_objectives(_agreed(found, where), objectives, split)
    if objectives is not None:
        return objectives
    raise unrated[0] if unrated else LeftOut(UNRATED, f"no value; {columns_in_words(present)}")


def _agreed(found: Mapping[str, Reading], where: str) -> Reading:
    """Return the last of several readings, which are in the order of their detail. Raises: FeedbackError: a contradiction."""
    decided = {one.label: name for name, one in found.items() if one.is_decided}
    if len(decided) > 1:
        up, down = decided[True], decided[False]
        raise FeedbackError(
            f"{where}: '{up}' says that the answer is desirable, and '{down}' that it is not. Correct one of them, or remove the "
            "column that is not the feedback (--label-field names the one to read)."
        )
    return [*found.values()][-1]


def _with_objectives(own: Reading, objectives: Reading | None, split: Mapping[str, LeftOut]) -> Reading:
    """Return a row's own reading, with the masses of its objectives.

    Args:
        split: why none of them is judged although they have values, by name.
    """
    if objectives is None:
        return Reading(own.judgement, own.ballots, split) if split else own
    judgement = Judgement(own.judgement.masses, objectives.judgement.objectives)
    return Reading(judgement, {**objectives.ballots, **own.ballots}, objectives.left_out)
