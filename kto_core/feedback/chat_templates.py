"""Render conversations with a chat template, and locate the completion in the rendered text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import cast

from offline_kto.kto_core.errors import TokenizationError, printable, said_by
from offline_kto.kto_core.feedback.chat_markers import RenderedText
from offline_kto.kto_core.feedback.findings import Findings
from offline_kto.kto_core.feedback.message_formats import MessageFormat, message_formats
from offline_kto.kto_core.feedback.message_keys import REASONING
from offline_kto.kto_core.feedback.messages import Message
from offline_kto.kto_core.feedback.plain_rendering import PlainRendering
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.feedback.round_trip import CONTENT, TOOL, Missing, Probe, form_of, missing
from offline_kto.kto_core.feedback.template_settings import NOT_FOR_DATA, switches
from offline_kto.kto_core.feedback.tool_calls import has_tool_calls
from offline_kto.kto_core.feedback.turn_headers import TurnHeaders
from offline_kto.kto_core.library_types import Tokenizer

# Kinds of conversations that are remembered, and advice for those that are refused: finding it takes many renderings. Each
# process that reads a part of the data has its own first kinds.
_MOST_PROBES = 4096
_MOST_REMEDIES = 20
_OTHER_WAYS = " Pass a template that takes it with --chat-template FILE, or give prompt and completion as text."


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
        self._plain = PlainRendering(tokenizer, self._apply_usual)
        self._headers = TurnHeaders(tokenizer, self._apply)
        self._probes: dict[object, Probe] = {}
        self._remedies: dict[object, str] = {}
        self._knows_developer: bool | None = None
        self._dates: dict[str, str] = {}

    @cached_property
    def written(self) -> RenderedText:
        """Return how the template writes text; its parts are empty if they cannot be determined."""
        special = sorted(one for one in _special_tokens(self._tokenizer) if len(one) > 2)
        ask, answer = {"role": "user", "content": "ktoquestion"}, {"role": "assistant", "content": "ktoanswer"}
        before, found, after = self._tried([ask], add_generation_prompt=True).partition("ktoquestion")
        bos = str(self._tokenizer.bos_token or "")
        before = before.removeprefix(bos) if found else ""
        tail = self._tried([ask, answer]).rpartition("ktoanswer")[2].strip() if found else ""
        end = max((one for one in special if tail.startswith(one)), key=len, default="")
        return RenderedText(special, before, after, end, self._source)

    def _tried(self, messages: list[Message], **options: object) -> str:
        """Return messages as the template writes them; an empty text if it refuses them."""
        if not self._source:
            return ""
        dates = dict(self._dates)
        try:
            return self._apply(messages, **{"tools": None, **options})
        except Exception:  # noqa: BLE001 - templates raise exceptions of any type
            return ""
        finally:
            self._dates = dates

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """The tokens that end an answer, which the template writes itself."""
        return tuple(one for one in (self.written.end, str(self._tokenizer.eos_token or "")) if len(one) > 2)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """The special tokens that text should not contain: not those that are only reserved."""
        named = getattr(self._tokenizer, "all_special_tokens", [])
        watched = [one for one in self.written.special if one in self._source or one in named]
        return re.compile("|".join(map(re.escape, watched)) or r"(?!)")

    def _without_end(self, row: FeedbackRow, found: Findings) -> FeedbackRow:
        """Return the row without the token that ends its answer.

        Raises:
            TokenizationError: the answer is nothing but this token.
        """
        last = cast(Message, row.completion[-1])
        text = kept = str(last["content"])
        while (stripped := kept.rstrip()).endswith(self._ends):
            kept = next(stripped.removesuffix(one) for one in self._ends if stripped.endswith(one))
        if kept == text:
            return row
        if not kept.strip() and not has_tool_calls(last):
            raise TokenizationError(f"{row.where}: the answer is only '{printable(text.strip(), 60)}'. Remove the row.")
        found.add("closed", row.where)
        return replace(row, completion=(*cast("Sequence[Message]", row.completion)[:-1], {**last, "content": kept}))

    def _look_for_marks(self, row: FeedbackRow, found: Findings) -> None:
        """Count a row whose messages contain special tokens, or whose answer ends as another model's turns."""
        if any(self._special.search(one["content"]) for one in cast("list[Message]", [*row.prompt, *row.completion])):
            found.add("special", row.where)
        elif _OTHER_END.search(cast(Message, row.completion[-1])["content"][-_LONGEST_END:]):
            found.add("other_end", row.where)

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
            TokenizationError: the template refuses the row, renders its prompt differently, or leaves out a part.
        """
        taken = [name for name in row.template_kwargs if name in NOT_FOR_DATA]
        if taken:
            raise TokenizationError(
                f"{row.where}: 'chat_template_kwargs' sets {taken[0]!r}, which is not a variable of a template. Remove "
                "it; the template comes with the tokenizer, and tools belong in the record's 'tools'."
            )
        found = Findings()
        row = self._without_end(self._with_known_roles(row), found)
        self._look_for_marks(row, found)
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
        """Render the row in the first message format in which the template leaves out nothing."""
        first: TokenizationError | None = None
        size, messages = len(row.prompt), cast("list[Message]", [*row.prompt, *row.completion])
        for form in message_formats(messages):
            shaped = form.of(messages)
            tried = Findings()
            options = self._options(row.tools, settings)
            try:
                sides = self._open(row.where, shaped[:size], shaped[size:], options, tried)
                self._check(row, messages, form, sides, settings, tried)
            except _RewrittenError:
                raise
            except TokenizationError as error:
                # Report the format that loses less: its message names what the template cannot render.
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
        form: MessageFormat,
        sides: tuple[str, str],
        settings: Mapping[str, object],
        found: Findings,
    ) -> None:
        """Check that the rendered sides contain the whole row. Raises: TokenizationError: something is missing."""
        size = len(row.prompt)
        probe = self._probe(row, messages, form, settings)
        if probe.is_kept([message["content"] for message in messages], *sides):
            return
        if probe.distortion is not None:
            raise TokenizationError(f"{row.where}: the chat template {probe.distortion}.")
        # Reasoning may already begin in the header.
        headers = self._headers.of(self._options(row.tools, settings))
        begun = next((one for one in headers if sides[0].endswith(one)), "")
        result = missing(messages, size, row.tools, (sides[0], begun + sides[1]), probe)
        if result.lost:
            raise _refused(row, result, sides)
        if result.thought:
            found.add("reasoning", row.where)

    def _probe(
        self, row: FeedbackRow, messages: list[Message], form: MessageFormat, settings: Mapping[str, object]
    ) -> Probe:
        """Return how the template renders conversations of this kind."""
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
        for header in map(str.strip, self._headers.of(options)):
            if completion.rstrip().endswith(header):
                found.add("reopened", where)
                completion = completion[: completion.rindex(header)]
        if not completion:
            raise TokenizationError(f"{where}: the completion has no tokens: the chat template leaves it out.")
        return prompt, completion

    def _options(self, tools: Sequence[dict[str, object]] | None, settings: Mapping[str, object]) -> dict[str, object]:
        return {**settings, "tools": list(tools) if tools else None}

    @property
    def dated(self) -> bool:
        """Return whether a template has asked for the date."""
        return bool(self._dates)

    def _apply(self, messages: list[Message], **options: object) -> str:
        """Return messages as the template writes them; raises what the template raises."""
        asks = bool(options.pop("add_generation_prompt", False))
        if self._plain.takes(messages, options):
            return self._plain.render(messages, add_generation_prompt=asks)
        return self._apply_usual(messages, add_generation_prompt=asks, **options)

    def _apply_usual(self, messages: list[Message], **options: object) -> str:
        if "strftime_now" not in self._source:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        options["chat_template"] = _FROZEN_DATE + self._tokenizer.get_chat_template(None, options.get("tools"))
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
                f"{row.where}: the chat template knows no role 'developer', and there is a system message already. "
                "Join the two to one system message."
            )
        prompt = cast("Sequence[Message]", row.prompt)
        return replace(
            row, prompt=tuple({**one, "role": "system"} if one["role"] == "developer" else one for one in prompt)
        )

    def _writes_developer(self, row: FeedbackRow) -> bool:
        """Return whether the template names the role `developer` and renders its messages.

        A template that writes any role would write this one too, but its model has never seen it.
        """
        if self._knows_developer is None and "developer" not in self._source:
            self._knows_developer = False
        if self._knows_developer is None:
            said = [{"role": "developer", "content": "ktodeveloper"}, {"role": "user", "content": "ktoquestion"}]
            try:
                text = self._apply(said, add_generation_prompt=True, **self._options(None, row.template_kwargs))
            except Exception:  # noqa: BLE001 - templates raise exceptions of any type
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
        for settings in switches(self._source):
            try:
                self._render(row, {**row.template_kwargs, **settings}, Findings())
            except TokenizationError:
                continue
            words = ",".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
            return f" It can be rendered with --chat-template-kwargs {words} (or 'chat_template_kwargs' in the record)."
        return _OTHER_WAYS


# Text before a template that defines its `strftime_now` as a table of dates. Recent versions of `transformers` pass no
# functions to a template, and their own function uses today's date. The table's keys are known only once the template
# asks for them. `trim_blocks` removes one line break after each block.
_UNKNOWN_FORM = "kto: unknown date format: "
_FROZEN_DATE = (
    "{% macro strftime_now(format) %}{{ kto_dates[format] if format in kto_dates "
    f"else raise_exception({json.dumps(_UNKNOWN_FORM)} ~ format) }}}}{{% endmacro %}}\n"
)


# A content part printed as Python or JSON, by a template that supports only text.
_PRINTED_PART = re.compile(r"""['"]type['"]: ['"]text['"]""")


# Marks with which models end their turns.
_OTHER_END = re.compile(
    r"(?:<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|end_of_turn)\|>|<end_of_turn>|</s>|<eos>)\s*\Z"
)
_LONGEST_END = 40


class _RewrittenError(TokenizationError):
    """The rendered conversation does not begin with the rendered prompt."""


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = getattr(tokenizer, "all_special_tokens", [])
    return {*named, *(str(token) for token in added if getattr(token, "special", False))}


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
            f"{row.where}: the chat template leaves the completion out: '{shown}' is not in what it writes, "
            f"'{printable(sides[1], 60)}'.",
            len(missing.lost),
        )
    side = "completion" if of_completion else "prompt"
    what = {
        CONTENT: "a part of the completion"
        if of_completion
        else f"a message of the role '{printable(piece.role, 30)}'",
        TOOL: "one of the 'tools'",
    }.get(piece.kind, f"the {piece.kind} in the {side}")
    more = f" (and {len(missing.lost) - 1} more)" if len(missing.lost) > 1 else ""
    return _LossError(
        f"{row.where}: the chat template leaves out {what}: '{shown}' is not in what it writes{more}.",
        len(missing.lost),
    )
