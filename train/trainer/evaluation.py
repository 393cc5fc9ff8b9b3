"""Compute the metrics of held-out rows, with 95 % intervals, and their changes since before training."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.losses.bootstrap import RESAMPLES, expanded_level, interval, replicates
from offline_kto.kto_core.losses.metrics import right_mass
from offline_kto.kto_core.losses.preference_losses import sft_losses
from offline_kto.kto_core.losses.verdict import LEAST_MARGIN, LEAST_PROMPTS, Change, Verdict, judge
from offline_kto.train.diagnostics.outcome import Tried, advice
from offline_kto.train.run_records import EvaluationRecord, MetricInterval, VerdictRecord
from offline_kto.train.trainer.objective import Objective, RowScores

# How the name of an objective's margin ends: `helpful/rewards/margins`.
_MARGIN_OF = "/rewards/margins"


@dataclass(frozen=True)
class Scores:
    """Scores of held-out rows under the policy; float64 on the host, shape (rows,).

    Attributes:
        prompts: number of each row's prompt, int32, shape (rows,); equal for equal prompts.
        masses: desirable and undesirable mass, shape (rows, 2); a row without mass counts for its objectives alone.
        objectives: masses by the name of an objective, shape (rows, 2) each; empty without objectives.
        tokens: of each completion.
        logps, logratios: nats.
        kl_logratios: of the mismatched completions, nats; None if the loss needs none.
        shift: the reward shift / beta, nats, if the loss has one.
        clipped: sums of clipped ratios, shape (2, rows), if the loss clips ratios.
        prompt_tokens: of each prompt; None if they are not known.
    """

    prompts: np.ndarray
    masses: Tensor
    objectives: dict[str, Tensor]
    tokens: Tensor
    logps: Tensor
    logratios: Tensor
    kl_logratios: Tensor | None
    shift: float | None
    clipped: Tensor | None = None
    prompt_tokens: Tensor | None = None

    @property
    def rows(self) -> RowScores:
        """Return the scores that losses are computed from."""
        return RowScores(torch.stack([self.logps, self.logratios, *(() if self.clipped is None else self.clipped)]))

    @property
    def labels(self) -> Tensor:
        """Return whether the desirable mass is at least the undesirable one, bool."""
        return self.masses[:, 0] >= self.masses[:, 1]

    @property
    def prompts_of_class(self) -> int:
        """Number of distinct prompts of the class that has fewer of them; a class without rows does not count."""
        of_class = [len(np.unique(self.prompts[mass.numpy() != 0])) for mass in self.masses.unbind(1)]
        return min(count for count in of_class if count)


def held_out_metrics(scores: Scores, objective: Objective) -> dict[str, float]:
    """Return means over all held-out rows with one reference point; a class without mass has no metrics."""
    values = _statistics(scores, objective, torch.ones(1, len(scores.masses), dtype=torch.float64))
    return {name: float(value) for name, value in values.items() if name == "loss" or bool(value.isfinite())}


def summary(
    scores: Scores, objective: Objective, step: int, before: Scores | None = None, tried: Tried | None = None
) -> EvaluationRecord:
    """Return the content of evaluation.json: each metric with its 95 % bootstrap interval over prompts, and the verdict.

    z0 is estimated again in each resample.

    Args:
        before: of the same rows before training; None if they are not known, which leaves the verdict open.
        tried: the options that the verdict's advice depends on.
    """
    drawn = replicates(lambda weights: _statistics(scores, objective, weights), scores.prompts)
    then: dict[str, MetricInterval] = {}
    changes: dict[str, Change] = {}
    verdict, tried = None, tried or Tried()
    if before is not None:
        then = with_intervals(
            held_out_metrics(before, objective),
            replicates(lambda weights: _statistics(before, objective, weights), before.prompts),
        )
        changes = changes_since(before, scores, objective)
        verdict = verdict_on(changes, scores)
        tried = replace(tried, margin=changes["rewards/margins"].value if "rewards/margins" in changes else None)
    return {
        "step": step,
        "loss": objective.loss,
        "beta": objective.beta,
        "rows": len(scores.masses),
        "prompts": len(np.unique(scores.prompts)),
        "resamples": RESAMPLES,
        "metrics": with_intervals(held_out_metrics(scores, objective), drawn),
        "before": then,
        "change": {name: _as_interval(change.value, change.low, change.high) for name, change in changes.items()},
        "verdict": None if verdict is None else _verdict_record(verdict, tried),
    }


def with_intervals(values: dict[str, float], drawn: dict[str, Tensor]) -> dict[str, MetricInterval]:
    """Return values with the 95 % intervals of their replicates."""
    found = {name: interval(drawn[name]) if name in drawn else None for name in values}
    return {name: _as_interval(value, *(found[name] or (None, None))) for name, value in values.items()}


def changes_since(
    before: Scores, after: Scores, objective: Objective, *, resamples: int = RESAMPLES
) -> dict[str, Change]:
    """Return the change of each metric between two scorings of the same rows, with its paired 95 % interval.

    Both are computed in the same samples of prompts, so what makes a prompt hard for both cancels. The intervals are
    expanded for few prompts.
    """
    then, now = held_out_metrics(before, objective), held_out_metrics(after, objective)

    def difference(weights: Tensor) -> dict[str, Tensor]:
        old, new = (_statistics(scores, objective, weights) for scores in (before, after))
        return {name: new[name] - old[name] for name in new}

    drawn = replicates(difference, after.prompts, resamples=resamples)
    level = expanded_level(max(2, after.prompts_of_class))
    found = {name: interval(drawn[name], level=level) if name in drawn else None for name in now}
    return {
        name: Change(value - then[name], *(found[name] or (None, None))) for name, value in now.items() if name in then
    }


def drawn_values(scores: Scores, objective: Objective, metric: str) -> list[float]:
    """Return the bootstrap replicates of a metric; those of two models on the same prompts are paired."""
    drawn = replicates(lambda weights: {metric: _statistics(scores, objective, weights)[metric]}, scores.prompts)
    return drawn[metric].tolist() if drawn else []


def verdict_on(changes: dict[str, Change], scores: Scores) -> Verdict:
    """Return the verdict on the changes of held-out values since before training, with the objectives that got worse."""
    verdict = judge(
        margin=changes.get("rewards/margins"),
        loss=changes["loss"],
        desirable=changes.get("rewards/chosen"),
        prompts=scores.prompts_of_class,
    )
    worse = [
        f"the margin of {name.removesuffix(_MARGIN_OF)} fell by {change.without_sign}"
        for name, change in changes.items()
        if name.endswith(_MARGIN_OF) and change.is_below(LEAST_MARGIN)
    ]
    if scores.prompts_of_class < LEAST_PROMPTS:
        return verdict
    return replace(verdict, reason="; ".join([verdict.reason, *worse]))


def _verdict_record(verdict: Verdict, tried: Tried) -> VerdictRecord:
    return {
        "outcome": verdict.outcome,
        "by": verdict.by,
        "reason": verdict.reason,
        "next": advice(verdict, tried),
    }


def _as_interval(value: float, low: float | None, high: float | None) -> MetricInterval:
    return {"value": value} if low is None or high is None else {"value": value, "low": low, "high": high}


def summary_lines(found: EvaluationRecord, *, rows: str = "held out") -> list[str]:
    """Return the summary as a table for the console."""
    head = f"{rows:<12}{counted(found['rows'], 'row')} of {counted(found['prompts'], 'prompt')} after "
    with_intervals = any("low" in metric for metric in found["metrics"].values())
    lines = [f"{head}{counted(found['step'], 'update')}" + ", 95 % intervals over prompts" * with_intervals]
    for name, metric in found["metrics"].items():
        between = f"[{metric['low']:.4f}, {metric['high']:.4f}]" if "low" in metric else ""
        then = found["before"].get(name)
        before = f"before training {then['value']:.4f}" if then else ""
        lines.append(f"  {name:<18}{metric['value']:>12.4f}  {between:<20}  {before}".rstrip())
    return lines


def verdict_lines(found: EvaluationRecord | None) -> list[str]:
    """Return the verdict and what to try next for the console.

    Args:
        found: None without held-out rows.
    """
    if found is None:
        return [
            "verdict     none: no rows were held out. --eval-fraction 0.1 holds out a tenth of the prompts, and the run then says "
            "whether the model is better than before training"
        ]
    verdict = found["verdict"]
    if verdict is None:
        return ["verdict     none: held-out values before training are not known"]
    than = "from" if verdict["outcome"] == "no difference" else "than"
    prompts = counted(found["prompts"], "held-out prompt")
    return [
        f"verdict     {verdict['outcome']} {than} before training: {verdict['reason']} (95 %, paired, {prompts})",
        f"next        {verdict['next']}",
    ]


def reference_points(scores: Scores, objective: Objective) -> Tensor:
    """Return the log-ratio at which each row counts as neither desirable nor undesirable, nats, shape (rows,)."""
    once = torch.ones(1, len(scores.masses), dtype=torch.float64)
    midpoints = objective.midpoints(scores.logratios, common_point(scores, once))
    return midpoints.expand(1, len(scores.masses))[0]


def common_point(scores: Scores, weights: Tensor) -> Tensor:
    """Return the point that the loss measures all rows from, nats: z0 for each sample, the reward shift, or 0.

    Args:
        weights: how often each row counts, shape (samples, rows).

    Returns:
        Shape (samples, 1), or a scalar.
    """
    if scores.kl_logratios is None:
        return torch.tensor(scores.shift or 0.0, dtype=torch.float64)
    chosen = weights * scores.masses.sum(1)
    return ((chosen * scores.kl_logratios).sum(1) / chosen.sum(1)).clamp(min=0)[:, None]


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
    if scores.kl_logratios is not None:
        kl_raw = mean(scores.kl_logratios, masses)
        shown = {"kl": kl_raw.clamp(min=0), "kl_raw": kl_raw}
    point = common_point(scores, weights)
    losses = objective.losses(scores.rows, scores.masses, scores.tokens, point)
    distances = scores.logratios - objective.midpoints(scores.logratios, point)
    found = {"loss": (weights * losses).sum(1) / total}
    for name, among in zip(("chosen", "rejected"), scores.masses.unbind(1), strict=True):
        found[f"rewards/{name}"] = objective.beta * mean(scores.logratios, among)
        found[f"logps/{name}"] = mean(scores.logps, among)
    if objective.sft_weight:
        found["nll"] = mean(sft_losses(scores.logps, scores.tokens), scores.masses[:, 0])
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    found["accuracy"] = (weights * right_mass(distances, scores.masses)).sum(1) / total
    for name, of_objective in scores.objectives.items():
        good, bad = (objective.beta * mean(scores.logratios, side) for side in of_objective.unbind(1))
        found[f"{name}/accuracy"] = (weights * right_mass(distances, of_objective)).sum(1) / (
            weights * of_objective.sum(1)
        ).sum(1)
        found[f"{name}/rewards/margins"] = good - bad
    return {**found, **shown}
