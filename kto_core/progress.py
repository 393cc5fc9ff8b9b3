"""Show the progress of long work: a bar on a terminal, a log line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from offline_kto.kto_core.console import is_silent, tell
from offline_kto.kto_core.streams import is_terminal

_SECONDS_BETWEEN_LINES = 10.0
# Rate and time left are shown from then on: those of the first moments say nothing.
_SECONDS_BEFORE_RATE = 5.0
# Weight of the last moments in the rate of a bar: work arrives in lumps.
_SMOOTHING = 0.05


class Progress:
    """Counts units (tokens, bytes) towards a total and shows rate and time left.

    The rate is that since the first units arrived: what came before, such as loading a model, is not part of it.
    """

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._note = self._told = ""
        self._first: tuple[float, int] | None = None  # when the first units arrived, and how many were done then
        self.last_line = time.monotonic()
        self.bar = (
            tqdm(
                total=total,
                desc=description,
                unit=unit,
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=_SMOOTHING,
            )
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
        """Show a few words behind the numbers, until other words replace them; new ones also while nothing is counted."""
        if text != self._note and self.bar is not None:
            self.bar.set_postfix_str(text)
        self._note = text
        if text != self._told:
            self._tell_now_and_then(time.monotonic())

    def skip(self, count: int) -> None:
        """Count units that were done before, so that they are not part of the rate."""
        self.done += count
        if self.bar is not None:
            self.bar.initial += count
            self.bar.n += count
            self.bar.refresh()

    def add(self, count: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self.skip(count)
            self._first = now, self.done
            if self.bar is not None:
                self.bar.unpause()
        else:
            self.done += count
            if self.bar is not None:
                self.bar.update(count)
        self._tell_now_and_then(now)

    def _tell_now_and_then(self, now: float) -> None:
        if self.bar is None and now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line, self._told = now, self._note
            words = [f"{self.done / max(self.total, 1):.0%}", *self._rate(now), *([self._note] if self._note else [])]
            tell(f"{self.description}: {', '.join(words)}")

    def _rate(self, now: float) -> list[str]:
        """Return rate and time left in words; empty if they are not known yet."""
        if self._first is None:
            return []
        since, before = self._first
        if self.done <= before or now - since < _SECONDS_BEFORE_RATE:
            return []
        rate = (self.done - before) / (now - since)
        return [f"{rate:,.0f} {self.unit}/s", f"{(self.total - self.done) / rate:,.0f} s left"]
