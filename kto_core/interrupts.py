"""Handle the SIGTERM that schedulers send like Ctrl-C, with the exit codes of a shell: 128 and the signal's number."""

import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def raise_on_sigterm() -> None:
    """Make SIGTERM raise `Terminated` in the main thread."""
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code of a process that an interruption ended."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
