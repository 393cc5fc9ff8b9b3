"""Training with `--memory lean`: 16-bit weights, rounded at random, and 8-bit moments."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import random_rows, tiny_model
from safetensors.torch import load_file, save_file

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.narrow_embedding import NarrowEmbedding
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run import run_trainer
from offline_kto.train.run.inputs import KeptMaterials, Materials
from offline_kto.train.run.optimizer import check_sharding
from offline_kto.train.run.train_run import train
from offline_kto.train.run.training_run import TrainingRun


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache,
        out=tmp_path / "run",
        memory="lean",
        batch_size=8,
        max_steps=3,
        learning_rate=1e-3,
        save_steps=0,
        device="cpu",
        eval_fraction=0.2,
    )


@pytest.mark.parametrize("memory", ["lean", "host"])
def test_a_run_trains_and_saves_bfloat16(
    config: TrainConfig, memory: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(replace(config, memory=memory))
    assert f"memory      --memory {memory}: " in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["precision"] == "bfloat16"
    assert json.loads((run / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    moved = [name for name in after if not torch.equal(before[name].bfloat16(), after[name])]
    assert len(moved) > len(after) / 2


@pytest.mark.parametrize("memory", ["lean", "host"])
def test_a_resumed_run_is_the_uninterrupted_one(config: TrainConfig, memory: str, tmp_path: Path) -> None:
    config = replace(config, memory=memory, save_steps=3, max_steps=6)
    whole = train(config)
    part = tmp_path / "part"
    train(replace(config, out=part, max_steps=3))
    train(replace(config, out=part, resume=True))
    # Not the weights: some processors round 16-bit products by where the matrices are in memory, so that the last bits differ.
    first, second = (
        [
            record["loss"]
            for line in (run / "metrics.jsonl").read_text().splitlines()
            if "loss" in (record := json.loads(line))
        ]
        for run in (whole, part)
    )
    assert len(first) == 6
    assert second == pytest.approx(first, rel=1e-5)


def test_weights_on_the_host_train_as_float32_weights_do(
    config: TrainConfig, base: Path, feedback: Path, tmp_path: Path
) -> None:
    """The same up to the rounding of gradients: the float32 weights on the host lose no update."""
    model = shutil.copytree(base, tmp_path / "base")
    weights = {name: weight.bfloat16() for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refs = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(model), data=str(feedback), out=refs, dtype="bfloat16"))
    config = replace(config, cache=refs, learning_rate=1e-5, max_steps=10, dtype="bfloat16")
    full, host = (train(replace(config, out=tmp_path / memory, memory=memory)) for memory in ("full", "host"))
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in (full, host)
    ]
    assert losses[1][0] == losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.slow
def test_small_steps_add_up_as_in_float32_and_are_lost_in_plain_bfloat16(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is a tenth of half a unit in the last place. benchmarks/lean_recipe.py is the long version."""
    options = {"learning_rate": 1e-4, "max_steps": 20, "epochs": 100.0, "logging_steps": 20}
    config = replace(config, eval_fraction=0.0, allow_different_policy=True, **options)

    def margin(run: Path) -> float:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first, last = records[0], records[-2]
        return last["rewards/margins"] - first["rewards/margins"]

    full, lean = (
        margin(train(replace(config, out=tmp_path / memory, memory=memory, dtype="bfloat16")))
        for memory in ("full", "lean")
    )
    monkeypatch.setattr(run_trainer, "own_optimizer", lambda *_: (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 0.0}))
    plain = margin(train(replace(config, out=tmp_path / "plain")))
    assert lean == pytest.approx(full, rel=0.2)
    assert plain < 0.3 * full


def test_trials_of_a_sweep_train_as_kto_train_does(config: TrainConfig, tmp_path: Path) -> None:
    kept, found = KeptMaterials(), []
    for number, materials in enumerate((Materials(), kept, kept)):
        out = tmp_path / f"{number}"
        out.mkdir()
        TrainingRun.set_up(config, out, materials.data(config), materials).train()
        materials.take_back()
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([record["loss"] for record in records if "loss" in record])
    assert found[0] == found[1] == found[2]


def test_an_evaluation_computes_as_the_run_did(config: TrainConfig) -> None:
    run = train(config)
    expected = json.loads((run / "evaluation.json").read_text())["metrics"]
    train(replace(config, evaluate_only=run, out=None))
    found = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert found["loss"]["value"] == pytest.approx(expected["loss"]["value"], abs=1e-6)
    train(replace(config, evaluate_only=run, out=None, dtype="float32"))
    found = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert found["loss"]["value"] == pytest.approx(expected["loss"]["value"], abs=5e-3)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral"])
def test_what_is_stored_in_16_bits_changes_no_score(family: str, tmp_path: Path) -> None:
    """Policy and reference are the same function at the start, experts included."""
    tiny_model(family, **({} if family == "gpt2" else {"hidden_size": 32})).bfloat16().save_pretrained(tmp_path)
    half, device, batch = Precision(torch.bfloat16), torch.device("cpu"), pad_sequences(random_rows(6))
    kinds = {"frozen": True}, {"frozen": False, "narrow": True}
    scores = []
    for options in kinds:
        model = load_causal_lm(
            transformers.AutoModelForCausalLM, tmp_path, precision=half, device=device, **options
        ).eval()
        with torch.no_grad(), half.autocast(device):
            scores.append(token_logps(model, batch).token_logps)
    assert torch.equal(*scores)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    narrow = [weight for weight in matrices if weight.dtype == torch.bfloat16]
    assert len(narrow) >= len(matrices) - 2
    assert all(weight.requires_grad for weight in model.parameters())


def test_gradients_of_frequent_tokens_are_summed_in_float32() -> None:
    """A thousand small terms in one row: in bfloat16 the sum would stop growing at 256 of them."""
    table = torch.nn.Embedding(5, 4).bfloat16()
    table.__class__ = NarrowEmbedding
    ids = torch.tensor([1] * 1000 + [3] + [0])
    for sparse in (False, True):
        table.sparse, table.weight.grad = sparse, None
        output = table(ids)
        assert output.dtype == torch.float32
        output.sum().backward()
        grad = table.weight.grad.to_dense()
        assert grad.dtype == torch.bfloat16
        assert grad[:, 0].tolist() == [1.0, 1000.0, 0.0, 1.0, 0.0]


def test_shardings_that_cannot_be_honoured_are_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: the message is about options."""
    deepspeed: Any = SimpleNamespace(deepspeed_plugin=object())
    unsharded: Any = SimpleNamespace(deepspeed_plugin=None)
    for memory in ("lean", "host"):
        with pytest.raises(ConfigError, match=f"--memory {memory} does not work with DeepSpeed"):
            check_sharding(replace(config, memory=memory), deepspeed)
        check_sharding(replace(config, memory=memory), unsharded)
    check_sharding(replace(config, memory="full"), deepspeed)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(Materials, "files", lambda *_: pytest.fail("the model was looked for"))
    with pytest.raises(ConfigError, match="With FSDP2 use --memory lean"):
        train(replace(config, memory="host"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "leave out --dtype float32"),
        ({"lora_rank": 4}, "leave --memory out"),
        ({"training": {"optim": "adafactor", "optim_args": "a=1"}}, "remove optim and optim_args from"),
        ({"training": {"optim_target_modules": "all-linear"}}, "remove optim_target_modules from"),
    ],
)
def test_what_cannot_be_combined_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(memory="lean", **options)
