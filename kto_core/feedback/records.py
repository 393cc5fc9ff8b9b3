"""Convert a record of a feedback file to its labelled rows: one, the two of a preference pair, or one per judged turn.

The format is detected for each record, so a file may mix formats. They are tried in this order:

    the column of --completion-field      prompt, completion, label
    chosen + rejected                     a pair; its prompt is in prompt, instruction, conversations or
                                          messages, or else is their common beginning
    completion (response, answer)         prompt (question, query), completion, label
    messages, conversations (ShareGPT),
    conversation (ms-swift)               the last message is the completion; or the turns that are judged
    instruction + output (Alpaca)         with input, system and history

A key with the value None counts as absent, because tables have all columns in all rows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.chat_markers import as_chat
from offline_kto.kto_core.feedback.columns import (
    CALLS,
    COLUMNS,
    COMPLETIONS,
    CONVERSATIONS,
    LABELS,
    MEDIA_COLUMNS,
    PROMPTS,
    FeedbackFields,
    columns_in_words,
    is_alpaca,
    one_of,
    prompt_value,
    prompt_with_system,
    refuse_another,
    refuse_other_prompt,
)
from offline_kto.kto_core.feedback.conversations import (
    alpaca_prompt,
    check_completion,
    join_sides,
    split_at_results,
    split_conversation,
    with_system,
    without_last_results,
)
from offline_kto.kto_core.feedback.foreign_messages import messages_in_columns
from offline_kto.kto_core.feedback.json_values import canonical_json, check_text, template_kwargs_in, tools_in
from offline_kto.kto_core.feedback.judged_labels import is_unrated, judged_row, row_weight
from offline_kto.kto_core.feedback.judged_messages import JudgedTurn, judged_messages
from offline_kto.kto_core.feedback.judging import Reading, of_label
from offline_kto.kto_core.feedback.labels import holds
from offline_kto.kto_core.feedback.left_out import EMPTY, MEDIA, NO_PROMPT, UNRATED, LeftOut
from offline_kto.kto_core.feedback.message_keys import ROLES
from offline_kto.kto_core.feedback.message_trees import check_is_list
from offline_kto.kto_core.feedback.messages import Message, MisreadMessagesError, Turns, as_conversation, as_turns
from offline_kto.kto_core.feedback.own_answers import another_answer, is_own_answer
from offline_kto.kto_core.feedback.pair_proposals import proposed_pair
from offline_kto.kto_core.feedback.paths import key_path
from offline_kto.kto_core.feedback.preference_pairs import is_pair, pair_in
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import is_printed, opened
from offline_kto.kto_core.feedback.tool_calls import are_tool_calls, has_tool_calls
from offline_kto.kto_core.judgements import Judgement, Masses

# Keys that say something about a message and are no part of it.
_ABOUT = ("id", "label", "feedback", "rating", "score", "model", "created_at", "timestamp")
# Columns that may have the answer beside messages, besides those of a model's own answers.
_ANSWERS = ("result", "content")


@dataclass(frozen=True)
class FeedbackRow:
    """One completion of one prompt, and whether it is desirable.

    Prompt and completion are both text or both messages. A label of true means desirable. The messages are copies and
    share nothing with the record.
    """

    where: str  # a place that the user can find: "feedback.jsonl:17"
    prompt: str | tuple[Message, ...]
    completion: str | tuple[Message, ...]
    label: bool
    pair_id: str | None = None  # shared by the two rows of a preference pair
    tools: tuple[dict[str, object], ...] | None = None  # for the chat template
    template_kwargs: Mapping[str, object] = field(default_factory=dict)  # the record's `chat_template_kwargs`
    form: str = ""  # the format it was read in, as the plan names it
    from_text: bool = False  # whether text became messages
    moved_results: bool = False  # whether the results of tools were moved from the completion to the prompt
    rendered: bool = False  # whether it is text that a chat template has written
    reading: Reading | None = None  # masses and votes; None for what the label says
    weight: float | None = None  # before it is normalised; None without weights
    turn: int | None = None  # number of the message in its conversation, from 0, if it is judged by itself

    @property
    def desirable_mass(self) -> float:
        """Return how much speaks for the completion, before the weight."""
        return self.judgement.masses.desirable

    @property
    def undesirable_mass(self) -> float:
        """Return how much speaks against it, before the weight."""
        return self.judgement.masses.undesirable

    @property
    def objectives(self) -> Mapping[str, Masses]:
        """The masses of each objective that the record names, before the weight."""
        return self.judgement.objectives

    @property
    def judgement(self) -> Judgement:
        """The masses of the row and of its objectives, before the weight."""
        return Judgement.of_label(self.label) if self.reading is None else self.reading.judgement

    @property
    def characters(self) -> int:
        """Number of characters of prompt and completion."""
        sides = (self.prompt, self.completion)
        return sum(len(side) if isinstance(side, str) else sum(len(m["content"]) for m in side) for side in sides)


def parse_record(record: Mapping[str, object], where: str, fields: FeedbackFields) -> list[FeedbackRow]:
    """Return the rows of a record; of a pair the chosen and the rejected row, in this order.

    Raises:
        FeedbackError: the record matches none of the formats exactly; the message begins with `where`.
        LeftOut: the record is valid but contains nothing to train on.
    """
    try:
        present = {
            key: value for key, value in record.items() if value is not None and value == value
        }  # NaN is no value
        for name in CONVERSATIONS:
            value = present.get(name)
            if isinstance(value, Mapping) and (messages := messages_in_columns(value)) is not None:
                present[name] = messages
        calls = next((name for name in CALLS if are_tool_calls(present.get(name))), None)
        if calls is not None:
            present, calls = _with_calls(record, present, calls, where, fields)
        if _lacks_answer(record, present, fields):
            raise LeftOut(EMPTY, "no value")
        rows = _rows(record, present, calls, where, fields)
        weight = row_weight(record, where, fields)
    except RecursionError:
        raise nested_too_deeply(where) from None
    return rows if weight is None else [replace(row, weight=weight) for row in rows]


def nested_too_deeply(where: str) -> FeedbackError:
    """Return the error for a record whose lists and objects are nested too deeply to be copied."""
    return FeedbackError(f"{where}: the record is nested too deeply. Remove the row.")


def _with_calls(
    record: Mapping[str, object], present: dict[str, object], calls: str, where: str, fields: FeedbackFields
) -> tuple[dict[str, object], str | None]:
    """Return the columns with a value, and that of the tool calls if the answer is a message with them.

    Args:
        calls: the column with tool calls.
    """
    usual = next((name for name in (*COMPLETIONS, "output") if name in record), None)
    name = usual if fields.completion is None else fields.completion.text
    if name is None or name not in record or is_pair(present, fields):
        return present, None
    answer = "" if present.get(name) is None else as_turns(present[name], where, name)
    if isinstance(answer, str):
        return {**present, name: {"role": "assistant", "content": answer, calls: present[calls]}}, calls
    if any(map(has_tool_calls, answer)):
        return present, calls  # repeated beside the messages
    raise FeedbackError(
        f"{where}: '{calls}' is beside the messages of '{name}', of which none calls a tool. Move it to the message that calls, or "
        "remove it."
    )


def _rows(
    record: Mapping[str, object], present: Mapping[str, object], calls: str | None, where: str, fields: FeedbackFields
) -> list[FeedbackRow]:
    for name in MEDIA_COLUMNS:
        if present.get(name) is not None and holds(present[name]):
            raise LeftOut(MEDIA, f"'{name}'")
    tools = tools_in(present.get("tools"), where)
    kwargs = template_kwargs_in(present.get("chat_template_kwargs"), where)
    if tools or kwargs:
        canonical_json([tools, kwargs], where)
    if is_pair(present, fields):
        prompt, completions = pair_in(present, where, fields)
        bits = [of_label(True), of_label(False)]
        return _finished(prompt, completions, bits, "chosen + rejected", where, tools, kwargs, fields)
    judged = judged_messages(present, where, fields)
    if judged is not None:
        return [row for one in judged for row in _judged_rows(one, where, tools, kwargs, fields)]
    try:
        form, prompt, completion = _single(record, present, where, fields)
    except (_UnknownFormatError, MisreadMessagesError):
        raise
    except FeedbackError:
        if is_unrated(present, where, fields):  # it could not be used if it had no defect
            raise LeftOut(UNRATED, columns_in_words(present)) from None
        raise
    form = form if calls is None else f"{form} + {calls}"
    reading = judged_row(record, present, where, fields)
    return _finished(prompt, (completion,), [reading], form, where, tools, kwargs, fields)


def _judged_rows(
    judged: JudgedTurn,
    where: str,
    tools: tuple[dict[str, object], ...] | None,
    kwargs: Mapping[str, object],
    fields: FeedbackFields,
) -> list[FeedbackRow]:
    rows = _finished(
        judged.prompt, (judged.completion,), [judged.reading], "judged turns", where, tools, kwargs, fields
    )
    return [replace(row, turn=judged.number) for row in rows]


def _finished(
    prompt: Turns,
    completions: tuple[Turns, ...],
    readings: list[Reading],
    form: str,
    where: str,
    tools: tuple[dict[str, object], ...] | None,
    kwargs: Mapping[str, object],
    fields: FeedbackFields,
) -> list[FeedbackRow]:
    """Return the rows of one prompt, after the steps of all formats: text to chat, tool results, ids of pairs."""
    if _asks_nothing(prompt):
        raise LeftOut(NO_PROMPT, "it is empty")
    from_text = rendered = False
    if isinstance(prompt, str) and fields.chat:
        prompt, completions = as_chat(prompt, completions, fields.rendered)
        rendered, from_text = isinstance(prompt, str), not isinstance(prompt, str)
    if tools is not None and isinstance(prompt, str):
        raise FeedbackError(f"{where}: 'tools' with a plain text prompt. Write the prompt as messages.")
    pair_id = None
    if len(completions) == 2:
        pair_id = hashlib.sha256(canonical_json([prompt, *completions], where)).hexdigest()[:32]
    else:
        check_text([prompt, *completions], where)
    rows = []
    for completion, reading in zip(completions, readings, strict=True):
        asked, answered, moved = prompt, completion, False
        if not isinstance(completion, str) and not isinstance(prompt, str):
            context, rest = split_at_results(completion)
            moved = bool(context)
            if moved and pair_id is not None:
                raise FeedbackError(
                    f"{where}: a side of the pair contains tool results, which the model did not write. Move the messages "
                    "that both sides share to the prompt, and leave one answer on each side."
                )
            asked, answered = (*prompt, *context), rest
        rows.append(
            FeedbackRow(
                where,
                asked,
                answered,
                reading.label,
                pair_id,
                tools,
                kwargs,
                form,
                from_text,
                moved,
                rendered,
                None if reading.is_label else reading,
            )
        )
    return rows


def _asks_nothing(prompt: Turns) -> bool:
    """Return whether a prompt is an empty text, or ends with an empty message of the user."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return bool(prompt) and prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip()


def _single(
    record: Mapping[str, object], present: Mapping[str, object], where: str, fields: FeedbackFields
) -> tuple[str, Turns, Turns]:
    """Return (format, prompt, completion)."""
    found = one_of(present, where, fields.completion, COMPLETIONS, "--completion-field")
    prompt: Turns
    completion: Turns
    if found is not None:
        name, value = found
        _check_other_answers(present, name, where, fields)
        asked = prompt_value(present, where, fields)
        if asked is not None:
            _check_other_prompts(present, asked[0], name, where, fields)
            prompt = prompt_with_system(as_turns(asked[1], where, asked[0]), present, where, fields)
            form = f"{asked[0]} + {name}"
        elif is_alpaca(present, fields):
            prompt, form = alpaca_prompt(present, where, conversation=fields.chat_template), f"instruction + {name}"
        elif (before := _conversation_before(present, value, where, fields)) is not None:
            prompt, form = before[1], f"{before[0]} + {name}"
        else:
            if fields.prompt is not None and fields.prompt.text not in record:
                raise FeedbackError(
                    f"{where}: {fields.prompt.nothing(present)}. Name the prompt's column with --prompt-field."
                )
            missing = "prompt" if fields.prompt is None else fields.prompt.text
            if missing in record:
                raise LeftOut(NO_PROMPT, f"'{missing}'")
            raise _UnknownFormatError(
                f"{where}: there is a '{name}' but no '{missing}'; {columns_in_words(present)}."
                " Name the prompt's column with --prompt-field."
            )
        prompt, (completion,) = join_sides(prompt, [(name, as_turns(value, where, name))], where)
        prompt = prompt if form.startswith("instruction") else with_system(prompt, present, where)
    elif any(name in present for name in CONVERSATIONS):
        form, *others = (name for name in CONVERSATIONS if name in present)
        name = form
        for other in others:
            refuse_another(present, name, other, where, "--completion-field")
        _check_is_list(present, name, where, fields)
        if _ends_with_nothing(present[name]):
            raise LeftOut(EMPTY, f"the last message of '{name}'")
        messages = as_conversation(present[name], where, name)
        if _ends_with_own_results(present[name]):
            messages = without_last_results(messages)
        _check_prompt_beside(present, messages, where, name)
        _check_ends_with_answer(present, messages, where, name)
        prompt, completion = split_conversation(messages, where, name)
        prompt = with_system(prompt, present, where)
    elif "instruction" in present and "output" in present:
        name, form = "output", "instruction + output"
        prompt = alpaca_prompt(present, where, conversation=fields.chat_template)
        prompt, (completion,) = join_sides(prompt, [(name, as_turns(present[name], where, name))], where)
    else:
        raise _unknown_format(present, where, fields)
    check_completion(completion, where, name)
    _check_own_answers(present, name, prompt, completion, where, fields)
    return form, prompt, completion


def _conversation_before(
    present: Mapping[str, object], answer: object, where: str, fields: FeedbackFields
) -> tuple[str, tuple[Message, ...]] | None:
    """Return (column, messages) of a conversation to which a column has the answer; None without one.

    The conversation may contain the answer as its last message. Another last answer is not the prompt.
    """
    name = next((one for one in CONVERSATIONS if one in present), None)
    if name is None:
        return None
    _check_is_list(present, name, where, fields)
    messages = as_conversation(present[name], where, name)
    if messages[-1]["role"] != "assistant":
        return name, messages
    repeated = isinstance(answer, str) and messages[-1]["content"].strip() == answer.strip()
    return (name, messages[:-1]) if repeated and len(messages) > 1 else None


def _ends_with_nothing(value: object) -> bool:
    """Return whether the last of several messages is one of the assistant whose only other keys have no value."""
    messages = opened(value)
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(last, Mapping) or len(last) < 2:
        return False
    role = last.get("role", last.get("from"))
    others = (item for key, item in last.items() if key not in ("role", "from", *_ABOUT))
    return (
        isinstance(role, str)
        and ROLES.get(role.lower()) == "assistant"
        and all(item in (None, "", [], {}) for item in others)
    )


def _ends_with_own_results(value: object) -> bool:
    """Return whether the last message is the assistant's, so that results of tools after it are parts of it, as in the AI SDK."""
    messages = opened(value)
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    role = last.get("role") if isinstance(last, Mapping) else None
    return isinstance(role, str) and ROLES.get(role.lower()) == "assistant"


def _check_is_list(present: Mapping[str, object], name: str, where: str, fields: FeedbackFields) -> None:
    labels = [one for one in (*LABELS, "rating") if one in present] or ["label"]
    check_is_list(present[name], where, name, label=labels[0] if fields.label is None else fields.label.text)


def _check_other_answers(present: Mapping[str, object], used: str, where: str, fields: FeedbackFields) -> None:
    """Refuse a second answer, in a column of another format, that would be ignored."""
    if fields.completion is not None:
        return
    others = ["chosen", *(["output"] if "instruction" in present else [])]
    for other in others:
        refuse_another(present, used, other, where, "--completion-field")


def _check_own_answers(
    present: Mapping[str, object], used: str, prompt: Turns, completion: Turns, where: str, fields: FeedbackFields
) -> None:
    """Refuse a row whose answer seems to be the expected one, because another column has what the model wrote."""
    if fields.completion is not None:
        return
    asked, answered = _last_text(prompt), _last_text(completion)
    other = another_answer(present, used, asked, answered)
    if other is None:
        return
    if used in CONVERSATIONS:
        raise FeedbackError(
            f"{where}: the last message of '{used}' and '{other}' differ, and only one of them can be read. Pass --prompt-field "
            f"'{used}[:-1]' with --completion-field {key_path(other)}, or with --completion-field '{used}[-1].content', or remove "
            f"'{other}'."
        )
    raise FeedbackError(
        f"{where}: '{used}' and '{other}' differ, and only one of them can be read. If '{other}' is the model's answer, and '{used}' "
        f"the expected one, pass --completion-field {key_path(other)}; else --completion-field {key_path(used)}, or remove '{other}'."
    )


def _last_text(side: Turns) -> str:
    return side if isinstance(side, str) else side[-1]["content"] if side else ""


def _check_other_prompts(
    present: Mapping[str, object], used: str, answer: str, where: str, fields: FeedbackFields
) -> None:
    """Refuse a second prompt, or messages with another answer, beside the columns of prompt and answer."""
    if fields.prompt is not None or fields.completion is not None:
        return
    refuse_other_prompt(present, used, where, fields)
    prompt = present[used]
    name = next((one for one in CONVERSATIONS[:2] if one in present), None)
    if name is None or not isinstance(opened(present[name]), list) or not opened(present[name]):
        return
    messages = as_conversation(present[name], where, name)
    said = present[answer]
    if (
        messages[-1]["role"] == "assistant"
        and isinstance(said, str)
        and messages[-1]["content"].strip() != said.strip()
    ):
        raise FeedbackError(
            f"{where}: '{answer}' and the last message of '{name}' differ, and only one of them can be read. Choose the answer with "
            "--completion-field, or remove the other."
        )
    asked = [one["content"].strip() for one in messages if one["role"] == "user"]
    if isinstance(prompt, str) and asked and asked[-1] not in prompt and prompt.strip() not in asked:
        raise FeedbackError(
            f"{where}: '{used}' is not among the messages of '{name}', and only one of them can be read. Choose the prompt with "
            "--prompt-field, or remove the other."
        )


def _check_prompt_beside(present: Mapping[str, object], messages: tuple[Message, ...], where: str, name: str) -> None:
    """Refuse a prompt that is not in the messages: one of the two would be ignored."""
    prompt = present.get("prompt")
    if isinstance(prompt, str) and not any(prompt.strip() == one["content"].strip() for one in messages):
        raise FeedbackError(
            f"{where}: '{name}' do not contain the 'prompt' of the record, {quoted(prompt)}. Remove one of them, or add "
            "the prompt to the messages."
        )


def _check_ends_with_answer(
    present: Mapping[str, object], messages: tuple[Message, ...], where: str, name: str
) -> None:
    """Refuse messages that end with an unknown role, or whose answer seems to be in a column beside them."""
    role = messages[-1]["role"]
    if role == "assistant":
        return
    begun = f"{where}: the label is that of the last message of '{name}', which must have the role \"assistant\", got {quoted(role)}"
    texts = (one for one, value in present.items() if isinstance(value, str))
    beside = next((one for one in texts if one in _ANSWERS or is_own_answer(one)), None)
    if beside is not None:
        raise FeedbackError(
            f"{begun}. If '{beside}' has the answer to these messages, pass --completion-field {beside}."
        )
    if role not in ROLES.values():
        raise FeedbackError(
            f'{begun}, which is not a known role. If it is the model\'s, write "assistant" in its place, and "user", "system" and '
            '"tool" for the others.'
        )


def _lacks_answer(record: Mapping[str, object], present: Mapping[str, object], fields: FeedbackFields) -> bool:
    """Return whether a record has a column for the answer without a value."""
    if fields.completion is not None:
        return fields.completion.text in record and fields.completion.text not in present
    if any(name in present for name in (*COMPLETIONS, *CONVERSATIONS)):
        return False
    sides = [name for name in ("chosen", "rejected") if name in present]
    if sides:
        return len(sides) == 1 and "chosen" in record and "rejected" in record
    asked = "instruction" in present or any(name in present for name in PROMPTS)
    columns = (*COMPLETIONS, "output") if asked else CONVERSATIONS
    return any(name in record for name in columns) and "output" not in present


def _unknown_format(present: Mapping[str, object], where: str, fields: FeedbackFields) -> "_UnknownFormatError":
    printed = [name for name, value in present.items() if is_printed(value)]
    if printed:
        return _UnknownFormatError(
            f"{where}: none of the known formats; the columns {quoted(printed, 200)} contain values as Python prints them. Write these "
            "columns with json.dumps, or save the data as JSON Lines or Parquet."
        )
    if renamed := _other_case(present):
        renames = ", ".join(f"{quoted(name)} to {quoted(usual)}" for name, usual in renamed.items())
        options = [f"{_OPTIONS[usual]} {key_path(name)}" for name, usual in renamed.items() if usual in _OPTIONS]
        instead = f", or pass {' '.join(options)}" if len(options) == len(renamed) else ""
        return _UnknownFormatError(
            f"{where}: none of the known formats, whose columns have names in lower case. Rename {renames}{instead}."
        )
    if fields.completion is None and (pair := proposed_pair(present)):
        return _UnknownFormatError(
            f"{where}: none of the known formats; {columns_in_words(present)}. If these are pairs, describe the file with --map FILE: "
            f"{pair}."
        )
    for here, missing in (("chosen", "rejected"), ("rejected", "chosen"), ("instruction", "output")):
        if here in present and missing not in present:
            todo = (
                "Name the answer's column with --completion-field, or describe" if missing == "output" else "Describe"
            )
            return _UnknownFormatError(
                f"{where}: there is '{here}' but no '{missing}'; {columns_in_words(present)}. {todo} the file with --map FILE."
            )
    if fields.completion is not None:
        return _UnknownFormatError(f"{where}: {fields.completion.nothing(present)}. Check --completion-field.")
    if fields.prompt is not None:
        return _UnknownFormatError(
            f"{where}: there is no 'completion'; {columns_in_words(present)}. Check --completion-field."
        )
    return _UnknownFormatError(
        f"{where}: none of the known formats; {columns_in_words(present)}. Give it prompt, completion and label (or"
        " name them: --prompt-field, --completion-field, --label-field), messages and label, or chosen and"
        " rejected; or describe the file with --map FILE."
    )


# The option that names a column of each usual name.
_OPTIONS = {
    **dict.fromkeys(PROMPTS, "--prompt-field"),
    **dict.fromkeys(COMPLETIONS, "--completion-field"),
    **dict.fromkeys(LABELS, "--label-field"),
}


def _other_case(present: Mapping[str, object]) -> dict[str, str]:
    """Return the columns whose names are known in lower case, by these names; empty if they are not enough for a row."""
    lower = {name.lower() for name in present}
    has_sides = lower & {*PROMPTS, "instruction"} and lower & {*COMPLETIONS, "output"}
    if not (has_sides or lower.intersection(CONVERSATIONS) or lower >= {"chosen", "rejected"}):
        return {}
    return {name: name.lower() for name in present if name.lower() in COLUMNS and name.lower() not in present}


class _UnknownFormatError(FeedbackError):
    """A record that is in no known format, whether it is rated or not."""
