import functools
import json

import huggingface_hub
import peft
import pytest
import torch
import transformers
from models import FAMILIES, random_rows, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.folders import find_folder
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import (
    Precision,
    resolve_device,
    resolve_precision,
    store_by_module_in,
    store_matrices_in,
)
from offline_kto.kto_core.models.tokenizer_files import load_tokenizer
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.train.model.experts import cast_experts

CPU = torch.device("cpu")
FULL, HALF = Precision(torch.float32), Precision(torch.bfloat16)
BATCH = pad_sequences(random_rows(6, longest=20))


def load(folder, *, precision=FULL, frozen=True, adapter=None):
    return load_causal_lm(
        AutoModelForCausalLM, folder, precision=precision, device=CPU, frozen=frozen, adapter=adapter
    ).eval()


def save(folder, family="llama", *, round_to=None, **overrides):
    """A model folder without a tokenizer; `round_to` makes its weights representable in that type."""
    model = tiny_model(family, **overrides)
    if round_to:
        model = model.to(round_to).float()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base")


def scores(model, precision=FULL):
    with torch.no_grad(), precision.autocast(CPU):
        return token_logps(model, BATCH).token_logps


def difference(one, other):
    return (one - other).abs().max().item()


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH.input_ids).logits


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_model_loads_as_it_was_saved(tmp_path, family):
    folder = save(tmp_path / "base", family)
    model = load(folder, frozen=False)
    assert torch.equal(logits(model), logits(tiny_model(family)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())


def test_a_trained_model_stays_float32_whatever_the_precision(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", precision=HALF, frozen=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sampling_settings_change_no_score(tmp_path, base):
    plain = scores(load(base))
    settings = {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.5, "repetition_penalty": 2.0}
    (base / "generation_config.json").write_text(json.dumps(settings))
    model = load(base)
    assert model.generation_config.temperature == 0.3
    assert torch.equal(scores(model), plain)


def drop_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused_not_drawn_at_random(base):
    drop_tensor(base, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        ModelError,
        match=r"1 weights are missing in the files \(model\.layers\.1\.mlp\.up_proj\.weight.*would be random",
    ):
        load(base)


def test_a_missing_head_is_refused_unless_it_is_tied(tmp_path, base):
    drop_tensor(base, "lm_head.weight")
    with pytest.raises(ModelError, match=r"1 weights are missing in the files \(lm_head\.weight"):
        load(base)
    tied = save(tmp_path / "tied", "llama-tied")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(tied)


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file. Weights in pickle files are not read"):
        load(tmp_path)


def test_pickled_weights_are_not_read_beside_other_files(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    save_file({"steering": torch.zeros(3)}, tmp_path / "steering.safetensors")
    with pytest.raises(ModelError):
        load(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "weights cut off": lambda folder: cut(folder / "model.safetensors"),
    "weights of another model": lambda folder: save_file(
        {"model.embed_tokens.weight": torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"}
    ),
    "a configuration that is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a configuration of no kind": lambda folder: (folder / "config.json").write_text("{}"),
    "an unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "none-such"}'),
    "an image model": lambda folder: transformers.ViTConfig().save_pretrained(folder),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_folder_that_cannot_be_loaded_is_an_error_of_the_user(base, damage):
    damage(base)
    with pytest.raises(ModelError) as caught:
        load(base)
    assert str(caught.value).startswith((f"{base}: ", f"{base}/"))  # the folder, or the file in it
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json, so this is not a model folder"):
        load(tmp_path)


def test_a_folder_without_a_tokenizer(base):
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(AutoTokenizer, base, trust_remote_code=False)


def test_a_tokenizer_loads(tmp_path):
    tokenizer = load_tokenizer(AutoTokenizer, save_tiny(tmp_path), trust_remote_code=False)
    assert tokenizer("hello")["input_ids"]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("round_to", [torch.bfloat16, None], ids=["bfloat16 checkpoint", "float32 checkpoint"])
def test_storing_matrices_in_bfloat16_changes_no_bit_under_autocast(tmp_path, family, round_to):
    folder = save(tmp_path / "base", family, round_to=round_to)
    frozen, trained = load(folder, precision=HALF), load(folder, precision=HALF, frozen=False)
    stored = {p.dtype for name, p in frozen.named_parameters() if "proj" in name and p.ndim >= 2}
    assert stored <= {torch.bfloat16}
    assert {p.dtype for p in frozen.parameters() if p.ndim == 1} == {torch.float32}
    assert difference(scores(frozen, HALF), scores(trained, HALF)) == 0
    assert difference(scores(trained, HALF), scores(trained, FULL)) > 0


def test_experts_outside_of_autocast_differ_by_rounding_alone(tmp_path):
    """Fused expert matrices are computed as they are stored: in 16 bits frozen, in float32 trained."""
    folder = save(tmp_path / "base", "mixtral", round_to=torch.bfloat16)
    frozen, trained = load(folder, precision=HALF), load(folder, precision=HALF, frozen=False)
    mean = float((scores(frozen, HALF) - scores(trained, HALF)).abs().mean())
    assert 0 < mean < 0.03  # the start-up check allows 0.05


# Each has parameters that no autocast casts: recurrences, mixed positions, tables, gates, weights of an own product.
_SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.4}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
RECURRENT = {
    "mamba": transformers.MambaConfig(**_SIZES, state_size=4),
    "falcon-mamba": transformers.FalconMambaConfig(**_SIZES, state_size=4),
    "jamba": transformers.JambaConfig(
        **_SIZES, **_HEADS, intermediate_size=24, mamba_d_state=4, num_experts=1, use_mamba_kernels=False
    ),
    "rwkv": transformers.RwkvConfig(**_SIZES),
    "qwen3.5": transformers.Qwen3_5TextConfig(
        **_SIZES,
        **_HEADS,
        **{"intermediate_size": 24, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
}


def with_random_constants(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # recurrences begin as whole numbers, tables as zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", RECURRENT.values(), ids=RECURRENT.keys())
def test_only_what_autocast_casts_is_stored_in_16_bits(tmp_path, config):
    with_random_constants(config).save_pretrained(tmp_path)
    frozen, trained = load(tmp_path, precision=HALF), load(tmp_path, precision=HALF, frozen=False)
    assert any(p.dtype == torch.bfloat16 for p in frozen.parameters())
    assert difference(scores(frozen, HALF), scores(trained, HALF)) == 0


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_a_module_has_all_weights_in_16_bits_only_where_that_changes_no_bit(tmp_path, family):
    """Check whole modules, because FSDP2 gathers a module at a time."""
    if family in RECURRENT:
        with_random_constants(RECURRENT[family]).save_pretrained(tmp_path)
    else:
        save(tmp_path, family)
    whole, gathered = (load(tmp_path, precision=HALF, frozen=False) for _ in range(2))
    for model in (whole, gathered):
        cast_experts(model)
    store_by_module_in(gathered, torch.bfloat16)
    narrow = [p.numel() for p in gathered.parameters() if p.dtype == torch.bfloat16]
    assert sum(narrow) > 0.5 * sum(p.numel() for name, p in gathered.named_parameters() if "proj" in name)
    assert difference(scores(gathered, HALF), scores(whole, HALF)) == 0


def test_recurrences_stored_in_float32_among_16_bit_weights_are_not_rounded(tmp_path):
    with_random_constants(RECURRENT["jamba"]).save_pretrained(tmp_path)
    wide = ("A_log", ".D", "layernorm.weight")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {k: v if k.endswith(wide) else v.to(torch.bfloat16) for k, v in tensors.items()}
    assert {v.dtype for v in tensors.values()} == {torch.float32, torch.bfloat16}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    frozen, trained = load(tmp_path, precision=HALF), load(tmp_path, precision=HALF, frozen=False)
    for name, parameter in frozen.named_parameters():
        assert torch.equal(parameter.float(), tensors[name].float()), name
    assert difference(scores(frozen, HALF), scores(trained, HALF)) == 0


class NormalizedLinear(torch.nn.Linear):
    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight / self.weight.norm(dim=0))


class DoubledLinear(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_layer_that_computes_with_its_weight_first_keeps_it_in_float32():
    model = torch.nn.ModuleList([NormalizedLinear(8, 8), DoubledLinear(8, 6), torch.nn.Linear(8, 4)])
    store_matrices_in(model, torch.bfloat16)
    assert [module.weight.dtype for module in model] == [torch.float32, torch.bfloat16, torch.bfloat16]


def save_gpt_oss(folder):
    """Published as 4-bit blocks with their scales; returns the experts' weights, decoded by hand."""
    config = transformers.GptOssConfig(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16},
        **{**_HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.4},
    )
    torch.manual_seed(0)
    tensors = AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(folder)
    stored, decoded = {}, {}
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    levels = torch.cat([levels, -levels])
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor.to(torch.bfloat16)
            continue
        experts, rows, columns = tensor.shape
        blocks = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
        scales = torch.randint(124, 127, (experts, columns, rows // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([levels[(blocks & 15).long()], levels[(blocks >> 4).long()]], -1).flatten(-2)
        values = pairs * 2.0 ** (scales.float() - 127)[..., None]
        decoded[name] = values.flatten(-2).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    settings |= {"dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))
    return {name: tensor.float() for name, tensor in stored.items() if tensor.dtype != torch.uint8} | decoded


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may compute the 4-bit blocks themselves")
def test_float32_means_float32_for_experts_that_were_dequantised(tmp_path):
    right = save_gpt_oss(tmp_path)
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    definition = AutoModelForCausalLM.from_config(transformers.GptOssConfig.from_pretrained(tmp_path)).double()
    definition.load_state_dict({name: tensor.double() for name, tensor in right.items()})
    definition.set_experts_implementation("eager")
    own = logits(definition.eval())
    assert difference(logits(model), own) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_checkpoint_saved_in_bfloat16_scores_the_same_frozen_and_trained(tmp_path, family):
    """Sizes whose square root no short number holds: what is computed while loading must not depend on the dtype."""
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(
            vocab_size=97,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=4,
            initializer_range=0.4,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_model(family, hidden_size=24)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    frozen, trained = load(tmp_path, precision=HALF), load(tmp_path, precision=HALF, frozen=False)
    assert difference(scores(frozen, HALF), scores(trained, HALF)) == 0


def test_precision_names():
    assert resolve_precision("auto", CPU) == FULL
    assert resolve_precision("auto", torch.device("cuda")) == HALF
    assert (HALF.name, HALF.is_full, FULL.is_full) == ("bfloat16", False, True)
    with FULL.autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
    with HALF.autocast(CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "mps:7", "mps", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(
        ModelError, match=rf"--device {name}: not available here .*Expected auto, cpu, cuda, cuda:N or all"
    ):
        resolve_device(name)


def test_devices():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# Everything that draws random numbers in train mode.
NOISY = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.3},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3},  # the first of them acts in eval mode too
}


@pytest.mark.parametrize("family", NOISY)
def test_train_mode_computes_what_eval_mode_does(tmp_path, family):
    folder = save(tmp_path / "base", family, **NOISY[family])
    model = load(folder)
    quiet = scores(model)
    assert difference(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder))) == 0
    model.train()
    assert difference(scores(model), quiet) == 0
    noisy = AutoModelForCausalLM.from_pretrained(folder).train()
    assert difference(logits(noisy), logits(noisy)) > 0  # with dropout on it would show


@pytest.mark.parametrize("family", NOISY)
def test_the_configuration_keeps_its_dropout(tmp_path, family):
    model = load(save(tmp_path / "base", family, **NOISY[family]))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: saved[name] for name in NOISY[family]} == NOISY[family]


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# peft comments on whatever is unusual in an adapter.
peft_comments = pytest.mark.filterwarnings("ignore::UserWarning")
LoraConfig = functools.partial(peft.LoraConfig, r=4, lora_alpha=10, task_type="CAUSAL_LM")

ADAPTERS = {
    "several targets": ("llama", LoraConfig(target_modules=ALL_LINEAR)),
    "two targets": ("llama", LoraConfig(target_modules=["q_proj", "down_proj"])),
    "one layer": ("llama", LoraConfig(target_modules=ALL_LINEAR, layers_to_transform=[1])),
    "ranks of their own": (
        "llama",
        LoraConfig(target_modules=ALL_LINEAR, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}),
    ),
    "rslora": ("llama", LoraConfig(target_modules=ALL_LINEAR, use_rslora=True)),
    "dora": ("llama", LoraConfig(target_modules=ALL_LINEAR, use_dora=True)),
    "a head of its own": ("llama", LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])),
    "embeddings and head of its own": (
        "llama",
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    ),
    "a low-rank head": ("llama", LoraConfig(target_modules=["q_proj", "lm_head"])),
    "low-rank embeddings": ("llama", LoraConfig(target_modules=["q_proj", "embed_tokens"])),
    "a norm of its own": ("llama", LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])),
    "some tokens of its own": ("llama", LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2, 5, 7])),
    "tied weights": ("llama-tied", LoraConfig(target_modules=ALL_LINEAR)),
    "principal components": ("llama", LoraConfig(target_modules=ALL_LINEAR, init_lora_weights="pissa")),
    "orthonormal beginnings": ("llama", LoraConfig(target_modules=ALL_LINEAR, init_lora_weights="olora")),
    "a whole block of its own": ("llama", LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])),
    "some layers left out": (
        "llama",
        LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.1.self_attn.q_proj"]),
    ),
    "tied embeddings of its own": (
        "llama-tied",
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "transposed matrices": ("gpt2", LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "biases": ("gpt2", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")),
    "all biases": ("gpt2", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "a mixture of experts": ("mixtral", LoraConfig(target_modules=["q_proj", "v_proj"])),
    "one stack of experts": (
        "mixtral",
        LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    ),
    "both stacks of experts": (
        "mixtral",
        LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
}


def save_adapter(base, folder, settings, *, size=0.3):
    """An adapter as training would leave it: every weight of it moved."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "settings"), ADAPTERS.values(), ids=ADAPTERS.keys())
@peft_comments
def test_a_merged_adapter_equals_that_of_peft(tmp_path, family, settings):
    base = save(tmp_path / "base", family)
    adapter = save_adapter(base, tmp_path / "adapter", settings)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    expected = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    ours = load(base, adapter=adapter)
    assert difference(logits(ours), logits(expected)) < 1e-5 * logits(expected).abs().max()
    assert difference(logits(expected), before) > 0.1


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("llama-tied", LoraConfig(target_modules=["q_proj", "embed_tokens"]), id="embeddings"),
        pytest.param("gpt2", LoraConfig(target_modules=["c_attn", "lm_head"], fan_in_fan_out=True), id="head"),
    ],
)
@peft_comments
def test_an_adapter_on_one_of_two_tied_matrices_leaves_the_other(tmp_path, family, settings):
    """Merge it as training applied it; peft's own merge would change both matrices."""
    base = save(tmp_path / "base", family)
    adapter = save_adapter(base, tmp_path / "adapter", settings)
    trained = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    assert difference(logits(load(base, adapter=adapter)), logits(trained)) < 2e-5 * logits(trained).abs().max()


@peft_comments
def test_a_head_that_is_no_longer_tied_is_not_declared_tied(tmp_path):
    """Other engines (vLLM) believe the configuration, and would use the embeddings as the head."""
    base = save(tmp_path / "base", "llama-tied")
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    merged = load(base, adapter=save_adapter(base, tmp_path / "adapter", settings))
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings is False


@peft_comments
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), id="prompt tuning"),
        pytest.param(peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4), id="vera"),
        pytest.param(LoraConfig(target_modules=["q_proj"], lora_bias=True), id="a bias where the layer has none"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, base, settings):
    adapter = save_adapter(base, tmp_path / "adapter", settings)
    with pytest.raises(ModelError) as caught:
        load(base, adapter=adapter)
    assert str(caught.value).startswith(f"{adapter}: ")


@peft_comments
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
            r"layer_replication is set: .*repeated layers.*merge_and_unload\) and pass the merged model to --model",
            id="layers more than the base has",
        ),
        pytest.param(
            LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
            r"alora_invocation_tokens is set: an activated LoRA \(aLoRA\) acts only after its invocation tokens",
            id="activated by tokens",
        ),
        pytest.param(
            LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_2"),
            r"init_lora_weights is 'pissa_niter_2', .*path_initial_model_for_weight_conversion",
            id="random parts taken out of the base",
        ),
        pytest.param(
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            r"PREFIX_TUNING changes a model's input",
            id="a learnt prefix",
        ),
        pytest.param(
            peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
            r"does not fit the model: .* Merge it with peft",
            id="states shared between layers",
        ),
    ],
)
def test_an_adapter_that_is_more_than_weights_is_refused_with_the_way_out(tmp_path, base, settings, message):
    adapter = save_adapter(base, tmp_path / "adapter", settings)
    with pytest.raises(ModelError, match=message) as caught:
        load(base, adapter=adapter)
    assert str(caught.value).startswith(f"{adapter}: ")
    assert "\n" not in str(caught.value)


@peft_comments
@pytest.mark.parametrize(("value", "refused"), [({"depth": 2}, True), (True, True), (None, False), (False, False)])
def test_a_setting_that_the_installed_peft_drops_is_refused_where_it_is_set(tmp_path, base, value, refused):
    adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_moebius": value}))
    if not refused:
        load(base, adapter=adapter)
        return
    with pytest.raises(ModelError, match=r"sets use_moebius, which the installed peft does not know"):
        load(base, adapter=adapter)


@peft_comments
def test_an_adapter_that_merges_into_other_numbers_is_refused(tmp_path, base, monkeypatch):
    adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    merge = peft.tuners.lora.Linear.merge

    def doubled(self, safe_merge=False, adapter_names=None):
        merge(self, safe_merge, adapter_names)
        self.base_layer.weight.data *= 2

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", doubled)
    with pytest.raises(ModelError, match=r"its log-probabilities change by"):
        load(base, adapter=adapter)


@pytest.fixture
def adapter(base, tmp_path):
    return save_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=ALL_LINEAR))


def test_a_merged_model_is_a_plain_one(tmp_path, base, adapter):
    """It can be saved, loaded, trained and given new adapters."""
    merged = load(base, adapter=adapter, frozen=False)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in tiny_model().named_parameters()]
    assert {type(module) for module in merged.modules()} == {type(module) for module in tiny_model().modules()}
    merged.save_pretrained(tmp_path / "merged")
    assert sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors")) == ["model.safetensors"]
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    again = peft.get_peft_model(merged, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(scores(again), scores(merged))


def test_a_merged_model_can_be_trained_whole(base, adapter):
    merged = load(base, adapter=adapter, frozen=False)
    token_logps(merged, BATCH).token_logps.sum().backward()
    assert [name for name, p in merged.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_an_adapter_is_merged_in_float32_before_matrices_are_stored(tmp_path, adapter):
    """Merged in bfloat16, small updates would be lost."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    frozen, trained = (load(tmp_path / "rounded", precision=HALF, frozen=f, adapter=adapter) for f in (True, False))
    assert difference(scores(frozen, HALF), scores(trained, HALF)) == 0


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        pytest.param("llama", {"hidden_size": 32}, id="another width"),
        pytest.param("llama", {"num_hidden_layers": 1}, id="fewer layers"),
        pytest.param("llama", {"num_hidden_layers": 3}, id="more layers"),
        pytest.param("gpt2", {}, id="another family"),
    ],
)
def test_the_adapter_of_another_base_is_refused(tmp_path, adapter, family, overrides):
    other = save(tmp_path / "other", family, **overrides)
    with pytest.raises(ModelError, match="the adapter does not fit the model") as caught:
        load(other, adapter=adapter)
    assert str(caught.value).startswith(f"{adapter}: ")
    assert "\n" not in str(caught.value)


def test_an_adapter_given_as_the_model_says_where_it_belongs(adapter):
    with pytest.raises(ModelError, match=r"an adapter, not a model. Pass the base model to --model .* to --adapter"):
        load(adapter)


def test_a_model_given_as_the_adapter(base):
    with pytest.raises(ModelError, match=r"no adapter_config\.json, so this is not an adapter folder"):
        load(base, adapter=base)


def test_a_pickled_adapter_is_not_read(base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors. Adapters in pickle files are not read"):
        load(base, adapter=adapter)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: cut(folder / "adapter_model.safetensors"), id="weights cut off"),
        pytest.param(lambda folder: (folder / "adapter_config.json").write_text("{"), id="not JSON"),
        pytest.param(lambda folder: (folder / "adapter_config.json").write_text("{}"), id="of no kind"),
    ],
)
def test_a_damaged_adapter_is_an_error_of_the_user(base, adapter, damage):
    damage(adapter)
    with pytest.raises(ModelError) as caught:
        load(base, adapter=adapter)
    assert str(caught.value).startswith(f"{adapter}: ")


def test_a_folder_is_found(base):
    assert find_folder(str(base), revision=None) == (base, None)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "no such"])
def test_what_can_be_no_hub_id_is_never_looked_up(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("looked up"))
    with pytest.raises(ModelError, match="no such model folder"):
        find_folder(name, revision=None)


def test_a_file_is_no_folder(base):
    with pytest.raises(ModelError, match="a file; expected the adapter's folder"):
        find_folder(str(base / "config.json"), revision=None, what="adapter")


def test_a_hub_id_that_cannot_be_had_says_why(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to the hub\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"^org/model: .* cannot be fetched from the hub: no route to the hub$"):
        find_folder("org/model", revision=None)


def test_a_hub_id_resolves_to_a_commit_without_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(model, *, revision, allow_patterns, ignore_patterns):
        asked.update(model=model, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "models--org--model" / "snapshots" / "0123abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder, commit = find_folder("org/model", revision="v1")
    assert (folder.name, commit, asked["model"], asked["revision"]) == ("0123abc", "0123abc", "org/model", "v1")
    assert not {"*.bin", "*.pt", "*"} & set(asked["patterns"])
