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
from collections.abc import Iterator
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
    "from offline_kto.precompute.engines.child import main\n"
    "main()\n"
)


@contextlib.contextmanager
def engine_process(settings: EngineSettings, *, name: str) -> Iterator[RemoteScorer]:
    """Start an engine in a child process, which has ended and freed its memory when the `with` block is left.

    Args:
        settings: read by `child.py`.
        name: of the engine, for messages.

    Raises:
        ModelError: the engine could not start or score, with its log's path.
    """
    log = Path(tempfile.mkstemp(prefix="kto-precompute-", suffix=".log")[1])
    channel, theirs = Pipe()
    with log.open("wb") as output, theirs:
        # In a new session an interrupt reaches only the parent, which then ends the child.
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=theirs.fileno(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    scorer = RemoteScorer(channel, name)
    try:
        with contextlib.suppress(ConnectionError):  # the child has already ended: the first request reports it
            channel.send_bytes(json.dumps(settings).encode("utf-8"))
        yield scorer
        scorer.dismiss()
    except ModelError as error:
        if not _is_of(error, scorer):
            log.unlink()
            raise
        raise type(error)(f"{error}{_ending(process)}{_LOG}{log}") from error
    except BaseException:
        log.unlink()
        raise
    else:
        log.unlink()
    finally:
        channel.close()  # the child ends then, if it has not yet
        _end(process)


def _is_of(error: ModelError, scorer: RemoteScorer) -> bool:
    """Return whether an engine's log explains an error: not another engine's, nor one that names a log already."""
    return getattr(error, "engine", scorer) is scorer and _LOG not in str(error)


def _ending(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if (code := process.wait(2)) < 0:
            name = signal.Signals(-code).name
            return f" ({name}{': perhaps the system was out of memory' if name == 'SIGKILL' else ''})"
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the child to end; kill it and all of its workers if it takes too long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
