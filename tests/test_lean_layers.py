"""Layers that keep fewer activations: the same scores bit for bit, gradients within bfloat16, half of the bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import random_rows, tiny_model

from offline_kto.kto_core.models.loading import disable_dropout
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.inputs import KeptMaterials
from offline_kto.train.run.train_run import train
from offline_kto.train.run.training_run import TrainingRun
from offline_kto.train.trainer import kto_trainer, lean_layers
from offline_kto.train.trainer.lean_layers import halve_activations, restore_layers

AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)
BATCH = pad_sequences(random_rows(4))


def scorable(family: str, **overrides: Any) -> Any:
    model = tiny_model(family, **overrides)
    add_scoring_forward(model)
    disable_dropout(model)
    return model.train()


def scores_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with AUTOCAST:
        logps = token_logps(model, BATCH).token_logps
        logps.sum().backward()
    return logps.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 6), ("mistral", 6), ("granite", 6), ("cohere", 2), ("mixtral", 2), ("gpt2", 0)]
)
def test_what_can_be_replaced_is(family: str, layers: int) -> None:
    """A router reads its norm in float32, so that one stays; so do layers of other kinds."""
    model = scorable(family)
    before = scores_and_gradients(model)
    with AUTOCAST:
        assert halve_activations(model, model, BATCH) == layers
    after = scores_and_gradients(model)
    assert torch.equal(before[0], after[0])
    for name, gradient in before[1].items():
        torch.testing.assert_close(after[1][name], gradient, rtol=0, atol=0.05 * float(gradient.abs().max()))
    restore_layers(model)
    again = scores_and_gradients(model)
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in before[1].items())


def test_a_layer_with_another_forward_method_keeps_it() -> None:
    """Liger and hub kernels put theirs on the module."""
    model = scorable("llama")
    mlp, norm = model.model.layers[0].mlp, model.model.layers[1].input_layernorm
    for module in (mlp, norm):
        module.forward = module.forward
    with AUTOCAST:
        assert halve_activations(model, model, BATCH) == 4
    restore_layers(model)
    assert "forward" in vars(mlp)
    assert "forward" in vars(norm)


def bytes_kept(layers: int, *, lean: bool) -> int:
    """Bytes that the backward pass of a model holds, without its weights and their copies."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, vocab_size=97, num_hidden_layers=layers, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    add_scoring_forward(model)
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if 130 in tensor.shape or 390 in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with AUTOCAST:
        assert not lean or halve_activations(model, model, BATCH)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            positions = torch.arange(130).expand(3, -1)
            model.model(input_ids=positions % 97, position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_half_of_the_bytes() -> None:
    """The formulas of docs/gpu.md, with q = h, k = h / 4, f = 3.5 h: 59 and 31 bytes a hidden unit and token."""
    for lean, formula in ((False, 59), (True, 31)):
        found = (bytes_kept(3, lean=lean) - bytes_kept(1, lean=lean)) / 2 / 390 / 128
        assert found == pytest.approx(formula, rel=0.02)


def test_other_scores_leave_the_layers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_norm", "_swiglu"):
        monkeypatch.setattr(lean_layers, name, lambda module, x: 1.1 * type(module).forward(module, x))
    model = scorable("llama")
    with AUTOCAST:
        assert halve_activations(model, model, BATCH) == 0
    assert not any("forward" in vars(module) for module in model.model.modules())


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    options: dict[str, Any] = {"batch_size": 8, "max_steps": 2, "learning_rate": 3e-3, "save_steps": 0}
    return TrainConfig(cache=cache, out=tmp_path / "a", device="cpu", dtype="bfloat16", **options)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_with_and_without(
    config: TrainConfig, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, lora_rank=rank)
    expected = records(train(config))
    assert "keep their inputs only" not in capsys.readouterr().out
    monkeypatch.setattr(kto_trainer, "can_halve_activations", lambda policy, **_: True)
    found = records(train(replace(config, out=tmp_path / "b")))
    assert "6 norms and SwiGLU layers keep their inputs only" in capsys.readouterr().out
    assert found[0]["loss"] == expected[0]["loss"]
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.02)
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=5e-3)


def test_trials_of_a_sweep_begin_with_the_usual_layers(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kto_trainer, "can_halve_activations", lambda policy, **_: True)
    kept = KeptMaterials()
    found = []
    for trial in range(2):
        out = tmp_path / f"{trial}"
        out.mkdir()
        TrainingRun.set_up(config, out, kept.data(config), kept).train()
        kept.take_back()
        found.append(records(out)[0]["grad_norm"])
    assert found[0] == found[1]
