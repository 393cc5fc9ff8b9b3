"""Combine the masses of several objectives."""

from collections.abc import Mapping

import numpy as np


def weighted_masses(masses: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return `sum_k w_k (a_k, b_k)`: the masses of rows under a weighting of their objectives.

    This is linear scalarization, the rule of multi-objective RLHF (Rame et al., arXiv 2306.04488) and of
    multi-objective DPO (Zhou et al., arXiv 2310.03708), applied to losses of single rows. A row's loss is linear in its
    masses, so the loss of the weighted masses is the weighted sum of the objectives' losses, all measured from one z0. An
    objective that was not judged in a row has masses (0, 0) and adds nothing.

    Args:
        masses: of each objective, float64, shape (rows, 2).
        weights: of the objectives to use, not negative.

    Returns:
        float64, shape (rows, 2).
    """
    return np.sum([weight * masses[name] for name, weight in weights.items()], axis=0)
