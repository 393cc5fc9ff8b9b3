"""What a worker tells the sweep."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Evaluated:
    """A trial was evaluated; the worker waits to hear whether to go on."""

    step: int
    value: float


@dataclass(frozen=True)
class Ended:
    """A trial has ended; the worker waits to hear whether to keep its model.

    Attributes:
        state: complete, pruned or failed.
        metrics: held-out values by name.
        seconds: of the trial, and `train_seconds` of it for updates and evaluations.
        reason: of a failure.
    """

    state: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    train_seconds: float = 0.0
    reason: str | None = None

    @classmethod
    def refused(cls, reason: str) -> "Ended":
        """A trial that did not come to an end of its own."""
        return cls("failed", reason=reason)


@dataclass(frozen=True)
class Kept:
    """The model is on the disk."""


@dataclass(frozen=True)
class Stop:
    """No trial can go on: the cache is another one, or the disk is full."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The worker is gone."""

    reason: str


Message = Evaluated | Ended | Kept | Stop | Lost
