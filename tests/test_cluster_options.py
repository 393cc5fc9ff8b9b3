"""What `--cluster` refuses before anything is read."""

import dataclasses
from pathlib import Path

import pytest

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.options import as_plain
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.precompute.workers import WorkerSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "0/2"}, "remove --part"),
        ({"plan_only": True}, "remove --part and --plan-only"),
        ({"device": "cuda:1"}, "Remove --device cuda:1"),
        ({"device": "all"}, "Remove --device all"),
        ({"out": "s3://bucket/refs"}, "--out must be a folder that all nodes see"),
    ],
)
def test_options_that_contradict_a_cluster_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrecomputeConfig(model="base", data="feedback.jsonl", cluster="auto", **options)  # type: ignore[arg-type]


def test_a_machine_without_a_gpu_does_not_choose_for_workers_that_have_one(
    base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", cluster="auto")
    for named in ({}, {"dtype": "bfloat16"}, {"backend": "transformers"}):
        with pytest.raises(ConfigError, match="Name both, like --dtype bfloat16 --backend transformers"):
            precompute(dataclasses.replace(config, **named))


def test_workers_get_absolute_paths(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    config = PrecomputeConfig(model=base.name, data="feedback.jsonl", out=Path("refs"), cluster="auto", workers=3)
    settings = WorkerSettings.of(config, str(config.out))
    assert settings.out == str(base.parent / "refs")
    assert settings.options["model"] == str(base)
    assert WorkerSettings.of(dataclasses.replace(config, model="org/name"), "refs").options["model"] == "org/name"
    # A worker is not a leader.
    assert {"cluster", "workers", "out"} <= {*as_plain(config)} - {*settings.options}
