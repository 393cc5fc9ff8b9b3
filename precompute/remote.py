"""Scoring in another process: sequences there, scores back, as plain bytes.

Any channel that carries whole messages will do: pipes to a child, or the process group of a launch. The other side
says what it has to say in one-letter messages; an empty one means that there is no more to do.

    s  scores        t  tokens done        e  an error that the user can mend
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kto_core.errors import KTOError, ModelError
from kto_core.sequences import TokenIds

_SCORES, _TOKENS, _ERROR = b"s", b"t", b"e"
_NO_MORE = b""


class Scorer(Protocol):
    """An engine that scores."""

    def score(self, sequences: Sequence[TokenIds], *, on_tokens: Callable[[int], None]) -> list[np.ndarray]:
        """float32 nats for each completion token, in the order of `sequences`; `on_tokens` gets the tokens done."""


class Channel(Protocol):
    """Carries messages to and from one other process. Raises: ConnectionError: it is gone."""

    def send(self, message: bytes) -> None: ...
    def receive(self) -> bytes: ...


def encode(arrays: Sequence[np.ndarray]) -> bytes:
    """Arrays of 4-byte numbers as: how many, the length of each, their numbers."""
    header = np.array([len(arrays), *map(len, arrays)], dtype=np.int64)
    return b"".join([header.tobytes(), *(array.tobytes() for array in arrays)])


def decode(message: bytes, dtype: type[np.generic]) -> list[np.ndarray]:
    """What `encode` wrote."""
    count = int(np.frombuffer(message, np.int64, 1)[0])
    lengths = np.frombuffer(message, np.int64, count, offset=8)
    numbers = np.frombuffer(message, dtype, offset=8 * (count + 1))
    return np.split(numbers, np.cumsum(lengths)[:-1]) if count else []


class RemoteScorer:
    """This side: asks, and waits for answers.

    Args:
        channel: to a process that runs `serve`.
        name: what the other process is, for messages.
    """

    def __init__(self, channel: Channel, name: str) -> None:
        self.channel, self.name = channel, name

    def ask(self, sequences: Sequence[TokenIds]) -> None:
        """Hand over what is to be scored; `answer` must follow."""
        self._guarded(lambda: self.channel.send(encode([ids.astype(np.int32) for s in sequences for ids in s])))

    def answer(self, *, on_tokens: Callable[[int], None]) -> list[np.ndarray]:
        """Wait for the scores.

        Raises:
            ModelError: the other process could not score, or is gone.
        """
        while True:
            message = self._guarded(self.channel.receive)
            kind, content = message[:1], message[1:]
            if kind == _TOKENS:
                on_tokens(int.from_bytes(content, "little"))
            elif kind == _ERROR:
                raise ModelError(content.decode("utf-8"))
            else:
                return decode(content, np.float32)

    def score(self, sequences: Sequence[TokenIds], *, on_tokens: Callable[[int], None]) -> list[np.ndarray]:
        self.ask(sequences)
        return self.answer(on_tokens=on_tokens)

    def dismiss(self) -> None:
        """There is no more to do."""
        self._guarded(lambda: self.channel.send(_NO_MORE))

    def _guarded(self, act):  # type: ignore[no-untyped-def]
        try:
            return act()
        except (ConnectionError, EOFError) as error:
            raise ModelError(
                f"{self.name} ended unexpectedly. Finished shards are kept: the same command goes on."
            ) from error


def serve(channel: Channel, load: Callable[[Sequence[TokenIds]], Scorer], *, tells_progress: bool) -> None:
    """The other side: score whatever comes, until there is no more.

    Args:
        load: makes the engine when the first sequences are there.
        tells_progress: send how many tokens are done; only where this side may send while the other does not listen.
    """

    def tell(tokens: int) -> None:
        if tells_progress:
            channel.send(_TOKENS + tokens.to_bytes(8, "little"))

    scorer: Scorer | None = None
    while request := channel.receive():
        arrays = decode(request, np.int32)
        sequences = list(zip(arrays[::2], arrays[1::2], strict=True))
        try:
            if sequences and scorer is None:
                scorer = load(sequences)
            scores = scorer.score(sequences, on_tokens=tell) if scorer and sequences else []
        except KTOError as error:
            channel.send(_ERROR + str(error).encode("utf-8"))
            continue
        channel.send(_SCORES + encode(scores))
