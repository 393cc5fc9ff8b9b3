"""Refuse a list of messages that is a tree: the message before one in the list need not be the one it answers."""

from typing import Final

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.stored_values import opened

# Keys of a message with the id of the one before it, and with its own.
_PARENTS: Final = (
    *(
        "parentId",
        "parent_id",
        "parentID",
        "parent",
        "parent_message_id",
        "parentMessageId",
        "parent_uuid",
        "parentUuid",
    ),
    *("reply_to", "replyTo", "in_reply_to", "inReplyTo"),
)
_IDS: Final = ("id", "_id", "message_id", "messageId", "uuid")


def check_is_list(
    value: object, where: str, column: str, *, label: str = "label", own_label: str | None = None
) -> None:
    """Check that messages with ids and parents are in order: each belongs to the one before it.

    Args:
        value: messages, also as JSON text; any other value passes.
        column: of the messages.
        label: the path of the record's label.
        own_label: the path of the messages' own labels, in a message.

    Raises:
        FeedbackError: a message belongs to another one; the error has a mapping for such a file.
    """
    if isinstance(value, str) and not any(name in value for name in ("parent", "reply_to", "replyTo")):
        return
    found = opened(value)
    if not isinstance(found, list | tuple) or not all(type(one) is dict for one in found):
        return
    if max(map(len, found), default=0) < len(("role", "content", "id", "parent")):  # most messages have no parents
        return
    messages = [one for one in found if isinstance(one, dict)]
    parent = next((name for one in messages for name in _PARENTS if one.get(name)), None)
    key = None if parent is None else next((name for name in _IDS if name in messages[-1]), None)
    if parent is None or key is None:
        return
    before: dict[str, object] | None = None
    for number, one in enumerate(messages, 1):
        if one.get("role") == "system" or (one.get(key) is None and one.get(parent) is None):
            continue
        if before is not None and one.get(parent) != before.get(key):
            judged = f"rated: '{column}[-1].{key}', label: {label}" if own_label is None else f"label: {own_label}"
            raise FeedbackError(
                f"{where}: message {number} of '{column}' does not belong to the message before it: by '{parent}', the messages are a "
                f"tree. Describe the file with --map FILE, a line `turns: {{messages: {column}, id: {key}, parent: {parent}, {judged}}}`."
            )
        before = one
