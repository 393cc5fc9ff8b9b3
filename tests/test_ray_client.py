"""A cluster that is reached through Ray's client server (ray://). A file of its own: the server belongs to the head."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_ray_workers import Nodes

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def free_port() -> int:
    """Return a port outside of those that Ray gives to its workers (10,002 to 19,999)."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
        if port > 20_000:
            return port


def test_a_cache_through_a_client_equals_that_of_one_process(
    base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("grpc")  # of ray[client]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    given = {"model": str(base), "data": str(feedback), "rows_per_shard": 5, "device": "cpu"}
    precompute(PrecomputeConfig(**given, out=tmp_path / "one"))
    handler, port = signal.getsignal(signal.SIGTERM), free_port()
    nodes = Nodes(ray_client_server_port=port)
    try:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        program = "from offline_kto.precompute.cli import precompute; precompute()"
        command = [sys.executable, "-c", program, *words, f"--out={tmp_path / 'many'}"]
        # In a process of its own: a process has one connection to Ray.
        done = subprocess.run(
            [*command, f"--cluster=ray://127.0.0.1:{port}"], capture_output=True, text=True, timeout=300
        )
    finally:
        nodes.cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cluster     ray://127.0.0.1:{port}: room for 2 workers now" in done.stdout
    shards = sorted((tmp_path / "one/train").iterdir())
    assert len(shards) >= 4
    for shard in shards:
        assert (tmp_path / "many/train" / shard.name).read_bytes() == shard.read_bytes()
