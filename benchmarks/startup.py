"""Measure CPU seconds and imported modules of each command up to its first line, plan, and first update or score.

    python benchmarks/startup.py

Each command runs in its own process on a model of 1.3M parameters. CPU seconds are those of all threads of the process,
so that other load on the machine has little effect; there is one thread for arithmetic, because idle ones spin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import offline_env
from text_table import text_table
from workload import SMALL, make_workload

# What is measured up to: the beginnings of lines of each command.
MARKS = ("first line", "plan", "work")
PRECOMPUTE = ("offline_kto.precompute.cli:precompute", ("starting", "reference", "scored"))
TRAIN = ("offline_kto.train.cli:train", ("starting", "cache", "step"))
COMMANDS = {"kto-precompute": PRECOMPUTE, "kto-train": TRAIN, "kto-train, LoRA": TRAIN}
PROGRAM = """
import json, logging, sys, time
marks, found = json.loads(sys.argv.pop(1)), {}
class Clock(logging.Handler):
    def emit(self, record):
        line = record.getMessage()
        for name, words in marks.items():
            if name not in found and line.startswith(words):
                found[name] = [time.process_time(), len(sys.modules)]
logging.getLogger("offline_kto").addHandler(Clock())
module, _, function = sys.argv.pop(1).partition(":")
try:
    getattr(__import__(module, fromlist=["x"]), function)()
finally:
    print(json.dumps(found), file=sys.stderr)
"""


def measure(entry: str, lines: tuple[str, ...], options: list[str], work: Path) -> dict[str, tuple[float, int]]:
    """Run one command, and return CPU seconds and number of modules at each mark."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(dict(zip(MARKS, lines, strict=True))), entry, *options]
    environment = {**offline_env(work), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stderr.splitlines()[-1])


def main() -> None:
    """Run all commands and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        made = make_workload(work / "workload", data=None, num_rows=16, shape=SMALL, seed=0)
        train = [
            "--cache",
            str(work / "refs"),
            "--max-steps",
            "1",
            "--batch-size",
            "8",
            "--save-steps",
            "0",
            "--device",
            "cpu",
        ]
        options = {
            "kto-precompute": [
                "--model",
                str(made.model),
                "--data",
                str(made.data),
                "--out",
                str(work / "refs"),
                "--device",
                "cpu",
            ],
            "kto-train": [*train, "--out", str(work / "run")],
            "kto-train, LoRA": [*train, "--out", str(work / "lora"), "--lora-rank", "4"],
        }
        rows = []
        for name, (entry, lines) in COMMANDS.items():
            found = measure(entry, lines, options[name], work)
            rows.append([name, *(f"{found[mark][0]:.1f} s, {found[mark][1]:,}" for mark in MARKS)])
    print(text_table(["CPU seconds, modules", *MARKS], rows))


if __name__ == "__main__":
    main()
