"""Small exports in the form that tracing tools and further chat applications write, and what each becomes, written by hand."""

import json
from typing import Any

from app_exports import EMPTY, MEDIA, NOT_CHOSEN, UNRATED, ZERO, Case, row

ASKED_HI = [{"role": "user", "content": "Hi"}]
SAID_HELLO = {"role": "assistant", "content": "Hello"}
BOTH = [row("Hi", "Hello", True), row("Hi", "Hello", False)]


def blob_trace(**more: Any) -> dict[str, Any]:
    return {
        "id": "t",
        "timestamp": "2026",
        "name": "chat",
        "environment": "default",
        "project_id": "p",
        "metadata": {"a": "b"},
        "user_id": "u",
        "session_id": "s",
        "public": False,
        "tags": ["x"],
        "input": {"messages": ASKED_HI},
        "output": SAID_HELLO,
        **more,
    }


LANGFUSE_BLOB = Case(
    "langfuse",
    [
        blob_trace(scores=[{"name": "user-feedback", "value": 0, "string_value": "thumbs_up"}]),
        blob_trace(scores=[{"name": "user-feedback", "value": 0, "string_value": None}]),
        blob_trace(scores=[]),
    ],
    BOTH,
    {UNRATED: 1},
)
PRODIGY = Case(
    "prodigy",
    [
        {"prompt": "Hi", "text": "Hello", "answer": "accept", "_input_hash": 1, "_task_hash": 1},
        {"prompt": "Hi", "text": "Hello", "answer": "reject", "_input_hash": 1, "_task_hash": 2},
        {"prompt": "Hi", "text": "Hello", "answer": "ignore", "_input_hash": 1, "_task_hash": 3},
    ],
    BOTH,
    {NOT_CHOSEN: 1},
)
PRODIGY_RESPONSE = Case(
    "prodigy",
    [
        {"question": "Hi", "response": "Hello", "answer": "accept", "meta": {"system": "Be kind."}},
        {"question": "Hi", "response": "Hello", "answer": "reject", "meta": {}},
    ],
    [row("system: Be kind. | user: Hi", "Hello", True), row("Hi", "Hello", False)],
)
PRODIGY_LABEL = Case(
    "prodigy",
    [
        {"prompt": "Hi", "text": "Hello", "label": "GOOD", "answer": "accept"},
        {"prompt": "Hi", "text": "Hello", "label": "BAD", "answer": "accept"},
        {"prompt": "Hi", "text": "Hello", "label": "BAD", "answer": "reject"},  # it does not say which label is right
    ],
    BOTH,
    {NOT_CHOSEN: 1},
)
PRODIGY_CHOICE = Case(
    "prodigy",
    [
        {"prompt": "Hi", "text": "Hello", "options": [{"id": "up"}, {"id": "down"}], "accept": [one], "answer": answer}
        for one, answer in (("up", "accept"), ("down", "accept"), ("down", "reject"))
    ],
    BOTH,
    {NOT_CHOSEN: 1},
)
OBSERVATION = {
    "id": "o",
    "trace_id": "t",
    "project_id": "p",
    "environment": "default",
    "type": "GENERATION",
    "parent_observation_id": None,
    "start_time": "2026",
    "end_time": "2026",
    "name": "llm",
    "level": "DEFAULT",
    "input": json.dumps(ASKED_HI),
    "output": json.dumps(SAID_HELLO),
    "provided_model_name": "m",
    "usage_details": {"input": 1},
    "trace_name": "chat",
    "metadata": {"a": "b"},
}
LANGFUSE_BLOB_OBSERVATIONS = Case(
    "langfuse",
    [{**OBSERVATION, "scores": [{"name": "thumb", "value": value}]} for value in (1, 0)],
    BOTH,
)

PHOENIX_SPAN = {
    "context.span_id": "a",
    "name": "llm",
    "attributes.llm.input_messages": [{"message.role": "user", "message.content": "Hi"}],
    "attributes.llm.output_messages": [{"message.role": "assistant", "message.content": "Hello"}],
}
PHOENIX_EVALS = Case(
    "phoenix",
    [
        {**PHOENIX_SPAN, "eval.user feedback.label": label, "eval.user feedback.score": score}
        for label, score in (("thumbs-up", 1.0), ("thumbs-down", 0.0), (None, None))
    ],
    BOTH,
    {UNRATED: 1},
)

HELICONE = Case(
    "helicone",
    [
        {
            "response_id": "a",
            "response_status": 200,
            "request_id": "r",
            "request_body": {"model": "m", "messages": ASKED_HI, "temperature": 0.2},
            "response_body": {"object": "chat.completion", "choices": [{"index": 0, "message": SAID_HELLO}]},
            "feedback_rating": rating,
            "scores": scores,
        }
        for rating, scores in (
            (True, None),
            (False, None),
            (None, None),
            (None, {"helicone-score-feedback": 1}),
            (None, {"helicone-score-feedback": 0}),
        )
    ],
    BOTH * 2,
    {UNRATED: 1},
)

LUNARY = Case(
    "lunary",
    [
        {
            "id": "r",
            "projectId": "p",
            "type": "llm",
            "name": "m",
            "createdAt": "2026",
            "input": ASKED_HI,
            "output": SAID_HELLO,
            "metadata": {"a": "b"},
            "tags": None,
            "params": {"temperature": 1},
            "feedback": feedback,
        }
        for feedback in ({"thumb": "up", "comment": "nice"}, {"thumb": "down"}, None, {"comment": "hm"})
    ],
    BOTH,
    {UNRATED: 2},
)

OPIK_TRACE = {
    "id": "t",
    "name": "chat",
    "start_time": "2026",
    "input": {"messages": ASKED_HI},
    "output": {"choices": [{"message": SAID_HELLO}]},
}
OPIK = Case(
    "opik",
    [
        {**OPIK_TRACE, "feedback_scores": scores}
        for scores in (
            [{"name": "user", "category_name": None, "value": 1.0, "reason": "nice", "source": "ui"}],
            [{"name": "user", "category_name": None, "value": 0.0, "reason": None, "source": "ui"}],
            None,
        )
    ],
    BOTH,
    {UNRATED: 1},
)
OPIK_COLUMNS = Case(
    "opik",
    [
        {**OPIK_TRACE, "feedback_scores.user": 1, "feedback_scores.user_reason": "nice"},
        {**OPIK_TRACE, "feedback_scores.user": 0},
        {**OPIK_TRACE, "feedback_scores.user": "-"},
    ],
    BOTH,
    {UNRATED: 1},
)

BRAINTRUST = Case(
    "braintrust",
    [
        {
            "id": "e",
            "span_id": "e",
            "root_span_id": "e",
            "created": "2026",
            "input": ASKED_HI,
            "output": "Hello",
            "expected": None,
            "scores": scores,
            "metrics": {"tokens": 3},
            "span_attributes": {"name": "chat"},
        }
        for scores in ({"thumbs": 1}, {"thumbs": 0}, {"thumbs": None}, None)
    ],
    BOTH,
    {UNRATED: 2},
)


def graded(success: bool, output: str | None, human: bool | None = None) -> dict[str, Any]:
    """Return a result of promptfoo; a human's rating replaces that of the assertions."""
    parts = [{"pass": success, "score": 1, "assertion": {"type": "contains", "value": "H"}}]
    parts += [] if human is None else [{"pass": human, "score": 1, "assertion": {"type": "human"}}]
    passed = success if human is None else human
    return {
        "id": "x",
        "prompt": {"raw": "Say hi to Bob", "label": "Say hi to {{name}}"},
        "vars": {"name": "Bob"},
        "response": {"output": output},
        "success": passed,
        "score": 1,
        "gradingResult": {"pass": passed, "score": 1, "componentResults": parts},
    }


GRADED = [graded(True, "Hello"), graded(False, "Nope"), graded(False, None)]
GRADED_ROWS = [row("Say hi to Bob", "Hello", True), row("Say hi to Bob", "Nope", False)]
PROMPTFOO = Case(
    "promptfoo",
    {"evalId": "e", "results": {"version": 3, "results": GRADED, "stats": {"successes": 1}}, "config": {"a": "b"}},
    GRADED_ROWS,
    {EMPTY: 1},
    document=True,
)
PROMPTFOO_LINES = Case("promptfoo", GRADED, GRADED_ROWS, {EMPTY: 1})
PROMPTFOO_HUMAN = Case(
    "promptfoo",
    [graded(True, "Hello", False), graded(False, "Nope", True), graded(True, "Hi")],
    [row("Say hi to Bob", "Hello", False), row("Say hi to Bob", "Nope", True)],
    {UNRATED: 1},
    {"label_field": "human"},
)


def step(kind: str, output: str, value: int | None = None) -> dict[str, Any]:
    feedback = None if value is None else {"id": "f", "forId": "s", "value": value, "comment": "x"}
    return {"id": "s", "threadId": "t", "type": kind, "name": "n", "input": "", "output": output, "feedback": feedback}


CHAINLIT = Case(
    "chainlit",
    [
        {
            "id": "t",
            "createdAt": "2026",
            "name": "Hi",
            "steps": [
                step("user_message", "Hi"),
                step("run", ""),
                step("assistant_message", "Hello", 1),
                step("user_message", "Tea?"),
                step("tool", "searched"),
                step("assistant_message", "Mud", 0),
                step("user_message", "Really?"),
                step("assistant_message", "Yes"),
            ],
            "elements": [],
        }
    ],
    [row("Hi", "Hello", True), row("user: Hi | assistant: Hello | user: Tea?", "Mud", False)],
    {UNRATED: 1},
)

ANYTHING = {"id": 1, "prompt": "Hi", "response": "Hello", "sent_at": "2026", "workspace": "w", "username": "u"}
ANYTHINGLLM = Case(
    "anythingllm",
    [
        {**ANYTHING, "rating": "GOOD", "attachments": []},
        {**ANYTHING, "rating": "BAD"},
        {**ANYTHING, "rating": "--"},
        {**ANYTHING, "rating": "GOOD", "attachments": [{"type": "image", "image": "data:image/png;base64,x"}]},
    ],
    BOTH,
    {UNRATED: 1, MEDIA: 1},
)
ANYTHINGLLM_DB = Case(
    "anythingllm_db",
    [
        {
            "id": 1,
            "workspaceId": 1,
            "prompt": "Hi",
            "response": json.dumps({"text": "Hello", "sources": [], "type": "chat", "attachments": []}),
            "include": 1,
            "feedbackScore": score,
        }
        for score in (1, 0, None)
    ],
    BOTH,
    {UNRATED: 1},
)
# The column that the message about unrated rows would name.
ANYTHINGLLM_DB_FIELD = Case(
    "anythingllm_db",
    ANYTHINGLLM_DB.records,
    BOTH,
    {UNRATED: 1},
    {"label_field": "feedbackScore"},
)


def asked_dify(name: str, before: str | None, query: str, answer: str, rating: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "conversation_id": "c",
        "parent_message_id": before,
        "query": query,
        "answer": answer,
        "message_files": [],
        "feedback": None if rating is None else {"rating": rating},
        "error": None,
    }


DIFY_MESSAGES = Case(
    "dify_messages",
    [
        asked_dify("b", "a", "Tea?", "Mud", "dislike"),
        asked_dify("a", ZERO, "Hi", "Hello", "like"),
        asked_dify("d", "a", "Tea?", "Green", None),
        asked_dify("e", "lost", "Tea?", "Black", "like"),
    ],
    [row("user: Hi | assistant: Hello | user: Tea?", "Mud", False), row("Hi", "Hello", True)],
    {UNRATED: 1, "missing messages": 1},
)

ONYX = Case(
    "onyx",
    [
        {
            "chat_session_id": session,
            "message_pair_num": number,
            "user_message": asked,
            "ai_response": answer,
            "retrieved_documents": None,
            "feedback_type": feedback,
            "feedback_text": None,
        }
        for session, number, asked, answer, feedback in (
            ("s", 2, "Tea?", "Mud", "dislike"),
            ("r", 1, "Rain?", "No", None),
            ("s", 1, "Hi", "Hello", "like"),
        )
    ],
    [row("Hi", "Hello", True), row("user: Hi | assistant: Hello | user: Tea?", "Mud", False)],
    {UNRATED: 1},
)


def stored_part(chat: str, role: str, text: str, vote: bool | None = None, *more: dict[str, Any]) -> dict[str, Any]:
    parts = [*more, {"type": "text", "text": text}]
    time = "2026-01-02" if text in ("Tea?", "Mud") else "2026-01-01"
    return {
        "id": f"{chat}{role}{text}",
        "chatId": chat,
        "createdAt": time,
        "role": role,
        "parts": parts,
        "attachments": [],
        "isUpvoted": vote,
    }


AI_CHATBOT = Case(
    "ai_chatbot",
    [
        stored_part("a", "user", "Tea?"),
        stored_part("a", "assistant", "Mud", False),
        stored_part("a", "user", "Hi"),
        stored_part("b", "user", "Rain?"),
        stored_part("a", "assistant", "Hello", True, {"type": "step-start"}),
        stored_part("b", "assistant", "No"),
        {**stored_part("c", "user", "What is it?"), "attachments": [{"url": "x", "contentType": "image/png"}]},
        stored_part("c", "assistant", "A cat", True),
    ],
    [row("Hi", "Hello", True), row("user: Hi | assistant: Hello | user: Tea?", "Mud", False)],
    {UNRATED: 1, MEDIA: 1},
)

FLOWISE_DB = Case(
    "flowise_db",
    [
        {
            "chatflowid": "f",
            "chatId": "c",
            "sessionId": "s",
            "createdDate": f"2026-01-0{len(content)}",
            "role": role,
            "content": content,
            "rating": rating,
        }
        for role, content, rating in (
            ("userMessage", "Tea??", None),  # of the fifth day
            ("apiMessage", "Muddy", "THUMBS_DOWN"),
            ("userMessage", "Hi", None),  # of the second
            ("apiMessage", "Yo", "THUMBS_UP"),
            ("userMessage", "Really?", None),
            ("apiMessage", "Yes sir", None),
        )
    ],
    [row("Hi", "Yo", True), row("user: Hi | assistant: Yo | user: Tea??", "Muddy", False)],
    {UNRATED: 1},
)

CHAT_UI = Case(
    "hf_chat_ui",
    [
        {
            "sessionId": "s",
            "model": "m",
            "preprompt": "Be kind.",
            "rootMessageId": "0",
            "messages": [
                {"id": "0", "from": "system", "content": "Be kind.", "children": ["1"], "ancestors": []},
                {"id": "1", "from": "user", "content": "Hi", "children": ["2", "3"], "ancestors": ["0"]},
                {"id": "2", "from": "assistant", "content": "Hello", "score": 1, "ancestors": ["0", "1"]},
                {"id": "3", "from": "assistant", "content": "Nope", "score": -1, "ancestors": ["0", "1"]},
                {"id": "4", "from": "assistant", "content": "Ho", "score": 0, "ancestors": ["0", "1"]},
                {"id": "5", "from": "assistant", "content": "Hey", "ancestors": ["0", "1"]},
            ],
        }
    ],
    [row("system: Be kind. | user: Hi", "Hello", True), row("system: Be kind. | user: Hi", "Nope", False)],
    {"between up and down": 1, UNRATED: 1},
)

ARGILLA_CHAT = Case(
    "argilla",
    [
        {
            "id": "1",
            "fields": {"chat": ASKED_HI, "response": "Hello"},
            "responses": {"quality": [{"value": value, "user_id": "u", "status": "submitted"}]},
            "status": "completed",
        }
        for value in ("good", "bad")
    ],
    BOTH,
)

TOOL_CASES = {name: case for name, case in dict(globals()).items() if isinstance(case, Case)}
TOOL_REFUSED = {
    "feedback_alone": (
        [{"id": "s", "timestamp": "2026", "trace_id": "t", "name": "user-feedback", "value": 1, "source": "API"}],
        ["without the answers", "Join it"],
    ),
    "librechat_csv": (
        [{"sender": "GPT", "text": "Hello", "isCreatedByUser": False, "messageId": "m", "parentMessageId": ZERO}],
        ["no feedback", "as JSON"],
    ),
}
