"""`training: {full_determinism: true}`: the same bits again, with torch's deterministic algorithms."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses


@pytest.fixture
def deterministic_again() -> Iterator[None]:
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.mark.usefixtures("deterministic_again")
@pytest.mark.parametrize("options", [{}, {"loss": "humanline", "max_tokens": 200}, {"lora_rank": 2}])
def test_deterministic_algorithms_change_no_number(
    cache: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation of an update has a deterministic form: torch raises an error for one that has none."""
    config = TrainConfig(
        cache=cache,
        out=tmp_path / "a",
        batch_size=8,
        max_steps=3,
        learning_rate=3e-3,
        save_steps=0,
        device="cpu",
        **options,
    )
    plain = train(config)
    real, enabled = GradientPasses.run, []
    monkeypatch.setattr(
        GradientPasses,
        "run",
        lambda self, *args, **names: (
            enabled.append(torch.are_deterministic_algorithms_enabled()) or real(self, *args, **names)
        ),
    )
    exact = train(replace(config, out=tmp_path / "b", training={"full_determinism": True}))
    assert enabled == [True] * 3
    name = "adapter_model.safetensors" if config.lora_rank else "model.safetensors"
    assert (plain / name).read_bytes() == (exact / name).read_bytes()
