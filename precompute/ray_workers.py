"""Run workers on a Ray cluster: one actor for each GPU, or for each group of GPUs that share a model.

Nodes may join and leave. Ray starts actors and carries small messages; shards are files on storage that every node sees.
Ray neither restarts an actor nor retries a task: a retry would wait for the place of the lost actor while other workers
are idle.

leader  -- open, score, news, stop -->  actor, a process on a node
        <-- place, answer, tokens and lines --
"""

import atexit
import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from offline_kto.kto_core.console import LOGGER
from offline_kto.kto_core.errors import ConfigError, KTOError, ModelError, in_one_line, printable
from offline_kto.kto_core.streams import library_output_in
from offline_kto.precompute.worker import SECONDS_TO_STOP, LoggedLines, ShardWorker, StoppedError, kept_error
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
    WorkerSettings,
)

_SECONDS_BETWEEN_NEWS = 2.0
_SECONDS_TO_CONNECT = 10.0
# Ray ends this process without a message a minute after its head was lost: by then the workers were told to stop.
_SECONDS_WITHOUT_HEAD = 40.0
_SECONDS_TO_STOP_WITHOUT_HEAD = 10.0
# Ray still lists a node that is gone until it has missed health checks: 13 s measured, 25 s by Ray's defaults.
_SECONDS_UNTIL_NODE_IS_KNOWN_DEAD = 30.0


class Engine(Protocol):
    """What an actor runs: a `ShardWorker`."""

    @property
    def place(self) -> WorkerPlace: ...
    def score(self, task: Task, on_tokens: Callable[[int], None]) -> Answer: ...


Opener = Callable[[Callable[[], bool]], AbstractContextManager[Engine]]
"""Opens an engine in a worker's process; the argument is asked whether to stop."""


class ShardWorkerOpener:
    """Opens a `ShardWorker`, which checks that it would score as the leader plans."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings

    def __call__(self, should_stop: Callable[[], bool]) -> ShardWorker:
        return ShardWorker(self._settings.config, self._settings.folder, should_stop=should_stop)


class _Opened(NamedTuple):
    """A worker that is ready, and the path of its log on its node."""

    place: WorkerPlace
    log: str


class _Scored(NamedTuple):
    """A worker's answer, and the tokens that it has scored since its start."""

    answer: Answer
    tokens: int


class _Actor:
    """A worker's process. Two threads run its methods: `news` and `stop` answer while `score` runs.

    Errors that the user can fix are returned: those that are raised would arrive with a traceback.
    """

    def __init__(self, open_engine: Opener) -> None:
        self._open_engine = open_engine
        self._should_stop = threading.Event()
        self._tokens = 0
        self._lines: list[str] = []

    def open(self) -> _Opened | KTOError:
        LOGGER.addHandler(LoggedLines(self._lines.append))
        LOGGER.setLevel(logging.INFO)
        try:
            self._context = self._open_engine(self._should_stop.is_set)
            self._engine = self._context.__enter__()
        except KTOError as error:
            return kept_error(error)
        return _Opened(self._engine.place, os.path.realpath("/proc/self/fd/2"))

    def score(self, task: Task) -> _Scored | KTOError | None:
        """Score a shard; None if the worker was stopped meanwhile."""
        try:
            return _Scored(self._engine.score(task, self._add), self._tokens)
        except StoppedError:
            return None
        except KTOError as error:
            return kept_error(error)

    def _add(self, tokens: int) -> None:
        self._tokens += tokens

    def news(self) -> tuple[int, list[str]]:
        """Return the tokens scored since the start, and the lines logged since the last call."""
        lines = self._lines[:]
        del self._lines[: len(lines)]
        return self._tokens, lines

    def stop(self) -> None:
        self._should_stop.set()

    def close(self) -> None:
        self._context.__exit__(None, None, None)


class _Node(NamedTuple):
    """A living node: Ray's id, the name that users see, and the number of workers that fit."""

    id: str
    name: str
    room: int


@dataclass
class _Worker:
    handle: Any
    node: _Node
    log: str = ""
    tokens: int = 0


@dataclass
class _Log:
    """The log of what Ray prints in this process; `is_named` once a message names it."""

    file: IO[str]
    is_named: bool = False


class RayWorkers:
    """Workers on a Ray cluster; see `offline_kto.precompute.workers.Workers`.

    It connects to the cluster at once, and Ray's own output goes to `log` until `stop`.

    Args:
        address: `auto`, HOST:PORT, or ray://HOST:PORT.
        open_engine: opens a worker's engine in its process.
        gpus: of each worker; 0 for workers that take one CPU.

    Raises:
        ConfigError: Ray is not installed, or no cluster is there.
    """

    def __init__(self, address: str, open_engine: Opener, *, gpus: int) -> None:
        self._ray, self._address = _import_ray(), printable(address, 100)
        self._open_engine, self._gpus = open_engine, gpus
        self._workers: dict[str, _Worker] = {}
        self._calls: dict[Any, tuple[str, str]] = {}  # what is awaited -> worker and method
        self._started = 0
        self._last_news = float("-inf")
        self._suspects: dict[str, float] = {}  # nodes that are perhaps gone -> until when
        self._is_head_lost = False
        with contextlib.ExitStack() as undo:
            self._log = undo.enter_context(_ray_output_in_log())
            undo.callback(self._disconnect)
            _connect(self._ray, address, self._log)
            self._undo = undo.pop_all()

    @property
    def log(self) -> Path:
        """Ray's own output in this process."""
        return Path(self._log.file.name)

    @property
    def room(self) -> int:
        return sum(node.room for node in self._nodes())

    def _disconnect(self) -> None:
        if self._is_head_lost:
            _end_without_head(self._ray)
            return
        _shut_down(self._ray, self._log)

    def grow(self, wanted: int, avoid: Collection[str]) -> int:
        held = Counter(worker.node.id for worker in self._workers.values())
        for node in self._nodes():
            is_suspect = self._suspects.get(node.id, 0.0) > time.monotonic()
            room = 0 if is_suspect or node.id in avoid else node.room - held[node.id]
            for _ in range(min(room, wanted - len(self._workers))):
                self._start(node)
        return len(self._workers)

    def _nodes(self, seconds: float | None = None) -> list[_Node]:
        """Return the living nodes. Raises: ModelError: Ray's head does not answer within some seconds."""
        with self._head_lost_in_words():
            nodes = _answer_within(seconds or _SECONDS_WITHOUT_HEAD, self._ray.nodes)
        return [
            _Node(node["NodeID"], node["NodeName"], _room(node["Resources"], self._gpus))
            for node in nodes
            if node["Alive"]
        ]

    @contextlib.contextmanager
    def _head_lost_in_words(self) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, TimeoutError) as error:  # of a client (ray://), or nothing was heard
            self._is_head_lost = True
            raise ModelError(
                f"--cluster {self._address}: Ray's head does not answer any more. Finished scores are kept. Start a cluster, and run "
                "the same command again: it continues with the shards that are left. The head's log, on its machine: "
                "session_latest/logs/gcs_server.out in /tmp/ray, or in the --temp-dir of `ray start`"
            ) from error

    def _start(self, node: _Node) -> None:
        resources: dict[str, float] = {"num_gpus": self._gpus, "num_cpus": 0} if self._gpus else {"num_cpus": 1}
        actor = self._ray.remote(
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
            # Pinned, so that it is known where a worker was that is lost before it answers.
            scheduling_strategy=self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node.id, soft=False
            ),
            **resources,
        )(_Actor)
        self._started += 1
        name = f"worker {self._started}"
        self._workers[name] = _Worker(actor.remote(self._open_engine), node)
        self._call(name, "open")

    def submit(self, worker: str, task: Task) -> None:
        self._call(worker, "score", task)

    def wait(self, seconds: float) -> list[Event]:
        with self._head_lost_in_words():
            return self._wait(seconds)

    def _wait(self, seconds: float) -> list[Event]:
        deadline = time.monotonic() + seconds
        while True:
            self._ask_for_news()
            left = max(0.0, min(deadline - time.monotonic(), _SECONDS_BETWEEN_NEWS))
            calls = list(self._calls)
            if not calls:
                time.sleep(left)
            elif self._ray.wait(calls, timeout=left)[0]:
                calls = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]
            else:
                calls = []
            events = [event for call in calls for event in self._take(call)]
            if events or time.monotonic() >= deadline:
                return events

    def _call(self, worker: str, method: str, *arguments: Any) -> None:
        self._calls[getattr(self._workers[worker].handle, method).remote(*arguments)] = worker, method

    def _ask_for_news(self) -> None:
        if time.monotonic() - self._last_news < _SECONDS_BETWEEN_NEWS:
            return
        self._last_news = time.monotonic()
        busy = {worker for worker, method in self._calls.values() if method == "score"}
        asked = {worker for worker, method in self._calls.values() if method == "news"}
        for worker in sorted(busy - asked):
            self._call(worker, "news")

    def _take(self, call: Any) -> Iterator[Event]:
        """Yield what a finished call means to the leader."""
        worker, method = self._calls.pop(call, ("", ""))
        if worker not in self._workers:  # lost, by another call of this round
            return
        one = self._workers[worker]
        try:
            found = self._ray.get(call)
        except self._ray.exceptions.RayTaskError:
            raise  # a bug, with the traceback of the worker
        except self._ray.exceptions.RayError as error:
            if method != "news":  # which tells nothing that `score` does not
                yield self._lost(worker, error)
            return
        match found:
            case KTOError():
                self._end(worker)
                yield Failed(worker, one.node.id, found)
            case _Opened():
                one.log = f"{found.log} on {one.node.name}"
                yield Ready(worker, found.place._replace(node=one.node.name))
            case _Scored(answer, tokens):
                one.tokens = tokens  # the answer has them, so that older news, which may come later, add none
                yield Answered(worker, answer)
            case (tokens, lines):
                yield from (Said(worker, line) for line in lines)
                if tokens > one.tokens:
                    yield Scored(worker, tokens - one.tokens)
                    one.tokens = tokens

    def _lost(self, worker: str, error: Exception) -> Lost:
        """Forget a worker. Its node lives on if Ray could tell how the process ended; a node that is gone tells nothing."""
        one = self._workers[worker]
        is_told = isinstance(error, self._ray.exceptions.ActorDiedError)
        if not is_told:
            self._suspects[one.node.id] = time.monotonic() + _SECONDS_UNTIL_NODE_IS_KNOWN_DEAD
        is_node_alive = is_told and one.node.id in {node.id for node in self._nodes()}
        self._end(worker)  # one that is merely out of reach may still hold its GPU
        why = "its process died" if is_node_alive else "its node is gone"
        if getattr(error, "preempted", False):
            why = "preempted"
        if is_node_alive and not one.log:
            self._log.is_named = True
        log = one.log or str(self.log)
        return Lost(worker, one.node.name, why, is_node_alive, log if is_node_alive else "")

    def _end(self, worker: str) -> None:
        one = self._workers.pop(worker)
        self._calls = {call: what for call, what in self._calls.items() if what[0] != worker}
        if self._is_head_lost:  # it would be the one to end it
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(one.handle)

    def stop(self) -> None:
        with self._undo, contextlib.suppress(ConnectionError):
            if not self._is_head_lost:
                with contextlib.suppress(ModelError):
                    self._nodes(_SECONDS_TO_STOP_WITHOUT_HEAD)
            busy = [call for call, (_, method) in self._calls.items() if method == "score"]
            for worker in self._workers:
                self._call(worker, "stop")
            if busy:
                seconds = _SECONDS_TO_STOP_WITHOUT_HEAD if self._is_head_lost else SECONDS_TO_STOP
                self._ray.wait(busy, num_returns=len(busy), timeout=seconds)
            for worker in list(self._workers):
                self._end(worker)


def _end_without_head(ray: Any) -> None:
    """Let this process end at once when it ends: Ray would wait for the head, then end it without a message, or crash."""
    sys.excepthook = sys.__excepthook__  # Ray's would report an error to the head
    atexit.unregister(ray.shutdown)
    atexit.register(os._exit, 1)


def _answer_within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Return what `ask` returns, or raise what it raises. Raises: TimeoutError: it took longer; it may never return."""
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:  # noqa: BLE001 - the caller raises it
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found


def _import_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ConfigError("--cluster needs Ray: pip install 'offline-kto[ray]'") from None
    return ray


def _connect(ray: Any, address: str, log: _Log) -> None:
    """Connect to a cluster, and keep our handler of SIGTERM: Ray's exits without a message.

    Raises:
        ConfigError: there is none, or it has other versions.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address != "auto":
            _check_reachable(address)
        with redirect_stdout(log.file), redirect_stderr(log.file):
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _unreachable(address, error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _shut_down(ray: Any, log: _Log) -> None:
    with redirect_stdout(log.file), redirect_stderr(log.file):  # it prints what it held back
        ray.shutdown()


def check_cluster(address: str) -> None:
    """Connect to a cluster for a moment, before the feedback is read.

    Raises:
        ConfigError: no cluster is there, it has other versions, or Ray is not installed.
    """
    ray = _import_ray()
    with _ray_output_in_log() as log:
        try:
            _connect(ray, address, log)
        finally:
            _shut_down(ray, log)


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--cluster {printable(address, 100)}: no Ray cluster can be reached there: {in_one_line(error).rstrip('.')}. Start one with "
        "`ray start --head`, and use the same versions of Python and Ray on all nodes."
    )


def _check_reachable(address: str) -> None:
    """Try an address for some seconds. Raises: OSError. Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT).close()


def _room(resources: Mapping[str, float], gpus: int) -> int:
    """Return the number of workers that fit on a node, whoever uses it now."""
    return int(resources.get("GPU", 0.0) // gpus if gpus else resources.get("CPU", 0.0))


@contextlib.contextmanager
def _ray_output_in_log() -> Iterator[_Log]:
    """Send what Ray prints in this process to a log file: sixty lines for one lost node.

    The file is removed when the block ends, unless it contains something and either a message names it or an error ends the
    block.
    """
    path = Path(tempfile.mkstemp(prefix="kto-precompute-ray-", suffix=".log")[1])
    with contextlib.ExitStack() as stack:
        log = _Log(stack.enter_context(path.open("w", encoding="utf-8", errors="backslashreplace")))
        handler, logger = logging.StreamHandler(log.file), logging.getLogger("ray")
        handlers, propagate = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [handler], False
        try:
            with library_output_in(log.file, threads="ray_"):
                yield log
        except BaseException:
            log.is_named = True
            raise
        finally:
            logger.handlers, logger.propagate = handlers, propagate
            log.file.flush()
            if not (log.is_named and path.stat().st_size):
                path.unlink()
