"""Read what a record has as JSON: tools and template variables; and check that its messages are JSON."""

import json
from collections.abc import Sequence

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.messages import Turns
from offline_kto.kto_core.feedback.quoting import quoted


def tools_in(value: object, where: str) -> tuple[dict[str, object], ...] | None:
    if value is None or value == "":
        return None
    tools = _from_json(value, where, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise FeedbackError(f"{where}: 'tools' must be a list of objects, got {quoted(value)}.")
    return tuple(map(_tool, tools)) if len(tools) > 0 else None


def _tool(tool: dict[str, object]) -> dict[str, object]:
    """Return a tool of Anthropic's in OpenAI's form, which chat templates expect; any other tool as it is."""
    name = next((one for one in ("input_schema", "inputSchema") if isinstance(tool.get(one), dict)), None)
    if name is None or not isinstance(tool.get("name"), str):
        return tool
    described = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {"type": "function", "function": {**described, "parameters": tool[name]}}


def template_kwargs_in(value: object, where: str) -> dict[str, object]:
    name = "chat_template_kwargs"
    if value is None or value == "":
        return {}
    kwargs = _from_json(value, where, name)
    if not isinstance(kwargs, dict):
        raise FeedbackError(f"{where}: '{name}' must be an object, got {quoted(value)}.")
    return {key: item for key, item in kwargs.items() if item is not None}


def _from_json(value: object, where: str, name: str) -> object:
    """Return a copy of `value`, parsed if it is JSON text, as tables store it."""
    try:
        return json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError):
        raise FeedbackError(f"{where}: '{name}' is not valid JSON, got {quoted(value)}.") from None


def check_text(sides: Sequence[Turns], where: str) -> None:
    """Refuse what `canonical_json` refuses; faster for messages that are only text, which most are."""
    texts: list[str] = []
    for side in sides:
        if isinstance(side, str):
            texts.append(side)
            continue
        for message in side:
            if len(message) > 2:
                canonical_json(sides, where)
                return
            texts += message["role"], message["content"]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        canonical_json(sides, where)  # raises the same error, with the text


def canonical_json(value: object, where: str) -> bytes:
    """Return canonical JSON in UTF-8. Refuse values that tokenizers or Parquet cannot represent."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        found = quoted(error.object[max(0, error.start - 20) : error.end])
        raise FeedbackError(
            f"{where}: text ending in {found} contains half a character (a lone surrogate). Repair or remove it."
        ) from None
    except (TypeError, ValueError) as error:
        raise FeedbackError(
            f"{where}: a message contains a value that JSON cannot represent ({error}). Write it as text."
        ) from None
