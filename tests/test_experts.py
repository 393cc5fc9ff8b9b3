"""Policies with stacked experts compute as their reference does, in 16 bits, and train in float32."""

from pathlib import Path

import pytest
import torch
import transformers
from feedback_files import write_feedback
from models import random_rows, save_tiny
from safetensors.torch import load_file

from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision, holds_experts
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.experts import cast_experts
from offline_kto.train.run.train_run import train

BFLOAT16, CPU = Precision(torch.bfloat16), torch.device("cpu")


@pytest.mark.parametrize("kernel", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "phimoe", "llama4"])
def test_policy_and_reference_are_one_function(family: str, kernel: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    policy, reference = (
        load_causal_lm(transformers.AutoModelForCausalLM, folder, precision=BFLOAT16, device=CPU, frozen=frozen)
        for frozen in (False, True)
    )
    if family == "llama4" and kernel != "eager":
        pytest.skip("this family has one implementation")
    for model in (policy, reference):
        model.config._experts_implementation = kernel
    batch = pad_sequences(random_rows(6))
    cast_experts(policy)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected = token_logps(reference, batch).token_logps
        found = token_logps(policy, batch).token_logps
    assert torch.equal(found, expected)
    found.sum().backward()
    for module in filter(holds_experts, policy.modules()):
        for name, one in module.named_parameters(recurse=False):
            assert one.grad is not None, name
            assert one.grad.dtype == one.dtype == torch.float32, name
            assert one.grad.abs().sum() > 0, name
            assert name not in vars(module)
    with torch.no_grad():  # without autocast nothing is cast
        plain = token_logps(policy, batch).token_logps
    assert (plain - expected).abs().max() > 1e-4


@pytest.mark.slow
def test_training_starts_at_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base", "mixtral")
    data = write_feedback(tmp_path / "f.jsonl", 20)
    refs = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=refs, dtype="bfloat16", device="cpu"))
    run = train(
        TrainConfig(
            cache=refs,
            out=tmp_path / "run",
            dtype="bfloat16",
            max_steps=2,
            batch_size=8,
            learning_rate=3e-3,
            save_steps=0,
            device="cpu",
            gradient_checkpointing=True,
        )
    )
    start = next(line for line in capsys.readouterr().out.splitlines() if "policy and cache differ by" in line)
    assert float(start.split("differ by ")[1].split()[0]) < 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run))
    experts = [name for name in before if "expert" in name and "gate" not in name]
    assert experts
    for name in experts:
        assert after[name].dtype == torch.float32
        assert not torch.equal(before[name].float(), after[name])
