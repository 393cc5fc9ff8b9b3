"""The child process of `engine_process`: load an engine and send its scores to the parent."""

import json
import os
import queue
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.kto_core.streams import encode_all
from offline_kto.precompute.engines.protocol import EngineSettings, Scorer, serve


class WatchedChannel:
    """A channel that is read in a background thread, so that the parent's end is noticed in the middle of a shard.

    Attributes:
        is_dismissed: set when the parent has said that there is no more work.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.is_dismissed = threading.Event()
        self.send_bytes = connection.send_bytes
        self._messages: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv_bytes()
            except (EOFError, OSError):
                os._exit(1)
            if not message:
                self.is_dismissed.set()
            self._messages.put(message)
            if not message:
                return

    def recv_bytes(self) -> bytes:
        return self._messages.get()


def channel_to_parent() -> WatchedChannel:
    """Return the channel to the parent process, which is this process's standard input."""
    channel = WatchedChannel(Connection(os.dup(0)))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no other code may read from the channel
    return channel


def main() -> None:
    """Serve the parent process at the other end of standard input."""
    encode_all()
    channel = channel_to_parent()
    settings = json.loads(channel.recv_bytes())
    with shown_lines():  # standard output is the log
        serve(channel, lambda sequences: _load(settings, sequences))


def _load(settings: EngineSettings, sequences: Sequence[TokenIds]) -> Scorer:
    if settings["engine"] == "vllm":
        from offline_kto.precompute.engines.vllm_scorer import VllmScorer

        return VllmScorer(**settings["options"])
    from offline_kto.precompute.config import PrecomputeConfig
    from offline_kto.precompute.engines.backend import load_transformers
    from offline_kto.precompute.engines.reference import Reference

    reference = Reference.find(PrecomputeConfig(**settings["options"]))
    return load_transformers(reference, sequences, save_to=settings.get("save_to"))
