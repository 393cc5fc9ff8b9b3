"""Small exports in the form that applications write, and what each becomes, written by hand from reading them."""

import json
from dataclasses import dataclass, field
from typing import Any

UNRATED = "unrated"
NOT_CHOSEN = "excluded by `where`"
EMPTY = "empty answer"
NO_PROMPT = "no prompt"
MISSING = "missing messages"
MEDIA = "images, audio or other media"
ZERO = "00000000-0000-0000-0000-000000000000"


def row(prompt: str, completion: str, label: bool) -> tuple[str, str, bool]:
    """A row; "system: s | user: q" is short for messages, and a word alone is the user's."""
    return (prompt if ": " in prompt else f"user: {prompt}", f"assistant: {completion}", label)


@dataclass
class Case:
    """A file and what it becomes.

    Attributes:
        preset: the mapping that must recognise it.
        left_out: rows left out, by reason.
        options: of `kto-precompute`.
        native: whether the file is one document, which is no list of records and cannot be a table.
    """

    preset: str
    records: Any
    rows: list[tuple[str, str, bool]]
    left_out: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    document: bool = False


def message(name: str, parent: str | None, role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"id": name, "parentId": parent, "childrenIds": [], "role": role, "content": content, **more}


def openwebui(rating: Any, judged: str | None, *messages: dict[str, Any], **chat: Any) -> dict[str, Any]:
    history = {"messages": {one["id"]: one for one in messages}, "currentId": messages[-1]["id"]} if messages else {}
    return {
        "id": "f",
        "user_id": "u",
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "m", "sibling_model_ids": None, "reason": "", "comment": None},
        "meta": {"arena": bool(chat.get("arena")), "chat_id": "c", "message_id": judged, "message_index": 2},
        "snapshot": {
            "chat": {"id": "c", "title": "t", "chat": {"params": {}, "history": history, "messages": [], **chat}}
        },
        "created_at": 1,
        "updated_at": 2,
    }


ASKED = message("q", None, "user", "Best tea?")
OPEN_WEBUI = Case(
    "openwebui",
    [
        openwebui(None, "a", ASKED, message("a", "q", "assistant", "Green.")),
        openwebui(1, "a", ASKED, message("a", "q", "assistant", "Green."), message("b", "q", "assistant", "Black.")),
        openwebui(
            -1,
            "b",
            ASKED,
            message("a", "q", "assistant", "Green."),
            message("b", "q", "assistant", "Black."),
            arena=True,
        ),
        openwebui(0, "a", ASKED, message("a", "q", "assistant", "Green.")),
        openwebui(
            1,
            "d",
            ASKED,
            message(
                "a",
                "q",
                "assistant",
                '<details type="reasoning" done="true">\n<summary>x</summary>\n> no\n</details>\nGreen.',
            ),
            message("c", "a", "user", "Sure?"),
            message("d", "c", "assistant", "Yes."),
            params={"system": "Be short."},
        ),
        openwebui(1, "gone", ASKED, message("a", "q", "assistant", "Green.")),
        openwebui(1, "d", message("c", "deleted", "user", "Sure?"), message("d", "c", "assistant", "Yes.")),
        openwebui(
            1,
            "a",
            message("q", None, "user", "See", files=[{"type": "image", "url": "x"}]),
            message("a", "q", "assistant", "A cat."),
        ),
        openwebui(-1, "a", ASKED, message("a", "q", "assistant", "", error={"content": "boom"})),
        openwebui(
            -1,
            "a",
            ASKED,
            message(
                "a",
                "q",
                "assistant",
                'It is <details type="tool_calls" done="true" name="f" result="9">\n</details> 9.',
            ),
        ),
        {**openwebui(1, "a"), "snapshot": None},
        {**openwebui(1, "a"), "data": None, "meta": None},
    ],
    [
        row("Best tea?", "Green.", True),
        row("Best tea?", "Black.", False),
        row("system: Be short. | user: Best tea? | assistant: Green. | user: Sure?", "Yes.", True),
    ],
    {UNRATED: 1, "between up and down": 1, MISSING: 4, MEDIA: 1, "failed call": 1, "tool calls written as HTML": 1},
)

OPEN_WEBUI_CHATS = Case(
    "openwebui_chats",
    [
        {
            "id": "1",
            "user_id": "u",
            "title": "t",
            "chat": {"params": {"system": "Be short."}, "history": {"messages": one}},
        }
        for one in (
            {
                "q": ASKED,
                "a": message("a", "q", "assistant", "Green.", annotation={"rating": 1, "tags": []}, feedbackId="f"),
                "b": message("b", "a", "user", "Sure?"),
                "c": message("c", "b", "assistant", "No.", annotation={"rating": -1}),
                "d": message("d", "b", "assistant", "Yes."),
            },
            {"q": ASKED, "a": message("a", "q", "assistant", "Black.")},
        )
    ],
    [
        row("system: Be short. | user: Best tea?", "Green.", True),
        row("system: Be short. | user: Best tea? | assistant: Green. | user: Sure?", "No.", False),
    ],
    {UNRATED: 2},
)


def libre(name: str, parent: str | None, by_user: bool, text: str, **more: Any) -> dict[str, Any]:
    return {
        "messageId": name,
        "conversationId": more.pop("conversationId", "k"),
        "parentMessageId": parent,
        "text": text,
        "isCreatedByUser": by_user,
        "sender": "User" if by_user else "GPT",
        **more,
    }


UP, DOWN = {"rating": "thumbsUp", "tag": "accurate"}, {"rating": "thumbsDown", "tag": {"key": "other"}, "text": "no"}
LIBRE = [
    libre("m4", "m3", False, "Pizza.", feedback=DOWN),
    libre("m1", ZERO, True, "Rome?"),
    libre(
        "m2",
        "m1",
        False,
        "",
        content=[{"type": "think", "think": "hm"}, {"type": "text", "text": {"value": "The Forum."}}],
        feedback=UP,
    ),
    libre("m3", "m2", True, "Food?", feedback=None),
    libre("m5", "m3", False, "Carbonara."),
    libre("m6", "m3", False, "Rate limit", error=True, feedback=DOWN),
    libre("m7", "lost", False, "Hello.", feedback=UP),
    libre("m8", "m3", False, "", feedback=DOWN),
    libre(
        "m9",
        "m3",
        False,
        "",
        feedback=UP,
        content=[
            {"type": "agent_update", "agent_update": {}},
            {"type": "text", "text": "Let me look."},
            {
                "type": "tool_call",
                "tool_call": {"id": "t", "name": "search", "args": '{"q": "food"}', "output": "Roscioli"},
            },
            {"type": "text", "text": "Go to Roscioli."},
        ],
    ),
]
LIBRE_ROWS = [
    row("user: Rome? | assistant: The Forum. | user: Food?", "Pizza.", False),
    row("Rome?", "The Forum.", True),
    row(
        "user: Rome? | assistant: The Forum. | user: Food? | assistant: Let me look. CALL search | tool: Roscioli",
        "Go to Roscioli.",
        True,
    ),
]
LIBRE_LEFT = {UNRATED: 1, "failed call": 1, MISSING: 1, EMPTY: 1}
HEAD = {"conversationId": "k", "endpoint": "openAI", "title": "t", "exportAt": "12:00", "branches": True}
LIBRE_LIST = Case(
    "librechat_list", {**HEAD, "recursive": False, "messages": LIBRE}, LIBRE_ROWS, LIBRE_LEFT, document=True
)
LIBRE_MONGO = Case(
    "librechat_mongo",
    [
        *LIBRE[:2],
        libre("x1", ZERO, True, "Oslo?", conversationId="o", _id={"$oid": "1"}),
        *LIBRE[2:],
        libre("x2", "x1", False, "The Opera.", conversationId="o", feedback=UP, createdAt={"$date": "2026"}),
    ],
    [*LIBRE_ROWS, row("Oslo?", "The Opera.", True)],
    LIBRE_LEFT,
)
LIBRE_TREE = Case(
    "librechat_tree",
    {
        **HEAD,
        "recursive": True,
        "options": {"promptPrefix": "Be kind."},
        "messagesTree": [
            {
                **libre("m1", ZERO, True, "Rome?"),
                "children": [
                    {
                        **libre("m2", "m1", False, "The Forum.", feedback=UP),
                        "children": [
                            {
                                **libre("m3", "m2", True, "Food?"),
                                "children": [
                                    {**libre("m4", "m3", False, "Pizza.", feedback=DOWN), "children": []},
                                    {**libre("m5", "m3", False, "Carbonara."), "children": []},
                                ],
                            },
                        ],
                    },
                ],
            },
        ],
    },
    [
        row("system: Be kind. | user: Rome?", "The Forum.", True),
        row("system: Be kind. | user: Rome? | assistant: The Forum. | user: Food?", "Pizza.", False),
    ],
    {UNRATED: 1},
    document=True,
)


def trace(name: str, asked: Any, answer: Any, **scores: Any) -> dict[str, Any]:
    return {
        "id": name,
        "timestamp": "2026-01-01T00:00:00Z",
        "name": "chat",
        "userId": None,
        "sessionId": "s",
        "input": asked,
        "output": answer,
        "metadata": {"a": 1},
        "tags": ["x"],
        "latency": 1.5,
        "totalCost": 0.01,
        "comments": [],
        "environment": "default",
        **scores,
    }


HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
LANGFUSE = Case(
    "langfuse",
    [
        trace("0", {"messages": HELLO}, {"role": "assistant", "content": "Hm"}, thumb=None),
        trace("1", {"messages": HELLO}, {"role": "assistant", "content": "Hi!"}, thumb=[1]),
        trace("2", HELLO, {"choices": [{"message": {"role": "assistant", "content": "Go away"}}]}, thumb=[0]),
        trace("3", "Sum of 2 and 2?", "four", thumb=[1, 1]),
        trace("4", {"input": "And 3?", "chat_history": HELLO}, {"output": "six"}, thumb=[True]),
        trace("5", "Raters?", "yes", thumb=[1, 0]),
        trace("6", None, "no input", thumb=[1]),
        trace("7", "No output?", None, thumb=[0]),
        trace(
            "8",
            [{"type": "human", "content": "Why?", "id": "1"}],
            {"type": "ai", "content": "So.", "id": "2"},
            thumb=[0],
        ),
        trace("9", {"args": ["2+3?"], "kwargs": {}}, 5, thumb=[1]),
    ],
    [
        row("system: Be kind. | user: Hello?", "Hi!", True),
        row("system: Be kind. | user: Hello?", "Go away", False),
        row("Sum of 2 and 2?", "four", True),
        row("system: Be kind. | user: Hello? | user: And 3?", "six", True),
        row("Why?", "So.", False),
        row("2+3?", "5", True),
    ],
    {UNRATED: 1, "raters disagree": 1, NO_PROMPT: 1, EMPTY: 1},
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
LANGFUSE_TWO = Case(
    "langfuse",
    [
        {
            **trace("1", "a?", "b", thumb=[1], judge=[0.8]),
            "traceId": "t",
            "type": "GENERATION",
            "modelParameters": {"t": 1},
        },
        {
            **trace("2", "c?", "d", thumb=[0], judge=[0.9]),
            "traceId": "t",
            "type": "GENERATION",
            "modelParameters": {"t": 1},
        },
        {**trace("3", "e?", "f", thumb=None, judge=[0.1]), "traceId": "t", "type": "SPAN", "modelParameters": None},
    ],
    [row("a?", "b", True), row("c?", "d", False)],
    {UNRATED: 1},
    {"label_field": "thumb"},
)
LANGSMITH = Case(
    "langsmith",
    [
        {
            "id": "0",
            "run_type": "chain",
            "inputs": {"input": "Unrated"},
            "outputs": {"output": "x"},
            "feedback_stats": None,
        },
        {
            "id": "1",
            "run_type": "llm",
            "error": None,
            "feedback_stats": {"user": {"n": 1, "avg": 1.0, "values": {}}},
            "inputs": {
                "messages": [
                    [
                        {
                            "lc": 1,
                            "type": "constructor",
                            "id": ["langchain", "schema", "messages", "HumanMessage"],
                            "kwargs": {"content": "Hi", "type": "human"},
                        }
                    ]
                ]
            },
            "outputs": {
                "generations": [
                    [
                        {
                            "text": "Hello",
                            "message": {
                                "lc": 1,
                                "id": ["langchain", "schema", "messages", "AIMessage"],
                                "kwargs": {"content": "Hello", "type": "ai"},
                            },
                        }
                    ]
                ]
            },
        },
        {
            "id": "2",
            "run_type": "chain",
            "inputs": {"question": "Sum?"},
            "outputs": {"answer": "5"},
            "feedback_stats": {"user": {"n": 2, "avg": 0.0}},
        },
        {
            "id": "3",
            "run_type": "chain",
            "inputs": {"input": "Err"},
            "outputs": None,
            "error": "boom",
            "feedback_stats": {"user": {"n": 1, "avg": 0.0}},
        },
        {
            "id": "4",
            "run_type": "chain",
            "inputs": {"my_key": "Odd?"},
            "outputs": {"their_key": "Even."},
            "feedback_stats": {"user": {"n": 1, "avg": None, "values": {"good": 1}}},
        },
        {
            "id": "5",
            "run_type": "chain",
            "feedback_stats": {"user": {"n": 1, "avg": 0.0}},
            "inputs": {"messages": [{"type": "human", "content": "Graph?"}]},
            "outputs": {
                "messages": [
                    {"type": "human", "content": "Graph?", "id": "7"},
                    {"type": "ai", "content": "Graph.", "id": "8"},
                ]
            },
        },
    ],
    [row("Hi", "Hello", True), row("Sum?", "5", False), row("Odd?", "Even.", True), row("Graph?", "Graph.", False)],
    {UNRATED: 1, EMPTY: 1},
)
LANGSMITH_TABLE = Case(
    "langsmith_table",
    [
        {
            "id": "0",
            "inputs.topic": "Tea",
            "outputs.text": "Leaves.",
            "reference.text": "z",
            "feedback.ok": "1.0",
            "error": None,
        },
        {
            "id": "1",
            "inputs.topic": "Ice",
            "outputs.text": "Hot.",
            "reference.text": "z",
            "feedback.ok": "0.0",
            "error": None,
        },
        {
            "id": "2",
            "inputs.topic": "Sand",
            "outputs.text": "Wet.",
            "reference.text": "z",
            "feedback.ok": None,
            "error": None,
        },
        {
            "id": "3",
            "inputs.topic": "Err",
            "outputs.text": None,
            "reference.text": "z",
            "feedback.ok": "0",
            "error": "boom",
        },
    ],
    [row("Tea", "Leaves.", True), row("Ice", "Hot.", False)],
    {UNRATED: 1, EMPTY: 1},
)


def span(asked: Any, answer: Any, label: str | None, score: float | None, name: str | None = "user") -> dict[str, Any]:
    return {
        "context.span_id": "s",
        "name": "llm",
        "span_kind": "LLM",
        "attributes.input.value": "raw",
        "attributes.output.value": answer,
        "attributes.llm.input_messages": asked,
        "attributes.llm.model_name": "m",
        "annotation_name": name,
        "annotator_kind": "HUMAN",
        "result.label": label,
        "result.score": score,
        "result.explanation": None,
    }


PHOENIX = Case(
    "phoenix",
    [
        span([{"message.role": "user", "message.content": "Hi"}], "Hello", None, None, None),
        span([{"message.role": "user", "message.content": "Hi"}], "Hello", "thumbs-up", 1.0),
        span([{"message.role": "user", "message.content": "Sum"}], "5", "thumbs-down", 0.0),
        span([{"message.role": "user", "message.content": "Score"}], "only", None, 0.0),
        span(None, "from the raw input", "thumbs-up", 1.0),
    ],
    [
        row("Hi", "Hello", True),
        row("Sum", "5", False),
        row("Score", "only", False),
        row("raw", "from the raw input", True),
    ],
    {UNRATED: 1},
)


def assessed(name: str, value: Any, **more: Any) -> dict[str, Any]:
    return {
        "assessment_id": "a",
        "assessment_name": name,
        "trace_id": "t",
        "source": {"source_type": "HUMAN", "source_id": "u"},
        "feedback": {"value": value},
        "rationale": None,
        **more,
    }


def mlflow(request: Any, response: Any, *assessments: dict[str, Any]) -> dict[str, Any]:
    return {
        "trace_id": "tr",
        "state": "OK",
        "request_time": 1,
        "request": request,
        "response": response,
        "spans": [],
        "assessments": list(assessments),
        "trace_metadata": {},
        "tags": {},
    }


USER_HI = {"messages": [{"role": "user", "content": "Hi"}]}
MLFLOW = Case(
    "mlflow",
    [
        mlflow(USER_HI, {"choices": [{"message": {"role": "assistant", "content": "none"}}]}),
        mlflow(USER_HI, {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}, assessed("ok", True)),
        mlflow(
            {"question": "Sum?"}, {"answer": "5"}, assessed("ok", True, valid=False), assessed("ok", False, valid=True)
        ),
        mlflow("Text?", "text", {"assessment_name": "truth", "expectation": {"value": "5"}}, assessed("ok", "yes")),
        mlflow(
            {"input": [{"role": "user", "content": "Agent?"}]},
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "summary": []},
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Agent."}]},
                ],
                "text": {"format": {}},
            },
            assessed("ok", False),
        ),
        mlflow("Both?", "both", assessed("ok", True), assessed("ok", False)),
    ],
    [row("Hi", "Hello", True), row("Sum?", "5", False), row("Text?", "text", True), row("Agent?", "Agent.", False)],
    {UNRATED: 1, "raters disagree": 1},
)

MLFLOW_JSON = Case(
    "mlflow_json",
    [
        {
            "info": {"trace_id": "1", "state": "OK", "assessments": [assessed("ok", True)]},
            "data": {
                "spans": [
                    {"span_id": "b", "parent_span_id": "a", "attributes": {"mlflow.spanInputs": '"inner"'}},
                    {
                        "span_id": "a",
                        "parent_span_id": None,
                        "attributes": {
                            "mlflow.spanInputs": json.dumps(USER_HI),
                            "mlflow.spanOutputs": json.dumps(
                                {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}
                            ),
                        },
                    },
                ]
            },
        },
        {
            "info": {"request_id": "2", "assessments": [assessed("ok", False)]},
            "data": {"request": '{"question": "Sum?"}', "response": '"5"', "spans": []},
        },
        {"info": {"trace_id": "3", "assessments": []}, "data": {"spans": []}},
    ],
    [row("Hi", "Hello", True), row("Sum?", "5", False)],
    {UNRATED: 1},
)


def argilla(prompt: str, completion: str, values: Any, statuses: Any, status: str = "completed") -> dict[str, Any]:
    return {
        "id": "1",
        "status": status,
        "_server_id": "x",
        "prompt": prompt,
        "completion": completion,
        "source": "web",
        "thumb.responses": values,
        "thumb.responses.users": None if values is None else ["u"] * len(values),
        "thumb.responses.status": statuses,
        "thumb.suggestion": "good",
        "thumb.suggestion.score": None,
    }


ARGILLA_FLAT = Case(
    "argilla",
    [
        argilla("Unrated?", "x", None, None, "pending"),
        argilla("Haiku?", "Snow", ["\U0001f44d"], ["submitted"]),
        argilla("Poem?", "No", ["\U0001f44e", "\U0001f44d"], ["submitted", "draft"]),
        argilla("Draft?", "x", ["\U0001f44d"], ["draft"], "pending"),
        argilla("Discarded?", "x", [None], ["discarded"]),
        argilla("Two?", "x", ["\U0001f44d", "\U0001f44e"], ["submitted", "submitted"]),
    ],
    [row("Haiku?", "Snow", True), row("Poem?", "No", False)],
    {UNRATED: 3, "raters disagree": 1},
)
ARGILLA_NESTED = Case(
    "argilla",
    [
        {
            "id": "1",
            "fields": {"instruction": "A?", "response": "a"},
            "metadata": {},
            "suggestions": {},
            "responses": {"ok": [{"value": "yes", "user_id": "u"}]},
            "vectors": {},
            "status": "completed",
            "_server_id": "s",
        },
        {
            "id": "2",
            "fields": {"instruction": "B?", "response": "b"},
            "metadata": {},
            "suggestions": {"ok": {"value": "yes"}},
            "responses": {},
            "vectors": {},
            "status": "pending",
            "_server_id": "s",
        },
        {
            "id": "3",
            "fields": {"instruction": "C?", "response": "c"},
            "metadata": {},
            "suggestions": {},
            "responses": {"ok": [{"value": "no", "user_id": "u"}, {"value": "no", "user_id": "v"}]},
            "vectors": {},
            "status": "completed",
            "_server_id": "s",
        },
        {
            "id": "4",
            "fields": {"instruction": "D?", "response": "d"},
            "metadata": {},
            "suggestions": {},
            "responses": {"ok": [{"value": "no", "user_id": "u"}]},
            "vectors": {},
            "status": "pending",
            "_server_id": "s",
        },
    ],
    [row("A?", "a", True), row("C?", "c", False)],
    {UNRATED: 2},
)
ARGILLA_CHAT = Case(
    "argilla",
    [
        {
            "id": str(number),
            "status": "completed",
            "_server_id": "s",
            "fields": {"chat": [{"role": role, "content": text} for role, text in turns]},
            "responses": {"ok": [{"value": value, "user_id": "u"}]},
        }
        for number, value, turns in (
            (1, "yes", [("user", "A?"), ("assistant", "a")]),
            (2, "no", [("user", "A?"), ("assistant", "a"), ("user", "B?"), ("assistant", "b")]),
        )
    ],
    [row("A?", "a", True), row("user: A? | assistant: a | user: B?", "b", False)],
)


def preferred(number: int, value: Any, names: tuple[str, str] = ("response-1", "response-2")) -> dict[str, Any]:
    return {
        "id": str(number),
        "status": "completed",
        "_server_id": "s",
        "fields": {"instruction": f"{number}?", names[0]: "a", names[1]: "b"},
        "responses": {} if value is None else {"better": [{"value": value, "user_id": "u"}]},
    }


def ranked(first: int, second: int) -> list[dict[str, Any]]:
    return [{"value": "response1", "rank": first}, {"value": "response2", "rank": second}]


ARGILLA_PREFERENCES = Case(
    "argilla_pairs",
    [preferred(1, "response-1"), preferred(2, "response-2"), preferred(3, "tie"), preferred(4, None)],
    [row("1?", "a", True), row("1?", "b", False), row("2?", "b", True), row("2?", "a", False)],
    {"tie": 1, UNRATED: 1},
)
ARGILLA_RANKING = Case(
    "argilla_pairs",
    [preferred(number, ranks, ("response1", "response2")) for number, ranks in ((1, ranked(2, 1)), (2, ranked(1, 1)))],
    [row("1?", "b", True), row("1?", "a", False)],
    {"tie": 1},
)
ARGILLA_OLD = Case(
    "argilla",
    [
        {
            "prompt": "A?",
            "completion": "a",
            "ok": [{"user_id": "u", "value": "yes", "status": "submitted"}],
            "ok-suggestion": None,
            "ok-suggestion-metadata": {"type": None},
            "external_id": None,
            "metadata": "{}",
        },
        {
            "prompt": "B?",
            "completion": "b",
            "ok": [{"user_id": "u", "value": "no", "status": "draft"}],
            "ok-suggestion": None,
            "ok-suggestion-metadata": {"type": None},
            "external_id": None,
            "metadata": "{}",
        },
    ],
    [row("A?", "a", True)],
    {UNRATED: 1},
)
KTO_MIX = Case(
    "argilla_kto_mix",
    [
        {
            "dataset": "d",
            "completion": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "label": True,
            "rating": 5.0,
        },
        {
            "dataset": "d",
            "completion": [
                {"role": "user", "content": "Sum"},
                {"role": "assistant", "content": "5"},
                {"role": "user", "content": "no"},
                {"role": "assistant", "content": "4"},
            ],
            "label": False,
            "rating": 2.0,
        },
    ],
    [row("Hi", "Hello", True), row("user: Sum | assistant: 5 | user: no", "4", False)],
)


def chosen(name: str, *choices: str, kind: str = "choices", **more: Any) -> dict[str, Any]:
    return {"id": "r", "from_name": name, "to_name": "t", "type": kind, "value": {kind: list(choices), **more}}


def task(prompt: str, response: str, *annotations: list[dict[str, Any]], cancelled: bool = False) -> dict[str, Any]:
    return {
        "id": 1,
        "data": {"prompt": prompt, "response": response, "source": "web"},
        "meta": {"a": 1},
        "predictions": [],
        "annotations": [
            {"id": 9, "completed_by": {"id": 1}, "was_cancelled": cancelled, "result": one} for one in annotations
        ],
    }


LABEL_STUDIO = Case(
    "labelstudio",
    [
        task("None?", "x"),
        task("Hi", "Hello", [chosen("thumb", "Thumbs up")]),
        task(
            "Sum",
            "5",
            [chosen("thumb", "Thumbs down"), {"from_name": "why", "type": "textarea", "value": {"text": ["wrong"]}}],
        ),
        task("Skipped", "x", [], cancelled=True),
        task("Taken back", "x", [chosen("thumb", "Thumbs up")], cancelled=True),
        task("Two", "x", [chosen("thumb", "Thumbs up")], [chosen("thumb", "Thumbs down")]),
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
    {UNRATED: 3, "raters disagree": 1},
)
LABEL_STUDIO_RATING = Case(
    "labelstudio",
    [
        task("A", "a", [{"from_name": "stars", "to_name": "t", "type": "rating", "value": {"rating": 5}}]),
        task("B", "b", [{"from_name": "stars", "to_name": "t", "type": "rating", "value": {"rating": 1}}]),
        task("C", "c", [{"from_name": "stars", "to_name": "t", "type": "rating", "value": {"rating": 3}}]),
    ],
    [row("A", "a", True), row("B", "b", False)],
    {"between up and down": 1},
    {"up": ">=4", "down": "<=2"},
)
ANNOTATED = {"annotator": 1, "annotation_id": 9, "created_at": "2026", "updated_at": "2026", "lead_time": 1.2}
LABEL_STUDIO_MIN = Case(
    "labelstudio_min",
    [
        {"prompt": "Hi", "response": "Hello", "id": 1, "thumb": "Thumbs up", "rating": [{"rating": 5}], **ANNOTATED},
        {"prompt": "Sum", "response": "5", "id": 2, "thumb": "Thumbs down", "rating": [{"rating": 1}], **ANNOTATED},
        {"prompt": "Skip", "response": "x", "id": 3, **ANNOTATED},
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
    {UNRATED: 1},
    {"label_field": "thumb"},
)
LABEL_STUDIO_STARS = Case(
    "labelstudio_min",
    [one for one in LABEL_STUDIO_MIN.records if one["id"] != 3],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
    {},
    {"label_field": "rating", "up": ">=4", "down": "<=2"},
)
LABEL_STUDIO_PAIRS = Case(
    "labelstudio_pairs",
    [
        {
            "id": 1,
            "data": {"prompt": "Tea?", "answer1": "Green", "answer2": "Black"},
            "predictions": [],
            "annotations": [
                {
                    "was_cancelled": False,
                    "result": [{"from_name": "comparison", "type": "pairwise", "value": {"selected": "right"}}],
                }
            ],
        },
        {
            "id": 2,
            "data": {"prompt": "Ice?", "answer1": "Cold", "answer2": "Hot"},
            "predictions": [],
            "annotations": [],
        },
    ],
    [row("Tea?", "Black", True), row("Tea?", "Green", False)],
    {"unrated": 1},
)


def gradio(*texts: str) -> str:
    return json.dumps(
        [
            {
                "role": ("user", "assistant")[i % 2],
                "metadata": None,
                "content": [{"text": text, "type": "text"}],
                "options": None,
            }
            for i, text in enumerate(texts)
        ]
    )


GRADIO_CHAT = Case(
    "gradio_chat",
    [
        {"conversation": gradio("Hi", "Hello", "Sum", "5"), "index": "1", "flag": "Like", "timestamp": "2026"},
        {
            "conversation": "'" + gradio("Hi", "Hello", "Sum,-2", "5"),
            "index": "3",
            "flag": "Dislike",
            "timestamp": "2026",
        },
        {"conversation": gradio("Hi", "Hello"), "index": "1", "flag": "", "timestamp": "2026"},
    ],
    [row("Hi", "Hello", True), row("user: Hi | assistant: Hello | user: Sum,-2", "5", False)],
    {UNRATED: 1},
)
GRADIO_PAIRS = Case(
    "gradio_chat_pairs",
    [
        {
            "conversation": json.dumps([["Hi", "Hello"], ["Sum", "5"]]),
            "index": "[1, 1]",
            "flag": "Dislike",
            "timestamp": "2026",
        },
        {
            "conversation": json.dumps([[None, "Welcome"], ["Hi", "Hello"]]),
            "index": "[1, 1]",
            "flag": "Like",
            "timestamp": "2026",
        },
        {
            "conversation": json.dumps([[["/tmp/cat.png"], None], ["Who?", "A cat"]]),
            "index": "[1, 1]",
            "flag": "Like",
            "timestamp": "2026",
        },
    ],
    [
        row("user: Hi | assistant: Hello | user: Sum", "5", False),
        row("assistant: Welcome | user: Hi", "Hello", True),
    ],
    {MEDIA: 1},
)
GRADIO_FLAGS = Case(
    "gradio_flags",
    [
        {"name": "Hi", "output": "Hello", "flag": "Like", "username": "", "timestamp": "2026"},
        {"name": "'-3 plus 5", "output": "2", "flag": "Dislike", "username": "u", "timestamp": "2026"},
        {"name": "'tis late", "output": "'-1", "flag": "Like", "username": None, "timestamp": "2026"},
        {"name": "Flagged?", "output": "x", "flag": "", "username": None, "timestamp": "2026"},
    ],
    [row("Hi", "Hello", True), row("-3 plus 5", "2", False), row("'tis late", "-1", True)],
    {UNRATED: 1},
)


def dify(query: str, answer: str, raw: str | None) -> dict[str, Any]:
    return {
        "feedback_id": "f",
        "app_name": "App",
        "conversation_id": f"of {query}",
        "message_id": "m",
        "user_query": query,
        "ai_response": answer,
        "feedback_rating": {"like": "\U0001f44d", "dislike": "\U0001f44e"}.get(raw or ""),
        "feedback_rating_raw": raw,
        "feedback_comment": "",
        "feedback_source": "user",
        "has_comment": "No",
    }


CUT = "x" * 500 + "..."
DIFY = Case(
    "dify",
    [
        dify("Unrated?", "x", None),
        dify("Hi", "Hello", "like"),
        dify("Long?", CUT, "dislike"),
        dify("Empty?", "", "like"),
    ],
    [row("Hi", "Hello", True), row("Long?", CUT, False)],
    {UNRATED: 1, EMPTY: 1},
)
DIFY_JSON = Case(
    "dify_json",
    {"export_info": {"app_id": "a", "total_records": 4}, "feedback_data": DIFY.records},
    DIFY.rows,
    DIFY.left_out,
    document=True,
)
STREAMLIT = Case(
    "streamlit",
    [
        {"prompt": "Unrated", "response": "x", "feedback": None, "user": "u"},
        {
            "prompt": "Hi",
            "response": "Hello",
            "feedback": {"type": "thumbs", "score": "\U0001f44d", "text": None},
            "user": "u",
        },
        {
            "prompt": "Sum",
            "response": "5",
            "feedback": {"type": "thumbs", "score": "\U0001f44e\U0001f3fd", "text": "no"},
            "user": "u",
        },
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
    {UNRATED: 1},
)
EMOJI = "feedback.[wandb.reaction.1].payload.emoji"
WEAVE_TABLE = Case(
    "weave_table",
    [
        {
            "id": "1",
            "op_name": "chat",
            "inputs.model": "m",
            "inputs.messages": [{"role": "user", "content": "Hi"}],
            "output.choices.0.message.content": "Hello",
            "output.choices.0.finish_reason": "stop",
            "output.model": "m",
            EMOJI: "\U0001f44d\U0001f3fd",
            "feedback.[wandb.note.1].payload.note": "nice",
        },
        {
            "id": "2",
            "op_name": "chat",
            "inputs.model": "m",
            "inputs.messages": [{"role": "user", "content": "Sum"}],
            "output.choices.0.message.content": "5",
            "output.choices.0.finish_reason": "stop",
            "output.model": "m",
            EMOJI: "\U0001f44e",
            "feedback.[wandb.note.1].payload.note": None,
        },
        {
            "id": "3",
            "op_name": "chat",
            "inputs.model": "m",
            "inputs.messages": [{"role": "user", "content": "None"}],
            "output.choices.0.message.content": "x",
            "output.choices.0.finish_reason": "stop",
            "output.model": "m",
            EMOJI: None,
            "feedback.[wandb.note.1].payload.note": "hm",
        },
    ],
    [row("Hi", "Hello", True), row("Sum", "5", False)],
    {UNRATED: 1},
)
WEAVE_CALLS = Case(
    "weave_calls",
    [
        {
            "id": "1",
            "op_name": "weave:///x",
            "trace_id": "t",
            "inputs": {"self": {"a": 1}, "messages": [{"role": "user", "content": "Hi"}], "model": "m"},
            "output": {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]},
            "summary": {
                "weave": {
                    "feedback": [
                        {"feedback_type": "wandb.reaction.1", "payload": {"emoji": "\U0001f44d"}},
                        {"feedback_type": "wandb.note.1", "payload": {"note": "x"}},
                    ]
                }
            },
        },
        {
            "id": "2",
            "op_name": "weave:///x",
            "trace_id": "t",
            "inputs": {"question": "Sum"},
            "output": "5",
            "summary": {"weave": {"feedback": []}},
        },
    ],
    [row("Hi", "Hello", True)],
    {UNRATED: 1},
)
SAID = {"role": "user", "content": "Tea?"}
OPENAI_PREFERENCE = Case(
    "openai_preference",
    [
        {
            "input": {"messages": [SAID], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [{"role": "assistant", "content": "Green"}],
            "non_preferred_output": [{"role": "assistant", "content": "Mud"}],
        },
        {
            "input": {"messages": [{"role": "developer", "content": "s"}, SAID]},
            "preferred_output": [{"role": "assistant", "content": "Same"}],
            "non_preferred_output": [{"role": "assistant", "content": "Same"}],
        },
    ],
    [row("Tea?", "Green", True), row("Tea?", "Mud", False)],
    {"identical answers": 1},
)
STORED = Case(
    "openai_stored",
    [
        {
            "id": "1",
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello", "refusal": None},
                    "finish_reason": "stop",
                }
            ],
            "metadata": {"rating": "up", "user": "7"},
            "request_messages": [SAID],
        },
        {
            "id": "2",
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": None, "refusal": "I cannot."},
                    "finish_reason": "stop",
                }
            ],
            "metadata": {"rating": "down", "user": "7"},
            "request_messages": [SAID],
        },
        {
            "id": "3",
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "x", "refusal": None}, "finish_reason": "stop"}
            ],
            "metadata": {"user": "7"},
            "request_messages": [SAID],
        },
    ],
    [row("Tea?", "Hello", True), row("Tea?", "I cannot.", False)],
    {UNRATED: 1},
)


def evaluated(passed: Any, sample: Any, status: str) -> dict[str, Any]:
    return {
        "id": "o",
        "object": "eval.run.output_item",
        "datasource_item": {"q": "x"},
        "results": [{"name": "g", "passed": passed, "score": 0.5}],
        "sample": sample,
        "status": status,
    }


SAMPLE = {"input": [SAID], "output": [{"role": "assistant", "content": "Green"}], "finish_reason": "stop"}
EVALS = Case(
    "openai_evals",
    [
        evaluated(True, SAMPLE, "pass"),
        evaluated(False, SAMPLE, "fail"),
        evaluated(False, {"input": [], "output": [], "finish_reason": "stop"}, "error"),
    ],
    [row("Tea?", "Green", True), row("Tea?", "Green", False)],
    {NOT_CHOSEN: 1},
)


def judged_by(*results: tuple[str, bool]) -> dict[str, Any]:
    thumbs = [{"metricName": "Helpfulness", "modelResponseId": number, "result": result} for number, result in results]
    return {"acceptanceTime": "2026", "answerContent": {"evaluationResults": {"thumbsUpDown": thumbs}}, "workerId": "w"}


BEDROCK = Case(
    "bedrock",
    [
        {
            "humanEvaluationResult": [judged_by(("0", True), ("1", False)), judged_by(("0", True))],
            "inputRecord": {"prompt": "Tea?", "category": "c", "referenceResponse": "r"},
            "modelResponses": [
                {"response": "Green", "modelIdentifier": "m"},
                {"response": "Mud", "modelIdentifier": "n"},
            ],
        },
        {
            "humanEvaluationResult": [judged_by(("0", True)), judged_by(("0", False))],
            "inputRecord": {"prompt": "Ice?", "category": "c", "referenceResponse": "r"},
            "modelResponses": [{"response": "Cold", "modelIdentifier": "m"}],
        },
    ],
    [row("Tea?", "Green", True), row("Tea?", "Mud", False)],
    {"raters disagree": 1},
)

CASES = {name: case for name, case in dict(globals()).items() if isinstance(case, Case)}
REFUSED = {
    "gradio_flags_several": (
        [{"instruction": "Sum", "text": "2+3", "temp": 1, "output": "5", "flag": "Like", "timestamp": "2026"}],
        ["Gradio", "--prompt-field", "--map", "flag"],
    ),
    "flowise": (
        [
            {
                "id": "c",
                "source": "UI",
                "sessionId": "s",
                "memoryType": None,
                "email": None,
                "messages": [
                    {"content": "Hi", "role": "user", "time": "1"},
                    {"content": "Hello", "role": "bot", "time": "2", "feedback": "nice"},
                ],
            }
        ],
        ["Flowise", "comment", "chat_message_feedback"],
    ),
    "prism_conversations": (
        [
            {
                "conversation_id": "c",
                "opening_prompt": "Hi",
                "conversation_history": [
                    {
                        "turn": 0,
                        "role": "user",
                        "content": "Hi",
                        "score": None,
                        "if_chosen": None,
                        "within_turn_id": None,
                    },
                    {"turn": 0, "role": "model", "content": "a", "score": 90, "if_chosen": True, "within_turn_id": 0},
                    {"turn": 0, "role": "model", "content": "b", "score": 10, "if_chosen": False, "within_turn_id": 1},
                ],
            }
        ],
        ["PRISM", "several answers", "utterances.jsonl"],
    ),
    "weave_feedback": (
        [
            {
                "id": "f",
                "project_id": "e/p",
                "weave_ref": "weave:///e/p/call/1",
                "creator": None,
                "feedback_type": "wandb.reaction.1",
                "payload": {"emoji": "\U0001f44d"},
            }
        ],
        ["Weave", "weave_ref", "include_feedback=True"],
    ),
}
# Files of the formats that are read without a mapping.
NATIVE = {
    "trl": {"prompt": "a", "completion": "b", "label": True},
    "trl_chat": {"prompt": [SAID], "completion": [{"role": "assistant", "content": "b"}], "label": True},
    "pair": {
        "prompt": [SAID],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    },
    "messages": {"messages": [SAID, {"role": "assistant", "content": "b"}], "label": False},
    "sharegpt": {
        "id": "1",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "kto_tag": True,
    },
    "alpaca": {"id": 1, "instruction": "a", "input": "", "output": "b", "label": True},
    "alpaca_named": {
        "id": 1,
        "name": "n",
        "timestamp": "t",
        "instruction": "a",
        "input": "",
        "output": "b",
        "label": True,
    },
    "rating": {"id": 1, "prompt": "a", "response": "b", "rating": 4, "timestamp": "t", "metadata": {}},
    "question": {"question": "a", "answer": "b", "label": "good", "status": "completed"},
}
