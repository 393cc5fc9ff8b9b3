"""An engine in a process of its own, which frees all of its memory by ending: vLLM's does not come back otherwise.

parent  -- settings, sequences -->  stdin of `python -m precompute.child`
        <-- scores, progress --     its stdout; what libraries print there goes to its log instead
"""

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kto_core.errors import ModelError
from kto_core.sequences import TokenIds
from kto_core.streams import encode_all
from precompute.remote import RemoteScorer, Scorer, serve

_LENGTH = struct.Struct("<q")
_SECONDS_TO_END = 60


class _Pipes:
    """Whole messages over two byte streams."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self.incoming, self.outgoing = incoming, outgoing

    def send(self, message: bytes) -> None:
        self.outgoing.write(_LENGTH.pack(len(message)) + message)
        self.outgoing.flush()

    def receive(self) -> bytes:
        length = self.incoming.read(_LENGTH.size)
        if len(length) < _LENGTH.size:
            raise EOFError
        size = _LENGTH.unpack(length)[0]
        message = self.incoming.read(size)
        if len(message) < size:
            raise EOFError
        return message


@contextlib.contextmanager
def engine_process(settings: Mapping[str, Any], *, name: str) -> Iterator[RemoteScorer]:
    """An engine in a child process; it has ended, and given its memory back, when the `with` block is left.

    Args:
        settings: what `_load` reads, as JSON can hold it.
        name: of the engine, for messages.

    Raises:
        ModelError: the engine could not start or score, with its log's path.
    """
    log = Path(tempfile.mkstemp(prefix="kto-precompute-", suffix=".log")[1])
    with log.open("wb") as output:
        # A session of its own: an interrupt reaches the parent alone, which then ends the child.
        process = subprocess.Popen(
            [sys.executable, "-m", "precompute.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    channel = _Pipes(process.stdout, process.stdin)
    scorer = RemoteScorer(channel, name)
    try:
        with contextlib.suppress(ConnectionError):  # it is gone already: the first question says so
            channel.send(json.dumps(settings).encode("utf-8"))
        yield scorer
        scorer.dismiss()
    except ModelError as error:
        raise ModelError(f"{error}{_ending(process)} Its log: {log}") from error
    except BaseException:
        log.unlink()
        raise
    else:
        log.unlink()
    finally:
        _end(process)


def _ending(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if (code := process.wait(2)) < 0:
            name = signal.Signals(-code).name
            return f" ({name}{': the system was out of memory?' if name == 'SIGKILL' else ''})"
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, at which the child ends if it has not yet; kill it, with all of its workers, if it does not."""
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()  # type: ignore[union-attr]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -- the child's side -------------------------------------------------------------------------------


class _Watched(_Pipes):
    """Reads in the background, so that a parent's end is noticed in the middle of a shard."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        super().__init__(incoming, outgoing)
        self._messages: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                message = super().receive()
            except EOFError:
                os._exit(1)
            self._messages.put(message)
            if not message:
                return

    def receive(self) -> bytes:
        return self._messages.get()


def main() -> None:
    """Serve one parent."""
    encode_all()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    channel = _Watched(sys.stdin.buffer, answers)
    settings = json.loads(channel.receive())
    serve(channel, lambda sequences: _load(settings, sequences), tells_progress=True)


def _load(settings: Mapping[str, Any], sequences: Sequence[TokenIds]) -> Scorer:
    if settings["engine"] == "vllm":
        from precompute.vllm_scorer import VllmScorer

        return VllmScorer(**settings["options"])
    from precompute.config import PrecomputeConfig
    from precompute.engines import load_transformers
    from precompute.reference import Reference

    reference = Reference.find(PrecomputeConfig(**settings["options"]))
    return load_transformers(reference, sequences, save_to=settings["save_to"])


if __name__ == "__main__":
    main()
