"""Processes of the tests themselves."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = "import sys; print(sys.argv[1:], 'torch' in sys.modules)"

# As on a GPU, after a library has asked for devices on its import.
BAD_FORK = f"""
import os, sys, pathlib, forks, torch
torch.cuda._is_in_bad_fork = lambda: True
forks._run({PROGRAM!r}, ["a b"], dict(os.environ), [pathlib.Path(one) for one in sys.argv[1:]])
"""


def test_a_fork_that_cannot_use_gpus_begins_anew(tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("stdout", "stderr")]
    for path in outputs:
        path.touch()
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", BAD_FORK, *map(str, outputs)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, check=True)
    assert outputs[0].read_text() == "['a b'] False\n"
