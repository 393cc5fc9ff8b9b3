"""Run an engine in a child process, because vLLM only frees its memory when its process ends.

parent  -- settings, sequences -->  standard input of the child (`child.py`), one end of a socket pair
        <-- scores, progress --     the same socket; what libraries print in the child goes to its log
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing import Pipe
from pathlib import Path

from offline_kto.kto_core.errors import ModelError
from offline_kto.precompute.engines.protocol import EngineSettings, RemoteScorer

_SECONDS_TO_END = 60
_LOG = " Its log: "

# Python would search the working directory first, where a user's modules may have any name.
_CHILD = (
    "import sys\n"
    "if not getattr(sys.flags, 'safe_path', False): del sys.path[0]\n"
    "from {module} import {function}\n"
    "{function}()\n"
)


class ChildProcess:
    """A Python program in a process of its own, with a channel to it at its standard input.

    Args:
        module, function: what it runs.
        environment: variables that are added to those of this process.

    Attributes:
        channel: this process's end; closing it ends the child.
        log: what the child prints.
    """

    def __init__(self, module: str, function: str, *, environment: Mapping[str, str] | None = None) -> None:
        self.log = Path(tempfile.mkstemp(prefix="kto-precompute-", suffix=".log")[1])
        self.channel, theirs = Pipe()
        with self.log.open("wb") as output, theirs:
            # In a new session an interrupt reaches only the parent, which then ends the child.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(module=module, function=function)],
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal_name(self) -> str:
        """Return the name of the signal that ended the child, and its usual cause; empty if none did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if (code := self._process.wait(2)) < 0:
                name = signal.Signals(-code).name
                return f"{name}{': perhaps the system was out of memory' if name == 'SIGKILL' else ''}"
        return ""

    def end(self, seconds: float = _SECONDS_TO_END) -> None:
        """Wait for the child to end; kill it and all of its workers if it takes longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def engine_process(settings: EngineSettings, *, name: str) -> Iterator[RemoteScorer]:
    """Start an engine in a child process, which has ended and freed its memory when the `with` block is left.

    Args:
        settings: read by `child.py`.
        name: of the engine, for messages.

    Raises:
        ModelError: the engine could not start or score, with its log's path.
    """
    child = ChildProcess("offline_kto.precompute.engines.child", "main")
    scorer = RemoteScorer(child.channel, name)
    try:
        with contextlib.suppress(ConnectionError):  # the child has already ended: the first request reports it
            child.channel.send_bytes(json.dumps(settings).encode("utf-8"))
        yield scorer
        scorer.dismiss()
    except ModelError as error:
        if not _is_of(error, scorer):
            child.log.unlink()
            raise
        ending = child.signal_name()
        raise type(error)(f"{error}{f' ({ending})' if ending else ''}{_LOG}{child.log}") from error
    except BaseException:
        child.log.unlink()
        raise
    else:
        child.log.unlink()
    finally:
        child.channel.close()  # the child ends then, if it has not yet
        child.end()


def _is_of(error: ModelError, scorer: RemoteScorer) -> bool:
    """Return whether an engine's log explains an error: not another engine's, nor one that names a log already."""
    return getattr(error, "engine", scorer) is scorer and _LOG not in str(error)
