"""The report of one GPU; `.ci/run` runs all three parts from end to end with tiny sizes on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_report import CLAIMS, Report, claims_table  # noqa: E402


def report(tmp_path: Path, results: dict[str, Any], seconds: float = 60) -> Report:
    return Report(tmp_path / "part.json", time.monotonic() + seconds, True, tmp_path, results)


def side(seconds: float, peak: float, loss: float = 0.5) -> dict[str, Any]:
    return {"median_seconds": seconds, "peak_allocated": peak, "peak_reserved": peak, "losses": [loss], "retries": 0}


def verdicts(one: Report) -> dict[str, str]:
    return {claim.text: claim.verdict(one)[-1] for claim in CLAIMS}


def test_claims_hold_are_falsified_or_not_measured(tmp_path: Path) -> None:
    results = {
        "facts": {"card": "made up", "memory": 100},
        "0.5B ours auto": side(0.4, 90),
        "0.5B ours 8192": side(0.5, 40, loss=0.51),
        "0.5B TRL cached": side(1.0, 70),
        "0.5B TRL cached, no checkpointing": side(0.9, 90),
    }
    found = verdicts(report(tmp_path, results))
    assert found["0.5B: time / TRL's, cached, its default"] == "holds"
    assert found["0.5B: memory / TRL's, both without checkpointing"] == "holds"
    assert found["--max-tokens auto: largest share of the card, no retries"] == "holds"
    assert found["losses with two token budgets, apart"] == "FALSIFIED"
    assert found["1.5B: time / TRL's, cached, its default"] == "not measured"
    results["0.5B ours auto"] = {**side(0.6, 96), "retries": 1}
    found = verdicts(report(tmp_path, results))
    assert found["0.5B: time / TRL's, cached, its default"] == "FALSIFIED"
    assert found["--max-tokens auto: largest share of the card, no retries"] == "FALSIFIED"
    assert claims_table(report(tmp_path, results)).endswith("card made up, memory 100")


def test_what_fails_or_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    one = report(tmp_path, {}, seconds=30)

    def fails(left: float) -> dict[str, Any]:
        raise ValueError("exit code 2: no such option")

    assert one.add("late", fails, needs=60) is None
    assert not one.failed
    assert one.add("broken", fails, needs=1) is None
    assert one.failed
    assert one.add("fine", lambda left: {"value": 1}, needs=1) == {"value": 1}
    written = json.loads(one.path.read_text(encoding="utf-8"))
    assert written["results"] == {"fine": {"value": 1}}
    assert written["skipped"].keys() == {"late", "broken"}


@pytest.mark.slow
def test_one_side_is_timed(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "side.json"
    words = [sys.executable, BENCHMARKS / "gpu_side.py", "ours", "--cache", cache, "--out", out, "--batch-size", "4"]
    words += ["--warmup", "1", "--updates", "2", "--options", '{"device": "cpu"}']
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["seconds"]) == 2
    assert len(found["losses"]) == 3
