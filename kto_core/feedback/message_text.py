"""Recognise text that was meant to be messages: JSON that is truncated or encoded twice, and messages as Python prints them."""

import json
import re
from collections.abc import Mapping

from offline_kto.kto_core.feedback.quoting import quoted

_PYTHON_KEY = r"'(?:role|from|human|content|value|type|tool_calls|name|messages|choices|message|message\.role)'"
_CLASSES = (
    r"(?:(?:Human|AI|System|Tool|Function|Chat|User|Assistant)Message(?:Chunk)?"
    r"|ChatCompletion\w*|ChatMessage|TextBlock|Message)"
)
# How Python, NumPy, LangChain and the clients of APIs print messages.
_PRINTED = (
    re.compile(rf"\s*(?:array\(|\()?\[?\s*\{{\s*{_PYTHON_KEY}\s*:"),
    re.compile(rf"\s*[\[(]?\s*{_CLASSES}\(\w+="),
    re.compile(r"\s*[\[(]\s*[\[(]\s*'(?:human|ai|user|assistant|system|developer)'\s*,"),
    re.compile(rf"\s*[\[(]?\s*OrderedDict\([\[({{]*{_PYTHON_KEY}\s*[:,]"),
    re.compile(r"""\s*b(?:'\s*\[?\s*\{\s*"|"\s*\[?\s*\{\s*\\?['"])(?:role|from|messages)\\?["']"""),
    re.compile(r"""\s*content=(?:'|").*(?:'|") (?:additional_kwargs|response_metadata)=\{""", re.DOTALL),
)
_ROLE = (
    r"(?:role|from)\\*\"\s*:\s*\\*\""
    r"(?:user|human|assistant|gpt|chatgpt|system|developer|tool|function|observation|model|ai|bot)\\*\""
)
# The first message of a list, or of an object with the list.
_BEGINNING = rf"(?:\{{\s*\\*\"messages\\*\"\s*:\s*)?\[\s*\{{\s*\\*\"{_ROLE}"
_BEGINS = re.compile(rf"\s*{_BEGINNING}", re.IGNORECASE)
_PREFIXED = re.compile(rf"\s*[\ufeff'\"][\ufeff'\"\s]*{_BEGINNING}", re.IGNORECASE)

# Keys that say who speaks, and keys with what is said.
_WHO = {"role", "author", "speaker", "from", "sender", "type"}
_WHAT = {"content", "msg", "message", "parts", "text", "value", "body"}
_MAYBE = re.compile(r"\s*(?:\[\s*)?\{")


def misread_messages(text: str) -> str | None:
    """Return how a text came to contain messages that cannot be read, and what to do; None for any other text."""
    if any(pattern.match(text) for pattern in _PRINTED):
        return (
            f"as Python prints them, {quoted(text)}, which would be scored as text. Write the column with json.dumps, or "
            "save the data as JSON Lines or Parquet."
        )
    if _PREFIXED.match(text):
        return (
            f"after a quote or a byte order mark, {quoted(text)}, which would be scored as text. Encode them as JSON once, "
            "with nothing before them."
        )
    return None


def begins_with_roles(text: str) -> bool:
    """Return whether a JSON text begins like a list of messages with the usual roles."""
    return _BEGINS.match(text) is not None


def resembles_messages(text: str) -> bool:
    """Return whether a text is a JSON object, or a list of them, with keys for a speaker and for what is said."""
    if _MAYBE.match(text) is None:
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(one, Mapping) and _WHO & one.keys() and _WHAT & one.keys() for one in items)
