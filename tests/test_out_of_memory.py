"""A device without memory is recognised whichever library says so, and answered in the same way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offline_kto.kto_core.errors import ModelError, TrainingError
from offline_kto.kto_core.out_of_memory import is_out_of_memory, one_memory_error
from offline_kto.kto_core.scoring.model_code import model_code
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses

# What the libraries say, shortened.
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(torch.OutOfMemoryError), one_memory_error():
        raise error
    with pytest.raises(torch.OutOfMemoryError), model_code("somewhere", "something"):
        raise error


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_is_another_error(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, one_memory_error():
        raise error
    assert raised.value is error
    with pytest.raises(ModelError), model_code("somewhere", "something"):
        raise error


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(cache=cache, out=tmp_path / "run", batch_size=8, max_steps=2, save_steps=0, device="cpu")


@pytest.mark.parametrize("error", FULL[1:3], ids=str)
def test_a_pass_is_repeated_with_fewer_tokens(
    config: TrainConfig, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward, forward = GradientPasses.backward, ScoringPasses._forward

    def small_backward(self: GradientPasses, loss: Any, *, last: bool) -> None:
        if self.policy.max_tokens > 600:
            raise error
        backward(self, loss, last=last)

    def small_forward(self: ScoringPasses, *given: Any) -> Any:
        if self.max_tokens > 2500:
            raise error
        return forward(self, *given)

    monkeypatch.setattr(GradientPasses, "backward", small_backward)
    monkeypatch.setattr(ScoringPasses, "_forward", small_forward)
    train(config)
    said = capsys.readouterr().out
    assert "out of memory: continuing with --max-tokens 512" in said
    assert "out of memory: continuing with 2048 tokens in one scoring pass" in said


@pytest.mark.parametrize("error", FULL[:3], ids=str)
def test_the_first_step_of_the_optimizer_ends_in_a_message(
    config: TrainConfig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run out of memory while its states are allocated: half of the weights may be updated, so it is not repeated."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(TrainingError, match=r"Out of memory with --max-tokens 1024.*--memory lean"):
        train(config)
