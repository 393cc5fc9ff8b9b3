"""Exports of votes, and of messages that are joined, and what each becomes, written by hand from reading them."""

import json
from typing import Any

from app_exports import UNRATED, ZERO, Case, gradio, row, trace
from tool_exports import asked_dify


def run(name: str, asked: str, said: str, **votes: int) -> dict[str, Any]:
    return {
        "id": name,
        "run_type": "chain",
        "inputs": {"question": asked},
        "outputs": {"answer": said},
        "feedback_stats": {"thumb": {"n": sum(votes.values()), "avg": None, "values": votes}},
    }


# Each word with the number of its votes.
LANGSMITH_COUNTS = Case(
    "langsmith",
    [run("1", "Hi", "Hello", up=10, down=1), run("2", "Sum", "5", up=1, down=10), run("3", "So?", "No", up=0, down=2)],
    [row("Hi", "Hello", True), row("Sum", "5", False), row("So?", "No", False)],
    options={"votes": "share"},
)
LANGSMITH_TABLE_COUNTS = Case(
    "langsmith_table",
    [
        {"inputs.question": asked, "outputs.answer": said, "feedback_stats.thumb.values": json.dumps(votes)}
        for asked, said, votes in (("Hi", "Hello", {"up": 3, "down": 1}), ("Sum", "5", {"up": 1, "down": 3}))
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
    options={"votes": "share"},
)

# A vote that was withdrawn; `value` is the text of the answer.
GRADIO_WITHDRAWN = Case(
    "gradio_chat",
    [
        {"conversation": gradio("Tea?", "Yes"), "index": "1", "value": "Yes", "flag": "Dislike", "timestamp": "2026"},
        {"conversation": gradio("Ice?", "No"), "index": "1", "value": "No", "flag": "Like", "timestamp": "2026"},
        {"conversation": gradio("Hot?", "Yes"), "index": "1", "value": "Yes", "flag": "", "timestamp": "2026"},
    ],
    [row("Tea?", "Yes", False), row("Ice?", "No", True)],
    {UNRATED: 1},
)
GRADIO_PAIRS_WITHDRAWN = Case(
    "gradio_chat_pairs",
    [
        {"conversation": '[["Tea?", "Yes"]]', "index": "[0, 1]", "value": "Yes", "flag": flag, "timestamp": "2026"}
        for flag in ("Dislike", None)
    ],
    [row("Tea?", "Yes", False)],
    {UNRATED: 1},
)
# Without `flag`, the vote is there.
GRADIO_VALUE = Case(
    "gradio_chat",
    [{"conversation": gradio("Tea?", "Yes"), "index": "1", "value": "Dislike", "timestamp": "2026"}],
    [row("Tea?", "Yes", False)],
)


def flowise(at: Any, role: str, content: str, rating: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{at}{role}",
        "chatflowid": "f",
        "chatId": "c",
        "sessionId": "s",
        "createdDate": at,
        "role": role,
        "content": content,
        "rating": rating,
        **more,
    }


def ai_chat(at: Any, role: str, text: str, vote: bool | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{at}{role}",
        "chatId": "c",
        "createdAt": at,
        "role": role,
        "parts": [{"type": "text", "text": text}],
        "attachments": [],
        "isUpvoted": vote,
        **more,
    }


TWO_TURNS = [row("Hi", "Yo", True), row("user: Hi | assistant: Yo | user: Tea?", "Mud", False)]


def in_turns(write: Any, times: tuple[Any, ...], up: Any, down: Any, users: str, bots: str) -> list[dict[str, Any]]:
    """Return two turns, the later one first."""
    first, second, third, fourth = times
    return [
        write(third, users, "Tea?"),
        write(fourth, bots, "Mud", down),
        write(first, users, "Hi"),
        write(second, bots, "Yo", up),
    ]


# Times whose order as text is another one.
FLOWISE_HOURS = Case(
    "flowise_db",
    in_turns(
        flowise,
        ("2026-01-01 9:59:00", "2026-01-01 9:59:05", "2026-01-01 10:01:00", "2026-01-01 10:01:05"),
        *("THUMBS_UP", "THUMBS_DOWN", "userMessage", "apiMessage"),
    ),
    TWO_TURNS,
)
AI_CHATBOT_DAYS = Case(
    "ai_chatbot",
    in_turns(
        ai_chat,
        ("1/9/2026 9:00", "1/9/2026 9:01", "1/10/2026 9:00", "1/10/2026 9:01"),
        *(True, False, "user", "assistant"),
    ),
    TWO_TURNS,
)
AI_CHATBOT_NUMBERS = Case(
    "ai_chatbot", in_turns(ai_chat, (998, 999, 1000, 1001), True, False, "user", "assistant"), TWO_TURNS
)

# Rows of one message: as often as it has votes, or by mistake.
FLOWISE_VOTES = Case(
    "flowise_db",
    [
        flowise("2026-01-01", "userMessage", "Hi"),
        *(flowise("2026-01-02", "apiMessage", "Yo", one) for one in ("THUMBS_UP", "THUMBS_UP", "THUMBS_DOWN")),
        flowise("2026-01-03", "userMessage", "Tea?"),
        *(
            flowise("2026-01-04", "apiMessage", "Mud", one, rater=who)
            for who, one in (("a", "THUMBS_DOWN"), ("b", None))
        ),
    ],
    [row("user: Hi | assistant: Yo | user: Tea?", "Mud", False)],
    {"raters disagree": 1},
)
AI_CHATBOT_VOTES = Case(
    "ai_chatbot",
    [
        ai_chat("2026-01-01", "user", "Hi"),
        *(ai_chat("2026-01-02", "assistant", "Yo", vote, rater=who) for who, vote in enumerate((True, True))),
        *[ai_chat("2026-01-03", "user", "Tea?")] * 2,
        ai_chat("2026-01-04", "assistant", "Mud", False),
    ],
    TWO_TURNS,
)
# The input of a call may end with its answer.
LANGFUSE_WHOLE = Case(
    "langfuse",
    [
        trace(name, [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], answer, thumb=[vote])
        for name, asked, said, answer, vote in (
            ("1", "Hi", "Hello", {"role": "assistant", "content": "Hello"}, 1),
            ("2", "Sum", "5 ", "5", 0),
        )
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
)


def annotated(task: int, asked: str, said: str, quality: str, by: int) -> dict[str, Any]:
    beside = {"annotator": by, "annotation_id": 10 * by + task, "created_at": "x", "updated_at": "x", "lead_time": 2.0}
    return {"id": task, "prompt": asked, "response": said, "quality": quality, **beside}


# Two projects, whose tasks have the same ids.
LABEL_STUDIO_PROJECTS = Case(
    "labelstudio_min",
    [
        annotated(1, "Hi", "Hello", "good", 1),
        annotated(1, "Sum", "5", "bad", 2),
        annotated(2, "Tea?", "Mud", "bad", 1),
        annotated(2, "Tea?", "Green", "good", 3),
        annotated(1, "Hi", "Hello", "good", 3),
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False), row("Tea?", "Mud", False), row("Tea?", "Green", True)],
)
# Two chatflows with the same session.
FLOWISE_FLOWS = Case(
    "flowise_db",
    [
        flowise(at, role, content, rating, chatflowid=flow)
        for flow, at, role, content, rating in (
            ("f", "2026-01-01", "userMessage", "Hi", None),
            ("g", "2026-01-02", "userMessage", "Tea?", None),
            ("f", "2026-01-03", "apiMessage", "Yo", "THUMBS_UP"),
            ("g", "2026-01-04", "apiMessage", "Mud", "THUMBS_DOWN"),
        )
    ],
    [row("Hi", "Yo", True), row("Tea?", "Mud", False)],
)


def dify(chat: str, at: int | None, before: str | None, asked: str, said: str, rating: str | None) -> dict[str, Any]:
    return {**asked_dify(f"{chat}{said}", before, asked, said, rating), "conversation_id": chat, "created_at": at}


# The API writes an id of zeros, and means the message before; so does a file without any id of a parent.
DIFY_IN_TIME = Case(
    "dify_messages",
    [
        dify("zeros", 1000, ZERO, "Tea?", "Mud", "dislike"),
        dify("zeros", 999, ZERO, "Hi", "Yo", "like"),
        dify("none", 1, None, "Hi", "Yo", None),
        dify("none", 2, None, "Tea?", "Mud", "dislike"),
        dify("none", 3, None, "Tea?", "Green", "like"),
        dify("ids", 1, None, "Hi", "Yo", "like"),
        dify("ids", 2, "idsYo", "Tea?", "Mud", None),
        dify("ids", 3, ZERO, "Why?", "So", "dislike"),
        dify("ids", 4, None, "Ice?", "No", "dislike"),
    ],
    [
        TWO_TURNS[1],
        row("Hi", "Yo", True),
        TWO_TURNS[1],
        row("user: Hi | assistant: Yo | user: Tea?", "Green", True),
        row("Hi", "Yo", True),
        row("user: Hi | assistant: Yo | user: Tea? | assistant: Mud | user: Why?", "So", False),
        row("Ice?", "No", False),
    ],
    {UNRATED: 2},
)


def scored_trace(name: str, asked: str, said: str, *scores: dict[str, Any]) -> dict[str, Any]:
    return {**trace(name, asked, said), "scores": [{"name": "thumb", "stringValue": None, **one} for one in scores]}


# Scores of an observation, or of a session, are not those of the trace; those of the record itself are.
LANGFUSE_SCORES = Case(
    "langfuse",
    [
        scored_trace("1", "Hi", "Hello", {"value": 1, "observationId": None}, {"value": 0, "observationId": "o"}),
        scored_trace("2", "Sum", "5", {"value": 0, "traceId": "2", "sessionId": "s"}, {"value": 1, "session_id": "s"}),
        scored_trace("3", "So?", "No", {"value": 1, "observationId": "o", "traceId": "3"}),
        scored_trace("4", "Tea?", "Mud", {"value": 1, "sessionId": "s", "traceId": None}),
        scored_trace("o", "Why?", "So", {"value": 1, "observation_id": "o", "traceId": "1"}),
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False), row("Why?", "So", True)],
    {"scores of an observation or a session": 2},
)

JOIN_CASES = {name: case for name, case in dict(globals()).items() if isinstance(case, Case)}
