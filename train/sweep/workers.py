"""The worker processes of a sweep, seen from the sweep."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import ModuleType
from typing import Final

from offline_kto.kto_core.cache.manifest_fields import RowsIdentity
from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.runtime import keep_freed_memory, quiet_libraries
from offline_kto.kto_core.streams import encode_all
from offline_kto.train.config import TrainConfig
from offline_kto.train.run_records import TrainedWith
from offline_kto.train.sweep.messages import Lost, Message
from offline_kto.train.sweep.space import Trials

START: Final = "spawn"  # threads and CUDA do not survive a fork

# Given to a worker for its own end.
_LAST_SECONDS = 10.0

# Where a system with GPUs for torch shows them: NVIDIA, the same under Windows' Linux, AMD.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import the program which called this one: a script without a guard would run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """One process, and the pipe to it."""

    def __init__(
        self, context: SpawnContext, rows: dict[str, RowsIdentity], device: str | None, threads: int | None
    ) -> None:
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_process, args=(theirs, rows, device, threads), daemon=True)
        # Ctrl-C reaches all processes; the sweep ends its workers, which would say what they were importing.
        resource_tracker.ensure_running()  # else the first start would, and unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _without_main():
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # or the end of the process would not close the pipe

    def start(self, number: int, config: TrainConfig, folder: Path) -> None:
        """Send a trial. If the worker is gone, `Workers.wait` says so."""
        self._send(("trial", number, config, folder))

    def check(self, trials: Trials) -> None:
        """Ask whether cache, policy and options can be used."""
        self._send(("check", trials))

    def answer(self, word: str) -> None:
        """Answer a message that waits for it."""
        self._send(word)

    def _send(self, what: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(what)

    def end(self, *, at_once: bool) -> None:
        """End the process: at once, or when it sees that nothing more will come."""
        if at_once:
            self.process.terminate()
        self.pipe.close()
        self.process.join(_LAST_SECONDS)
        self.process.kill()
        self.process.join()


def _process(pipe: Connection, rows: dict[str, RowsIdentity], device: str | None, threads: int | None) -> None:
    """A worker's process. What decides how libraries behave is set before they are imported."""
    encode_all()
    keep_freed_memory()
    quiet_libraries()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    from offline_kto.train.sweep.worker import work

    with shown_lines():
        work(pipe, rows, threads)


class Workers:
    """So many processes. One that is lost is replaced.

    Args:
        count: of processes.
        trials: of the sweep.
        rows: what they must read, as `offline_kto.train.data.training_data.TrainingData.identity` says it.
    """

    def __init__(self, count: int, trials: Trials, rows: dict[str, RowsIdentity]) -> None:
        self._context = multiprocessing.get_context(START)
        self._devices = self.gpus(trials) or [None]
        alone = count == 1 or "OMP_NUM_THREADS" in os.environ
        self._threads = None if alone else max(1, (os.cpu_count() or 1) // count)
        self._rows = rows
        self._count, self._workers = count, [self._new(number) for number in range(count)]
        self.facts: TrainedWith = {}
        self._asked = False

    @staticmethod
    def gpus(trials: Trials) -> list[str | None]:
        """The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them."""
        if trials.base.get("device") == "cpu":
            return []
        if not any(map(os.path.exists, _GPU_DRIVERS)):
            return []
        import torch  # takes seconds

        if not torch.cuda.is_available():
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return [*visible.split(",")] if visible else [str(number) for number in range(torch.cuda.device_count())]

    def _new(self, number: int) -> Worker:
        return Worker(self._context, self._rows, self._devices[number % len(self._devices)], self._threads)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end(at_once=error[0] is not None or self._asked)  # nobody listens any more

    def __len__(self) -> int:
        return self._count

    def ask(self, trials: Trials) -> None:
        """Let the first worker look at cache, policy and options."""
        self._asked = True
        self._workers[0].check(trials)

    def told(self) -> TrainedWith:
        """What it says of them.

        Raises:
            TrainingError: they cannot be used, or no worker comes up.
        """
        worker, self._asked = self._workers[0], False
        try:
            verdict, found = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            raise TrainingError(f"A worker ended before its first trial ({_end_of(worker)}).") from None
        if verdict == "refused":
            raise TrainingError(found)
        self.facts = found
        return self.facts

    def idle(self, running: Iterable[Worker]) -> list[Worker]:
        """Workers without a trial."""
        busy = set(running)
        return [worker for worker in self._workers if worker not in busy]

    def wait(self, seconds: float) -> Iterator[tuple[Worker, Message]]:
        """Messages that have come, or come within so many seconds."""
        of_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(of_pipe), timeout=seconds):
            worker = of_pipe[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                yield worker, Lost(f"its process ended ({_end_of(worker)})")
                position = self._workers.index(worker)
                worker.end(at_once=True)
                self._workers[position] = self._new(position)
                continue
            yield worker, message


def _end_of(worker: Worker) -> str:
    code = worker.process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {-code}" + (", as for want of memory" if code == -9 else "")
