"""Sweeps that several machines share: PostgreSQL and Optuna's gRPC proxy, with two hosts, of which one is killed."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
from test_sweep import TRAIN, complete, rows_of, wait_until, write_yaml

from offline_kto.kto_core.errors import ConfigError
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials
from offline_kto.train.sweep.storage import check_storage
from offline_kto.train.sweep.study import Study, process_place

PASSWORD = "pg-sEkret-9"

# A sweep on a machine of that name. Another machine is dead after a few seconds here, not after half a minute.
KTO_SWEEP = """
import os, socket, sys
host = sys.argv.pop(1)
socket.gethostname = lambda: host
from offline_kto.train.cli import sweep
from offline_kto.train.sweep import study, sweep as loop, workers
workers.START, study.GONE_SECONDS, study.BEAT_SECONDS, loop.BEAT_SECONDS = "fork", 10.0, 1.0, 1.0
os.makedirs(host, exist_ok=True)
os.chdir(host)
sweep()
"""
PROXY = """
import sys, warnings
from optuna.storages import get_storage, run_grpc_proxy_server
warnings.simplefilter("ignore")
run_grpc_proxy_server(get_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def programs_of_postgresql() -> Path | None:
    """The folder of initdb, which Debian keeps out of PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A server of its own. Returns: the URL of a database, with its password."""
    programs = programs_of_postgresql()
    if programs is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL's driver is not installed: pip install 'psycopg[binary]'")
    # initdb refuses root.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}

    def run(program: str, *arguments: str) -> None:
        # Not captured: pg_ctl leaves the server behind, which would keep a pipe open.
        subprocess.run([programs / program, *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL, **user)

    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "password").write_text(PASSWORD)
        if user:
            shutil.chown(folder, "postgres", "postgres")
        run("initdb", "-D", f"{folder}/data", "-U", "kto", f"--pwfile={folder}/password", "-A", "scram-sha-256", "-N")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        run("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            yield f"postgresql+psycopg://kto:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """Optuna's gRPC proxy in front of SQLite. Returns: its URL."""
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'offline-kto[grpc]'")
    port = free_port()
    server = forks.Fork(PROXY, f"sqlite:///{tmp_path}/behind.db", port)
    wait_until(lambda: answers(port))
    yield f"grpc://127.0.0.1:{port}"
    server.kill()
    server.wait()


def running_trial(folder: Path) -> str | None:
    """The folder's name of a trial that has trained a while and has not ended."""
    ended = {f"{int(row['trial']):04d}" for row in rows_of(folder) if row["state"] != "running"}
    begun = {path.parent.name for path in (folder / "trials").glob("*/metrics.jsonl")}
    return min(begun - ended, default=None)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["postgresql", "proxy"])
def test_a_killed_host_is_replaced_and_the_results_are_those_of_one_host(
    storage: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(storage)
    monkeypatch.chdir(tmp_path)
    space = {"beta": [0.05, 0.1, 0.3], "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    settings = {name: value for name, value in TRAIN.items() if name not in space} | {"max_steps": 30}
    config = SweepConfig(cache=cache, out=Path("out"), search="tpe", space=space, train=settings)
    path = write_yaml(tmp_path / "sweep.yaml", config, trials=5)

    def host(name: str, *more: str) -> forks.Fork:
        return forks.Fork(KTO_SWEEP, name, "--cache", cache, "--config", path, "--out", "out", *more)

    assert host("alone").wait().returncode == 0
    hosts = [host("one", "--storage", url), host("two", "--storage", url)]
    one, two = tmp_path / "one/out", tmp_path / "two/out"
    wait_until(lambda: complete(one) >= 1 and running_trial(one))
    interrupted = running_trial(one)
    hosts[0].kill()
    said = [hosts[0].wait(), hosts[1].wait()]
    assert [done.returncode for done in said] == [-signal.SIGKILL, 0], said[1].stderr
    assert (two / "trials" / str(interrupted) / "evaluation.json").exists()
    expected = (tmp_path / "alone/out/results.csv").read_bytes()
    assert (two / "results.csv").read_bytes() == expected
    said.append(host("one", "--storage", url).wait())  # nothing is left to do
    assert said[2].returncode == 0, said[2].stderr
    assert (one / "results.csv").read_bytes() == expected
    printed = "".join(done.stdout + done.stderr for done in said)
    written = [file.read_bytes() for folder in (one, two) for file in folder.rglob("*") if file.is_file()]
    for text in (printed.encode(), *written):
        assert PASSWORD.encode() not in text


@pytest.mark.slow
def test_a_proxy_that_ends_is_one_message_and_the_sweep_resumes(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'offline-kto[grpc]'")
    port, out = free_port(), tmp_path / "out"
    config = SweepConfig(cache=cache, out=out, search="grid", space={"beta": [0.05, 0.1, 0.3]}, train=TRAIN)
    settings = {name: value for name, value in TRAIN.items() if name != "beta"} | {"max_steps": 40}
    path = write_yaml(tmp_path / "sweep.yaml", replace(config, train=settings))
    behind = f"sqlite:///{tmp_path}/behind.db"

    def started() -> tuple[forks.Fork, forks.Fork]:
        server = forks.Fork(PROXY, behind, port)
        wait_until(lambda: answers(port))
        options = ("--cache", cache, "--config", path, "--out", out, "--storage", f"grpc://127.0.0.1:{port}")
        return server, forks.Fork(KTO_SWEEP, tmp_path / "host", *options)

    server, sweeper = started()
    wait_until(lambda: complete(out) >= 1)
    server.kill()
    server.wait()
    done = sweeper.wait()
    assert done.returncode == 1
    assert f"Error: grpc://127.0.0.1:{port}: the sweep's database cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr
    server, sweeper = started()
    assert sweeper.wait().returncode == 0
    server.kill()
    server.wait()
    assert [row["state"] for row in rows_of(out)] == ["complete"] * 3


def test_a_proxy_that_is_not_there(cache: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'offline-kto[grpc]'")
    url = f"grpc://127.0.0.1:{free_port()}"
    config = SweepConfig(cache=cache, search="grid", space={"beta": [0.1]}, train={}, storage=url)
    check_storage(url)
    with pytest.raises(ConfigError, match=rf"^{url}: the sweep's database cannot be used: .*[Cc]onnect") as refused:
        Study(config, Trials.of(config), url, {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("grpc://127.0.0.1", "is written grpc://HOST:PORT"),
        ("grpc://:13000", "is written grpc://HOST:PORT"),
        ("grpc:127.0.0.1:13000", "is written grpc://HOST:PORT"),
        ("grpc://host:70000", "is written grpc://HOST:PORT"),
        ("grpc://host:13000/study", "is written grpc://HOST:PORT"),
        ("grpc://me:CRET@host:13000", "is written grpc://HOST:PORT, without a user, a password"),
        ("postgresql+psycopg://kto:***@host/sweeps", r"its password is not stored in sweep\.yaml.*pgpass"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_storage(url)
    assert "CRET" not in str(refused.value)


@pytest.mark.parametrize("url", ["grpc://node-1.example:13000", "grpc://[::1]:13000", "grpc://127.0.0.1:13000/"])
def test_an_address_of_a_proxy_is_accepted(url: str) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'offline-kto[grpc]'")
    check_storage(url)


def test_a_proxy_without_its_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"needs grpcio.*pip install 'offline-kto\[grpc\]'"):
        check_storage("grpc://host:13000")


def test_machines_of_one_host_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clones of one image: the process ids of one mean nothing on the other."""
    here = process_place()
    (tmp_path / "boot_id").write_text("00000000-0000-4000-8000-000000000000\n")
    monkeypatch.setattr("offline_kto.train.sweep.study._BOOT_ID", tmp_path / "boot_id")
    assert process_place() != here
    assert process_place().partition(":")[0] == here.partition(":")[0]
