"""Find the judged turns of a conversation, and the turns before each of them, in a list or a tree."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.conversations import without_last_results
from offline_kto.kto_core.feedback.labels import holds, number_in
from offline_kto.kto_core.feedback.left_out import MISSING_TURNS, NOT_ASSISTANT, NOT_CHOSEN, TIE, UNRATED, LeftOut
from offline_kto.kto_core.feedback.mapping import JudgedTurns, Mapping, Native, Record
from offline_kto.kto_core.feedback.message_keys import MEDIA_KEYS, REASONING, ROLES, TEXT_KEYS
from offline_kto.kto_core.feedback.message_order import check_oldest_first
from offline_kto.kto_core.feedback.messages import Message, as_turns
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import opened


def mapped_rows(mapping: Mapping, record: Record, where: str) -> Iterator[Native | LeftOut]:
    """Yield the rows of a record in a format that `parse_record` reads, with a `Reading` as label.

    Raises:
        FeedbackError: the mapping does not fit the record; the message names file, key and record.
    """
    if mapping.where is not None and not mapping.where.find(record, where):
        yield LeftOut(NOT_CHOSEN)
    elif mapping.turns is not None:
        yield from judged_rows(mapping, mapping.turns, record, where)
    else:
        yield from mapping.rows(record, where)


def judged_rows(mapping: Mapping, turns: JudgedTurns, record: Record, where: str) -> Iterator[Native | LeftOut]:
    """Yield a row for each judged turn of the assistant: the turns before it, the turn, and its label.

    Raises:
        FeedbackError: the value is not a list of turns, a turn is its own ancestor, or a judged turn is not the assistant's.
        LeftOut: the turns are not there, or the judged one is not among them.
    """
    conversation = _Conversation(mapping, turns, record, where)
    if turns.label is None:
        yield from _ranked_pairs(mapping, turns, conversation, record, where)
        return
    rated = None if turns.rated is None else turns.rated.find(record, where)
    there = found = False
    for number, turn in enumerate(conversation.turns):
        if turns.rated is not None and (number if turns.id is None else turns.id.find(turn, where)) != rated:
            continue
        there = True
        if conversation.role(turn) != "assistant":
            if turns.rated is None and turns.label.has_value(turn, where):
                yield conversation.judged_other(turn)
            continue
        found = True
        try:
            copies = conversation.copies[number] if turns.rated is None else [record]
            label = turns.label.read_copies(copies, where)
            judged = without_last_results(conversation.message(turn))
            before = [one for other in conversation.before(number) for one in conversation.message(other)]
            if not before:
                raise FeedbackError(
                    f"{where}: {turns.messages.source}: {conversation.name(number)} is judged, but nothing comes before it. Put the "
                    "messages in order, for example by their time; if it is a greeting, remove its judgement."
                )
        except LeftOut as left:
            yield LeftOut(left.reason, left.detail or conversation.name(number))
            continue
        yield {
            "prompt": mapping.stripped(tuple(before)),
            "completion": mapping.stripped(judged),
            "label": label,
            **mapping.beside(record, where),
        }
    if turns.rated is not None and not there:
        raise LeftOut(MISSING_TURNS, f"{turns.rated.source}: the judged turn, {quoted(rated)}, is missing")
    if turns.rated is not None and not found:
        raise FeedbackError(f"{where}: {turns.rated.source}: the judged turn, {quoted(rated)}, is not the assistant's.")


def _ranked_pairs(
    mapping: Mapping, turns: JudgedTurns, conversation: "_Conversation", record: Record, where: str
) -> Iterator[Native | LeftOut]:
    """Yield a pair of the best answer to a turn and each of the others."""
    assert turns.rank is not None
    answers: dict[object, list[tuple[float, int]]] = {}
    for number, turn in enumerate(conversation.turns):
        rank = number_in(turns.rank.find(turn, where))
        if conversation.role(turn) != "assistant":
            if rank is not None:
                yield conversation.judged_other(turn)
            continue
        if rank is None:
            yield LeftOut(UNRATED)
        else:
            answers.setdefault(conversation.asked_by(number), []).append((rank, number))
    for ranked in answers.values():
        (least, best), *others = sorted(ranked)
        if not others:
            yield LeftOut(UNRATED, "the only ranked answer to its turn")
        for rank, other in others:
            try:
                if rank == least:
                    raise LeftOut(TIE, f"two answers of rank {rank:g}")
                yield {
                    "prompt": tuple(one for turn in conversation.before(best) for one in conversation.message(turn)),
                    "chosen": mapping.stripped(conversation.message(conversation.turns[best])),
                    "rejected": mapping.stripped(conversation.message(conversation.turns[other])),
                    **mapping.beside(record, where),
                }
            except LeftOut as left:
                yield left


class _Conversation:
    """The turns of a record.

    Attributes:
        turns: each message once.
        copies: of each turn, all that have its id in records that are joined: one message may have several votes.
    """

    def __init__(self, mapping: Mapping, turns: JudgedTurns, record: Record, where: str) -> None:
        self._mapping, self._spec, self._where = mapping, turns, where
        self._field = turns.messages.name_in(record)
        found = turns.messages.open(record, where)
        if found is None:
            raise LeftOut(MISSING_TURNS, turns.messages.nothing(record))
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise FeedbackError(f"{where}: {turns.messages.source}: must be a list of turns, got {quoted(found)}.")
        self.turns: list[dict[str, Any]] = []
        self.copies: list[list[dict[str, Any]]] = []
        # Position of the turn that comes before each: None at the beginning, _MISSING if it is not in the record.
        self._before: list[int | None] = []
        if turns.children is not None:
            self._walk(found, turns.children)
            self.copies = [[one] for one in self.turns]
        else:
            found = (
                self._copies(found) if mapping.join is not None and turns.id is not None else [[one] for one in found]
            )
            self.turns, self.copies = [one[0] for one in found], found
            self._before = list(self._parents())
            if all(one is None for one in self._before) and self._alternate():
                check_oldest_first(self.turns, self._where, self._field)
                self._before = _in_order(self.turns)  # written before the program had trees

    def _copies(self, turns: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return the turns in groups of the same message: the same id, role and text."""
        assert self._spec.id is not None
        found: dict[str, list[dict[str, Any]]] = {}
        for number, turn in enumerate(turns):
            key = self._spec.id.find(turn, self._where)
            texts = turn if self._spec.text is None else {"text": self._spec.text.find(turn, self._where)}
            said = [texts.get(name) for name in (*TEXT_KEYS, "parts")]
            same = [number] if key is None else [key, self._spec.role.find(turn, self._where), said]
            found.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(turn)
        return [*found.values()]

    def _walk(self, roots: list[dict[str, Any]], children: Path) -> None:
        """Collect the turns of a tree, each before those that follow it."""
        open_turns: list[tuple[dict[str, Any], int | None]] = [(one, None) for one in reversed(roots)]
        while open_turns:
            turn, parent = open_turns.pop()
            number = len(self.turns)
            self.turns.append(turn)
            self._before.append(parent)
            below = children.open(turn, self._where) or []
            if not isinstance(below, list) or not all(isinstance(one, dict) for one in below):
                raise FeedbackError(f"{self._where}: {children.source}: must be a list of turns, got {quoted(below)}.")
            open_turns += [(one, number) for one in reversed(below)]

    def _parents(self) -> Iterator[int | None]:
        spec = self._spec
        if spec.parent is None or spec.id is None:
            check_oldest_first(self.turns, self._where, self._field)
            yield from _in_order(self.turns)
            return
        ids = [_key(spec.id.find(one, self._where)) for one in self.turns]
        by_id = {key: number for number, key in enumerate(ids)}
        repeated = Counter(ids)
        for turn in self.turns:
            parent = spec.parent.find(turn, self._where)
            if parent not in (None, "", False) and repeated[_key(parent)] > 1:
                raise FeedbackError(
                    f"{self._where}: {repeated[_key(parent)]} messages have the id {quoted(parent)}, to which another one "
                    "belongs. Give each message an id of its own."
                )
            yield by_id.get(_key(parent), _MISSING) if parent not in (None, "", False) else None

    def _alternate(self) -> bool:
        """Return whether each answer of the assistant follows a message of the user."""
        roles = [role for role in map(self.role, self.turns) if role != "system"]
        return all((role == "assistant") == bool(number % 2) for number, role in enumerate(roles))

    def asked_by(self, number: int) -> object:
        """Return what identifies the turn before one, also if it is not in the record."""
        parent = self._spec.parent
        return self._before[number] if parent is None else _key(parent.find(self.turns[number], self._where))

    def name(self, number: int) -> str:
        """Return what identifies a turn."""
        key = None if self._spec.id is None else self._spec.id.find(self.turns[number], self._where)
        return f"message {number + 1}" if key is None else f"message {quoted(key)}"

    def role(self, turn: Record) -> str:
        """Return a turn's role in the usual words."""
        value = self._spec.role.find(turn, self._where)
        if value is None:
            raise FeedbackError(
                f"{self._where}: {self._spec.role.source}: a turn has no {quoted(self._spec.role.text)}."
            )
        name = str(value).strip().lower()
        return self._spec.roles.get(name) or ROLES.get(name) or str(value)

    def judged_other(self, turn: Record) -> LeftOut:
        """Return why a judged turn is left out if it is not the assistant's.

        Raises:
            FeedbackError: its role is unknown, so it may be the assistant's.
        """
        role = self.role(turn)
        if role not in ROLES.values():
            raise FeedbackError(
                f"{self._where}: {self._spec.messages.source}: a judged turn has the unknown role {quoted(role)}. Add it to "
                f"`roles`, for example {quoted(role)}: assistant."
            )
        return LeftOut(NOT_ASSISTANT, role)

    def before(self, number: int) -> list[dict[str, Any]]:
        """Return the turns that lead to one, the first of the conversation first."""
        found: list[dict[str, Any]] = []
        at = self._before[number]
        while at is not None:
            if at == _MISSING:
                raise LeftOut(MISSING_TURNS, f"what comes before {self.name(number)}")
            if len(found) >= len(self.turns):
                raise FeedbackError(f"{self._where}: {self.name(number)} is its own ancestor.")
            found.append(self.turns[at])
            at = self._before[at]
        return found[::-1]

    def message(self, turn: Record) -> tuple[Message, ...]:
        """Return a turn as messages."""
        for reason, path in self._spec.leave_out:
            if holds(path.find(turn, self._where)):
                raise LeftOut(reason, path.name_in(turn))
        kept = {name: turn[name] for name in _KEPT if turn.get(name) is not None}
        kept |= {name: turn[name] for name in REASONING if isinstance(turn.get(name), str)}
        if self._spec.text is not None:
            text = self._spec.text.find(turn, self._where)
            kept["content"] = "" if text is None else text  # null is how tables store an empty text
        else:
            names = (*TEXT_KEYS, "parts")
            kept |= {name: _parts(turn[name]) for name in names if turn.get(name) is not None}
            kept |= {name: turn[name] for name in MEDIA_KEYS if holds(turn.get(name))}
        turns = as_turns([{"role": self.role(turn), **kept}], self._where, self._field)
        assert not isinstance(turns, str)
        return turns


_MISSING = -1
# Keys of a turn beside its text that are a part of the message.
_KEPT = (
    *("tool_calls", "toolCalls", "function_call", "functionCall", "toolInvocations", "tool_call_id", "toolCallId"),
    "refusal",
)
# All keys of a turn beside its text that are read.
KEYS_OF_TURNS = (*_KEPT, *REASONING, *MEDIA_KEYS, "parts")


def _in_order(turns: list[dict[str, Any]]) -> list[int | None]:
    """Return the position of the turn before each in a list."""
    return [number - 1 if number else None for number in range(len(turns))]


def _parts(value: object) -> object:
    """Return the list of parts in a JSON text, as tables store the content of a message; any other value as it is."""
    found = opened(value)
    are_parts = isinstance(found, list) and bool(found) and all(isinstance(p, dict) and "type" in p for p in found)
    return found if are_parts else value


def _key(value: object) -> object:
    return value if isinstance(value, str | int | None) else quoted(value)
