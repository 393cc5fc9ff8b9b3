"""Count the cores that this process may use."""

import math
import os
from pathlib import Path

# The quota and the period of a container, in microseconds; "max" and -1 are no quota. Of control groups 2 and 1.
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def usable_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores that this process may use: of its affinity and, in a container, of its quota.

    Args:
        groups: folder of the control group.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(max(1, min(cores, *(_quota(groups, names) for names in _QUOTAS))))


def _quota(groups: Path, names: tuple[str, ...]) -> float:
    try:
        quota, period = map(int, " ".join((groups / name).read_text(encoding="utf-8") for name in names).split())
    except (OSError, ValueError):  # no file, or "max"
        return math.inf
    return math.ceil(quota / period) if quota > 0 and period > 0 else math.inf
