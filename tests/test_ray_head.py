"""Ray's head is killed while a cluster scores. A file of its own: the cluster is gone afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ray_workers import Nodes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROGRAM = (
    "from offline_kto.precompute import ray_workers; ray_workers._SECONDS_WITHOUT_HEAD = 5.0\n"
    "from offline_kto.precompute.cli import precompute; precompute()\n"
)


def test_a_lost_head_ends_the_command_with_a_message(
    base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would end the process after a minute, without a word."""
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    handler = signal.getsignal(signal.SIGTERM)
    nodes, out = Nodes(), tmp_path / "refs"
    try:
        words = [f"--model={base}", f"--data={feedback}", f"--out={out}", "--rows-per-shard=1", "--device=cpu"]
        command = [sys.executable, "-c", PROGRAM, *words, f"--cluster={nodes.cluster.address}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as scoring:
            while scoring.poll() is None and not list(out.glob("train/[!.]*.parquet")):
                time.sleep(0.002)
            for server in nodes.cluster.head_node.all_processes["gcs_server"]:
                server.process.kill()
            printed, errors = scoring.communicate(timeout=120)
    finally:
        nodes.cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
    assert scoring.returncode == 1, printed + errors
    assert "Ray's head does not answer any more. Finished scores are kept. Start a cluster, and run the same" in errors
    assert "Traceback" not in errors
    assert "Failed to connect" not in errors
    assert "kept        " in printed
    assert not (out / "manifest.json").exists()
