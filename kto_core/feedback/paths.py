"""Find values in records with JMESPath. No code is run, and a path without a value gives None.

    input.messages                         a nested key
    "inputs.input"                         a key with a dot in its name
    scores[?name=='thumbs'] | [-1].value   the last score of that name

Functions in addition to JMESPath's own, or in place of them:

    sort_by(list, &key)         the list in order: numbers, also as text, and times as such; refuses what has no clear order
    max_by(list, &key)          its last value in that order
    min_by(list, &key)          its first value in that order
    json(text)                  the value of a JSON text; any other value as it is
    entered(value)              like json; refuses lists and objects as Python prints them
    has(value, keys)            whether a value is an object with these keys
    without(object, keys)       the object without some of its keys
    under(object, prefix)       the keys that begin with a prefix, without it
    scored(object)              Opik's columns of scores, without their reasons and "-"
    nested(object)              keys such as "output.choices.0" as nested objects and lists
    only(object)                its only value; the object if it has several
    matching(list, key, value)  the objects in which a key has a value
    split(text, mark)           the parts of a text between marks
    asked(value)                the prompt in the inputs of a call
    asked_before(object)        the prompt in an object that also contains the answer
    answered(value)             the answer in the outputs of a call
    gathered(list)              the values of objects by key: [{a: 1}, {a: 2}] becomes {a: [1, 2]}
    submitted(record)           the submitted answers of an Argilla record, by question
    pairs(list)                 messages from pairs of question and answer
    unescaped(text)             a cell without the apostrophe that Gradio adds
    dialogue(asked, said)       messages of user and assistant in alternation, from two lists of texts
    own_scores(record)          the scores of a Langfuse record, without those of its observations and its session
    other_scores(record)        those of its observations and its session
    threaded(messages)          Dify's messages, each with the id of the one before, also where that is a matter of time
    each_counted(object)        each key as often as its value says: {up: 2, down: 1} becomes [up, up, down]
    agreed(list)                its first value; refuses values of which one is up and another down
    rounds(messages, n)         the messages up to the n-th of the assistant; all if n is null

A path continues inside JSON text, as tables store lists and objects.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jmespath
from jmespath import functions, visitor
from jmespath.exceptions import (
    EmptyExpressionError,
    IncompleteExpressionError,
    JMESPathError,
    JMESPathTypeError,
    LexerError,
    ParseError,
)

from offline_kto.kto_core.errors import ConfigError, FeedbackError, nearest
from offline_kto.kto_core.feedback import export_conversations, export_scores, logged_calls, stored_values
from offline_kto.kto_core.feedback.labels import has_no_value, usual_label
from offline_kto.kto_core.feedback.left_out import EMPTY, LeftOut
from offline_kto.kto_core.feedback.ordering import in_order
from offline_kto.kto_core.feedback.quoting import counted, quoted
from offline_kto.kto_core.feedback.reads import Route, routes


class _Functions(functions.Functions):
    # JMESPath's own, which compare numbers that are written as text, and times, as text.
    @functions.signature({"types": ["array"]}, {"types": ["expref"]})  # type: ignore[untyped-decorator]
    def _func_sort_by(self, values: list[Any], key: Any) -> list[Any]:
        return _sorted(values, key)

    @functions.signature({"types": ["array"]}, {"types": ["expref"]})  # type: ignore[untyped-decorator]
    def _func_max_by(self, values: list[Any], key: Any) -> Any:
        return next(reversed(_sorted(values, key)), None)

    @functions.signature({"types": ["array"]}, {"types": ["expref"]})  # type: ignore[untyped-decorator]
    def _func_min_by(self, values: list[Any], key: Any) -> Any:
        return next(iter(_sorted(values, key)), None)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_json(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_entered(self, value: Any) -> Any:
        return stored_values.entered(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_pairs(self, value: Any) -> Any:
        return export_conversations.pairs(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_only(self, value: Any) -> Any:
        return logged_calls.only(value)

    @functions.signature({"types": []}, {"types": ["array"]})  # type: ignore[untyped-decorator]
    def _func_has(self, value: Any, keys: list[str]) -> bool:
        return stored_values.has(value, keys)

    @functions.signature({"types": []}, {"types": ["string"]})  # type: ignore[untyped-decorator]
    def _func_under(self, value: Any, prefix: str) -> Any:
        return stored_values.under(value, prefix)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_scored(self, value: Any) -> Any:
        return export_scores.scored(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_nested(self, value: Any) -> Any:
        return stored_values.nested(value)

    @functions.signature({"types": []}, {"types": ["string"]}, {"types": []})  # type: ignore[untyped-decorator]
    def _func_matching(self, values: Any, key: str, value: Any) -> Any:
        return stored_values.matching(values, key, value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_asked(self, value: Any) -> Any:
        return logged_calls.asked(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_asked_before(self, value: Any) -> Any:
        return logged_calls.asked_before(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_answered(self, value: Any) -> Any:
        return logged_calls.answered(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_submitted(self, value: Any) -> Any:
        return export_scores.submitted(value)

    @functions.signature({"types": ["array"]})  # type: ignore[untyped-decorator]
    def _func_agreed(self, values: list[Any]) -> Any:
        verdicts = {usual_label(value) for value in values} - {None}
        if len(verdicts) > 1:
            raise JMESPathError(f"the values {quoted(values)} contradict each other")
        return next((value for value in values if not has_no_value(value)), None)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_each_counted(self, value: Any) -> Any:
        return export_scores.each_counted(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_own_scores(self, value: Any) -> Any:
        return export_scores.own_scores(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_other_scores(self, value: Any) -> Any:
        return export_scores.other_scores(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_threaded(self, value: Any) -> Any:
        return export_conversations.threaded(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_gathered(self, value: Any) -> Any:
        return export_scores.gathered(value)

    @functions.signature({"types": []})  # type: ignore[untyped-decorator]
    def _func_unescaped(self, value: Any) -> Any:
        return export_conversations.unescaped(value)

    @functions.signature({"types": []}, {"types": ["array"]})  # type: ignore[untyped-decorator]
    def _func_without(self, value: Any, keys: list[str]) -> Any:
        return stored_values.without(value, keys)

    @functions.signature({"types": ["string"]}, {"types": ["string"]})  # type: ignore[untyped-decorator]
    def _func_split(self, value: str, mark: str) -> list[str]:
        return value.split(mark)

    @functions.signature({"types": ["array", "string"]}, {"types": ["array", "string", "null"]})  # type: ignore[untyped-decorator]
    def _func_dialogue(self, asked: Any, answered: Any) -> list[dict[str, Any]]:
        questions, answers = _texts(asked), _texts(answered)
        if len(questions) != len(answers):
            raise JMESPathError(f"{len(answers)} answers to {len(questions)} questions")
        if None in answers:
            raise LeftOut(EMPTY, "an answer is null")
        pairs = zip(questions, answers, strict=True)
        return [message for q, a in pairs for message in (_message("user", q), _message("assistant", a))]

    @functions.signature({"types": []}, {"types": []})  # type: ignore[untyped-decorator]
    def _func_rounds(self, messages: Any, count: Any) -> Any:
        if not isinstance(messages, list) or not isinstance(count, int):
            return messages
        ends = [i + 1 for i, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "assistant"]
        return messages[: ends[count - 1]] if 0 < count <= len(ends) else messages


def _texts(value: Any) -> list[Any]:
    """Return the texts of a list, or of one text. Raises: JMESPathError: a list as Python or NumPy prints it."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[\s*['\"].*['\"]\s*\]\s*", value, re.DOTALL):
        raise JMESPathError(
            f"a list that is not JSON, {quoted(value, 60)}; write the column with json.dumps, or save the data as JSON Lines"
        )
    return value if isinstance(value, list) else [value]


def _message(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


def _sorted(values: list[Any], key: Any) -> list[Any]:
    """Return values in the order of what an expression finds in each of them."""
    try:
        keys = in_order([key.visit(key.expression, one) for one in values])
    except ValueError as error:
        raise ValueError(f"by {quoted(_fields(key.expression), 200)[1:-1]}, {error}") from None
    return [values[number] for number in sorted(range(len(values)), key=keys.__getitem__)]


def _fields(node: Mapping[str, Any]) -> list[str]:
    """Return the keys that an expression names."""
    below = [name for child in node.get("children", []) if isinstance(child, Mapping) for name in _fields(child)]
    return [node["value"], *below] if node["type"] == "field" else below


class _Interpreter(visitor.TreeInterpreter):
    """Evaluates expressions; values are compared as `in_order` says."""

    def visit_comparator(self, node: dict[str, Any], value: Any) -> Any:
        if node["value"] in ("eq", "ne"):
            return super().visit_comparator(node, value)
        sides = [self.visit(child, value) for child in node["children"]]
        if not all(isinstance(one, int | float | str) and not has_no_value(one) for one in sides):
            return None
        return self.COMPARATOR_FUNC[node["value"]](*in_order(sides))


_INTERPRETER = _Interpreter(jmespath.Options(custom_functions=_Functions()))


# Expressions that consist of names and positions; others are not shown in messages about records.
_PLAIN = re.compile(r"""(?:[\w.@\[\]-]|"[^"]*")+""")
_MOST_NAMES = 3


class Path:
    """A JMESPath expression.

    Args:
        text: the expression.
        source: where it is written, for errors: "maps/mine.yaml: prompt" or "--prompt-field".

        takes_keys: whether it may be the name of a key with dots in it, which is taken where a record has it: Input.response.

    Attributes:
        problem: why an option is read as the name of a key; None if it is an expression.

    Raises:
        ConfigError: not an expression.
    """

    def __init__(self, text: str, source: str, *, takes_keys: bool = False) -> None:
        self.text, self.source = text, source
        self.problem: str | None = None
        try:
            parsed = jmespath.compile(text).parsed
        except JMESPathError as error:
            raise ConfigError(
                f"{source}: {quoted(text)} is not a JMESPath expression: {_mistake(error, text)}."
            ) from None
        if (unknown := _unknown_call(parsed)) is not None:
            raise ConfigError(f"{source}: {quoted(text)}: {unknown}")
        self._parsed = _opening(parsed)
        self._key = text if text.isidentifier() else None
        self._own_key = text if takes_keys and "." in text else None

    def find(self, record: Mapping[str, object], where: str) -> Any:
        """Return the value in a record; None where there is none.

        Raises:
            FeedbackError: a function of the expression was given a value of another type.
        """
        if self._key is not None:  # most paths are the name of a key
            return record.get(self._key)
        if self._own_key is not None and self._own_key in record:
            return record[self._own_key]
        try:
            return _INTERPRETER.visit(self._parsed, record)
        except ValueError as error:  # JMESPath's own errors, and those of the functions above
            raise FeedbackError(
                f"{where}: {self.source}: {self._shown(record)} cannot be read: {_failure(error)}."
            ) from None

    def name_in(self, record: Mapping[str, object]) -> str:
        """Return a name for the value in a record: the expression if it consists of names, else the keys that it reads."""
        if _PLAIN.fullmatch(self.text) or self.problem:
            return self.text
        try:
            found = sorted(self.routes(record))
        except ValueError:
            found = []
        names = [".".join(route) for route in found if opened_at(record, route) is not None]
        names = names or [".".join(route) for route in found]
        return ", ".join(names) if 0 < len(names) <= _MOST_NAMES else self.source.rpartition(": ")[2]

    def _shown(self, record: Mapping[str, object]) -> str:
        name = self.name_in(record)
        return "the value" if self.source.endswith(name) else quoted(name, 200)

    def nothing(self, record: Mapping[str, object]) -> str:
        """Return a sentence about a record without a value at this path: where it is written, and what there is instead."""
        place, value = "the record", opened_at(record, [])
        names = self.text.split(".")
        if all(name.isidentifier() for name in names):
            for number in range(1, len(names)):
                found = opened_at(record, names[:number])
                if found is None:
                    break
                place, value = quoted(".".join(names[:number])), found
        keys = [name for name, one in value.items() if one is not None] if isinstance(value, Mapping) else []
        inside = f"has {quoted(keys, 200)}" if isinstance(value, Mapping) else f"is {quoted(value)}"
        shown = self._shown(record)
        found = "nothing found" if shown == "the value" else f"nothing at {shown}"
        return f"{self.source}: {found}; {place} {inside}{f' ({self.problem})' if self.problem else ''}"

    def routes(self, record: Mapping[str, object]) -> set[Route]:
        """Return the routes that the expression reads in a record."""
        key = self._key if self._own_key is None or self._own_key not in record else self._own_key
        return {(key,)} if key is not None else routes(self._parsed, record)

    def read_key(self, record: Mapping[str, object]) -> str | None:
        """Return the key of which an expression with alternatives takes the value; None if it is not clear."""
        if "||" not in self.text:
            return None
        found = [".".join(route) for route in self.routes(record) if opened_at(record, route) is not None]
        return found[0] if len(found) == 1 else None

    def open(self, record: Mapping[str, object], where: str) -> Any:
        """Return like `find`, with JSON text opened. Raises: FeedbackError: also a value as Python prints it."""
        value = self.find(record, where)
        try:
            return stored_values.entered(value)
        except ValueError as error:
            raise FeedbackError(f"{where}: {self.source}: {quoted(self.text)} is {error}.") from None

    def __repr__(self) -> str:
        return f"Path({self.text!r})"


@functools.lru_cache(maxsize=256)
def compiled(text: str, source: str, *, takes_keys: bool = False) -> Path:
    """Return a path, compiled once."""
    return Path(text, source, takes_keys=takes_keys)


def key_path(name: str) -> str:
    """Return the expression for a key, whatever characters its name has."""
    return name if name.isidentifier() else json.dumps(name)


# Nodes that continue a path from the value of their first child.
_STEPS = {"subexpression", "index_expression", "pipe"}
_OF_LISTS = {"projection", "filter_projection", "value_projection", "flatten"}


def _opening(node: Any) -> Any:
    """Return a parsed expression that opens JSON text wherever it looks into a value."""
    if not isinstance(node, dict):
        return node
    children = [_opening(child) for child in node.get("children", [])]
    if node["type"] in _STEPS and children:
        first, *others = children
        children = [first]
        for child in others:
            children += [_open({"type": "current", "children": []}), child]
    elif node["type"] in _OF_LISTS:
        children[0] = _open(children[0])
    return {**node, "children": children}


def _open(node: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function_expression", "value": "entered", "children": [node]}


def opened_at(record: Mapping[str, object], names: Sequence[str]) -> object:
    """Return the value under nested keys, with JSON text opened; None if there is none."""
    value: object = record
    for name in names:
        value = stored_values.opened(value)
        value = value.get(name) if isinstance(value, Mapping) else None
    return stored_values.opened(value)


def _mistake(error: JMESPathError, text: str) -> str:
    """Return what is wrong with an expression."""
    if isinstance(error, IncompleteExpressionError):
        return "it ends too early"
    if isinstance(error, LexerError):
        return (
            f"it cannot be read from character {error.lexer_position + 1}, {quoted(text[error.lexer_position :], 30)}"
        )
    if isinstance(error, ParseError) and error.lex_position >= len(text):
        return "it ends too early"
    if isinstance(error, ParseError):
        return f"{quoted(text[error.lex_position :], 30)} is not expected at character {error.lex_position + 1}"
    return "it is empty" if isinstance(error, EmptyExpressionError) else str(error).partition("\n")[0].rstrip(".:")


_NAMES_OF_TYPES = {
    **{"string": "text", "array": "a list", "object": "an object", "boolean": "true or false", "number": "a number"},
    **{"null": "null", "array-string": "a list of texts", "array-number": "a list of numbers"},
}


def _failure(error: ValueError) -> str:
    """Return why an expression cannot be applied to a record."""
    if isinstance(error, JMESPathTypeError):
        names = [_NAMES_OF_TYPES.get(one, one) for one in error.expected_types]
        return f"{error.function_name}() needs {' or '.join(names)}, got {quoted(error.current_value)}"
    return str(error).partition("\n")[0].rstrip(".:")


def _unknown_call(node: Any) -> str | None:
    """Return a sentence about a call of an unknown function, or with a wrong number of arguments; None without one."""
    if not isinstance(node, dict):
        return None
    if node["type"] == "function_expression":
        known = _Functions.FUNCTION_TABLE
        name, given = node["value"], len(node["children"])
        if name not in known:
            return f"there is no function {name}().{nearest(name, list(known))}"
        signature = known[name]["signature"]
        needed, variadic = len(signature), bool(signature) and bool(signature[-1].get("variadic"))
        if given < needed or (given > needed and not variadic):
            least = "at least " if variadic else ""
            return f"{name}() needs {least}{counted(needed, 'argument')}, got {given}."
    return next(filter(None, map(_unknown_call, node.get("children", []))), None)


_NAME = re.compile(r"[^\W\d][\w-]*")


def option_path(text: str, option: str) -> Path:
    """Return the path of an option such as --prompt-field: the key of exactly that name, else JMESPath."""
    try:
        return compiled(text, option, takes_keys=True)
    except ConfigError as error:
        path = Path(key_path(text), option)
        path.problem = str(error).removeprefix(f"{option}: ").rstrip(".")
        path.text = text
        return path


def label_path(text: str) -> Path:
    """Return the path of --label-field; names with commas between them are an object with a value for each of them."""
    names = text.split(",")
    if len(names) == 1 or not all(_NAME.fullmatch(name) for name in names):
        return option_path(text, "--label-field")
    return compiled(f"{{{', '.join(f'{key_path(name)}: {key_path(name)}' for name in names)}}}", "--label-field")
