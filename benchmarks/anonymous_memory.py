"""Measure the anonymous memory of a process. Mapped files are left out: the system takes their pages back when it needs them."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def anonymous_bytes(process: int | None = None) -> int:
    """Return the anonymous memory of a process, 0 if it has ended.

    Args:
        process: its id, on Linux; None for this process, whose peak of resident memory stands in on other systems.
    """
    status = Path(f"/proc/{process or 'self'}/status")
    if process is None and not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@contextmanager
def sampled_peak(process: int | None = None, *, every: float = 0.01) -> Iterator[list[int]]:
    """Yield a list that holds the most bytes of anonymous memory of a process that a thread has seen so far.

    Args:
        process: as for `anonymous_bytes`.
        every: seconds between two samples.
    """
    peak, done = [anonymous_bytes(process)], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], anonymous_bytes(process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous_bytes(process))
