"""Standard output and error of a command: what cannot be written, encoded or is not there ends in no traceback.

Without this a full disk behind `> log` is taken for the disk of the run folder, a name with an accent ends a run on an
ASCII stream, and with `>&-` the next file that is opened gets the number of standard output, and what is printed.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

from offline_kto.kto_core.errors import OutputError


def is_terminal(stream: IO[str] | None) -> bool:
    """Return whether somebody watches this stream; a process without a console has none."""
    return stream is not None and stream.isatty()


@contextlib.contextmanager
def own_streams() -> Iterator[None]:
    """Run a command on streams that are there, encode every character, and say which of them cannot be written.

    Does nothing where other streams than the process's own are in place, as in a test or a notebook.
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
        if failure is None or getattr(error, "code", None):  # all is well, or said already
            raise
        print(f"Error: {failure}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


class _StandardOutput(io.FileIO):
    """Ends the command where it cannot be written: quietly where its reader has gone (`| head`).

    Attributes:
        failure: what was raised, which a library may have caught.
    """

    failure: OutputError | None = None
    _is_gone = False

    def write(self, data: Any, /) -> int:
        if self._is_gone or not len(data):  # click asks with nothing what kind of stream this is
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._is_gone = True  # what is still buffered would raise again when the process ends
            if error.errno == errno.EPIPE:
                raise SystemExit(1) from None
            self.failure = OutputError(
                f"standard output: cannot be written: {error}. What was finished is kept; make room where the output goes, or "
                "send it elsewhere."
            )
            raise self.failure from error


class _StandardError(io.FileIO):
    """Progress and messages: nothing waits for them, and nobody could be told."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def _rewrapped(stream: io.TextIOWrapper, raw: io.FileIO) -> io.TextIOWrapper:
    stream.flush()
    utf8 = stream.encoding.lower().replace("-", "") == "utf8" and stream.errors != "strict"
    buffer: IO[bytes] = (
        raw if stream.write_through else io.BufferedWriter(raw)
    )  # PYTHONUNBUFFERED: nothing waits in between
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors if utf8 else "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_missing() -> None:
    """Put /dev/null where a standard stream was closed (`>&-`)."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def encode_all() -> None:
    """Let a process that prints into a log of ours print every character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
