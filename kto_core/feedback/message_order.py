"""Refuse conversations that are stored newest first: an answer would get later messages as its prompt."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Final

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.labels import has_no_value
from offline_kto.kto_core.feedback.ordering import in_order
from offline_kto.kto_core.feedback.quoting import quoted

# Keys of a message with the time at which it was written.
_TIMES: Final = (
    *("created_at", "createdAt", "created", "create_time", "creation_time", "created_time", "createdTime"),
    *("timestamp", "ts", "time", "datetime", "date", "sent_at", "sentAt"),
)
# Clocks of different machines may exchange a question and its answer, but not more messages.
_FEWEST = 3


def check_oldest_first(messages: Sequence[object], where: str, field: str) -> None:
    """Refuse at least three messages that all have times which never rise, but fall at least once.

    Times that cannot be compared say nothing.

    Raises:
        FeedbackError: the messages are stored newest first.
    """
    first = messages[0] if len(messages) >= _FEWEST else None
    if not isinstance(first, Mapping):
        return
    key = next((one for one in _TIMES if not has_no_value(first.get(one))), None)
    if key is None or not _falls(key, (first, messages[-1])) or not _falls(key, messages):
        return
    last = messages[-1]
    assert isinstance(last, Mapping)
    raise FeedbackError(
        f"{where}: the messages of '{field}' are stored newest first: '{key}' falls from {quoted(first[key])} to "
        f"{quoted(last[key])}, so an answer would get later messages as its prompt. Sort the messages by '{key}', oldest first."
    )


def _falls(key: str, messages: Sequence[object]) -> bool:
    """Return whether the times of the messages never rise and the last is before the first."""
    times = [one.get(key) if isinstance(one, Mapping) else None for one in messages]
    if any(map(has_no_value, times)):
        return False
    try:
        order = in_order(times)
    except ValueError:
        return False
    return bool(order[-1] < order[0]) and all(later <= earlier for earlier, later in itertools.pairwise(order))
