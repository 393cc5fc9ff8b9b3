"""Compute bootstrap confidence intervals. Rows of one prompt are drawn together, because they are not independent."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000

# Weights in memory at a time: 32 MB of float64.
_ELEMENTS = 2**22


def intervals(
    statistic: Callable[[Tensor], dict[str, Tensor]],
    clusters: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of statistics of weighted rows (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic: maps weights, float64, shape (samples, rows), which count how often each row was drawn, to values
            of shape (samples,), by name; not finite for a sample without the rows that the value needs.
        clusters: cluster of each row: its prompt. Whole clusters are drawn, with replacement, as many as there are.
        resamples: samples drawn.
        level: coverage.
        seed: of the draws.

    Returns:
        (low, high) by name; empty if there are fewer than two clusters. A value that is not finite in most samples is
        left out.
    """
    names, of_row = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return {}
    rng = np.random.default_rng(seed)
    at_once = max(1, min(resamples, _ELEMENTS // max(len(of_row), len(names))))
    found: dict[str, list[Tensor]] = {}
    for start in range(0, resamples, at_once):
        samples = min(at_once, resamples - start)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
        for name, values in statistic(torch.from_numpy(drawn[:, of_row].astype(np.float64))).items():
            found.setdefault(name, []).append(values)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    result = {}
    for name, pieces in found.items():
        values = torch.cat(pieces)
        values = values[values.isfinite()]
        if 2 * len(values) > resamples:
            low, high = torch.quantile(values, ends).tolist()
            result[name] = (low, high)
    return result
