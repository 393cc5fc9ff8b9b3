"""Start, address and replace the worker processes of a sweep."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import ModuleType
from typing import Final

from offline_kto.kto_core.cache.manifest_fields import RowsIdentity
from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.runtime import keep_freed_memory, leave_out, quiet_libraries, use_expandable_segments
from offline_kto.kto_core.streams import encode_all
from offline_kto.train.config import TrainConfig
from offline_kto.train.run_records import TrainedWith
from offline_kto.train.sweep.messages import Lost, Message
from offline_kto.train.sweep.space import Trials

START: Final = "spawn"  # threads and CUDA do not survive a fork

# Time for a worker to end by itself.
_LAST_SECONDS = 10.0

# Device files of GPUs that torch can use: NVIDIA, NVIDIA under WSL, AMD.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes without importing the calling program: a script without a main guard would run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """One worker process and the pipe to it."""

    def __init__(
        self,
        context: SpawnContext,
        rows: dict[str, RowsIdentity],
        device: str | None,
        threads: int | None,
        needless: Sequence[str],
        sharing: int,
    ) -> None:
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_process, args=(theirs, rows, device, threads, needless, sharing), daemon=True
        )
        # Ctrl-C reaches all processes. The sweep ends its workers; a starting one would print an import's traceback.
        resource_tracker.ensure_running()  # otherwise the first start would run it, and unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _without_main():
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # otherwise the end of the process would not close the pipe

    def start(self, number: int, config: TrainConfig, folder: Path) -> None:
        """Send a trial. If the worker has ended, `Workers.wait` reports it."""
        self._send(("trial", number, config, folder))

    def check(self, trials: Trials) -> None:
        """Request a check whether cache, policy and options can be used."""
        self._send(("check", trials))

    def answer(self, word: str) -> None:
        """Answer a message that waits for an answer."""
        self._send(word)

    def _send(self, what: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(what)

    def end(self, *, at_once: bool) -> None:
        """End the process: at once, or when it reads the end of the pipe."""
        if at_once:
            self.process.terminate()
        self.pipe.close()
        self.process.join(_LAST_SECONDS)
        self.process.kill()
        self.process.join()


def _process(
    pipe: Connection,
    rows: dict[str, RowsIdentity],
    device: str | None,
    threads: int | None,
    needless: Sequence[str],
    sharing: int,
) -> None:
    """Run a worker's process; settings of the libraries are made before they are imported.

    Args:
        sharing: number of workers on its device.
    """
    for package in needless:
        leave_out(package)
    encode_all()
    keep_freed_memory()
    quiet_libraries()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    use_expandable_segments()
    from offline_kto.train.sweep.worker import work
    from offline_kto.train.trainer.memory import share_device

    if device is not None:
        share_device(sharing)
    with shown_lines():
        work(pipe, rows, threads)


class Workers:
    """A fixed number of worker processes; one that is lost is replaced.

    Args:
        count: number of processes.
        trials: trials of the sweep.
        rows: the rows to train on, as from `offline_kto.train.data.training_data.TrainingData.identity`.
        needless: packages that no trial needs; see `leave_out`.
    """

    def __init__(
        self, count: int, trials: Trials, rows: dict[str, RowsIdentity], *, needless: Sequence[str] = ()
    ) -> None:
        self._needless = needless
        self._context = multiprocessing.get_context(START)
        self._devices = self.gpus(trials) or [None]
        alone = count == 1 or "OMP_NUM_THREADS" in os.environ
        self._threads = None if alone else max(1, (os.cpu_count() or 1) // count)
        self._rows = rows
        self._count = count
        self._workers = [self._new(number) for number in range(count)]
        self.trained_with: TrainedWith = {}
        self._asked = False

    @staticmethod
    def gpus(trials: Trials) -> list[str | None]:
        """Return the GPUs that trials may use, as in CUDA_VISIBLE_DEVICES."""
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
        device = self._devices[number % len(self._devices)]
        sharing = len(range(number % len(self._devices), self._count, len(self._devices)))
        return Worker(self._context, self._rows, device, self._threads, self._needless, sharing)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end(at_once=error[0] is not None or self._asked)  # no answer is read any more

    def __len__(self) -> int:
        return self._count

    def ask(self, trials: Trials) -> None:
        """Ask the first worker to check cache, policy and options."""
        self._asked = True
        self._workers[0].check(trials)

    def told(self) -> TrainedWith:
        """Return the first worker's answer.

        Raises:
            TrainingError: the inputs cannot be used, or no worker starts.
        """
        worker, self._asked = self._workers[0], False
        try:
            verdict, found = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            raise TrainingError(f"A worker ended before its first trial ({_end_of(worker)}).") from None
        if verdict == "refused":
            raise TrainingError(found)
        self.trained_with = found
        return self.trained_with

    def idle(self, running: Iterable[Worker]) -> list[Worker]:
        """Return the workers without a trial."""
        busy = set(running)
        return [worker for worker in self._workers if worker not in busy]

    def wait(self, seconds: float) -> Iterator[tuple[Worker, Message]]:
        """Yield the messages that have arrived, or arrive within a number of seconds."""
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
    return f"signal {-code}" + (", perhaps because of too little memory" if code == -9 else "")
