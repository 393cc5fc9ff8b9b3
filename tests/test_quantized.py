"""Memory options of bitsandbytes, with the real library on the CPU: a 4-bit base under LoRA, and an 8-bit optimizer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from models import random_rows, save_tiny, tiny_tokenizer
from safetensors.torch import load_file

from offline_kto.kto_core.errors import ModelError, TrainingError
from offline_kto.kto_core.models.loading import keep_gradients_of_four_bits, load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.lora import add_adapters, remove_adapters
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.train_run import train

# On a CPU bitsandbytes looks for a faster kernel and says that it found none.
pytestmark = pytest.mark.filterwarnings("ignore")


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


@pytest.fixture(scope="module", params=["4 bits", "8 bits"])
def fine_tuned(request: pytest.FixtureRequest, four_bits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base in 4 or 8 bits with an SFT adapter, as QLoRA leaves them: (base, adapter)."""
    folder = tmp_path_factory.mktemp("sft")
    base = four_bits
    if request.param == "8 bits":
        base = folder / "base"
        settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
        wide = four_bits.parent / "wide"
        transformers.AutoModelForCausalLM.from_pretrained(wide, quantization_config=settings).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.fixture(scope="module")
def fine_tuned_cache(fine_tuned: Any, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, adapter = fine_tuned
    out = tmp_path_factory.mktemp("refs") / "refs"
    precompute(PrecomputeConfig(model=str(base), adapter=str(adapter), data=str(feedback), out=out))
    return out


def with_adapter(base: Path, adapter: Path) -> Any:
    """The naive way: peft's model, nothing merged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    keep_gradients_of_four_bits(model)  # some CPUs compute 4 bits in bfloat16 otherwise
    return model


def naive_logps(model: Any, row: dict[str, Any]) -> torch.Tensor:
    prompt, ids = row["prompt_ids"], torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def rows_of(cache: Path) -> list[dict[str, Any]]:
    return pq.read_table(cache / "train").to_pylist()


@pytest.mark.parametrize(
    ("storage", "computed"),
    [
        ("uint8", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("uint8", "bfloat16"),
        ("uint8", "float16"),
    ],
)
def test_four_bits_score_as_their_values_do_however_they_were_saved(
    storage: str, computed: str, four_bits: Path, feedback: Path, tmp_path: Path
) -> None:
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=computed,
    )
    wide = four_bits.parent / "wide"
    model = transformers.AutoModelForCausalLM.from_pretrained(wide, quantization_config=settings)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    precompute(PrecomputeConfig(model=str(tmp_path / "model"), data=str(feedback), out=tmp_path / "refs"))
    naive = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").dequantize().double()
    for row in rows_of(tmp_path / "refs"):
        np.testing.assert_allclose(row["ref_token_logps"], naive_logps(naive, row), atol=1e-4)


def test_an_adapter_on_quantized_weights_scores_as_peft_does(fine_tuned: Any, fine_tuned_cache: Path) -> None:
    model = with_adapter(*fine_tuned)
    for row in rows_of(fine_tuned_cache)[:6]:
        own = naive_logps(model, row)
        torch.testing.assert_close(torch.tensor(row["ref_token_logps"]).double(), own, atol=1e-4, rtol=0)
        with model.disable_adapter():
            assert (naive_logps(model, row) - own).abs().max() > 0.05


# "k_proj,down_proj" leaves layers that only the SFT adapter has; what joins the two adapters sees no bits.
@pytest.mark.parametrize(
    ("fine_tuned", "targets"),
    [
        ("4 bits", "all-linear"),
        pytest.param("4 bits", "k_proj,down_proj", marks=pytest.mark.slow),
        pytest.param("8 bits", "all-linear", marks=pytest.mark.slow),
    ],
    indirect=["fine_tuned"],
)
def test_training_on_it_saves_one_adapter_with_the_trained_numbers(
    fine_tuned: Any, fine_tuned_cache: Path, targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(cache=fine_tuned_cache, out=tmp_path / "run", lora_rank=2, lora_targets=targets, batch_size=8)
    config = replace(config, epochs=3, learning_rate=1e-2, eval_fraction=0.3, save_steps=2)
    run = train(config)
    first, last = first_and_last(run)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert last["loss"] < 0.49
    assert "next to its quantised weights" in capsys.readouterr().out
    rewards = {row["row_id"]: row["logratio"] for row in pq.read_table(run / "rewards.parquet").to_pylist()}
    held = (run / "evaluation.json").read_text()
    loaded = with_adapter(fine_tuned[0], run)
    assert {p.requires_grad for p in loaded.parameters()} == {False}
    moved = []
    ids = {r["row_id"] for r in pq.read_table(run / "rewards.parquet").to_pylist() if r["split"] == "held_out"}
    for row in rows_of(fine_tuned_cache):
        if row["row_id"] in ids:
            own = float(naive_logps(loaded, row).sum()) - row["ref_logps"]
            moved.append(abs(own))
            # In 8 bits activations are rounded as well: what tips one of them by a last bit moves it by a whole step.
            assert own == pytest.approx(rewards[row["row_id"]], abs=3e-2)
    assert max(moved) > 0.05
    again = json.loads(evaluate_run(replace(config, evaluate_only=run)).read_text())
    for name, metric in json.loads(held)["metrics"].items():
        assert again["metrics"][name]["value"] == pytest.approx(metric["value"], abs=3e-2), name  # as for the rows


@pytest.mark.slow
def test_it_is_resumed_and_taken_off_again(fine_tuned_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=fine_tuned_cache, lora_rank=2, batch_size=4, learning_rate=1e-2, save_steps=2)
    whole = train(replace(config, out=tmp_path / "whole", max_steps=3))
    train(replace(config, out=tmp_path / "half", max_steps=2))
    for name in ("adapter_model.safetensors", "run.json"):
        assert (tmp_path / "half" / name).exists()
    resumed = train(replace(config, out=tmp_path / "half", max_steps=3, resume=True))
    one, other = (load_file(run / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=0)


def test_a_sweep_takes_the_trained_adapter_off_and_leaves_the_reference_s(fine_tuned: Any) -> None:
    cpu, precision = torch.device("cpu"), Precision(torch.float32)
    base, adapter = fine_tuned
    auto = transformers.AutoModelForCausalLM
    model = load_causal_lm(auto, base, precision=precision, device=cpu, frozen=True, adapter=adapter).eval()
    batch = pad_sequences(random_rows(4))
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        before = token_logps(model, batch).token_logps
        for seed in (0, 1):
            adapted = add_adapters(model, TrainConfig(lora_rank=2, seed=seed), base="base")
            assert torch.equal(token_logps(adapted, batch).token_logps, before)
            trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
            assert trained
            assert all(".default." in name for name in trained)
            for name, parameter in adapted.named_parameters():
                if ".default." in name:
                    parameter.add_(0.1)
            assert (token_logps(adapted, batch).token_logps - before).abs().max() > 0.05
            remove_adapters(adapted)
            assert torch.equal(token_logps(model, batch).token_logps, before)
            assert {name for name, _ in model.named_parameters()} == names


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings"),
    ],
)
def test_an_adapter_that_could_not_be_saved_with_a_trained_one_is_refused(
    four_bits: Path, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    settings = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields})
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(four_bits), settings).save_pretrained(
        tmp_path
    )
    cpu, precision = torch.device("cpu"), Precision(torch.float32)
    auto = transformers.AutoModelForCausalLM
    with pytest.raises(ModelError, match=rf"{named}.*merge_and_unload"):
        load_causal_lm(auto, four_bits, precision=precision, device=cpu, frozen=True, adapter=tmp_path)


def first_and_last(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record for record in records if "loss" in record]
    return losses[0], losses[-1]


def test_adapters_on_a_quantized_base_learn(quantized_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=quantized_cache, out=tmp_path / "run", lora_rank=4, batch_size=20, epochs=7)
    run = train(replace(config, learning_rate=1e-2, save_steps=0))
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
    with pytest.raises(TrainingError, match=r"quantised and cannot be trained.*--lora-rank"):
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
