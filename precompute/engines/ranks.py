"""Score with several processes under one launcher (`torchrun`, `accelerate launch`); rank 0 plans and writes.

Each shard's prompts are distributed over all ranks. So a few shards are enough to use many GPUs, no sequence is scored
twice, and only one process writes. If one rank dies, the whole launch stops. Finished shards are kept, and any number
of ranks can resume.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.launch import unreachable, world_size
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import Listener, RemoteScorer, Scorer, serve
from offline_kto.precompute.engines.shares import shares_of
from offline_kto.precompute.parts import Pace

# A rank may score for hours before it answers. If one dies, its connection closes, which is noticed at once.
_PATIENCE = datetime.timedelta(days=30)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Connect the ranks with gloo, because they exchange ids and scores on the host.

    Raises:
        ModelError: the other ranks cannot be reached with the launcher's settings.
    """
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise ModelError(unreachable(error)) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


class _RankChannel:
    """A channel to one other rank; each message is sent as its length, then its bytes."""

    def __init__(self, other: int) -> None:
        self.other = other

    def send_bytes(self, message: bytes, /) -> None:
        with _connection_errors():
            dist.send(torch.tensor([len(message)]), self.other)
            if message:
                dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), self.other)

    def recv_bytes(self) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        with _connection_errors():
            dist.recv(length, self.other)
            content = torch.empty(int(length), dtype=torch.uint8)
            if len(content):
                dist.recv(content, self.other)
        return content.numpy().tobytes()


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error


class RankedScorer:
    """Rank 0's scorer, which distributes sequences over all ranks, including itself.

    Args:
        load: makes this rank's own engine when the first sequences arrive.
    """

    def __init__(self, load: Callable[[Sequence[TokenIds]], Scorer]) -> None:
        self._load = load
        self._own: Scorer | None = None
        self._others = [RemoteScorer(_RankChannel(i), f"process {i} of this launch") for i in range(1, world_size())]

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
        """Score sequences, as in `offline_kto.precompute.engines.protocol.Scorer`."""
        shares = shares_of(sequences, known, world_size())
        mine, *theirs = shares
        for other, share in zip(self._others, theirs, strict=True):
            other.ask(share.sequences, share.known)
        pending = list(zip(self._others, theirs, strict=True))
        pace = Pace()

        def hear() -> None:
            """Receive one message from each pending rank; all ranks send at the same intervals."""
            nonlocal pending
            pending = [
                (other, share)
                for other, share in pending
                if other.hear(share.renumbering(Listener(listener.on_scores)))
            ]
            pace.restart()

        def keep(done: Sequence[int], scores: Sequence[np.ndarray]) -> None:
            mine.renumbering(listener).on_scores(done, scores)
            if pace.is_due():
                hear()

        # The others send no progress, so it is estimated from this rank's: equal shares take about equal times.
        total = sum(share.tokens for share in shares)
        if len(mine.known) < len(mine.sequences):
            self._own = self._own or self._load(mine.sequences)
            self._own.score(
                mine.sequences,
                Listener(keep, lambda tokens: listener.on_tokens(tokens * total // mine.tokens)),
                known=mine.known,
            )
        while pending:
            hear()

    def dismiss(self) -> None:
        for other in self._others:
            other.dismiss()


def work(load: Callable[[Sequence[TokenIds]], Scorer]) -> None:
    """Score what rank 0 sends, on every other rank."""
    try:
        serve(_RankChannel(0), load, tells_progress=False)
    except ConnectionError:
        raise SystemExit(1) from None  # rank 0 has reported why
