"""Shared by all tests: one thread (tiny models are slower on more), and a cache made once."""

import gc
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch
from feedback_files import write_feedback
from gpus import REHEARSAL, pretend
from models import save_tiny
from shortcuts import take_shortcuts

from offline_kto.kto_core.console import shown_lines
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute

torch.set_num_threads(1)
# A busy machine is no reason to fail. The examples are the same in every run, so that a change is refused for its own
# faults only; `FUZZ_TIMES=20 pytest tests/test_fuzz.py` draws new ones, twenty times as many.
hypothesis.settings.register_profile(
    "project", deadline=None, print_blob=True, derandomize="FUZZ_TIMES" not in os.environ
)
hypothesis.settings.load_profile("project")


def pytest_collection_finish() -> None:
    """Set aside what was imported: each run collects garbage, and would look through all libraries for it."""
    take_shortcuts()
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def imports_set_aside() -> None:
    """Set aside what the tests of the module before have imported, as above."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Undo what a command changes in the environment of its process, which here goes on to the next test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember verified shards for one test only, and not in the user's own folder."""
    folder = tmp_path_factory.getbasetemp() / "own" / uuid.uuid4().hex
    monkeypatch.setattr("offline_kto.kto_core.cache.verified_shards.own_files", lambda: folder)


@pytest.fixture(autouse=True)
def lines_shown() -> Iterator[None]:
    """Show what the program tells, as its commands do."""
    with shown_lines():
        yield


@pytest.fixture(autouse=True)
def rehearsed_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bodies of tests marked `gpu` run on the CPU, if that was asked for."""
    if REHEARSAL and request.node.get_closest_marker("gpu"):
        pretend(monkeypatch)


@pytest.fixture
def warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the workers of sweeps from the process of forks.py: seconds saved, where starting is not the point."""
    monkeypatch.setattr("offline_kto.train.sweep.workers.START", "forkserver")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows of chat feedback on twelve prompts, of very different lengths."""
    return write_feedback(tmp_path_factory.mktemp("data") / "feedback.jsonl", 20)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, base: Path, feedback: Path) -> Path:
    """The reference cache of `feedback` under `base`, two mismatched completions for each row. Do not write to it.

    Scored in float32 on the CPU, also where there is a GPU, on which it would be bfloat16.
    """
    out = tmp_path_factory.mktemp("cache") / "refs"
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=out, kl_partners=2, max_length=256)
    precompute(replace(config, device="cpu", dtype="float32"))
    return out
