"""Score with several engines at the same time, each in a process of its own on its own GPUs."""

from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import cast

from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import Listener, RemoteScorer
from offline_kto.precompute.engines.shares import shares_of


class ParallelScorer:
    """Distributes sequences over engines, and passes on their scores as they arrive.

    Args:
        engines: from `engine_process`; all hold the same model.
    """

    def __init__(self, engines: Sequence[RemoteScorer]) -> None:
        self.engines = engines

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
        """Score sequences, as in `offline_kto.precompute.engines.protocol.Scorer`.

        Raises:
            EngineError: one of the engines could not score, or has ended.
        """
        pending = {}
        for engine, share in zip(self.engines, shares_of(sequences, known, len(self.engines)), strict=True):
            if len(share.known) < len(share.sequences):
                engine.ask(share.sequences, share.known)
                pending[cast("Connection", engine.channel)] = engine, share.renumbering(listener)
        while pending:
            for channel in wait(list(pending)):
                engine, renumbered = pending[cast("Connection", channel)]
                if engine.hear_one(renumbered) is False:
                    del pending[cast("Connection", channel)]

    def dismiss(self) -> None:
        """Let all engines end at the same time: each takes seconds."""
        for engine in self.engines:
            engine.dismiss()
