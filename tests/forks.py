"""Processes of their own that begin with the libraries imported: forked from one that has imported them and run nothing.

A fresh interpreter spends seconds on torch and transformers before it comes to what a test is about. What depends on
the start itself (streams, imports, torchrun, a sweep's own way to start its workers) is tested with fresh ones.
"""

import atexit
import contextlib
import gc
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shortcuts import take_shortcuts

# All that a run would import on its way is here, or each process would import it again.
PRELOADED = (
    "offline_kto.precompute.cli",
    "offline_kto.precompute.run",
    "offline_kto.precompute.pipeline",
    "offline_kto.precompute.engines.transformers_scorer",
    "offline_kto.train.cli",
    "offline_kto.train.run.train_run",
    "offline_kto.train.sweep.sweep",
    "offline_kto.train.sweep.worker",
    "offline_kto.train.report.figures",
    "offline_kto.train.report.plots",
    "optuna",
    "peft",
    "pyarrow.acero",
    "s3fs",
    "sqlalchemy.dialects.sqlite",
    "transformers.models.llama.modeling_llama",
)

# The beginning of a program that looks at what it imports: the modules of these packages are imported again.
AS_IF_FRESH = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("offline_kto", "optuna")]:
    del sys.modules[name]
"""

_CLIENT = Path(__file__).with_name("forked_command.py")

multiprocessing.set_forkserver_preload([*PRELOADED])
_CONTEXT = multiprocessing.get_context("forkserver")


class Fork:
    """A program in a process of its own, or in one for each rank of a launch.

    Args:
        program: Python code, as `python -c` takes it.
        arguments: its `sys.argv[1:]`.
        environment: variables beside those of this process.
        ranks: processes, told of each other as by torchrun; as there, one that fails ends the others. 0 for no launch.
    """

    def __init__(
        self, program: str, *arguments: object, environment: Mapping[str, str] | None = None, ranks: int = 0
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        common = {**os.environ, **(environment or {})}
        environments: list[dict[str, str]] = [common]
        if ranks:
            # As torchrun does, the parent keeps the store at which the ranks meet.
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environments = [{**common, **_rank(number, ranks, self._store.port)} for number in range(ranks)]
        self.processes = [
            _CONTEXT.Process(target=_run, args=(program, [*map(str, arguments)], variables, self._outputs))
            for variables in environments
        ]
        with warnings.catch_warnings():
            # A test that kills a whole group of processes may take the resource tracker along; it is started again.
            warnings.filterwarnings("ignore", "resource_tracker", UserWarning)
            for process in self.processes:
                process.start()
        atexit.register(self.kill)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self, number: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of the processes, or to all."""
        for process in self.processes if number is None else [self.processes[number]]:
            if process.is_alive():
                os.kill(process.pid or 0, by)

    def wait(self, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """Wait for the end.

        Returns:
            The exit code, of the first process that failed if one did, and what was printed.

        Raises:
            TimeoutError: it is still running, and has been killed.
        """
        end, code = time.monotonic() + timeout, 0
        while running := [process for process in self.processes if process.is_alive()]:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running: {self._outputs[1].read_text()[-3000:]}")
            if not code and (code := self._failure()):
                self.kill(by=signal.SIGTERM)
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1.0)
        atexit.unregister(self.kill)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in self._outputs)
        self._folder.cleanup()
        return subprocess.CompletedProcess([], code or self._failure(), stdout, stderr)

    def _failure(self) -> int:
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def run(program: str, *arguments: object, timeout: float = 200, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start a `Fork` and wait for its end."""
    return Fork(program, *arguments, **options).wait(timeout)


class Commands:
    """The commands of this checkout for a shell, each run in a `Fork`.

    Args:
        folder: for the programs that the shell finds.
    """

    def __init__(self, folder: Path) -> None:
        self._listener = multiprocessing.connection.Listener(family="AF_UNIX")
        self.folder = folder
        folder.mkdir()
        for entry in importlib.metadata.distribution("offline-kto").entry_points:
            program = folder / entry.name
            client = shlex.join([sys.executable, "-IS", str(_CLIENT), entry.module, entry.attr])
            program.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
            program.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment in which the shell finds the commands."""
        path = os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, "PATH": path, "COLUMNS": "100", "FORKED_COMMANDS": str(self._listener.address)}

    def _serve(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError):
                # The ranks of a launch wait for each other, so each is answered by a thread of its own.
                threading.Thread(target=self._answer, args=(self._listener.accept(),), daemon=True).start()

    def _answer(self, shell: "multiprocessing.connection.Connection") -> None:
        (module, function, *arguments), folder, environment = shell.recv()
        program = f"import os; os.chdir({folder!r}); from {module} import {function}; {function}()"
        done = run(program, *arguments, environment=environment)
        shell.send((done.returncode, done.stdout.encode(), done.stderr.encode()))


def _rank(number: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _run(program: str, arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """In the new process."""
    gc.freeze()  # what was imported stays: looking through it would take longer than most programs
    for number, path in enumerate(outputs, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if torch.cuda._is_in_bad_fork():
        # A library has asked for GPUs on its import, as bitsandbytes does: forks of such a process cannot use them.
        os.execv(sys.executable, [sys.executable, "-c", program, *arguments])
    take_shortcuts()
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
