"""Tokenize feedback rows into prompt and completion ids, and check the boundary between them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from offline_kto.kto_core.errors import KTOError, TokenizationError, said_by
from offline_kto.kto_core.feedback.chat_markers import RenderedText
from offline_kto.kto_core.feedback.chat_templates import ChatRenderer
from offline_kto.kto_core.feedback.decoding import Decoder
from offline_kto.kto_core.feedback.encoding import Encoder
from offline_kto.kto_core.feedback.findings import Findings
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.kto_core.library_types import Tokenizer

ResultT = TypeVar("ResultT")
_Sides: TypeAlias = tuple[list[list[int]], list[list[int]]]

# Last tokens that are searched for a turn's end: templates may write a line break or two after it.
_END_TOKENS = 4


class Tokens(NamedTuple):
    """int32 ids, untruncated; the prompt has at least one token, and so has the completion."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray


def tokenize_rows(rows: Sequence[FeedbackRow], tokenizer: Tokenizer) -> list[Tokens]:
    """Tokenize rows of one file, in order; see `Tokenizing`.

    Raises:
        TokenizationError: of the first row that cannot be used, or of the tokenizer.
    """
    found = Tokenizing(tokenizer).tokenize(rows)
    for one in found:
        if isinstance(one, TokenizationError):
            raise one
    return [one for one in found if isinstance(one, Tokens)]


@dataclass(frozen=True)
class TokenizingPart:
    """What `Tokenizing` has counted in one part of the feedback.

    Attributes:
        rows, ids: number of rows that were tokenized, and of their ids.
        dated: whether a template wrote the date.
    """

    findings: Findings
    rows: int
    ids: int
    dated: bool


class Tokenizing:
    """Tokenizes rows: conversations with the chat template; plain text with EOS appended once.

    The prompt's ids are a prefix of the ids of prompt and completion together. If the tokenizer merges tokens across
    the boundary, the two are tokenized separately, as they are when the model is sampled. BOS appears once: the
    template writes it, the text begins with it, or the tokenizer adds it. The ids of each row are compared with its
    text.

    Args:
        tokenizer: a `transformers` tokenizer; it is never changed.
        now: the date that templates with a date write; None for today.
    """

    def __init__(self, tokenizer: Tokenizer, *, now: datetime | None = None) -> None:
        self._tokenizer = tokenizer
        self._findings = Findings()
        self._renderer = ChatRenderer(tokenizer, now=now, findings=self._findings)
        self._decoder = Decoder(tokenizer)
        self._encoder = Encoder(tokenizer)
        self._around: tuple[list[int], list[int]] | None = None
        self._unknown = _unknown_token(tokenizer)
        self._rows = self._ids = 0
        self._later_dated = False

    @property
    def has_template(self) -> bool:
        """Return whether the tokenizer has a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def dated(self) -> bool:
        """Return whether a template wrote the date."""
        return self._renderer.dated or self._later_dated

    def take_part(self) -> TokenizingPart:
        """Return what was counted in one part of the feedback, for `merge`, and begin to count the next part."""
        findings = Findings(self._findings.counts.copy(), self._findings.first.copy())
        part = TokenizingPart(findings, self._rows, self._ids, self.dated)
        self._findings.clear()
        self._rows = self._ids = 0
        return part

    def merge(self, later: TokenizingPart) -> None:
        """Add what was counted in the next part of the feedback."""
        self._findings.merge(later.findings)
        self._rows += later.rows
        self._ids += later.ids
        self._later_dated = self._later_dated or later.dated

    def rendered_text(self) -> RenderedText:
        """Return how text looks that the chat template has written."""
        return self._renderer.written

    def tokenize(self, rows: Sequence[FeedbackRow]) -> list[Tokens | TokenizationError]:
        """Tokenize some rows of the feedback.

        Returns:
            for each row its tokens, or why it cannot be used: a template that refuses it, renders the prompt differently
            once an answer follows or leaves out what the row says, or a prompt or a completion without tokens.

        Raises:
            TokenizationError: no chat template for a conversation, no EOS for plain text, ids that do not decode to the
                text, or a tokenizer that fails.
        """
        return next(iter(self.tokenize_chunks([rows])))[1]

    def tokenize_chunks(
        self, chunks: Iterable[Sequence[FeedbackRow]]
    ) -> Iterator[tuple[Sequence[FeedbackRow], list[Tokens | TokenizationError]]]:
        """Yield rows with what `tokenize` returns for them; the next chunk is rendered while one is encoded.

        Raises:
            KTOError: of the chunks, or see `tokenize`; the rows before it are yielded first.
        """
        waiting: deque[tuple[Sequence[FeedbackRow], list[_Rendered | TokenizationError], Future[_Sides]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as pool:
            rendered = self._rendered_chunks(chunks)
            failure: KTOError | None = None
            try:
                while failure is None:
                    try:
                        if (one := next(rendered, None)) is None:
                            break
                    except KTOError as error:
                        failure = error
                    else:
                        waiting.append((*one, self._begin_encoding(pool, *one)))
                        if len(waiting) > 1:
                            yield self._finished(*waiting.popleft())
                while waiting:
                    yield self._finished(*waiting.popleft())
                if failure is not None:
                    raise failure
            finally:
                for *_, sides in waiting:
                    sides.cancel()

    def _begin_encoding(
        self, pool: ThreadPoolExecutor, rows: Sequence[FeedbackRow], found: list["_Rendered | TokenizationError"]
    ) -> "Future[_Sides]":
        """Encode in the pool, or at once if that is done in Python: two threads of Python only wait for each other."""
        texts = [item.text for item in found if isinstance(item, _Rendered)]
        if not self._encoder.cuts_words(texts):
            return pool.submit(self._encode_sides, rows, found)
        done: Future[_Sides] = Future()
        try:
            done.set_result(self._encode_sides(rows, found))
        except Exception as error:  # noqa: BLE001 - raised by `result`, as those of the pool
            done.set_exception(error)
        return done

    def _rendered_chunks(
        self, chunks: Iterable[Sequence[FeedbackRow]]
    ) -> Iterator[tuple[Sequence[FeedbackRow], list["_Rendered | TokenizationError"]]]:
        for rows in chunks:
            yield rows, [self._render(row) for row in rows]

    def _finished(
        self,
        rows: Sequence[FeedbackRow],
        found: list["_Rendered | TokenizationError"],
        sides: "Future[_Sides]",
    ) -> tuple[Sequence[FeedbackRow], list[Tokens | TokenizationError]]:
        encoded = zip(*sides.result(), strict=True)
        return rows, [
            self._tokens(row, item, *next(encoded)) if isinstance(item, _Rendered) else item
            for row, item in zip(rows, found, strict=True)
        ]

    def check(self) -> None:
        """Check all rows together. Raises: TokenizationError: most completions have only unknown or special tokens."""
        unread = self._findings.counts["unread"]
        if 2 * unread > self._rows:
            raise TokenizationError(
                f"{self._findings.first['unread']}: the tokenizer has no tokens for this completion, nor for {unread - 1:,} "
                f"others of {self._rows:,}: all their tokens are unknown or special. It belongs to another language or "
                "another model; use the model's own."
            )

    def warnings(self) -> list[str]:
        """Return a sentence for each kind of finding in all rows so far."""
        counts, first = self._findings.counts, self._findings.first
        lines = self._findings.sentences()
        if counts["unknown"]:
            share, rows = counts["unknown"] / self._ids, counts["unknown_rows"]
            lines.append(
                f"{share:.2%} of the tokens, in {rows:,} of {self._rows:,} rows, are unknown to the tokenizer "
                f"({self._tokenizer.unk_token}): their text is lost (first: {first['unknown']}). Check that it "
                "belongs to the model and the language."
            )
        return lines

    def _render(self, row: FeedbackRow) -> "_Rendered | TokenizationError":
        if isinstance(row.prompt, str):
            return self._render_text(row)
        self._renderer.check_template(row)
        try:
            return _Rendered.of(*self._renderer.render(row), is_chat=True)
        except TokenizationError as error:
            return TokenizationError(str(error))  # without its traceback, which would keep the row

    def _render_text(self, row: FeedbackRow) -> "_Rendered":
        if self._tokenizer.eos_token_id is None:
            raise TokenizationError(
                f"{row.where}: plain text needs an end-of-sequence token after the completion, and this tokenizer has "
                "none. Set eos_token in tokenizer_config.json."
            )
        if row.rendered and not self._renderer.written.opens_answer(str(row.prompt), str(row.completion)):
            self._findings.add("unopened", row.where)
        return _Rendered.of(str(row.prompt), str(row.completion), is_chat=False)

    def _tokens(
        self, row: FeedbackRow, item: "_Rendered", prompt: list[int], full: list[int]
    ) -> Tokens | TokenizationError:
        before, after = ([], []) if item.is_chat else self._added_around(row.where, item.text)
        joined = not after and full[: len(prompt)] == prompt
        completion = full[len(prompt) :] if joined else self._encode_apart(row.where, item.completion)
        self._compare(row, item.text, full if joined else [*prompt, *completion], completion)
        if prompt[: len(before)] != before:  # text that is already rendered begins with BOS
            prompt = [*before, *prompt]
        prompt = [*prompt, *after]
        if item.is_chat:
            if self._decoder.special_ids.isdisjoint(completion[-_END_TOKENS:]):
                self._findings.add("open", row.where)
        elif not self._is_closed(item.completion, completion):
            completion = [*completion, self._tokenizer.eos_token_id]
        lacking = _lacking(row, prompt, completion)
        if lacking is not None:
            return lacking
        if prompt[:2] == [self._tokenizer.bos_token_id] * 2:
            self._findings.add("two_bos", row.where)
        both = np.array([*prompt, *completion], dtype=np.int32)
        return Tokens(both[: len(prompt)], both[len(prompt) :])

    def _is_closed(self, text: str, ids: list[int]) -> bool:
        """Return whether a completion ends with EOS or the template's end of a turn; a line break may follow either."""
        eos, end = self._tokenizer.eos_token_id, self._renderer.written.end
        text = text.rstrip()
        if ids[-1:] == [eos] or (text.endswith(str(self._tokenizer.eos_token)) and eos in ids):
            return True
        return end != "" and text.endswith(end)

    def _compare(self, row: FeedbackRow, text: str, ids: list[int], completion: list[int]) -> None:
        """Compare ids with their text, and count unknown tokens and lost characters."""
        self._rows += 1
        self._ids += len(ids)
        unknown = 0
        if self._unknown is not None:
            unknown = ids.count(self._unknown[0]) - text.count(self._unknown[1])
        if unknown > 0:
            self._findings.add("unknown", row.where, unknown)
            self._findings.add("unknown_rows", row.where)
        elif self._guarded(row.where, lambda: self._decoder.lost(text, ids, row.where)):
            self._findings.add("lost", row.where)
        else:
            return
        known = set(completion) - self._decoder.special_ids - ({self._unknown[0]} if self._unknown else set())
        if not known:
            self._findings.add("unread", row.where)

    def _added_around(self, where: str, text: str) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer adds before and after a text, without EOS, which follows completions."""
        if self._around is None:
            bare, closed = self._encode(where, [text])[0], self._encode(where, [text], special=True)[0]
            fits = [i for i in range(len(closed) - len(bare) + 1) if closed[i : i + len(bare)] == bare]
            start = fits[0] if fits else 0
            before, after = closed[:start], closed[start + len(bare) :]
            self._around = before, [] if after == [self._tokenizer.eos_token_id] else after
        return self._around

    def _encode_sides(self, rows: Sequence[FeedbackRow], found: Sequence["_Rendered | TokenizationError"]) -> "_Sides":
        """Return the ids of the prompts, and of the whole texts, of the rows that could be rendered."""
        rendered = [item for item in found if isinstance(item, _Rendered)]
        if not rendered:
            return [], []
        sides = [item.prompt for item in rendered], [item.completion for item in rendered]
        try:
            return self._guarded(rows[0].where, lambda: self._encoder.encode_sides(*sides))
        except TokenizationError:
            for row, item in zip(rows, found, strict=True):  # find the row that fails
                if isinstance(item, _Rendered):
                    self._encode(row.where, [item.prompt, item.text])
            raise

    def _encode(self, where: str, texts: list[str], *, special: bool = False) -> list[list[int]]:
        return self._guarded(where, lambda: self._encoder.encode(texts, special=special))

    def _encode_apart(self, where: str, completion: str) -> list[int]:
        """Return ids of a completion that continues a prompt.

        SentencePiece tokenizers add a space before any text they encode, which was never sampled. They add none after
        a line break, so one is put before the completion and its ids are removed again.
        """
        start, ids = self._encode(where, ["\n", "\n" + completion])
        return ids[len(start) :] if ids[: len(start)] == start else self._encode(where, [completion])[0]

    def _guarded(self, where: str, call: Callable[[], ResultT]) -> ResultT:
        """Call the tokenizer. Raises: TokenizationError: any failure, including a panic of its native code."""
        try:
            return call()
        except (TokenizationError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise TokenizationError(
                f"{where}: the tokenizer ({type(self._tokenizer).__name__}) fails on this row: {said_by(error)}. Its files "
                'do not match each other: copy the tokenizer again, or set "tokenizer_class" in tokenizer_config.json to the '
                "class that tokenizer.json was made for (PreTrainedTokenizerFast reads it unchanged)."
            ) from error


class _Rendered(NamedTuple):
    prompt: str
    completion: str
    text: str  # both
    is_chat: bool  # whether a template wrote BOS and the end

    @classmethod
    def of(cls, prompt: str, completion: str, *, is_chat: bool) -> "_Rendered":
        return cls(prompt, completion, prompt + completion, is_chat)


def _unknown_token(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """Return id and text of the tokenizer's unknown token; None without one."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", getattr(tokenizer, "unk_token", None))  # Unigram's model has no such attribute
    token_id = tokenizer.convert_tokens_to_ids(str(token)) if token else None
    return None if token_id is None else (int(token_id), str(token))


def _lacking(row: FeedbackRow, prompt: list[int], completion: list[int]) -> TokenizationError | None:
    """Return the error of a row with a side that has no tokens."""
    if not prompt:
        return TokenizationError(
            f"{row.where}: the prompt has no tokens, so nothing predicts the first token of the completion. "
            "Give a prompt, or use a tokenizer that starts every text with BOS."
        )
    if not completion:
        return TokenizationError(f"{row.where}: the completion has no tokens.")
    return None
