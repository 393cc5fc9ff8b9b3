"""Convert a record of a feedback file to its labelled rows: one, the two of a preference pair, or one a judged turn.

The format is detected for each record, so a file may mix formats. They are tried in this order:

    the column of --completion-field      prompt, completion, label
    chosen + rejected                     a pair; its prompt is in prompt, instruction, conversations or
                                          messages, or else is their common beginning
    completion (response, answer)         prompt (question, query), completion, label
    messages, conversations (ShareGPT)    the last message is the completion; or the turns that are judged
    instruction + output (Alpaca)         with input, system and history

A key that holds None counts as absent: that is how tables store what only other rows have.
"""

import contextlib
import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.chat_markers import RenderedText, as_chat
from offline_kto.kto_core.feedback.conversations import (
    SYSTEM_COLUMNS,
    alpaca_prompt,
    check_completion,
    history,
    join_sides,
    shared_beginning,
    split_at_results,
    split_conversation,
    system_text,
    with_system,
)
from offline_kto.kto_core.feedback.exports import is_printed
from offline_kto.kto_core.feedback.labels import LabelRule, UnknownLabelError, has_no_value, number_in
from offline_kto.kto_core.feedback.left_out import EMPTY, MEDIA, SAME_ANSWERS, TIE, UNRATED, LeftOut
from offline_kto.kto_core.feedback.messages import Message, Turns, as_conversation, as_turns, said
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted

_MEDIA = ("images", "image", "videos", "video", "audios", "audio", "image_url", "image_urls")
_PROMPTS = ("prompt", "question", "query")
_COMPLETIONS = ("completion", "response", "answer")
_LABELS = ("label", "kto_tag")
# Names under which the two ratings of a pair stand.
_PAIR_RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)

# Every key of a record that is read, besides those that options name.
COLUMNS: Final = frozenset(
    {
        *(*_PROMPTS, *_COMPLETIONS, *_LABELS, *SYSTEM_COLUMNS, *_MEDIA),
        *("labels", "rating", "chosen", "rejected", "messages", "conversations"),
        *("instruction", "input", "output", "history", "tools", "chat_template_kwargs"),
        *(name for pair in _PAIR_RATINGS for name in pair),
    }
)


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

    @property
    def characters(self) -> int:
        """Number of characters of prompt and completion."""
        sides = (self.prompt, self.completion)
        return sum(len(side) if isinstance(side, str) else sum(len(m["content"]) for m in side) for side in sides)


@dataclass(frozen=True)
class FeedbackFields:
    """The columns to read, and how. None means the default names of the formats.

    Attributes:
        rule: which labels are desirable.
        ratings: counts the ratings without a label, for the message that says so.
        chat: whether text becomes messages. False without a chat template.
        rendered: how text looks that was rendered before, which stays text.
    """

    prompt: Path | None = None
    completion: Path | None = None
    label: Path | None = None
    rule: LabelRule = field(default_factory=LabelRule)
    ratings: LabelRule = field(default_factory=LabelRule)
    chat: bool = False
    chat_template: bool = True
    rendered: RenderedText = field(default_factory=RenderedText)


def parse_record(record: Mapping[str, object], where: str, fields: FeedbackFields) -> list[FeedbackRow]:
    """Return the rows of a record; of a pair the chosen and the rejected row, in this order.

    Raises:
        FeedbackError: the record matches none of the formats exactly; the message begins with `where`.
        LeftOut: it is no mistake, but nothing can be learned from it.
    """
    present = {key: value for key, value in record.items() if value is not None and value == value}  # NaN is no value
    if _lacks_answer(record, present, fields):
        raise LeftOut(EMPTY, "no value")
    try:
        return _rows(present, where, fields)
    except RecursionError:
        raise FeedbackError(f"{where}: the record is nested too deeply. Remove the row.") from None


def _rows(present: Mapping[str, object], where: str, fields: FeedbackFields) -> list[FeedbackRow]:
    for name in _MEDIA:
        if present.get(name):
            raise LeftOut(MEDIA, f"'{name}'")
    tools = _tools(present.get("tools"), where)
    kwargs = _template_kwargs(present.get("chat_template_kwargs"), where)
    _canonical([tools, kwargs], where)
    if _is_pair(present, fields):
        prompt, completions = _pair(present, where, fields)
        return _finished(prompt, completions, [True, False], "chosen + rejected", where, tools, kwargs, fields)
    judged = _judged_turns(present, where, fields)
    if judged is not None:
        return [
            row
            for prompt, completion, label in judged
            for row in _finished(prompt, (completion,), [label], "judged turns", where, tools, kwargs, fields)
        ]
    form, prompt, completion = _single(present, where, fields)
    label = _label(present, where, fields)
    return _finished(prompt, (completion,), [label], form, where, tools, kwargs, fields)


def _finished(
    prompt: Turns,
    completions: tuple[Turns, ...],
    labels: list[bool],
    form: str,
    where: str,
    tools: tuple[dict[str, object], ...] | None,
    kwargs: Mapping[str, object],
    fields: FeedbackFields,
) -> list[FeedbackRow]:
    """Return the rows of one prompt, with what all formats share: text as chat, results of tools, ids of pairs."""
    from_text = rendered = False
    if isinstance(prompt, str) and fields.chat:
        prompt, completions = as_chat(prompt, completions, fields.rendered)
        rendered, from_text = isinstance(prompt, str), not isinstance(prompt, str)
    if tools is not None and isinstance(prompt, str):
        raise FeedbackError(f"{where}: 'tools' with a plain text prompt. Write the prompt as messages.")
    content = _canonical([prompt, *completions], where)
    pair_id = hashlib.sha256(content).hexdigest()[:32] if len(completions) == 2 else None
    rows = []
    for completion, label in zip(completions, labels, strict=True):
        asked, answered, moved = prompt, completion, False
        if not isinstance(completion, str) and not isinstance(prompt, str):
            context, rest = split_at_results(completion)
            moved = bool(context)
            if moved and pair_id is not None:
                raise FeedbackError(
                    f"{where}: a side of the pair holds the results of tools, which are no words of the model's. Move what "
                    "both sides share to the prompt, and leave one answer on each side."
                )
            asked, answered = (*prompt, *context), rest
        rows.append(
            FeedbackRow(where, asked, answered, label, pair_id, tools, kwargs, form, from_text, moved, rendered)
        )
    return rows


def _is_pair(record: Mapping[str, object], fields: FeedbackFields) -> bool:
    if fields.completion is not None and fields.completion.find(record, "") is not None:
        return False
    return record.get("chosen") is not None and record.get("rejected") is not None


def _pair(present: Mapping[str, object], where: str, fields: FeedbackFields) -> tuple[Turns, tuple[Turns, ...]]:
    for name in ("completion", *_LABELS):
        if name in present:
            raise FeedbackError(
                f"{where}: the record has '{name}' as well as 'chosen' and 'rejected'. Remove one or the other, or pass"
                f" --completion-field {'completion' if name == 'completion' else 'chosen (or rejected)'}."
            )
    chosen = as_turns(present["chosen"], where, "chosen")
    rejected = as_turns(present["rejected"], where, "rejected")
    if _canonical(chosen, where) == _canonical(rejected, where):  # as JSON: to Python, 1 and true are the same
        raise LeftOut(SAME_ANSWERS)
    _check_ratings(present, where)
    prompt = _pair_prompt(present, where, fields)
    answers: tuple[Turns, ...]
    if prompt is None:
        prompt, answers = shared_beginning(chosen, rejected, where)
    else:
        prompt = _prompt_with_system(prompt, present, where, fields)
        prompt, answers = join_sides(prompt, [("chosen", chosen), ("rejected", rejected)], where)
    if _canonical(answers[0], where) == _canonical(
        answers[1], where
    ):  # visible only now if one side repeats the prompt
        raise LeftOut(SAME_ANSWERS)
    check_completion(answers[0], where, "chosen")
    check_completion(answers[1], where, "rejected")
    return prompt if _is_alpaca(present, fields) else with_system(prompt, present, where), answers


def _check_ratings(present: Mapping[str, object], where: str) -> None:
    """Compare the ratings of a pair, if it has any. Raises: LeftOut: a tie; FeedbackError: the rejected one is better."""
    for names in _PAIR_RATINGS:
        chosen, rejected = (number_in(present.get(name)) for name in names)
        if chosen is None or rejected is None:
            continue
        if chosen == rejected:
            raise LeftOut(TIE, f"both are rated {chosen:g}")
        if chosen < rejected:
            raise FeedbackError(
                f"{where}: 'rejected' is rated above 'chosen' ({names[1]} {rejected:g}, {names[0]} {chosen:g}). Swap them, "
                "or remove the ratings if they do not count."
            )


def _pair_prompt(present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns | None:
    found = _prompt_value(present, where, fields)
    if found is not None:
        return as_turns(found[1], where, found[0])
    if _is_alpaca(present, fields):
        return alpaca_prompt(present, where, conversation=fields.chat_template)
    for name in ("conversations", "messages"):
        if name in present:
            messages = as_conversation(present[name], where, name)
            # A conversation that ends in an answer is not the prompt: some datasets repeat the chosen side there.
            return messages if messages[-1]["role"] != "assistant" else None
    return None


def _prompt_value(present: Mapping[str, object], where: str, fields: FeedbackFields) -> tuple[str, object] | None:
    """Return (column, value) of the prompt; None if there is no such column."""
    return _one_of(present, where, fields.prompt, _PROMPTS, "--prompt-field")


def _one_of(
    present: Mapping[str, object], where: str, path: Path | None, names: tuple[str, ...], option: str
) -> tuple[str, object] | None:
    if path is not None:
        value = path.find(present, where)
        return None if value is None else (path.text, value)
    if names[0] in present:  # the usual name
        return names[0], present[names[0]]
    found = [name for name in names if name in present]
    if len(found) > 1:
        raise FeedbackError(f"{where}: {' and '.join(map(repr, found))}: say which one counts with {option}.")
    return (found[0], present[found[0]]) if found else None


def _prompt_with_system(prompt: Turns, present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns:
    """Return a prompt of text as messages if a system text or earlier turns stand beside it."""
    if _is_alpaca(present, fields):
        return prompt
    if history(present, where):
        return _after_history(prompt, present, where, fields)
    if isinstance(prompt, str) and fields.chat and system_text(present, where):
        return said("user", prompt)
    return prompt


def _after_history(prompt: Turns, present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns:
    """Return a prompt of text after the turns of `history`, as ms-swift writes them."""
    if not isinstance(prompt, str):
        raise FeedbackError(f"{where}: 'history' beside a prompt of messages. Put its turns into the prompt.")
    turns = {"history": present["history"], "instruction": prompt}
    return alpaca_prompt(turns, where, conversation=fields.chat_template)


def _is_alpaca(present: Mapping[str, object], fields: FeedbackFields) -> bool:
    """Return whether a record without a conversation has its prompt, system text included, in Alpaca's columns."""
    return "instruction" in present and fields.prompt is None and not any(name in present for name in _PROMPTS)


def _single(present: Mapping[str, object], where: str, fields: FeedbackFields) -> tuple[str, Turns, Turns]:
    """Return (format, prompt, completion)."""
    found = _one_of(present, where, fields.completion, _COMPLETIONS, "--completion-field")
    prompt: Turns
    completion: Turns
    if found is not None:
        name, value = found
        asked = _prompt_value(present, where, fields)
        if asked is not None:
            prompt = _prompt_with_system(as_turns(asked[1], where, asked[0]), present, where, fields)
            form = f"{asked[0]} + {name}"
        elif _is_alpaca(present, fields):
            prompt, form = alpaca_prompt(present, where, conversation=fields.chat_template), f"instruction + {name}"
        else:
            missing = "prompt" if fields.prompt is None else fields.prompt.text
            raise FeedbackError(
                f"{where}: there is a '{name}' but no '{missing}'; {_columns(present)}."
                " Name the prompt's column with --prompt-field."
            )
        prompt, (completion,) = join_sides(prompt, [(name, as_turns(value, where, name))], where)
        prompt = prompt if form.startswith("instruction") else with_system(prompt, present, where)
    elif "messages" in present or "conversations" in present:
        form = name = "messages" if "messages" in present else "conversations"
        messages = as_conversation(present[name], where, name)
        _check_prompt_beside(present, messages, where, name)
        prompt, completion = split_conversation(messages, where, name)
        prompt = with_system(prompt, present, where)
    elif "instruction" in present and "output" in present:
        name, form = "output", "instruction + output"
        prompt = alpaca_prompt(present, where, conversation=fields.chat_template)
        prompt, (completion,) = join_sides(prompt, [(name, as_turns(present[name], where, name))], where)
    else:
        raise _unknown_format(present, where, fields)
    check_completion(completion, where, name)
    return form, prompt, completion


def _check_prompt_beside(present: Mapping[str, object], messages: tuple[Message, ...], where: str, name: str) -> None:
    """Refuse a prompt beside messages that do not hold it: one of them would be ignored."""
    prompt = present.get("prompt")
    if isinstance(prompt, str) and not any(prompt.strip() == one["content"].strip() for one in messages):
        raise FeedbackError(
            f"{where}: 'prompt' stands beside '{name}', which do not hold it: {quoted(prompt)}. Remove one of them, or put "
            "the prompt into the messages."
        )


def _judged_turns(
    present: Mapping[str, object], where: str, fields: FeedbackFields
) -> list[tuple[tuple[Message, ...], tuple[Message, ...], bool]] | None:
    """Return (prompt, completion, label) for each judged turn; None if no turn of the record is judged by itself."""
    name = "messages" if "messages" in present else "conversations"
    turns = present.get(name)
    if fields.completion is not None or not isinstance(turns, list | tuple):
        return None
    keys = [key for key in ("label", "feedback", "rating", "kto_tag") if any(_has(one, key) for one in turns)]
    outer = [key for key in (*_LABELS, "rating") if key in present]
    verdicts: list[object]
    if keys:
        if outer or len(keys) > 1:
            raise FeedbackError(
                f"{where}: {', '.join(map(repr, [*outer, *(f'{key} of messages' for key in keys)]))}: nothing says which "
                "of them counts. Keep one, or describe the file with --map."
            )
        verdicts = [one.get(keys[0]) if isinstance(one, Mapping) else None for one in turns]
    elif isinstance(present.get("labels"), list) and not outer and fields.label is None:
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
            raise FeedbackError(f"{where}: message {number + 1} of '{name}' is judged, and is no answer to anything.")
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


def _lacks_answer(record: Mapping[str, object], present: Mapping[str, object], fields: FeedbackFields) -> bool:
    """Return whether a record has a column for the answer, but no value in it."""
    if fields.completion is not None:
        return fields.completion.text in record and fields.completion.text not in present
    if any(name in present for name in (*_COMPLETIONS, "messages", "conversations")):
        return False
    sides = [name for name in ("chosen", "rejected") if name in present]
    if sides:
        return len(sides) == 1 and "chosen" in record and "rejected" in record
    asked = "instruction" in present or any(name in present for name in _PROMPTS)
    answers = (*_COMPLETIONS, "output")
    return asked and any(name in record for name in answers) and "output" not in present


def _unknown_format(present: Mapping[str, object], where: str, fields: FeedbackFields) -> FeedbackError:
    for here, missing in (("chosen", "rejected"), ("rejected", "chosen"), ("instruction", "output")):
        if here in present and missing not in present:
            return FeedbackError(f"{where}: there is '{here}' but no '{missing}'; {_columns(present)}.")
    if fields.completion is not None or fields.prompt is not None:
        name = "completion" if fields.completion is None else fields.completion.text
        return FeedbackError(f"{where}: there is no '{name}'; {_columns(present)}. Check --completion-field.")
    printed = [name for name, value in present.items() if is_printed(value)]
    if printed:
        return FeedbackError(
            f"{where}: none of the known formats; {quoted(printed, 200)} hold values as Python prints them. Write these "
            "columns with json.dumps, or save the data as JSON Lines or Parquet."
        )
    return FeedbackError(
        f"{where}: none of the known formats; {_columns(present)}. Give it prompt, completion and label (or"
        " name them: --prompt-field, --completion-field, --label-field), messages and label, or chosen and"
        " rejected; or say in a few lines what is where: --map FILE."
    )


def _label(present: Mapping[str, object], where: str, fields: FeedbackFields) -> bool:
    if fields.label is not None:
        return fields.rule.verdict(fields.label.find(present, where), where, fields.label.text)
    names = ("rating",) if fields.rule.has_comparison else _LABELS
    labels = {name: fields.rule.verdict(present[name], where, name) for name in names if name in present}
    if len(set(labels.values())) > 1:
        raise FeedbackError(f"{where}: 'label' and 'kto_tag' contradict each other. Remove one of them.")
    if labels:
        return next(iter(labels.values()))
    if "rating" in present and not has_no_value(present["rating"]):
        with contextlib.suppress(UnknownLabelError):
            fields.ratings.verdict(present["rating"], where, "rating")
        message = f"{where}: there is a rating, {quoted(present['rating'])}, but no label."
        raise UnknownLabelError(message, "rating", fields.ratings)
    raise LeftOut(UNRATED, f"there is no '{names[0]}'; {_columns(present)}")


def _tools(value: object, where: str) -> tuple[dict[str, object], ...] | None:
    tools = _from_json([] if value is None or value == "" else value, where, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise FeedbackError(f"{where}: 'tools' must be a list of objects, got {quoted(value)}.")
    return tuple(tools) if len(tools) > 0 else None


def _template_kwargs(value: object, where: str) -> dict[str, object]:
    name = "chat_template_kwargs"
    kwargs = _from_json({} if value is None or value == "" else value, where, name)
    if not isinstance(kwargs, dict):
        raise FeedbackError(f"{where}: '{name}' must be an object, got {quoted(value)}.")
    return {key: item for key, item in kwargs.items() if item is not None}


def _from_json(value: object, where: str, name: str) -> object:
    """Return a copy of `value`, parsed if it is JSON text, as tables store it."""
    try:
        return json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError):
        raise FeedbackError(f"{where}: '{name}' is not valid JSON, got {quoted(value)}.") from None


def _canonical(value: object, where: str) -> bytes:
    """Return canonical JSON in UTF-8. Refuse values that tokenizers or Parquet cannot represent."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        found = quoted(error.object[max(0, error.start - 20) : error.end])
        raise FeedbackError(
            f"{where}: text ending in {found} holds half a character (a lone surrogate). Repair or remove it."
        ) from None
    except (TypeError, ValueError) as error:
        raise FeedbackError(f"{where}: a message holds what JSON cannot ({error}). Write it as text.") from None


def _columns(record: Mapping[str, object]) -> str:
    names = [name for name, value in record.items() if value is not None]
    return f"found {quoted(names, 200)}" if names else "found no columns with a value"


def resolve_threshold(
    text: str, records: Iterable[tuple[str, Mapping[str, object]]], label: Path | None = None
) -> float:
    """Return the value of --rating-threshold: the number itself, or for "median" the median of all ratings.

    A rating at the threshold is desirable. `records` are (where, record) and are read for "median" only;
    preference pairs and records without a rating are left out.

    Raises:
        ConfigError: neither a finite number nor "median", or no record has a rating.
        FeedbackError: a rating that is not a number.
    """
    if text.strip().lower() != "median":
        number = number_in(text)
        if number is None:
            raise ConfigError(f'--rating-threshold must be a number or "median", got {quoted(text)}.')
        return number
    path = label or Path("rating", "--rating-threshold")
    ratings = [
        _rating(value, where, path)
        for where, record in records
        if not has_no_value(value := path.find(record, where)) and not _is_pair(record, FeedbackFields())
    ]
    if len(ratings) == 0:
        raise ConfigError(
            f"--rating-threshold median: no record has a '{path.text}'. Name its column with --label-field."
        )
    return float(statistics.median(ratings))


def _rating(value: object, where: str, path: Path) -> float:
    number = number_in(value)
    if number is None:
        raise FeedbackError(
            f"{where}: '{path.text}' must be a number, since --rating-threshold is set, got {quoted(value)}."
            " Name the column that holds the rating with --label-field."
        )
    return number
