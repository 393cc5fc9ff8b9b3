"""Packages that transformers would import for features that a run does not use."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import _needless as needless_of_run
from offline_kto.train.sweep.sweep import _needless as needless_of_sweep

ADAPTER = {"adapter": "folder"}


@pytest.mark.parametrize(
    ("options", "reference", "expected"),
    [
        ({}, {}, {"datasets", "peft"}),
        ({"lora_rank": 4}, {}, {"datasets"}),
        ({}, ADAPTER, {"datasets"}),
        ({"trust_remote_code": True}, {}, set()),  # its code may import anything
    ],
)
def test_packages_are_left_out_that_no_option_needs(
    options: dict[str, Any], reference: dict[str, Any], expected: set[str]
) -> None:
    manifest: Any = SimpleNamespace(reference=reference)
    trials: Any = SimpleNamespace(base=options, space={})
    assert set(needless_of_run(TrainConfig(cache=Path("refs"), **options), [manifest])) == expected
    assert set(needless_of_sweep(manifest, trials)) == expected


def test_a_search_over_lora_keeps_peft() -> None:
    manifest: Any = SimpleNamespace(reference={})
    trials: Any = SimpleNamespace(base={}, space={"lora_rank": [0, 4]})
    assert needless_of_sweep(manifest, trials) == ["datasets"]


def test_a_cache_behind_a_url_keeps_peft() -> None:
    assert needless_of_run(TrainConfig(cache="s3://bucket/refs"), []) == ["datasets"]


def test_the_trainer_does_not_import_what_is_left_out() -> None:
    """In a fresh interpreter: transformers looks for a package once."""
    script = """
import sys
from offline_kto.kto_core.runtime import leave_out
leave_out("datasets")
import transformers.trainer
assert sys.modules["datasets"] is None, "imported"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
