"""Find the prompt and the answer in the inputs and outputs of logged calls: functions that mappings use beside JMESPath's.

All of them parse JSON text, because tables store lists and objects so.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any, Final

from offline_kto.kto_core.feedback.foreign_messages import is_batch, message_of_pair, messages_of_exchanges
from offline_kto.kto_core.feedback.message_keys import ROLES
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import opened
from offline_kto.kto_core.feedback.text_parts import text_in
from offline_kto.kto_core.feedback.tool_calls import are_tool_calls

# Usual keys of the prompt and the answer in a call's inputs and outputs.
_ASKED: Final = (
    *("prompt", "input", "inputs", "question", "query", "instruction", "user_input", "user_query", "user_message"),
    *("user_prompt", "message", "text", "prompts", "contents"),
)
_ANSWERED: Final = (
    *(
        "output",
        "outputs",
        "answer",
        "response",
        "completion",
        "result",
        "generation",
        "output_text",
        "text",
        "message",
    ),
    *("content", "reply"),
)
# Names of either side; used only if none of the others is present.
_EITHER: Final = ("message", "text", "content", "contents")
_MESSAGES: Final = ("messages", "chat", "conversation")
_OPTIONS: Final = ("choices", "generations")
_CONTENTS, _CANDIDATES = "contents", "candidates"  # messages and options of Gemini's
_HISTORY: Final = ("chat_history", "history")
_SYSTEM: Final = (
    "system",
    "system_prompt",
    "system_message",
    "instructions",
    "systemInstruction",
    "system_instruction",
)
_CALLS: Final = ("tool_calls", "toolCalls", "function_call")
# Keys whose value may be an object with the text inside; objects under other keys are settings.
_OBJECTS: Final = ("input", "inputs", "output", "outputs", "response", "result", "message", "completion", "generation")
_DESCRIBE: Final = "describe the file with --map FILE, or pass --prompt-field, --completion-field and --label-field"


def only(value: object) -> object:
    """Return the only value of an object with one unusual key; any other value unchanged."""
    found = opened(value)
    return next((opened(found[key]) for key in only_keys(found)), found)


def only_keys(found: object) -> list[str]:
    """Return the key that `only` chooses; empty if it returns the object."""
    there = [key for key, item in found.items() if item not in (None, "", [], {})] if isinstance(found, dict) else []
    usual = {*_ASKED, *_ANSWERED, *_MESSAGES, *_OPTIONS}
    return there if len(there) == 1 and not usual & set(there) else []


def asked(value: object) -> object:
    """Return the prompt of a call: text, or messages that include the call's system text and history.

    Raises:
        ValueError: an object whose prompt is not clear.
    """
    found = _known(value, (*_ASKED, *_MESSAGES, _CONTENTS, "args", "kwargs"))
    if not isinstance(found, Mapping) or "role" in found:
        return _as_text(found)
    call = _arguments(found)
    if call is not found:
        return asked(call)
    text = _messages_at(found) or _text_at(found, _ASKED, "question")
    if isinstance(text, Mapping):
        text = asked(text)
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], str):  # a batch of one
        text = text[0]
    return _with_context(found, _as_text(text))


def asked_before(value: object) -> object:
    """Return like `asked`, for an object that also contains the answer, which may be the last of its messages."""
    found = _known(value, (*_ASKED, *_MESSAGES))
    if isinstance(found, Mapping) and "role" not in found and (name := _answered_messages(found)) is not None:
        return asked({**found, name: _messages_in(found[name])[:-1]})
    return asked(found)


def _answered_messages(found: Mapping[str, Any]) -> str | None:
    """Return the key of messages that end with an answer; None if there are none.

    Raises:
        ValueError: another key has a different answer.
    """
    name = next(iter(_message_keys(found)), None)
    messages = [] if name is None else _messages_in(found[name])
    if len(messages) < 2 or not _is_assistant(messages[-1]):
        return None
    said = _said(messages[-1])
    for other in _answer_keys(found):
        if isinstance(found[other], str) and isinstance(said, str) and found[other].strip() != said:
            raise ValueError(
                f"it is not clear which of the keys '{name}', '{other}' has the answer, because they differ; {_DESCRIBE}"
            )
    return name


def _is_assistant(message: object) -> bool:
    return _role(message) == "assistant"


def _role(message: object) -> str | None:
    """Return the role of a message by its usual name; None for an unknown role."""
    if not isinstance(message, dict):
        return None
    role = next((message[key] for key in ("role", "from", "type") if isinstance(message.get(key), str)), "")
    return ROLES.get(role.strip().lower())


def _said(message: object) -> object:
    """Return the content of a message."""
    found = message.get("content", message.get("value")) if isinstance(message, dict) else None
    return found.strip() if isinstance(found, str) else found


def _question(value: object) -> object:
    """Return the text of a question, also if it is the only message of a list."""
    if isinstance(value, list):
        return _said(value[0]) if len(value) == 1 else None
    return value.strip() if isinstance(value, str) else None


def asked_routes(found: object) -> list[tuple[str, ...]]:
    """Return the routes to the values that `asked` reads in an object; empty for other values."""
    if not isinstance(found, Mapping) or "role" in found:
        return []
    with contextlib.suppress(ValueError):  # raised where the prompt is read
        call = _arguments(found)
        if call is not found:
            name = "args" if opened(found.get("args")) else "kwargs"
            return [(name, *route) for route in asked_routes(call) or [()]]
    keys = _keys_read(found, _ASKED, (*_HISTORY, *_SYSTEM))
    return [
        (key, *below) for key in keys for below in asked_routes(opened(found[key]) if key in _OBJECTS else None) or [()]
    ]


def answered_routes(found: object) -> list[tuple[str, ...]]:
    """Return the routes to the values that `answered` reads in an object; empty for other values."""
    return [(key,) for key in _answered_keys(found)]


def only_routes(found: object) -> list[tuple[str, ...]]:
    """Return the route to the value that `only` chooses; empty if it returns the object."""
    return [(key,) for key in only_keys(found)]


def _answered_keys(found: object) -> list[str]:
    options = _option_keys(found) if isinstance(found, Mapping) else []
    if options or not isinstance(found, Mapping) or "role" in found:
        return options[:1]
    with contextlib.suppress(ValueError):  # raised where the answer is read
        if (name := _answered_messages(found)) is not None:
            return [name]
    calls = _calls_in(found)
    return [*(_answer_keys(found) or _keys_read(found, _ANSWERED, ())), *([calls] if calls else [])]


def _calls_in(found: Mapping[str, Any]) -> str | None:
    """Return the key of the tool calls beside an answer; None without calls."""
    return next((name for name in _CALLS if are_tool_calls(opened(found.get(name)))), None)


def _option_keys(found: Mapping[str, Any]) -> list[str]:
    """Return the keys with answers, of which there should be one."""
    candidates = opened(found.get(_CANDIDATES))
    are_options = isinstance(candidates, list) and all(
        isinstance(one, Mapping) and "content" in one for one in candidates
    )
    return [
        *(name for name in _OPTIONS if opened(found.get(name))),
        *([_CANDIDATES] if candidates and are_options else []),
    ]


def _answer_keys(found: Mapping[str, Any]) -> list[str]:
    """Return the keys with a value that can only be an answer."""
    return [name for name in _known_keys(found, _ANSWERED) if name not in _EITHER]


def _keys_read(found: object, names: tuple[str, ...], beside: tuple[str, ...]) -> list[str]:
    if not isinstance(found, Mapping) or "role" in found:
        return []
    there = _message_keys(found)
    read = there[:1] or _known_keys(found, names)
    return [*read, *(name for name in beside if found.get(name))] if read else []


def _messages_at(found: Mapping[str, Any]) -> list[Any] | None:
    return next((_messages_in(found[name]) for name in _message_keys(found)), None)


def _message_keys(found: Mapping[str, Any]) -> list[str]:
    """Return the keys with a list of messages."""
    names = [name for name in _MESSAGES if _messages_in(found.get(name))]
    contents = _messages_in(found.get(_CONTENTS))
    is_gemini = bool(contents) and all(isinstance(one, Mapping) and "parts" in one for one in contents)
    return [*names, *([_CONTENTS] if is_gemini else [])]


def _messages_in(value: object) -> list[Any]:
    """Return the items of a list of messages, or of a batch of one list; empty for any other value."""
    found = opened(value)
    if not isinstance(found, list):
        return []
    return [message_of_pair(one) or one for one in (found[0] if is_batch(found) else found)]


def _as_text(value: object) -> object:
    """Return a number as text: tools parse text such as "5" as JSON."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


def _with_context(found: Mapping[str, Any], text: object) -> object:
    """Return a question, preceded by the system text and the earlier turns of the same object."""
    turns = [text] if isinstance(text, Mapping) else text if isinstance(text, list) else None
    before: list[object] = []
    for name in _HISTORY:
        before += _earlier(found.get(name), name)
    question = _question(turns or text)
    if before and question is not None and _role(before[-1]) == "user" and _said(before[-1]) == question:
        before.pop()  # programs append the question to the history before they ask the model
    texts = [_system_text(found.get(name)) for name in _SYSTEM]
    system = next((one for one in texts if isinstance(one, str) and one.strip()), None)
    if system is not None:
        before.insert(0, {"role": "system", "content": system})
    if not before or text is None:
        return text
    return [*before, *(turns if turns is not None else [{"role": "user", "content": text}])]


def _system_text(value: object) -> object:
    """Return a system text that may be a list of parts; Gemini's is an object with them."""
    found = opened(value)
    parts = found.get("parts") if isinstance(found, Mapping) else None
    if isinstance(parts, list) and all(isinstance(one, Mapping) and isinstance(one.get("text"), str) for one in parts):
        return "".join(one["text"] for one in parts)
    return text_in(value)


def _earlier(value: object, name: str) -> list[Any]:
    """Return the turns before a question: messages, or pairs of question and answer."""
    found = opened(value)
    if not found:
        return []
    messages = _messages_in(found)
    if not all(isinstance(one, Mapping) for one in messages) or not messages:
        messages = messages_of_exchanges(found) or []
    if not messages:
        raise ValueError(
            f"'{name}' must be a list of messages or of [question, answer] pairs, got {quoted(found)}; {_DESCRIBE}"
        )
    return messages


def _arguments(call: Mapping[str, Any]) -> Any:
    """Return the only argument of a function that was called with `args` and `kwargs`; other objects as they are."""
    if not call or not set(call) <= {"args", "kwargs"}:
        return call
    args, kwargs = opened(call.get("args")) or [], opened(call.get("kwargs")) or {}
    if isinstance(args, list) and isinstance(kwargs, dict) and len(args) + bool(kwargs) == 1:
        return args[0] if args else kwargs
    raise ValueError("several arguments, and it is not clear which of them is the question")


def answered(value: object) -> object:
    """Return the answer of a call: text or messages; None if it is empty.

    Raises:
        ValueError: an object whose answer is not clear.
    """
    found = _known(value, (*_ANSWERED, *_MESSAGES, *_OPTIONS, _CANDIDATES))
    if isinstance(found, list):
        # The Responses API lists the reasoning, which is encrypted or a summary, before the message.
        if len(found) == 1 and isinstance(found[0], str):  # a batch of one
            return found[0]
        if found and all(isinstance(one, Mapping) and "message" in one and "role" not in one for one in found):
            return answered({"choices": found})
        if found and all(isinstance(one, Mapping) and isinstance(one.get("function"), Mapping) for one in found):
            return {"role": "assistant", "content": "", "tool_calls": found}
        kept = [one for one in found if not (isinstance(one, Mapping) and one.get("type") == "reasoning")]
        return kept or None
    if not isinstance(found, Mapping) or "role" in found or _is_langchain(found):
        return _as_text(found)
    for name in _option_keys(found):
        options = opened(found[name])
        while isinstance(options, list) and len(options) == 1 and isinstance(options[0], list):
            options = options[0]  # a batch of one
        if isinstance(options, list) and options:
            if len(options) > 1:
                raise ValueError(f"several {name}, and it is not clear which of them was judged")
            return _chosen(options[0])
    # Messages beside an answer are its prompt, unless they contain it.
    messages = _messages_at(found) if _answered_messages(found) or not _answer_keys(found) else None
    calls = _calls_in(found)
    if messages is None and calls is not None and not _known_keys(found, _ANSWERED):
        return {"role": "assistant", "content": "", calls: found[calls]}
    text = messages or _text_at(found, _ANSWERED, "answer")
    if isinstance(text, Mapping | list):
        return answered(text)
    text = _as_text(text)
    return text if calls is None else {"role": "assistant", "content": text, calls: found[calls]}


def _chosen(option: object) -> object:
    if not isinstance(option, Mapping):
        return option
    message = opened(option.get("message")) or option.get("text") or opened(option.get("content"))
    # A table may have the message's content alone.
    return message.get("content") if isinstance(message, Mapping) and set(message) == {"content"} else message


def _is_langchain(value: Mapping[str, object]) -> bool:
    return isinstance(value.get("kwargs", value.get("data")), Mapping) or isinstance(value.get("type"), str)


def _known(value: object, keys: tuple[str, ...]) -> object:
    """Return the object in a JSON text if it has one of these keys; other JSON text may be a user's own words."""
    found = opened(value)
    if isinstance(value, str) and isinstance(found, dict) and not any(key in found for key in keys):
        return value
    if isinstance(value, str) and isinstance(found, list) and not all(isinstance(one, dict) for one in found):
        return value
    return found


def _known_keys(found: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return those of some keys that have a value of text; names of either side only if there is no other."""
    there = {key: item for key, item in found.items() if item not in (None, "", [], {})}
    known = [name for name in names if name in there and (name in _OBJECTS or not isinstance(there[name], dict))]
    return [name for name in known if name not in _EITHER] or known


def _text_at(found: Mapping[str, Any], names: tuple[str, ...], what: str) -> object:
    """Return the value of the only key that is one of these."""
    there = {key: item for key, item in found.items() if item not in (None, "", [], {})}
    known = _known_keys(found, names)
    if len(known) == 1:
        return opened(there[known[0]]) if known[0] in _OBJECTS else there[known[0]]
    if not there:
        return None
    shown = ", ".join(repr(name) for name in [*(known or there)][:8])
    raise ValueError(f"it is not clear which of the keys {shown} has the {what}; {_DESCRIBE}")
