"""Compute bootstrap confidence intervals. Rows of one prompt are drawn together, because they are not independent."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000

# Weights in memory at a time: 4 MB of float64. A statistic takes several times as much.
_ELEMENTS = 2**19


def intervals(
    statistic: Callable[[Tensor], dict[str, Tensor]],
    clusters: Sequence[str] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of statistics of weighted rows (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic, clusters, resamples, seed: as for `replicates`.
        level: coverage.

    Returns:
        (low, high) by name; empty if there are fewer than two clusters. A value that is not finite in most samples is
        left out.
    """
    drawn = replicates(statistic, clusters, resamples=resamples, seed=seed)
    found = {name: interval(values, level=level) for name, values in drawn.items()}
    return {name: ends for name, ends in found.items() if ends is not None}


def replicates(
    statistic: Callable[[Tensor], dict[str, Tensor]],
    clusters: Sequence[str] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the values of statistics in bootstrap samples, shape (resamples,) each, by name.

    Two models that are scored on rows of the same prompts are compared in the same samples, so the difference of their
    values is a paired one.

    Args:
        statistic: maps weights, float64, shape (samples, rows), which count how often each row was drawn, to values
            of shape (samples,), by name; not finite for a sample without the rows that the value needs.
        clusters: cluster of each row: the number or name of its prompt. Whole clusters are drawn, with replacement, as many
            as there are.
        resamples: samples drawn.
        seed: of the draws.

    Returns:
        Empty if there are fewer than two clusters.
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
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def interval(values: Tensor, *, level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval of a statistic's replicates; None if most of them are not finite."""
    finite = values[values.isfinite()]
    if 2 * len(finite) <= len(values):
        return None
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(finite, ends).tolist()
    return low, high


def expanded_level(clusters: int, *, level: float = 0.95) -> float:
    """Return the level at which a percentile interval of few clusters covers as often as `level` says.

    A percentile interval is too narrow for few clusters: by sqrt((n - 1) / n), and by the quantile of a normal distribution
    in place of Student's (Hesterberg 2015, The American Statistician 69, section 4.2.2, "expanded percentile interval").

    Args:
        clusters: at least 2.
        level: wanted coverage.
    """
    normal = NormalDist()
    quantile = _student_quantile((1 + level) / 2, clusters - 1) * math.sqrt(clusters / (clusters - 1))
    return 2 * normal.cdf(quantile) - 1


def _student_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t (Abramowitz and Stegun 26.7.5); right to 0.003 from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
