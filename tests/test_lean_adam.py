"""AdamW for 16-bit weights, compared with float32 AdamW over many updates."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offline_kto.kto_core.errors import TrainingError
from offline_kto.train.trainer import lean_adam
from offline_kto.train.trainer.eight_bit_moments import FIRST, SECOND, Format, decode, encode
from offline_kto.train.trainer.host_adam import HostAdamW
from offline_kto.train.trainer.lean_adam import LeanAdamW, round_stochastically

SHAPE = (16, 256)


def gradients(updates: int, seed: int = 0) -> list[Tensor]:
    """Noisy gradients whose sizes differ by a thousand within a row; half of them shrink on the way."""
    random = torch.Generator().manual_seed(seed)
    sizes = 1e-3 * 10 ** torch.empty(SHAPE).uniform_(-3, 0, generator=random)
    drift = 0.5 * torch.randn(SHAPE, generator=random)
    shrinks = torch.where(torch.arange(SHAPE[1]) % 2 == 0, 1.0, 0.03)
    return [
        (drift + torch.randn(SHAPE, generator=random)) * sizes * (shrinks if update > updates // 4 else 1.0)
        for update in range(updates)
    ]


def train(optimizer: Any, dtype: torch.dtype, flow: list[Tensor], **options: Any) -> Tensor:
    """Return how far KTO's steps of 1e-6 move weights of 2e-2."""
    start = (0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))).bfloat16()
    weight = nn.Parameter(start.to(dtype, copy=True))
    updates = optimizer([weight], lr=1e-6, weight_decay=0.0, **options)
    for one in flow:
        weight.grad = one.to(dtype)
        updates.step()
    return weight.detach().float() - start.float()


def along(found: Tensor, wanted: Tensor) -> float:
    return float((found * wanted).sum() / wanted.square().sum())


def test_weights_go_where_float32_brings_them_and_rounding_to_the_nearest_leaves_them() -> None:
    flow = gradients(400)
    wanted = train(torch.optim.AdamW, torch.float32, flow)
    lean = train(LeanAdamW, torch.bfloat16, flow)
    assert 0.95 < along(lean, wanted) < 1.06
    # Blocks of weights average the noise of rounding, as a layer's products do.
    means = [one.view(-1, 64).mean(1) for one in (lean, wanted)]
    assert float(torch.corrcoef(torch.stack(means))[0, 1]) > 0.75
    assert along(train(torch.optim.AdamW, torch.bfloat16, flow), wanted) < 0.05


def test_moments_in_8_bits_follow_those_in_float32() -> None:
    flow = gradients(400)
    wanted = train(torch.optim.AdamW, torch.float32, flow)
    found = train(LeanAdamW, torch.float32, flow)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_steps_are_as_long_as_with_exact_moments() -> None:
    """Noise in a second moment makes 1 / sqrt(v) larger on average, which is corrected."""
    flow = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(update)) + 0.3 for update in range(800)]
    wanted, found = train(torch.optim.AdamW, torch.float32, flow), train(LeanAdamW, torch.float32, flow)
    assert along(found, wanted) == pytest.approx(1.0, abs=0.006)


def test_vectors_are_updated_as_by_adamw() -> None:
    weights = [nn.Parameter(torch.ones(100)) for _ in range(2)]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizers = LeanAdamW(weights[:1], **options), torch.optim.AdamW(weights[1:], **options)
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        grad = torch.randn(100, generator=random)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(*weights)


def test_rounding_keeps_the_mean_and_exact_values() -> None:
    value = 1.0 + 2**-9  # a quarter of the way to the next bfloat16
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for sign in (1, -1):
        found = round_stochastically(torch.full((100_000,), sign * value), bits).float()
        assert {abs(one) for one in found.tolist()} == {1.0, 1.0 + 2**-7}
        assert float(found.mean()) == pytest.approx(sign * value, abs=1e-4)
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, 3e38]).bfloat16().float()
    assert torch.equal(round_stochastically(exact, bits[:6]).float(), exact)


def test_rounding_is_unbiased() -> None:
    """By the random numbers that an update draws: the mean of a million roundings is within four standard errors."""
    count, random = 1_000_000, torch.Generator().manual_seed(0)
    for value in (1.00123, -0.0371234, 3.1e37, 2e-30, 1e-40):
        exact = torch.full((count,), value)
        found = round_stochastically(exact, lean_adam._random_bits(exact, random)).double()
        error = float(found.mean() - exact[0].double()) / float(found.std()) * count**0.5
        assert abs(error) < 4, value


def test_what_is_not_a_number_stays_so() -> None:
    """A GPU's NaN has all bits set: adding to them would make it a zero."""
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int64).to(torch.int32)
    found = round_stochastically(patterns.view(torch.float32), torch.full((5,), 0xFFFF, dtype=torch.int32)).float()
    assert found[:3].isnan().all()
    assert found[3:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("shape", [(), (7,), (0,), (0, 32), (32, 0), (3, 1), (5, 17), (2, 3, 64)])
def test_every_shape_is_updated_and_restored(shape: tuple[int, ...]) -> None:
    weights = [nn.Parameter(torch.ones(shape).bfloat16()) for _ in range(2)]
    first, second = (LeanAdamW([weight], lr=0.1) for weight in weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    first.step()
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.step()
    second.step()
    assert torch.equal(*weights)
    assert (weights[0] < 1).all()


def test_a_weight_that_is_not_contiguous_is_updated_like_its_copy() -> None:
    start = 0.02 * torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(start.bfloat16().t())
    start, optimizer = weight.detach().float(), LeanAdamW([weight], lr=1e-2)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach().float(), start - 1e-2, atol=5e-4, rtol=0)


def test_an_empty_part_has_the_states_of_the_others() -> None:
    """A matrix of few rows on many ranks: a checkpoint of shards needs the same names and types from each."""
    states = []
    for rows in (0, 2):
        weight = nn.Parameter(torch.ones(rows, 64).bfloat16())
        weight.grad = torch.ones_like(weight)
        optimizer = LeanAdamW([weight], lr=0.1)
        optimizer.step()
        states.append({name: one.dtype for name, one in optimizer.state[weight].items()})
    assert states[0] == states[1]


def test_frozen_weights_stay_and_others_are_rounded_as_without_them() -> None:
    """A weight without a gradient still counts, so that random numbers do not depend on what others get."""
    found = []
    for frozen in (True, False):
        weights = [nn.Parameter(torch.ones(SHAPE).bfloat16()) for _ in range(2)]
        optimizer = LeanAdamW(weights, lr=1e-3)
        for weight in weights[frozen:]:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        found.append(weights)
    assert (found[0][0] == 1).all()
    assert torch.equal(found[0][1], found[1][1])


def test_random_numbers_depend_on_seed_rank_update_and_weight() -> None:
    def moved(*, seed: int = 0, rank: int = 0, updates: int = 1, number: int = 0) -> Tensor:
        weights = [nn.Parameter(torch.ones(SHAPE).bfloat16()) for _ in range(2)]
        optimizer = LeanAdamW(weights, lr=1e-3, betas=(0.0, 0.0), seed=seed, rank=rank)
        for _ in range(updates):
            for weight in weights:
                weight.data.fill_(1)
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weights[number].detach()

    state = torch.random.get_rng_state()
    one = moved()
    assert torch.equal(one, moved())
    assert torch.equal(state, torch.random.get_rng_state())
    for other in (moved(seed=1), moved(rank=1), moved(updates=2), moved(number=1)):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("form", [FIRST, SECOND])
def test_a_value_and_its_code(form: Format) -> None:
    values = torch.logspace(-6, 0, 256)[None].repeat(2, 1)
    values[1] = 0.0
    if form is FIRST:
        values[0, ::2] *= -1
    codes, scale = encode(values, form, None)
    assert codes.dtype == form.dtype
    assert torch.equal(scale, torch.tensor([[1.0], [0.0]]))
    found = decode(codes, scale, form)
    assert torch.equal(found[1], torch.zeros(256))
    large = values[0].abs() > 1e-3
    torch.testing.assert_close(found[0][large], values[0][large], rtol=0.2, atol=0)
    torch.testing.assert_close(found[0], values[0], rtol=0, atol=0.02)


def test_rounded_codes_keep_the_mean() -> None:
    values = torch.logspace(-6, 0, 64)[None]
    noise = torch.rand((4000, 64), generator=torch.Generator().manual_seed(0))
    codes, scale = encode(values.repeat(4000, 1), SECOND, noise)
    torch.testing.assert_close(decode(codes, scale, SECOND).mean(0), values[0], rtol=0.03, atol=0)


def test_a_restored_optimizer_continues_bit_for_bit() -> None:
    flow = gradients(6)
    weights = [nn.Parameter(torch.ones(SHAPE).bfloat16()) for _ in range(2)]
    first, second = (LeanAdamW([weight], lr=1e-3) for weight in weights)
    for one in flow[:3]:
        weights[0].grad = one.bfloat16()
        first.step()
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[weights[1]]["exp_avg"].dtype == torch.int8
    for one in flow[3:]:
        for weight, optimizer in zip(weights, (first, second), strict=True):
            weight.grad = one.bfloat16()
            optimizer.step()
    assert torch.equal(*weights)


def test_two_bytes_a_weight() -> None:
    weight = nn.Parameter(torch.zeros(64, 512).bfloat16())
    weight.grad = torch.ones_like(weight)
    optimizer = LeanAdamW([weight], lr=1e-3)
    optimizer.step()
    held = sum(one.numel() * one.element_size() for one in optimizer.state[weight].values())
    assert 2.0 < held / weight.numel() < 2.05


def test_on_the_host_nothing_is_lost() -> None:
    """The 16-bit weight is the rounded float32 weight of AdamW, which would not have moved alone."""
    start, flow = (0.02 * torch.randn(SHAPE)).bfloat16(), [one.bfloat16() for one in gradients(50)]
    wide, narrow = nn.Parameter(start.float()), nn.Parameter(start.clone())
    optimizers = torch.optim.AdamW([wide], lr=1e-6, weight_decay=0.1), HostAdamW([narrow], lr=1e-6, weight_decay=0.1)
    for one in flow:
        for weight, optimizer in zip((wide, narrow), optimizers, strict=True):
            weight.grad = one.to(weight.dtype)
            optimizer.step()
    torch.testing.assert_close(optimizers[1].state[narrow]["weight"], wide.detach(), rtol=1e-6, atol=1e-9)
    assert torch.equal(narrow, optimizers[1].state[narrow]["weight"].bfloat16())
    assert not torch.equal(wide.detach(), start.float())


@pytest.mark.slow
def test_the_kernel_of_a_gpu_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile builds it here for the CPU. Products may be fused, so that a code or two round the other way."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    flow, weights = gradients(5), [nn.Parameter((0.02 * torch.randn(SHAPE)).bfloat16())]
    weights.append(nn.Parameter(weights[0].detach().clone()))
    for weight, update in zip(weights, (lean_adam.update_blocks, lean_adam._compiled()), strict=True):
        monkeypatch.setattr(lean_adam, "compiled_update", lambda device, update=update: update)
        optimizer = LeanAdamW([weight], lr=1e-4)
        for one in flow:
            weight.grad = one.bfloat16()
            optimizer.step()
    assert float((weights[0] != weights[1]).float().mean()) < 0.01


def test_a_kernel_that_cannot_be_built_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

        return call

    lean_adam._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(TrainingError, match=r"Install gcc, or set TORCH_COMPILE_DISABLE=1"):
        lean_adam.compiled_update(torch.device("cuda"))()
    lean_adam._compiled.cache_clear()
