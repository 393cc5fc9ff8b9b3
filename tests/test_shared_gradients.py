"""Rows of a pair share their prompt in the gradient pass: gradients are equal, and a model that would differ is found out."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from feedback_files import write_rows
from models import VOCABULARY, tiny_model
from safetensors.torch import load_file

from offline_kto.kto_core.models.loading import disable_dropout
from offline_kto.kto_core.scoring import logps, shared_attention
from offline_kto.kto_core.scoring.attention import attention_set_to
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences, share_keys, tokens_of_shared
from offline_kto.kto_core.scoring.shared_attention import KEY_SLOTS, register_shared, why_not_shared
from offline_kto.kto_core.scoring.varlen_attention import VARLEN, register_varlen
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.checkpointing import enable_checkpointing
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer import prompt_sharing
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.prompt_sharing import PromptSharing

CPU = torch.device("cpu")
_QWEN = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# Half of the layers have windows of 4 tokens.
_WINDOWS = {**_QWEN, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def ids(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, VOCABULARY, length).astype(np.int32)


def pair(prompt, *completions):
    return [(ids(prompt), ids(one, seed)) for seed, one in enumerate(completions, 1)]


def prepared(model):
    disable_dropout(model)
    add_scoring_forward(model)
    return model.train()


def model_of(family):
    if family in ("qwen2", "qwen3", "gemma3"):
        kinds = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
        config = kinds.get(family, transformers.Gemma3TextConfig)
        torch.manual_seed(0)
        windows = {**_WINDOWS, "use_sliding_window": True} if family == "qwen2" else _WINDOWS
        made = config(vocab_size=VOCABULARY, **(_QWEN if family == "qwen3" else windows))
        return prepared(transformers.AutoModelForCausalLM.from_config(made))
    return prepared(tiny_model(family, **({"output_router_logits": False} if family == "mixtral" else {})))


def gradients(model, batch):
    model.zero_grad()
    found = token_logps(model, batch).token_logps
    (found * (1 - 0.7 * batch.row_of_token)).sum().backward()
    return found.detach(), torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def assert_equal_gradients(model, rows):
    register_shared(transformers, model.config._attn_implementation)
    (plain, expected), (shared, found) = (gradients(model, layout(rows)) for layout in (pad_sequences, share_keys))
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=0)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


# --- layout ----------------------------------------------------------------------------------------


def test_completions_follow_the_one_prompt():
    prompt, other = ids(3), ids(2)
    rows = [(prompt, ids(2, 1)), (prompt, ids(1, 2)), (other, ids(2, 3))]
    batch = share_keys(rows)
    expected = [prompt, ids(2, 1), ids(1, 2), other, ids(2, 3)]
    assert batch.input_ids[0].tolist() == np.concatenate(expected).tolist()
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert batch.boundaries.tolist() == [0, 3, 5, 6, 8, 10]
    assert batch.shared.boundaries.tolist() == [0, 3, 8, 12, 14, 18]
    assert batch.shared.slots.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 7, 8, 9]
    assert batch.predicts.tolist() == [2, 3, 2, 7, 8]
    assert batch.targets.tolist() == np.concatenate([c for _, c in rows]).tolist()
    assert (batch.rows, batch.widest, batch.shared.widest) == (3, 3, 5)
    assert batch.tokens == batch.padded_tokens == tokens_of_shared(rows) == 10


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["llama", "llama-tied", "gpt2", "qwen2", "qwen3", "gemma3", "mistral", "mixtral", "phimoe", "opt", "cohere"],
)
def test_gradients_are_those_of_rows_apart(family):
    assert_equal_gradients(model_of(family), pair(40, 9, 12) + pair(23, 1, 5))


def test_an_implementation_that_another_library_put_in_place_is_extended(monkeypatch):
    kernels = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    original = transformers.integrations.sdpa_attention.sdpa_attention_forward
    monkeypatch.setitem(kernels, "sdpa", lambda *args, **kwargs: original(*args, **kwargs))
    assert_equal_gradients(model_of("llama"), pair(40, 9, 12))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradients_are_equal_with_checkpointing(family):
    model = model_of(family)
    enable_checkpointing(model)
    assert_equal_gradients(model, pair(40, 9, 12))


def test_gradients_are_equal_with_adapters():
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    add_scoring_forward(model.get_base_model())
    assert_equal_gradients(model.train(), pair(40, 9, 12))


def test_gradients_are_equal_with_varlen_attention():
    register_varlen(transformers)
    model = model_of("mistral")
    with attention_set_to(model, VARLEN):
        assert_equal_gradients(model, pair(40, 9, 12))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it
@pytest.mark.slow
def test_gradients_are_equal_in_compiled_layers():
    from offline_kto.train.trainer.compiled_layers import Compiling, compile_layers

    model = model_of("llama")
    compile_layers(model, Compiling(backend="eager"))
    assert_equal_gradients(model, pair(40, 9, 12))


# --- the check -------------------------------------------------------------------------------------


def sharing_of(model, *, may_try=True, **of_ranks):
    ranks = SimpleNamespace(**{"rank": 0, "sharded": False, "any": bool, **of_ranks})
    policy = PreparedPolicy(model, CPU, ranks=ranks, max_tokens=1000, rounding=2e-4)
    return PromptSharing(policy, may_try=may_try)


def test_short_prompts_are_not_shared_and_nothing_is_checked(monkeypatch):
    sharing = sharing_of(model_of("llama"))
    monkeypatch.setattr(sharing, "_check", lambda unit: pytest.fail("checked"))
    assert not sharing.decide([pair(2, 9, 12)])
    assert not sharing.decide([[(ids(20), ids(5)), (ids(21), ids(5))]])  # other prompts


def test_the_check_runs_once_for_each_greater_length(monkeypatch, capsys):
    sharing, checked = sharing_of(model_of("llama")), []
    against = PromptSharing._against
    monkeypatch.setattr(
        PromptSharing, "_against", lambda self, unit: checked.append(len(unit[0][0])) or against(self, unit)
    )
    assert all(sharing.decide([pair(prompt, 4, 5)]) for prompt in (20, 10, 20, 30))
    assert checked == [20, 30]
    assert not capsys.readouterr().out
    assert all(one.grad is None for one in sharing.policy.model.parameters())


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ("slots", lambda slots: {}, "scores of a sequence would move"),  # attention sees everything before
        ("gradient", lambda keys: keys.detach(), "gradients would differ"),
        (
            "slots",
            lambda arguments: {**arguments, KEY_SLOTS: arguments[KEY_SLOTS] * 0},
            "log-probabilities would differ",
        ),
    ],
)
def test_a_model_that_would_differ_is_found_out(place, change, said, monkeypatch, capsys):
    model = model_of("llama")
    if place == "slots":
        real = shared_attention.shared_arguments
        monkeypatch.setattr(logps, "shared_arguments", lambda batch: change(real(batch)))
    else:
        select = torch.Tensor.index_select
        monkeypatch.setattr(
            torch.Tensor,
            "index_select",
            lambda self, dim, index: change(select(self, dim, index)) if dim == 2 else select(self, dim, index),
        )
    sharing = sharing_of(model)
    assert not sharing.decide([pair(20, 4, 5)])
    assert not sharing.decide([pair(40, 4, 5)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("prompts are not shared between the rows of a pair while training: ")
    assert said in lines[0]


def test_lengths_below_a_refused_one_are_still_shared(monkeypatch):
    sharing = sharing_of(model_of("llama"))
    monkeypatch.setattr(PromptSharing, "_against", lambda self, unit: "no" if len(unit[0][0]) > 20 else None)
    assert [sharing.decide([pair(prompt, 4, 5)]) for prompt in (10, 30, 20, 25)] == [True, False, True, False]


def test_a_rank_does_as_the_others(capsys):
    assert not sharing_of(model_of("llama"), any=lambda happened: True).decide([pair(20, 4, 5)])
    assert "another process found other gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "may_try", "said"),
    [
        ("mixtral-balanced", True, "load-balancing"),
        ("gemma2", True, "eager attention does not take"),
        ("llama", False, "DeepSpeed"),
    ],
)
def test_what_cannot_share_says_so_once(family, may_try, said, capsys):
    model = prepared(tiny_model("mixtral")) if family == "mixtral-balanced" else model_of(family)
    sharing = sharing_of(model, may_try=may_try)
    assert not sharing.decide([pair(20, 4, 5)])
    assert not sharing.decide([pair(30, 4, 5)])
    assert said in capsys.readouterr().out
    assert not capsys.readouterr().out


def test_full_memory_leaves_rows_apart(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(prompt_sharing, "measure_packing", full)
    assert not sharing_of(model_of("llama")).decide([pair(20, 4, 5)])
    assert "not enough memory to compare both ways" in capsys.readouterr().out


def test_layers_of_another_kind_are_refused():
    config = transformers.LlamaConfig(**_QWEN)
    assert why_not_shared(config, "sdpa", CPU) is None
    config.layer_types = ["linear_attention", "full_attention"]
    assert "layers of another kind" in why_not_shared(config, "sdpa", CPU)


# --- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, base):
    """A cache of eight pairs of several turns."""
    folder, words = tmp_path_factory.mktemp("pairs"), ["stone", "river", "red", "maybe", "went"]

    def turn(role, seed, length):
        return {"role": role, "content": " ".join(words[(seed + k * k) % 5] for k in range(length)) + f" {seed}"}

    rows = [
        {
            "prompt": [turn("user", i, 12 + i), turn("assistant", i + 1, 9), turn("user", i + 2, 8)],
            "chosen": [turn("assistant", i + 3, 3 + i % 3)],
            "rejected": [turn("assistant", i + 4, 4 + i % 4)],
        }
        for i in range(8)
    ]
    data = write_rows(folder / "pairs.jsonl", rows)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", kl_partners=1))
    return folder / "refs"


@pytest.fixture
def layouts(monkeypatch):
    """Return whether each micro-batch of the gradient pass shared prompts, and its tokens."""
    found, lay_out = [], PreparedPolicy.lay_out

    def noted(self, sequences, *, share=False):
        batch = lay_out(self, sequences, share=share)
        found.append((share, batch.padded_tokens))
        return batch

    monkeypatch.setattr(PreparedPolicy, "lay_out", noted)
    return found


def config_for(pairs, out, **options):
    settings = {
        "loss": "dpo",
        "batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_steps": 0,
        "shuffle": False,
    }
    return TrainConfig(cache=pairs, out=out, device="cpu", **{**settings, **options})


def apart(one, other):
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    return max(float((second[name] - value).abs().max()) for name, value in first.items())


def test_a_run_that_shares_equals_one_that_does_not(pairs, tmp_path, monkeypatch, layouts):
    shared = train(config_for(pairs, tmp_path / "shared"))
    used = [share for share, _ in layouts]
    assert any(used)
    monkeypatch.setattr(prompt_sharing, "WORTH_SHARING", 2.0)
    layouts.clear()
    plain = train(config_for(pairs, tmp_path / "plain"))
    assert not any(share for share, _ in layouts)
    assert apart(shared, plain) < 2e-5
    first, second = (map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (shared, plain))
    for one, other in zip(first, second, strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)


def test_a_pass_has_no_more_tokens_than_the_budget(pairs, tmp_path, layouts):
    whole = train(config_for(pairs, tmp_path / "whole"))
    sizes = [tokens for share, tokens in layouts if share]
    budget = max(sizes) // 2
    layouts.clear()
    parts = train(config_for(pairs, tmp_path / "parts", max_tokens=budget))
    assert all(tokens <= budget for share, tokens in layouts if share)
    assert sum(share for share, _ in layouts) > len(sizes)
    assert apart(whole, parts) < 2e-5


def test_out_of_memory_halves_the_budget(pairs, tmp_path, monkeypatch, layouts):
    whole, backward, failed = train(config_for(pairs, tmp_path / "whole")), GradientPasses.backward, []

    def full(self, loss, *, last):
        if not failed:
            failed.append(self._shares)
            raise torch.OutOfMemoryError("full")
        backward(self, loss, last=last)

    monkeypatch.setattr(GradientPasses, "backward", full)
    assert apart(whole, train(config_for(pairs, tmp_path / "halved", max_tokens=1200))) < 2e-5
    assert failed == [True]


def test_losses_of_rows_never_share(pairs, tmp_path, layouts):
    train(replace(config_for(pairs, tmp_path / "kto"), loss="kto"))
    assert layouts
    assert not any(share for share, _ in layouts)


@pytest.mark.parametrize("options", [{"lora_rank": 4, "gradient_checkpointing": True}, {"memory": "lean"}], ids=str)
def test_recipes_share_too(options, pairs, tmp_path, layouts, capsys):
    train(config_for(pairs, tmp_path / "run", **options))
    assert any(share for share, _ in layouts)
    assert "prompts are not shared" not in capsys.readouterr().out
