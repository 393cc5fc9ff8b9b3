"""Prepare the two Python environments of a comparison: this one, and one with TRL and the same torch.

TRL gets its own virtual environment, `benchmarks/.venv-trl`. It is created on first use under the project's
`constraints.txt`, so that torch and transformers have the same versions on both sides. To create it ahead of time::

    python benchmarks/environments.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONSTRAINTS = HERE.parent / "constraints.txt"
TRL_DIR = HERE / ".venv-trl"
TRL_REQUIREMENT = "trl==1.16.0"
SHARED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")

# Importing the packages of both sides also reads their files into the page cache, so that the side that is timed first
# does not pay for the disk.
VERSIONS_SCRIPT = """
import importlib, json, sys
names = sys.argv[1:]
versions = {name: importlib.import_module(name).__version__ for name in names}
versions["python"] = sys.version.split()[0]
versions["threads"] = importlib.import_module("torch").get_num_threads()
print(json.dumps(versions))
"""


class EnvironmentMismatchError(RuntimeError):
    """The two sides would run with different versions, so a comparison would be meaningless."""


@dataclass(frozen=True)
class Environments:
    """The interpreters of both sides, and the packages installed in each (name -> version)."""

    our_python: Path
    trl_python: Path
    our_versions: dict[str, str]
    trl_versions: dict[str, str]

    def our_command(self, name: str) -> Path:
        """Return the path of `kto-precompute` or `kto-train` beside our interpreter."""
        path = self.our_python.parent / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; install the project there: pip install -e . -c constraints.txt"
            )
        return path

    def describe(self) -> str:
        """Return two lines for the top of a report: versions, threads, cores and the current load."""
        ours, trl = self.our_versions, self.trl_versions
        return (
            f"torch {ours['torch']}, transformers {ours['transformers']} on both sides, TRL {trl['trl']}, "
            f"Python {ours['python']}\n{os.cpu_count()} cores, {ours['threads']} torch threads; {load_average()}"
        )


def load_average() -> str:
    """Return the machine's load over the last 1, 5 and 15 minutes."""
    return "load average " + " ".join(f"{value:.2f}" for value in os.getloadavg())


def offline_env(work: Path) -> dict[str, str]:
    """Return the environment variables of both sides: no hub access, and empty caches inside `work`."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "HF_DATASETS_CACHE": str(work / "hf" / "datasets"),
    }


def prepare_environments(trl_python: Path | None = None) -> Environments:
    """Create TRL's environment if it is missing, and check that both sides have the same versions.

    Args:
        trl_python: An interpreter with TRL installed; None uses `benchmarks/.venv-trl`, creating it if needed.

    Raises:
        EnvironmentMismatchError: if torch, transformers, accelerate or tokenizers differ between the sides.
    """
    our_python = Path(sys.executable)  # not resolved: a virtual environment's interpreter is a link
    trl_python = trl_python or make_trl_environment()
    ours = installed_versions(our_python, SHARED_PACKAGES)
    trl = installed_versions(trl_python, (*SHARED_PACKAGES, "trl"))
    different = [f"{name} {ours[name]} here, {trl[name]} there" for name in SHARED_PACKAGES if ours[name] != trl[name]]
    if different:
        raise EnvironmentMismatchError(
            f"{our_python} and {trl_python} differ: {'; '.join(different)}. "
            f"Install the project under {CONSTRAINTS.name}, as the other environment is."
        )
    return Environments(our_python, trl_python, ours, trl)


def make_trl_environment() -> Path:
    """Return the interpreter of `benchmarks/.venv-trl`, made on first use and after a change of the constraints.

    Making it takes some minutes and a gigabyte.
    """
    python = TRL_DIR / "bin" / "python"
    complete = TRL_DIR / "complete"
    installed = f"{TRL_REQUIREMENT}\n{CONSTRAINTS.read_text(encoding='utf-8')}"
    if not complete.exists() or complete.read_text(encoding="utf-8") != installed:
        print(f"making {TRL_DIR} with {TRL_REQUIREMENT} under {CONSTRAINTS.name}", file=sys.stderr, flush=True)
        shutil.rmtree(TRL_DIR, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", TRL_DIR], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, TRL_REQUIREMENT, "torch"]
        subprocess.run(install, check=True, stdout=sys.stderr)
        complete.write_text(installed, encoding="utf-8")
    return python


def installed_versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of `packages` that `python` imports, its own version, and its number of torch threads."""
    result = subprocess.run(
        [python, "-I", "-c", VERSIONS_SCRIPT, *packages], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise EnvironmentMismatchError(f"{python} cannot import {', '.join(packages)}:\n{result.stderr.strip()}")
    return {name: str(version) for name, version in json.loads(result.stdout.splitlines()[-1]).items()}


def add_environment_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that every script with TRL shares."""
    parser.add_argument(
        "--trl-python",
        type=Path,
        help=f"an interpreter that has TRL (default: made in {TRL_DIR.relative_to(HERE.parent)} on first use)",
    )


def main() -> None:
    """Create TRL's environment and print the versions of both sides."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_environment_options(parser)
    print(prepare_environments(parser.parse_args().trl_python).describe())


if __name__ == "__main__":
    main()
