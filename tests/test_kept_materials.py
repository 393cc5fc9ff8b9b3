"""A policy that is restored between the trials of a sweep, from its files as far as they hold its initial weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import save_tiny
from safetensors.torch import load_file, save_file

from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.train.run.inputs import _Initial, _tensors


def load(folder: Path) -> Any:
    return load_causal_lm(
        transformers.AutoModelForCausalLM,
        folder,
        precision=Precision(torch.float32),
        device=torch.device("cpu"),
        frozen=False,
    )


def spoil(model: Any) -> None:
    with torch.no_grad():
        for tensor in _tensors(model).values():
            tensor.add_(1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def assert_equal(model: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in _tensors(model).items():
        assert torch.equal(tensor, expected[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral", "opt"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_each_trial_begins_with_the_first_weights(family: str, stored: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    if stored == "bfloat16":
        narrow = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        narrow.save_pretrained(folder)
    model = load(folder)
    expected = copies(model)
    initial = _Initial.of((), model, folder, frozen=False)
    for _ in range(2):
        spoil(model)
        assert_equal(initial.restore(), expected)


def test_a_plain_model_is_not_copied(base: Path) -> None:
    """Eight workers with a copy each would need eight times its size of the host's memory."""
    model = load(base)
    initial = _Initial.of((), model, base, frozen=False)
    assert set(initial.in_files) == dict(model.named_parameters()).keys()
    assert initial.others.keys() == dict(model.named_buffers()).keys()


def test_weights_that_the_files_do_not_hold_are_kept(base: Path) -> None:
    """Change weights as merging an adapter into some layers does."""
    model = load(base)
    changed = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        changed.mul_(2)
    expected = copies(model)
    initial = _Initial.of((), model, base, frozen=False)
    assert "model.layers.0.mlp.up_proj.weight" in initial.others
    assert "model.layers.1.mlp.up_proj.weight" in initial.in_files
    spoil(model)
    assert_equal(initial.restore(), expected)


def test_a_folder_that_is_replaced_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    model = load(folder)
    expected = copies(model)
    initial = _Initial.of((), model, folder, frozen=False)
    others = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(others, tmp_path / "new", metadata={"format": "pt"})
    (tmp_path / "new").rename(folder / "model.safetensors")
    spoil(model)
    assert_equal(initial.restore(), expected)
    shutil.rmtree(folder)
    spoil(model)
    assert_equal(initial.restore(), expected)
