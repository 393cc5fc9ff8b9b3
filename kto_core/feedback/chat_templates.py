"""Render conversations with a chat template, and locate the completion in the rendered text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from offline_kto.kto_core.errors import TokenizationError, printable, said_by
from offline_kto.kto_core.feedback.findings import Findings
from offline_kto.kto_core.feedback.formats import Message
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.library_types import Tokenizer

# Parameters of `apply_chat_template` that a record must not set: it could bring its own template, which no fingerprint
# covers, or change what is rendered.
NOT_FOR_DATA = {
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "processor_kwargs",
    "sanitize_control_tokens",
    "strftime_now",
    "kto_dates",
}

# Fields of a message that contain the assistant's reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought")


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        tokenizer: a `transformers` tokenizer; it is never changed.
        now: the date that templates with a date write; None for today.
        findings: counts of rows that the user should know about.
    """

    def __init__(self, tokenizer: Tokenizer, *, now: datetime | None, findings: Findings) -> None:
        self._tokenizer, self._findings = tokenizer, findings
        self._now = now or datetime.now()
        template = getattr(tokenizer, "chat_template", None) or ""
        self._source = template if isinstance(template, str) else "\n".join(map(str, template.values()))
        self._headers: dict[str, list[str]] = {}
        self._dates: dict[str, str] = {}

    def render(self, row: FeedbackRow) -> tuple[str, str]:
        """Return the text of prompt and completion.

        Raises:
            TokenizationError: no template, or one that refuses, rewrites or omits the row's content.
        """
        if not self._source:
            raise TokenizationError(
                f"{row.where}: the row is a conversation, and this tokenizer has no chat template. Use the instruct "
                "model's tokenizer, pass a template with --chat-template FILE, or give prompt and completion as text."
            )
        taken = [name for name in row.template_kwargs if name in NOT_FOR_DATA]
        if taken:
            raise TokenizationError(
                f"{row.where}: 'chat_template_kwargs' sets {taken[0]!r}, which is not a variable of a template. Remove "
                "it; the template comes with the tokenizer, and tools belong in the record's 'tools'."
            )
        found = Findings()
        try:
            prompt, completion = self._render(row, row.template_kwargs, found)
        except TokenizationError as error:
            raise TokenizationError(f"{error}{self._remedy(row)}") from error
        if any(name not in self._source for name in row.template_kwargs):
            found.add("settings", row.where)
        for kind in found.counts:
            self._findings.add(kind, row.where)
        return prompt, completion

    def _render(self, row: FeedbackRow, settings: Mapping[str, object], found: Findings) -> tuple[str, str]:
        """Render the row in the first message format in which the template renders the whole completion."""
        first: TokenizationError | None = None
        for messages in _shapes([*row.prompt, *row.completion]):
            size = len(row.prompt)
            tried = Findings()
            try:
                prompt, completion = self._open(row.where, messages[:size], messages[size:], row, settings, tried)
                # Reasoning may already begin in the header.
                begun = next(
                    (one for one in self._next_headers(self._options(row, settings)) if prompt.endswith(one)), ""
                )
                _check_completion(row, begun + completion, tried)
            except _RewrittenError:
                raise
            except TokenizationError as error:
                first = first or error
                continue
            _check_prompt(row, prompt, tried)
            for kind in tried.counts:
                found.add(kind, row.where)
            return prompt, completion
        assert first is not None
        raise first

    def _open(
        self,
        where: str,
        asked: list[Message],
        answered: list[Message],
        row: FeedbackRow,
        settings: Mapping[str, object],
        found: Findings,
    ) -> tuple[str, str]:
        """Return prompt and completion, split where the assistant's turn begins."""
        options = self._options(row, settings)
        try:
            if asked[-1]["role"] == "assistant":
                found.add("continued", where)
                joined = _continued(asked[-1], answered[0], where)
                prompt = self._apply(asked, continue_final_message=True, **options)
                full = self._apply([*asked[:-1], joined, *answered[1:]], **options)
            else:
                prompt = self._apply(asked, add_generation_prompt=True, **options)
                full = self._apply([*asked, *answered], **options)
        except TokenizationError:
            raise
        except Exception as error:
            raise TokenizationError(
                f"{where}: the chat template refuses this conversation: {said_by(error).rstrip('.')}."
            ) from error
        if isinstance(asked[-1]["content"], list) and _PRINTED_PART.search(full):
            raise TokenizationError(f"{where}: the chat template prints the parts of a message as Python or JSON.")
        if not full.startswith(prompt):
            raise _RewrittenError(_rewritten(where, prompt, full))
        completion = full[len(prompt) :]
        for header in map(str.strip, self._next_headers(options)):
            if completion.rstrip().endswith(header):
                found.add("reopened", where)
                completion = completion[: completion.rindex(header)]
        if not completion:
            raise TokenizationError(f"{where}: the completion has no tokens: the chat template leaves it out.")
        return prompt, completion

    def _options(self, row: FeedbackRow, settings: Mapping[str, object]) -> dict[str, object]:
        return {**settings, "tools": list(row.tools) if row.tools else None}

    @property
    def dated(self) -> bool:
        """Return whether a template has asked for the date."""
        return bool(self._dates)

    def _apply(self, messages: list[Message], **options: object) -> str:
        if "strftime_now" not in self._source:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        options["chat_template"] = _FROZEN_DATE + self._tokenizer.get_chat_template(None, options["tools"])
        while True:
            try:
                return str(
                    self._tokenizer.apply_chat_template(messages, tokenize=False, kto_dates=self._dates, **options)
                )
            except Exception as error:
                form = str(error).partition(_UNKNOWN_FORM)[2]
                if not form or form in self._dates:
                    raise
                self._dates[form] = self._now.strftime(form)

    def _next_headers(self, options: Mapping[str, object]) -> list[str]:
        """Return headers that open a turn and may follow the last answer; empty if they cannot be determined."""
        settings = {name: bool(value) if name == "tools" else str(value) for name, value in options.items()}
        key = json.dumps(settings) if len(settings) > 1 else str(settings["tools"])
        if key not in self._headers:
            try:
                headers = [self._asked_header(options), self._unasked_header(options)]
            except Exception:  # noqa: BLE001 - a template that refuses an ordinary conversation has no known header
                headers = []
            self._headers[key] = [header for header in headers if header.strip()]
        return self._headers[key]

    def _asked_header(self, options: Mapping[str, object]) -> str:
        """Return the text that `add_generation_prompt` adds."""
        ask = [{"role": "user", "content": "ktoquestion"}]
        opened, closed = (self._apply(ask, add_generation_prompt=wanted, **options) for wanted in (True, False))
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def _unasked_header(self, options: Mapping[str, object]) -> str:
        """Return the turn header that the template writes after the last answer although no generation prompt was requested."""
        words = ("ktoquestion", "ktoanswer", "ktoanother")
        roles = ("user", "assistant", "user")
        ask, answer, again = ({"role": role, "content": word} for role, word in zip(roles, words, strict=True))
        whole, longer = self._apply([ask, answer], **options), self._apply([ask, answer, again], **options)
        start, asked = whole.split(words[0])[:2]
        end = whole.rpartition(words[1])[2]
        middle = longer.partition(words[1])[2].partition(words[2])[0]
        if end == middle:  # of the user's next turn, perhaps
            marks = {self._tokenizer.bos_token, self._tokenizer.eos_token}
            fits = (h for h in _headers(end) if start.rstrip().endswith(h) and h not in marks)
        elif middle.startswith(end):
            return ""
        else:
            before = asked.partition(words[1])[0].rstrip()
            fits = (h for h in _headers(end) if before.endswith(h) and middle.startswith(end.rstrip().removesuffix(h)))
        return next(fits, "")

    def _remedy(self, row: FeedbackRow) -> str:
        """Return advice for a row that the template refuses: settings under which it is rendered, or other ways."""
        for settings in self._switches():
            try:
                self._render(row, {**row.template_kwargs, **settings}, Findings())
            except TokenizationError:
                continue
            words = ",".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
            return f" It can be rendered with --chat-template-kwargs {words} (or 'chat_template_kwargs' in the record)."
        return " Pass a template that renders it with --chat-template FILE, or give prompt and completion as text."

    def _switches(self) -> Iterator[dict[str, bool]]:
        """Yield settings to try: variables that the template's conditions read, false and true, singly and in pairs."""
        names = [name for name in _KNOWN_SWITCHES if name in self._source]
        found = dict.fromkeys(_CONDITION.findall(self._source))
        names += [name for name in found if name not in (*names, *_NO_SWITCHES) and f"set {name}" not in self._source]
        single = [{name: value} for name in names[:_MOST_SWITCHES] for value in (False, True)]
        yield from single
        for i, one in enumerate(single[:8]):
            for other in single[i + 1 : 8]:
                if one.keys() != other.keys():
                    yield {**one, **other}


# Text before a template that defines its `strftime_now` as a table of dates. Recent versions of `transformers` pass no
# functions to a template, and their own function uses today's date. The table's keys are known only once the template
# asks for them. `trim_blocks` removes one line break after each block.
_UNKNOWN_FORM = "kto: unknown date format: "
_FROZEN_DATE = (
    "{% macro strftime_now(format) %}{{ kto_dates[format] if format in kto_dates "
    f"else raise_exception({json.dumps(_UNKNOWN_FORM)} ~ format) }}}}{{% endmacro %}}\n"
)


def _headers(end: str) -> Iterator[str]:
    """Yield possible turn headers at the end of a text, the shortest first."""
    end = end.rstrip()
    for starts in (_TURN_START, _WORD_START):
        for start in sorted((found.start() for found in starts.finditer(end)), reverse=True):
            yield end[start:]


# Where a turn may begin: at a line or a marker, or else at a word after a space or a marker.
_TURN_START = re.compile(r"(?<=\n)[^\n]|(?<![<\[{])[<\[{]")
_WORD_START = re.compile(r"(?:^|(?<=[ >\]}]))[^\s<\[{]")
_KNOWN_SWITCHES = ("enable_thinking", "thinking", "truncate_history_thinking", "clear_thinking", "preserve_thinking")
_CONDITION = re.compile(r"\b(?:if|elif|and|or|not)\s+\(?(?:not\s+)?([a-z_]+)\b(?!\s*[.(\[])")
_NO_SWITCHES = {
    *NOT_FOR_DATA,
    *(
        "not",
        "is",
        "in",
        "and",
        "or",
        "message",
        "loop",
        "documents",
        "true",
        "false",
        "none",
        "bos_token",
        "eos_token",
    ),
}
_MOST_SWITCHES = 20


# A content part printed as Python or JSON, by a template that supports only text.
_PRINTED_PART = re.compile(r"""['"]type['"]: ['"]text['"]""")


class _RewrittenError(TokenizationError):
    """The rendered conversation does not begin with the rendered prompt."""


def _shapes(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield a conversation in the message formats that templates expect, the most common one first.

    Most templates expect the arguments of tool calls as objects, a few as text; OpenAI's format has text. Templates of
    vision models expect content as a list of parts.
    """
    yield [_with_arguments(message, as_text=False) for message in messages]
    if any(message.get("tool_calls") for message in messages):
        yield [_with_arguments(message, as_text=True) for message in messages]
    yield [
        {**_with_arguments(message, as_text=False), "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _with_arguments(message: Message, *, as_text: bool) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, as_text) for call in calls]}


def _call_with_arguments(call: object, as_text: bool) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_arguments(call["function"], as_text)}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    if isinstance(arguments, str) and not as_text:
        try:
            read = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": read} if isinstance(read, dict) else call
    if as_text and not isinstance(arguments, str):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _continued(begun: Message, answer: Message, where: str) -> Message:
    """Return one message that joins the begun answer in the prompt with its continuation in the completion."""
    if begun.get("tool_calls"):
        raise TokenizationError(
            f"{where}: the prompt ends with a tool call of the assistant without a tool's answer. Add the tool's "
            "message, or move the call to the completion."
        )
    joined = {**begun, **answer}
    for name in ("content", *_REASONING):
        if isinstance(begun.get(name), str) and isinstance(answer.get(name), str):
            joined[name] = begun[name] + answer[name]
        elif isinstance(begun.get(name), list) and isinstance(answer.get(name), list):  # parts
            joined[name] = [{"type": "text", "text": begun[name][0]["text"] + answer[name][0]["text"]}]
    return joined


def _rewritten(where: str, prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return (
        f"{where}: the chat template renders the prompt differently once the answer follows: "
        f"{prompt[at : at + 40]!r} becomes {full[at : at + 40]!r} (earlier thinking dropped, or a generation prompt "
        "that the answer does not continue). Training would see a prompt that sampling never shows."
    )


def _check_completion(row: FeedbackRow, text: str, found: Findings) -> None:
    """Check that the rendered text contains everything that was rated, and count the missing parts.

    Raises:
        TokenizationError: it contains nothing of the completion.
    """
    there = lost = 0
    for message in row.completion:
        assert isinstance(message, dict)
        for kind, part in _parts(message):
            if _holds(text, part):
                there += kind != "arguments"  # texts as short as "a" may occur in the template's own text
                continue
            lost += 1
            lines = part.split("\n") if kind == "completion" else []
            if any(line.strip() and _holds(text, line) for line in lines):
                there += 1
                kind = "reasoning" if _THOUGHT.search(part) else kind
            found.add("tool_calls" if kind == "arguments" else kind, row.where)
    if lost and not there:
        part = next(part for message in row.completion for _, part in _parts(message))  # type: ignore[arg-type]
        raise TokenizationError(
            f"{row.where}: the chat template leaves the completion out: {printable(part.strip(), 60)!r} is not in the rendered "
            f"text, {printable(text, 60)!r}."
        )


# Tags that enclose reasoning inside the content.
_THOUGHT = re.compile(r"</?\w*think\w*>|\[/?THINK\]|<\|channel\|?>|</?\w*reason\w*>|</?thought>")


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for each text in an assistant message."""
    if message["content"].strip():
        yield "completion", message["content"]
    for name in _REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            yield "reasoning", message[name]
    yield from _call_parts(message)


def _call_parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for each text in a message's tool calls, including OpenAI's deprecated `function_call`."""
    calls = message.get("tool_calls")
    for call in [*(calls if isinstance(calls, list | tuple) else ()), message.get("function_call")]:
        call = _call_with_arguments(call, False)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield from (("tool_calls", text) for text in _texts(function.get("name")))
            yield from (("arguments", text) for text in _texts(function.get("arguments")))


def _texts(value: object) -> Iterator[str]:
    """Yield the strings in a JSON value, keys included."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _check_prompt(row: FeedbackRow, text: str, found: Findings) -> None:
    """Count messages of the prompt that the text lacks, except earlier reasoning, which templates omit on purpose."""
    for message in row.prompt:
        assert isinstance(message, dict)
        content = message["content"]
        if not _holds(text, content) and not _holds(text, _THOUGHT.split(content)[-1]):
            found.add("prompt", row.where)
        if not all(_holds(text, part) for _, part in _call_parts(message)):
            found.add("prompt_calls", row.where)
    names = [tool.get("function", tool) for tool in row.tools or ()]
    names = [tool.get("name") for tool in names if isinstance(tool, Mapping)]
    if any(isinstance(name, str) and not _holds(text, name) for name in names):
        found.add("tools", row.where)


def _holds(text: str, part: str) -> bool:
    """Return whether a text contains `part`, ignoring white space, as it is or escaped as in JSON."""
    if part.strip() in text:
        return True
    squeezed = _squeezed(text)
    return _squeezed(part) in squeezed or _squeezed(json.dumps(part, ensure_ascii=False)[1:-1]) in squeezed


def _squeezed(text: str) -> str:
    return "".join(text.split())


def with_settings(template: str | Mapping[str, str], settings: Mapping[str, object]) -> str | dict[str, str]:
    """Return a chat template that begins by setting defaults for some of its variables.

    Every program that renders with it, such as `generate` and servers, uses these defaults unless the caller sets
    the variables.

    Args:
        template: Jinja, or several templates by name.
        settings: JSON values.
    """
    if isinstance(template, Mapping):
        return {name: _with_settings(one, settings) for name, one in template.items()}
    return _with_settings(template, settings)


def _with_settings(template: str, settings: Mapping[str, object]) -> str:
    lines = [
        # `trim_blocks` removes one line break after each block.
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in sorted(settings.items())
    ]
    return "".join(lines) + template


def _literal(value: object) -> str:
    """Return a JSON value as a Jinja literal."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


def unread(template: str | Mapping[str, str] | None, names: Sequence[str]) -> list[str]:
    """Return the names that do not occur in the template."""
    source = template if isinstance(template, str) else "\n".join(map(str, (template or {}).values()))
    return [name for name in names if name not in source]
