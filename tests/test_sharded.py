"""Weights spread over ranks: the real FSDP2 (fully_shard through accelerate and the Trainer) on two gloo ranks.

accelerate turns FSDP on for accelerators only. `sharded_ranks.py` tells it that the CPU ranks are such; all that
follows, from sharding to gathering and saving, is the real thing.
"""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import models
import pytest
import torch
import transformers
from feedback_files import write_rows
from models import save_tiny
from safetensors.torch import load_file
from sharded_ranks import AS_ACCELERATORS, FSDP2

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.samples_file import read_samples
from offline_kto.train.trainer.sharding import prepare_sharding

TRAIN = "\nfrom offline_kto.train.cli import train; train()"


def launch(
    config: TrainConfig,
    out: Path,
    *options: str,
    before: str = "",
    environment: dict[str, str] | None = None,
    sharded: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`kto-train` on two sharded ranks, or in one process; `before` is code that runs first."""
    arguments = ["--cache", config.cache, "--out", out, "--device", "cpu"]
    arguments += ["--batch-size", config.batch_size, "--max-steps", config.max_steps]
    arguments += ["--learning-rate", config.learning_rate, "--max-tokens", config.max_tokens, *options]
    variables = {**(FSDP2 if sharded else {}), **(environment or {})}
    return forks.run(AS_ACCELERATORS + before + TRAIN, *arguments, environment=variables, ranks=2 if sharded else 0)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return uneven_rows(tmp_path_factory.mktemp("untied"), tied=False)


def uneven_rows(folder: Path, *, tied: bool, family: str = "llama", **of_model: Any) -> TrainConfig:
    """Rows of very different lengths: one rank gets two long ones while the other gets many short ones."""
    rows = []
    for number in range(18):
        long = number % 6 == 0
        prompt = [{"role": "user", "content": f"{number} " + "hello world " * (30 if long else 1)}]
        completion = [{"role": "assistant", "content": f"{number} " + "red stone " * (25 if long else 2)}]
        rows.append({"prompt": prompt, "completion": completion, "label": number % 2 == 0})
    base = save_tiny(folder / "base", family, tie_word_embeddings=tied, **of_model)
    out = folder / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(write_rows(folder / "f.jsonl", rows)), out=out))
    return TrainConfig(
        cache=out, out=folder / "one", batch_size=6, max_steps=4, max_tokens=400, learning_rate=3e-3, save_steps=0
    )


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_two_sharded_ranks_equal_one_process(tied: bool, tmp_path: Path) -> None:
    uneven = uneven_rows(tmp_path, tied=tied)
    one = train(replace(uneven, out=tmp_path / "one", eval_fraction=0.2, keep="last"))
    done = launch(uneven, tmp_path / "two", "--eval-fraction", "0.2", "--save-steps", "0", "--keep", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two") is not None
    assert_same_weights(one, tmp_path / "two")
    assert read_samples(one) == read_samples(tmp_path / "two") != []


@pytest.mark.slow
def test_pairs_share_their_prompts_in_sharded_passes(tmp_path: Path) -> None:
    """One rank has two long pairs while the other has many short ones; the check runs on both."""
    rows = []
    for number in range(9):
        text = f"{number} " + "hello world " * (30 if number % 3 == 0 else 8)
        rows.append({"prompt": text, "chosen": f"red {number}", "rejected": f"stone stone {number}"})
    base, out = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True), tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(write_rows(tmp_path / "p.jsonl", rows)), out=out))
    config = TrainConfig(
        cache=out,
        out=tmp_path / "one",
        batch_size=6,
        max_steps=3,
        max_tokens=400,
        learning_rate=3e-3,
        save_steps=0,
        loss="dpo",
    )
    noted = """
import offline_kto.train.trainer.prepared_policy as of
apart = of.share_keys
of.share_keys = lambda rows: print("shares") or apart(rows)
"""
    done = launch(config, tmp_path / "two", "--loss", "dpo", "--save-steps", "0", before=noted)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shares" in done.stdout
    assert_same_weights(train(config), tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_rank_reads_the_weights_for_both(tied: bool, tmp_path: Path) -> None:
    """With `fsdp_cpu_ram_efficient_loading`; the model takes 24 MB."""
    large = uneven_rows(tmp_path, tied=tied, hidden_size=256, intermediate_size=2048, num_hidden_layers=4)
    large = replace(large, max_steps=2, learning_rate=1e-4)
    one = train(replace(large, out=tmp_path / "one"))
    before = """
import os, sys
from offline_kto.train.model.policy import PolicyFiles
whole_load = PolicyFiles.load
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
def load(self, *given):
    import transformers.models.llama.modeling_llama  # imported before memory is measured
    start = resident()
    model = whole_load(self, *given)
    weights = sum(one.nbytes for one in model.parameters()) / 2**20
    if os.environ["RANK"] == "0":
        sum(float(one.detach().sum()) for one in model.parameters())  # the file is mapped, and read where it is used
    print(f"rank {os.environ['RANK']}: {(resident() - start) / weights:.2f} of the weights", file=sys.stderr, flush=True)
    return model
PolicyFiles.load = load
"""
    efficient = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    done = launch(large, tmp_path / "two", "--save-steps", "0", environment=efficient, before=before)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = dict(re.findall(r"rank (\d): (-?[\d.]+) of the weights", done.stderr))
    assert float(shares["1"]) < 0.4 < float(shares["0"])
    assert_same_weights(one, tmp_path / "two")


@pytest.mark.slow
def test_a_checkpoint_of_shards_goes_on(uneven: TrainConfig, tmp_path: Path) -> None:
    """Each rank writes its own shards; the last update is cut off and made again."""
    one = train(replace(uneven, out=tmp_path / "one"))
    two = tmp_path / "two"
    shards = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    done = launch(uneven, two, "--save-steps", "2", environment=shards)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(two / "checkpoint-4")
    (two / "model.safetensors").unlink()
    forgets = "import transformers.trainer\ntransformers.trainer.load_fsdp_optimizer = lambda *args, **kwargs: None"
    done = launch(uneven, two, "--save-steps", "2", "--resume", environment=shards, before=forgets)
    assert done.returncode == 1
    assert "checkpoint-2: accelerate did not load the optimizer's state" in done.stderr
    done = launch(uneven, two, "--save-steps", "2", "--resume", environment=shards)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-2" in done.stdout
    assert_same_weights(one, two)


@pytest.mark.slow
def test_bfloat16_rounds_passes_but_no_results(uneven: TrainConfig, tmp_path: Path) -> None:
    """Weights stay float32, and log-probs are not rounded on their way out of the sharded model."""
    done = launch(uneven, tmp_path / "two", "--save-steps", "0", "--dtype", "bfloat16", "--allow-different-policy")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {t.dtype for t in load_file(tmp_path / "two" / "model.safetensors").values()} == {torch.float32}
    records = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(0.5, abs=0.03)
    # Sums of bfloat16 numbers would lie on a coarse grid; the mean is over at most six rows.
    scaled = [r["logps/chosen"] * 60 * 2**16 for r in records if "logps/chosen" in r]
    assert any(abs(value - round(value)) > 0.01 for value in scaled)


RECORDER = """
import os, torch
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.train.trainer.kto_trainer import KTOTrainer
prepare = KTOTrainer.prepare_to_train
def prepare_and_record(self):
    prepare(self)
    model = self.policy.scoring_model.eval()
    with torch.no_grad():
        passes = [pad_sequences([self.rows[number].matched.ids]) for number in range(len(self.rows))]
        found = torch.cat([token_logps(model, batch).token_logps for batch in passes])
    torch.save(found, os.environ["RECORDS"] + "." + os.environ.get("RANK", "0"))
KTOTrainer.prepare_to_train = prepare_and_record
"""

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 256}

GLM4_MOE = (
    transformers.Glm4MoeConfig,
    {
        **{"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "initializer_range": 0.4, "pad_token_id": None},
    },
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "of_model", "options"),
    [
        ("llama", {"rope_parameters": YARN}, ()),
        ("llama-tied", {"tied": True}, ("--memory", "lean")),
        ("gpt2", {"tied": True}, ("--gradient-checkpointing",)),
        ("glm4-moe", {}, ()),
    ],
    ids=["llama", "lean", "gpt2", "experts"],
)
def test_bfloat16_scores_are_those_of_one_process(
    family: str, of_model: dict[str, Any], options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, on the rank that reads the weights and on the other one, which has to be sent the model's constants.

    YaRN's position frequencies are constants that are not saved, the routers' corrections of GLM are some that are.
    """
    monkeypatch.setitem(models._FAMILIES, "glm4-moe", GLM4_MOE)
    config = uneven_rows(tmp_path, **{"tied": False, "family": family, **of_model})
    config = replace(config, max_steps=2, learning_rate=1e-3)
    options = (*options, "--dtype", "bfloat16", "--save-steps", "0", "--allow-different-policy")
    whole, parts = ({"RECORDS": str(tmp_path / name)} for name in ("whole", "parts"))
    one = launch(config, tmp_path / "one", *options, before=RECORDER, environment=whole, sharded=False)
    assert one.returncode == 0, one.stderr[-3000:]
    parts["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    two = launch(config, tmp_path / "two", *options, before=RECORDER, environment=parts)
    assert two.returncode == 0, two.stderr[-3000:]
    expected = torch.load(tmp_path / "whole.0")
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"parts.{rank}"), expected), rank
    if "lean" not in options:  # there, each rank rounds at random in its own way
        before, first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "two"))
        moved = sum(float((first[name] - weight).square().sum()) for name, weight in before.items())
        apart = sum(float((first[name] - weight).square().sum()) for name, weight in second.items())
        assert apart < 0.01 * moved


@pytest.mark.slow
def test_sharded_layers_keep_half_of_the_activations(uneven: TrainConfig, tmp_path: Path) -> None:
    """Choose the layers as on a GPU: ranks agree on them, losses are the same, and gradients within rounding."""
    halves = (
        "from offline_kto.train.trainer import kto_trainer\nkto_trainer.can_halve_activations = lambda *_, **__: True"
    )
    config, records = replace(uneven, max_steps=2), {}
    for name, before in (("usual", ""), ("half", halves)):
        done = launch(config, tmp_path / name, "--dtype", "bfloat16", "--save-steps", "0", before=before)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("6 norms and SwiGLU layers keep their inputs only" in done.stdout) == bool(before)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records[name] = json.loads(lines[0])
    assert records["half"]["loss"] == records["usual"]["loss"]
    assert records["half"]["grad_norm"] == pytest.approx(records["usual"]["grad_norm"], rel=0.02)


@pytest.mark.slow
def test_lean_weights_are_sharded_too(uneven: TrainConfig, tmp_path: Path) -> None:
    """16-bit weights with 8-bit moments on two ranks: near one process, and a checkpoint of shards goes on bit for bit."""
    options = ("--memory", "lean", "--allow-different-policy", "--save-steps", "2")
    one = train(replace(uneven, out=tmp_path / "one", memory="lean", device="cpu"))
    two, shards = tmp_path / "two", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    done = launch(uneven, two, *options, environment=shards)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert {weight.dtype for weight in second.values()} == {torch.bfloat16}
    for name, weight in first.items():
        assert (second[name].float() - weight.float()).norm() < 0.05 * weight.float().norm(), name
    shutil.rmtree(two / "checkpoint-4")
    (two / "model.safetensors").unlink()
    done = launch(uneven, two, *options, "--resume", environment=shards)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in load_file(two / "model.safetensors").items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.slow
def test_out_of_memory_on_one_rank_is_one_message(uneven: TrainConfig, tmp_path: Path) -> None:
    before = """
import os, torch
from offline_kto.train.trainer.gradient_passes import GradientPasses
whole, lasts = GradientPasses.backward, []
def small_device(self, loss, *, last):
    if os.environ["RANK"] == "1" and sum(lasts) == 1:  # in the second update
        raise torch.OutOfMemoryError("simulated")
    whole(self, loss, last=last)
    lasts.append(last)
GradientPasses.backward = small_device
"""
    done = launch(uneven, tmp_path / "two", "--save-steps", "0", before=before)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Out of memory with --max-tokens 400" in errors[0]


def test_settings_that_would_not_shard_are_refused(uneven: TrainConfig, tmp_path: Path, monkeypatch: Any) -> None:
    """accelerate leaves them aside on a CPU, and each rank would hold the whole model."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="ask for FSDP, but on this device the run would not be sharded"):
        train(replace(uneven, out=tmp_path / "one"))


def test_a_run_is_not_evaluated_sharded(uneven: TrainConfig, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--evaluate-only: accelerate's settings ask for FSDP"):
        train(replace(uneven, evaluate_only=tmp_path))


def test_what_could_not_train_or_save_is_refused() -> None:
    def prepare(fsdp: Any = None, deepspeed: Any = None, merges: bool = False) -> None:
        state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
        prepare_sharding(SimpleNamespace(state=state), torch.float32, merges=merges)

    prepare(merges=True)
    with pytest.raises(TrainingError, match="set fsdp_version: 2"):
        prepare(SimpleNamespace(fsdp_version=1))
    with pytest.raises(TrainingError, match="carries an adapter"):
        prepare(SimpleNamespace(fsdp_version=2), merges=True)
    with pytest.raises(TrainingError, match=r"small updates vanish: pass --dtype float32"):
        prepare_sharding(
            SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=SimpleNamespace(zero_stage=2))),
            torch.bfloat16,
            merges=False,
        )
    unsaved = SimpleNamespace(zero_stage=3, hf_ds_config=SimpleNamespace(is_true=lambda name: False))
    with pytest.raises(TrainingError, match="zero3_save_16bit_model: true"):
        prepare(deepspeed=unsaved)


JUDGED = """
import os, torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from offline_kto.train.trainer.kto_trainer import KTOTrainer
decide, losses = KTOTrainer._determine_best_metric, [0.4, 0.6]
def determine(self, metrics, trial):
    metrics["eval_loss"] = losses.pop(0)
    whole = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in self.model.named_parameters()}
    if os.environ["RANK"] == "0":
        weights = {name: weight.detach().cpu().clone().contiguous() for name, weight in whole.items()}
        save_file(weights, os.environ["RECORDS"] + f".{self.state.global_step}")
    return decide(self, metrics, trial)
KTOTrainer._determine_best_metric = determine
"""


@pytest.mark.parametrize("memory", [pytest.param("full", marks=pytest.mark.slow), "lean"])
def test_the_best_model_of_sharded_ranks_is_kept_bit_for_bit(memory: str, uneven: TrainConfig, tmp_path: Path) -> None:
    """From its checkpoint, whose weights were gathered from both ranks."""
    options = ("--memory", memory, "--allow-different-policy", "--save-steps", "4")
    options = (*options, "--eval-fraction", "0.2", "--eval-steps", "2")
    records = {"RECORDS": str(tmp_path / "judged")}
    done = launch(uneven, tmp_path / "two", *options, before=JUDGED, environment=records)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/evaluation.json").read_bytes())["step"] == 2
    kept, best, last = (load_file(tmp_path / name) for name in ("two/model.safetensors", "judged.2", "judged.4"))
    assert all(torch.equal(weight, best[name].to(weight.dtype)) for name, weight in kept.items())
    assert not all(torch.equal(weight, last[name].to(weight.dtype)) for name, weight in kept.items())
