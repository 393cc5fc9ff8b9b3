"""Check that the rendered text of a conversation contains all of its messages.

The pieces of a row are its texts: contents, reasoning, names and arguments of tool calls, names of tools. A chat
template leaves out pieces by their role or key, and rarely by their text. So each kind of conversation is rendered
once with a mark in place of each piece (`Probe`). This shows which pieces the template writes and in which order, even
if a text as short as "a" also occurs in the template itself. The rows of that kind are then compared with the
rendered marks, or, if the template changes texts, searched piece by piece in that order.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from offline_kto.kto_core.feedback.message_keys import REASONING
from offline_kto.kto_core.feedback.messages import Message

CONTENT: Final = "content"
THOUGHT: Final = "reasoning"
NAME: Final = "name of a tool call"
ARGUMENTS: Final = "arguments of a tool call"
TOOL: Final = "tool"

# A shorter text may also occur in the template itself.
_LONG = 16

# A text that JSON and Python do not escape.
_WRITTEN_ALIKE = re.compile(r"[ !#-&(-\[\]-~]*")

# Tags that enclose reasoning inside the content.
_TAG = re.compile(r"</?\w*think\w*>|\[/?THINK\]|<\|channel\|?>|</?\w*reason\w*>|</?thought>")


class Piece(NamedTuple):
    """A text that must be in the rendered conversation.

    Attributes:
        message: index of its message; -1 for a tool.
        texts: ways to write it; more than one for numbers and the like.
    """

    kind: str
    message: int
    role: str
    texts: tuple[str, ...]


@dataclass
class Missing:
    """What the rendered text lacks.

    Attributes:
        lost: pieces that must not be lost.
        thought: whether reasoning of the completion is left out.
        answered: whether anything of the completion is there.
    """

    lost: list[Piece] = field(default_factory=list)
    thought: bool = False
    answered: bool = False


class _Pieces:
    """Collects the pieces of messages and tools, and makes copies of them with marks in their place."""

    def __init__(self) -> None:
        self.found: list[Piece] = []
        self._message, self._role = -1, ""

    def marked(self, messages: Sequence[Message]) -> list[Message]:
        return [self._marked_message(index, message) for index, message in enumerate(messages)]

    def marked_tools(self, tools: Sequence[Mapping[str, object]] | None) -> list[dict[str, object]]:
        self._message, self._role = -1, ""
        marked = []
        for tool in tools or ():
            function = tool.get("function")
            if isinstance(function, Mapping):
                marked.append({**tool, "function": self._named(TOOL, function)})
            else:
                marked.append(self._named(TOOL, tool))
        return marked

    def _marked_message(self, index: int, message: Message) -> Message:
        self._message, self._role = index, str(message["role"])
        marked = dict(message)
        for name in (*REASONING, "content"):
            text = message.get(name)
            if isinstance(text, str) and text and not text.isspace():
                marked[name] = self._mark(CONTENT if name == "content" else THOUGHT, text)
        if message.get("tool_calls"):
            marked["tool_calls"] = [self._marked_call(call) for call in calls_of(message)]
        return marked

    def _marked_call(self, call: object) -> object:
        if not isinstance(call, Mapping):
            return self._marked_value(NAME, call)
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return self._marked_value(NAME, call)  # of an unknown form
        marked = self._named(NAME, function)
        if "arguments" in function:
            marked["arguments"] = self._marked_value(ARGUMENTS, function["arguments"])
        return {**call, "function": marked} if "function" in call else marked

    def _named(self, kind: str, function: Mapping[str, object]) -> dict[str, object]:
        name = function.get("name")
        return {**function, "name": self._mark(kind, name)} if isinstance(name, str) and name.strip() else {**function}

    def _marked_value(self, kind: str, value: object) -> object:
        if isinstance(value, Mapping):
            return {self._marked_text(kind, str(key)): self._marked_value(kind, one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked_value(kind, item) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = int(f"81{len(self.found):06d}93")
            self._add(kind, json.dumps(value), str(value))
            return number + 0.5 if isinstance(value, float) else number
        if isinstance(value, str):
            return self._marked_text(kind, value)
        return self._mark(kind, json.dumps(value, default=str), str(value))

    def _marked_text(self, kind: str, text: str) -> str:
        return self._mark(kind, text) if text.strip() else text

    def _mark(self, kind: str, *texts: str) -> str:
        mark = _mark(len(self.found))
        self._add(kind, *texts)
        return mark

    def _add(self, kind: str, *texts: str) -> None:
        self.found.append(Piece(kind, self._message, self._role, texts))


def _mark(number: int) -> str:
    return f"ktomark{number}z"


def _marks(number: int) -> tuple[str, str]:
    """Return the marks of a piece: that of a text, and that of a number."""
    return _mark(number), f"81{number:06d}93"


def calls_of(message: Mapping[str, object]) -> list[object]:
    """Return a message's tool calls."""
    calls = message.get("tool_calls")
    return list(calls) if isinstance(calls, list | tuple) else []


def form_of(messages: Sequence[Message], size: int, tools: Sequence[Mapping[str, object]] | None) -> tuple[object, ...]:
    """Return the features of a row that a template may branch on: rows with the same features share a `Probe`.

    Args:
        size: number of messages in the prompt.
    """
    forms = [m["role"] if len(m) == 2 and m["content"] and not m["content"].isspace() else _form(m) for m in messages]
    return size, tuple(forms), tuple(map(_function_form, tools or ()))


def _form(message: Message) -> tuple[object, ...]:
    filled = [
        (key, type(value).__name__)
        for key, value in message.items()
        if value and not (isinstance(value, str) and value.isspace())
    ]
    calls = [(_function_form(call), _shape(call_arguments(call))) for call in calls_of(message)]
    return message["role"], *sorted(filled), *calls


def _function_form(value: object) -> tuple[bool, bool]:
    """Return whether a tool or a call has a `function`, and whether that has a name."""
    if not isinstance(value, Mapping):
        return False, False
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, Mapping) else None
    return "function" in value, isinstance(name, str) and name.strip() != ""


def call_arguments(call: object) -> object:
    """Return the arguments of a tool call, and a call of an unknown form as it is."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    return function["arguments"] if isinstance(function, Mapping) and "arguments" in function else call


def _shape(value: object) -> object:
    """Return the structure of a JSON value, with blank texts, which are no pieces, apart from others."""
    if isinstance(value, Mapping):
        return "{}", *((_shape(str(key)), _shape(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[]", *map(_shape, value)
    return "" if isinstance(value, str) and not value.strip() else type(value).__name__


# Renders messages and tools to (prompt, completion); None if the template refuses them.
Rendering: TypeAlias = Callable[[list[Message], list[dict[str, object]]], tuple[str, str] | None]


class Probe:
    """How a template renders one kind of conversation, determined by rendering marks.

    Args:
        messages, size, tools: a row of that kind; `size` is the number of messages in the prompt.
        render: renders messages and tools of that kind.

    Attributes:
        order: numbers of the pieces that are written, in the order of the text; None if marks cannot be rendered.
        leads: for each number the template's own words between the piece before and this one.
        words: the rendered marks, and the template's own words.
        distortion: how the arguments of tool calls are distorted; None if they are not.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        size: int,
        tools: Sequence[Mapping[str, object]] | None,
        render: Rendering,
    ) -> None:
        pieces = _Pieces()
        marked = pieces.marked(messages)
        rendered = render(marked, pieces.marked_tools(tools))
        self.order: list[int] | None = None
        self.leads: dict[int, str] = {}
        self.words = ""
        self._size = size
        self._patterns: tuple[str, str] | None = None
        self.distortion: str | None = None
        if rendered is None:
            return
        self.words = "\0".join(rendered)
        self.distortion = _distortion(marked, self.words)
        spans = {}
        for number, piece in enumerate(pieces.found):
            side = int(piece.message >= size)
            fits = [(at, at + len(mark)) for mark in _marks(number) if (at := rendered[side].find(mark)) >= 0]
            if fits:
                spans[number] = side, *fits[0]
        self.order = sorted(spans, key=spans.__getitem__)
        ends = [0, 0]
        for number in self.order:
            side, start, end = spans[number]
            if pieces.found[number].kind != TOOL:
                self.leads[number] = rendered[side][ends[side] : start]
                ends[side] = end
        plain = all(piece.kind == CONTENT for piece in pieces.found)
        if plain and self.order == [*range(len(messages))]:
            asked, answered = _pattern(rendered[0], range(size)), _pattern(rendered[1], range(size, len(messages)))
            self._patterns = (asked, answered) if asked is not None and answered is not None else None

    def is_kept(self, contents: Sequence[str], prompt: str, completion: str) -> bool:
        """Return whether a row's texts are the rendered marks with the row's contents in their places.

        False means that the template changes the texts, or leaves something out.
        """
        if self._patterns is None:
            return False
        asked, answered = self._patterns
        size = self._size
        if asked % (*contents[:size],) == prompt and answered % (*contents[size:],) == completion:
            return True
        contents = [text.strip() for text in contents]
        return asked % (*contents[:size],) == prompt and answered % (*contents[size:],) == completion


def _pattern(text: str, numbers: range) -> str | None:
    """Return a text with `%s` in the place of each mark; None if a mark occurs twice."""
    pattern = text.replace("%", "%%")
    for number in numbers:
        if pattern.count(_mark(number)) != 1:
            return None
        pattern = pattern.replace(_mark(number), "%s")
    return pattern


def missing(
    messages: Sequence[Message],
    size: int,
    tools: Sequence[Mapping[str, object]] | None,
    sides: tuple[str, str],
    probe: Probe,
) -> Missing:
    """Return the pieces that the rendered prompt and completion lack.

    Args:
        size: number of messages in the prompt.
        sides: text of prompt and completion.
        probe: of this kind of conversation.
    """
    pieces = _Pieces()
    pieces.marked(messages)
    own = len(pieces.found)
    pieces.marked_tools(tools)
    searches = _Search(sides[0]), _Search(sides[1])
    result = Missing()
    written = probe.order if probe.order is not None else range(len(pieces.found))
    unseen = set(range(len(pieces.found)))
    for number in written:
        piece = pieces.found[number]
        search = searches[piece.message >= size]
        anywhere = number >= own or (probe.order is None and piece.role in ("system", "developer"))
        found = search.find(piece, lead=probe.leads.get(number), anywhere=anywhere)
        answered = piece.message >= size
        if found or (found == 0 and not answered):
            unseen.discard(number)
            result.answered |= answered and piece.kind != ARGUMENTS
    result.thought = searches[1].thought
    thoughts = []
    for number in sorted(unseen):
        piece = pieces.found[number]
        answered = piece.message >= size
        if searches[answered].remains(piece) and _span(probe.words, piece.texts[0], 0) is None:
            result.answered |= answered
        elif piece.kind != THOUGHT:
            result.lost.append(piece)
        elif answered:  # templates leave reasoning of earlier turns out on purpose
            thoughts.append(piece)
    result.thought |= bool(thoughts)
    if thoughts and not result.answered:
        result.lost += thoughts
    return result


class _Search:
    """Searches a rendered text for pieces, each after the one before.

    Attributes:
        thought: whether reasoning that was enclosed in tags inside of a content was not there.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._spans: list[tuple[int, int]] = []
        self.thought = False

    def find(self, piece: Piece, *, lead: str | None, anywhere: bool) -> int | None:
        """Find a piece after those found before, or `anywhere`.

        Args:
            lead: the template's text between the piece before and this one.

        Returns:
            number of characters found; 0 for a content that is only reasoning and left out; None if it is missing.
        """
        span = None
        if lead is not None and self._text.startswith(lead, self._position):
            span = self._at(piece, self._position + len(lead))
        if span is None:
            start = 0 if anywhere else self._position
            span = next((span for text in piece.texts if (span := _span(self._text, text, start))), None)
            if span is None and piece.kind == CONTENT and piece.role == "assistant":
                span = self._said(piece.texts[0], start)
        if span is None:
            return None
        self._spans.append(span)
        if not anywhere:
            self._position = span[1]
        return span[1] - span[0]

    def _at(self, piece: Piece, place: int) -> tuple[int, int] | None:
        """Find a piece at the place where the template writes it."""
        for text in piece.texts:
            if self._text.startswith(text, place):
                return place, place + len(text)
            words = text.strip()
            for way in itertools.chain((words,), _escaped(text), _escaped(words)):
                if self._text.startswith(way, place):
                    return place, place + len(way)
        if piece.kind != CONTENT or piece.role != "assistant":
            return None
        before, words = _words(piece.texts[0])
        if before.strip() or not words.strip() or not self._text.startswith(words.strip(), place):
            return None
        self.thought = True
        return place, place + len(words.strip())

    def remains(self, piece: Piece) -> bool:
        """Return whether a long text is in the rest of the rendered text, without the pieces that were found."""
        if len(piece.texts[0].strip()) < _LONG:
            return False
        end, rest = 0, []
        for start, stop in sorted(self._spans):
            rest.append(self._text[end : max(start, end)])
            end = max(stop, end)
        return _span("\0".join([*rest, self._text[end:]]), piece.texts[0], 0) is not None

    def _said(self, content: str, start: int) -> tuple[int, int] | None:
        """Find the text of a content outside of its reasoning, which the template may leave out or move."""
        if _TAG.search(content) is None:
            return None
        parts = [part for part in _TAG.split(content) if part.strip()]
        words = [part for part in _words(content) if part.strip()]
        for sought in (parts, words):
            if (span := self._one_by_one(sought, start)) is not None:
                self.thought |= sought != parts
                return span
        return None

    def _one_by_one(self, parts: Sequence[str], start: int) -> tuple[int, int] | None:
        first, position = None, start
        for part in parts:
            span = _span(self._text, part, position)
            if span is None:
                return None
            first, position = span[0] if first is None else first, span[1]
        return start if first is None else first, position


def _words(content: str) -> tuple[str, str]:
    """Return the text of a content before and after its reasoning, which need not begin with a tag."""
    tag = _TAG.search(content)
    if tag is None:
        return "", content
    parts = _TAG.split(content)
    return "" if "/" in tag[0] else parts[0], parts[-1]


def _span(text: str, part: str, start: int) -> tuple[int, int] | None:
    """Return where `part` is in a text from `start` on: as it is, escaped, or with other white space."""
    part = part.strip()
    ways = list(dict.fromkeys((part, *_escaped(part))))
    found = None
    for way in ways:  # the first place counts: the same words may follow in another message
        at = text.find(way, start, found[1] if found else None)
        if at >= 0:
            found = at, at + len(way)
    if found is not None:
        return found
    squeezed = "".join(text[start:].split())
    for way in map(_squeezed, ways):
        if (at := squeezed.find(way)) >= 0:
            begin = _behind(text, start, at)
            return begin, _behind(text, begin, len(way))
    return None


def _escaped(part: str) -> Iterator[str]:
    """Yield a text as JSON and Python write it inside of strings, if they write it in another way."""
    if _WRITTEN_ALIKE.fullmatch(part):
        return
    yield json.dumps(part, ensure_ascii=False)[1:-1]
    yield json.dumps(part)[1:-1]
    yield repr(part)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _behind(text: str, start: int, count: int) -> int:
    """Return the place after the next `count` characters that are not white space."""
    if count == 0:
        return start
    for word in re.finditer(r"\S+", text[start:]):
        size = word.end() - word.start()
        if size >= count:
            return start + word.start() + count
        count -= size
    return len(text)


def _distortion(marked: Sequence[Message], text: str) -> str | None:
    """Return how a rendered text distorts the arguments of tool calls; None if it does not."""
    for arguments in (call_arguments(call) for message in marked for call in calls_of(message)):
        if not isinstance(arguments, Mapping) or not arguments:
            continue
        if str(arguments) in text:
            return "prints the arguments of tool calls as Python does, not as JSON"
        if any(f'\\"{key}' in text for key in arguments):
            return "encodes the arguments of tool calls twice, as a JSON string inside JSON"
    return None
