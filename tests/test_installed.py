"""What is installed: one import name, whatever stands in the user's folder, from checkout, wheel and source archive."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "kto-precompute": "offline_kto.precompute.cli:precompute",
    "kto-cache": "offline_kto.precompute.cli:cache",
    "kto-train": "offline_kto.train.cli:train",
    "kto-sweep": "offline_kto.train.cli:sweep",
    "kto-report": "offline_kto.train.cli:report",
}


def run(*words: object, cwd: Path, path: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with a PYTHONPATH of its own."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": path} if path else {}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def script(folder: Path, command: str) -> Path:
    """Write a console script as pip does."""
    module, _, function = COMMANDS[command].partition(":")
    path = folder / command
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a user's own programs, each of which fails when it is imported."""
    folder = tmp_path / "theirs"
    (folder / "kto_core").mkdir(parents=True)
    for name in ("train.py", "precompute.py", "offline.py", "child.py", "kto_core/__init__.py", "configs.py"):
        (folder / name).write_text("raise SystemExit('a program of the user was run')\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("relative", [False, True], ids=["", "PYTHONPATH=."])
class TestAFolderWithProgramsOfTheSameNames:
    def test_all_commands_are_ours(self, theirs: Path, tmp_path: Path, relative: bool) -> None:
        for command in COMMANDS:
            path = os.pathsep.join([".", str(ROOT)] if relative else [str(ROOT)])
            said = run(sys.executable, script(tmp_path, command), "--version", cwd=theirs, path=path).stdout
            assert said.startswith(f"{command}, version ")

    def test_a_sweep_of_two_workers(self, theirs: Path, tmp_path: Path, cache: Path, relative: bool) -> None:
        (theirs / "sweep.yaml").write_text(
            "search: grid\nspace: {beta: [0.1, 0.2]}\n"
            "train: {max_steps: 1, batch_size: 8, device: cpu, eval_fraction: 0.3, save_steps: 0}\n"
        )
        words = [
            script(tmp_path, "kto-sweep"),
            "--cache",
            cache,
            "--config",
            "sweep.yaml",
            "--workers",
            2,
            "--out",
            "out",
        ]
        path = os.pathsep.join([".", str(ROOT)] if relative else [str(ROOT)])
        run(sys.executable, *words, cwd=theirs, path=path)
        trials = json.loads((theirs / "out/sweep.json").read_text())["trials"]
        assert [trial["state"] for trial in trials] == ["complete", "complete"]

    def test_an_engine_in_a_process_of_its_own(self, theirs: Path, base: Path, feedback: Path, relative: bool) -> None:
        program = (
            "import numpy as np\n"
            "from offline_kto.precompute.engines.process import engine_process\n"
            "from offline_kto.precompute.engines.protocol import scores_of\n"
            f"options = {{'model': {str(base)!r}, 'data': {str(feedback)!r}, 'device': 'cpu'}}\n"
            "settings = {'engine': 'transformers', 'options': options, 'save_to': None}\n"
            "row = np.array([1, 2, 3], dtype=np.int32), np.array([4, 5], dtype=np.int32)\n"
            "with engine_process(settings, name='it') as engine:\n"
            "    print(len(scores_of(engine, [row])[0]))\n"
        )
        (theirs / "mine.py").write_text(program)
        path = os.pathsep.join([".", str(ROOT)] if relative else [str(ROOT)])
        assert run(sys.executable, "mine.py", cwd=theirs, path=path).stdout == "2\n"


def build(kind: str, source: Path, out: Path) -> Path:
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    name = run(sys.executable, "-c", program, cwd=source).stdout.splitlines()[-1]
    return out / name


@pytest.mark.slow
def test_wheel_and_source_archive_work_without_the_checkout(tmp_path: Path, theirs: Path) -> None:
    archive = build("sdist", ROOT, tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    wheels = [build("wheel", source, tmp_path / "wheels")]
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed]
    run(*pip, *wheels, cwd=tmp_path)
    path = str(installed)
    where = run(sys.executable, "-P", "-c", "import offline_kto; print(offline_kto.__file__)", cwd=theirs, path=path)
    assert Path(where.stdout.strip()).is_relative_to(installed)
    for name in ("train", "precompute", "kto_core"):
        done = run(sys.executable, "-P", "-c", f"import {name}", cwd=theirs, path=path, check=False)
        assert "ModuleNotFoundError" in done.stderr
    for command in COMMANDS:
        said = run(sys.executable, installed / "bin" / command, "--help", cwd=theirs, path=path).stdout
        assert said.startswith(f"Usage: {command} ")
    refused = run(
        sys.executable,
        installed / "bin/kto-train",
        "--config",
        "lora",
        "--cache",
        "x",
        cwd=tmp_path,
        path=path,
        check=False,
    )
    assert refused.returncode == 1
    assert "x: no such folder" in refused.stderr
    assert "lora" not in refused.stderr
    page = "from offline_kto.train.report import report as r; from pathlib import Path; p = Path(r.__file__).parent\n"
    page += "print(*sorted(x.suffix for x in p.iterdir() if x.suffix in ('.css', '.js', '.j2')))"
    assert run(sys.executable, "-P", "-c", page, cwd=theirs, path=path).stdout.split() == [".css", ".j2", ".js", ".js"]
