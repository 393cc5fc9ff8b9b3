"""Run tasks on two simulated Ray nodes of this machine, disturb them, and compare with what `simulate_cluster.py` predicts.

    python benchmarks/ray_nodes.py [--tasks 20] [--seconds 4]

A first run is undisturbed; in a second one a worker is killed, a node is removed and another is added. The simulation is
given the mean start-up of each run, the overhead of an undisturbed task, the times of the disturbances, and the times until
a loss was noticed. A worker scores by waiting, so that the load of the machine does not
count; it flushes what it has scored, and whoever takes its task over begins there. Needs Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from simulate_cluster import Job, Result, simulate
from text_table import text_table

from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.workers import Answer, Answered, Event, Lost, Ready, Task, WorkerPlace

ROWS_A_SECOND, FLUSH_SECONDS = 10.0, 1.5
OBJECT_STORE_BYTES = 100 * 2**20

# Seconds after both workers are ready at which the second run is disturbed.
SCRIPT = ((6.0, "kill worker"), (15.0, "remove node"), (20.0, "add node"))


class TimedEngine:
    """An engine that scores at a fixed rate, and leaves in files how many rows of each task are scored and flushed."""

    def __init__(self, folder: str, rows: int) -> None:
        self.folder, self.rows = Path(folder), rows

    @property
    def place(self) -> WorkerPlace:
        return WorkerPlace("", "cpu", str(os.getpid()))

    def score(self, task: Task, on_tokens: Callable[[int], None]) -> Answer:
        flushed = self.folder / f"{task.shard}.flushed"
        before = done = int(flushed.read_text()) if flushed.exists() else 0
        began = last = time.monotonic()
        while done < self.rows:
            done += 1
            time.sleep(max(0.0, began + (done - before) / ROWS_A_SECOND - time.monotonic()))
            on_tokens(1)
            (self.folder / f"{task.shard}.scored").write_text(str(done))
            if time.monotonic() - last >= FLUSH_SECONDS:
                last = time.monotonic()
                flushed.write_text(str(done))
        return Answer(True, self.rows, 0, "", done - before, done - before, time.monotonic() - began, None)


def open_timed(should_stop: Callable[[], bool], *, folder: str, rows: int) -> nullcontext[TimedEngine]:
    return nullcontext(TimedEngine(folder, rows))


def lead(address: str, tasks: int, rows: int, folder: str) -> None:
    """Be the leader, in a process of its own, and print a line of JSON for everything that happens."""
    from offline_kto.precompute.leader import Leader
    from offline_kto.precompute.ray_workers import RayWorkers

    def say(what: str, **more: Any) -> None:
        print(json.dumps({"time": time.time(), "what": what, **more}), flush=True)

    class Watched(RayWorkers):
        """Workers whose events are printed."""

        def __init__(self) -> None:
            self.tasks: dict[str, int] = {}
            super().__init__(address, partial(open_timed, folder=folder, rows=rows), gpus=0)

        def submit(self, worker: str, task: Task) -> None:
            self.tasks[worker] = task.shard
            say("begin", worker=worker, task=task.shard)
            super().submit(worker, task)

        def wait(self, seconds: float) -> list[Event]:
            events = super().wait(seconds)
            for event in events:
                task = self.tasks.get(event.worker)
                if isinstance(event, Ready):
                    node = self._workers[event.worker].node.id
                    say("ready", worker=event.worker, node=node, process=int(event.place.torch))
                elif isinstance(event, Answered):
                    say("done", worker=event.worker, task=self.tasks.pop(event.worker))
                elif isinstance(event, Lost):
                    scored, flushed = rows_of(folder, task)
                    say("lost", worker=event.worker, task=task, rows=scored - flushed, reason=event.why)
            return events

    workers = Watched()
    say("start")
    with Progress("scoring", tasks * rows, "rows") as progress:
        leader = Leader(
            workers,
            range(tasks),
            "",
            most=2,
            prepare=lambda index: set(),
            finish=lambda index, answer: None,
            keep=lambda: None,
            tokens_of=lambda index: rows,
            progress=progress,
        )
        try:
            leader.run()
        finally:
            workers.stop()


def rows_of(folder: str, task: int | None) -> tuple[int, int]:
    """Return how many rows of a task were scored, and how many of these are flushed."""
    found = [Path(folder) / f"{task}.{kind}" for kind in ("scored", "flushed")]
    scored, flushed = (int(path.read_text() or 0) if path.exists() else 0 for path in found)
    return scored, flushed


class Run:
    """One run on a cluster, and what was seen in it.

    Attributes:
        events: of the leader; `time` is in seconds after its start.
        done: the disturbances, with the times at which they took effect.
        nodes: (arrived, gone) of every node; None for one that is there at the end.
    """

    def __init__(self, cluster: Any, nodes: list[Any], tasks: int, rows: int) -> None:
        self.cluster, self.nodes_there, self.tasks, self.rows = cluster, nodes, tasks, rows
        self.events: list[dict[str, Any]] = []
        self.done: list[tuple[float, str]] = []
        self.nodes: dict[str, list[float | None]] = {node.node_id: [0.0, None] for node in nodes}
        self.both_ready = threading.Event()

    def run(self, script: tuple[tuple[float, str], ...]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            given = ["--lead", self.cluster.address, folder, "--tasks", str(self.tasks), "--rows", str(self.rows)]
            words = [sys.executable, __file__, *given]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as leader:
                assert leader.stdout is not None
                reader = threading.Thread(target=self._read, args=(leader.stdout,))
                reader.start()
                self.both_ready.wait()
                begin = time.time()
                for seconds, what in script:
                    time.sleep(max(0.0, begin + seconds - time.time()))
                    self._disturb(what)
                reader.join()
        if leader.returncode:
            raise SystemExit(f"the leader ended with {leader.returncode}")

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            event = json.loads(line)
            if event["what"] == "start":
                self.zero = event["time"]
            event["time"] -= self.zero
            self.events.append(event)
            if len(self.times("ready")) == 2:
                self.both_ready.set()
        self.both_ready.set()

    def _disturb(self, what: str) -> None:
        """Kill a worker, or remove or add a node; raylets die with the thread that starts them, so this is the main one."""
        if what == "add node":
            node = self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
            self.nodes_there.append(node)
            self.nodes[node.node_id] = [time.time() - self.zero, None]
        else:
            lost = {event["worker"] for event in self.events if event["what"] == "lost"}
            ready = [event for event in self.events if event["what"] == "ready" and event["worker"] not in lost]
            victim = ready[0]
            if what == "kill worker":
                os.kill(victim["process"], signal.SIGKILL)
            else:
                node = next(one for one in self.nodes_there if one.node_id == victim["node"])
                self.nodes[victim["node"]][1] = time.time() - self.zero
                self.cluster.remove_node(node, allow_graceful=False)
        self.done.append((time.time() - self.zero, what))

    def times(self, what: str) -> list[float]:
        return [event["time"] for event in self.events if event["what"] == what]

    def result(self) -> Result:
        """Return what happened in the simulation's terms."""
        found = Result(wall=max(self.times("done")))
        found.paid = sum((gone or found.wall) - arrived for arrived, gone in map(tuple, self.nodes.values()))
        found.useful = self.tasks * self.rows / ROWS_A_SECOND
        found.lost = sum(event["rows"] for event in self.events if event["what"] == "lost") / ROWS_A_SECOND
        found.losses = len(self.times("lost"))
        for event in self.events:
            if event["what"] == "done":
                found.done[event["task"]] += 1
        found.overhead = len(found.done) * self.overhead()
        found.startup = self._startup()
        return found

    def _startup(self) -> float:
        """Return the seconds in which workers started: after the first start, a node's arrival, or a loss."""
        total = 0.0
        losses = dict(
            zip([time for time, what in self.done if what == "kill worker"], self.times("lost"), strict=False)
        )
        for node, (arrived, _) in self.nodes.items():
            ready = [event["time"] for event in self.events if event["what"] == "ready" and event["node"] == node]
            begins = [arrived, *losses.values()] if len(ready) > 1 else [arrived]
            total += sum(one - begin for one, begin in zip(ready, begins, strict=True))
        return total

    def mean_startup(self) -> float:
        """Return the mean seconds until a worker could score."""
        return self._startup() / len(self.times("ready"))

    def overhead(self) -> float:
        """Return the mean seconds of an undisturbed task beyond its scoring."""
        begins, extra = {}, []
        lost = {event["task"] for event in self.events if event["what"] == "lost"}
        for event in self.events:
            if event["what"] == "begin":
                begins[event["task"]] = event["time"]
            elif event["what"] == "done" and event["task"] not in lost:
                extra.append(event["time"] - begins[event["task"]] - self.rows / ROWS_A_SECOND)
        return sum(extra) / len(extra)


def predicted(quiet: Run, run: Run) -> Result:
    """Simulate a run, with its own mean start-up and the overhead of the undisturbed one."""
    noticed = dict(zip([what for _, what in run.done if what != "add node"], run.times("lost"), strict=False))
    after = {what: noticed[what] - time for time, what in run.done if what in noticed}
    return simulate(
        Job(
            rows=run.tasks * run.rows,
            rows_a_shard=run.rows,
            workers=2,
            workers_a_node=1,
            rows_a_second=ROWS_A_SECOND,
            rate_spread=0.0,
            startup=run.mean_startup(),
            startup_spread=0.0,
            overhead_a_shard=quiet.overhead(),
            overhead_a_row=0.0,
            leader_seconds=0.0,
            plan_a_row=0.0,
            flush=FLUSH_SECONDS,
            node_losses=0.0,
            join=None,
            node_detection=max(0.0, after.get("remove node", 0.0)),
            worker_detection=max(0.0, after.get("kill worker", 0.0)),
            scripted=tuple(run.done),
        )
    )


def row_of(name: str, found: Result) -> list[str]:
    shares = [found.share(part) for part in (found.startup, found.idle, found.lost, found.overhead)]
    return [name, f"{found.wall:.1f}", *(f"{round(100 * share, 1) + 0.0:.1f} %" for share in shares)]


def main() -> None:
    """Run both, and print measured and predicted values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="of scoring in a task")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lead", nargs=2, metavar=("ADDRESS", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.lead:
        lead(given.lead[0], given.tasks, given.rows, given.lead[1])
        return
    from ray.cluster_utils import Cluster

    # Workers import this file by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    rows = round(given.seconds * ROWS_A_SECOND)
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES) for _ in range(2)]
        quiet, rough = Run(cluster, nodes, given.tasks, rows), Run(cluster, nodes, given.tasks, rows)
        quiet.run(())
        rough.run(SCRIPT)
    finally:
        cluster.shutdown()
    lines = []
    for name, run in (("undisturbed", quiet), ("disturbed", rough)):
        lines += [row_of(f"{name}, measured", run.result()), row_of(f"{name}, predicted", predicted(quiet, run))]
    print(text_table(["run", "seconds", "start-up", "idle", "lost", "overhead"], lines))
    for event in rough.events:
        if event["what"] == "lost":
            print(f"lost at {event['time']:.1f} s in task {event['task']}: {event['reason'][:100]}")
    print("disturbed: " + ", ".join(f"{what} at {time:.1f} s" for time, what in rough.done))
    startups = [f"{run.mean_startup():.1f} s" for run in (quiet, rough)]
    print(f"inputs: start-up {' and '.join(startups)}, overhead {quiet.overhead():.3f} s of a task, detection as above")


if __name__ == "__main__":
    main()
