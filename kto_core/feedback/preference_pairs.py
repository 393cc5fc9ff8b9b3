"""Read a preference pair: two answers to one prompt, of which the chosen one is better."""

from collections.abc import Mapping

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import (
    LABELS,
    FeedbackFields,
    is_alpaca,
    prompt_value,
    prompt_with_system,
    refuse_other_prompt,
)
from offline_kto.kto_core.feedback.conversations import (
    alpaca_prompt,
    check_completion,
    join_sides,
    shared_beginning,
    with_system,
)
from offline_kto.kto_core.feedback.json_values import canonical_json
from offline_kto.kto_core.feedback.left_out import SAME_ANSWERS, LeftOut
from offline_kto.kto_core.feedback.messages import Turns, as_conversation, as_turns
from offline_kto.kto_core.feedback.pair_verdicts import check_sides
from offline_kto.kto_core.feedback.paths import Path, key_path
from offline_kto.kto_core.feedback.quoting import quoted


def is_pair(record: Mapping[str, object], fields: FeedbackFields) -> bool:
    if fields.completion is not None and _has_value(fields.completion, record):
        return False
    return record.get("chosen") is not None and record.get("rejected") is not None


def check_sides_are_answers(record: Mapping[str, object], where: str) -> None:
    """Refuse a pair whose sides are the names of other columns: "A" and "B" beside `answer_a` and `answer_b`.

    Args:
        record: with all its columns.
    """
    named: list[str] = []
    for side in ("chosen", "rejected"):
        value = record.get(side)
        name = str(value).strip().lower() if isinstance(value, str | int) else ""
        ends = tuple(f"{mark}{name}" for mark in "_- ")
        found = [
            key
            for key in record
            if key not in ("chosen", "rejected") and (key.lower() == name or key.lower().endswith(ends))
        ]
        if not name or len(found) != 1 or record[found[0]] in (None, ""):
            return
        named += found
    chosen, rejected = record["chosen"], record["rejected"]
    if named[0] != named[1]:
        raise FeedbackError(
            f"{where}: 'chosen' is {quoted(chosen)} and 'rejected' is {quoted(rejected)}, which seem to name the columns "
            f"{named[0]!r} and {named[1]!r}. Describe the file with --map FILE: `pair: {{a: {key_path(named[0])}, b: "
            f"{key_path(named[1])}, better: chosen, a_when: [{quoted(chosen)}], b_when: [{quoted(rejected)}]}}` and the path of the "
            "prompt."
        )


def _has_value(path: Path, record: Mapping[str, object]) -> bool:
    try:
        return path.find(record, "") is not None
    except FeedbackError:  # reported with its place where the completion is read
        return True


def pair_in(present: Mapping[str, object], where: str, fields: FeedbackFields) -> tuple[Turns, tuple[Turns, ...]]:
    for name in ("completion", *LABELS):
        if name in present:
            raise FeedbackError(
                f"{where}: the record has '{name}' as well as 'chosen' and 'rejected'. Remove one or the other, or pass"
                f" --completion-field {'completion' if name == 'completion' else 'chosen (or rejected)'}."
            )
    chosen = as_turns(present["chosen"], where, "chosen")
    rejected = as_turns(present["rejected"], where, "rejected")
    if canonical_json(chosen, where) == canonical_json(rejected, where):  # as JSON: to Python, 1 and true are the same
        raise LeftOut(SAME_ANSWERS)
    check_sides(present, where, fields)
    prompt = _pair_prompt(present, where, fields)
    answers: tuple[Turns, ...]
    if prompt is None:
        prompt, answers = shared_beginning(chosen, rejected, where)
    else:
        prompt = prompt_with_system(prompt, present, where, fields)
        prompt, answers = join_sides(prompt, [("chosen", chosen), ("rejected", rejected)], where)
    if canonical_json(answers[0], where) == canonical_json(
        answers[1], where
    ):  # visible only now if one side repeats the prompt
        raise LeftOut(SAME_ANSWERS)
    check_completion(answers[0], where, "chosen")
    check_completion(answers[1], where, "rejected")
    return prompt if is_alpaca(present, fields) else with_system(prompt, present, where), answers


def _pair_prompt(present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns | None:
    found = prompt_value(present, where, fields)
    if found is not None:
        refuse_other_prompt(present, found[0], where, fields)
        return as_turns(found[1], where, found[0])
    if is_alpaca(present, fields):
        return alpaca_prompt(present, where, conversation=fields.chat_template)
    for name in ("conversations", "messages"):
        if name in present:
            messages = as_conversation(present[name], where, name)
            # A conversation that ends in an answer is not the prompt: some datasets repeat the chosen side there.
            return messages if messages[-1]["role"] != "assistant" else None
    return None
