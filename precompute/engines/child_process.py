"""Run a Python program in a child process, with a channel between the two.

The channel is a socket pair whose one end is the child's standard input. What the child prints goes to its log.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

_SECONDS_TO_END = 60

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

    def kept_log(self) -> str:
        """Return the log's path for a message; if the child printed nothing, remove the log and return an empty text."""
        if self.log.stat().st_size:
            return str(self.log)
        self.log.unlink()
        return ""

    def end(self, seconds: float = _SECONDS_TO_END) -> None:
        """Wait for the child to end; kill it and all of its workers if it takes longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


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
