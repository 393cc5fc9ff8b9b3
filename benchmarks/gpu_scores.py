"""Compare two caches of reference scores of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_results import Report
from text_table import text_table

_KEYS = ("mean", "signed_mean", "p95", "largest")


def read_scores(cache: Path) -> dict[int, tuple[float, int]]:
    """Return (nats, tokens) of each labelled row."""
    from pyarrow import parquet

    rows = [
        row for shard in sorted((cache / "train").glob("*.parquet")) for row in parquet.read_table(shard).to_pylist()
    ]
    return {row["source"]: (row["ref_logps"], len(row["completion_ids"])) for row in rows}


def apart(one: dict[int, tuple[float, int]], other: dict[int, tuple[float, int]]) -> dict[str, Any]:
    """Return mean, signed mean, 95th percentile and largest of the differences, nats a token."""
    signed = [(other[row][0] - nats) / tokens for row, (nats, tokens) in one.items()]
    size = sorted(map(abs, signed))
    values = (sum(size) / len(size), sum(signed) / len(signed), size[int(0.95 * (len(size) - 1))], size[-1])
    return dict(zip(_KEYS, values, strict=True))


def numerics_table(report: Report) -> str:
    """Return one line for each comparison of scores."""
    rows = [
        [name.removeprefix("numerics: "), *(f"{result[key]:.1e}" for key in _KEYS)]
        for name, result in report.results.items()
        if name.startswith("numerics: ")
    ]
    return text_table(["nats a token", *_KEYS], rows)
