"""Gradients of unsharded ranks: sums in pieces of bounded size, over real gloo ranks, without DistributedDataParallel."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file

from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.run.training_run import _rank_warnings

# The parts are as large as the message, larger, just below the size at which one is sent alone, and tiny.
SUM = """
import torch
import torch.distributed as dist
from offline_kto.train.trainer.gradient_sums import Sending, sum_gradients
dist.init_process_group("gloo")
rank = dist.get_rank()
shapes = [(3,), (256,), (16, 70), (7, 9), (), (60,), (5, 5), (1000,), (2,)]
def check(dtype, bucket_bytes):
    dtypes = [torch.bfloat16 if i == 6 else torch.float32 for i in range(len(shapes))]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=one)) for shape, one in zip(shapes, dtypes)]
    parameters += [torch.nn.Parameter(torch.zeros(8, 4).T)]  # its gradient is not contiguous
    for i, one in enumerate(parameters):
        if (i + rank) % 4:  # some ranks have no gradient of it
            one.grad = (torch.arange(one.numel(), dtype=torch.float32).view(one.shape) + rank * i).to(one.dtype)
    parameters[-1].grad = torch.full((8, 4), float(rank)).T
    sum_gradients(parameters, Sending(dtype, bucket_bytes))
    for i, one in enumerate(parameters[:-1]):
        whole = torch.arange(one.numel(), dtype=torch.float32).view(one.shape)
        expected = sum(whole + r * i for r in range(2) if (i + r) % 4)
        rounding = 2**-7 if torch.bfloat16 in (dtype, one.dtype) else 0
        assert one.grad.dtype == one.dtype and one.grad.shape == one.shape
        torch.testing.assert_close(one.grad.float(), expected + torch.zeros(one.shape), rtol=rounding, atol=0)
    assert torch.equal(parameters[-1].grad, torch.ones(4, 8))
for dtype in (torch.float32, torch.bfloat16):
    for bucket_bytes in (1, 1000, 2**26):
        try:
            check(dtype, bucket_bytes)
        except AssertionError as error:
            raise AssertionError(f"{dtype}, {bucket_bytes} bytes in a message") from error
dist.destroy_process_group()
"""


def test_every_gradient_is_summed_once() -> None:
    done = forks.run(SUM, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]


MEMORY = """
import json, os, resource
import torch
from accelerate import Accelerator
from offline_kto.train.trainer.gradient_sums import Sending, copy_from_first, sum_gradients

def in_use(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024  # MiB

model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(32)])
accelerator = Accelerator(cpu=True)
before = in_use("VmData")
if os.environ["WITH_DDP"]:
    prepared = torch.nn.parallel.DistributedDataParallel(model)
else:
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert prepared is model
    copy_from_first(model)
constructed = in_use("VmData") - before
for one in model.parameters():
    one.grad = torch.ones_like(one)
before, _ = in_use("VmRSS"), open("/proc/self/clear_refs", "w").write("5")
sum_gradients(list(model.parameters()), Sending(torch.bfloat16, 8 * 2**20))
assert all(bool((one.grad == 2).all()) for one in model.parameters())
if accelerator.is_main_process:
    print(json.dumps({"constructed": constructed, "summed": in_use("VmHWM") - before}))
accelerator.end_training()
"""


@pytest.mark.slow
def test_a_rank_needs_no_memory_beside_its_messages() -> None:
    """Of a model of 128 MiB; gradients, converted to be sent, pass through messages of 8 MiB."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "WITH_DDP": ""}
    done = forks.run(MEMORY, environment=settings, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["constructed"] < 48
    assert found["summed"] < 48
    done = forks.run(MEMORY, environment={**settings, "WITH_DDP": "1"}, ranks=2)  # what was saved
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["constructed"] > 100


def launch(config: TrainConfig, out: Path, *options: object, before: str = "") -> "subprocess.CompletedProcess[str]":
    arguments = ["--cache", config.cache, "--out", out, "--device", "cpu", "--save-steps", 0]
    arguments += ["--batch-size", config.batch_size, "--max-steps", config.max_steps]
    arguments += ["--learning-rate", config.learning_rate, *options]
    return forks.run(before + "from offline_kto.train.cli import train; train()", *arguments, ranks=2)


def largest_difference(one: Path, other: Path) -> float:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache, out=tmp_path / "one", batch_size=8, max_steps=4, learning_rate=3e-3, save_steps=0, device="cpu"
    )


@pytest.mark.slow
def test_ranks_start_from_the_first_ones_weights_and_without_ddp(config: TrainConfig, tmp_path: Path) -> None:
    """Rank 1 read other weights, as from a folder that changed in between."""
    before = """
import os, torch
from offline_kto.train.model.policy import PolicyFiles
def refuse(*_, **__):
    raise AssertionError("wrapped in DistributedDataParallel")
torch.nn.parallel.DistributedDataParallel.__init__ = refuse
real = PolicyFiles.load
def load(self, *arguments):
    model = real(self, *arguments)
    if os.environ["RANK"] == "1":
        with torch.no_grad():
            for one in model.parameters():
                one.mul_(1.5)
    return model
PolicyFiles.load = load
"""
    done = launch(config, tmp_path / "two", before=before)
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(train(config), tmp_path / "two") < 2e-5


@pytest.mark.slow
def test_sums_in_bfloat16_are_near(config: TrainConfig, tmp_path: Path) -> None:
    done = launch(config, tmp_path / "two", "--reduce-dtype", "bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    one = train(config)
    start = load_file(
        train(replace(config, max_steps=1, learning_rate=1e-30, out=tmp_path / "start")) / "model.safetensors"
    )
    moved = max(float((load_file(one / "model.safetensors")[n] - start[n]).abs().max()) for n in start)
    assert 1e-6 < largest_difference(one, tmp_path / "two") < moved


def test_few_tokens_on_many_gpus_are_warned_of(config: TrainConfig) -> None:
    from offline_kto.train.data.training_data import TrainingData

    data, cuda = TrainingData.open(config), torch.device("cuda")
    warned = _rank_warnings(config, data, ranks=8, device=cuda)
    assert "each of the 8 processes has about" in warned[0]
    assert _rank_warnings(replace(config, batch_size=10**5), data, ranks=8, device=cuda) == []
    assert _rank_warnings(config, data, ranks=1, device=cuda) == []
    assert _rank_warnings(config, data, ranks=8, device=torch.device("cpu")) == []
