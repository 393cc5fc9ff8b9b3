"""Training on CUDA devices. Models are tiny, so that each test takes seconds.

The same is tested on the CPU as far as it can be: test_host_stalls.py, test_out_of_memory.py, test_gradient_sums.py,
test_sharded.py, test_determinism.py.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import transformers
from gpus import DEVICE, MARKS, REHEARSAL, two_gpus
from safetensors.torch import load_file
from stopped_runs import train_until

from offline_kto.kto_core.scoring import cuda_head
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.kto_trainer import KTOTrainer

pytestmark = MARKS

TRAIN = "from offline_kto.train.cli import train; train()"

# Rounding of bfloat16 passes, on weights of about 0.4 after a few updates of 3e-3.
BFLOAT16 = 2e-2


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    """In float32, so that it can be compared with the CPU."""
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=4, learning_rate=1e-3, save_steps=0,
        device=DEVICE.type, dtype="float32", max_tokens=2048,
    )  # fmt: skip


def in_bfloat16(config: TrainConfig) -> TrainConfig:
    return replace(config, dtype="bfloat16", allow_different_policy=True)  # the cache was scored in float32


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("*model.safetensors")))


def difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_reads_from_the_device_once(config: TrainConfig, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in each update, before the optimizer's step (g7); nothing else makes the host wait for the device."""
    found: list[list[str]] = []

    class Watching(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.caught = warnings.catch_warnings(record=True)
            self.messages = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")
            found.append([str(one.message) for one in self.messages if "synchroniz" in str(one.message).lower()])
            self.caught.__exit__(None, None, None)

    real = KTOTrainer.__init__
    monkeypatch.setattr(
        KTOTrainer, "__init__", lambda self, **o: real(self, **{**o, "callbacks": [*o["callbacks"], Watching()]})
    )
    train(replace(config if dtype == "float32" else in_bfloat16(config), logging_steps=100))
    assert len(found) == 4
    for messages in found[1:-1]:  # the first measures, the last is logged
        assert len(messages) <= 2, messages


@pytest.mark.parametrize("where", ["a pass", "the backward pass", "the output layer"])
def test_out_of_memory_repeats_the_batch_with_fewer_tokens(
    config: TrainConfig, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """g9: a ballast leaves 64 MiB, and a pass of more than 600 tokens asks for more."""
    if REHEARSAL:  # tiles are used on the CPU as well
        monkeypatch.setattr(cuda_head, "runs_on", lambda device, dtype: True)
    undisturbed = train(config)
    ballast: list[torch.Tensor] = []
    greedy = False
    real, real_flow = GradientPasses.backward, cuda_head._Tiles.flow

    def ask() -> None:
        try:
            if REHEARSAL:
                raise torch.OutOfMemoryError("a rehearsal")
            torch.empty(2**29, dtype=torch.uint8, device=DEVICE)
        finally:
            ballast.clear()

    def backward(self: GradientPasses, loss: torch.Tensor, *, last: bool) -> None:
        nonlocal greedy
        greedy = self.policy.max_tokens > 600
        if greedy:
            torch.cuda.empty_cache()
            free = 2**27 if REHEARSAL else torch.cuda.mem_get_info()[0]
            ballast[:] = [torch.empty(max(0, free - 2**26), dtype=torch.uint8, device=DEVICE)]
            if where == "a pass":
                ask()
            if where == "the backward pass":
                loss.register_hook(lambda _: ask())
        real(self, loss, last=last)

    def flow(self: Any, tile: Any) -> torch.Tensor:
        if greedy and where == "the output layer":
            ask()
        return real_flow(self, tile)

    monkeypatch.setattr(GradientPasses, "backward", backward)
    monkeypatch.setattr(cuda_head._Tiles, "flow", flow)
    before = torch.cuda.memory_allocated()
    run = train(replace(config, out=config.out.with_name("disturbed")))
    assert "out of memory: continuing with --max-tokens 512" in capsys.readouterr().out
    assert difference(undisturbed, run) < 1e-4
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
def test_gradient_checkpointing_changes_no_gradient(config: TrainConfig, rank: int) -> None:
    """g11, except for 4-bit weights, which test_quantized.py covers."""
    config = replace(config, lora_rank=rank)
    plain = train(config)
    other = train(replace(config, gradient_checkpointing=True, out=config.out.with_name("checkpointed")))
    assert difference(plain, other) < 1e-4
    norms = [[json.loads(line)["grad_norm"] for line in (run / "metrics.jsonl").read_text().splitlines() if "grad_norm" in line] for run in (plain, other)]  # fmt: skip  # noqa: E501
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)


@pytest.mark.parametrize("exact", [False, True], ids=["as it comes", "full_determinism"])
def test_a_resumed_run_is_near_and_with_full_determinism_equal(
    config: TrainConfig, exact: bool, tmp_path: Path
) -> None:
    """g12; in processes of their own, because cuBLAS reads its setting when it starts."""
    options = ["--config", _yaml(tmp_path, "training: {full_determinism: true}" if exact else "seed: 0")]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = replace(config, save_steps=1)
    done = forks.run(TRAIN, *options_of(config, whole), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    if exact:
        done = forks.run(TRAIN, *options_of(config, stopped), *options)
        assert done.returncode == 0, done.stderr[-3000:]
        (stopped / "model.safetensors").unlink()
        for path in sorted((stopped / "checkpoint-4").iterdir()):
            path.unlink()
        (stopped / "checkpoint-4").rmdir()
    else:
        train_until(replace(config, out=stopped), step=3)
    done = forks.run(TRAIN, *options_of(config, stopped), *options, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(whole, stopped) <= (0.0 if exact else 1e-4)


def test_two_processes_on_one_gpu_sum_their_gradients() -> None:
    """Over gloo, which copies through the host (g13); NCCL refuses two ranks on one device."""
    program = f"DEVICE = {DEVICE.type!r}\n" + """
import torch, torch.distributed as dist
from offline_kto.train.trainer.gradient_sums import Sending, copy_from_first, sum_gradients
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200)).to(DEVICE)
copy_from_first(model)
first = model[0].weight.detach().clone()
dist.broadcast(first, src=0)
assert torch.equal(model[0].weight, first)
for dtype in (torch.float32, torch.bfloat16):
    for number, one in enumerate(model.parameters()):
        one.grad = torch.full_like(one, float(number + dist.get_rank()))
    sum_gradients(list(model.parameters()), Sending(dtype, 100_000))
    for number, one in enumerate(model.parameters()):
        assert torch.equal(one.grad, torch.full_like(one, 2.0 * number + 1)), (dtype, number)
dist.destroy_process_group()
"""
    done = forks.run(program, environment={"CUDA_VISIBLE_DEVICES": "0"}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_optimizers(config: TrainConfig, optim: str) -> None:
    """g14: one update each, near that of the default."""
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = replace(in_bfloat16(config), max_steps=1)
    one = train(config)
    other = train(replace(config, out=config.out.with_name(optim), training={"optim": optim}))
    assert 0 <= difference(one, other) < 3 * config.learning_rate


@two_gpus
def test_two_gpus_equal_one_process(config: TrainConfig, tmp_path: Path) -> None:
    """g16: the same weights, and no memory for buckets beside the model."""
    one = train(config)
    ddp = "torch.nn.parallel.DistributedDataParallel.__init__"
    before = f"import torch\ndef refuse(*_, **__): raise AssertionError('DDP')\n{ddp} = refuse\n"
    done = forks.run(before + TRAIN, *options_of(config, tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(one, tmp_path / "two") < 1e-4


@two_gpus
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("efficient", ["false", "true"])
def test_two_sharded_gpus_equal_one_process(config: TrainConfig, efficient: str, dtype: str, tmp_path: Path) -> None:
    """g17: start check, training and saving under FSDP2."""
    config = config if dtype == "float32" else in_bfloat16(config)
    one = train(config)
    settings = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "ACCELERATE_MIXED_PRECISION": "no",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": efficient,
    }
    done = forks.run(TRAIN, *options_of(config, tmp_path / "two"), environment=settings, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "policy and cache differ by" in done.stdout
    assert difference(one, tmp_path / "two") < (1e-4 if dtype == "float32" else BFLOAT16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two") is not None


def _yaml(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text + "\n")
    return path


def options_of(config: TrainConfig, out: Path) -> list[object]:
    """Of `kto-train`."""
    options: list[object] = ["--cache", config.cache, "--out", out, "--device", config.device, "--dtype", config.dtype]
    options += ["--batch-size", config.batch_size, "--max-steps", config.max_steps, "--max-tokens", config.max_tokens]
    options += ["--learning-rate", config.learning_rate, "--save-steps", config.save_steps]
    return options + ["--allow-different-policy"] * config.allow_different_policy
