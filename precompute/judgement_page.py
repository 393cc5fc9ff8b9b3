"""Describe the judgements of a plan to the user: masses, votes with their agreement, weights and objectives."""

from collections.abc import Iterator

import numpy as np

from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.judgements import Masses
from offline_kto.precompute.feedback.agreement import RELIABLE, TENTATIVE, agreement_in_words
from offline_kto.precompute.plan import Plan, PlanCounts

# Fewer unanimous rows of a class, or prompts of them, are no data to train on.
_FEWEST_UNANIMOUS = 2


def judgements_in_words(plan: Plan, counts: PlanCounts) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the plan's lines about judgements; none if every row is one bit without votes."""
    for name, agreement in sorted(plan.feedback.found.agreement.items()):
        of = f"{name}: " if name else ""
        yield "votes", f"{of}{agreement_in_words(agreement)} (--votes {plan.feedback.label_rule.votes})"
    for name, masses in counts.objectives.items():
        judged = int((plan.rows.judgements.objectives[name].sum(axis=1) > 0).sum())
        others = sorted((reason, n) for (one, reason), n in plan.feedback.found.not_judged.items() if one == name)
        not_judged = "".join(f", left out in {counted(n, 'row')}: {reason}" for reason, n in others)
        yield (
            "objective",
            f"{name}: {judged:,} of {counted(counts.kept, 'row')} judged, {masses_in_words(masses)}{not_judged}",
        )
    if plan.weights:
        yield "weights", plan.weights.in_words()
    if plan.mass_columns:
        yield "masses", f"{masses_in_words(counts.masses)} in total"


def warnings_about_judgements(plan: Plan) -> list[str]:
    """Return warnings about raters who agree too little, and about weights."""
    found = []
    for name, agreement in sorted(plan.feedback.found.agreement.items()):
        alpha = agreement.alpha()
        if alpha is not None and alpha < TENTATIVE:
            of = f" about {name}" if name else ""
            found.append(
                f"the raters agree little{of}: Krippendorff's alpha is {alpha:.2f}, where 1 is full agreement and 0 is chance; "
                f"{RELIABLE} is the usual limit for reliable labels, and {TENTATIVE} the lowest. Either the answers are hard to judge, or "
                f"the raters judge by different rules. Rows with split votes count for little{_unanimous(plan, name)}."
            )
    extreme = plan.weights.extreme()
    return [*found, *([extreme] if extreme else [])]


def _unanimous(plan: Plan, name: str) -> str:
    """Return the advice to leave out split votes, if the rows that are left can be trained on.

    Args:
        name: of the objective; empty for the rows themselves.
    """
    judgements = plan.rows.judgements
    masses = judgements.objectives[name] if name else judgements.masses
    left = (masses.min(axis=1) == 0) & (masses.sum(axis=1) > 0)
    desirable = int((left & (masses[:, 0] >= masses[:, 1])).sum())
    fewest = min(desirable, int(left.sum()) - desirable, len(np.unique(plan.rows.ids("prompt_id")[left])))
    if fewest < _FEWEST_UNANIMOUS:
        return ", and too few have unanimous votes to train on those alone"
    return "; leave them out with --votes unanimous"


def masses_in_words(masses: Masses) -> str:
    """Return two masses in words."""
    return f"{masses.desirable:,.4g} desirable, {masses.undesirable:,.4g} undesirable"
