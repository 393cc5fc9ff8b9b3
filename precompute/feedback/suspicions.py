"""Count rows that are probably misread, for the warnings of the plan."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from offline_kto.kto_core.errors import shown
from offline_kto.kto_core.feedback.conversations import says_something
from offline_kto.kto_core.feedback.labels import has_no_value, number_in, usual_label
from offline_kto.kto_core.feedback.message_keys import ROLES
from offline_kto.kto_core.feedback.message_text import resembles_messages
from offline_kto.kto_core.feedback.messages import Message, Turns
from offline_kto.kto_core.feedback.pair_verdicts import doubtful
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.stored_values import opened
from offline_kto.precompute.feedback.places_found import Places

# What tools write into a prompt in place of an image, a video or a sound; and media, or references to them, in any text.
_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>")
_MEDIA = re.compile(r"data:(?:image|video|audio)/[\w.+-]+;base64,|@@@langfuseMedia:")
_BEGIN_MEDIA = ("data:", "@@@langfuseMedia:")  # found faster than the pattern
# Marks with which chat templates begin and end turns. Those of the tokenizer's own template are recognised before.
_TEMPLATE = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant|system|end_of_turn)\|>|\[/INST\]"
    r"|<\|START_OF_TURN_TOKEN\|>|<\|(?:channel|message|start)\|>|<｜(?:User|Assistant)｜>|### (?:Response|Assistant):"
)
_BEGIN_MARKS = ("<|", "<start_of_turn>", "[/INST]", "<｜", "### ")  # found faster than the pattern
# Vicuna's turns, which may be on one line.
_VICUNA = ("USER: ", "ASSISTANT:")
# Marks in an answer: of special tokens, and of Anthropic's turns that a model wrote on its own.
_IN_ANSWER = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant|system)\|>"
    r"|<\|START_OF_TURN_TOKEN\|>|<\|(?:channel|message)\|>|<｜(?:User|Assistant)｜>"
)
_NEXT_TURNS = ("\n\nHuman:", "\n\nAssistant:")
# Turns whose roles are words: with a colon, or as they remain without the special tokens around them.
_ANSWER = re.compile(r"\n(?:ASSISTANT|Assistant|assistant|AI|Bot|bot|Model|model)(?::|\s*\Z)")
_ROLES_IN_WORDS = re.compile(
    r"\n(?:assistant|ai|bot):\s*\Z|\A(?:system|user)\n[\s\S]*\nassistant\s*\Z|(?:\A|\n)(?:user|human):[\s\S]*?\n(?:assistant|ai|bot|model):",
    re.IGNORECASE,
)
# Shorter prompts may begin an answer by chance, unless most answers do, and a few answers may repeat a question.
_LONG_PROMPT, _MANY = 20, 0.1
_SHORT_PROMPT, _MOST = 3, 0.5
_MOST_ROLES = 10
# Columns with the conversation of a record. A session may contain several conversations, unless the turns are counted.
_SESSIONS = ("session_id", "sessionId")
_TURNS = ("turn", "turn_id", "turn_index", "turn_number", "turnIndex", "message_index", "message_pair_num")
CONVERSATIONS = (
    *("conversation_id", "conversationId", "thread_id", "threadId", "chat_id", "chatId"),
    *("dialogue_id", "dialogueId", "dialog_id", "dialogId", *_SESSIONS),
)
_CONVERSATIONS = frozenset(CONVERSATIONS)
# Columns that say that an answer failed, was cut or was deleted, or its vote withdrawn, with the words or the numbers for it; empty for any
# value but false.
FAILURES: Final[Mapping[str, Collection[str] | range]] = {
    "status": frozenset(("failed", "error", "incomplete", "cancelled", "canceled", "draft", "discarded")),
    "state": frozenset(("failed", "error")),
    "finish_reason": frozenset(("length", "content_filter", "error")),
    "stop_reason": frozenset(("length", "max_tokens", "content_filter", "error")),
    "level": frozenset(("error",)),
    **dict.fromkeys(("error", "error_message", "exception", "traceback"), frozenset[str]()),
    **dict.fromkeys(("deleted", "is_deleted", "deleted_at", "deletedAt"), frozenset[str]()),
    **dict.fromkeys(("response_status", "responseStatus", "status_code", "statusCode", "http_status"), range(400, 600)),
    **dict.fromkeys(("truncated", "is_truncated", "discarded", "is_discarded", "spam", "is_spam"), frozenset[str]()),
    **dict.fromkeys(("withdrawn", "is_withdrawn", "retracted", "revoked"), frozenset[str]()),
}
# Columns with what a model returned, and the keys in it that lead to why it stopped.
_RETURNED = frozenset(("output", "outputs", "response", "result", "completion", "choices", "candidates", "generations"))
_INSIDE = (*sorted(_RETURNED), "message", "body", "generation_info", "response_metadata", "kwargs")
_STOPPED: Final = dict.fromkeys(
    ("finish_reason", "stop_reason", "finishReason", "stopReason"),
    frozenset(("length", "max_tokens", "content_filter", "error", "safety")),
)
_DEEPEST = 6


@dataclass
class Suspicions:
    """Rows that are probably misread.

    Attributes:
        media: rows whose texts refer to media that the record does not have, or contain them in base64.
        messages: rows with a text that resembles messages.
        marks: rows of messages with the turn marks of a chat template that is not the tokenizer's.
        written: rows of messages whose answer contains marks of turns or channels, or the next turns.
        repeated: rows whose answer begins with its prompt, which is long.
        begun: rows whose answer begins with its prompt, however short.
        broken: rows with a message in the prompt whose status is that of a failure.
        silent: rows with an earlier answer that is empty.
        rows: number of rows.
        roles: rows by their unknown roles, of which a template writes whatever they are.
        failed: records by the column, or the key in what a model returned, that says that their answer failed.
        doubtful: pairs by the column that may say that their rejected side is the better one.
        conversations: number of records by the hash of their conversation, for each column that names it.
        has_earlier_turns: whether a prompt contains an earlier answer.
        is_part: whether this is one part of the data, to be merged. Limits apply to all parts together.
    """

    media: Places = field(default_factory=Places)
    messages: Places = field(default_factory=Places)
    marks: Places = field(default_factory=Places)
    written: Places = field(default_factory=Places)
    repeated: Places = field(default_factory=Places)
    begun: Places = field(default_factory=Places)
    silent: Places = field(default_factory=Places)
    broken: Places = field(default_factory=Places)
    roles: dict[str, Places] = field(default_factory=dict)
    rows: int = 0
    failed: dict[str, Places] = field(default_factory=dict)
    doubtful: dict[str, Places] = field(default_factory=dict)
    conversations: dict[str, Counter[int]] = field(default_factory=dict)
    has_earlier_turns: bool = False
    is_part: bool = False

    def add_record(self, record: Mapping[str, object], where: str) -> None:
        """Count a record of a conversation, of an answer that failed, or of a pair with a doubtful order."""
        for name in record.keys() & FAILURES.keys():
            if _failed(record[name], FAILURES[name]):
                self.failed.setdefault(name, Places()).add(where)
        for name in record.keys() & _RETURNED:
            for found in dict.fromkeys(_stopped(record[name], name)):
                self.failed.setdefault(found, Places()).add(where)
        for name in doubtful(record):
            self.doubtful.setdefault(name, Places()).add(where)
        for name in record.keys() & _CONVERSATIONS:
            value = record[name]
            if name in _SESSIONS and value is not None and record.keys().isdisjoint(_TURNS):
                continue
            if isinstance(value, str | int) and value != "" and not isinstance(value, bool):
                self.conversations.setdefault(name, Counter())[_hash(value)] += 1

    def add(self, row: FeedbackRow) -> None:
        """Examine a row."""
        self.rows += 1
        asked, answered = _texts(row.prompt), _texts(row.completion)
        if any(map(_PLACEHOLDER.search, asked)) or any(map(_has_media, (*asked, *answered))):
            self.media.add(row.where)
        if any(map(resembles_messages, (*asked, *answered))):
            self.messages.add(row.where)
        if not isinstance(row.prompt, str) and any(map(_has_turn_marks, asked)):
            self.marks.add(row.where)
        if not isinstance(row.prompt, str) and any(map(_goes_on, answered)):
            self.written.add(row.where)
        question = asked[-1].strip() if asked else ""
        if len(question) >= _SHORT_PROMPT and answered and answered[0].lstrip().startswith(question):
            self.begun.add(row.where)
            if len(question) >= _LONG_PROMPT:
                self.repeated.add(row.where)
        if not isinstance(row.prompt, str) and any(message["role"] == "assistant" for message in row.prompt):
            self.has_earlier_turns = True
            if any(message["role"] == "assistant" and not says_something(message) for message in row.prompt):
                self.silent.add(row.where)
        if not isinstance(row.prompt, str) and any(map(_has_failed, row.prompt)):
            self.broken.add(row.where)
        sides = [side for side in (row.prompt, row.completion) if not isinstance(side, str)]
        for role in dict.fromkeys(message["role"] for side in sides for message in side):
            if role not in _KNOWN_ROLES and self._counts_role(role):
                self.roles.setdefault(role, Places()).add(row.where)

    def _counts_role(self, role: str) -> bool:
        return self.is_part or role in self.roles or len(self.roles) < _MOST_ROLES

    def merge(self, later: "Suspicions") -> None:
        """Add the rows of the next part of the data."""
        self.media.merge(later.media)
        self.messages.merge(later.messages)
        self.marks.merge(later.marks)
        self.written.merge(later.written)
        self.repeated.merge(later.repeated)
        self.begun.merge(later.begun)
        self.silent.merge(later.silent)
        self.broken.merge(later.broken)
        self.rows += later.rows
        for role, places in later.roles.items():
            if self._counts_role(role):
                self.roles.setdefault(role, Places()).merge(places)
        for name, places in later.failed.items():
            self.failed.setdefault(name, Places()).merge(places)
        for name, places in later.doubtful.items():
            self.doubtful.setdefault(name, Places()).merge(places)
        for name, counts in later.conversations.items():
            self.conversations.setdefault(name, Counter()).update(counts)
        self.has_earlier_turns = self.has_earlier_turns or later.has_earlier_turns

    def in_words(self, unused: Collection[str]) -> list[str]:
        """Return a sentence for each suspicion.

        Args:
            unused: the columns that are not read.
        """
        found = []
        for name in () if self.has_earlier_turns else unused:
            shared = sum(count for count in self.conversations.get(name, Counter()).values() if count > 1)
            if shared:
                found.append(
                    f"{shared:,} records share a {name} with another one, but no prompt contains an earlier answer. If they are "
                    "turns of one conversation, join them with a mapping (--map FILE: join and turns)."
                )
        for name, places in sorted(self.failed.items()):
            if name in unused or "." in name:
                found.append(
                    f"records whose '{name}' suggests that the answer failed, was cut or was deleted, or its vote withdrawn: {places}. "
                    "Remove them, or leave them out with `where` in a mapping (--map FILE), if their answers were not judged as they are."
                )
        for name, places in sorted(self.doubtful.items()):
            if name in unused:
                found.append(
                    f"pairs whose '{name}' may mean that 'rejected' is the better side: {places}. It is not read: 'chosen' is taken "
                    "as the better one. Swap the sides of these pairs, or leave them out with `where` in a mapping (--map FILE), if it "
                    "means that."
                )
        if self.media:
            found.append(
                "rows with <image>, <video> or <audio> in the prompt, or a text with media (data:image/..., @@@langfuseMedia:...): "
                f"{self.media}. They are scored as text; remove these rows if the answers need the media."
            )
        if self.messages:
            found.append(
                f"rows with a text that looks like messages but is scored as text: {self.messages}. Write messages "
                'as [{"role": "user", "content": "..."}], or describe the file with --map FILE.'
            )
        if self.marks:
            found.append(
                f"rows whose prompt contains the turn marks of a chat template that is not the tokenizer's: {self.marks}. "
                "They are scored as words of a message; write the turns as messages, or keep text with --chat never."
            )
        if self.written:
            found.append(
                f"rows whose answer contains the marks of further turns or channels: {self.written}. They are scored as words of the "
                "answer; remove them, or the row."
            )
        repeated = self.begun if self.begun.count >= _MOST * self.rows else self.repeated
        if repeated and repeated.count >= _MANY * self.rows:
            found.append(
                f"rows whose answer begins with the whole prompt: {repeated}. It is scored as part of the answer; "
                "remove it from the answers if the model did not write it."
            )
        if self.silent:
            found.append(
                f"rows with an earlier answer that is empty: {self.silent}. It is part of the prompt, as a turn without "
                "text; remove it, or the row, if an answer was lost."
            )
        if self.broken:
            found.append(
                f"rows with a message that failed in the prompt ('status'): {self.broken}. Its text is part of the prompt, as it "
                "is; remove the row if the model did not see it."
            )
        if self.roles:
            roles = ", ".join(f"{shown(role)} in {places}" for role, places in self.roles.items())
            found.append(
                f"unknown roles of messages: {roles}. The chat template may write them as they are, also if the model has never seen them; "
                "rename them to user, assistant, system or tool."
            )
        return found


def _hash(value: str | int) -> int:
    """Return a number for the name of a conversation, the same in every process; Python's own hash of a text is not."""
    if isinstance(value, int):
        return hash(value)
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _stopped(value: object, name: str, depth: int = _DEEPEST) -> Iterator[str]:
    """Yield the keys in what a model returned that say that it was cut, as "output.choices[].finish_reason"."""
    if isinstance(value, str) and not any(key in value for key in _STOPPED):
        return
    found = opened(value)
    if isinstance(found, list):
        for one in found if depth else ():
            yield from _stopped(one, f"{name}[]", depth - 1)
    elif isinstance(found, Mapping):
        yield from (f"{name}.{key}" for key, words in _STOPPED.items() if _failed(found.get(key), words))
        for key in _INSIDE if depth else ():
            if isinstance(inner := found.get(key), Mapping | list):
                yield from _stopped(inner, f"{name}.{key}", depth - 1)


def _failed(value: object, words: Collection[str] | range) -> bool:
    if isinstance(words, range):
        return number_in(value) in words
    if words:
        return isinstance(value, str) and value.strip().lower() in words
    return not has_no_value(value) and usual_label(value) is not False


_KNOWN_ROLES = frozenset(ROLES.values())


def _has_media(text: str) -> bool:
    return any(begin in text for begin in _BEGIN_MEDIA) and _MEDIA.search(text) is not None


def _has_failed(message: Message) -> bool:
    return len(message) > 2 and "status" in message and _failed(message["status"], FAILURES["status"])


def _goes_on(text: str) -> bool:
    """Return whether an answer contains the marks of a turn or of a channel, or the next turns of a conversation."""
    if any(mark in text for mark in _BEGIN_MARKS) and _IN_ANSWER.search(text):
        return True
    return _in_turn(text, _NEXT_TURNS)


def _in_turn(text: str, marks: tuple[str, str]) -> bool:
    """Return whether both marks are in a text, the second after the first."""
    at = text.find(marks[0])
    return at >= 0 and text.find(marks[1], at) >= 0


def _has_turn_marks(text: str) -> bool:
    """Return whether a text contains turns of a conversation, as a chat template writes them."""
    if any(mark in text for mark in _BEGIN_MARKS) and _TEMPLATE.search(text):
        return True
    if _in_turn(text, _VICUNA):
        return True
    return _ANSWER.search(text) is not None and _ROLES_IN_WORDS.search(text) is not None


def _texts(side: Turns) -> list[str]:
    """Return a text, or the texts of messages, without those of tools: their results may be JSON."""
    if isinstance(side, str):
        return [side]
    return [message["content"] for message in side if message["role"] != "tool"]
