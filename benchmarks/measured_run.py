"""Run one command and measure its duration and peak memory.

The command is started by this file run as a script, so that a small process is between the benchmark and the command:
Linux counts the memory of the process that started a command towards that command's own peak. For the same reason only
the standard library is imported.

    python benchmarks/measured_run.py /tmp/measured.json python -c 'print("x" * 100)'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One finished command: wall and processor time in seconds, peak resident memory in MiB of its largest process.

    Processor time is summed over threads and over child processes that ended before it.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float


class CommandFailedError(RuntimeError):
    """A measured command exited with a code other than 0; the message contains the end of its output."""


def run_measured(command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end, with its output in the file `log`.

    Raises:
        CommandFailedError: it failed; with the command and the end of its output.
    """
    words = [str(word) for word in command]
    report = log.with_suffix(".measured.json")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        wrapper = [sys.executable, "-I", "-S", __file__, str(report), *words]
        code = subprocess.call(
            wrapper,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise CommandFailedError(f"exit code {code} from:\n  {' '.join(words)}\n{tail}")
    measured = json.loads(report.read_text(encoding="utf-8"))
    return Measured(**measured)


def main() -> int:
    """Run argv[2:] as a child, write its time and peak memory to argv[1], exit with its code."""
    report, *command = sys.argv[1:]
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    record = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss * unit / 2**20,
    }
    Path(report).write_text(json.dumps(record), encoding="utf-8")
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code  # a signal, as a shell reports it


if __name__ == "__main__":
    if len(sys.argv) < 3:
        print(f"usage: {Path(__file__).name} REPORT.json COMMAND [ARGUMENT ...]\n\n{__doc__}")
        sys.exit(0 if sys.argv[1:] == ["--help"] else 2)
    sys.exit(main())
