"""Convert a record of a feedback file to one labelled row, or to the two rows of a preference pair.

The format is detected for each record, so a file may mix formats. They are tried in this order:

    the column of --completion-field      prompt, completion, label
    chosen + rejected                     a pair; its prompt is in prompt, instruction, conversations or
                                          messages, or else is their common beginning
    completion                            prompt, completion, label
    messages, conversations (ShareGPT)    the last message is the completion
    instruction + output (Alpaca)         with input, system and history

A key whose value is None counts as absent: tables store None for a key that only other rows have.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.formats import (
    EMPTY_ANSWER,
    Message,
    Turns,
    alpaca_prompt,
    as_conversation,
    as_turns,
    check_completion,
    join_sides,
    quoted,
    shared_beginning,
    split_conversation,
    with_system,
)
from offline_kto.kto_core.feedback.labels import number_in, parse_label

_MEDIA = ("images", "videos", "audios")

# Every key of a record that is read, besides those that options name.
COLUMNS: Final = frozenset(
    {
        *("prompt", "completion", "label", "kto_tag", "rating", "chosen", "rejected", "messages", "conversations"),
        *("instruction", "input", "output", "system", "history", "tools", "chat_template_kwargs", *_MEDIA),
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

    @property
    def characters(self) -> int:
        """Number of characters of prompt and completion."""
        sides = (self.prompt, self.completion)
        return sum(len(side) if isinstance(side, str) else sum(len(m["content"]) for m in side) for side in sides)


@dataclass(frozen=True)
class FeedbackFields:
    """The columns to read, and how. None means the default names of the formats.

    If rating_threshold is set, label names the column of the rating. chat_template is whether the tokenizer has one;
    if so, Alpaca rows become conversations.

    Raises:
        ConfigError: a threshold that is not finite.
    """

    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    rating_threshold: float | None = None
    chat_template: bool = True

    def __post_init__(self) -> None:
        if self.rating_threshold is not None and not math.isfinite(self.rating_threshold):
            raise ConfigError(f"--rating-threshold must be a finite number, got {self.rating_threshold}.")


def parse_record(record: Mapping[str, object], where: str, fields: FeedbackFields) -> list[FeedbackRow]:
    """Return one row, or the chosen and the rejected row of a pair, in this order.

    If rating_threshold is set, the label of every row outside a pair is `rating >= threshold`.

    Raises:
        FeedbackError: the record matches none of the formats exactly; the message begins with `where`.
    """
    try:
        return _rows(record, where, fields)
    except RecursionError:
        raise FeedbackError(f"{where}: the record is nested too deeply. Remove the row.") from None


def _rows(record: Mapping[str, object], where: str, fields: FeedbackFields) -> list[FeedbackRow]:
    present = {key: value for key, value in record.items() if value is not None}
    empty = frozenset(record) - frozenset(present)
    for name in _MEDIA:
        media = present.get(name)
        if isinstance(media, list | tuple) and len(media) > 0:
            raise FeedbackError(f"{where}: the record has '{name}'. Multimodal feedback is not supported.")
    labels = [True, False]
    if _is_pair(present, fields):
        prompt, completions = _pair(present, where, fields)
    else:
        prompt, completion = _single(present, empty, where, fields)
        completions = (completion,)
        labels = [_label(present, empty, where, fields)]
    tools = _tools(present.get("tools"), where)
    if tools is not None and isinstance(prompt, str):
        raise FeedbackError(f"{where}: 'tools' with a plain text prompt. Write the prompt as messages.")
    kwargs = _template_kwargs(present.get("chat_template_kwargs"), where)
    _canonical([tools, kwargs], where)
    content = _canonical([prompt, *completions], where)
    pair_id = hashlib.sha256(content).hexdigest()[:32] if len(completions) == 2 else None
    return [
        FeedbackRow(where, prompt, completion, label, pair_id, tools, kwargs)
        for completion, label in zip(completions, labels, strict=True)
    ]


def _is_pair(record: Mapping[str, object], fields: FeedbackFields) -> bool:
    if fields.completion is not None and record.get(fields.completion) is not None:
        return False
    return record.get("chosen") is not None and record.get("rejected") is not None


def _pair(present: Mapping[str, object], where: str, fields: FeedbackFields) -> tuple[Turns, tuple[Turns, ...]]:
    if "completion" in present:
        raise FeedbackError(
            f"{where}: the record has 'completion' as well as 'chosen' and 'rejected'. Remove one or the other, or pass"
            " --completion-field completion."
        )
    chosen = as_turns(present["chosen"], where, "chosen")
    rejected = as_turns(present["rejected"], where, "rejected")
    contradiction = f"{where}: 'chosen' and 'rejected' are the same, so the pair has no preference. Remove the row."
    if chosen == rejected:
        raise FeedbackError(contradiction)
    prompt = _pair_prompt(present, where, fields)
    answers: tuple[Turns, ...]
    if prompt is None:
        prompt, answers = shared_beginning(chosen, rejected, where)
    else:
        prompt, answers = join_sides(prompt, [("chosen", chosen), ("rejected", rejected)], where)
    if answers[0] == answers[1]:  # visible only after conversion if one side repeats the prompt
        raise FeedbackError(contradiction)
    check_completion(answers[0], where, "chosen")
    check_completion(answers[1], where, "rejected")
    return prompt if _is_alpaca(present, fields) else with_system(prompt, present, where), answers


def _pair_prompt(present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns | None:
    name = fields.prompt or "prompt"
    if name in present:
        return as_turns(present[name], where, name)
    if _is_alpaca(present, fields):
        return alpaca_prompt(present, where, conversation=fields.chat_template)
    for name in ("conversations", "messages"):
        if name in present:
            messages = as_conversation(present[name], where, name)
            # A conversation that ends in an answer is not the prompt: some datasets repeat the chosen side there.
            return messages if messages[-1]["role"] != "assistant" else None
    return None


def _is_alpaca(present: Mapping[str, object], fields: FeedbackFields) -> bool:
    """Return whether a record without a conversation has its prompt, system text included, in Alpaca's columns."""
    return "instruction" in present and (fields.prompt or "prompt") not in present


def _single(
    present: Mapping[str, object], empty: frozenset[str], where: str, fields: FeedbackFields
) -> tuple[Turns, Turns]:
    name = fields.completion or "completion"
    prompt: Turns
    completion: Turns
    if name in present:
        prompt_name = fields.prompt or "prompt"
        if prompt_name in empty:
            raise FeedbackError(f"{where}: '{prompt_name}' is empty. Write the prompt, or remove the row.")
        if prompt_name not in present:
            raise FeedbackError(
                f"{where}: there is a '{name}' but no '{prompt_name}'; {_columns(present)}."
                " Name the prompt's column with --prompt-field."
            )
        prompt = as_turns(present[prompt_name], where, prompt_name)
        completion = as_turns(present[name], where, name)
        prompt, (completion,) = join_sides(prompt, [(name, completion)], where)
        prompt = with_system(prompt, present, where)
    elif "messages" in present or "conversations" in present:
        name = "messages" if "messages" in present else "conversations"
        prompt, completion = split_conversation(as_conversation(present[name], where, name), where, name)
        prompt = with_system(prompt, present, where)
    elif "instruction" in present and "output" in present:
        name = "output"
        prompt = alpaca_prompt(present, where, conversation=fields.chat_template)
        prompt, (completion,) = join_sides(prompt, [(name, as_turns(present[name], where, name))], where)
    else:
        raise _unknown_format(present, empty, where, fields)
    check_completion(completion, where, name)
    return prompt, completion


def _unknown_format(
    present: Mapping[str, object], empty: frozenset[str], where: str, fields: FeedbackFields
) -> FeedbackError:
    for here, missing in (("chosen", "rejected"), ("rejected", "chosen"), ("instruction", "output")):
        if here in present and missing in empty:
            return FeedbackError(f"{where}: '{missing}' is empty. {EMPTY_ANSWER}")
        if here in present and missing not in present:
            return FeedbackError(f"{where}: there is '{here}' but no '{missing}'; {_columns(present)}.")
    for name in (fields.completion or "completion", "messages", "conversations", "chosen"):
        if name in empty and present:
            return FeedbackError(f"{where}: '{name}' is empty. {EMPTY_ANSWER}")
    if fields.completion is not None or fields.prompt is not None:
        name = fields.completion or "completion"
        return FeedbackError(f"{where}: there is no '{name}'; {_columns(present)}. Check --completion-field.")
    return FeedbackError(
        f"{where}: none of the known formats; {_columns(present)}. Give it prompt, completion and label (or"
        " name them: --prompt-field, --completion-field, --label-field), messages and label, or chosen and"
        " rejected."
    )


def _label(present: Mapping[str, object], empty: frozenset[str], where: str, fields: FeedbackFields) -> bool:
    if fields.rating_threshold is not None:
        return parse_rating(present, where, fields) >= fields.rating_threshold
    names = ("label", "kto_tag") if fields.label is None else (fields.label,)
    labels = {name: parse_label(present[name], where, name) for name in names if name in present}
    if len(set(labels.values())) > 1:
        raise FeedbackError(f"{where}: 'label' and 'kto_tag' contradict each other. Remove one of them.")
    if len(labels) == 0:
        if "rating" in present:
            raise FeedbackError(
                f"{where}: there is a rating, {quoted(present['rating'])}, but no label. State from which"
                " rating on a completion is desirable: pass --rating-threshold 4 (or median)."
            )
        what = f"there is no '{names[0]}'" + (": it is empty" if names[0] in empty else "")
        raise FeedbackError(
            f"{where}: {what}; {_columns(present)}. Give the row one, or name another column with --label-field."
        )
    return next(iter(labels.values()))


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
            f"{where}: text ending in {found} contains half a character (a lone surrogate). Repair or remove it."
        ) from None
    except (TypeError, ValueError) as error:
        raise FeedbackError(
            f"{where}: a message contains a value that JSON cannot represent ({error}). Write it as text."
        ) from None


def _columns(record: Mapping[str, object]) -> str:
    names = [name for name, value in record.items() if value is not None]
    return f"found {quoted(names, 200)}" if names else "found no columns with a value"


def parse_rating(record: Mapping[str, object], where: str, fields: FeedbackFields) -> float:
    """Return the number in `rating`, or in the column that --label-field names. A number may be text (CSV).

    Raises:
        FeedbackError: no such column, or no finite number in it (true and false are not ratings).
    """
    name = _rating_name(fields)
    value = record.get(name)
    if value is None:
        raise FeedbackError(
            f"{where}: --rating-threshold is set, but there is no '{name}'; {_columns(record)}."
            " Name the column of the rating with --label-field."
        )
    number = number_in(value)
    if number is None:
        raise FeedbackError(
            f"{where}: '{name}' must be a number, since --rating-threshold is set, got {quoted(value)}."
            " Name the column of the rating with --label-field."
        )
    return number


def resolve_threshold(
    text: str, records: Iterable[tuple[str, Mapping[str, object]]], fields: FeedbackFields | None = None
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
    fields = FeedbackFields() if fields is None else fields
    name = _rating_name(fields)
    ratings = [
        parse_rating(record, where, fields)
        for where, record in records
        if record.get(name) is not None and not _is_pair(record, fields)
    ]
    if len(ratings) == 0:
        raise ConfigError(f"--rating-threshold median: no record has a '{name}'. Name its column with --label-field.")
    return float(statistics.median(ratings))


def _rating_name(fields: FeedbackFields) -> str:
    return "rating" if fields.label is None else fields.label
