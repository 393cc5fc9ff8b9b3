"""Read a conversation in which messages of the assistant are judged: by a key of the message, or by a list of labels.

--label-field may name the key; a value in the record itself counts first.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import COMPLETIONS, CONVERSATIONS, LABELS, FeedbackFields
from offline_kto.kto_core.feedback.conversations import check_completion, with_system
from offline_kto.kto_core.feedback.foreign_messages import message_of_pair
from offline_kto.kto_core.feedback.judging import SEVERAL, Reading, judge, names_of_counts
from offline_kto.kto_core.feedback.labels import UnknownLabelError, has_no_value
from offline_kto.kto_core.feedback.left_out import UNRATED, LeftOut
from offline_kto.kto_core.feedback.message_keys import ROLES
from offline_kto.kto_core.feedback.message_order import check_oldest_first
from offline_kto.kto_core.feedback.message_trees import check_is_list
from offline_kto.kto_core.feedback.messages import Message, as_conversation
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import opened

# Keys of a message that are its label. A score beside a label of the record may be something else, such as a similarity.
_KEYS = ("label", "feedback", "rating", "kto_tag", "thumbs", "thumb", "vote", "reaction")
_KEYS_ALONE = ("score",)
# Keys of a label that is an object, as in {"rating": "up", "comment": "..."}.
_INNER = ("rating", "score", "value", "label", "thumbs", "thumb", "vote", "reaction")


class JudgedTurn(NamedTuple):
    """A message that is judged by itself.

    Attributes:
        number: of the message in its conversation, from 0.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    reading: Reading
    number: int


def judged_messages(present: Mapping[str, object], where: str, fields: FeedbackFields) -> list[JudgedTurn] | None:
    """Return the judged turns; None if no turn of the record is judged by itself."""
    has_answer = any(one in present for one in COMPLETIONS)
    names = CONVERSATIONS[:2] if has_answer else CONVERSATIONS  # beside an answer, `conversation` is often its source
    name = next((one for one in names if one in present), CONVERSATIONS[0])
    turns = opened(present.get(name))
    if fields.completion is not None or not isinstance(turns, list | tuple):
        return None
    turns = [message_of_pair(one) or one for one in turns]
    found = _by_message(present, turns, where, fields)
    if found is not None:
        fields.read.add(f"{name}[].{found[0]}")
    else:
        found = _by_list(present, name, turns, where, fields)
    if found is None:
        return None
    field, verdicts = found
    check_is_list(turns, where, name, own_label=field)
    check_oldest_first(turns, where, name)
    return _rows(present, name, turns, field, verdicts, where, fields)


def _by_message(
    present: Mapping[str, object], turns: Any, where: str, fields: FeedbackFields
) -> tuple[str, list[object]] | None:
    """Return (key, the value of each message) if messages have labels of their own."""
    if fields.label is not None:
        if not has_no_value(fields.label.find(present, where)):
            return None
        values = [fields.label.find(one, where) if isinstance(one, Mapping) else None for one in turns]
        return None if all(map(has_no_value, values)) else (fields.label.text, values)
    there = {key for one in turns if isinstance(one, Mapping) for key in one}
    if there.isdisjoint((*_KEYS, *_KEYS_ALONE)):
        return None
    outer = {repr(key): key for key in (*LABELS, "rating", SEVERAL) if key in present}
    if counts := names_of_counts(present):
        up, down = counts
        outer[f"{up!r} and {down!r}"] = f"'{{up: {up}, down: {down}}}'"
    keys = [key for key in _KEYS if any(_label_of(one, key, where) is not None for one in turns)]
    if not keys and not outer:
        keys = [key for key in _KEYS_ALONE if any(_label_of(one, key, where) is not None for one in turns)]
    if not keys:
        return None
    if outer or len(keys) > 1:
        options = " or ".join(f"--label-field {name}" for name in dict.fromkeys((*outer.values(), *keys)))
        raise FeedbackError(
            f"{where}: {', '.join([*outer, *(repr(f'{key} of messages') for key in keys)])}: only one of "
            f"them can be the label. Pass {options}, or describe the file with --map FILE."
        )
    return keys[0], [_label_of(one, keys[0], where) for one in turns]


def _label_of(message: object, key: str, where: str) -> object:
    """Return the label of a message; None without one."""
    value = message.get(key) if isinstance(message, Mapping) else None
    if not isinstance(value, Mapping):
        return None if has_no_value(value) else value
    there = [name for name in _INNER if not has_no_value(value.get(name))]
    if len(there) > 1:
        raise FeedbackError(
            f"{where}: the {key!r} of a message has {' and '.join(map(repr, there))}. Choose one with --label-field "
            f"{key}.{there[0]}."
        )
    return value[there[0]] if there else None


def _by_list(
    present: Mapping[str, object], name: str, turns: Any, where: str, fields: FeedbackFields
) -> tuple[str, list[object]] | None:
    """Return (`SEVERAL`, the value of each message) if the record lists the labels of its answers."""
    column = next((key for key in LABELS if key in present), SEVERAL) if fields.label is None else fields.label.text
    labels = opened(present.get(column) if fields.label is None else fields.label.find(present, where))
    beside = opened(present.get(SEVERAL)) if fields.label is None and column != SEVERAL else None
    if not isinstance(labels, list) and not isinstance(beside, list):
        return None
    answers = [i for i, one in enumerate(turns) if as_conversation([one], where, name)[-1]["role"] == "assistant"]
    if isinstance(beside, list) and len(beside) == len(answers) > 1:
        raise FeedbackError(
            f"{where}: {column!r} judges one answer, and {SEVERAL!r}, {quoted(beside)}, has a value for each answer of the "
            f"conversation: only one of them can be read. Pass --label-field {SEVERAL} or --label-field {column}."
        )
    if not isinstance(labels, list):
        return None
    if column != SEVERAL:
        if len(labels) == len(answers) > 1:
            raise FeedbackError(
                f"{where}: {column!r} is a list of {len(labels)}, {quoted(labels)}, and the conversation has as many answers. "
                "Call the column 'labels' if each value judges one answer; if several people judged the last answer, describe the "
                "file with --map FILE."
            )
        return None
    if len(answers) == 1 < len(labels):  # of several raters
        return None
    if len(labels) != len(answers):
        raise FeedbackError(
            f"{where}: {len(labels)} {SEVERAL!r} for {len(answers)} answers of the assistant. Give one for each; null "
            "where nobody rated."
        )
    by_turn = dict(zip(answers, labels, strict=True))
    return SEVERAL, [by_turn.get(i) for i in range(len(turns))]


def _rows(
    present: Mapping[str, object],
    name: str,
    turns: Any,
    field: str,
    verdicts: list[object],
    where: str,
    fields: FeedbackFields,
) -> list[JudgedTurn]:
    rows: list[JudgedTurn] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise FeedbackError(
                f"{where}: message {number} of '{name}' must be an object if messages have labels, got {quoted(turn)}."
            )
    keys = {field, *(route[0] for one in turns if isinstance(one, Mapping) for route in _routes(one, fields))}
    unknown: list[UnknownLabelError] = []
    for number, value in enumerate(verdicts):
        if has_no_value(value):
            continue
        before = as_conversation(turns[:number], where, name) if number else ()
        judged = as_conversation([_without(turns[number], keys)], where, name)
        asked = 0 if len(judged) == 1 else next((i for i, one in enumerate(judged) if one["role"] == "assistant"), 0)
        before, judged = (*before, *judged[:asked]), judged[asked:]  # a turn may have the question as well
        prompt = with_system(tuple(_without(one, keys) for one in before), present, where)
        role = judged[-1]["role"]
        if not prompt or role != "assistant":
            unknown_role = (
                f' Its role, {quoted(role)}, is not a known one: if it is the model\'s, write "assistant" in its place, or name it under '
                "`roles` of `turns` in a mapping (--map FILE)."
            )
            raise FeedbackError(
                f"{where}: message {number + 1} of '{name}' has a label, but is not an answer of the assistant to a message."
                f"{'' if role in ROLES.values() else unknown_role}"
            )
        check_completion(judged, where, name)
        assert not isinstance(prompt, str)
        try:
            rows.append(JudgedTurn(prompt, judged, judge(fields.rule, value, where, field), number))
        except UnknownLabelError as error:  # raised once all values of the record are counted
            unknown.append(error)
    if unknown:
        raise unknown[0]
    if not rows:
        raise LeftOut(UNRATED)
    return rows


def _routes(message: Mapping[str, object], fields: FeedbackFields) -> Iterable[Sequence[str]]:
    """Return the keys on the way to the value that --label-field names in a message."""
    return () if fields.label is None else fields.label.routes(message)


def _without(message: Mapping[str, object], keys: Collection[str]) -> Message:
    return {key: value for key, value in message.items() if key not in keys}
