"""The report of one GPU runs from end to end on the CPU with tiny sizes, so that no minute on a card is lost on a typo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu_report.py"


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_of_the_report_measures_everything_but_trl(part: int, tmp_path: Path) -> None:
    words = [sys.executable, SCRIPT, "--dry", "--part", str(part), "--out", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"part-{part}.json").read_text(encoding="utf-8"))
    assert {name for name, reason in found["skipped"].items() if reason != "TRL cannot be imported"} == set()
    assert found["facts"]["card"] == "CPU"
    sides = {name: result for name, result in found["results"].items() if "median_seconds" in result}
    assert len(sides) == {1: 0, 2: 4, 3: 9}[part]
    for side in sides.values():
        assert all(seconds > 0 for seconds in side["seconds"])
        # Bfloat16 weights are rounded; the first loss is that of the reference.
        assert side["losses"][0] == pytest.approx(0.5, abs=1e-3)
    if part == 2:
        assert done.stdout.count("| not measured |") >= 8
        assert "| losses with two token budgets, apart |" in done.stdout
    if part == 3:
        assert found["results"]["sweep"]["apart"] == 0
        assert found["results"]["numerics: passes of 2k and of 32k tokens"]["largest"] < 1e-4
        assert found["results"]["0.5B profiled"]["shares"]["idle"] <= 1
