"""Run workers on a Ray cluster: one actor for each GPU, or for each group of GPUs that share a model.

Nodes may join and leave. Ray starts actors and carries small messages; shards are files on storage that every node
sees. Ray neither restarts an actor nor retries a task: a retry would wait for the place of the lost actor, while other
workers are idle. A lost worker's task goes back to the leader.
"""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from offline_kto.kto_core.errors import ConfigError, KTOError, ModelError, in_one_line
from offline_kto.kto_core.streams import library_output_in

_SECONDS_BETWEEN_COUNTS = 2.0
_SECONDS_BETWEEN_LOOKS = 5.0

# A node that is gone is reported as alive until it has missed Ray's health checks: 13 s measured, 25 s by Ray's defaults.
_SECONDS_TO_BE_SURE = 30.0

# That many workers in a row that are lost before any is ready: something is wrong with all of them.
_MOST_LOST_STARTS = 3


class Work(Protocol):
    """A worker's engine. `score` runs in one thread, and `tokens` is called meanwhile in another."""

    def score(self, task: Any) -> Any:
        """Score a task, and return a small answer. Raises: KTOError: it cannot be scored anywhere."""

    def tokens(self) -> int:
        """Return the number of tokens that were scored since the start."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs: Ray's id of the node, its host and process, and the name of its GPU."""

    node: str
    host: str
    process: int
    device: str


@dataclass(frozen=True)
class Ready:
    """A worker can take a task."""

    worker: int
    place: Place


@dataclass(frozen=True)
class Refused:
    """A worker cannot score, because its node has another model, say. It keeps its place, so that no other starts there."""

    worker: int
    error: KTOError


@dataclass(frozen=True)
class Done:
    """A worker has scored its task, and can take another."""

    worker: int
    task: Any
    answer: Any


@dataclass(frozen=True)
class Lost:
    """A worker is gone, with its task if it had one. `place` is None if it was never ready."""

    worker: int
    task: Any
    place: Place | None
    reason: str


Event = Ready | Refused | Done | Lost


class _Actor:
    """A worker's process."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self._make = make
        self._work: Work | None = None

    def open(self, device: str) -> Place:
        """Load the engine, and check that it is the plan's."""
        import ray

        context = ray.get_runtime_context()
        self._work = self._make()
        if device == "gpu":
            import torch

            device = torch.cuda.get_device_name()
        return Place(context.get_node_id(), socket.gethostname(), os.getpid(), device)

    def score(self, task: Any) -> Any:
        assert self._work is not None
        return self._work.score(task)

    def tokens(self) -> int:
        return self._work.tokens() if self._work is not None else 0


@dataclass
class _Worker:
    handle: Any
    place: Place | None = None
    task: Any = None
    tokens: int = 0


class RayWorkers:
    """Workers on a Ray cluster, as the leader uses them. Use it as a context manager, in the main thread.

    Args:
        address: `auto`, HOST:PORT, or ray://HOST:PORT.
        make: makes a worker's engine in its process, and checks that it is the plan's.
        gpus: of one worker; 0 for workers on CPUs.
        most: workers; None for as many as the cluster has room for, at any time.
    """

    def __init__(self, address: str, make: Callable[[], Work], *, gpus: int = 1, most: int | None = None) -> None:
        self.address, self._make, self._gpus, self._most = address, make, gpus, most
        self._workers: dict[int, _Worker] = {}
        self._refused: set[int] = set()
        self._calls: dict[Any, tuple[int, str]] = {}  # what is awaited -> worker and method
        self._started = self._lost_starts = 0
        self._tokens_of_lost = 0
        self._last_count = self._last_look = float("-inf")
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "RayWorkers":
        self._ray = _import_ray()
        with contextlib.ExitStack() as undo:
            self.log = undo.enter_context(_ray_output_in_log())
            undo.callback(self._ray.shutdown)
            _connect(self._ray, self.address)
            undo.callback(self._end_all)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)

    @property
    def ready(self) -> int:
        """The number of workers that can score."""
        return sum(one.place is not None for one in self._workers.values())

    @property
    def starting(self) -> int:
        return len(self._workers) - self.ready - len(self._refused)

    def tokens(self) -> int:
        """Return the number of tokens that all workers have scored, a few seconds ago."""
        return self._tokens_of_lost + sum(one.tokens for one in self._workers.values())

    def assign(self, worker: int, task: Any) -> None:
        """Give a task to a worker that has none."""
        one = self._workers[worker]
        assert one.task is None
        one.task = task
        self._call(worker, "score", task)

    def wait(self, seconds: float) -> list[Event]:
        """Return what happened, as soon as something does; nothing after some seconds. Asks for workers where there is room.

        Raises:
            KTOError: a task cannot be scored, or no worker can be started.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._grow()
            self._count()
            left = min(deadline - time.monotonic(), _SECONDS_BETWEEN_COUNTS)
            calls = list(self._calls)
            if not calls:
                time.sleep(max(left, 0.0))
            elif self._ray.wait(calls, timeout=max(left, 0.0))[0]:
                calls = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]
            else:
                calls = []
            events = [event for call in calls for event in self._settle(call)]
            if events or time.monotonic() >= deadline:
                return events

    def is_alive(self, place: Place, *, sure: bool = False) -> bool:
        """Return whether a worker's node is still there.

        Args:
            sure: wait until Ray would have noticed that a node is gone.
        """
        deadline = time.monotonic() + (_SECONDS_TO_BE_SURE if sure else 0.0)
        while place.node in {node["NodeID"] for node in _living(self._ray)}:
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.2)
        return False

    def _grow(self) -> None:
        """Ask for as many workers as there is room for, or as the user wants."""
        if time.monotonic() - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return
        self._last_look = time.monotonic()
        wanted = self._most if self._most is not None else _room(_living(self._ray), self._gpus)
        resources: dict[str, float] = {"num_gpus": self._gpus, "num_cpus": 0} if self._gpus else {"num_cpus": 1}
        while len(self._workers) < wanted:
            # Two threads: `tokens` answers while `score` runs.
            actor = self._ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2, **resources)(_Actor)
            self._workers[self._started] = _Worker(actor.remote(self._make))
            self._call(self._started, "open", "gpu" if self._gpus else "cpu")
            self._started += 1

    def _call(self, worker: int, method: str, *arguments: Any) -> None:
        self._calls[getattr(self._workers[worker].handle, method).remote(*arguments)] = worker, method

    def _count(self) -> None:
        """Ask the busy workers for their tokens."""
        if time.monotonic() - self._last_count < _SECONDS_BETWEEN_COUNTS:
            return
        self._last_count = time.monotonic()
        asked = {worker for worker, method in self._calls.values() if method == "tokens"}
        for worker, one in self._workers.items():
            if one.task is not None and worker not in asked:
                self._call(worker, "tokens")

    def _settle(self, call: Any) -> Iterator[Event]:
        """Take an answer, and yield what it means to the leader."""
        worker, method = self._calls.pop(call, (-1, ""))
        one = self._workers.get(worker)
        if one is None:  # lost in the meantime
            return
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(call)
        except errors.RayTaskError as error:
            if not isinstance(error.cause, KTOError):
                raise
            if method != "open":
                where = one.place.host if one.place else "a node"
                raise type(error.cause)(f"{where}: {error.cause}") from None
            yield self._refuse(worker, error.cause)
        except errors.RayError as error:
            # Every loss has its own class, and not all are of RayActorError. `tokens` tells nothing that `score` does not.
            if method != "tokens":
                yield self._lose(worker, error)
        else:
            if method == "open":
                one.place, self._lost_starts = answer, 0
                yield Ready(worker, answer)
            elif method == "score":
                task, one.task = one.task, None
                yield Done(worker, task, answer)
            else:
                one.tokens = answer

    def _refuse(self, worker: int, error: KTOError) -> Refused:
        self._refused.add(worker)
        if len(self._refused) == len(self._workers):
            raise error
        return Refused(worker, error)

    def _lose(self, worker: int, error: Exception) -> Lost:
        one = self._workers.pop(worker)
        self._refused.discard(worker)
        self._calls = {call: what for call, what in self._calls.items() if what[0] != worker}
        self._tokens_of_lost += one.tokens
        reason = in_one_line(error)
        self._end(one)  # one that is merely out of reach may still hold its GPU
        if one.place is None:
            self._lost_starts += 1
            if self._lost_starts >= _MOST_LOST_STARTS:
                raise ModelError(
                    f"{self._lost_starts} workers in a row were lost before they could score: {reason} Ray's log: {self.log}"
                )
        self._last_look = float("-inf")  # there is room for another
        return Lost(worker, one.task, one.place, "preempted" if getattr(error, "preempted", False) else reason)

    def _end_all(self) -> None:
        for one in self._workers.values():
            self._end(one)

    def _end(self, worker: _Worker) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker.handle)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("--cluster needs Ray: pip install 'offline-kto[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster, and keep our handler of SIGTERM: Ray's exits without a message."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"--cluster {address}: no Ray cluster can be reached there: {in_one_line(error)} Start one with `ray start --head`, "
            "and use the same versions of Python and Ray on all nodes."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _living(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _room(nodes: Sequence[Mapping[str, Any]], gpus: int) -> int:
    """Return the number of workers that nodes have room for, whoever uses them now."""
    resources = [node["Resources"] for node in nodes]
    return sum(int(one.get("GPU", 0.0) // gpus if gpus else one.get("CPU", 0.0)) for one in resources)


@contextlib.contextmanager
def _ray_output_in_log() -> Iterator[Path]:
    """Send what Ray prints in this process to a log file, which is removed if the block ends without an error."""
    log = Path(tempfile.mkstemp(prefix="kto-precompute-ray-", suffix=".log")[1])
    with log.open("w", encoding="utf-8", errors="backslashreplace") as file:
        handler, logger = logging.StreamHandler(file), logging.getLogger("ray")
        handlers, propagate = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [handler], False
        try:
            with library_output_in(file, threads="ray_"):
                yield log
        finally:
            logger.handlers, logger.propagate = handlers, propagate
    log.unlink()
