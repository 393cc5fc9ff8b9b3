"""Read and write samples.jsonl, the completions that a run's model gives to held-out prompts; light to import."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.foreign_files import MEGABYTE, read_foreign
from offline_kto.train.run_records import SampleRecord

SAMPLES = "samples.jsonl"

# New tokens of a completion at most.
MOST_NEW_TOKENS = 256

# Limit on an untrusted file, in bytes.
LARGEST_SAMPLES = 64 * MEGABYTE

_KINDS: dict[str, type] = {
    "step": int,
    "prompt_id": str,
    "prompt": str,
    "completion": str,
    "ended": bool,
    "tokens": int,
}


def read_samples(folder: Path, name: str = SAMPLES) -> list[SampleRecord]:
    """Read the samples of a run folder, in the order of the file, without lines that are damaged.

    The texts are untrusted: a model or its users wrote them.

    Returns:
        No record if there is no such file.

    Raises:
        OSError: the file is no regular file, is too large, or cannot be read.
    """
    try:
        content = read_foreign(folder / name, most=LARGEST_SAMPLES)
    except FileNotFoundError:
        return []
    # Split at line feeds alone: `splitlines` would also split at separators that JSON strings may contain.
    lines = content.decode("utf-8", errors="replace").split("\n")
    return [record for line in lines if (record := _parsed(line)) is not None]


def write_samples(path: Path, samples: Sequence[SampleRecord]) -> None:
    """Write samples in order of step. Raises: OSError: it cannot be written; `path` is unchanged."""
    ordered = sorted(samples, key=lambda one: one["step"])
    # As ASCII: half of a character that a model began is no valid Unicode.
    write_text(path, "".join(json.dumps(one) + "\n" for one in ordered))


def _parsed(line: str) -> SampleRecord | None:
    """Return a record, or None for a line that has other fields or types."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not record.keys() >= _KINDS.keys():
        return None
    # A truth value is an int as well.
    if any(type(record[name]) is not kind for name, kind in _KINDS.items()):
        return None
    if record["step"] < 0 or record["tokens"] < 0:
        return None
    return cast("SampleRecord", {name: record[name] for name in _KINDS})
