"""Context that the prompt needs and that is not read is named, at any depth of the record and wherever in the file it begins."""

import json
from pathlib import Path
from typing import Any

import pytest
from app_exports import trace
from test_app_formats import write

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.context_keys import context_names, is_context
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.feedback.used_columns import matters_beside

SAID = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Mud"}]


def langfuse(asked: Any, answered: Any = "Hello") -> dict[str, Any]:
    return trace("1", asked, answered, thumb=[1])


def phoenix(asked: Any) -> dict[str, Any]:
    return {
        "context.span_id": "s",
        "attributes.input.value": json.dumps(asked),
        "attributes.input.mime_type": "application/json",
        "attributes.output.value": "Hello",
        "annotation_name": "thumbs",
        "result.label": "good",
    }


def langsmith(asked: Any, answered: Any = None) -> dict[str, Any]:
    feedback = {"thumb": {"n": 1, "avg": 1.0}}
    outputs = answered or {"output": "Hello"}
    return {"id": "r", "run_type": "chain", "inputs": asked, "outputs": outputs, "feedback_stats": feedback}


def native(**more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Hi", **more}, {"role": "assistant", "content": "Hello"}],
        "label": True,
    }


QUESTION = {"question": "Hi"}
# A record without the context, the same with it, and the keys that are named.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "beside": (langfuse(QUESTION), langfuse({**QUESTION, "context": "c"}), ["input.context"]),
    "media beside": (langfuse(QUESTION), langfuse({**QUESTION, "image_url": "u"}), ["input.image_url"]),
    "keyword arguments": (
        langfuse({"args": [], "kwargs": QUESTION}),
        langfuse({"args": [], "kwargs": {**QUESTION, "retrievedDocs": ["d"], "image": "u"}}),
        ["input.kwargs.image", "input.kwargs.retrievedDocs"],
    ),
    "tools of keyword arguments": (
        langfuse({"args": [], "kwargs": QUESTION}),
        langfuse({"args": [], "kwargs": {**QUESTION, "tools": [{"name": "f"}]}}),
        ["input.kwargs.tools"],
    ),
    "inputs in the input": (
        langfuse({"inputs": QUESTION}),
        langfuse({"inputs": {**QUESTION, "passages": ["d"]}}),
        ["input.inputs.passages"],
    ),
    "settings beside": (
        langfuse(QUESTION),
        langfuse({**QUESTION, "config": {"system_prompt": "Be kind.", "tags": {"sources": ["s"]}}}),
        ["input.config.system_prompt", "input.config.tags.sources"],
    ),
    "two objects of a chain": (
        langsmith({"input": QUESTION}),
        langsmith({"input": {**QUESTION, "context": "c"}}),
        ["inputs.input.context"],
    ),
    "documents of the answer": (
        langsmith(QUESTION),
        langsmith(QUESTION, {"output": "Hello", "source_documents": ["d"]}),
        ["outputs.source_documents"],
    ),
    "JSON text": (phoenix(QUESTION), phoenix({**QUESTION, "context": "c"}), ["attributes.input.value.context"]),
    "a message": (native(), native(documents=["d"]), ["messages[].documents"]),
    "below a message": (native(), native(metadata={"rag": {"chunks": ["c"]}}), ["messages[].metadata.rag.chunks"]),
    "a message that was edited": (native(), native(edited_content="x"), ["messages[].edited_content"]),
}


def unread(path: Path) -> list[str]:
    feedback = Feedback(PrecomputeConfig(model="m", data=str(path), one_class=True), has_template=True)
    for row in feedback.rows():
        feedback.keep(row)
    feedback.finish()
    return sorted(name for name in feedback.unused_beside() if matters_beside(name))


@pytest.mark.parametrize(("form", "before"), [("jsonl", 0), ("csv", 0), ("parquet", 0), ("jsonl", 1100), ("csv", 1100)])
@pytest.mark.parametrize("name", CASES)
def test_context_that_is_not_read_is_named(tmp_path: Path, name: str, form: str, before: int) -> None:
    without, with_it, expected = CASES[name]
    assert unread(write(tmp_path / f"a.{form}", [without] * 2)) == []
    assert unread(write(tmp_path / f"b.{form}", [*[without] * before, with_it])) == expected


@pytest.mark.parametrize(
    "record",
    [
        langfuse({"question": "Hi", "chat_history": SAID, "system_prompt": "Be kind."}),
        langfuse({"args": [], "kwargs": {"question": "Hi", "history": SAID, "system": "Be kind."}}),
        langsmith({"input": "Hi", "chat_history": SAID}, {"output": "Hello", "chat_history": SAID}),
        langfuse({**QUESTION, "context": None, "documents": [], "system_prompt": "", "image": {}}),
        langfuse({**QUESTION, "document_id": "d", "system_fingerprint": "f", "history_length": 3}),
        # What a tool is called with is read.
        native(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"context": "c"}}}]),
        {"prompt": '{"context": "c"}', "completion": "Hello", "label": True},
    ],
)
def test_what_is_read_or_empty_is_not_named(tmp_path: Path, record: dict[str, Any]) -> None:
    assert unread(write(tmp_path / "f.jsonl", [record])) == []


@pytest.mark.parametrize(
    "name",
    [
        *(
            "sys_prompt",
            "developer_prompt",
            "prefill",
            "initial_reason_steps",
            "systemMessage",
            "passage",
            "document",
            "docs",
            "reference",
            "retrieved_chunks",
        ),
        *(
            "earlier_turns",
            "previous_messages",
            "thread",
            "prior",
            "attachments",
            "contexts",
            "chatHistory",
            "context-docs",
        ),
    ],
)
def test_names_of_context(name: str) -> None:
    assert is_context(name)
    assert is_context(f"inputs.any.{name}")
    assert context_names([{"x": [{"y": {name.replace("-", "_"): "z"}}]}])
    assert context_names(json.dumps({"x": json.dumps({name.replace("-", "_"): "z"})}))


@pytest.mark.parametrize(
    "name", ["document_id", "system_version", "thread_id", "source", "prompt", "label", "retrieved_at", "model"]
)
def test_other_names(name: str) -> None:
    assert not is_context(name)
