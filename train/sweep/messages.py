"""Define the messages that a worker sends to the sweep."""

from dataclasses import dataclass, field

from offline_kto.train.run_records import MetricInterval, VerdictRecord


@dataclass(frozen=True)
class Evaluated:
    """A trial was evaluated; the worker waits for the answer to continue or stop."""

    step: int
    value: float


@dataclass(frozen=True)
class Ended:
    """A trial has ended; the worker waits for the answer to keep or drop its model.

    Attributes:
        state: complete, pruned or failed.
        metrics: held-out values by name.
        seconds: duration of the trial; `train_seconds` is the part for updates and evaluations.
        reason: why the trial failed.
        interval: of the sweep's metric.
        untrained: the sweep's metric before training.
        verdict: whether the trial is better than before training.
        draws: bootstrap replicates of the sweep's metric.
        prompts: held-out prompts of the class that has fewer of them.
    """

    state: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    train_seconds: float = 0.0
    reason: str | None = None
    interval: MetricInterval | None = None
    untrained: float | None = None
    verdict: VerdictRecord | None = None
    draws: list[float] = field(default_factory=list)
    prompts: int = 0

    @classmethod
    def refused(cls, reason: str) -> "Ended":
        """Build the message of a trial that failed."""
        return cls("failed", reason=reason)


@dataclass(frozen=True)
class Kept:
    """The model of a trial is on disk."""


@dataclass(frozen=True)
class Stop:
    """No trial can continue: the cache has changed, or the disk is full."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The worker's process has ended."""

    reason: str


Message = Evaluated | Ended | Kept | Stop | Lost
