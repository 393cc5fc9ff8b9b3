"""Write lines for the user through `logging`, so that a calling program decides where they are shown.

The logger is `offline_kto`. The commands print its lines on standard output (`shown_lines`). From Python nothing is
printed unless `logging` is set up, or a function of the API prints its own lines.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.redaction import hidden

LOGGER = logging.getLogger("offline_kto")


def tell(line: str, level: int = logging.INFO) -> None:
    """Log a line. Control characters in it are escaped and secrets are masked, because names in it are untrusted."""
    LOGGER.log(level, "%s", printable(hidden(line)))


def warn(line: str) -> None:
    """Log a warning, with the heading `warning`."""
    tell(f"warning     {line}", logging.WARNING)


def is_silent() -> bool:
    """Return whether the user asked for no log lines and no progress bars."""
    return not LOGGER.isEnabledFor(logging.INFO)


class _Lines(logging.Handler):
    """A logging handler that prints each line at once on the current standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        # Exceptions are not caught: a full or closed output must end the command.
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # `tqdm.write` keeps its bars below the lines
        write = print if tqdm is None or not getattr(tqdm, "_instances", None) else tqdm.write
        write(record.getMessage())
        print(end="", flush=True)


@contextlib.contextmanager
def shown_lines() -> Iterator[None]:
    """Print log lines on standard output while the block runs. An inner block has no effect."""
    if any(isinstance(handler, _Lines) for handler in LOGGER.handlers):
        yield
        return
    handler, level, propagates = _Lines(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    if level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # otherwise a root handler would show them a second time
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates
