"""The statements of the documentation about GPUs, what would show that they are wrong, and the verdicts of a report."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from gpu_results import Report
from text_table import text_table


@dataclass(frozen=True)
class Claim:
    """A statement of the documentation, and what would show that it is wrong.

    Args:
        value: of a report; None if it was not measured.
        most: the largest value with which the statement holds.
    """

    text: str
    value: Callable[[Report], float | None]
    most: float

    def verdict(self, report: Report) -> list[str]:
        """Return the cells of a line: statement, value, limit, and what follows."""
        found = self.value(report)
        if found is None or report.dry:
            words = "not measured" if found is None else "dry run, no figure"
            return [self.text, "-", f"{self.most:g}", words]
        return [self.text, f"{found:.3g}", f"{self.most:g}", "holds" if found <= self.most else "FALSIFIED"]


def _ratio(key: str, size: str, ours: str, trl: str) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        top, bottom = report.value(f"{size} {ours}", key), report.value(f"{size} {trl}", key)
        return None if top is None or not bottom else top / bottom

    return value


def _time(size: str, trl: str) -> Callable[[Report], float | None]:
    return _ratio("median_seconds", size, "ours auto", trl)


def _memory(size: str, ours: str, trl: str) -> Callable[[Report], float | None]:
    return _ratio("peak_allocated", size, ours, trl)


def _auto_is_safe(report: Report) -> float | None:
    """Return the largest share of the card that a run with --max-tokens auto used; 2 if the allocator had to retry."""
    names = [name for name in report.results if name.endswith("ours auto")]
    total = report.value("facts", "memory")
    if not names or not total:
        return None
    retried = any(report.value(name, "retries") for name in names)
    return 2.0 if retried else max((report.value(name, "peak_reserved") or 0.0) / total for name in names)


def _losses_apart(report: Report) -> float | None:
    """Return how far the losses of two token budgets are apart in the mean of all updates; rounding moves single ones."""
    sides = [report.results.get(f"0.5B {name}", {}).get("losses") for name in ("ours auto", "ours 8192")]
    if not all(sides):
        return None
    return abs(statistics.mean(a - b for a, b in zip(*sides, strict=True)))  # type: ignore[arg-type]


_EQUAL = ("ours 8192", "TRL cached, no checkpointing")

CLAIMS = [
    Claim("0.5B: time / TRL's, cached, its default", _time("0.5B", "TRL cached"), 0.5),
    Claim("1.5B: time / TRL's, cached, its default", _time("1.5B", "TRL cached"), 0.5),
    Claim("0.5B: time / TRL's, live", _time("0.5B", "TRL live"), 0.5),
    Claim("0.5B: memory / TRL's, both without checkpointing", _memory("0.5B", *_EQUAL), 0.5),
    Claim("1.5B: memory / TRL's, both without checkpointing", _memory("1.5B", *_EQUAL), 0.5),
    Claim("0.5B: memory, lean / TRL's default", _memory("0.5B", "ours lean", "TRL cached"), 0.5),
    Claim("1.5B: memory, lean / TRL's default", _memory("1.5B", "ours lean", "TRL cached"), 0.5),
    Claim("8B LoRA: memory / TRL's default", _memory("8B", "ours 8192", "TRL cached"), 0.5),
    Claim("--max-tokens auto: largest share of the card, no retries", _auto_is_safe, 0.95),
    Claim("losses with two token budgets, apart in the mean", _losses_apart, 3e-3),
]


def claims_table(report: Report) -> str:
    """Return the claims and their verdicts as a Markdown table."""
    lines = ["| claim | measured | at most | verdict |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(claim.verdict(report)) + " |" for claim in CLAIMS)])


def side_table(report: Report) -> str:
    """Return one line for each side: seconds of an update, memory, losses."""
    header = ["side", "s an update", "allocated, GiB", "reserved, GiB", "last loss", "tokens a pass"]
    lines = [
        [
            name,
            f"{result['median_seconds']:.3f}",
            _gib(report.value(name, "peak_allocated")),
            _gib(report.value(name, "peak_reserved")),
            f"{result['losses'][-1]:.5f}",
            str(result.get("max_tokens", "-")),
        ]
        for name, result in report.results.items()
        if "median_seconds" in result
    ]
    return text_table(header, lines)


def _gib(found: float | None) -> str:
    return "-" if found is None else f"{found / 2**30:.1f}"
