"""Lines for people: through `logging`, so that a program that calls this one decides where they go.

The logger is `offline_kto`. The commands show its lines on standard output (`shown_lines`); from Python nothing is shown
unless `logging` is set up, or a function of the API is left to show its own.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.redaction import hidden

LOGGER = logging.getLogger("offline_kto")


def tell(line: str, level: int = logging.INFO) -> None:
    """Log a line. Names in it may come from anybody: nothing in them drives the terminal, no secret is shown."""
    LOGGER.log(level, "%s", printable(hidden(line)))


def warn(line: str) -> None:
    """Log a warning, under its heading."""
    tell(f"warning     {line}", logging.WARNING)


def is_silent() -> bool:
    """Return whether the user asked for silence: no lines, and no progress bars."""
    return not LOGGER.isEnabledFor(logging.INFO)


class _Lines(logging.Handler):
    """Writes each line to standard output at once, whatever stands in its place at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        # Exceptions pass: a full or closed output must end the command.
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # whose bars stay below the lines
        write = print if tqdm is None or not getattr(tqdm, "_instances", None) else tqdm.write
        write(record.getMessage())
        print(end="", flush=True)


@contextlib.contextmanager
def shown_lines() -> Iterator[None]:
    """Show lines on standard output while the block runs. Does nothing inside of another such block."""
    if any(isinstance(handler, _Lines) for handler in LOGGER.handlers):
        yield
        return
    handler, level, propagates = _Lines(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    if level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a root handler would show them a second time
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates
