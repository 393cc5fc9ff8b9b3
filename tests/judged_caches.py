"""Caches whose rows are judged by masses, made from a scored cache without a forward pass."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from offline_kto.kto_core.cache.labels_hash import labels_hash_of
from offline_kto.kto_core.cache.manifest import read_manifest, write_manifest
from offline_kto.kto_core.cache.manifest_fields import OptionalEntries, Sections
from offline_kto.kto_core.cache.shards import shard_name, write_shard
from offline_kto.kto_core.cache.table_rows import Rows

Row = dict[str, Any]


def rows_in(cache: Path) -> list[Row]:
    """Return the rows of a cache, in order."""
    return [dict(row) for path in sorted((cache / "train").glob("*.parquet")) for row in Rows(pq.read_table(path))]


def judged(row: Row, desirable: float, undesirable: float, **objectives: tuple[float, float]) -> Row:
    """Return a row with masses, and the label that agrees with them."""
    found = {**row, "label": desirable >= undesirable, "desirable_mass": desirable, "undesirable_mass": undesirable}
    if objectives:
        found["objectives"] = {
            name: {"desirable": good, "undesirable": bad} for name, (good, bad) in objectives.items()
        }
    return found


def rewritten(cache: Path, out: Path, change: Callable[[int, Row], list[Row]]) -> Path:
    """Write a cache with other rows: what `change` makes of each row and its number.

    The masses are in all rows or in none.
    """
    manifest = read_manifest(cache)
    rows = [new for number, row in enumerate(rows_in(cache)) for new in change(number, row)]
    (out / "train").mkdir(parents=True)
    path = out / shard_name(0)
    write_shard(path, rows, {"number": 0})  # type: ignore[arg-type]
    entry = {"file": shard_name(0), "rows": len(rows), "bytes": path.stat().st_size}
    optional = _optional(rows[0])
    sections: Sections = {
        "reference": manifest.reference,
        "tokenizer": manifest.tokenizer,
        "tokenization": manifest.tokenization,
        "pairing": manifest.pairing,
        "scorer": manifest.scorer,
        "data": {
            **manifest.data,
            "kept": len(rows),
            "desirable": sum(row["label"] for row in rows),
            "undesirable": sum(not row["label"] for row in rows),
            "labels_hash": labels_hash_of([path], optional.get("columns", [])),
        },
        "run": manifest.run,
    }
    shard = {**entry, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_manifest(out, sections, [shard], manifest.fingerprint, optional=optional)  # type: ignore[list-item]
    return out


def _optional(row: Row) -> OptionalEntries:
    columns = [name for name in ("desirable_mass", "undesirable_mass", "objectives") if name in row]
    if not columns:
        return {}
    return {"columns": columns, "judgements": {"objectives": [*row["objectives"]]} if "objectives" in row else {}}
