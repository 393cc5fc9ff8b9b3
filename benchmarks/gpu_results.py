"""Keep the results of one part of the GPU report: each is written when it is there, and none is begun too late."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]


def no_page(report: Report) -> str:
    return ""


@dataclass
class Report:
    """The results of one part, in a JSON file and as a page of tables, which are written after each of them.

    Args:
        path: JSON file; the page is beside it, with the ending `.md`.
        until: when the part has to end, by `time.monotonic()`.
        dry: tiny sizes on the CPU.
        work: folder for models, caches and logs.
        only: regular expression; measurements whose names it is not found in are left out.
        page: makes the tables.
        updates: timed updates of a side.
    """

    path: Path
    until: float
    dry: bool
    work: Path
    results: dict[str, Result] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: bool = False
    only: str = ""
    page: Callable[[Report], str] = no_page
    updates: int = 20
    _longest: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def add(
        self, name: str, measure: Callable[[float], Result], *, needs: float = 20, like: str = "", always: bool = False
    ) -> Result | None:
        """Run a measurement, and return its result; None if it failed or was not begun.

        Args:
            measure: gets the seconds that are left.
            needs: it is not begun if fewer seconds are left.
            like: kind of measurement; nor if the longest one of the kind so far would not fit.
            always: others need it, whatever `only` says.
        """
        if not always and not self.wants(name):
            self.skipped[name] = "left out by --only"
            return None
        needs = max(needs, 1.1 * self._longest.get(like, 0.0))
        if self.left < needs:
            self.skipped[name] = f"{max(0.0, self.left):.0f} s were left, and it needs about {needs:.0f} s"
            self.write()
            return None
        print(f"{name} ({self.left:.0f} s left)", flush=True)
        begun = time.monotonic()
        try:
            self.results[name] = measure(self.left)
        except subprocess.TimeoutExpired as error:
            self.skip(name, f"it did not end within {error.timeout:.0f} s")
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            self.failed = True
            self.skip(name, " ".join(str(error).split())[-600:])
        if like:
            self._longest[like] = max(self._longest.get(like, 0.0), time.monotonic() - begun)
        self.write()
        return self.results.get(name)

    def wants(self, name: str) -> bool:
        """Return whether a measurement was asked for."""
        return re.search(self.only, name) is not None

    def skip(self, name: str, reason: str) -> None:
        """Note why something is not measured."""
        self.skipped[name] = reason
        print(f"  not measured: {reason}", flush=True)

    def write(self) -> None:
        """Write what there is by now."""
        known = {"dry": self.dry, "results": self.results, "skipped": self.skipped}
        self.path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return tables, card and versions, and what was not measured."""
        known = self.results.get("facts") or {}
        where = ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
        dry = "dry run with tiny sizes on the CPU, no figures" if self.dry else ""
        missing = "\n".join(f"not measured: {name}: {reason}" for name, reason in self.skipped.items())
        return "\n\n".join(filter(None, [dry, self.page(self), where, missing])) + "\n"

    def value(self, name: str, key: str) -> float | None:
        """Return a number of a result, if there is one."""
        found = self.results.get(name, {}).get(key)
        return None if found is None else float(found)


def run_python(
    words: Sequence[str | Path],
    *,
    seconds: float,
    log: Path,
    env: Mapping[str, str] | None = None,
    python: Path = Path(sys.executable),
) -> None:
    """Run an interpreter on the source tree, with its output added to a file.

    Raises:
        ValueError: it failed, with the end of its output.
        subprocess.TimeoutExpired: it took too long, and was killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [python, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=settings,
            cwd=ROOT,
            timeout=max(1.0, seconds),
            check=False,
        )
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: {log.read_text(encoding='utf-8', errors='replace')[-600:]}")
