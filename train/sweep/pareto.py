"""Find the Pareto front of a sweep: the trials that no other trial beats in every objective."""

import re
from collections.abc import Mapping, Sequence

# A margin of an objective, as `eval/helpful/rewards/margins`.
_MARGIN = re.compile(r"eval/(.+)/rewards/margins")


def pareto_front(metrics: Sequence[Mapping[str, float]]) -> list[int] | None:
    """Return the positions of the trials on the Pareto front of the objectives' held-out margins.

    A trial is on the front if no other has a margin at least as large for every objective, and a larger one for some.
    A trial that lacks a margin is not on it.

    Args:
        metrics: held-out metrics of each trial.

    Returns:
        None if there are fewer than two objectives.
    """
    names = sorted({name for one in metrics for name in one if _MARGIN.fullmatch(name)})
    if len(names) < 2:
        return None
    margins = {i: tuple(one[name] for name in names) for i, one in enumerate(metrics) if all(n in one for n in names)}
    return [i for i, mine in margins.items() if not any(_dominates(other, mine) for other in margins.values())]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
