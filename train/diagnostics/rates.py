"""Advise one learning rate in all messages of a run: the first advice is repeated, unless the opposite is found."""

from dataclasses import dataclass


@dataclass
class RateAdvice:
    """The learning rate of a run, and the one that the user was advised to use instead.

    Attributes:
        used: the peak of the run.
        advised: None before there was any advice.
    """

    used: float
    advised: float | None = None

    def other(self, factor: float) -> float:
        """Return the rate to advise where `factor` times the rate of the run seems right; 0 if that rate is 0.

        Advice to go the same way has been given already: a second number would only leave open which one to use.
        """
        if self.advised is not None and (self.advised < self.used) == (factor < 1):
            return self.advised
        return rounded(factor * self.used)


def rounded(value: float) -> float:
    """Round to one digit: more would suggest a precision that the estimate does not have."""
    return float(f"{value:.1g}")
