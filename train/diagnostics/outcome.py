"""Say what to try next after a verdict on a finished run."""

from dataclasses import dataclass

from offline_kto.kto_core.losses.verdict import LEAST_MARGIN, LEAST_PROMPTS, Verdict

# A margin of the training rows from which they count as learned.
_LEARNED = 0.1


@dataclass(frozen=True)
class Tried:
    """What the advice after a run depends on.

    Attributes:
        learning_rate: its peak; None if it is not known.
        training_margin: reward margin of the last training rows; None if it is not known.
        margin: change of the held-out margin; None if there is none.
        stops_early: whether the run had --early-stopping.
    """

    learning_rate: float | None = None
    training_margin: float | None = None
    margin: float | None = None
    stops_early: bool = False


def advice(verdict: Verdict, tried: Tried) -> str:
    """Return one sentence on what to try next."""
    if not verdict.by:
        return (
            f"hold out more prompts (--eval-fraction, --eval-cache): {LEAST_PROMPTS} with rows of each class are the least, and small "
            "differences need hundreds"
        )
    learned = tried.training_margin is not None and tried.training_margin > _LEARNED
    match verdict.outcome, verdict.by:
        case "better", _:
            return "read replies of both models side by side; kto-sweep compares learning rates and betas on the same cache"
        case "worse", "rewards/chosen":
            return f"a lower rate: {_rate(tried, 0.1)}"
        case "worse", _ if learned:
            fewer = "" if tried.stops_early else "fewer updates (--early-stopping 2), "
            return (
                f"the training rows were learned (margin {tried.training_margin:+.2f}), the held-out ones were not: {fewer}"
                f"{_rate(tried, 0.3)}, or more feedback"
            )
        case "worse", _:
            return f"check that thumbs up and down are not swapped, and {_rate(tried, 0.1)}"
        case _, "loss":
            return f"a lower rate, so that no row moves too far: {_rate(tried, 0.3)}"
    if learned:
        return "the training rows were learned, the held-out ones were not: more feedback, or cleaner labels"
    if tried.margin is not None and abs(tried.margin) < LEAST_MARGIN:
        return f"the policy hardly moved: {_rate(tried, 10)}, or more --epochs"
    return (
        "more held-out prompts narrow the interval (--eval-fraction); more feedback or --epochs make the change larger"
    )


def _rate(tried: Tried, factor: float) -> str:
    if not tried.learning_rate:
        return "a lower --learning-rate" if factor < 1 else "a higher --learning-rate"
    return f"--learning-rate {float(f'{factor * tried.learning_rate:.1g}'):g}"
