"""Render conversations with a chat template, and locate the completion in the rendered text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple, cast

from offline_kto.kto_core.errors import TokenizationError, printable, said_by
from offline_kto.kto_core.feedback.findings import Findings
from offline_kto.kto_core.feedback.messages import REASONING, Message
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.round_trip import CONTENT, TOOL, Missing, Probe, form_of, missing
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
    "strftime_now",
}

# Kinds of conversations that are remembered, and advice for those that are refused.
_MOST_PROBES = 4096
_MOST_REMEDIES = 20
_OTHER_WAYS = " Pass a template that takes it with --chat-template FILE, or give prompt and completion as text."


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        tokenizer: a `transformers` tokenizer; it is never changed.
        now: the date that templates with a date write; None for today.
        findings: counts of rows that the user should know about.

    Attributes:
        dated: whether a template wrote the date.
    """

    def __init__(self, tokenizer: Tokenizer, *, now: datetime | None, findings: Findings) -> None:
        self._tokenizer, self._findings = tokenizer, findings
        self._now = now or datetime.now()
        template = getattr(tokenizer, "chat_template", None) or ""
        self._source = template if isinstance(template, str) else "\n".join(map(str, template.values()))
        self._headers: dict[str, list[str]] = {}
        self._probes: dict[object, Probe] = {}
        self._remedies: dict[object, str] = {}
        self._knows_developer: bool | None = None
        self.dated = False

    def around_question(self) -> tuple[str, str]:
        """Return what the template writes before and after a question; empty texts if that cannot be determined."""
        if not self._source:
            return "", ""
        dated = self.dated
        try:
            text = self._apply([{"role": "user", "content": "ktoquestion"}], add_generation_prompt=True)
        except Exception:  # noqa: BLE001 - whatever a template refuses with
            text = ""
        self.dated = dated
        before, found, after = text.partition("ktoquestion")
        bos = str(self._tokenizer.bos_token or "")
        return (before.removeprefix(bos), after) if found else ("", "")

    def check_template(self, row: FeedbackRow) -> None:
        """Check that there is a template. Raises: TokenizationError: there is none."""
        if not self._source:
            raise TokenizationError(
                f"{row.where}: the row is a conversation, and this tokenizer has no chat template. Use the instruct "
                "model's tokenizer, pass a template with --chat-template FILE, or give prompt and completion as text."
            )

    def render(self, row: FeedbackRow) -> tuple[str, str]:
        """Return the text of prompt and completion.

        Raises:
            TokenizationError: the template refuses, rewrites or leaves out what the row holds.
        """
        taken = [name for name in row.template_kwargs if name in NOT_FOR_DATA]
        if taken:
            raise TokenizationError(
                f"{row.where}: 'chat_template_kwargs' sets {taken[0]!r}, which is not a variable of a template. Remove "
                "it; the template comes with the tokenizer, and tools belong in the record's 'tools'."
            )
        found = Findings()
        row = self._with_known_roles(row)
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
        """Render the row in the first message format for which the template keeps what it says."""
        first: TokenizationError | None = None
        size, messages = len(row.prompt), cast("list[Message]", [*row.prompt, *row.completion])
        for form in _formats(messages):
            shaped = form.of(messages)
            tried = Findings()
            options = self._options(row.tools, settings)
            try:
                sides = self._open(row.where, shaped[:size], shaped[size:], options, tried)
                self._check(row, messages, form, sides, settings, tried)
            except _RewrittenError:
                raise
            except TokenizationError as error:
                # Of two formats in which something is lost, the one that loses less says what the template cannot do.
                fewer = isinstance(error, _LossError) and isinstance(first, _LossError) and error.count < first.count
                first = error if first is None or fewer else first
                continue
            for kind in tried.counts:
                found.add(kind, row.where)
            return sides
        assert first is not None
        raise first

    def _check(
        self,
        row: FeedbackRow,
        messages: list[Message],
        form: "_Format",
        sides: tuple[str, str],
        settings: Mapping[str, object],
        found: Findings,
    ) -> None:
        """Check that the rendered sides hold what the row says. Raises: TokenizationError: something is lost."""
        size = len(row.prompt)
        probe = self._probe(row, messages, form, settings)
        if probe.is_kept([message["content"] for message in messages], *sides):
            return
        if probe.distortion is not None:
            raise TokenizationError(f"{row.where}: the chat template {probe.distortion}.")
        # Reasoning may already begin in the header.
        headers = self._next_headers(self._options(row.tools, settings))
        begun = next((one for one in headers if sides[0].endswith(one)), "")
        result = missing(messages, size, row.tools, (sides[0], begun + sides[1]), probe)
        if result.lost:
            raise _refused(row, result, sides)
        if result.thought:
            found.add("reasoning", row.where)

    def _probe(
        self, row: FeedbackRow, messages: list[Message], form: "_Format", settings: Mapping[str, object]
    ) -> Probe:
        """Return what the template makes of conversations of this kind."""
        size = len(row.prompt)
        key = (form, str(settings) if settings else "", form_of(messages, size, row.tools))
        probe = self._probes.get(key)
        if probe is None:

            def render(marked: list[Message], tools: list[dict[str, object]]) -> tuple[str, str] | None:
                shaped, options = form.of(marked), self._options(tools, settings)
                try:
                    return self._open(row.where, shaped[:size], shaped[size:], options, Findings())
                except TokenizationError:
                    return None

            probe = Probe(messages, size, row.tools, render)
            if len(self._probes) >= _MOST_PROBES:
                self._probes.clear()
            self._probes[key] = probe
        return probe

    def _open(
        self,
        where: str,
        asked: list[Message],
        answered: list[Message],
        options: Mapping[str, object],
        found: Findings,
    ) -> tuple[str, str]:
        """Return prompt and completion, split where the assistant's turn begins."""
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

    def _options(self, tools: Sequence[dict[str, object]] | None, settings: Mapping[str, object]) -> dict[str, object]:
        return {**settings, "tools": list(tools) if tools else None}

    def _apply(self, messages: list[Message], **options: object) -> str:
        if "strftime_now" in self._source:
            options["strftime_now"] = self._strftime
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _strftime(self, form: str) -> str:
        self.dated = True
        return self._now.strftime(form)

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

    def _with_known_roles(self, row: FeedbackRow) -> FeedbackRow:
        """Return the row with `system` in place of `developer` if the template does not write the latter.

        Raises:
            TokenizationError: there is a system message already.
        """
        roles = [message["role"] for message in cast("Sequence[Message]", row.prompt)]
        if "developer" not in roles or self._writes_developer(row):
            return row
        if "system" in roles:
            raise TokenizationError(
                f"{row.where}: the chat template knows no role 'developer', and the system message takes its place already. "
                "Join the two to one system message."
            )
        prompt = cast("Sequence[Message]", row.prompt)
        return replace(
            row, prompt=tuple({**one, "role": "system"} if one["role"] == "developer" else one for one in prompt)
        )

    def _writes_developer(self, row: FeedbackRow) -> bool:
        """Return whether the template writes what a developer says."""
        if self._knows_developer is None:
            said = [{"role": "developer", "content": "ktodeveloper"}, {"role": "user", "content": "ktoquestion"}]
            try:
                text = self._apply(said, add_generation_prompt=True, **self._options(None, row.template_kwargs))
            except Exception:  # noqa: BLE001 - whatever a template refuses with
                text = ""
            self._knows_developer = "ktodeveloper" in text
        return self._knows_developer

    def _remedy(self, row: FeedbackRow) -> str:
        """Return advice for a row that the template refuses; rows of the same kind get the same."""
        messages = cast("list[Message]", [*row.prompt, *row.completion])
        kind = str(row.template_kwargs), form_of(messages, len(row.prompt), row.tools)
        if kind not in self._remedies:
            if len(self._remedies) >= _MOST_REMEDIES:
                return _OTHER_WAYS
            self._remedies[kind] = self._setting_that_renders(row)
        return self._remedies[kind]

    def _setting_that_renders(self, row: FeedbackRow) -> str:
        """Return advice: settings under which the row is rendered, or other ways."""
        for settings in self._switches():
            try:
                self._render(row, {**row.template_kwargs, **settings}, Findings())
            except TokenizationError:
                continue
            words = ",".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
            return f" It can be rendered with --chat-template-kwargs {words} (or 'chat_template_kwargs' in the record)."
        return _OTHER_WAYS

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


class _Format(NamedTuple):
    """A message format that templates expect.

    Most templates expect the arguments of tool calls as objects, a few as text; OpenAI's format has text. Templates of
    vision models expect content as a list of parts.
    """

    arguments_as_text: bool = False
    parts: bool = False

    def of(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in this format."""
        shaped = [_with_text(message) if self.arguments_as_text else message for message in messages]
        if not self.parts:
            return shaped
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in shaped]


def _formats(messages: Sequence[Message]) -> Iterator[_Format]:
    """Yield the formats to try, the usual one first."""
    yield _Format()
    if any(message.get("tool_calls") for message in messages):
        yield _Format(arguments_as_text=True)
    yield _Format(parts=True)


def _with_text(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call_with_text(call) for call in calls]} if calls else message


def _call_with_text(call: object) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_text(call["function"])}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    return call if isinstance(arguments, str) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _continued(begun: Message, answer: Message, where: str) -> Message:
    """Return one message that joins the begun answer in the prompt with its continuation in the completion."""
    if begun.get("tool_calls"):
        raise TokenizationError(
            f"{where}: the prompt ends with a tool call of the assistant without a tool's answer. Add the tool's "
            "message, or move the call to the completion."
        )
    joined = {**begun, **answer}
    for name in ("content", *REASONING):
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


class _LossError(TokenizationError):
    """The rendered text lacks pieces of the row; `count` is their number."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def _refused(row: FeedbackRow, missing: Missing, sides: tuple[str, str]) -> _LossError:
    """Return the error for pieces that the template leaves out."""
    piece = next((one for one in missing.lost if one.message >= len(row.prompt)), missing.lost[0])
    shown = printable(piece.texts[0].strip(), 60)
    of_completion = piece.message >= len(row.prompt)
    if of_completion and not missing.answered:
        return _LossError(
            f"{row.where}: the chat template leaves the completion out: {shown!r} is not in what it writes, "
            f"{printable(sides[1], 60)!r}.",
            len(missing.lost),
        )
    side = "completion" if of_completion else "prompt"
    what = {
        CONTENT: "a part of the completion"
        if of_completion
        else f"a message of the role {printable(piece.role, 30)!r}",
        TOOL: "one of the 'tools'",
    }.get(piece.kind, f"the {piece.kind} in the {side}")
    more = f" (and {len(missing.lost) - 1} more)" if len(missing.lost) > 1 else ""
    return _LossError(
        f"{row.where}: the chat template leaves out {what}: {shown!r} is not in what it writes{more}.",
        len(missing.lost),
    )


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
