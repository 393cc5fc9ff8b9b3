"""Which layers get adapters, what is said of it, and that a saved adapter holds what was trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import random_rows, save_tiny, tiny_model
from peft.tuners.tuners_utils import BaseTunerLayer

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.lora import adapter_lines, add_adapters
from offline_kto.train.run.train_run import train

BATCH = pad_sequences(random_rows(4, vocabulary=90))

_TEXT: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4},
}
_VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
CONFIGS: dict[str, Any] = {
    "gpt-oss": transformers.GptOssConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": transformers.Gemma3Config(
        text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=96
    ),
    "falcon": transformers.FalconConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    "mamba": transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **_TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
}


def model_of(family: str) -> Any:
    if family in CONFIGS:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    else:
        model = tiny_model(family)
    add_scoring_forward(model)
    return model


def adapt(family: str, targets: str = "all-linear") -> Any:
    return add_adapters(model_of(family), TrainConfig(lora_rank=2, lora_targets=targets), base="base")


def adapted_names(model: Any) -> set[str]:
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return {name.removeprefix("base_model.model.") for name in layers}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH.input_ids).logits


FAMILIES = ["llama", "gpt2", "llama4", "phimoe", "mixtral", "gpt-oss", "gemma3", "falcon", "mamba", "qwen2-moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_adapters_train_and_load_through_peft_with_the_trained_numbers(family: str, tmp_path: Path) -> None:
    model = adapt(family)
    before = token_logps(model.train(), BATCH).token_logps
    before.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any(grad is not None and grad.abs().max() > 0 for grad in found.values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for one in ("target_modules", "exclude_modules"):  # in the same order in each process
        assert settings[one] == (sorted(settings[one]) if isinstance(settings[one], list) else settings[one])
    loaded = peft.PeftModel.from_pretrained(model_of(family), str(tmp_path))
    assert (logits(model) - logits(model_of(family))).abs().max() > 0.01
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "router"), [("llama4", "feed_forward.router"), ("phimoe", "router")])
def test_routers_that_return_tuples_carry_no_adapter(family: str, router: str) -> None:
    model = adapt(family)
    names = adapted_names(model)
    assert names
    assert not [name for name in names if name.endswith(router)]
    text = "\n".join(adapter_lines(model))
    assert "none on router: 2: an adapter cannot be added to what" in text
    with pytest.raises(ConfigError, match=r"--lora-targets router: does not support adapters: .*Router"):
        adapt(family, "q_proj,router")


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_a_vision_tower_is_never_adapted(targets: str) -> None:
    names = adapted_names(adapt("gemma3", targets))
    assert {name.split(".layers.")[0] for name in names} == {"model.language_model"}
    assert "no text goes through it" in "\n".join(adapter_lines(adapt("gemma3", targets)))
    with pytest.raises(ConfigError, match=r"--lora-targets fc1: does not support adapters: no text goes through it"):
        adapt("gemma3", "q_proj,fc1")


def test_a_family_s_own_linear_layers_are_adapted() -> None:
    kinds = {name.split(".")[-1] for name in adapted_names(adapt("falcon"))}
    assert kinds == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", "q_proj,vproj", r"--lora-targets vproj: no layer of this model has that name. Did you mean v_proj\?"),
        ("llama", "qq", r"--lora-targets qq: no layer of this model has that name"),
        ("gpt-oss", "q_proj,gate_up_proj,down_proj", r"--lora-targets gate_up_proj: a parameter .* target_parameters"),
        ("mixtral", "q_proj,gate_up_proj", r"--lora-targets gate_up_proj: a parameter"),
        ("mixtral", "q_proj,w2,vproj", r"--lora-targets vproj: no layer"),
        ("llama", "q_proj,self_attn", r"--lora-targets self_attn: a LlamaAttention, not a linear layer"),
        ("gpt2", "c_attn,lm_head", r"the output layer does not support an adapter"),
    ],
)
def test_every_name_must_match(family: str, targets: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        adapt(family, targets)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_older_names_of_experts_that_peft_turns_into_parameters_are_taken() -> None:
    text = "\n".join(adapter_lines(adapt("mixtral", "q_proj,w1,w3")))
    assert "q_proj, gate_up_proj: 2 each" in text
    assert "none on down_proj: 2" in text


def test_what_is_adapted_is_said() -> None:
    model = model_of("gpt-oss")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    covered = sum(n for name, n in sizes.items() if "_proj.weight" in name or "_proj.bias" in name)
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    adapted = add_adapters(model, TrainConfig(lora_rank=2), base="base")
    new = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    first, second = adapter_lines(adapted)
    share = f"{covered / sum(sizes.values()):.0%}"
    assert (
        first
        == f"adapters    8 layers (q_proj, k_proj, v_proj, o_proj: 2 each) with {share} of the weights; {new:,} new ones"
    )
    assert f"{experts / sum(sizes.values()):.0%} of the weights: stacked experts" in second


def test_the_plan_names_the_adapted_layers(feedback: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base", "llama4")
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", limit=8))
    config = TrainConfig(cache=tmp_path / "refs", out=tmp_path / "run", lora_rank=2, batch_size=4, max_steps=1)
    train(replace(config, save_steps=0))
    assert "adapters    14 layers (q_proj, k_proj" in capsys.readouterr().out
