"""Define what the leader and a transport say to each other.

A transport starts workers somewhere (`local_workers`: child processes on this machine), hands them shards, and reports what
happens to them. It decides nothing: which shard is next, whether a loss matters and when to stop are the leader's
business. On its side a worker runs `offline_kto.precompute.worker.ShardWorker`.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from offline_kto.kto_core.cache.manifest_fields import ScoreDifference
from offline_kto.kto_core.errors import KTOError
from offline_kto.kto_core.options import as_plain
from offline_kto.precompute.config import OF_THE_RUN, PrecomputeConfig

# Options that name a file or a folder, or something that is none.
_PATHS = ("model", "adapter", "chat_template")


class Task(NamedTuple):
    """A shard to be scored. All of it is plain JSON, a few hundred bytes.

    Attributes:
        shard: its number.
        out: folder of the cache, as the worker sees it. Its plan file is there, and the worker writes there.
    """

    shard: int
    out: str


class Answer(NamedTuple):
    """What a worker did with a shard.

    Attributes:
        is_written: whether the shard was written. If not, its scores are in its parts, and it waits for scores of others.
        rows, bytes, sha256: of the file.
        scored, tokens: sequences that were scored, and the tokens in them.
        seconds: of scoring.
        difference: the engine's difference from Transformers so far; None if Transformers scores.
    """

    is_written: bool
    rows: int
    bytes: int
    sha256: str
    scored: int
    tokens: int
    seconds: float
    difference: ScoreDifference | None


class WorkerPlace(NamedTuple):
    """Where a worker runs.

    Attributes:
        node: name of the machine.
        device: name of its GPU, or cpu.
        torch: version.
    """

    node: str
    device: str
    torch: str


class Ready(NamedTuple):
    """A worker has proven that it would score as the leader plans, and can be given a shard."""

    worker: str
    place: WorkerPlace


class Scored(NamedTuple):
    """A worker scored some tokens of its shard since its last event."""

    worker: str
    tokens: int


class Said(NamedTuple):
    """A worker has a line for the user."""

    worker: str
    line: str


class Answered(NamedTuple):
    """A worker is done with its shard, and can be given another."""

    worker: str
    answer: Answer


class Lost(NamedTuple):
    """A worker has ended without being asked to.

    Attributes:
        why: a few words, like SIGKILL.
        is_node_alive: whether its machine is still there, so that the shard may be the cause.
        log: where to read more; empty for nowhere.
    """

    worker: str
    node: str
    why: str
    is_node_alive: bool
    log: str


class Failed(NamedTuple):
    """A worker cannot continue for a reason that the user can remove; it has ended.

    Attributes:
        node: the machine, as `grow` is to avoid it: its name, or on Ray the id of the node, because several may have one address.
        error: a `RefusedError` if only workers on this node cannot take part.
    """

    worker: str
    node: str
    error: KTOError


Event: TypeAlias = Ready | Scored | Said | Answered | Lost | Failed


class Workers(Protocol):
    """A transport. All methods are called from one thread.

    A worker is started with `WorkerSettings` and makes a `ShardWorker` of them, which takes seconds to minutes. It sends
    `Ready`, then for each task `Scored` events and one `Answered`, and its log lines as `Said`. A `KTOError`, at any time, is
    sent as `Failed` with its class kept (`RefusedError` and `DisagreementError` mean something to the leader); any other end is
    `Lost`. After either of them nothing more is reported on that worker, and its name is never used again. All events of a
    shard that was submitted before its worker was lost come before `Lost`.

    Plan files, parts and shards go through the folder of the cache, which all machines see. Only small things go through the
    transport: tasks, answers and events, as JSON or by its own means.
    """

    @property
    def room(self) -> int:
        """Number of workers that there can be now."""

    def grow(self, wanted: int, avoid: Collection[str]) -> int:
        """Start workers until so many are starting or ready, as far as there is room now; return at once.

        Called again and again: when a worker was lost, and for machines that have joined.

        Args:
            avoid: machines whose workers were refused, as `Failed` names them.

        Returns:
            Number of workers that are starting or ready.
        """

    def submit(self, worker: str, task: Task) -> None:
        """Give a shard to a worker that is ready and has none. A worker that has just ended is reported as lost."""

    def wait(self, seconds: float) -> list[Event]:
        """Wait for events, in the order in which they happened; an empty list after so many seconds."""

    def stop(self) -> None:
        """End all workers. Those that score write their scores to parts first, as far as this takes seconds.

        Called once, also after errors.
        """


class WorkerSettings(NamedTuple):
    """What a worker is started with, as JSON.

    Attributes:
        options: of `PrecomputeConfig`.
        out: folder of the cache, as the worker sees it.
    """

    options: dict[str, Any]
    out: str

    @classmethod
    def of(cls, config: PrecomputeConfig, out: str) -> "WorkerSettings":
        """Return the settings for a worker of a run. Paths are absolute, because it may run in another folder."""
        options = {name: value for name, value in as_plain(config).items() if name not in OF_THE_RUN}
        for name in _PATHS:
            if options[name] is not None and Path(options[name]).exists():
                options[name] = os.path.abspath(options[name])
        return cls(options, os.path.abspath(out))

    @property
    def config(self) -> PrecomputeConfig:
        return PrecomputeConfig(**self.options)

    @property
    def folder(self) -> Path:
        return Path(self.out)
