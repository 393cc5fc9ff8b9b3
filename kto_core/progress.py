"""Show the progress of long work: a bar on a terminal, a log line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from offline_kto.kto_core.console import is_silent, tell
from offline_kto.kto_core.streams import is_terminal

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts units (tokens, bytes) towards a total and shows rate and time left."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._note = ""
        self.started = self.last_line = time.monotonic()
        self.bar = (
            tqdm(total=total, desc=description, unit=unit, unit_scale=True, dynamic_ncols=True)
            if is_terminal(sys.stderr) and not is_silent()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def note(self, text: str) -> None:
        """Show a few words behind the numbers, until other words replace them."""
        if text == self._note:
            return
        self._note = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def add(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            return
        now = time.monotonic()
        if now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate if rate else 0.0
            tell(
                f"{self.description}: {self.done / max(self.total, 1):.0%}, {rate:,.0f} {self.unit}/s, "
                f"{left:,.0f} s left{', ' if self._note else ''}{self._note}"
            )
