"""Compute the metrics of groups of held-out rows: by prompt length, class, objective and source file.

A group is a set of masses: those of its rows, and 0 elsewhere. All groups share the reference point of the whole set, as the
loss does, and their values are sums over rows, so that one pass computes all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.losses.bootstrap import interval, replicates
from offline_kto.kto_core.losses.metrics import on_the_right_side
from offline_kto.kto_core.losses.preference_losses import pair_masses
from offline_kto.train.data.cache_rows import SourceFiles
from offline_kto.train.run_records import GroupRecord
from offline_kto.train.trainer.evaluation import Scores, common_point
from offline_kto.train.trainer.objective import Objective

# Files that are listed, those with most rows.
_MOST_FILES = 20

# Rows up to which intervals are computed; beyond, they are narrow, and resampling takes long.
_MOST_RESAMPLED = 10_000

_QUARTILES = (0.25, 0.5, 0.75)


class _Group(NamedTuple):
    by: str
    name: str
    masses: Tensor  # float64, shape (rows, 2)


def held_out_groups(
    scores: Scores, before: Scores | None, objective: Objective, files: SourceFiles | None = None
) -> list[GroupRecord]:
    """Return the metrics of each group; of a kind with a single group, none.

    Args:
        before: of the same rows before training; None if they are not known.
        files: of the rows; None if they are not known, or all the same.
    """
    groups = [*_by_length(scores), *_by_class(scores), *_by_objective(scores), *_by_file(scores, files)]
    groups = [group for group in groups if group.masses.any()]
    if not groups:
        return []
    now = _with_loss(scores, objective, groups)
    then = None if before is None else _with_loss(before, objective, groups)
    drawn: dict[str, Tensor] = {}
    if len(scores.masses) <= _MOST_RESAMPLED:
        drawn = replicates(lambda weights: _by_number(_values(scores, objective, groups, weights)), scores.prompts)
    return [_record(number, group, now, then, drawn) for number, group in enumerate(groups)]


def _by_length(scores: Scores) -> list[_Group]:
    """Return the quartiles of the prompts' lengths, over rows."""
    if scores.prompt_tokens is None:
        return []
    lengths = scores.prompt_tokens.numpy()
    quartile = np.searchsorted(np.quantile(lengths, _QUARTILES), lengths)  # equal lengths are in one group
    found = []
    for number in np.unique(quartile):
        inside = quartile == number
        low, high = int(lengths[inside].min()), int(lengths[inside].max())
        name = f"{low:,} to {high:,} tokens" if low < high else counted(low, "token")
        found.append(_Group("prompt length", name, _inside(scores, inside)))
    return found if len(found) > 1 else []


def _by_class(scores: Scores) -> list[_Group]:
    sides = torch.eye(2, dtype=torch.float64)
    names = ("desirable", "undesirable")
    if not scores.masses.any(0).all():
        return []
    return [_Group("class", name, scores.masses * side) for name, side in zip(names, sides, strict=True)]


def _by_objective(scores: Scores) -> list[_Group]:
    return [_Group("objective", name, masses) for name, masses in scores.objectives.items()]


def _by_file(scores: Scores, files: SourceFiles | None) -> list[_Group]:
    if files is None:
        return []
    rows = np.bincount(files.numbers, minlength=len(files.names))
    most = np.argsort(-rows, kind="stable")[:_MOST_FILES]
    named = sorted((files.names[number], number) for number in most[rows[most] > 0].tolist())
    found = [_Group("source file", name, _inside(scores, files.numbers == number)) for name, number in named]
    return found if len(found) > 1 else []


def _inside(scores: Scores, inside: np.ndarray) -> Tensor:
    return scores.masses * torch.from_numpy(inside)[:, None]


def _with_loss(scores: Scores, objective: Objective, groups: Sequence[_Group]) -> dict[str, Tensor]:
    """Return accuracy, margin and loss of each group, shape (1, groups) each; one after another, for the memory."""
    found: dict[str, list[Tensor]] = {}
    for one in groups:
        loss = _losses(scores, objective, [one]) / one.masses.sum()
        for name, value in {**_values(scores, objective, [one], _once(scores)), "loss": loss[None]}.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values, 1) for name, values in found.items()}


def _values(scores: Scores, objective: Objective, groups: Sequence[_Group], weights: Tensor) -> dict[str, Tensor]:
    """Return accuracy and margin of each group, shape (samples, groups) each; not finite where there are no rows.

    Args:
        weights: how often each row counts, shape (samples, rows).
    """
    desirable, undesirable = (torch.stack([one.masses[:, side] for one in groups], 1) for side in (0, 1))
    point = common_point(scores, weights)
    distances = scores.logratios - objective.midpoints(scores.logratios, point)
    # A row is on the right side with its desirable mass, or else with its undesirable one, and at the point with half of each.
    right = (weights * on_the_right_side(distances)) @ (desirable - undesirable) + weights @ undesirable
    total = weights @ (desirable + undesirable)
    rewards = objective.beta * scores.logratios[:, None]
    good, bad = ((weights @ (rewards * side)) / (weights @ side) for side in (desirable, undesirable))
    return {"accuracy": right / total, "margin": good - bad}


def _losses(scores: Scores, objective: Objective, groups: Sequence[_Group]) -> Tensor:
    """Return the sum of losses of each group, shape (groups,); a row's loss is linear in its masses."""
    point = common_point(scores, _once(scores))
    sides = [side.expand_as(scores.masses) for side in torch.eye(2, dtype=torch.float64)]
    desirable, undesirable = (objective.losses(scores.rows, side, scores.tokens, point).flatten() for side in sides)
    if objective.rows_in_unit == 2:  # both rows have the pair's loss
        return desirable @ torch.stack([pair_masses(one.masses).repeat_interleave(2) for one in groups], 1)
    return torch.stack([desirable @ one.masses[:, 0] + undesirable @ one.masses[:, 1] for one in groups])


def _once(scores: Scores) -> Tensor:
    """Return the weights of each row drawn once, shape (1, rows)."""
    return torch.ones(1, len(scores.masses), dtype=torch.float64)


def _by_number(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of each group under its own name, as the bootstrap takes them."""
    return {
        f"{name} {number}": column for name, all_groups in values.items() for number, column in enumerate(all_groups.T)
    }


def _record(
    number: int, group: _Group, now: dict[str, Tensor], then: dict[str, Tensor] | None, drawn: dict[str, Tensor]
) -> GroupRecord:
    found: dict[str, object] = {
        "by": group.by,
        "group": group.name,
        "rows": int((group.masses.sum(1) > 0).sum()),
        **{name: _finite(values[0, number]) for name, values in now.items()},
    }
    for name in ("accuracy", "margin"):
        ends = interval(drawn[f"{name} {number}"]) if drawn and found[name] is not None else None
        if ends is not None:
            found[f"{name}_low"], found[f"{name}_high"] = ends
    if then is not None:
        found |= {f"{name}_before": _finite(values[0, number]) for name, values in then.items()}
    return found  # type: ignore[return-value]


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
