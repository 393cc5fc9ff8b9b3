"""What docs/gpu.md and `kto-train --plan-memory` promise, compared with the bytes that small models really take."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from click.testing import CliRunner
from models import random_rows
from torch import Tensor

from offline_kto.kto_core.models.memory_check import Sizes
from offline_kto.kto_core.models.precision import store_by_module_in, store_matrices_in, store_trained_in
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.train.cli import train as command
from offline_kto.train.model.checkpointing import enable_checkpointing
from offline_kto.train.model.memory_by_recipe import _FOUR_BITS, ModelSize, needs_of, recommended, size_of
from offline_kto.train.trainer.host_adam import HostAdamW
from offline_kto.train.trainer.lean_adam import LeanAdamW
from offline_kto.train.trainer.lean_layers import halve_activations

ROWS, LENGTH = 3, 130
SIZES = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 1}
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


def build(recipe: str, *, layers: int = 2) -> Any:
    """A small model as a recipe stores it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=997, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    add_scoring_forward(model)
    if recipe in ("lean", "host"):
        store_trained_in(model, torch.bfloat16)
    if recipe == "LoRA":
        store_matrices_in(model, torch.bfloat16)
        settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings)
    if recipe == "sharded":  # as FSDP2 gathers its weights
        store_by_module_in(model, torch.bfloat16)
    return model.train()


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@contextmanager
def kept_tensors(kept: list[Tensor]) -> Iterator[None]:
    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "full": lambda weights: torch.optim.AdamW(weights, lr=1e-6),
    "lean": lambda weights: LeanAdamW(weights, lr=1e-6),
    "host": lambda weights: HostAdamW(weights, lr=1e-6),
    "LoRA": lambda weights: torch.optim.AdamW(weights, lr=1e-6),
}


@pytest.mark.parametrize("recipe", OPTIMIZERS)
def test_weights_gradients_and_states(recipe: str) -> None:
    size = size_of(build("full"))
    model, kept = build(recipe), []
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = OPTIMIZERS[recipe](trained)
    with AUTOCAST, kept_tensors(kept):
        loss = token_logps(model, pad_sequences(random_rows(3))).token_logps.sum()
    loss.backward()
    optimizer.step()
    matrices = {module.weight.shape for module in model.modules() if isinstance(module, torch.nn.Linear)}
    head = model.get_output_embeddings().weight.shape
    stored = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    copies = [
        one
        for one in kept
        if one.ndim == 2
        and (one.shape in matrices or one.T.shape in matrices)
        and head not in (one.shape, one.T.shape)
        and one.untyped_storage().data_ptr() not in stored
    ]
    states = [one for state in optimizer.state.values() for name, one in state.items() if name != "step"]
    found = bytes_of(iter([*model.parameters(), *(weight.grad for weight in trained), *copies]))
    on_host = bytes_of(iter(states)) if recipe == "host" else 0
    found += 0 if recipe == "host" else bytes_of(iter(states))
    need = next(one for one in needs_of(size) if one.recipe.startswith(recipe))
    assert need.resident == pytest.approx(found, rel=0.05)
    assert need.on_host == pytest.approx(on_host, rel=0.05)


def test_four_bits() -> None:
    layer = Linear4bit(1024, 1024, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = layer.weight.quant_state
    parts = [layer.weight, state.absmax, state.state2.absmax]
    found = sum(one.numel() * one.element_size() for one in parts) / 1024**2
    assert pytest.approx(found, rel=0.05) == _FOUR_BITS


def activations(recipe: str, layers: int, *, checkpoints: bool) -> int:
    model, kept = build(recipe, layers=layers), []
    if checkpoints:
        enable_checkpointing(model)
    else:
        with AUTOCAST:
            assert halve_activations(model, model, pad_sequences(random_rows(3)))
    body = model.get_base_model().model if recipe == "LoRA" else model.model
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    with AUTOCAST, kept_tensors(kept):
        hidden = body.embed_tokens(positions % 97).requires_grad_()
        body(inputs_embeds=hidden, position_ids=positions, use_cache=False)
    return bytes_of(one for one in kept if LENGTH in one.shape or LENGTH * ROWS in one.shape)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("recipe", ["full", "lean", "LoRA", "sharded"])
def test_activations_of_a_token(recipe: str, checkpoints: bool) -> None:
    """Measure two more layers: what a model keeps outside of its layers cancels."""
    found = activations(recipe, 3, checkpoints=checkpoints) - activations(recipe, 1, checkpoints=checkpoints)
    size = size_of(build("full"))
    name = "full, FSDP2" if recipe == "sharded" else recipe
    need = next(one for one in needs_of(size) if one.recipe.startswith(name))
    promised = need.checkpointed if checkpoints else need.token
    assert promised * ROWS * LENGTH == pytest.approx(found, rel=0.05)


def test_sharded_weights_are_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of eight that nobody runs: what it holds between passes."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = build("full")
    if dist.is_initialized():  # by a run of another test in this process
        AcceleratorState._reset_state(reset_partial_state=True)
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (8,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        weights = list(model.parameters())
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(weights, lr=0.0)
        optimizer.step()
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        held: list[Any] = [*weights, *(weight.grad for weight in weights), *moments]
        found = sum(one.to_local().numel() * one.element_size() for one in held)
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(16 * size_of(build("full")).weights / 8, rel=0.05)


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}


def size_8b() -> ModelSize:
    with torch.device("meta"):
        return size_of(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA_8B)))


def test_the_most_exact_recipe_that_fits_is_recommended() -> None:
    needs = needs_of(size_8b())
    found = {card: recommended(needs, card * 1e9) for card in (8, 24, 80, 192)}
    assert found[8] is None
    names = {card: one and (one[0].recipe.split()[0], one[1]) for card, one in found.items()}
    assert names == {8: None, 24: ("QLoRA", True), 80: ("lean", False), 192: ("full", False)}


def test_the_command_reads_shapes_alone(tmp_path: Path) -> None:
    transformers.LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path)
    found = CliRunner().invoke(command, ["--plan-memory", str(tmp_path)])
    assert found.exit_code == 0, found.output
    rows = {line[: line.index("  ")]: line.split()[-7:-5] for line in found.output.splitlines() if " GPUs  " in line}
    assert rows == {"full, FSDP2 on 8 GPUs": ["21.4", "2.7"], "lean, FSDP2 on 8 GPUs": ["10.3", "1.3"]}
    assert "8.03 billion weights, 32 layers of 4,096" in found.output
    assert "fits        80 GB: lean (--memory lean)" in found.output


def planned(folder: Path | str, *options: str) -> Any:
    return CliRunner().invoke(command, ["--plan-memory", str(folder), *options])


def saved(folder: Path, kind: Any = transformers.LlamaConfig, **settings: Any) -> Path:
    small = {**SIZES, "num_hidden_layers": 2, "vocab_size": 997, **settings}
    kind(**small).save_pretrained(folder)
    return folder


def test_a_quantised_base_keeps_stacked_experts_in_16_bits() -> None:
    config = transformers.MixtralConfig(**SIZES, num_hidden_layers=1, vocab_size=997, num_local_experts=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    experts = 4 * 3 * 256 * 896
    assert size_of(model).matrices - size_of(model).packed >= experts
    sizes = Sizes(matrices=size_of(model).matrices, others=0, stacked=experts)
    assert sizes.four_bits() == round(0.6 * (sizes.matrices - experts)) + 2 * experts
    need = next(one for one in needs_of(size_of(model), lora_rank=1) if one.recipe.startswith("QLoRA"))
    assert need.resident > 2 * experts


def test_the_adapters_have_the_given_rank(tmp_path: Path) -> None:
    found = planned(saved(tmp_path), "--lora-rank", "64", "--memory", "lean", "--cache", "refs")
    assert "LoRA (--lora-rank 64)" in found.output
    assert "--memory, --cache: of no effect; --plan-memory compares all recipes" in found.output
    assert planned(tmp_path, "--lora-rank", "-1").exit_code == 2


def test_small_models_are_counted_in_mb(tmp_path: Path) -> None:
    found = planned(saved(tmp_path))
    assert " MB  bytes a weight" in found.output
    full = next(line for line in found.output.splitlines() if line.startswith("full  "))
    assert float(full.split()[1]) > 1


def test_custom_code_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = planned(tmp_path)
    assert found.exit_code == 1
    assert "OwnForCausalLM" in found.output
    assert "--trust-remote-code" in found.output


def empty(folder: Path) -> Path:
    return folder


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def cache(folder: Path) -> Path:
    (folder / "manifest.json").write_text("{}")
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda folder: folder / "absent", "no such model folder"),
    "empty": (empty, "no config.json, so this is not a model folder"),
    "adapter": (adapter, "an adapter, not a model"),
    "cache": (cache, "not the manifest of a reference cache"),
    "encoder": (lambda folder: saved(folder, transformers.BertConfig), "bert is an encoder"),
    "vision": (
        lambda folder: saved(folder, transformers.ViTConfig),
        "KTO needs a causal (decoder-only) language model",
    ),
    "no layers": (lambda folder: saved(folder, num_hidden_layers=0), "num_hidden_layers is 0"),
    "minus one": (lambda folder: saved(folder, num_hidden_layers=-1), "num_hidden_layers is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_one_message(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    found = planned(make(tmp_path))
    assert found.exit_code == 1, found.output
    assert message in found.output


def test_a_cache_names_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    manifest = SimpleNamespace(reference={"id": "org/model"})
    monkeypatch.setattr("offline_kto.train.run.memory_table.read_manifest", lambda folder: manifest)
    found = planned(tmp_path)
    assert "is a reference cache; its model is org/model" in found.output


def test_only_the_configuration_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    asked: dict[str, Any] = {}

    def download(name: str, **keywords: Any) -> str:
        asked.update(keywords)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert planned("org/tiny").exit_code == 0
    assert asked["allow_patterns"] == ["config.json", "*.py"]
