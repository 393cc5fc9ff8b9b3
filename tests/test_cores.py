"""Cores that a process may use."""

import os
from pathlib import Path

import pytest

from offline_kto.kto_core.cores import usable_cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the control groups of a process with 16 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    (tmp_path / "cpu").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("10000 100000", 1),
        ("max 100000", 16),
        ("6400000 100000", 16),
        ("", 16),
    ],
)
def test_the_quota_of_a_container_counts(groups: Path, quota: str, cores: int) -> None:
    (groups / "cpu.max").write_text(quota)
    assert usable_cores(groups) == cores


@pytest.mark.parametrize(("quota", "cores"), [("400000", 4), ("-1", 16)])
def test_the_quota_of_an_older_kernel_counts(groups: Path, quota: str, cores: int) -> None:
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cores(groups) == cores


def test_without_control_groups_the_affinity_counts(groups: Path) -> None:
    assert usable_cores(groups / "none") == 16
