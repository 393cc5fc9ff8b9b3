"""Say what to try next after a verdict on a finished run."""

from dataclasses import dataclass

from offline_kto.kto_core.losses.verdict import LEAST_MARGIN, LEAST_PROMPTS, Verdict
from offline_kto.train.diagnostics.rates import RateAdvice

# A margin of the training rows from which they count as learned.
_LEARNED = 0.1

_SWAPPED = "check that thumbs up and down are not swapped"


@dataclass(frozen=True)
class Tried:
    """What the advice after a run depends on.

    Attributes:
        learning_rate: its peak; None if it is not known.
        training_margin: reward margin of the last training rows; None if it is not known.
        margin: change of the held-out margin; None if there is none.
        stops_early: whether the run had --early-stopping.
        advised_rate: the learning rate that the user was advised to use in the run, or before it; None without advice.
        got_worse: whether a warning during the run said that the model was getting worse.
    """

    learning_rate: float | None = None
    training_margin: float | None = None
    margin: float | None = None
    stops_early: bool = False
    advised_rate: float | None = None
    got_worse: bool = False


def advice(verdict: Verdict, tried: Tried) -> str:
    """Return one sentence on what to try next. It repeats what a warning during the run has said of the labels."""
    found = _advice(verdict, tried)
    if tried.got_worse and verdict.outcome != "better" and _SWAPPED not in found:
        return f"{found}; and {_SWAPPED}"
    return found


def _advice(verdict: Verdict, tried: Tried) -> str:
    if tried.learning_rate == 0:
        return "the learning rate was 0, so nothing was learned: leave out --learning-rate, or give one above 0"
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
            return f"{_SWAPPED}, and {_rate(tried, 0.1)}"
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
    return f"--learning-rate {RateAdvice(tried.learning_rate, tried.advised_rate).other(factor):g}"
