"""Engines for the tests of Ray's workers: they wait instead of scoring. Workers import this module by its name."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from offline_kto.kto_core.errors import CacheError
from offline_kto.precompute.worker import RefusedError, StoppedError
from offline_kto.precompute.workers import Answer, Task, WorkerPlace


class WaitingEngine:
    """Waits in steps of a twentieth of a second, each of them a token.

    Args:
        folder: gets a file `INDEX.PROCESS` for each shard that is begun.
        steps: of a shard.
        deadly: a shard that kills the process halfway; None for none.
        broken: a shard that raises an error that the user can fix, once another process has begun one.
    """

    def __init__(
        self, folder: str, *, steps: int, deadly: int | None, broken: int | None, should_stop: Callable[[], bool]
    ) -> None:
        self.folder, self.steps, self.deadly, self.broken = Path(folder), steps, deadly, broken
        self.should_stop = should_stop

    @property
    def place(self) -> WorkerPlace:
        return WorkerPlace(socket.gethostname(), "cpu", torch.__version__)

    def score(self, task: Task, on_tokens: Callable[[int], None]) -> Answer:
        (self.folder / f"{task.shard}.{os.getpid()}").touch()
        for step in range(self.steps):
            time.sleep(0.05)
            on_tokens(1)
            if step == self.steps // 2 and task.shard == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if task.shard == self.broken and self._is_another_busy():
                raise CacheError(f"{task.out}: shard {task.shard} cannot be written.")
            if self.should_stop():
                (self.folder / f"{task.shard}.stopped").touch()
                raise StoppedError
        return Answer(True, 1, 1, "", 1, self.steps, self.steps * 0.05, None)

    def _is_another_busy(self) -> bool:
        return any(path.suffix != f".{os.getpid()}" for path in self.folder.iterdir())


def open_waiting(
    should_stop: Callable[[], bool], *, folder: str, steps: int, deadly: int | None, broken: int | None
) -> nullcontext[WaitingEngine]:
    return nullcontext(WaitingEngine(folder, steps=steps, deadly=deadly, broken=broken, should_stop=should_stop))


def waiting(
    folder: Path, *, steps: int = 20, deadly: int | None = None, broken: int | None = None
) -> Callable[[Callable[[], bool]], nullcontext[WaitingEngine]]:
    return partial(open_waiting, folder=str(folder), steps=steps, deadly=deadly, broken=broken)


def refused(should_stop: Callable[[], bool]) -> nullcontext[WaitingEngine]:
    raise RefusedError("another model")
