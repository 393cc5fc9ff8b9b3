import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/head_bench.py"


@pytest.mark.slow
def test_the_benchmark_of_the_output_layer_measures_all_variants():
    sizes = ["--device", "cpu", "--tokens", "40", "--sizes", "16x97,8x50", "--tiles", "16x32,64x64", "--repeats", "1"]
    done = subprocess.run([sys.executable, SCRIPT, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    measured = json.loads(lines[-1])["measured"]
    assert len(measured) == len(lines) - 4 == 2 * 4 * 3
    for one in measured:
        assert one["milliseconds"] > 0
        assert one["peak_mib"] is None
        assert (one["hidden_error"] is None) == (one["step"] == "scores")
        assert (one["weight_error"] is None) == (one["step"] != "trained")
        # Only the tiles keep float32 logits.
        assert one["score_error"] < (1e-5 if one["variant"].startswith("plain") else 0.05)
        assert 0 < (one["hidden_error"] or 1e-3) < 0.02
        assert 0 < (one["weight_error"] or 1e-3) < 0.02
