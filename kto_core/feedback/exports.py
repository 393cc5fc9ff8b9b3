"""Find prompts and answers in logged calls, and the labels of raters: functions that mappings use beside JMESPath's.

All of them parse JSON text, because tables store lists and objects so.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from offline_kto.kto_core.feedback.labels import has_no_value, number_in
from offline_kto.kto_core.feedback.left_out import OTHER_SCORES, LeftOut
from offline_kto.kto_core.feedback.messages import ROLES
from offline_kto.kto_core.feedback.ordering import in_order
from offline_kto.kto_core.feedback.quoting import quoted

# Usual keys of the prompt and the answer in a call's inputs and outputs.
_ASKED: Final = (
    *("prompt", "input", "inputs", "question", "query", "instruction", "user_input", "user_query", "user_message"),
    *("user_prompt", "message", "text", "prompts"),
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
_EITHER: Final = ("message", "text", "content")
_MESSAGES: Final = ("messages", "chat", "conversation")
_OPTIONS: Final = ("choices", "generations")
_HISTORY: Final = ("chat_history", "history")
_SYSTEM: Final = ("system", "system_prompt", "system_message", "instructions")
# Keys whose value may be an object with the text inside; objects under other keys are settings.
_OBJECTS: Final = ("input", "inputs", "output", "outputs", "response", "result", "message", "completion", "generation")
_DESCRIBE: Final = "describe the file with --map FILE, or pass --prompt-field, --completion-field and --label-field"
# More votes than one answer gets; they are listed one by one.
_MOST_COUNTED: Final = 1_000_000
# How Dify writes that a message has no parent.
NIL: Final = "00000000-0000-0000-0000-000000000000"
_SEGMENT = re.compile(r"\[[^\]]*\]|[^.]+")
_JSON_START = re.compile(r"\s*[\[{]")
_PYTHON_START = re.compile(r"\s*(?:\[\s*)?[\[{]\s*'|\s*array\(")
# Gradio puts an apostrophe before cells that a spreadsheet could interpret as a formula.
_ESCAPED = re.compile(r"'(?=[=+\-@\t\n]|.*,[=+\-@\t\n])", re.DOTALL)


def opened(value: Any) -> Any:
    """Return the list or object in a JSON text; any other value as it is."""
    if not isinstance(value, str) or _JSON_START.match(value) is None:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def entered(value: Any) -> Any:
    """Return like `opened`, for a value whose content is needed.

    Raises:
        ValueError: a list or an object as Python prints it.
    """
    found = opened(value)
    if is_printed(found):
        raise ValueError(
            f"a value as Python prints it, {found[:60]!r}; write the column with json.dumps, or save the data as JSON Lines"
        )
    return found


def is_printed(value: object) -> bool:
    """Return whether a text is a list or an object as Python prints it."""
    return isinstance(value, str) and _PYTHON_START.match(value) is not None


def only(value: object) -> object:
    """Return the only value of an object with one unusual key; any other value unchanged."""
    found = opened(value)
    return next((opened(found[key]) for key in only_keys(found)), found)


def only_keys(found: object) -> list[str]:
    """Return the key that `only` chooses; empty if it returns the object."""
    there = [key for key, item in found.items() if item not in (None, "", [], {})] if isinstance(found, dict) else []
    usual = {*_ASKED, *_ANSWERED, *_MESSAGES, *_OPTIONS}
    return there if len(there) == 1 and not usual & set(there) else []


def has(value: object, keys: list[str]) -> bool:
    """Return whether a value is an object with all of these keys; their values may be null."""
    found = opened(value)
    return isinstance(found, dict) and all(key in found for key in keys)


def without(value: object, keys: list[str]) -> object:
    """Return an object without some of its keys; any other value as it is."""
    found = opened(value)
    return {key: item for key, item in found.items() if key not in keys} if isinstance(found, dict) else value


def under(value: object, prefix: str) -> dict[str, object]:
    """Return the keys of an object that begin with a prefix, without it, where they have a value."""
    found = value if isinstance(value, dict) else {}
    return {key[len(prefix) :]: item for key, item in found.items() if key.startswith(prefix) and item is not None}


def scored(value: object) -> dict[str, object]:
    """Return the columns that are scores of Opik's, without their reasons and without "-", which is no score."""
    found = value if isinstance(value, dict) else {}
    reasons = {f"{name}_reason" for name in found}
    return {name: item for name, item in found.items() if item != "-" and name not in reasons}


def own_scores(record: object) -> list[dict[str, object]]:
    """Return the scores in a record of Langfuse's that judge it, by name and value.

    Raises:
        LeftOut: it has only scores of something else.
    """
    scores, others = _scores(record), other_scores(record)
    if others and len(others) == len(scores):
        key, name = _judged(others[0])
        raise LeftOut(
            OTHER_SCORES, f"{key} {quoted(name)}; export the observations with their scores, or score the traces"
        )
    return [
        {"name": one["name"], "value": one.get("stringValue") or one.get("string_value") or one.get("value")}
        for one in scores
        if one not in others and "CORRECTION" not in (one.get("dataType"), one.get("data_type"))
    ]


def other_scores(record: object) -> list[dict[str, object]]:
    """Return the scores in a record of Langfuse's that judge one of its observations, or its whole session."""
    name = record.get("id") if isinstance(record, dict) else None
    return [one for one in _scores(record) if _judged(one)[1] not in (None, name)]


def _scores(record: object) -> list[dict[str, object]]:
    scores = opened(record.get("scores")) if isinstance(record, dict) else None
    return [one for one in scores if isinstance(one, dict) and one.get("name")] if isinstance(scores, list) else []


def _judged(score: dict[str, object]) -> tuple[str, object]:
    """Return the key and the id of the observation, the session or the experiment that a score judges; ("", None) for a trace."""
    narrow = ("observationId", "observation_id")
    wide = ("sessionId", "session_id", "datasetRunId", "dataset_run_id")
    keys = narrow if score.get("traceId") or score.get("trace_id") else (*narrow, *wide)
    return next(((key, score[key]) for key in keys if score.get(key)), ("", None))


def nested(value: object) -> object:
    """Return an object whose keys are paths ("output.choices.0.message") as nested objects and lists.

    Null values are left out. Text in brackets is one key: "feedback.[wandb.reaction.1].payload".
    """
    tree: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        *parents, last = segments(key)
        at = tree
        for one in parents:
            inner = at.setdefault(one, {})
            if not isinstance(inner, dict):
                break
            at = inner
        else:
            if item is not None:
                at[last] = opened(item)
    return _with_lists(tree)


def segments(key: str) -> list[str]:
    """Return the parts of a key that is a path; text in brackets is one part."""
    return _SEGMENT.findall(key) or [key]


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    found = {key: _with_lists(item) for key, item in value.items()}
    numbers = [str(number) for number in range(len(found))]
    return [found[number] for number in numbers] if found and set(found) == set(numbers) else found


def matching(values: object, key: str, value: object) -> list[object]:
    """Return the objects of a list in which a key has a value, compared as text."""
    found = values if isinstance(values, list) else []
    return [one for one in found if isinstance(one, dict) and str(one.get(key)) == str(value)]


def unescaped(value: object) -> object:
    """Return a cell without the apostrophe that Gradio put before it."""
    return _ESCAPED.sub("", value, count=1) if isinstance(value, str) and _ESCAPED.match(value) else value


def pairs(value: object) -> list[dict[str, object]]:
    """Return pairs of question and answer as turns, each with its `id`: "1,0" is the question of the second pair.

    A side that is null, as before a greeting, is skipped. A side that is a list is the path of a file.
    """
    found = entered(value)
    turns: list[dict[str, object]] = []
    for number, pair in enumerate(found if isinstance(found, list) else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"not a pair of question and answer: {pair!r:.60}")
        for side, text in enumerate(pair):
            content = [{"type": "file", "file": text}] if isinstance(text, list) else text
            if text is not None:
                turns.append({"id": f"{number},{side}", "role": ("user", "assistant")[side], "content": content})
    return turns


def asked(value: object) -> object:
    """Return the prompt of a call: text, or messages that include the call's system text and history.

    Raises:
        ValueError: an object whose prompt is not clear.
    """
    found = _known(value, (*_ASKED, *_MESSAGES, "args", "kwargs"))
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
        return asked({**found, name: opened(found[name])[:-1]})
    return asked(found)


def _answered_messages(found: Mapping[str, Any]) -> str | None:
    """Return the key of messages that end with an answer; None if there are none.

    Raises:
        ValueError: another key has a different answer.
    """
    name = next((name for name in _MESSAGES if isinstance(opened(found.get(name)), list) and opened(found[name])), None)
    messages = [] if name is None else opened(found[name])
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
    options = [name for name in _OPTIONS if isinstance(found, Mapping) and opened(found.get(name))]
    if options or not isinstance(found, Mapping) or "role" in found:
        return options[:1]
    with contextlib.suppress(ValueError):  # raised where the answer is read
        if (name := _answered_messages(found)) is not None:
            return [name]
    return _answer_keys(found) or _keys_read(found, _ANSWERED, ())


def _answer_keys(found: Mapping[str, Any]) -> list[str]:
    """Return the keys with a value that can only be an answer."""
    return [name for name in _known_keys(found, _ANSWERED) if name not in _EITHER]


def _keys_read(found: object, names: tuple[str, ...], beside: tuple[str, ...]) -> list[str]:
    if not isinstance(found, Mapping) or "role" in found:
        return []
    there = [name for name in _MESSAGES if isinstance(opened(found.get(name)), list) and opened(found[name])]
    read = there[:1] or _known_keys(found, names)
    return [*read, *(name for name in beside if found.get(name))] if read else []


def _messages_at(found: Mapping[str, Any]) -> list[object] | None:
    for name in _MESSAGES:
        messages = opened(found.get(name))
        if isinstance(messages, list) and messages:
            return messages
    return None


def _as_text(value: object) -> object:
    """Return a number as text: tools parse text such as "5" as JSON."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


def _with_context(found: Mapping[str, Any], text: object) -> object:
    """Return a question, preceded by the system text and the earlier turns of the same object."""
    turns = [text] if isinstance(text, Mapping) else text if isinstance(text, list) else None
    before: list[object] = []
    for name in _HISTORY:
        earlier = opened(found.get(name))
        if not earlier:
            continue
        if not isinstance(earlier, list) or not all(isinstance(one, Mapping) for one in earlier):
            raise ValueError(f"'{name}' is not a list of messages")
        before += earlier
    question = _question(turns or text)
    if before and question is not None and _role(before[-1]) == "user" and _said(before[-1]) == question:
        before.pop()  # programs append the question to the history before they ask the model
    system = next((found[name] for name in _SYSTEM if isinstance(found.get(name), str) and found[name].strip()), None)
    if system is not None:
        before.insert(0, {"role": "system", "content": system})
    if not before or text is None:
        return text
    return [*before, *(turns if turns is not None else [{"role": "user", "content": text}])]


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
    found = _known(value, (*_ANSWERED, *_MESSAGES, *_OPTIONS))
    if isinstance(found, list):
        # The Responses API lists the reasoning, which is encrypted or a summary, before the message.
        if len(found) == 1 and isinstance(found[0], str):  # a batch of one
            return found[0]
        if found and all(isinstance(one, Mapping) and "message" in one and "role" not in one for one in found):
            return answered({"choices": found})
        kept = [one for one in found if not (isinstance(one, Mapping) and one.get("type") == "reasoning")]
        return kept or None
    if not isinstance(found, Mapping) or "role" in found or _is_langchain(found):
        return _as_text(found)
    for name in _OPTIONS:
        options = opened(found.get(name))
        while isinstance(options, list) and len(options) == 1 and isinstance(options[0], list):
            options = options[0]  # a batch of one
        if isinstance(options, list) and options:
            if len(options) > 1:
                raise ValueError(f"several {name}, and it is not clear which of them was judged")
            return _chosen(options[0])
    # Messages beside an answer are its prompt, unless they contain it.
    messages = _messages_at(found) if _answered_messages(found) or not _answer_keys(found) else None
    text = messages or _text_at(found, _ANSWERED, "answer")
    return answered(text) if isinstance(text, Mapping | list) else _as_text(text)


def _chosen(option: object) -> object:
    if not isinstance(option, Mapping):
        return option
    message = opened(option.get("message")) or option.get("text")
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


def each_counted(value: object) -> list[str]:
    """Return each key of an object of counts as often as its value says: the votes that were counted.

    Raises:
        ValueError: a value that is no count.
    """
    found = opened(value)
    votes: list[str] = []
    for key, count in found.items() if isinstance(found, dict) else ():
        number = number_in(count)
        if number is None or not number.is_integer() or not 0 <= number <= _MOST_COUNTED:
            raise ValueError(f"{quoted(key)} is {quoted(count)}, which is no number of votes")
        votes += [key] * int(number)
    return votes


def threaded(messages: object) -> list[dict[str, Any]]:
    """Return the messages of a conversation of Dify's with the id of the message before each as `parent_message_id`.

    The API writes an id of zeros, which stands for the message before in time; without any id, that is meant too. Beside
    ids, a message without one begins a thread of its own, as a first question that was edited.

    Raises:
        ValueError: the times of such messages are not known.
    """
    found = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    parents = [one.get("parent_message_id") or None for one in found]
    if all(parent not in (None, NIL) for parent in parents):
        return found
    if len({one.get("id") for one in found}) > 1 and _needs_times(found, parents):
        if any(has_no_value(one.get("created_at")) for one in found):
            raise ValueError(
                "messages without 'parent_message_id' are in the order of 'created_at', which is missing. Export it, or give each "
                "message the id of the one before"
            )
        keys = in_order([one["created_at"] for one in found])
        in_time = [found[number] for number in sorted(range(len(found)), key=keys.__getitem__)]
    else:
        in_time = found[:1]
    before = _messages_before(in_time)
    is_flat = all(parent is None for parent in parents)
    return [
        {**one, "parent_message_id": before.get(one.get("id")) if parent == NIL or is_flat else parent}
        for one, parent in zip(found, parents, strict=True)
    ]


def _needs_times(messages: list[dict[str, Any]], parents: list[object]) -> bool:
    """Return whether it depends on the time what comes before a message without a parent."""
    unknown = sum(parent in (None, NIL) for parent in parents)
    return unknown > 1 or (NIL in parents and all(not has_no_value(one.get("created_at")) for one in messages))


def _messages_before(messages: list[dict[str, Any]]) -> dict[object, object]:
    """Return the id of the message before each; answers to the same question follow the same message."""
    before: dict[object, object] = {}
    last: dict[str, Any] | None = None
    for one in messages:
        name = one.get("id")
        if last is not None and name != last.get("id"):
            is_other_answer = one.get("query") == last.get("query")
            before.setdefault(name, before.get(last.get("id")) if is_other_answer else last.get("id"))
        before.setdefault(name, None)
        last = one
    return before


def gathered(values: object) -> dict[str, list[object]]:
    """Return the values of the objects in a list by key, those of lists one by one."""
    found: dict[str, list[object]] = {}
    for one in values if isinstance(values, list) else []:
        for key, value in one.items() if isinstance(one, dict) else ():
            inner = opened(value)
            found.setdefault(key, []).extend(inner if isinstance(inner, list) else [inner])
    return found


def submitted(record: object) -> dict[str, list[object]]:
    """Return the submitted answers to each question of an Argilla record, by the question's name.

    Drafts and discarded answers do not count. Where an answer has no status of its own, the record's status does.
    """
    if not isinstance(record, dict):
        return {}
    whole = record.get("status") not in ("pending", "draft", "discarded")
    found: dict[str, list[object]] = {}
    for name, values, statuses in _questions(record):
        kept = [
            value
            for value, status in zip(values, statuses, strict=True)
            if value is not None and (status == "submitted" or (status is None and whole))
        ]
        if kept:
            found[name] = kept
    return found


def _questions(record: dict[str, Any]) -> Any:
    """Yield (name, values, statuses) of each question, in the nested, the flat and the older form of the records."""
    inner = entered(record.get("responses"))
    for name, answers in inner.items() if isinstance(inner, dict) else ():
        yield name, *_answers(answers)
    yield from _by_question(inner) if isinstance(inner, list) else ()
    for key in record:
        if key.endswith(".responses"):
            values = entered(record[key])
            values = values if isinstance(values, list) else []
            statuses = entered(record.get(f"{key}.status"))
            fits = isinstance(statuses, list) and len(statuses) == len(values)
            yield key.removesuffix(".responses"), values, statuses if fits else [None] * len(values)
        elif f"{key}-suggestion" in record:
            yield key, *_answers(record[key])


def _by_question(responses: list[object]) -> Any:
    """Yield (name, values, statuses) from the responses of Argilla 1.x, each of which has the values of all questions."""
    found: dict[str, tuple[list[object], list[object]]] = {}
    for one in responses:
        values = one.get("values") if isinstance(one, dict) else None
        for name, answer in values.items() if isinstance(values, dict) else ():
            question = found.setdefault(name, ([], []))
            question[0].append(answer.get("value") if isinstance(answer, dict) else answer)
            question[1].append(one.get("status") if isinstance(one, dict) else None)
    for name, (answers, statuses) in found.items():
        yield name, answers, statuses


def _answers(value: object) -> tuple[list[object], list[object]]:
    found = entered(value)
    if isinstance(found, dict):  # a list of objects, as `datasets` stores it
        columns = {key: item for key, item in found.items() if isinstance(item, list)}
        values = columns.get("value", [])
        return values, columns.get("status", [None] * len(values))
    items = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [one.get("value") for one in items], [one.get("status") for one in items]
