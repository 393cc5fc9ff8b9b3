"""Name the columns of the native formats, and find a record's prompt in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.chat_markers import RenderedText
from offline_kto.kto_core.feedback.conversations import SYSTEM_COLUMNS, alpaca_prompt, history, system_text
from offline_kto.kto_core.feedback.judging import COUNTS, SEVERAL, WEIGHT
from offline_kto.kto_core.feedback.labels import LabelRule
from offline_kto.kto_core.feedback.left_out import OneCountLeftOut
from offline_kto.kto_core.feedback.message_keys import MEDIA_KEYS
from offline_kto.kto_core.feedback.messages import Turns, said
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted

MEDIA_COLUMNS = MEDIA_KEYS
PROMPTS = ("prompt", "question", "query")
COMPLETIONS = ("completion", "response", "answer")
LABELS = ("label", "kto_tag")
CONVERSATIONS = ("messages", "conversations", "conversation")
# Columns of tool calls, which belong to the answer in another column.
CALLS = ("tool_calls", "function_call")
# Every key of a record that may be read, besides those that options name.
COLUMNS: Final = frozenset(
    {
        *(*PROMPTS, *COMPLETIONS, *LABELS, *SYSTEM_COLUMNS, *MEDIA_COLUMNS),
        *(SEVERAL, WEIGHT, "rating", "chosen", "rejected", "winner", "margin", *CONVERSATIONS),
        *("instruction", "input", "output", "history", "tools", "chat_template_kwargs", *CALLS),
        *(name for names in COUNTS for name in names),
    }
)


# Columns of the formats, besides those in their names.
_BESIDE: Final = {
    "chosen + rejected": (*(*PROMPTS, "messages", "conversations", "instruction", "input", "history"),),
    "judged turns": (*CONVERSATIONS, "labels"),
    "messages": ("prompt",),
}


def read_in_form(form: str, fields: "FeedbackFields") -> set[str]:
    """Return the columns that a native format reads, besides those that options name.

    Args:
        form: as `FeedbackRow.form` names it.
    """
    names = form.split(" + ")
    found = {*names, *_BESIDE.get(form, ()), *SYSTEM_COLUMNS, *MEDIA_COLUMNS, "tools", "chat_template_kwargs"}
    if len(names) >= 2:
        found |= {"history"}
    if "instruction" in names:
        found |= {"input"}
    if fields.label is None:
        found |= fields.compared or {*LABELS}
    return found


@dataclass(frozen=True)
class FeedbackFields:
    """The columns to read, and how to read them. None means the default names of the native formats.

    Attributes:
        rule: which labels are desirable.
        ratings: counts the ratings of records without a label, for the message about them.
        read: other columns that rows depended on.
        compared: the columns whose values were compared with numbers, as `--up '>=4'` says.
        one_count: places of rows with a label and one of the two numbers of votes, which is not read.
        chat: whether text becomes messages. False without a chat template.
        rendered: recognises rendered text, which is not converted.
    """

    prompt: Path | None = None
    completion: Path | None = None
    label: Path | None = None
    weight: Path | None = None
    rule: LabelRule = field(default_factory=LabelRule)
    ratings: LabelRule = field(default_factory=LabelRule)
    read: set[str] = field(default_factory=set)
    compared: set[str] = field(default_factory=set)
    one_count: list[tuple[str, OneCountLeftOut]] = field(default_factory=list)
    chat: bool = False
    chat_template: bool = True
    rendered: RenderedText = field(default_factory=RenderedText)


def prompt_value(present: Mapping[str, object], where: str, fields: FeedbackFields) -> tuple[str, object] | None:
    """Return (column, value) of the prompt; None if there is no such column."""
    return one_of(present, where, fields.prompt, PROMPTS, "--prompt-field")


def one_of(
    present: Mapping[str, object], where: str, path: Path | None, names: tuple[str, ...], option: str
) -> tuple[str, object] | None:
    if path is not None:
        value = path.find(present, where)
        return None if value is None else (path.text, value)
    found = [name for name in names if name in present]
    if not found:
        return None
    if names[0] not in found and len(found) > 1:
        raise FeedbackError(f"{where}: {' and '.join(map(repr, found))}: choose one with {option}.")
    for other in found[1:]:
        refuse_another(present, found[0], other, where, option)
    return found[0], present[found[0]]


def refuse_another(present: Mapping[str, object], used: str, other: str, where: str, option: str) -> None:
    """Refuse a record in which a column that is not read has another value than the one of the same meaning.

    Args:
        option: chooses one of them.
    """
    value = present.get(other)
    if value in (None, "", [], {}) or _plain(value) == _plain(present[used]):
        return
    raise FeedbackError(
        f"{where}: '{used}' and '{other}' differ, and only one of them can be read. Choose one with {option}, or remove the "
        "other."
    )


def refuse_other_prompt(present: Mapping[str, object], used: str, where: str, fields: FeedbackFields) -> None:
    """Refuse an `instruction` beside a prompt that does not contain it."""
    prompt, other = present[used] if fields.prompt is None else None, present.get("instruction")
    if fields.prompt is None and isinstance(other, str) and not (isinstance(prompt, str) and other.strip() in prompt):
        refuse_another(present, used, "instruction", where, "--prompt-field")


def _plain(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def prompt_with_system(prompt: Turns, present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns:
    """Return a prompt of text as messages if the record has a system text or earlier turns."""
    if is_alpaca(present, fields):
        return prompt
    if history(present, where):
        return _after_history(prompt, present, where, fields)
    if isinstance(prompt, str) and fields.chat and system_text(present, where):
        return said("user", prompt)
    return prompt


def _after_history(prompt: Turns, present: Mapping[str, object], where: str, fields: FeedbackFields) -> Turns:
    """Return a prompt of text after the turns of `history`, as ms-swift writes them."""
    if not isinstance(prompt, str):
        raise FeedbackError(
            f"{where}: 'history' cannot be combined with a prompt of messages. Move its turns to the prompt."
        )
    turns = {"history": present["history"], "instruction": prompt}
    return alpaca_prompt(turns, where, conversation=fields.chat_template)


def is_alpaca(present: Mapping[str, object], fields: FeedbackFields) -> bool:
    """Return whether a record without a conversation has its prompt, system text included, in Alpaca's columns."""
    return "instruction" in present and fields.prompt is None and not any(name in present for name in PROMPTS)


def columns_in_words(record: Mapping[str, object]) -> str:
    names = [name for name, value in record.items() if value is not None]
    return f"found {quoted(names, 200)}" if names else "found no columns with a value"
