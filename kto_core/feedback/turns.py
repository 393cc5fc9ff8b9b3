"""Find the judged turns of a conversation, and the turns that lead to each: along a list, or up a tree."""

from collections.abc import Iterator
from typing import Any

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.labels import number_in
from offline_kto.kto_core.feedback.left_out import MEDIA, NOT_CHOSEN, TIE, UNRATED, LeftOut
from offline_kto.kto_core.feedback.mapping import JudgedTurns, Mapping, Native, Record
from offline_kto.kto_core.feedback.messages import ROLES, Message, as_turns
from offline_kto.kto_core.feedback.quoting import quoted


def judged_rows(mapping: Mapping, turns: JudgedTurns, record: Record, where: str) -> Iterator[Native | LeftOut]:
    """Yield a row for each judged turn of the assistant's: the turns before it, the turn, and its label.

    Raises:
        FeedbackError: no list of turns, a parent that is its own ancestor, the judged turn is not there.
    """
    conversation = _Conversation(mapping, turns, record, where)
    if turns.label is None:
        yield from _ranked_pairs(mapping, turns, conversation, record, where)
        return
    rated = None if turns.rated is None else turns.rated.find(record, where)
    found = False
    for number, turn in enumerate(conversation.turns):
        if turns.rated is not None and (number if turns.id is None else turns.id.find(turn, where)) != rated:
            continue
        if conversation.role(turn) != "assistant":
            continue
        found = True
        try:
            label = turns.label.verdict(turn if turns.rated is None else record, where)
            before = [one for other in conversation.before(number) for one in conversation.message(other)]
            judged = list(conversation.message(turn))
        except LeftOut as left:
            yield left
            continue
        yield {
            "prompt": mapping.stripped(tuple(before)),
            "completion": mapping.stripped(tuple(judged)),
            "label": label,
            **mapping.beside(record, where),
        }
    if turns.rated is not None and not found:
        raise FeedbackError(
            f"{where}: {turns.rated.source}: no turn of the assistant's is {quoted(rated)}, which is the one that was rated."
        )


def _ranked_pairs(
    mapping: Mapping, turns: JudgedTurns, conversation: "_Conversation", record: Record, where: str
) -> Iterator[Native | LeftOut]:
    """Yield a pair of the best answer to a turn and each of the others."""
    assert turns.rank is not None
    assert turns.parent is not None
    answers: dict[object, list[tuple[float, int]]] = {}
    for number, turn in enumerate(conversation.turns):
        rank = number_in(turns.rank.find(turn, where))
        if conversation.role(turn) != "assistant":
            continue
        if rank is None:
            yield LeftOut(UNRATED)
        else:
            answers.setdefault(_key(turns.parent.find(turn, where)), []).append((rank, number))
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
    """The turns of a record."""

    def __init__(self, mapping: Mapping, turns: JudgedTurns, record: Record, where: str) -> None:
        self._mapping, self._spec, self._where = mapping, turns, where
        found = turns.messages.find(record, where)
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise FeedbackError(f"{where}: {turns.messages.source}: no list of turns, got {quoted(found)}.")
        self.turns: list[dict[str, Any]] = found
        self._by_id = {} if turns.id is None else {_key(turns.id.find(one, where)): one for one in found}

    def role(self, turn: Record) -> str:
        """Return a turn's role in the usual words."""
        value = self._spec.role.find(turn, self._where)
        name = str(value).strip().lower()
        return self._spec.roles.get(name) or ROLES.get(name) or str(value)

    def before(self, number: int) -> list[dict[str, Any]]:
        """Return the turns that lead to one, the first of the conversation first."""
        parent = self._spec.parent
        if parent is None:
            return self.turns[:number]
        found: list[dict[str, Any]] = []
        key = parent.find(self.turns[number], self._where)
        while (turn := self._by_id.get(_key(key))) is not None:
            if len(found) >= len(self.turns):
                raise FeedbackError(f"{self._where}: {parent.source}: a turn is its own ancestor, {quoted(key)}.")
            found.append(turn)
            key = parent.find(turn, self._where)
        return found[::-1]

    def message(self, turn: Record) -> tuple[Message, ...]:
        """Return a turn as messages."""
        refused = None if self._spec.refuse is None else self._spec.refuse.find(turn, self._where)
        if refused:  # a list of files, or a word that says why
            raise LeftOut(NOT_CHOSEN, refused) if isinstance(refused, str) else LeftOut(MEDIA, quoted(refused))
        kept = {name: turn[name] for name in ("tool_calls", "function_call", "refusal") if turn.get(name) is not None}
        if self._spec.text is not None:
            kept["content"] = self._spec.text.find(turn, self._where)
        else:
            kept |= {name: turn[name] for name in ("content", "value", "text") if turn.get(name) is not None}
        turns = as_turns([{"role": self.role(turn), **kept}], self._where, self._spec.messages.text)
        assert not isinstance(turns, str)
        return turns


def _key(value: object) -> object:
    return value if isinstance(value, str | int | None) else quoted(value)
