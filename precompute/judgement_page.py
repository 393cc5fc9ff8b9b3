"""Describe the judgements of a plan to the user: masses, votes with their agreement, weights and objectives."""

from collections.abc import Iterator

from offline_kto.kto_core.judgements import Masses
from offline_kto.precompute.feedback.agreement import RELIABLE, TENTATIVE, agreement_in_words
from offline_kto.precompute.plan import Plan, PlanCounts


def judgements_in_words(plan: Plan, counts: PlanCounts) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the plan's lines about judgements; none if every row is one bit without votes."""
    for name, agreement in sorted(plan.feedback.found.agreement.items()):
        of = f"{name}: " if name else ""
        yield "votes", f"{of}{agreement_in_words(agreement)} (--votes {plan.feedback.label_rule.votes})"
    for name, masses in counts.objectives.items():
        judged = sum(row.judgement.objectives[name].total > 0 for row in plan.rows)
        yield "objective", f"{name}: {judged:,} of {counts.kept:,} rows judged, {masses_in_words(masses)}"
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
                "the raters judge by different rules. Rows with split votes count for little; leave them out with --votes unanimous."
            )
    extreme = plan.weights.extreme()
    return [*found, *([extreme] if extreme else [])]


def masses_in_words(masses: Masses) -> str:
    """Return two masses in words."""
    return f"{masses.desirable:,.4g} desirable, {masses.undesirable:,.4g} undesirable"
