"""The budget that is measured at the start, on a simulated device: memory is what a row takes, times rows."""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file

from offline_kto.kto_core.scoring.packing_check import Packing
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.memory import optimizer_bytes, tokens_that_fit

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

    def train(self, rows):
        self.trials.append(rows)
        self.in_use = self.weights + self.gradients
        self.peak = self.in_use + rows * self.per_row
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
    assert device.trials == [1, 1, 2]


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
    assert optimizer_bytes(model, sharded_over=2) == (400 if trained else 0)


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

    monkeypatch.setattr("offline_kto.train.run.training_run.meter_of", lambda device: RowCounter())
    monkeypatch.setattr("offline_kto.train.trainer.gradient_passes.optimizer_bytes", lambda model, sharded_over: 0)
    monkeypatch.setattr(GradientPasses, "try_rows", trial)
    measured = train(replace(config, out=tmp_path / "b"))
    longest = json.loads((cache / "manifest.json").read_text())["tokenization"]["max_length"]
    assert f"--max-tokens {longest * max(1, int(0.85 * 3000) // longest)} (measured)" in capsys.readouterr().out
    for name, value in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(load_file(measured / "model.safetensors")[name], value, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packs", [True, False])
def test_packing_changes_no_result(cache, tmp_path, monkeypatch, packs):
    """As on a GPU with flash attention: rows in one line, for z0 and for the gradients. A model that sees across them pads."""
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
