"""Replace a command's standard output and error by streams that handle closed, full and ASCII-only outputs.

Without this, a full disk behind `> log` looks like a full disk of the run folder, and a name with an accent ends a run
on an ASCII stream. With `>&-`, the next file that is opened gets standard output's file descriptor, and so its text.
"""

import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from offline_kto.kto_core.errors import OutputError


def is_terminal(stream: IO[str] | None) -> bool:
    """Return whether a stream is a terminal; False for a process without streams."""
    return stream is not None and stream.isatty()


@contextlib.contextmanager
def own_streams() -> Iterator[None]:
    """Run a command on open streams that encode every character, and report a stream that cannot be written.

    Has no effect on streams that replace the process's own, as in a test or a notebook.
    """
    _open_missing()
    output = _StandardOutput(1, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = _rewrapped(sys.stdout, output)
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = _rewrapped(sys.stderr, _StandardError(2, "w", closefd=False))
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
    except (OutputError, SystemExit) as error:
        failure = error if isinstance(error, OutputError) else output.failure
        if failure is None or getattr(error, "code", None):  # nothing failed, or it is already reported
            raise
        print(f"Error: {failure}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


class _StandardOutput(io.FileIO):
    """Standard output that ends the command if it cannot be written, silently if its reader has gone (`| head`).

    Attributes:
        failure: the error that was raised, which a library may have caught.
    """

    failure: OutputError | None = None
    _is_gone = False

    def write(self, data: Any, /) -> int:
        if self._is_gone or not len(data):  # click writes nothing to find out the kind of stream
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._is_gone = True  # the buffered rest would raise again when the process ends
            if error.errno == errno.EPIPE:
                raise SystemExit(1) from None
            self.failure = OutputError(
                f"standard output: cannot be written: {error}. Finished files are kept; make room where the output is written, or "
                "redirect it elsewhere."
            )
            raise self.failure from error


class _StandardError(io.FileIO):
    """Standard error that ignores failed writes, because progress and messages are not worth stopping for."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def _rewrapped(stream: io.TextIOWrapper, raw: io.FileIO) -> io.TextIOWrapper:
    stream.flush()
    utf8 = stream.encoding.lower().replace("-", "") == "utf8" and stream.errors != "strict"
    buffer: IO[bytes] = raw if stream.write_through else io.BufferedWriter(raw)  # PYTHONUNBUFFERED: no buffer
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors if utf8 else "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_missing() -> None:
    """Open /dev/null in place of closed standard streams (`>&-`)."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free descriptor
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


@contextlib.contextmanager
def library_output_in(log: IO[str], *, threads: str) -> Iterator[None]:
    """Send a library's output to a log while the block runs.

    That is what is written to the descriptors 1 and 2, and what its threads print. Our own lines appear as before.

    Args:
        log: an open file.
        threads: how the names of the library's threads begin.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        stream.flush()
    ours = os.dup(1), os.dup(2)
    sys.stdout = _WithoutThreads(_moved(sys.stdout, _StandardOutput, 1, ours[0]), log, threads)
    sys.stderr = _WithoutThreads(_moved(sys.stderr, _StandardError, 2, ours[1]), log, threads)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
        for number, one in enumerate(ours, start=1):
            os.dup2(one, number)
            os.close(one)


def _moved(stream: Any, kind: type[io.FileIO], number: int, descriptor: int) -> Any:
    """Return a stream that writes to another descriptor; one that is not the process's own stays as it is."""
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
        return stream
    return _rewrapped(stream, kind(descriptor, "w", closefd=False))


class _WithoutThreads:
    """A stream that sends to a log what some threads write."""

    def __init__(self, stream: IO[str], log: IO[str], threads: str) -> None:
        self._stream, self._log, self._threads = stream, log, threads

    def write(self, text: str) -> int:
        is_ours = not threading.current_thread().name.startswith(self._threads)
        return (self._stream if is_ours else self._log).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def encode_all() -> None:
    """Make standard output and error of a child process, which go to its log, encode every character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
