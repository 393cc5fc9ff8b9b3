"""The two Python environments of a comparison: this one, and one that holds TRL beside the same torch.

TRL gets a virtual environment of its own, `benchmarks/.venv-trl`, made on first use under the project's
`constraints.txt`, so that torch and transformers are the same versions on both sides. To make it ahead of time::

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

# Importing what both sides import also brings their files into the page cache, so that whichever side is timed
# first does not pay for reading them from disk.
VERSIONS_SCRIPT = """
import importlib, json, sys
names = sys.argv[1:]
versions = {name: importlib.import_module(name).__version__ for name in names}
versions["python"] = sys.version.split()[0]
versions["threads"] = importlib.import_module("torch").get_num_threads()
print(json.dumps(versions))
"""


class EnvironmentMismatchError(RuntimeError):
    """The two sides would run on different versions, so that a comparison would say nothing about either program."""


@dataclass(frozen=True)
class Environments:
    """Interpreters of both sides, and what is installed in each (name -> version)."""

    our_python: Path
    trl_python: Path
    our_versions: dict[str, str]
    trl_versions: dict[str, str]

    def our_command(self, name: str) -> Path:
        """Path of `kto-precompute` or `kto-train`, as installed beside our interpreter."""
        path = self.our_python.parent / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; install the project there: pip install -e . -c constraints.txt"
            )
        return path

    def describe(self) -> str:
        """Two lines for the top of a report: versions, threads, cores and the load at this moment."""
        ours, trl = self.our_versions, self.trl_versions
        return (
            f"torch {ours['torch']}, transformers {ours['transformers']} on both sides, TRL {trl['trl']}, "
            f"Python {ours['python']}\n{os.cpu_count()} cores, {ours['threads']} torch threads; {load_average()}"
        )


def load_average() -> str:
    """The machine's load over the last 1, 5 and 15 minutes."""
    return "load average " + " ".join(f"{value:.2f}" for value in os.getloadavg())


def offline_env(work: Path) -> dict[str, str]:
    """What both sides run under: no hub, and caches inside `work`, so that nothing is reused from an earlier run."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "HF_DATASETS_CACHE": str(work / "hf" / "datasets"),
    }


def prepare_environments(trl_python: Path | None = None) -> Environments:
    """Make TRL's environment where it is missing and check that both sides share their versions.

    Args:
        trl_python: An interpreter that has TRL already; None uses (and makes) `benchmarks/.venv-trl`.

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
            f"Install the project under {CONSTRAINTS.name}, then remove {TRL_DIR} to have it made anew."
        )
    return Environments(our_python, trl_python, ours, trl)


def make_trl_environment() -> Path:
    """Interpreter of `benchmarks/.venv-trl`, made and filled on first use (some minutes and a gigabyte)."""
    python = TRL_DIR / "bin" / "python"
    complete = TRL_DIR / "complete"
    if not complete.exists():
        print(f"making {TRL_DIR} with {TRL_REQUIREMENT} under {CONSTRAINTS.name}", file=sys.stderr, flush=True)
        shutil.rmtree(TRL_DIR, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", TRL_DIR], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, TRL_REQUIREMENT, "torch"]
        subprocess.run(install, check=True, stdout=sys.stderr)
        complete.write_text(TRL_REQUIREMENT + "\n", encoding="utf-8")
    return python


def installed_versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of `packages` as `python` imports them, its own version, and its number of torch threads."""
    result = subprocess.run(
        [python, "-I", "-c", VERSIONS_SCRIPT, *packages], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise EnvironmentMismatchError(f"{python} cannot import {', '.join(packages)}:\n{result.stderr.strip()}")
    return {name: str(version) for name, version in json.loads(result.stdout.splitlines()[-1]).items()}


def add_environment_options(parser: argparse.ArgumentParser) -> None:
    """The option of every script here that runs TRL."""
    parser.add_argument(
        "--trl-python",
        type=Path,
        help=f"an interpreter that has TRL (default: made in {TRL_DIR.relative_to(HERE.parent)} on first use)",
    )


def main() -> None:
    """Make TRL's environment and print what both sides run on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_environment_options(parser)
    print(prepare_environments(parser.parse_args().trl_python).describe())


if __name__ == "__main__":
    main()
