"""Memory options of bitsandbytes, with the real library on the CPU: a 4-bit base under LoRA, and an 8-bit optimizer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import random_rows, save_tiny, tiny_tokenizer
from safetensors.torch import load_file

from kto_core.errors import TrainingError
from kto_core.logps import token_logps
from kto_core.models import Precision, load_causal_lm
from kto_core.sequences import pad_sequences
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from train.config import TrainConfig
from train.lora import add_adapters
from train.run import train

pytestmark = [
    pytest.mark.slow,
    # On a CPU bitsandbytes looks for a faster kernel and says that it found none.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama stored in NF4."""
    folder = tmp_path_factory.mktemp("nf4")
    save_tiny(folder / "wide", hidden_size=64, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "wide", quantization_config=settings)
    model.save_pretrained(folder / "narrow")
    tiny_tokenizer().save_pretrained(folder / "narrow")
    return folder / "narrow"


@pytest.fixture(scope="module")
def quantized_cache(four_bits: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refs") / "refs"
    precompute(PrecomputeConfig(model=str(four_bits), data=str(feedback), out=out))
    return out


def first_and_last(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record for record in records if "loss" in record]
    return losses[0], losses[-1]


def test_adapters_on_a_quantized_base_learn(quantized_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=quantized_cache, out=tmp_path / "run", lora_rank=4, batch_size=20, epochs=20)
    run = train(replace(config, learning_rate=3e-3, save_steps=0))
    first, last = first_and_last(run)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert last["loss"] < 0.45
    stored = json.loads((quantized_cache / "manifest.json").read_text())["reference"]["quantization"]
    assert stored["bnb_4bit_quant_type"] == "nf4"


def test_every_adapter_on_a_quantized_base_gets_a_gradient(four_bits: Path) -> None:
    """bitsandbytes repacks weights in eval mode on some CPUs, and packed ones pass no gradient on."""
    cpu, precision = torch.device("cpu"), Precision(torch.float32)
    model = load_causal_lm(transformers.AutoModelForCausalLM, four_bits, precision=precision, device=cpu, frozen=True)
    model = add_adapters(model, TrainConfig(lora_rank=4), base="base")
    batch = pad_sequences(random_rows(4))
    with torch.no_grad():
        scored = token_logps(model.eval(), batch).token_logps
    learned = token_logps(model.train(), batch).token_logps
    torch.testing.assert_close(learned, scored, atol=1e-4, rtol=0)
    learned.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert found
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())


def test_quantized_weights_themselves_are_not_trained(quantized_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"quantised, and cannot be trained themselves.*--lora-rank"):
        train(TrainConfig(cache=quantized_cache, out=tmp_path / "run"))


def test_a_quantized_base_is_another_reference(cache: Path, four_bits: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=cache, out=tmp_path / "run", model=str(four_bits), lora_rank=4)
    with pytest.raises(TrainingError, match="not the model that the cache was scored with"):
        train(config)


def test_an_8_bit_optimizer_comes_through_the_training_table(cache: Path, tmp_path: Path, base: Path) -> None:
    config = TrainConfig(
        cache=cache, out=tmp_path / "full", batch_size=8, max_steps=5, learning_rate=1e-3, save_steps=0
    )
    full = train(config)
    small = train(replace(config, out=tmp_path / "small", training={"optim": "adamw_bnb_8bit"}))
    before, one, other = (load_file(folder / "model.safetensors") for folder in (base, full, small))
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (one[name] - before[name]).abs().mean()
    assert moved > 1e-4
    assert (one[name] - other[name]).abs().mean() < 0.1 * moved
    assert all(torch.isfinite(value).all() for value in other.values())
