"""Gradients of unsharded ranks: sums in pieces of bounded size, over real gloo ranks, without DistributedDataParallel."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from models import save_tiny
from safetensors.torch import load_file

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.plan_warnings import rank_warnings
from offline_kto.train.run.train_run import train

# The parts are as large as the message, larger, just below the size at which one is sent alone, and tiny.
SUM = """
import torch
import torch.distributed as dist
from offline_kto.train.trainer.gradient_sums import GradientSums, Sending
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
    GradientSums(parameters, Sending(dtype, bucket_bytes)).finish()
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


@pytest.mark.slow
def test_every_gradient_is_summed_once() -> None:
    done = forks.run(SUM, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]


EARLY = """
import contextlib, sys
import torch
import torch.distributed as dist
from torch import nn
from offline_kto.train.trainer.gradient_sums import GradientSums, Sending
dist.init_process_group("gloo")
rank, full_in, dtype = dist.get_rank(), sys.argv[1], getattr(torch, sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
unused, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(40))
parameters = [unused, *model.parameters(), late]
sent = []
real = dist.all_reduce
def noted(tensor, **options):
    sent.append(tensor.numel())
    return real(tensor, **options)
dist.all_reduce = noted

def passes(of_rank):
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(of_rank)).split(2)

wanted = [torch.zeros_like(one) for one in parameters[:-1]] + [torch.full_like(late, 2 * 2)]
for inputs in (*passes(0), *passes(1)):
    for whole, part in zip(wanted[1:-1], torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))):
        whole += part

def full(*_):
    raise torch.OutOfMemoryError("simulated")

sums, sent_before = GradientSums(parameters, Sending(dtype, int(sys.argv[3])), unannounced=[late]), None
while True:
    try:
        for number, inputs in enumerate(passes(rank)):
            late.grad = torch.ones_like(late) if late.grad is None else late.grad.add_(1)
            fails = number == 1 and rank == 1 and sent_before is None
            hook = model[int(full_in)].register_full_backward_hook(full) if fails and full_in.isdigit() else None
            loss = model(inputs).square().sum()
            with sums.sent_early() if number == 1 else contextlib.nullcontext():
                if loss.requires_grad:
                    loss.backward()
            if fails and full_in == "after":
                full()
        early = len(sent)
        sums.finish()
        break
    except torch.OutOfMemoryError:
        sent_before = len(sent)
    if hook is not None:
        hook.remove()
    sums.begin_again()
assert early > 0
assert (sent_before is None) == (full_in == "never" or rank == 0)
if sent_before is not None and full_in in ("0", "after"):
    assert sent_before > 0
for one, whole in zip(parameters, wanted):
    assert one.requires_grad
    torch.testing.assert_close(one.grad, whole, **({} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-1)))
counts = [None, None]
dist.all_gather_object(counts, sent)
assert counts[0] == counts[1], counts
dist.destroy_process_group()
"""


@pytest.mark.parametrize("full_in", ["never", "5", "2", "0", "after"])
@pytest.mark.parametrize(("dtype", "bucket_bytes"), [("float32", 500), ("float32", 2**11), ("bfloat16", 100)])
def test_sums_are_sent_early_and_once_by_a_rank_that_runs_out_of_memory(
    full_in: str, dtype: str, bucket_bytes: int
) -> None:
    """In the last pass of rank 1, with nothing, a part or all of it sent. Messages are the same on both ranks."""
    done = forks.run(EARLY, full_in, dtype, bucket_bytes, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]


MEMORY = """
import json, os, resource
import torch
from accelerate import Accelerator
from offline_kto.train.trainer.gradient_sums import GradientSums, Sending, copy_from_first

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
GradientSums(list(model.parameters()), Sending(torch.bfloat16, 8 * 2**20)).finish()
assert all(bool((one.grad == 2).all()) for one in model.parameters())
if accelerator.is_main_process:
    print(json.dumps({"constructed": constructed, "summed": in_use("VmHWM") - before}))
accelerator.end_training()
"""


@pytest.mark.slow
def test_a_rank_needs_no_memory_beside_its_messages() -> None:
    """Sum the gradients of a model of 128 MiB; converted to be sent, they pass through messages of 8 MiB."""
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
    warned = rank_warnings(config, data, ranks=8, device=cuda)
    assert "each of the 8 processes has about" in warned[0]
    assert rank_warnings(replace(config, batch_size=10**5), data, ranks=8, device=cuda) == []
    assert rank_warnings(config, data, ranks=1, device=cuda) == []
    assert rank_warnings(config, data, ranks=8, device=torch.device("cpu")) == []


# The first two attempts at the last pass of rank 1 in update 2 end within the backward pass, and after it.
FULL = """
import os, torch
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.run import run_trainer
from offline_kto.train.trainer.gradient_sums import GradientSums
run_trainer.BUCKET_BYTES = 1000
real, times = GradientPasses.backward, []
def backward(self, loss, *, last):
    if last and os.environ["RANK"] == "1":
        times.append(None)
    if not last or os.environ["RANK"] == "0" or len(times) not in (2, 3):
        return real(self, loss, last=last)
    if len(times) == 2:
        def full(*_):
            raise torch.OutOfMemoryError("simulated")
        layer = next(one for one in self.policy.model.modules() if hasattr(one, "input_layernorm"))
        hook = next(one for one in layer.parameters() if one.requires_grad).register_hook(full)
        try:
            return real(self, loss, last=last)
        finally:
            hook.remove()
    real(self, loss, last=last)
    raise torch.OutOfMemoryError("simulated")
GradientPasses.backward = backward
begin_again = GradientSums.begin_again
def told(self):
    print("sent", self._sent, "of", len(self._messages), flush=True)
    begin_again(self)
GradientSums.begin_again = told
"""


@pytest.mark.parametrize("case", ["all weights", "LoRA", "experts"])
def test_a_rank_that_repeats_its_last_pass_trains_as_one_process(
    config: TrainConfig, case: str, feedback: Path, tmp_path: Path
) -> None:
    """Twice out of memory, after a part of its gradients and after most of them were sent.

    The router loss of experts needs counts of all ranks, which are added up once for each update.
    """
    if case == "experts":
        base = save_tiny(tmp_path / "base", "mixtral", router_aux_loss_coef=0.5)
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
        config = replace(config, cache=tmp_path / "refs")
    config = replace(config, lora_rank=2 if case == "LoRA" else 0)
    one = train(config)
    done = launch(config, tmp_path / "two", "--max-tokens", 450, "--lora-rank", config.lora_rank, before=FULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("out of memory: continuing with") == 2
    first_time, second_time = map(tuple, re.findall(r"sent (\d+) of (\d+)", done.stdout))
    assert 0 < int(first_time[0]) < int(second_time[0]) <= int(second_time[1])
    name = "adapter_model" if config.lora_rank else "model"
    first, second = (load_file(folder / f"{name}.safetensors") for folder in (one, tmp_path / "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 5e-5


def test_a_loss_that_is_not_finite_stops_every_rank(config: TrainConfig, tmp_path: Path) -> None:
    """Each by itself, whether or not its launcher would end it; the rank that has the row names it."""
    before = """
import os
from dataclasses import replace
from offline_kto.train.trainer.gradient_passes import GradientPasses
real = GradientPasses._share
def share(self, rows):
    own, passes = real(self, rows)
    if os.environ["RANK"] == "1":
        own = [replace(one, matched=replace(one.matched, ref_logps=float("nan"))) for one in own]
        print("with", own[0].row_id)
    return own, passes
GradientPasses._share = share
"""
    done = launch(config, tmp_path / "two", before=before)
    assert done.returncode != 0
    row = re.search("with (.+)", done.stdout)
    assert row is not None
    assert f"Error: Step 1: the loss is not finite (row_id {row[1]}" in done.stderr
    assert "Error: Step 1: the gradients are not finite" in done.stderr
    assert not (tmp_path / "two" / "model.safetensors").exists()
