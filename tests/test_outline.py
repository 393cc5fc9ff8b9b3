"""A folder is refused, or named in the plan, where its model would not compute what its files hold."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from models import random_rows, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.library_warnings import collected_warnings
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.outline import find_outline
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train

CPU, FULL = torch.device("cpu"), Precision(torch.float32)
ROWS = random_rows(4)


def load(folder: Path, *, trust_remote_code: bool = False) -> Any:
    return load_causal_lm(
        transformers.AutoModelForCausalLM,
        folder,
        precision=FULL,
        device=CPU,
        frozen=True,
        trust_remote_code=trust_remote_code,
    ).eval()


def outline(folder: Path, *, trust_remote_code: bool = False) -> Any:
    return find_outline(transformers, folder, trust_remote_code=trust_remote_code)


def configure(folder: Path, **values: Any) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def change(folder: Path, of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Replace the tensors of a folder by what `of` makes of them."""
    path = folder / "model.safetensors"
    save_file(of(load_file(path)), path, metadata={"format": "pt"})
    return folder


def add(folder: Path, **tensors: torch.Tensor) -> Path:
    return change(folder, lambda found: {**found, **{name.replace("__", "."): one for name, one in tensors.items()}})


def naive(model: Any, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """Log-probabilities of a row alone, from the model's own logits in float64."""
    ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def assert_scores_as(model: Any, right: Any) -> None:
    with torch.no_grad():
        found = token_logps(model, pad_sequences(ROWS)).token_logps
    torch.testing.assert_close(found.double(), torch.cat([naive(right, *row) for row in ROWS]), atol=1e-4, rtol=0)


def assert_refused(folder: Path, match: str) -> None:
    """By the plan, before anything is loaded, and by whoever loads it."""
    for use in (outline, load):
        with pytest.raises(ModelError, match=match) as caught:
            use(folder)
        assert str(caught.value).startswith(str(folder))
        assert "\n" not in str(caught.value)


def biases_left_out(folder: Path) -> None:
    save_tiny(folder, attention_bias=True)
    configure(folder, attention_bias=False)


def layers_left_out(folder: Path) -> None:
    save_tiny(folder, num_hidden_layers=4)
    configure(folder, num_hidden_layers=2)


def layers_of_gpt2_left_out(folder: Path) -> None:
    save_tiny(folder, "gpt2", n_layer=3)
    configure(folder, n_layer=2)


def layer_that_transformers_ignores(folder: Path) -> None:
    """GLM-4 MoE leaves out layers 46 and 92 by number, whatever the model's own number of layers is."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 47,
        "first_k_dense_replace": 47,
        "num_nextn_predict_layers": 0,
    }
    config = transformers.Glm4MoeConfig(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    configure(folder, num_hidden_layers=46)


def reward_model(folder: Path) -> None:
    config = tiny_model("llama-tied").config
    config.num_labels = 1
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    configure(folder, architectures=None)


UNREAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "biases": (
        biases_left_out,
        r"contain 8 weights that LlamaForCausalLM does not read \(model\.layers\.0\.self_attn\.k_p",
    ),
    "two of four layers": (layers_left_out, r"contain 18 weights .*\(model\.layers\.2\."),
    "a layer of GPT-2": (layers_of_gpt2_left_out, r"does not read \(transformer\.h\.2\."),
    "a reward model": (reward_model, r"contain 1 weights that LlamaForCausalLM does not read \(score\.weight\)"),
    "LoRA keys": (
        lambda folder: add(save_tiny(folder), model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2, 16)),
        r"contain 1 weights .*lora_A\.weight\)",
    ),
    "norms of another family": (
        lambda folder: add(save_tiny(folder), model__layers__0__post_feedforward_layernorm__weight=torch.ones(16)),
        r"contain 1 weights .*post_feedforward_layernorm",
    ),
    "a value head": (
        lambda folder: add(save_tiny(folder), v_head__summary__weight=torch.ones(1, 16)),
        r"contain 1 weights .*v_head",
    ),
}


@pytest.mark.parametrize(("make", "match"), UNREAD.values(), ids=UNREAD.keys())
def test_weights_that_the_model_does_not_read_are_refused(
    tmp_path: Path, make: Callable[[Path], Any], match: str
) -> None:
    make(tmp_path)
    assert_refused(tmp_path, match)


def test_a_layer_that_transformers_leaves_out_by_its_number_is_refused(tmp_path: Path) -> None:
    layer_that_transformers_ignores(tmp_path)
    with pytest.raises(ModelError, match=r"Glm4MoeForCausalLM does not read \(model\.layers\.46\."):
        outline(tmp_path)
    configure(tmp_path, num_nextn_predict_layers=1)
    assert outline(tmp_path).unread == {"multi-token prediction": 9}


HARMLESS: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "rotary constants": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "masks of GPT-2": (
        "gpt2",
        {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        },
    ),
    "scales of a key-value cache": ("llama", {"model.layers.0.self_attn.k_scale": torch.tensor(2.0)}),
    "biases of zero": ("llama", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}),
    "prediction heads": ("llama", {"mtp.layers.0.fc.weight": torch.ones(2, 16)}),
}


@pytest.mark.parametrize(("family", "tensors"), HARMLESS.values(), ids=HARMLESS.keys())
def test_tensors_that_no_score_depends_on_are_no_reason_to_refuse(
    tmp_path: Path, family: str, tensors: dict[str, torch.Tensor]
) -> None:
    save_tiny(tmp_path, family)
    right = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    change(tmp_path, lambda found: {**found, **tensors})
    outline(tmp_path)
    assert_scores_as(load(tmp_path), right)


def test_a_bias_that_adds_something_is_a_weight(tmp_path: Path) -> None:
    add(save_tiny(tmp_path), model__layers__0__self_attn__q_proj__bias=torch.full((16,), 1e-3))
    assert_refused(tmp_path, r"contain 1 weights .*q_proj\.bias")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("intermediate_size", 48, r"mlp\.down_proj\.weight is \[16, 32\] in the files, \[16, 48\] by config\.json"),
        ("vocab_size", 300, r"lm_head\.weight is \[268, 16\] in the files, \[300, 16\] by config\.json, and 1 more"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path: Path, field: str, value: int, match: str) -> None:
    save_tiny(tmp_path)
    configure(tmp_path, **{field: value})
    assert_refused(tmp_path, match)


def packed(
    folder: Path, dtype: torch.dtype = torch.float8_e4m3fn, scale: str = "weight_scale"
) -> dict[str, torch.Tensor]:
    """Store the projections of a folder in `dtype`, with a scale for each; returns what they stand for."""
    true = {}

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            true[name] = tensor
            found[name] = tensor
            if name.endswith("proj.weight"):
                size = tensor.abs().max() / (448 if dtype.is_floating_point else 127)
                found[name] = (tensor / size).to(dtype)
                true[name] = found[name].float() * size
                found[f"{name.removesuffix('weight')}{scale}"] = size.reshape(1, 1)
        return found

    change(folder, pack)
    return true


QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "modelopt": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "modelopt"),
    "an invented method": ({"quantization_config": {"quant_method": "nonesuch"}}, "nonesuch"),
    "no method": ({"quantization_config": {"quant_algo": "FP8"}}, r"quant"),
    "a key that is not read": ({"compression_config": {"quant_method": "compressed-tensors"}}, r"compression_config"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, r"quantization \(without a method\)"),
    "not named at all": ({}, r"14 weights are stored as F8_E4M3 \(model\.layers\.0\.mlp\.down_proj\.weight"),
}


@pytest.mark.parametrize(("settings", "match"), QUANTISED.values(), ids=QUANTISED.keys())
def test_a_quantisation_that_is_not_applied_is_refused(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    packed(save_tiny(tmp_path))
    configure(tmp_path, **settings)
    assert_refused(tmp_path, match)


def test_whole_numbers_without_their_scales_are_refused(tmp_path: Path) -> None:
    packed(save_tiny(tmp_path), torch.int8)
    assert_refused(tmp_path, r"14 weights are stored as I8")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_quantiser_s_own_file_alone_is_refused(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / name).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}), encoding="utf-8")
    assert_refused(tmp_path, r"config\.json does not")


def test_a_quantiser_s_file_for_the_cache_of_keys_alone_is_no_reason_to_refuse(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    settings = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings), encoding="utf-8")
    outline(tmp_path)
    load(tmp_path)


def test_float8_that_transformers_applies_is_scored_with_its_scales(tmp_path: Path) -> None:
    true = packed(save_tiny(tmp_path), scale="weight_scale_inv")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    configure(tmp_path, quantization_config=settings)
    outline(tmp_path)
    right = tiny_model(vocab_size=len(tiny_tokenizer()))
    right.load_state_dict(true)
    assert_scores_as(load(tmp_path), right)


def test_stage_two_refuses_what_stage_one_does(tmp_path: Path, cache: Path, base: Path) -> None:
    """The policy's folder was changed after its cache was made; a start check on the same fault would agree."""
    folder = save_tiny(tmp_path / "model")
    add(folder, score__weight=torch.ones(1, 16))
    with pytest.raises(ModelError, match=r"does not read \(score\.weight\)"):
        train(TrainConfig(cache=cache, out=tmp_path / "run", model=str(folder)))


CODE = """
from transformers import LlamaForCausalLM


class OurModel(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.scaling *= 3.0
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose folder brings code that scales its attention otherwise."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = save_tiny(tmp_path / "model")
    (folder / "modeling_ours.py").write_text(CODE, encoding="utf-8")
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_ours.OurModel"})
    return folder


def test_code_that_is_not_run_is_refused_and_named(with_code: Path) -> None:
    assert_refused(with_code, r"OurModel in .*modeling_ours\.py, which is not run.*--trust-remote-code")
    right = tiny_model(vocab_size=len(tiny_tokenizer()))
    for layer in right.model.layers:
        layer.self_attn.scaling *= 3.0
    outline(with_code, trust_remote_code=True)
    assert_scores_as(load(with_code, trust_remote_code=True), right)


@pytest.mark.parametrize(
    ("auto_map", "match"),
    [
        ({"AutoModelForCausalLM": "org/repo--modeling_ours.OurModel"}, r"OurModel in org/repo: modeling_ours\.py"),
        ({"AutoModel": "modeling_ours.OurBody"}, r"OurBody in .*modeling_ours\.py"),
        ({"AutoConfig": "configuration_ours.OurConfig"}, r"OurConfig in .*configuration_ours\.py"),
        ({"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"}, r"modeling_llama_yarn\.py"),
    ],
)
def test_each_way_to_name_code_is_seen(with_code: Path, auto_map: dict[str, str], match: str) -> None:
    configure(with_code, auto_map=auto_map)
    assert_refused(with_code, match)


def test_code_that_transformers_has_adopted_is_named_and_not_refused(with_code: Path) -> None:
    configure(with_code, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    (warning,) = outline(with_code).warnings
    assert "modeling_llama.py comes with the model and is not run" in warning
    load(with_code)


def test_tokenizer_code_that_is_not_run_is_refused(tmp_path: Path, feedback: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_ours.OurTokenizer", None]}
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"tokenizer_config\.json declares the model's own code, OurTokenizer in .*tokenization_ours"
    ):
        precompute(PrecomputeConfig(model=str(folder), data=str(feedback), out=tmp_path / "refs", dry_run=True))


def qwen_with_vision(folder: Path) -> Path:
    text = {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_vision_half_that_is_not_read_is_said_and_the_run_loads(
    tmp_path: Path, feedback: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = qwen_with_vision(tmp_path / "model")
    towers = sum("visual" in name for name in load_file(model / "model.safetensors"))
    out = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(model), data=str(feedback), out=out, max_length=256))
    said = f"warning     {towers} vision or audio weights of this qwen3_5 checkpoint are not read"
    assert said in capsys.readouterr().out
    reference = read_manifest(out).reference
    assert (reference["unread"], reference["model_type"]) == ({"vision or audio": towers}, "qwen3_5_text")
    right = transformers.AutoModelForImageTextToText.from_pretrained(model)
    row = pq.read_table(next((out / "train").glob("*.parquet"))).to_pylist()[0]
    prompt, completion = np.array(row["prompt_ids"]), np.array(row["completion_ids"])
    expected = naive(right, prompt, completion).numpy()
    np.testing.assert_allclose(row["ref_token_logps"], expected, atol=1e-3)
    config = TrainConfig(cache=out, out=tmp_path / "run", max_steps=1, batch_size=4, learning_rate=1e-9, save_steps=0)
    run = train(config)
    printed = capsys.readouterr().out
    assert said in printed
    assert "a text model (qwen3_5_text, Qwen3_5ForCausalLM)" in printed
    saved = transformers.AutoModelForCausalLM.from_pretrained(run)
    np.testing.assert_allclose(naive(saved, prompt, completion).numpy(), expected, atol=1e-3)
    train(replace(config, evaluate_only=run, out=None))


def test_a_text_half_that_could_not_be_loaded_again_is_refused(tmp_path: Path) -> None:
    text = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=vision)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="could not load the saved model again"):
        outline(tmp_path)


OTHERS = {
    "an encoder (a masked language model)": (transformers.BertForMaskedLM, transformers.BertConfig),
    "an encoder-decoder model": (transformers.T5ForConditionalGeneration, transformers.T5Config),
    "a classifier or reward model": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_family_gets_one_message(tmp_path: Path, kind: str) -> None:
    model, config = OTHERS[kind]
    small = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"d_kv": 8, "d_ff": 16} if model is transformers.T5ForConditionalGeneration else {}
    model(config(hidden_size=16, **small)).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        outline(tmp_path)
    assert f" is {kind}. KTO needs a causal (decoder-only) language model" in str(caught.value)


def test_warnings_of_a_library_are_collected_and_its_log_is_as_before() -> None:
    logger = logging.getLogger("transformers")
    before = logger.level, logger.handlers[:], logger.propagate
    with collected_warnings() as messages:
        logging.getLogger("transformers.models.auto").warning("of %s", "weights")
    assert messages == ["of weights"]
    assert (logger.level, logger.handlers, logger.propagate) == before


def test_what_transformers_doubts_in_a_configuration_is_said(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    configure(tmp_path, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5})
    (warning,) = outline(tmp_path).warnings
    assert "factor field must be a float or int >= 1, got 0.5" in warning
