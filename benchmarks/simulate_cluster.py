"""Simulate scoring on a cluster whose nodes come and go, and recommend --rows-per-shard.

    python benchmarks/simulate_cluster.py [--gpus 512] [--rows 1e7,1e8,1e9] [--rows-per-shard 256,1024,4096,16384]

A discrete-event simulation of the leader's loop. The queue holds shards; a worker takes the first, scores it, and the
leader adopts it. A node is lost at a Poisson rate, and another joins after a delay. The shard of a lost worker goes to
the front of the queue without the scores that were flushed. A shard that has lost three workers on living nodes stops
the run.

The constants below are the defaults of the options. Their comments say which were measured and which are assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from text_table import text_table

# Measured: a model of 8B parameters, bfloat16, one H200.
TOKENS_A_SECOND = 28_400.0
# Assumed: two sequences a row of 300 tokens each.
TOKENS_A_ROW = 600.0
# Measured: writing, checking and hashing a shard takes 0.35 s of a core for 4,096 rows, and a task of 4 s ends 0 to
# 0.1 s after the scores.
OVERHEAD_A_ROW, OVERHEAD_A_SHARD = 0.35 / 4096, 0.1
# Assumed: a rename and one line of bookkeeping on shared storage. A copy in a bucket takes ten times as long.
LEADER_SECONDS = 0.01
# Measured: a plan file of 4,096 rows takes 0.07 to 0.08 s of a core (plan_files.py). One core writes them.
PLAN_A_ROW = 0.07 / 4096
# Set by the program.
FLUSH_SECONDS, MOST_LOSSES = 60.0, 3
# Assumed: the imports, a model of 16 GB from shared storage, its hash. Imports alone take 8 to 15 s (measured).
STARTUP_SECONDS, STARTUP_SPREAD = 120.0, 0.2
# Assumed.
RATE_SPREAD, LOSSES_A_NODE_HOUR, JOIN_SECONDS = 0.03, 0.05, 300.0
# Ray's health checks: the fifth in a row, 3 s apart, that is not answered within 10 s.
NODE_DETECTION_SECONDS, WORKER_DETECTION_SECONDS = 25.0, 1.0

# More files than this are slow to list, open and verify, in buckets above all.
MOST_SHARDS = 300_000
# The fewest shards are recommended whose GPU hours are within this share of the least.
NEAR = 0.02


@dataclass(frozen=True)
class Job:
    """What is simulated. Times are in seconds.

    Attributes:
        rows_a_second: of one worker; `rate_spread` is the standard deviation of the workers' rates, as a share.
        startup: median time from the arrival of a worker's node, or its restart, until it can score;
            `startup_spread` is the standard deviation of its logarithm.
        leader_seconds: the leader's time for one finished shard. It handles one after the other.
        plan_a_row: time for the plan file of a shard, which is written ahead of the workers, one file for each of them.
        node_losses: a node hour. The replacement arrives after `join`; with None there is none.
        worker_losses: a worker hour, on nodes that live on.
        deadly_shards: shards that end every worker halfway.
        scripted: (time, what) with what one of `kill worker`, `remove node`, `add node`: the first that scores.
    """

    rows: int
    rows_a_shard: int
    workers: int
    workers_a_node: int = 8
    rows_a_second: float = TOKENS_A_SECOND / TOKENS_A_ROW
    rate_spread: float = RATE_SPREAD
    startup: float = STARTUP_SECONDS
    startup_spread: float = STARTUP_SPREAD
    overhead_a_shard: float = OVERHEAD_A_SHARD
    overhead_a_row: float = OVERHEAD_A_ROW
    leader_seconds: float = LEADER_SECONDS
    plan_a_row: float = PLAN_A_ROW
    flush: float = FLUSH_SECONDS
    node_losses: float = LOSSES_A_NODE_HOUR
    worker_losses: float = 0.0
    join: float | None = JOIN_SECONDS
    node_detection: float = NODE_DETECTION_SECONDS
    worker_detection: float = WORKER_DETECTION_SECONDS
    deadly_shards: frozenset[int] = frozenset()
    scripted: tuple[tuple[float, str], ...] = ()
    seed: int = 0

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_a_shard)


@dataclass
class Result:
    """What became of a job. All but `wall` and the counts are sums over workers, in seconds.

    Attributes:
        paid: from a worker's node being there until the node is lost or the job ends.
        useful: scoring that is in the cache.
        lost: scoring that was thrown away.
        overhead: reading, writing and hashing shards.
        startup: until a worker can score.
        done: how often each shard was adopted.
        stopped_by: the shard that lost too many workers; None if the job was completed.
    """

    wall: float = 0.0
    paid: float = 0.0
    useful: float = 0.0
    lost: float = 0.0
    overhead: float = 0.0
    startup: float = 0.0
    losses: int = 0
    done: Counter[int] = dataclasses.field(default_factory=Counter)
    stopped_by: int | None = None

    @property
    def idle(self) -> float:
        return self.paid - self.useful - self.lost - self.overhead - self.startup

    def share(self, seconds: float) -> float:
        return seconds / self.paid if self.paid else 0.0


@dataclass(eq=False)
class _Node:
    number: int
    arrived: float
    gpus: int
    workers: list[_Worker] = dataclasses.field(default_factory=list)
    alive: bool = True


@dataclass(eq=False)
class _Worker:
    """A process on a GPU. `began` is the time of its start, and then of its shard; `shard` is None while it has none."""

    node: _Node
    rate: float
    draws: random.Random
    began: float = 0.0
    ready: bool = False
    shard: int | None = None
    alive: bool = True


class Simulation:
    """One run of a job: a queue of events in the order of their times."""

    def __init__(self, job: Job) -> None:
        self.job, self.result, self.now = job, Result(), 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._queue, self._idle = deque(range(job.shards)), deque[_Worker]()
        self._left = {job.shards - 1: job.rows - (job.shards - 1) * job.rows_a_shard}  # rows, where not a full shard
        self._hits: Counter[int] = Counter()
        self._nodes: list[_Node] = []
        self._leader_free, self._promised, self._counted, self._over = 0.0, 0, 0, False
        self._planner_free, self._taken = 0.0, deque[float](maxlen=job.workers)  # when the last plan files were taken

    def run(self) -> Result:
        """Simulate until every shard is done, or one stops the run.

        Raises:
            RuntimeError: no worker is left and none will come.
        """
        workers = self.job.workers
        while workers > 0:
            self._add_node(min(workers, self.job.workers_a_node))
            workers -= self.job.workers_a_node
        for time, what in self.job.scripted:
            self._at(time, lambda what=what: self._scripted(what))
        while not self._over:
            if not self._events:
                raise RuntimeError("no worker is left, and no node will join")
            self.now, _, act = heapq.heappop(self._events)
            act()
        self._end()
        return self.result

    def _at(self, time: float, act: Callable[[], None]) -> None:
        self._counted += 1  # events at one time happen in the order in which they were planned
        heapq.heappush(self._events, (time, self._counted, act))

    def _add_node(self, workers: int) -> None:
        # Every node has draws of its own, so that a higher rate of losses only brings them forward.
        draws = random.Random(f"{self.job.seed}/{len(self._nodes)}")
        node = _Node(len(self._nodes), self.now, workers)
        self._nodes.append(node)
        lifetime = draws.expovariate(1.0)
        if self.job.node_losses:
            self._at(self.now + lifetime * 3600 / self.job.node_losses, lambda: self._lose_node(node))
        for i in range(workers):
            self._start(node, random.Random(f"{self.job.seed}/{node.number}/{i}"))

    def _start(self, node: _Node, draws: random.Random) -> None:
        """Start a worker, a new process after one that was lost included."""
        job = self.job
        rate = job.rows_a_second * max(0.1, draws.gauss(1.0, job.rate_spread))
        worker = _Worker(node, rate, draws, began=self.now)
        node.workers.append(worker)
        self._at(self.now + job.startup * draws.lognormvariate(0.0, job.startup_spread), lambda: self._ready(worker))
        lifetime = draws.expovariate(1.0)
        if job.worker_losses:
            self._at(self.now + lifetime * 3600 / job.worker_losses, lambda: self._lose_worker(worker))

    def _ready(self, worker: _Worker) -> None:
        if worker.alive:
            worker.ready = True
            self.result.startup += self.now - worker.began
            self._ask(worker)

    def _ask(self, worker: _Worker) -> None:
        """Let a worker wait until the leader has a shard for it."""
        self._at(self._handed_out(0.0), lambda: self._begin(worker))

    def _handed_out(self, seconds: float) -> float:
        """Return when the leader hands out the next shard: after what it has to do before, which takes so long."""
        self._leader_free = max(self._leader_free, self.now) + seconds
        is_left, self._promised = len(self._queue) > self._promised, self._promised + 1
        if is_left:
            self._leader_free = max(self._leader_free, self._planned())
            self._taken.append(self._leader_free)
        return self._leader_free

    def _planned(self) -> float:
        """Return when the next plan file is written: begun when there was room for it, after those before."""
        room = self._taken[0] if len(self._taken) == self.job.workers else 0.0
        self._planner_free = max(self._planner_free, room) + self.job.plan_a_row * self.job.rows_a_shard
        return self._planner_free

    def _begin(self, worker: _Worker) -> None:
        """Give a worker the first shard of the queue, whose plan file is written; without one it waits."""
        self._promised -= 1
        if not worker.alive:
            return
        if not self._queue:
            self._idle.append(worker)
            return
        worker.shard, worker.began = self._queue.popleft(), self.now
        if worker.shard in self.job.deadly_shards:
            self._at(self.now + self._seconds(worker) / 2, lambda: self._lose_worker(worker))
        else:
            self._at(self.now + self._seconds(worker), lambda: self._finish(worker))

    def _rows(self, shard: int) -> float:
        return self._left.get(shard, self.job.rows_a_shard)

    def _seconds(self, worker: _Worker) -> float:
        assert worker.shard is not None
        return self._overhead() + self._rows(worker.shard) / worker.rate

    def _overhead(self) -> float:
        return self.job.overhead_a_shard + self.job.overhead_a_row * self.job.rows_a_shard

    def _finish(self, worker: _Worker) -> None:
        """Queue at the leader, which adopts the shard and hands out another."""
        if not worker.alive:
            return
        shard = worker.shard
        assert shard is not None
        self.result.useful += self._rows(shard) / worker.rate
        self.result.overhead += self._overhead()
        worker.shard = None
        self._at(self._handed_out(self.job.leader_seconds), lambda: self._adopt(shard, worker))

    def _adopt(self, shard: int, worker: _Worker) -> None:
        self.result.done[shard] += 1
        if len(self.result.done) == self.job.shards:
            self._over = True
        else:
            self._begin(worker)

    def _lose_node(self, node: _Node) -> None:
        if not node.alive:
            return
        node.alive = False
        self.result.paid += (self.now - node.arrived) * node.gpus
        for worker in node.workers:
            self._lose(worker, self.job.node_detection)
        if self.job.join is not None:
            self._at(self.now + self.job.join, lambda: self._add_node(node.gpus))

    def _lose_worker(self, worker: _Worker) -> None:
        """Lose a worker whose node lives on, and start another there."""
        if not worker.alive:
            return
        shard, node = worker.shard, worker.node
        self._lose(worker, self.job.worker_detection)
        node.workers.remove(worker)
        self._at(self.now + self.job.worker_detection, lambda: node.alive and self._start(node, worker.draws))
        if shard is not None:
            self._hits[shard] += 1
            if self._hits[shard] == MOST_LOSSES:
                self.result.stopped_by, self._over = shard, True

    def _lose(self, worker: _Worker, detection: float) -> None:
        if not worker.alive:
            return
        worker.alive = False
        self.result.losses += 1
        if worker in self._idle:
            self._idle.remove(worker)
        if not worker.ready:
            self.result.startup += self.now - worker.began
        self._account(worker)
        if (shard := worker.shard) is not None:
            self._at(self.now + detection, lambda: self._put_back(shard))

    def _account(self, worker: _Worker) -> None:
        """Add up what a lost worker did to its shard; scores that were flushed are left out of what remains."""
        if worker.shard is None:
            return
        spent = self.now - worker.began
        overhead = min(spent, self._overhead())
        scored = spent - overhead
        flushed = max(0.0, spent // self.job.flush * self.job.flush - overhead) if self.job.flush else 0.0
        self.result.overhead += overhead
        self.result.useful += flushed
        self.result.lost += scored - flushed
        self._left[worker.shard] = self._rows(worker.shard) - flushed * worker.rate

    def _put_back(self, shard: int) -> None:
        self._queue.appendleft(shard)
        if self._idle:
            self._ask(self._idle.popleft())

    def _scripted(self, what: str) -> None:
        busy = [one for node in self._nodes if node.alive for one in node.workers if one.shard is not None]
        if what == "add node":
            self._add_node(self.job.workers_a_node)
        elif what == "kill worker":
            self._lose_worker(busy[0])
        elif what == "remove node":
            self._lose_node(busy[0].node)
        else:
            raise ValueError(f"{what!r} is not an event")

    def _end(self) -> None:
        """Account for the workers that are there at the end."""
        self.result.wall = self.now
        for node in self._nodes:
            if node.alive:
                self.result.paid += (self.now - node.arrived) * node.gpus
                for worker in node.workers:
                    if not worker.ready:
                        self.result.startup += self.now - worker.began
                    if worker.shard is not None:  # only where the run was stopped
                        self._account(worker)


def simulate(job: Job) -> Result:
    """Return what becomes of a job."""
    return Simulation(job).run()


@dataclass(frozen=True)
class Cell:
    """Means over several seeds for one number of rows and one size of shards. `hours` are GPU hours."""

    rows_a_shard: int
    shards: int
    wall: float
    hours: float
    startup: float
    idle: float
    lost: float
    overhead: float


def mean_of(job: Job, seeds: Sequence[int]) -> Cell:
    """Simulate a job with several seeds."""
    found = [simulate(dataclasses.replace(job, seed=seed)) for seed in seeds]

    def mean(value: Callable[[Result], float]) -> float:
        return sum(map(value, found)) / len(found)

    return Cell(
        job.rows_a_shard,
        job.shards,
        mean(lambda one: one.wall),
        mean(lambda one: one.paid) / 3600,
        mean(lambda one: one.share(one.startup)),
        mean(lambda one: one.share(one.idle)),
        mean(lambda one: one.share(one.lost)),
        mean(lambda one: one.share(one.overhead)),
    )


def recommended(cells: Sequence[Cell]) -> Cell:
    """Return the cell with the fewest shards whose GPU hours are within `NEAR` of the least."""
    least = min(cell.hours for cell in cells)
    return min((cell for cell in cells if cell.hours <= least * (1 + NEAR)), key=lambda cell: cell.shards)


def table_of(cells: Sequence[Cell]) -> str:
    """Return the cells as a table, with a star at the recommended one."""
    best = recommended(cells)
    header = ["rows per shard", "shards", "wall", "GPU hours", "start-up", "idle", "lost", "overhead"]
    lines = [
        [
            f"{cell.rows_a_shard:,}{' *' if cell is best else ''}",
            f"{cell.shards:,}",
            f"{cell.wall / 60:,.1f} min" if cell.wall < 7200 else f"{cell.wall / 3600:,.1f} h",
            f"{cell.hours:,.0f}",
            *(f"{round(100 * share, 1) + 0.0:.1f} %" for share in (cell.startup, cell.idle, cell.lost, cell.overhead)),
        ]
        for cell in cells
    ]
    return text_table(header, lines)


def numbers(text: str) -> list[int]:
    """Return the whole numbers in `1e7,4096`."""
    return [int(float(part)) for part in text.split(",")]


def main() -> None:
    """Print a table for each number of rows, and the recommendation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[10**7, 10**8, 10**9])
    parser.add_argument("--rows-per-shard", type=numbers, default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--gpus", type=int, default=512, help="one worker on each")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--tokens-per-second", type=float, default=TOKENS_A_SECOND, help="of one GPU")
    parser.add_argument("--tokens-per-row", type=float, default=TOKENS_A_ROW)
    parser.add_argument("--startup", type=float, default=STARTUP_SECONDS, help="median seconds until a worker scores")
    parser.add_argument("--node-losses", type=float, default=LOSSES_A_NODE_HOUR, help="lost nodes in a node hour")
    parser.add_argument("--worker-losses", type=float, default=0.0, help="lost processes in a worker hour")
    parser.add_argument("--join", type=float, default=JOIN_SECONDS, help="seconds until a lost node is replaced")
    parser.add_argument("--leader-seconds", type=float, default=LEADER_SECONDS, help="for each finished shard")
    parser.add_argument(
        "--flush", type=float, default=FLUSH_SECONDS, help="seconds between flushes of scores; 0: never"
    )
    parser.add_argument("--plan-seconds", type=float, default=4096 * PLAN_A_ROW, help="for the plan file of 4,096 rows")
    parser.add_argument("--seeds", type=int, default=3, help="runs of which the mean is printed")
    given = parser.parse_args()
    for rows in given.rows:
        jobs = [
            Job(
                rows,
                size,
                given.gpus,
                given.gpus_per_node,
                given.tokens_per_second / given.tokens_per_row,
                startup=given.startup,
                node_losses=given.node_losses,
                worker_losses=given.worker_losses,
                join=given.join,
                leader_seconds=given.leader_seconds,
                plan_a_row=given.plan_seconds / 4096,
                flush=given.flush,
            )
            for size in given.rows_per_shard
            if -(-rows // size) <= MOST_SHARDS
        ]
        if not jobs:
            raise SystemExit(f"{rows:,} rows: every --rows-per-shard gives more than {MOST_SHARDS:,} shards")
        cells = [mean_of(job, range(given.seeds)) for job in jobs]
        print(f"{rows:,} rows on {given.gpus} GPUs\n{table_of(cells)}")
        print(f"* recommended: --rows-per-shard {recommended(cells).rows_a_shard}\n")


if __name__ == "__main__":
    main()
