"""The report of one GPU; `.ci/run` runs all three parts from end to end with tiny sizes on the CPU."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_claims import CLAIMS, claims_table  # noqa: E402
from gpu_report import ORDER  # noqa: E402
from gpu_results import Report  # noqa: E402
from gpu_tests import FILES, read_junit  # noqa: E402
from gpu_workload import SIZES, layer_weights  # noqa: E402


def report(tmp_path: Path, results: dict[str, Any], seconds: float = 60, *, dry: bool = False) -> Report:
    return Report(tmp_path / "part.json", time.monotonic() + seconds, dry, tmp_path, results, page=claims_table)


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
    assert found["losses with two token budgets, apart in the mean"] == "FALSIFIED"
    assert found["1.5B: time / TRL's, cached, its default"] == "not measured"
    results["0.5B ours auto"] = {**side(0.6, 96), "retries": 1}
    found = verdicts(report(tmp_path, results))
    assert found["0.5B: time / TRL's, cached, its default"] == "FALSIFIED"
    assert found["--max-tokens auto: largest share of the card, no retries"] == "FALSIFIED"
    assert "\n\ncard made up, memory 100\n" in report(tmp_path, results).text()


def test_a_dry_run_gives_no_verdict(tmp_path: Path) -> None:
    results = {"facts": {"card": "CPU"}, "0.5B ours auto": side(0.6, 96), "0.5B TRL cached": side(1.0, 70)}
    one = report(tmp_path, results, dry=True)
    assert set(verdicts(one).values()) == {"dry run, no figure", "not measured"}
    assert one.text().startswith("dry run with tiny sizes on the CPU, no figures\n")


def test_every_claim_has_its_sides() -> None:
    """A name that no side has would make a claim that is never measured."""
    names = {f"{size} {name}" for size, sides in ORDER for name, _ in sides}

    class Asked(Report):
        def value(self, name: str, key: str) -> float | None:
            assert name == "facts" or name in names
            return 1.0

    one = Asked(Path("unused"), 0.0, False, Path(), {name: side(1.0, 1.0) for name in names})
    assert all(claim.value(one) is not None for claim in CLAIMS)


def test_weights_of_layers_are_those_of_the_models_they_stand_for() -> None:
    """Published: 0.36, 1.31 and 6.98 thousand million parameters beside the embeddings."""
    found = [layer_weights(SIZES[size]) / 1e9 for size in ("0.5B", "1.5B", "8B")]
    assert found == pytest.approx([0.358, 1.310, 6.979], rel=1e-3)


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
    assert "not measured: late: 30 s were left, and it needs about 60 s" in one.path.with_suffix(".md").read_text()


def test_what_takes_too_long_is_no_failure(tmp_path: Path) -> None:
    one = report(tmp_path, {})

    def endless(left: float) -> dict[str, Any]:
        raise subprocess.TimeoutExpired("python", 44.7)

    assert one.add("endless", endless) is None
    assert not one.failed
    assert one.skipped == {"endless": "it did not end within 45 s"}


def test_none_is_begun_that_takes_longer_than_is_left(tmp_path: Path) -> None:
    one = report(tmp_path, {}, seconds=2)

    def slow(left: float) -> dict[str, Any]:
        time.sleep(1.1)
        return {}

    assert one.add("first", slow, needs=0, like="side") == {}
    assert one.add("second", slow, needs=0, like="side") is None
    assert one.add("other", lambda left: {}, needs=0, like="quick") == {}


def test_only_what_was_asked_for_is_measured(tmp_path: Path) -> None:
    one = report(tmp_path, {})
    one.only = "TRL|lean"
    for name in ("0.5B TRL live", "0.5B ours auto", "0.5B ours lean"):
        one.add(name, lambda left: {})
    assert one.add("0.5B scoring", lambda left: {}, always=True) == {}
    assert one.skipped == {"0.5B ours auto": "left out by --only"}


@pytest.mark.slow
def test_failures_and_reasons_of_skipped_tests_are_read(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='needs two CUDA devices')\n"
        "def test_left(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no file')\n"
        "def test_error(broken): pass\n"
    )
    words = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", tmp_path, tmp_path, "--junitxml"]
    subprocess.run([*words, tmp_path / "found.xml"], capture_output=True, check=False)
    found = read_junit(tmp_path / "found.xml")
    assert (found["passed"], found["skipped"]) == (1, {"needs two CUDA devices": 1})
    assert [failure.split(":")[0] for failure in found["failures"]] == ["test_bad", "test_error"]
    assert "one is not two" in found["failures"][0]


def test_every_file_of_gpu_tests_is_run() -> None:
    texts = {path.stem: path.read_text() for path in Path(__file__).parent.glob("test_gpu_*.py")}
    marked = {name for name, text in texts.items() if "\npytestmark = MARKS\n" in text}
    assert marked == {f"test_gpu_{name}" for name in FILES}


@pytest.mark.slow
def test_a_killed_report_keeps_its_results(tmp_path: Path) -> None:
    """End it as `timeout` does, together with the process that it waits for."""
    words = [sys.executable, BENCHMARKS / "gpu_report.py", "--part", "3", "--dry", "--out", tmp_path]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        assert started.stdout is not None
        next(line for line in started.stdout if line.startswith("0.5B scoring"))
        started.send_signal(signal.SIGTERM)
        printed = started.stdout.read()  # ends when no process has it open
    assert started.returncode == 143
    written = json.loads((tmp_path / "part-3.json").read_text())
    assert written["results"].keys() == {"facts", "output layer"}
    assert "no figures" in printed
    assert "no figures" in (tmp_path / "part-3.md").read_text()


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_without_time_ends_well(part: int, tmp_path: Path) -> None:
    words = [sys.executable, BENCHMARKS / "gpu_report.py", "--dry", "--minutes", "0.2", "--part", str(part)]
    done = subprocess.run([*words, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not measured: facts: 0 s were left" in done.stdout


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
