"""Every command and every Python block of README and docs runs, or a comment above it says why not."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Block, blocks
from feedback_files import write_feedback
from forks import Commands, run

from offline_kto.kto_core.options import resolve
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials

LANGUAGES = {"bash", "fish", "python", "json", "yaml", "text"}

# Extras that a command of a page needs.
NEEDS = {"docs/training.md": "peft", "docs/sweeps.md": "optuna"}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    assert len(blocks(page)) * 2 == len(re.findall("^```", PAGES[page], re.M)), "a fence that is not at a line's start"
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in LANGUAGES, where
        assert block.name in ("", "not run", "file", "config", "mapping"), where
        assert block.language not in ("fish", "json", "yaml") or block.name, (
            f"{where}: say what it is, or why it is not run"
        )
        assert block.name != "not run" or len(block.value) > 3, where


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.name == "config" for b in blocks(page))])
def test_every_config_block_is_one(page: str, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.name == "config":
            path = tmp_path / "config.yaml"
            path.write_text(block.text, encoding="utf-8")
            if block.value == "sweep":
                config = resolve(SweepConfig, {"cache": Path("refs")}, yaml_path=path)
                assert Trials.of(config).warnings() == []
            else:
                resolve(TrainConfig, {}, yaml_path=path)


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, base: Path, feedback: Path) -> Path:
    """A folder with `refs`, scored with the options' defaults as pages do, and `other`, a cache of other prompts."""
    folder = tmp_path_factory.mktemp("scored")
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=folder / "refs"))
    other = write_feedback(folder / "other.jsonl", 12, seed=1)
    precompute(PrecomputeConfig(model=str(base), data=str(other), out=folder / "other"))
    return folder


@pytest.fixture
def desk(tmp_path: Path, base: Path, feedback: Path, scored: Path) -> Path:
    """The folder that pages are run in, with the names that they use."""
    desk = tmp_path / "desk"
    (desk / "examples/out").mkdir(parents=True)
    for name, target in (("base", base), ("examples/out/base", base), ("configs", ROOT / "configs")):
        (desk / name).symlink_to(target)
    shutil.copy(feedback, desk / "feedback.jsonl")
    for name in ("refs", "other"):
        shutil.copytree(scored / name, desk / name)
    return desk


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    """The commands of this checkout, whatever is installed."""
    return Commands(tmp_path / "bin")


def run_block(block: Block, desk: Path, commands: Commands) -> str:
    """Run a block; return what it printed."""
    environment = commands.environment
    if block.language == "bash":
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=desk,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    else:
        ran = run(f"import os; os.chdir({str(desk)!r})\n{block.text}", environment=environment)
    assert ran.returncode == 0, f"line {block.line}: {block.text}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def without_numbers(line: str) -> str:
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "#", re.sub(r"fingerprint \w+", "fingerprint", line)).rstrip()


def assert_shown(shown: str, printed: str) -> None:
    """Every line of a page stands in the output, in that order; numbers may be others."""
    found = iter([without_numbers(line) for line in printed.splitlines()])
    for line in map(without_numbers, shown.splitlines()):
        assert line in found, f"{line!r} is not printed there:\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.is_run for block in blocks(page))])
def test_the_commands_of_a_page_run(page: str, desk: Path, commands: Commands) -> None:
    """In the order of the page, each in the folder that the ones before it left. A text block right below is the output."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    found = blocks(page)
    if any(re.search(r"kto-precompute --model|kto\.precompute", block.text) for block in found if block.is_run):
        shutil.rmtree(desk / "refs")  # the page makes its own
    printed, last = "", 0  # of the block before, and the line it ends on
    for block in found:
        if block.name == "file":
            (desk / block.value).write_text(block.text, encoding="utf-8")
        elif block.is_run:
            printed, last = run_block(block, desk, commands), block.last
        elif block.language == "text" and block.line == last + 1:
            assert_shown(block.text, printed)


def test_output_that_is_not_printed_is_found_out() -> None:
    assert_shown("b  1\nc", "a\nb  2\nd\nc")
    with pytest.raises(AssertionError, match="'c' is not printed"):
        assert_shown("b\nc", "c\nb")
