"""Read a conversation in which messages of the assistant are judged: by a key of the message, or by a list of labels.

--label-field may name the key; a value in the record itself counts first.
"""

from collections.abc import Mapping

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import LABELS, FeedbackFields
from offline_kto.kto_core.feedback.conversations import check_completion, with_system
from offline_kto.kto_core.feedback.exports import opened
from offline_kto.kto_core.feedback.labels import has_no_value
from offline_kto.kto_core.feedback.left_out import UNRATED, LeftOut
from offline_kto.kto_core.feedback.messages import Message, as_conversation


def judged_messages(
    present: Mapping[str, object], where: str, fields: FeedbackFields
) -> list[tuple[tuple[Message, ...], tuple[Message, ...], bool]] | None:
    """Return (prompt, completion, label) for each judged turn; None if no turn of the record is judged by itself."""
    name = "messages" if "messages" in present else "conversations"
    turns = opened(present.get(name))
    if fields.completion is not None or not isinstance(turns, list | tuple):
        return None
    keys = [key for key in ("label", "feedback", "rating", "kto_tag") if any(_has(one, key) for one in turns)]
    outer = [key for key in (*LABELS, "rating") if key in present]
    verdicts: list[object]
    named = fields.label
    if named is not None:
        if not has_no_value(named.find(present, where)):
            return None
        verdicts = [named.find(one, where) if isinstance(one, Mapping) else None for one in turns]
        if all(map(has_no_value, verdicts)):
            return None
        keys = [named.text, *(route[0] for one in turns if isinstance(one, Mapping) for route in named.routes(one))]
    elif keys:
        if outer or len(keys) > 1:
            raise FeedbackError(
                f"{where}: {', '.join(map(repr, [*outer, *(f'{key} of messages' for key in keys)]))}: only one of "
                "them can be the label. Keep one, or describe the file with --map."
            )
        verdicts = [one.get(keys[0]) if isinstance(one, Mapping) else None for one in turns]
    elif isinstance(present.get("labels"), list) and not outer:
        labels = list(present["labels"])  # type: ignore[call-overload]
        answers = [i for i, one in enumerate(turns) if as_conversation([one], where, name)[-1]["role"] == "assistant"]
        if len(labels) != len(answers):
            raise FeedbackError(
                f"{where}: {len(labels)} 'labels' for {len(answers)} answers of the assistant. Give one for each; null "
                "where nobody rated."
            )
        by_turn = dict(zip(answers, labels, strict=True))
        verdicts = [by_turn.get(i) for i in range(len(turns))]
    else:
        return None
    rows = []
    for number, value in enumerate(verdicts):
        if has_no_value(value):
            continue
        before = as_conversation(turns[:number], where, name) if number else ()
        judged = as_conversation([_without(turns[number], keys)], where, name)
        prompt = with_system(tuple(_without(one, keys) for one in before), present, where)
        if not prompt or judged[-1]["role"] != "assistant":
            raise FeedbackError(
                f"{where}: message {number + 1} of '{name}' has a label, but is not an answer of the assistant to a message."
            )
        check_completion(judged, where, name)
        assert not isinstance(prompt, str)
        rows.append((prompt, judged, fields.rule.verdict(value, where, keys[0] if keys else "labels")))
    if not rows:
        raise LeftOut(UNRATED)
    return rows


def _has(message: object, key: str) -> bool:
    return isinstance(message, Mapping) and message.get(key) is not None and not isinstance(message[key], dict)


def _without(message: object, keys: list[str]) -> Message:
    assert isinstance(message, Mapping)
    return {key: value for key, value in message.items() if key not in keys}
