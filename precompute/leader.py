"""Lead workers: hand out shards, take them back in any order, and replace workers that are lost.

A lost worker's shard goes to the front of the queue. A loss counts against the shard only where the worker's machine is still
there: three of those stop the run, because the shard itself may end its workers.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import islice

from offline_kto.kto_core.cache.manifest_fields import ScoreDifference, WorkerFields
from offline_kto.kto_core.console import tell, warn
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.plan_ahead import PlansAhead
from offline_kto.precompute.worker import RefusedError
from offline_kto.precompute.workers import (
    Answer,
    Answered,
    Event,
    Failed,
    Lost,
    Ready,
    Said,
    Scored,
    Task,
    WorkerPlace,
    Workers,
)

_MOST_LOSSES = 3
_SECONDS_BETWEEN_LOOKS = 2.0


class Leader:
    """Has all missing shards scored.

    Args:
        workers: the transport.
        missing: numbers of the shards, in their order.
        out: folder of the cache, as workers see it.
        most: workers at once.
        prepare: writes a shard's plan file, and returns the shards whose scores it awaits; called in other threads, ahead of
            the workers: one file for each of them.
        finish: takes a shard that a worker has written.
        keep: called every few seconds.
        tokens_of: returns the tokens that a missing shard has to score.
        progress: over the tokens of all of them.

    Attributes:
        begun: shards that a worker has or had, and that are not finished.
        answers: of finished shards; several for one that awaited scores.
    """

    def __init__(
        self,
        workers: Workers,
        missing: Sequence[int],
        out: str,
        *,
        most: int,
        prepare: Callable[[int], set[int]],
        finish: Callable[[int, Answer], None],
        keep: Callable[[], None],
        tokens_of: Callable[[int], int],
        progress: Progress,
    ) -> None:
        self._workers, self._out, self._most = workers, out, most
        self._prepare, self._finish, self._keep = prepare, finish, keep
        self._tokens_of, self._progress = tokens_of, progress
        self._queue = deque(missing)
        self._left = set(missing)
        self._awaited: dict[int, set[int]] = {}  # by shard, as of its plan file
        self._waiting: set[int] = set()  # shards whose own sequences are scored
        self._idle: list[str] = []
        self._busy: dict[str, int] = {}
        self._places: dict[str, WorkerPlace] = {}  # of all workers that were ever ready
        self._uncounted: dict[int, int] = {}  # by shard that was begun: its tokens that the progress does not count yet
        self._shards_of: Counter[str] = Counter()
        self._losses: Counter[int] = Counter()
        self._lost = self._lost_at_start = 0
        self._refused: dict[str, RefusedError] = {}  # by machine
        self._differences: dict[str, ScoreDifference] = {}  # by worker
        self._said: set[str] = set()
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of scoring, by worker
        self.begun: set[int] = set()
        self.answers: list[Answer] = []

    @property
    def seconds(self) -> float:
        """Seconds of scoring of the worker that scored longest."""
        return max(self._seconds.values(), default=0.0)

    def run(self) -> None:
        """Have the shards scored.

        Raises:
            KTOError: a worker reports one, or a shard was lost three times.
        """
        with PlansAhead(self._prepare) as plans:
            while self._left:
                open_shards = len(self._queue) + len(self._busy)
                alive = self._workers.grow(max(1, min(self._most, open_shards)), self._refused.keys())
                if not alive and self._refused:
                    raise next(iter(self._refused.values()))
                self._hand_out(plans)
                plans.begin(islice(self._queue, alive))
                starting = alive - len(self._idle) - len(self._busy)
                self._progress.note(f"workers: {alive - starting} ready, {starting} starting, {self._lost} lost")
                for event in self._workers.wait(_SECONDS_BETWEEN_LOOKS):
                    self._handle(event)
                self._keep()

    def _hand_out(self, plans: PlansAhead) -> None:
        while self._idle and self._queue:
            worker, index = self._idle.pop(0), self._queue.popleft()
            awaited = plans.take(index)
            if not awaited <= self._left:  # the scores of some were not there yet when the file was written
                awaited = plans.take(index)
            self._awaited[index] = awaited
            self.begun.add(index)
            self._busy[worker] = index
            self._uncounted.setdefault(index, self._tokens_of(index))
            self._workers.submit(worker, Task(index, self._out))

    def _handle(self, event: Event) -> None:
        match event:
            case Ready():
                self._ready(event)
            case Scored():
                self._count(self._busy[event.worker], event.tokens)
            case Said():
                if event.line not in self._said:
                    self._said.add(event.line)
                    tell(event.line)
            case Answered():
                self._answered(event)
            case Lost():
                self._lost_one(event)
            case Failed():
                self._failed(event)

    def _ready(self, event: Ready) -> None:
        self._lost_at_start = 0
        devices = {place.device for place in self._places.values()}
        if devices and event.place.device not in devices:
            warn(
                f"{event.place.node} scores on {event.place.device}, other workers on {', '.join(sorted(devices))}: scores in 16 "
                "bits differ a little from device to device"
            )
        self._places[event.worker] = event.place
        self._idle.append(event.worker)

    def _answered(self, event: Answered) -> None:
        index = self._busy.pop(event.worker)
        self._idle.append(event.worker)
        self._count(index, self._uncounted[index])  # with those that a worker had scored before it was lost
        self.answers.append(event.answer)
        self._seconds[event.worker] += event.answer.seconds
        if event.answer.difference is not None:
            self._differences[event.worker] = event.answer.difference
        if not event.answer.is_written:
            self._waiting.add(index)
        else:
            self._shards_of[event.worker] += 1
            self._finish(index, event.answer)
            self._left.remove(index)
            self.begun.discard(index)
        ready = sorted(index for index in self._waiting if not self._awaited[index] & self._left)
        self._waiting.difference_update(ready)
        self._queue.extendleft(reversed(ready))

    def _count(self, index: int, tokens: int) -> None:
        """Add scored tokens to the progress, at most those of the shard: what a lost worker did not flush is scored twice."""
        more = min(tokens, self._uncounted[index])
        self._uncounted[index] -= more
        self._progress.add(more)

    def _lost_one(self, event: Lost) -> None:
        self._lost += 1
        index = self._forget(event.worker)
        log = f" Its log: {event.log}" if event.log else ""
        ended = f"{event.node} ended ({event.why})"
        if index is None:
            if event.worker not in self._places and event.is_node_alive:
                self._lost_at_start += 1
            if self._lost_at_start >= _MOST_LOSSES:
                raise ModelError(
                    f"{_MOST_LOSSES} workers ended before they were ready, the last on {ended}. Finished scores are kept: run the "
                    f"same command again when the cause is removed.{log}"
                )
            tell(f"lost        a worker on {ended}; another is started.{log}")
            return
        self._losses[index] += event.is_node_alive
        if self._losses[index] >= _MOST_LOSSES:
            raise ModelError(
                f"shard {index} was lost {_MOST_LOSSES} times, the last time when its worker on {ended}. Its rows, or the memory "
                f"that they need, may be the cause. Finished scores are kept: run the same command again to continue.{log}"
            )
        self._queue.appendleft(index)
        tell(f"lost        the worker of shard {index} on {ended}; another takes it.{log}")

    def _forget(self, worker: str) -> int | None:
        """Return the shard of a worker that has ended."""
        if worker in self._idle:
            self._idle.remove(worker)
        return self._busy.pop(worker, None)

    def _failed(self, event: Failed) -> None:
        if not isinstance(event.error, RefusedError):
            raise event.error
        self._forget(event.worker)
        if event.node not in self._refused:
            self._refused[event.node] = event.error
            heading, *lines = str(event.error).splitlines()
            warn(heading)
            for line in lines:
                tell(line)

    @property
    def left(self) -> list[int]:
        """Numbers of the shards that are not finished."""
        return sorted(self._left)

    def worker_fields(self) -> list[WorkerFields]:
        """Return the manifest's `run.workers`: where shards were scored, and how many."""
        found: Counter[WorkerPlace] = Counter()
        for worker, shards in self._shards_of.items():
            found[self._places[worker]] += shards
        return [
            {"node": place.node, "device": place.device, "torch": place.torch, "shards": shards}
            for place, shards in sorted(found.items())
        ]

    def difference(self) -> ScoreDifference | None:
        """Return the workers' differences from Transformers as one.

        Means are over all tokens; the 95th percentile is the largest of the workers'.
        """
        found = [one for one in self._differences.values() if one]
        tokens = sum(one["tokens"] for one in found)
        if not tokens:
            return {} if self._differences else None
        return {
            "rows": sum(one["rows"] for one in found),
            "tokens": tokens,
            "mean": sum(one["mean"] * one["tokens"] for one in found) / tokens,
            "p95": max(one["p95"] for one in found),
            "max": max(one["max"] for one in found),
            "bias": sum(one["bias"] * one["tokens"] for one in found) / tokens,
        }
