"""The budget that is measured at the start, on a simulated device: memory is what a row takes, times rows."""

import json
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from offline_kto.kto_core.out_of_memory import one_memory_error
from offline_kto.kto_core.runtime import use_expandable_segments
from offline_kto.kto_core.scoring.packing_check import Packing
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.checkpointing import is_checkpointing
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.lean_adam import LeanAdamW
from offline_kto.train.trainer.memory import CudaMeter, optimizer_bytes, state_bytes, tokens_that_fit
from offline_kto.train.trainer.policy_scores import PolicyScores

GIB = 2**30


@dataclass
class SimulatedDevice:
    """Weights and gradients stay, activations come and go; the allocator refuses what does not fit."""

    total: int
    weights: int
    gradients: int
    per_row: int
    in_use: int = field(init=False)
    trials: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.in_use = self.weights
        self.peak = 0

    def used(self):
        return self.in_use

    def available(self):
        return self.total - self.in_use

    def peak_of(self, work):
        self.peak = self.in_use
        work()
        return self.peak

    def needed(self, rows):
        return rows * self.per_row

    def train(self, rows):
        self.trials.append(rows)
        self.in_use = self.weights + self.gradients
        self.peak = self.in_use + self.needed(rows)
        if self.peak > self.total:
            raise torch.OutOfMemoryError("simulated")


def budget(device, *, row=1000, reserve=0):
    return tokens_that_fit(device, device.train, row=row, reserve=reserve)


def test_the_budget_fills_the_device_and_no_more():
    device = SimulatedDevice(total=80 * GIB, weights=6 * GIB, gradients=6 * GIB, per_row=2 * GIB)
    reserve = 12 * GIB
    rows = budget(device, reserve=reserve) // 1000
    needed = 12 * GIB + reserve + rows * 2 * GIB
    assert needed <= 0.85 * 80 * GIB < needed + 2 * GIB


def test_trials_are_small():
    device = SimulatedDevice(total=80 * GIB, weights=GIB, gradients=GIB, per_row=GIB)
    budget(device)
    assert device.trials == [1, 1, 2, 65]


def test_another_moment_of_the_pass_may_be_the_highest_with_many_rows():
    """With checkpointing: few rows peak where the gradient of the embedding is made, many where a layer is repeated."""

    class Device(SimulatedDevice):
        def needed(self, rows):
            return max(8 * GIB + 2 * rows * GIB, 2 * GIB + rows * 2.2 * GIB)

    device = Device(total=80 * GIB, weights=GIB, gradients=GIB, per_row=GIB)
    rows = budget(device) // 1000
    assert device.needed(rows) <= 0.85 * 80 * GIB - 2 * GIB < device.needed(rows + 1)
    assert device.trials == [1, 1, 2, 29]


def test_a_trial_that_does_not_fit_is_repeated_with_half_the_rows():
    class Device(SimulatedDevice):
        def needed(self, rows):
            return rows * GIB if rows <= 2 else rows * 3 * GIB

    device = Device(total=80 * GIB, weights=GIB, gradients=GIB, per_row=GIB)
    assert budget(device) <= 22_000
    assert device.trials == [1, 1, 2, 65, 32, 16]


def test_a_device_too_small_for_two_rows_gets_one():
    device = SimulatedDevice(total=8 * GIB, weights=2 * GIB, gradients=2 * GIB, per_row=3 * GIB)
    assert budget(device) == 1000


def test_where_ranks_wait_for_each_other_a_failed_trial_stops_them_all():
    device = SimulatedDevice(total=8 * GIB, weights=2 * GIB, gradients=2 * GIB, per_row=3 * GIB)
    with pytest.raises(torch.OutOfMemoryError):
        tokens_that_fit(device, device.train, row=1000, reserve=0, alone=False)


def test_no_room_beside_the_optimizer_gives_one_row():
    device = SimulatedDevice(total=24 * GIB, weights=6 * GIB, gradients=6 * GIB, per_row=GIB)
    assert budget(device, reserve=12 * GIB) == 1000


def test_a_large_device_is_not_filled_for_nothing():
    device = SimulatedDevice(total=80 * GIB, weights=2**20, gradients=2**20, per_row=2**20)
    assert budget(device, row=512) == 65_536


@pytest.mark.parametrize("trained", [True, False])
def test_moments_exist_for_trained_weights_only(trained):
    model = torch.nn.Linear(10, 10, bias=False).requires_grad_(trained)
    assert optimizer_bytes(model, sharded_over=2, of_matrix=lambda dtype: 8) == (400 if trained else 0)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch", 8), ("sgd", 0), ("adagrad", 4), ("rmsprop", 4), ("adafactor", 0.03), ("lean", 2.03)],
)
def test_the_optimizer_that_is_used_is_counted(optim, bytes_each, tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), optim=optim if optim != "lean" else "sgd")
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    if optim == "lean":
        kind, options = LeanAdamW, {"lr": 1e-6}
    dtype = torch.bfloat16 if optim == "lean" else torch.float32
    found = state_bytes(kind, options, torch.device("cpu"), dtype)
    assert found == pytest.approx(bytes_each, abs=0.005)


def test_an_optimizer_that_cannot_be_measured_counts_two_moments():
    assert state_bytes(torch.optim.LBFGS, {}, torch.device("cpu"), torch.float32) == 8


def test_a_worker_measures_its_share_of_the_card(monkeypatch):
    """Two workers that begin at the same time would both see the whole card free."""
    fakes = {
        "mem_get_info": lambda device: (70, 80),
        "memory_reserved": lambda device: 5,
        "memory_allocated": lambda device: 2,
        "get_per_process_memory_fraction": lambda device: 0.5,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    meter = CudaMeter(torch.device("cuda"))
    assert meter.available() == 40 - 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))  # another program has the rest
    assert meter.available() == 10 + 5 - 2


class RowCounter:
    """A meter on a CPU: memory is the padded tokens that the model is called with."""

    def used(self):
        return 0

    def available(self):
        return 3000

    def peak_of(self, work):
        work()
        return RowCounter.last


def test_auto_measures_with_the_model_itself_and_leaves_no_trace(cache, tmp_path, monkeypatch, capsys):
    """The trial runs through the trainer's own passes; what it leaves behind would end up in the first update."""
    config = TrainConfig(cache=cache, out=tmp_path / "a", batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=0)
    expected = train(config)
    real = GradientPasses.try_rows

    def trial(self, rows, length):
        real(self, rows, length)
        RowCounter.last = rows * length
        assert any(p.grad is not None for p in self.policy.model.parameters())

    monkeypatch.setattr("offline_kto.train.run.run_trainer.meter_of", lambda device: RowCounter())
    monkeypatch.setattr("offline_kto.train.trainer.gradient_passes.optimizer_bytes", lambda model, **_: 0)
    monkeypatch.setattr(GradientPasses, "try_rows", trial)
    measured = train(replace(config, out=tmp_path / "b"))
    longest = json.loads((cache / "manifest.json").read_text())["tokenization"]["max_length"]
    assert f"--max-tokens {longest * max(1, int(0.85 * 3000) // longest)} (measured)" in capsys.readouterr().out
    for name, value in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(load_file(measured / "model.safetensors")[name], value, atol=2e-5, rtol=0)


def test_states_of_a_checkpoint_are_not_counted_twice(cache, tmp_path, monkeypatch):
    """They are on the device before a resumed run measures what is free."""
    counted = []

    def optimizer_bytes(model, *, sharded_over, of_matrix):
        counted.append(round(of_matrix(torch.float32)))
        return 0

    def trial(self, rows, length):
        RowCounter.last = rows * length

    monkeypatch.setattr("offline_kto.train.run.run_trainer.meter_of", lambda device: RowCounter())
    monkeypatch.setattr("offline_kto.train.trainer.gradient_passes.optimizer_bytes", optimizer_bytes)
    monkeypatch.setattr(GradientPasses, "try_rows", trial)
    monkeypatch.setattr(GradientPasses, "score_rows", trial)
    config = TrainConfig(cache=cache, out=tmp_path / "a", batch_size=8, max_steps=1, save_steps=1, device="cpu")
    train(config)
    train(replace(config, max_steps=2, resume=True))
    assert set(counted[: len(counted) // 2]) == {8}
    assert set(counted[len(counted) // 2 :]) == {0}


class CheckpointingDevice:
    """A meter on a CPU: a token takes 20 bytes, 2 of them with gradient checkpointing, 1 without gradients."""

    tokens = 0
    each = 20

    def used(self):
        return 0

    def available(self):
        return 60_000

    def peak_of(self, work):
        work()
        return CheckpointingDevice.tokens * CheckpointingDevice.each


@pytest.mark.parametrize("asked", [None, False])
def test_few_tokens_switch_checkpointing_on_unless_it_was_decided(cache, tmp_path, monkeypatch, capsys, asked):
    real, real_scoring = GradientPasses.try_rows, GradientPasses.score_rows
    device = CheckpointingDevice

    def trial(self, rows, length):
        real(self, rows, length)
        device.tokens, device.each = rows * length, 2 if is_checkpointing(self.policy.model) else 20

    def scoring(self, rows, length):
        real_scoring(self, rows, length)
        device.tokens, device.each = rows * length, 1

    budgets = []
    passes = PolicyScores._scoring

    def noted(self):
        found = passes(self)
        budgets.append((self.policy.max_tokens, found.max_tokens))
        return found

    monkeypatch.setattr("offline_kto.train.run.run_trainer.meter_of", lambda _: device())
    monkeypatch.setattr("offline_kto.train.trainer.gradient_passes.optimizer_bytes", lambda model, **_: 0)
    monkeypatch.setattr(GradientPasses, "try_rows", trial)
    monkeypatch.setattr(GradientPasses, "score_rows", scoring)
    monkeypatch.setattr(PolicyScores, "_scoring", noted)
    options = {"batch_size": 8, "max_steps": 1, "learning_rate": 3e-3, "save_steps": 0}
    train(TrainConfig(cache=cache, out=tmp_path / "a", gradient_checkpointing=asked, **options))
    said = "with gradient checkpointing" in capsys.readouterr().out
    assert said == (asked is None)
    tokens, scoring_tokens = budgets[-1]
    assert (tokens > 20_000) == (asked is None)
    # Four times the tokens without gradients, but no more than fit.
    assert scoring_tokens == pytest.approx(0.85 * 60_000 if asked is None else 4 * tokens, rel=0.02)


@pytest.mark.parametrize("packs", [True, False])
def test_packing_changes_no_result(cache, tmp_path, monkeypatch, packs):
    """Concatenate rows as flash attention on a GPU does, for z0 and for gradients. A model that sees across them pads."""
    config = TrainConfig(cache=cache, out=tmp_path / "a", batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=0)
    expected = train(config)
    used = []
    real = GradientPasses.run

    def run(self, *arguments, **options):
        used.append(self.policy.packs)
        return real(self, *arguments, **options)

    monkeypatch.setattr("offline_kto.train.trainer.prepared_policy.can_pack", lambda model, device: True)
    monkeypatch.setattr(GradientPasses, "run", run)
    if not packs:
        leaks = Packing(moved=0.1, moved_apart=0.0, differs=0.0)
        monkeypatch.setattr("offline_kto.train.trainer.prepared_policy.measure_packing", lambda *a, **k: leaks)
    packed = train(replace(config, out=tmp_path / "b"))
    assert set(used) == {packs}
    for name, value in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(load_file(packed / "model.safetensors")[name], value, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_decided(monkeypatch, name):
    for one in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(one, raising=False)
    use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    del os.environ["PYTORCH_ALLOC_CONF"]
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    use_expandable_segments()
    assert [one for one in os.environ if one.endswith("ALLOC_CONF")] == [name]


@pytest.mark.parametrize("said", ["CUDA error: out of memory\nmore", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_every_out_of_memory_halves_the_budget(cache, tmp_path, monkeypatch, capsys, said):
    """cuBLAS and the driver allocate beside torch, and have errors of their own."""
    real, failed = GradientPasses._run, []

    def run(self, *arguments, **options):
        if not failed:
            failed.append(True)
            raise RuntimeError(said)
        return real(self, *arguments, **options)

    monkeypatch.setattr(GradientPasses, "_run", run)
    config = TrainConfig(cache=cache, out=tmp_path / "a", batch_size=8, max_steps=1, learning_rate=3e-3, save_steps=0)
    train(config)
    assert "out of memory: continuing with --max-tokens 512" in capsys.readouterr().out


def test_other_errors_are_not_out_of_memory():
    with pytest.raises(RuntimeError, match="device-side assert") as caught, one_memory_error():
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert not isinstance(caught.value, torch.OutOfMemoryError)
