"""The files for Slurm and SkyPilot in examples/: parsed by their tools where these are installed, and run with a stand-in."""

import json
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from forks import Commands

ROOT = Path(__file__).resolve().parents[1]
SLURM, SKYPILOT = ROOT / "examples/slurm_precompute.sh", ROOT / "examples/skypilot_precompute.yaml"

# Runs every job at once, as Slurm does after the jobs that it depends on, and prints its number.
SBATCH = r"""#!/bin/bash
set -euo pipefail
number=$(($(wc -l < "$JOBS") + 1))
echo "$*" >> "$JOBS"
ids=""
for word in "$@"; do
  case $word in
    --array=*) ids=$(seq $(tr - ' ' <<< "${word#--array=}")) ;;
    --wrap=*) line=${word#--wrap=} ;;
    --dependency=afterok:*) test "${word##*:}" -eq $((number - 1)) ;;
  esac
done
for id in ${ids:-none}; do
  SLURM_ARRAY_TASK_ID=$id bash -c "$line" >> "$JOBS.log" 2>&1
done
echo $number
"""


def test_the_scripts_are_bash() -> None:
    run = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))["run"]
    for text in (SLURM.read_text(encoding="utf-8"), run):
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_jobs_of_slurm_make_a_cache(base: Path, feedback: Path, tmp_path: Path) -> None:
    commands = Commands(tmp_path / "bin")
    sbatch, jobs = tmp_path / "bin/sbatch", tmp_path / "jobs"
    sbatch.write_text(SBATCH, encoding="utf-8")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    jobs.touch()
    words = ["bash", SLURM, "--model", base, "--data", feedback, "--out", tmp_path / "refs", "--rows-per-shard", "5"]
    environment = {**commands.environment, "JOBS": str(jobs), "PARTS": "3"}
    done = subprocess.run([*map(str, words)], env=environment, text=True, capture_output=True, check=False)
    log = Path(f"{jobs}.log").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr + log
    assert done.stdout == "jobs 1 (plan), 2 (parts 0 to 2), 3 (publish)\n"
    assert "planned     4 shards" in log
    assert [log.count(f"part        {i} of 3") for i in range(3)] == [1, 1, 1]
    run = json.loads((tmp_path / "refs/manifest.json").read_text(encoding="utf-8"))["run"]
    assert run["scored_sequences"] == 0, "the last job scored what the parts had scored"


def test_the_file_of_skypilot_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(SKYPILOT))
    assert (task.num_nodes, task.volumes) == (8, {"/shared": "kto-volume"})
    (resources,) = task.resources
    assert (resources.use_spot, resources.accelerators) == (True, {"H200": 8})
