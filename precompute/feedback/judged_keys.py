"""Find the key of the assistant's messages that holds the feedback, for the message about data without labels."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from offline_kto.kto_core.feedback.exports import opened
from offline_kto.kto_core.feedback.labels import Scale, has_no_value, usual_label
from offline_kto.kto_core.feedback.messages import ROLES
from offline_kto.kto_core.feedback.paths import key_path
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.precompute.records.feedback_columns import FEEDBACK_NAMES
from offline_kto.precompute.records.text_files import Located

_MOST_RECORDS = 10_000
_MOST_VALUES = 100
_LONGEST_WORD = 28
_ROLE_KEYS = ("role", "from")
# Keys of every message, which hold its text or identify it.
_OF_MESSAGES = {"role", "from", "content", "value", "text", "name", "id", "tool_call_id"}


@dataclass(frozen=True)
class JudgedKey:
    """A key of the assistant's messages with values that look like feedback.

    Attributes:
        column: of the conversation.
        role: key of a message's role.
        path: of the feedback in a message.
    """

    column: str
    role: str
    path: str
    values: Counter[str]

    @property
    def has_known_values(self) -> bool:
        """Whether the values are the usual words, or on a scale."""
        return Scale(self.values).is_numbers or Scale(self.values).is_usual

    def in_words(self) -> str:
        """Return a sentence with the lines of a mapping that reads the key."""
        roles = [] if self.role == "role" else [f"  role: {self.role}"]
        lines = ["turns:", f"  messages: {_yaml(key_path(self.column))}", *roles, f"  label: {self._label()}"]
        shown = "\n".join(f"  {line}" for line in lines)
        return (
            f"The assistant's messages in {quoted(self.column)} have {self.path}: {Scale(self.values).in_words()}. If that is the "
            f"feedback, save these lines as map.yaml and pass --map map.yaml:\n{shown}"
        )

    def _label(self) -> str:
        proposal = Scale(self.values).proposal()
        if Scale(self.values).is_usual or not proposal:
            return _yaml(self.path)
        _, up, _, down = shlex.split(proposal.split(" (")[0].split(", with")[0])[:4]
        return f"{{path: {_yaml(self.path)}, up: {json.dumps(up.split(','))}, down: {json.dumps(down.split(','))}}}"


def judged_key(records: Iterable[Located]) -> JudgedKey | None:
    """Return the key that most likely holds the feedback; None if no key of the assistant's messages looks like it."""
    found: dict[tuple[str, str, str], Counter[str]] = {}
    others: set[tuple[str, str, str]] = set()
    for _, record in islice(records, _MOST_RECORDS):
        for key, value in _values(record):
            if _is_mark(key[2], value):
                found.setdefault(key, Counter())[quoted(value, 30)] += 1
            else:
                others.add(key)
    keys = [
        JudgedKey(*key, values) for key, values in found.items() if key not in others and len(values) <= _MOST_VALUES
    ]
    return max(keys, key=lambda one: (_is_named(one.path), one.has_known_values, one.values.total()), default=None)


def _values(record: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], object]]:
    """Yield ((column, key of the role, path), value) for what the assistant's messages have besides their text."""
    for column, value in record.items():
        turns = opened(value)
        for turn in turns if isinstance(turns, list) else []:
            role = next(
                (key for key in _ROLE_KEYS if isinstance(turn, Mapping) and isinstance(turn.get(key), str)), None
            )
            if role is None or ROLES.get(turn[role].strip().lower()) != "assistant":
                continue
            for key in turn.keys() - _OF_MESSAGES:
                inner = turn[key] if isinstance(turn[key], Mapping) else {}
                found = {f"{key_path(key)}.{key_path(name)}": one for name, one in inner.items()}
                for path, one in (found or {key_path(key): turn[key]}).items():
                    if not has_no_value(one):
                        yield (column, role, path), one


def _is_mark(path: str, value: object) -> bool:
    known = isinstance(value, bool) or usual_label(value) is not None
    return known or (_is_named(path) and isinstance(value, int | float | str) and len(str(value)) < _LONGEST_WORD)


def _is_named(path: str) -> bool:
    return FEEDBACK_NAMES.search(path) is not None


def _yaml(path: str) -> str:
    """Return a path as a value in YAML; one of a key with other characters has quotes of its own."""
    return f"'{path}'" if '"' in path else path
