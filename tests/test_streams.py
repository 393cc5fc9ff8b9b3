"""Standard streams that are full, closed, ASCII or gone: the right one is named, and what a command does is not lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import yaml
from models import save_tiny

from offline_kto.kto_core.streams import is_terminal
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.sweep.worker import log_into
from offline_kto.train.sweep.workers import START, Worker

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "kto-precompute": "from offline_kto.precompute.cli import precompute as main",
    "kto-cache": "from offline_kto.precompute.cli import cache as main",
    "kto-train": "from offline_kto.train.cli import train as main",
    "kto-sweep": "from offline_kto.train.cli import sweep as main",
    "kto-report": "from offline_kto.train.cli import report as main",
}


def run(
    command: str, *arguments: object, shell: str = "", encoding: str | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own; `shell` says what happens to its streams."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= {} if encoding is None else {"PYTHONIOENCODING": encoding}
    words = [sys.executable, "-c", f"{COMMANDS[command]}; main()", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )


def assert_one_message(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture(scope="module")
def accented(feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose own name and whose model's go beyond ASCII and cp1252."""
    folder = tmp_path_factory.mktemp("cafe\u0301-\u65e5\u672c")
    base = save_tiny(folder / "mod\xe8le")
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=folder / "refs-\u0416", max_length=256))
    return folder / "refs-\u0416"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_behind_standard_output_is_named(command: str) -> None:
    done = run(command, "--help", shell="> /dev/full")
    assert_one_message(done, "standard output: cannot be written", "No space left")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("say", ["click.echo('x')", "print('x')", "quietly()"])
def test_a_full_disk_is_no_success_whoever_writes(say: str, unbuffered: str) -> None:
    """A library that catches whatever is raised included."""
    program = (
        "import click, contextlib, sys\n"
        "from offline_kto.kto_core.streams import own_streams\n"
        "def quietly():\n"
        "    with contextlib.suppress(Exception): print('x', flush=True)\n"
        f"with own_streams():\n    {say}\n    sys.exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "PYTHONUNBUFFERED": unbuffered}
    words = ["bash", "-c", '"$@" > /dev/full', "bash", sys.executable, "-c", program]
    assert_one_message(
        subprocess.run(words, env=environment, capture_output=True, text=True, check=False), "Error: standard output"
    )


def test_nothing_else_is_blamed_for_it(cache: Path, tmp_path: Path) -> None:
    assert_one_message(run("kto-cache", "info", cache, shell="> /dev/full"), "Error: standard output")
    assert_one_message(run("kto-cache", "verify", cache, shell="> /dev/full"), "Error: standard output")


def test_a_run_whose_output_cannot_be_written_does_not_blame_its_folder(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
    program = f"{full}{COMMANDS['kto-train']}; main()"
    done = forks.run(program, "--cache", cache, "--out", out, "--max-steps", 1)
    assert_one_message(done, "Error: standard output: cannot be written")
    assert not out.exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(cache: Path, closed: str) -> None:
    done = run("kto-cache", "verify", cache, shell=closed)
    assert done.returncode == 0, done
    if closed == "2>&-":
        assert "all match the manifest" in done.stdout
    bad = run("kto-cache", "verify", cache / "none", shell=closed)
    assert bad.returncode == 1
    assert ("Error: " in bad.stderr) == (closed == ">&-")


def test_what_is_opened_later_does_not_get_a_closed_streams_number(tmp_path: Path) -> None:
    """Else whatever is printed would go into that file."""
    program = (
        "import os, sys\n"
        "from offline_kto.kto_core.streams import own_streams\n"
        "with own_streams():\n"
        "    file = open(sys.argv[1], 'wb')\n"
        "    os.write(1, b'printed by a library')\n"
        "    print('printed')\n"
        "    file.write(b'kept')\n"
    )
    path = tmp_path / "file"
    words = [sys.executable, "-c", program, str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    subprocess.run(["bash", "-c", '"$@" >&-', "bash", *words], env=environment, check=True)
    assert path.read_bytes() == b"kept"


@pytest.mark.parametrize("shell", ["2> /dev/full", "2>&-"])
def test_an_error_that_cannot_be_told_is_still_an_exit_status(cache: Path, shell: str) -> None:
    assert run("kto-cache", "verify", cache / "none", shell=shell).returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1:strict", "utf-8"])
def test_names_that_a_stream_cannot_encode_are_escaped(accented: Path, encoding: str) -> None:
    done = run("kto-cache", "verify", accented, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert ("refs-\u0416:" if encoding == "utf-8" else r"refs-\u0416:") in done.stdout
    assert_one_message(run("kto-cache", "verify", accented / "none", encoding=encoding), "none")


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    program = (
        "from offline_kto.kto_core.streams import own_streams\nwith own_streams():\n    while True: print('row')\n"
    )
    words = ["bash", "-o", "pipefail", "-c", '"$@" | head -c 1', "bash", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "r", "")


def test_a_trial_needs_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        with log_into(tmp_path / "log.txt"):
            os.write(1, b"from a library")
    assert (tmp_path / "log.txt").read_bytes() == b"from a library"


@pytest.mark.slow
def test_a_sweep_of_names_that_a_stream_cannot_encode(accented: Path, tmp_path: Path) -> None:
    settings = {
        "search": "grid",
        "space": {"beta": [0.1, 0.2]},
        "train": {"max_steps": 1, "batch_size": 8, "device": "cpu"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "sw\xe9ep-\u65e5"
    given = ["--cache", accented, "--config", tmp_path / "sweep.yaml", "--out", out]
    done = run("kto-sweep", *given, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert (out / "results.csv").read_text(encoding="utf-8").count(",complete,") == 2
    assert (out / "best" / "model.safetensors").exists()


def test_nothing_waits_in_a_buffer_that_the_user_switched_off() -> None:
    program = (
        "import os\n"
        "from offline_kto.kto_core.streams import own_streams\n"
        "with own_streams():\n"
        "    print('printed', end='')\n"
        "    os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "printed"


def test_a_worker_is_not_interrupted_before_it_can_say_so() -> None:
    """Ctrl-C reaches it while it imports, for seconds, and would end in its traceback."""
    worker = Worker(multiprocessing.get_context(START), {}, None, None, (), 1)
    try:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
    finally:
        worker.end(at_once=True)
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    assert blocked & 1 << (signal.SIGINT - 1)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_a_process_without_a_console_has_no_terminal() -> None:
    assert not is_terminal(None)


LIBRARY = """
import os, sys, threading
from offline_kto.kto_core.streams import library_output_in, own_streams

def library():
    print("printed by a thread")
    print("error of a thread", file=sys.stderr)

with own_streams(), open(sys.argv[1], "w") as log:
    print("before")
    with library_output_in(log, threads="lib_"):
        thread = threading.Thread(target=library, name="lib_listener")
        thread.start()
        thread.join()
        os.write(1, b"written to 1\\n")
        os.write(2, b"written to 2\\n")
        print("ours")
        print("our error", file=sys.stderr)
        assert not sys.stdout.isatty()
    print("after")
    os.write(1, b"written after\\n")
"""


def test_what_a_library_prints_goes_to_its_log_and_our_lines_do_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, tmp_path / "log"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "our error\n")
    # The last line passes Python's buffer.
    assert sorted(done.stdout.splitlines()) == ["after", "before", "ours", "written after"]
    logged = ["error of a thread", "printed by a thread", "written to 1", "written to 2"]
    assert sorted((tmp_path / "log").read_text().splitlines()) == logged


def test_an_output_that_cannot_be_written_ends_the_command_next_to_a_library_too(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" > /dev/full', "bash", sys.executable, "-c", LIBRARY, tmp_path / "log"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: standard output: cannot be written")
