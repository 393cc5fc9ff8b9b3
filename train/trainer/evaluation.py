"""Compute the metrics of held-out rows, with 95 % intervals."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offline_kto.kto_core.losses.bootstrap import RESAMPLES, intervals
from offline_kto.kto_core.losses.metrics import right_mass
from offline_kto.train.run_records import EvaluationRecord, MetricInterval
from offline_kto.train.trainer.objective import Objective, RowScores


@dataclass(frozen=True)
class Scores:
    """Scores of held-out rows under the policy; float64 on the host, shape (rows,).

    Attributes:
        prompt_ids: of each row.
        masses: desirable and undesirable mass, shape (rows, 2); a row without mass counts for its objectives alone.
        objectives: masses by the name of an objective, shape (rows, 2) each; empty without objectives.
        tokens: of each completion.
        logps, logratios: nats.
        kl_logratios: of the mismatched completions, nats; None if the loss needs none.
        shift: the reward shift / beta, nats, if the loss has one.
        clipped: sums of clipped ratios, shape (2, rows), if the loss clips ratios.
    """

    prompt_ids: list[str]
    masses: Tensor
    objectives: dict[str, Tensor]
    tokens: Tensor
    logps: Tensor
    logratios: Tensor
    kl_logratios: Tensor | None
    shift: float | None
    clipped: Tensor | None = None

    @property
    def rows(self) -> RowScores:
        """Return the scores that losses are computed from."""
        return RowScores(torch.stack([self.logps, self.logratios, *(() if self.clipped is None else self.clipped)]))

    @property
    def labels(self) -> Tensor:
        """Whether the desirable mass is at least the undesirable one, bool."""
        return self.masses[:, 0] >= self.masses[:, 1]


def held_out_metrics(scores: Scores, objective: Objective) -> dict[str, float]:
    """Return means over all held-out rows with one reference point; a class without mass has no metrics."""
    values = _statistics(scores, objective, torch.ones(1, len(scores.masses), dtype=torch.float64))
    return {name: float(value) for name, value in values.items() if name == "loss" or bool(value.isfinite())}


def summary(scores: Scores, objective: Objective, step: int) -> EvaluationRecord:
    """Return the content of evaluation.json: each metric with its 95 % bootstrap interval over prompts.

    z0 is estimated again in each resample.
    """
    found = intervals(lambda weights: _statistics(scores, objective, weights), scores.prompt_ids)
    metrics: dict[str, MetricInterval] = {}
    for name, value in held_out_metrics(scores, objective).items():
        low, high = found.get(name, (None, None))
        metrics[name] = {"value": value}
        if low is not None and high is not None:
            metrics[name] |= {"low": low, "high": high}
    return {
        "step": step,
        "loss": objective.loss,
        "beta": objective.beta,
        "rows": len(scores.masses),
        "prompts": len(set(scores.prompt_ids)),
        "resamples": RESAMPLES,
        "metrics": metrics,
    }


def summary_lines(found: EvaluationRecord, *, rows: str = "held out") -> list[str]:
    """Return the summary as a table for the console."""
    head = f"{rows:<12}{counted(found['rows'], 'row')} of {counted(found['prompts'], 'prompt')} after "
    with_intervals = any("low" in metric for metric in found["metrics"].values())
    lines = [f"{head}{counted(found['step'], 'update')}" + ", 95 % intervals over prompts" * with_intervals]
    for name, metric in found["metrics"].items():
        between = f"[{metric['low']:.4f}, {metric['high']:.4f}]" if "low" in metric else ""
        lines.append(f"  {name:<18}{metric['value']:>12.4f}  {between}".rstrip())
    return lines


def counted(number: int, what: str) -> str:
    """Return a count with its noun: `1 row`, `2 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _statistics(scores: Scores, objective: Objective, weights: Tensor) -> dict[str, Tensor]:
    """Compute metrics of weighted rows, named as by `offline_kto.kto_core.losses.metrics.metrics_from`.

    Args:
        weights: how often each row counts, shape (samples, rows).

    Returns:
        Shape (samples,) each; not finite if no row of a class was drawn.
    """
    masses = scores.masses.sum(1)
    total = (weights * masses).sum(1)

    def mean(values: Tensor, among: Tensor) -> Tensor:
        chosen = weights * among
        return (chosen * values).sum(1) / chosen.sum(1)

    shown: dict[str, Tensor] = {}
    point = torch.tensor(scores.shift or 0.0, dtype=torch.float64)
    if scores.kl_logratios is not None:
        kl_raw = mean(scores.kl_logratios, masses)
        shown = {"kl": kl_raw.clamp(min=0), "kl_raw": kl_raw}
        point = shown["kl"][:, None]  # (samples, 1)
    losses = objective.losses(scores.rows, scores.masses, scores.tokens, point)
    distances = scores.logratios - objective.midpoints(scores.logratios, point)
    found = {"loss": (weights * losses).sum(1) / total}
    for name, among in zip(("chosen", "rejected"), scores.masses.unbind(1), strict=True):
        found[f"rewards/{name}"] = objective.beta * mean(scores.logratios, among)
        found[f"logps/{name}"] = mean(scores.logps, among)
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    found["accuracy"] = (weights * right_mass(distances, scores.masses)).sum(1) / total
    for name, of_objective in scores.objectives.items():
        good, bad = (objective.beta * mean(scores.logratios, side) for side in of_objective.unbind(1))
        found[f"{name}/accuracy"] = (weights * right_mass(distances, of_objective)).sum(1) / (
            weights * of_objective.sum(1)
        ).sum(1)
        found[f"{name}/rewards/margins"] = good - bad
    return {**found, **shown}
