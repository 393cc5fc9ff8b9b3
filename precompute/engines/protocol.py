"""Define a protocol for scoring in another process: sequences are sent there, and scores are sent back, as bytes.

It works over any channel of whole messages, like a socket to a child. The scoring process sends messages that begin
with one letter. An empty message from the other side ends the exchange.

    p  some of the scores        s  the last of them        t  tokens done        e  an error that the user can fix
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np

from offline_kto.kto_core.errors import KTOError, ModelError
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.parts import Pace


class EngineSettings(TypedDict, total=False):
    """Settings with which a child process starts an engine, as JSON.

    Attributes:
        engine: vllm or transformers.
        options: of `VllmScorer`, or of `PrecomputeConfig`.
        save_to: where Transformers saves the model with its adapter merged; None for nowhere.
    """

    engine: str
    options: dict[str, Any]
    save_to: str | None


_SOME, _LAST, _TOKENS, _ERROR = b"p", b"s", b"t", b"e"
_NO_MORE = b""

OnScores = Callable[[Sequence[int], Sequence[np.ndarray]], None]


class Listener(NamedTuple):
    """Functions that an engine calls while it scores.

    Attributes:
        on_scores: called with positions in the sequences, and float32 nats for each completion token of these.
        on_tokens: called with the tokens done since the last call.
    """

    on_scores: OnScores
    on_tokens: Callable[[int], None] = lambda tokens: None


class Scorer(Protocol):
    """An engine that scores."""

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
        """Score sequences.

        Args:
            sequences: (prompt ids, completion ids), neither empty.
            listener: gets the scores.
            known: positions that need no score; the others are batched as if these were scored too.
        """


def scores_of(
    scorer: Scorer, sequences: Sequence[TokenIds], on_tokens: Callable[[int], None] = lambda tokens: None
) -> list[np.ndarray]:
    """Return the scores of all sequences, in their order."""
    found: dict[int, np.ndarray] = {}
    scorer.score(sequences, Listener(lambda done, scores: found.update(zip(done, scores, strict=True)), on_tokens))
    return [found[i] for i in range(len(sequences))]


class Channel(Protocol):
    """A channel of messages to and from one other process, as in `multiprocessing.connection`.

    Raises:
        ConnectionError, EOFError: the other process has ended.
    """

    def send_bytes(self, message: bytes, /) -> None: ...
    def recv_bytes(self) -> bytes: ...


def encode(arrays: Sequence[np.ndarray]) -> bytes:
    """Return arrays of 4-byte numbers as bytes: their count, their lengths, their numbers."""
    header = np.array([len(arrays), *map(len, arrays)], dtype=np.int64)
    return b"".join([header.tobytes(), *(array.tobytes() for array in arrays)])


def decode(message: bytes, dtype: type[np.generic]) -> list[np.ndarray]:
    """Return the arrays in bytes from `encode`."""
    count = int(np.frombuffer(message, np.int64, 1)[0])
    lengths = np.frombuffer(message, np.int64, count, offset=8)
    numbers = np.frombuffer(message, dtype, offset=8 * (count + 1))
    return np.split(numbers, np.cumsum(lengths)[:-1]) if count else []


class EngineError(ModelError):
    """An engine in another process could not score, or has ended.

    Args:
        engine: the one that failed; None once the message says so.
    """

    def __init__(self, message: str, engine: "RemoteScorer | None" = None) -> None:
        super().__init__(message)
        self.engine = engine


class RemoteScorer:
    """The requesting side: sends sequences, and waits for scores.

    Args:
        channel: to a process that runs `serve`.
        name: of the other process, for messages.
    """

    def __init__(self, channel: Channel, name: str) -> None:
        self.channel, self.name = channel, name
        self._dismissed = False

    def ask(self, sequences: Sequence[TokenIds], known: Iterable[int] = ()) -> None:
        """Send sequences to be scored. The caller must then call `hear` until no more scores come."""
        arrays = [np.array(sorted(known), dtype=np.int32), *(ids.astype(np.int32) for s in sequences for ids in s)]
        self._guarded(lambda: self.channel.send_bytes(encode(arrays)))

    def hear(self, listener: Listener) -> bool:
        """Wait for the next scores.

        Returns:
            Whether more will come.

        Raises:
            EngineError: the other process could not score, or has ended.
        """
        while (more := self.hear_one(listener)) is None:
            pass
        return more

    def hear_one(self, listener: Listener) -> bool | None:
        """Wait for one message.

        Returns:
            Whether more scores will come; None after a message without scores.

        Raises:
            EngineError: the other process could not score, or has ended.
        """
        message = self._guarded(self.channel.recv_bytes)
        kind, content = message[:1], message[1:]
        if kind == _TOKENS:
            listener.on_tokens(int.from_bytes(content, "little"))
            return None
        if kind == _ERROR:
            raise EngineError(content.decode("utf-8"), self)
        done, *scores = decode(content, np.int32)
        listener.on_scores(done.tolist(), [one.view(np.float32) for one in scores])
        return bool(kind == _SOME)

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
        """Score sequences, as in `Scorer`."""
        self.ask(sequences, known)
        while self.hear(listener):
            pass

    def dismiss(self) -> None:
        """Notify the other process that there is no more work; only the first call does."""
        if self._dismissed:
            return
        self._dismissed = True
        self._guarded(lambda: self.channel.send_bytes(_NO_MORE))

    def _guarded(self, act):  # type: ignore[no-untyped-def]
        try:
            return act()
        except (ConnectionError, EOFError) as error:
            raise EngineError(
                f"{self.name} ended unexpectedly. Finished scores are kept: run the same command again to continue.",
                self,
            ) from error


def serve(channel: Channel, load: Callable[[Sequence[TokenIds]], Scorer]) -> None:
    """Score every request of the other side, until it sends that there is no more work.

    Args:
        load: makes the engine when the first sequences arrive.
    """

    def tell(tokens: int) -> None:
        channel.send_bytes(_TOKENS + tokens.to_bytes(8, "little"))

    scorer: Scorer | None = None
    while request := channel.recv_bytes():
        known, *arrays = decode(request, np.int32)
        sequences = list(zip(arrays[::2], arrays[1::2], strict=True))
        answer = _Answer(channel)
        try:
            if len(known) < len(sequences):
                scorer = scorer or load(sequences)
                scorer.score(sequences, Listener(answer.add, tell), known=frozenset(known.tolist()))
        except KTOError as error:
            channel.send_bytes(_ERROR + str(error).encode("utf-8"))
            continue
        answer.send(_LAST)


class _Answer:
    """Collects scores, and sends them to the requesting process at intervals."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._pace = channel, Pace()
        self._done: list[int] = []
        self._scores: list[np.ndarray] = []

    def add(self, done: Sequence[int], scores: Sequence[np.ndarray]) -> None:
        self._done += done
        self._scores += scores
        if self._pace.is_due():
            self.send(_SOME)
            self._pace.restart()

    def send(self, kind: bytes) -> None:
        self._channel.send_bytes(kind + encode([np.array(self._done, dtype=np.int32), *self._scores]))
        self._done, self._scores = [], []
