"""Shortcuts that every process of the tests takes: no test outlives its machine, and few read the text of samples."""

import os
import sys

NEW_TOKENS = 4  # of a sample: generating up to 256 takes a quarter of a tiny run


def take_shortcuts() -> None:
    """Flush no file to the disk, and end samples after a few tokens. test_samples.py generates whole ones."""
    os.fsync = _is_open
    if samples := sys.modules.get("offline_kto.train.run.samples"):
        samples.MOST_NEW_TOKENS = NEW_TOKENS  # type: ignore[attr-defined]


def _is_open(descriptor: int) -> None:
    """Fail where `os.fsync` does on a descriptor that is closed. What was written outlives a killed process without it."""
    os.fstat(descriptor)
