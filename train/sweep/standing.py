"""Say which trials are better than the untrained model, and which the best one cannot be told from."""

from collections.abc import Sequence

import torch

from offline_kto.kto_core.losses.bootstrap import expanded_level, interval
from offline_kto.kto_core.losses.verdict import LEAST_PROMPTS
from offline_kto.train.sweep.study import StoredResult, TrialRecord


def better_trials(records: Sequence[TrialRecord]) -> list[int]:
    """Return the numbers of the trials whose verdict is that they are better than before training."""
    return [one.number for one in records if (found := one.result.get("verdict")) and found["outcome"] == "better"]


def tied_trials(records: Sequence[TrialRecord], best: TrialRecord | None) -> list[int]:
    """Return the numbers of the complete trials that the best one cannot be told from.

    All trials are evaluated on the same held-out rows, in the same bootstrap samples of their prompts: the interval of the
    difference is a paired one.
    """
    complete = [one for one in records if one.state == "complete" and best is not None and one.number != best.number]
    return [one.number for one in complete if best is not None and not _differ(best.result, one.result)]


def _differ(first: StoredResult, second: StoredResult) -> bool:
    """Return whether two trials differ beyond chance; not if that is unknown, as for trials of older versions."""
    values, others = first.get("draws") or [], second.get("draws") or []
    prompts = first.get("prompts") or 0
    # A loss of pairs leaves out rows, so its trials may be evaluated on other ones.
    if not values or len(values) != len(others) or prompts < LEAST_PROMPTS or prompts != second.get("prompts"):
        return False
    difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    ends = interval(difference, level=expanded_level(prompts))
    return ends is not None and not ends[0] <= 0 <= ends[1]
