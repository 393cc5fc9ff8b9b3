"""Run workers as child processes on this machine, one for each GPU or group of GPUs.

leader  -- settings, tasks -->  standard input of the child, one end of a socket pair; JSON, an empty message ends it
        <-- events --           the same socket; what libraries print in the child goes to its log
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import cast

import torch

from offline_kto.kto_core.console import LOGGER, shown_lines
from offline_kto.kto_core.errors import ConfigError, KTOError
from offline_kto.kto_core.runtime import keep_freed_memory
from offline_kto.kto_core.streams import encode_all
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import Backend, gpu_groups
from offline_kto.precompute.engines.child_process import ChildProcess, WatchedChannel, channel_to_parent
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.worker import (
    KEPT_ERRORS,
    SECONDS_TO_STOP,
    LoggedLines,
    ShardWorker,
    StoppedError,
    kept_error,
)
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

_ERRORS = {kind.__name__: kind for kind in KEPT_ERRORS}


def worker_gpus(config: PrecomputeConfig, reference: Reference, backend: Backend) -> list[list[int] | None]:
    """Return the GPUs of each worker on this machine; None for a worker that sees what this process sees.

    Raises:
        ConfigError: `--workers` asks for more than there are.
    """
    device = reference.device
    if device.type != "cuda":
        return [None] * (config.workers or 1)
    if why := _why_one(config, reference, backend):
        if (config.workers or 1) > 1:
            raise ConfigError(f"--workers {config.workers}: {why}, which makes one worker. Leave --workers out.")
        return [None]
    groups = gpu_groups(config, device) if backend.name == "vllm" else [[i] for i in range(torch.cuda.device_count())]
    if config.workers is not None and config.workers > len(groups):
        here = torch.cuda.device_count()
        each = f", and each worker takes {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
        raise ConfigError(
            f"--workers {config.workers}: there {'is' if here == 1 else 'are'} {here} GPU{'s' * (here != 1)} here{each}. Leave it out "
            "to use all of them."
        )
    return list(groups[: config.workers])


def _why_one(config: PrecomputeConfig, reference: Reference, backend: Backend) -> str:
    """Return why there can be only one worker on a machine with GPUs; empty if there can be several."""
    named: int | None = reference.device.index
    if named is not None:
        return f"--device {config.device} names one GPU"
    if backend.name == "transformers" and reference.needs_all_gpus:
        return "all GPUs share the model"
    return ""


class LocalWorkers:
    """Workers in child processes; see `offline_kto.precompute.workers.Workers`.

    Args:
        config: the options of the run.
        out: folder of the cache.
        gpus: of each worker, from `worker_gpus`.
    """

    def __init__(self, config: PrecomputeConfig, out: str, gpus: Sequence[Sequence[int] | None]) -> None:
        self._settings = WorkerSettings.of(config, out)
        self._gpus = list(gpus)
        self._node = socket.gethostname()
        self._children: dict[str, tuple[int, ChildProcess]] = {}  # by name, with the position of its GPUs
        self._started = 0
        self._without_scores: set[str] = set()  # workers that start, or have scored nothing of their shard yet

    @property
    def room(self) -> int:
        return len(self._gpus)

    def grow(self, wanted: int, avoid: Collection[str]) -> int:
        taken = {slot for slot, _ in self._children.values()}
        free = [slot for slot in range(len(self._gpus)) if slot not in taken]
        while free and len(self._children) < wanted and self._node not in avoid:
            self._start(free.pop(0))
        return len(self._children)

    def _start(self, slot: int) -> None:
        child = ChildProcess(__name__, "main", environment=self._environment(self._gpus[slot]))
        self._started += 1
        name = f"worker {self._started}"
        self._children[name] = slot, child
        self._without_scores.add(name)
        self._send(child, self._settings._asdict())

    def _environment(self, gpus: Sequence[int] | None) -> dict[str, str]:
        if gpus is None:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] if names else str(gpu) for gpu in gpus)}

    def submit(self, worker: str, task: Task) -> None:
        self._without_scores.add(worker)
        self._send(self._children[worker][1], task._asdict())

    def _send(self, child: ChildProcess, content: Mapping[str, object]) -> None:
        try:
            child.channel.send_bytes(json.dumps(content).encode())
        except ConnectionError:
            return  # it has ended, which `wait` reports

    def wait(self, seconds: float) -> list[Event]:
        names = {child.channel: name for name, (_, child) in self._children.items()}
        if not names:
            time.sleep(seconds)
        return [self._hear(names[cast("Connection", channel)]) for channel in wait(list(names), seconds)]

    def _hear(self, worker: str) -> Event:
        child = self._children[worker][1]
        try:
            message = json.loads(child.channel.recv_bytes())
        except (ConnectionError, EOFError):
            return self._lost(worker)
        if "said" not in message:
            self._without_scores.discard(worker)
        match message:
            case {"ready": place}:
                return Ready(worker, WorkerPlace(**place))
            case {"scored": tokens}:
                return Scored(worker, tokens)
            case {"said": line}:
                return Said(worker, line)
            case {"answer": answer}:
                return Answered(worker, Answer(**answer))
        self._end(worker)
        child.log.unlink()
        return Failed(worker, self._node, _ERRORS[message["error"]](message["message"]))

    def _lost(self, worker: str) -> Lost:
        child = self._children[worker][1]
        why = child.signal_name() or "by itself"
        self._end(worker)
        return Lost(worker, self._node, why, is_node_alive=True, log=child.kept_log())

    def _end(self, worker: str) -> None:
        _, child = self._children.pop(worker)
        child.channel.close()
        child.end()

    def stop(self) -> None:
        children = [child for _, child in self._children.values()]
        for name, (_, child) in self._children.items():
            if name in self._without_scores:  # it might import libraries or load the model for minutes
                child.end(0.0)
        for child in children:
            try:
                child.channel.send_bytes(b"")
            except ConnectionError:
                continue  # it has ended
        deadline = time.monotonic() + SECONDS_TO_STOP
        for child in children:
            child.end(max(0.0, deadline - time.monotonic()))
            child.channel.close()
            child.log.unlink()
        self._children.clear()


class _Sender:
    """Sends events to the leader, from any thread."""

    def __init__(self, channel: WatchedChannel) -> None:
        self._channel, self._lock = channel, threading.Lock()

    def __call__(self, **event: object) -> None:
        with self._lock:
            self._channel.send_bytes(json.dumps(event).encode())


def main() -> None:
    """Serve the leader at the other end of standard input, in the child process."""
    encode_all()
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):  # the leader gets them too, and ends its workers
        signal.signal(number, signal.SIG_IGN)
    channel = channel_to_parent()
    settings = WorkerSettings(**json.loads(channel.recv_bytes()))
    with shown_lines():  # standard output is the log
        _serve(channel, settings)


def _serve(channel: WatchedChannel, settings: WorkerSettings) -> None:
    send = _Sender(channel)
    LOGGER.addHandler(LoggedLines(lambda line: send(said=line)))
    try:
        with ShardWorker(settings.config, settings.folder, should_stop=channel.is_dismissed.is_set) as worker:
            send(ready=worker.place._asdict())
            while request := channel.recv_bytes():
                answer = worker.score(Task(**json.loads(request)), lambda tokens: send(scored=tokens))
                send(answer=answer._asdict())
    except StoppedError:
        return
    except KTOError as error:
        send(error=type(kept_error(error)).__name__, message=str(error))
