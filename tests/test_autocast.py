"""Passes run in the precision that --dtype promises, however often and beside how many GPUs."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import offline_kto.kto_core.scoring.logps
from offline_kto.kto_core.errors import TrainingError
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.inputs import KeptMaterials, Materials
from offline_kto.train.run.train_run import train
from offline_kto.train.run.training_run import TrainingRun


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache,
        out=tmp_path / "run",
        batch_size=8,
        max_steps=1,
        learning_rate=3e-3,
        save_steps=0,
        device="cpu",
        dtype="bfloat16",
        allow_different_policy=True,  # the cache was scored in float32
    )


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The precision of every pass through the policy."""
    precisions: set[torch.dtype] = set()
    score = offline_kto.kto_core.scoring.logps._score

    def noted(*arguments: Any) -> Any:
        under = torch.is_autocast_enabled("cpu")
        precisions.add(torch.get_autocast_dtype("cpu") if under else torch.float32)
        return score(*arguments)

    monkeypatch.setattr(offline_kto.kto_core.scoring.logps, "_score", noted)
    return precisions


def first_update(config: TrainConfig, materials: Materials, out: Path) -> dict[str, Any]:
    out.mkdir()
    TrainingRun.set_up(config, out, materials.data(config), materials).train()
    materials.take_back()
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
def test_every_trial_of_a_sweep_trains_as_kto_train_does(
    config: TrainConfig, rank: int, found: set[torch.dtype], tmp_path: Path
) -> None:
    config, kept = replace(config, lora_rank=rank), KeptMaterials()
    alone = first_update(config, Materials(), tmp_path / "alone")
    for trial in range(3):
        record = first_update(config, kept, tmp_path / f"{trial}")
        for name in ("loss", "kl_raw", "grad_norm", "logps/chosen"):
            assert record[name] == alone[name], (trial, name)
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
def test_one_process_beside_several_gpus_trains_on_one(
    config: TrainConfig,
    rank: int,
    found: set[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 4))
    run = train(replace(config, lora_rank=rank))
    assert found == {torch.bfloat16}
    assert json.loads((run / "run.json").read_text())["precision"] == "bfloat16"
    assert "warning     4 GPUs here, but one process trains on one of them: torchrun" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_in_another_precision_is_not_trained(
    config: TrainConfig, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepare the policy as if accelerate left autocast out, or added it."""
    from accelerate import Accelerator

    def prepare(self: Accelerator, model: Any, *args: Any, **options: Any) -> Any:
        forward = model.forward

        def other(*given: Any, **named: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "float32" else nullcontext():
                return forward(*given, **named)

        model.forward = other
        return model

    monkeypatch.setattr(Accelerator, "prepare_model", prepare)
    with pytest.raises(TrainingError, match=f"but --dtype promises torch.{dtype}"):
        train(replace(config, dtype=dtype))
    assert not config.out.exists()
