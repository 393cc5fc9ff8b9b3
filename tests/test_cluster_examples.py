"""The files for Slurm and SkyPilot in examples/: parsed by their tools where these are installed, and run with a stand-in."""

import json
import os
import signal
import stat
import subprocess
import time
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
echo "${*//[[:space:]]/ }" >> "$JOBS" # one line: those of the file are counted
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


def test_a_job_at_its_time_limit_is_queued_again_and_a_cancelled_one_is_not(tmp_path: Path) -> None:
    """Slurm sends USR1 before the limit and TERM when a job is cancelled; `scontrol requeue` ends the job."""
    scripts = {
        "sbatch": 'for word in "$@"; do\ncase $word in --wrap=*--part*) echo "${word#--wrap=}" > "$FOLDER/job" ;; esac; done',
        "kto-precompute": 'trap "echo flushed >> $FOLDER/said; exit 143" TERM\n'
        'sleep 0.3; touch "$FOLDER/runs"; while true; do sleep 0.1; done',
        "scontrol": 'echo "$*" >> "$FOLDER/said"; kill -KILL $PPID',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    subprocess.run(["bash", SLURM], env=environment, check=True, capture_output=True)

    def ended_by(number: int) -> tuple[int, list[str]]:
        for name in ("said", "runs"):
            (tmp_path / name).unlink(missing_ok=True)
        job = subprocess.Popen(["bash", tmp_path / "job"], env=environment)
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        job.send_signal(number)
        code = job.wait(timeout=60)
        return code, (tmp_path / "said").read_text(encoding="utf-8").splitlines()

    assert ended_by(signal.SIGUSR1) == (-signal.SIGKILL, ["flushed", "requeue 17"])
    assert ended_by(signal.SIGTERM) == (143, ["flushed"])


def test_the_file_of_skypilot_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(SKYPILOT))
    assert (task.num_nodes, task.volumes) == (8, {"/shared": "kto-volume"})
    (resources,) = task.resources
    assert (resources.use_spot, resources.accelerators) == (True, {"H200": 8})
