"""The output layer on a CUDA device: with Triton's compiler, and with products of 16-bit numbers in float32.

`test_cuda_head.py` tests the same on a CPU, where Triton is interpreted and such products are computed in float32.
"""

import importlib.util

import pytest
import torch
from gpus import DEVICE, MARKS, REHEARSAL, card_only, two_gpus
from heads import (
    HEADS,
    as_dtype,
    assert_as_accurate_as_naive,
    assert_logits_are_float32,
    assert_naive_values_and_gradients,
    assert_weight_gradient_is_added_in_float32,
    make_head,
    make_inputs,
    values_and_gradients,
)
from models import random_rows, tiny_model

from offline_kto.kto_core.scoring import cuda_head
from offline_kto.kto_core.scoring.head import Head, selected_logps
from offline_kto.kto_core.scoring.head_tiles import PLAIN
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences

pytestmark = MARKS
TOKENS, COLUMNS, VOCABULARY, HIDDEN = 64, 256, 1003, 64  # 1003: the last tile is narrower, and its rows are odd


@pytest.fixture(autouse=True)
def rehearsed_tiles(monkeypatch):
    """In a rehearsal tiles are used on the CPU as well."""
    if REHEARSAL:
        monkeypatch.setattr(cuda_head, "runs_on", lambda device, dtype: True)


@pytest.fixture(params=["plain", pytest.param("triton", marks=card_only)])
def implementation(request, monkeypatch):
    """Small tiles, whose operations are in plain torch or in Triton."""
    monkeypatch.setattr(cuda_head, "TILE_TOKENS", TOKENS)
    monkeypatch.setattr(cuda_head, "TILE_COLUMNS", COLUMNS)
    if request.param == "plain":
        monkeypatch.setattr(cuda_head, "_best_operations", lambda device: PLAIN)
    elif importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def case(kind, tokens, dtype=torch.float64):
    """Weights of a size that logits reach 20, as those of trained models do."""
    head = as_dtype(make_head(kind, vocabulary=VOCABULARY, hidden_size=HIDDEN), dtype, DEVICE)
    hidden, targets = make_inputs(tokens, vocabulary=VOCABULARY, hidden_size=HIDDEN)
    targets[:1], targets[1:2] = VOCABULARY - 1, 0
    return head, hidden.detach().to(DEVICE, dtype).requires_grad_(), targets.to(DEVICE)


@card_only
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_works_here():
    """Otherwise every other test would pass without it."""
    from offline_kto.kto_core.scoring.head_tiles_triton import TRITON

    assert cuda_head._best_operations(torch.device("cuda", torch.cuda.current_device())) is TRITON


def test_tiles_are_used_for_every_dtype_of_models():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert cuda_head.runs_on(DEVICE, dtype), f"{dtype}, torch {torch.__version__}"


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("tokens", [1, TOKENS - 1, TOKENS, TOKENS + 1, 3 * TOKENS])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_the_naive_way_in_float64(kind, tokens):
    head, hidden, targets = case(kind, tokens)
    assert_naive_values_and_gradients(selected_logps, head, hidden, targets, tolerance=1e-10)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("kind", HEADS)
def test_float32_is_as_accurate_as_the_naive_way(kind):
    head, hidden, targets = case(kind, 3 * TOKENS + 1)
    assert_as_accurate_as_naive(selected_logps, head, hidden, targets, floor=1e-5)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_of_16_bit_operands_are_not_rounded_to_16_bits(kind, dtype):
    head, hidden, targets = case(kind, 3 * TOKENS + 1, dtype)
    assert_logits_are_float32(selected_logps, head, hidden, targets, tolerance=5e-5)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_weight_s_gradient_over_many_tiles_is_added_in_float32(dtype, in_place):
    head, hidden, targets = case("plain", 1, dtype)

    def narrow(*inputs):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return selected_logps(*inputs)

    assert_weight_gradient_is_added_in_float32(narrow, head, hidden, targets, times=300 * TOKENS, in_place=in_place)


@pytest.mark.usefixtures("implementation")
def test_what_is_frozen_gets_no_gradient_and_a_second_backward_pass_gives_the_same():
    head, hidden, targets = case("all", 3 * TOKENS, torch.bfloat16)
    everything = values_and_gradients(selected_logps, hidden, targets, head)
    head.weight.requires_grad_(False)
    head.bias.requires_grad_(False)
    values = selected_logps(hidden, targets, head)
    weights = torch.linspace(-1, 2, len(values), device=DEVICE)
    for _ in range(2):
        (found,) = torch.autograd.grad(values, hidden, weights, retain_graph=True)
        assert torch.equal(found, everything[1])
    with torch.no_grad():
        assert torch.equal(selected_logps(hidden, targets, head), everything[0])


@pytest.mark.usefixtures("implementation")
def test_no_tokens_give_no_scores():
    head, hidden, targets = case("bias", 0, torch.bfloat16)
    values, *gradients = values_and_gradients(selected_logps, hidden, targets, head)
    assert values.shape == (0,)
    assert all(not g.any() for g in gradients)


@pytest.mark.usefixtures("implementation")
@card_only
@two_gpus
def test_the_output_layer_may_be_on_another_device_than_the_current_one():
    head, hidden, targets = case("all", TOKENS + 1)
    far = as_dtype(head, torch.float64, "cuda:1")
    ours = values_and_gradients(selected_logps, hidden.to("cuda:1"), targets.to("cuda:1"), far)
    for mine, here in zip(ours, values_and_gradients(selected_logps, hidden, targets, head), strict=True):
        torch.testing.assert_close(mine.to(DEVICE), here)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_models_score_as_on_a_cpu(family):
    batch, scores = pad_sequences(random_rows(3)), []
    for device in (torch.device("cpu"), DEVICE):
        model = tiny_model(family).to(device)
        add_scoring_forward(model)
        with torch.no_grad():
            scores.append(token_logps(model, batch.to(device)).token_logps.cpu())
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def test_a_vocabulary_of_152k_in_bfloat16():
    """Qwen2.5-0.5B's head under autocast: scores and gradients of slices against float64, and the memory."""
    tokens, vocabulary, size = (300, 1003, 32) if REHEARSAL else (5000, 151_936, 896)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(vocabulary, size, device=DEVICE, generator=generator) * (3 * size**-0.5)
    hidden = torch.randn(tokens, size, device=DEVICE, generator=generator).bfloat16().float().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE, generator=generator)
    weight = weight.bfloat16().float().requires_grad_()  # what autocast casts is exact
    weight.grad = torch.zeros_like(weight)
    grad = torch.randn(tokens, device=DEVICE, generator=generator)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logps = selected_logps(hidden, targets, Head(weight, None, 1.0, None, weight.grad))
    logps.backward(grad)
    assert torch.cuda.max_memory_allocated() - before < 2**30  # all logits in float32 would be 2.8 GiB

    exact, logsumexp = [], []
    with torch.no_grad():
        for part in torch.arange(tokens, device=DEVICE).split(250):
            logits = hidden[part].double() @ weight.double().T
            logsumexp.append(logits.logsumexp(1))
            exact.append(logits.gather(1, targets[part, None])[:, 0] - logsumexp[-1])
            if part[0] == 0:
                flow = -grad[part, None].double() * logits.softmax(1)
                flow.scatter_add_(1, targets[part, None], grad[part, None].double())
                grad_hidden = flow @ weight.double()
        torch.testing.assert_close(logps, torch.cat(exact).float(), rtol=0, atol=5e-5)
        assert (hidden.grad[:250] - grad_hidden).abs().max() <= 0.01 * grad_hidden.abs().max()
        columns = torch.cat([targets[:50], torch.arange(vocabulary - 50, vocabulary, device=DEVICE)])
        logits = hidden.double() @ weight[columns].double().T
        flow = (targets[:, None] == columns).double() - (logits - torch.cat(logsumexp)[:, None]).exp()
        expected = (flow * grad[:, None].double()).T @ hidden.double()
        assert (weight.grad[columns] - expected).abs().max() <= 0.01 * expected.abs().max()
