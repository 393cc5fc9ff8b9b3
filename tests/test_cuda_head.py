"""The output layer for CUDA, on CPU tensors: tiles of a few numbers, the operations in plain torch and in Triton.

Triton's interpreter must be chosen before Triton is imported. `test_these_in_triton_s_interpreter` therefore runs this
file again, in a process of its own.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heads import (
    HEADS,
    LargestTensor,
    as_dtype,
    assert_as_accurate_as_naive,
    assert_logits_are_float32,
    assert_naive_values_and_gradients,
    assert_weight_gradient_is_added_in_float32,
    make_head,
    make_inputs,
    naive_selected_logps,
    values_and_gradients,
)
from models import random_rows, tiny_model

from offline_kto.kto_core.scoring import cuda_head
from offline_kto.kto_core.scoring.cuda_head import tiled_logps
from offline_kto.kto_core.scoring.head import selected_logps
from offline_kto.kto_core.scoring.head_tiles import PLAIN, Normalizer, Tile, TileOperations
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.output_layer import Head, add_gradients_in_place
from offline_kto.kto_core.scoring.sequences import pad_sequences

# In the interpreter, numpy warns of what is computed from uninitialised memory between rows, and then left out.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[1]
TOKENS, COLUMNS, VOCABULARY = 4, 16, 43  # the last tile has 11 columns: one block and three columns of another


def the_operations():
    if not INTERPRETED:
        return PLAIN
    from offline_kto.kto_core.scoring import head_tiles_triton

    head_tiles_triton.BLOCK = 8
    return head_tiles_triton.TRITON


OPERATIONS = the_operations()
only_once = pytest.mark.skipif(INTERPRETED, reason="does not depend on the operations")
# Triton is not imported here: in this process, it would not be interpreted.
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(cuda_head, "TILE_TOKENS", TOKENS)
    monkeypatch.setattr(cuda_head, "TILE_COLUMNS", COLUMNS)


def tiled(hidden, targets, head, *, dtype=None, operations=OPERATIONS):
    return tiled_logps(hidden, targets, head, dtype=dtype or head.weight.dtype, operations=operations)


def case(kind, tokens, dtype=torch.float64):
    """A head and its inputs; targets in the first and the last column too."""
    head = make_head(kind, vocabulary=VOCABULARY)
    hidden, targets = make_inputs(tokens, vocabulary=VOCABULARY)
    targets[:1], targets[1:2] = VOCABULARY - 1, 0
    return as_dtype(head, dtype), hidden.detach().to(dtype).requires_grad_(), targets


@only_once
@needs_triton
@pytest.mark.parametrize(
    ("which", "passed"),
    [
        pytest.param(
            "in_float64 and (plain-5 or all-5) or second_backward", "4 passed", id="few", marks=pytest.mark.slow
        ),
        pytest.param("", r"[23]\d passed", id="all", marks=pytest.mark.slow),
    ],
)
def test_these_in_triton_s_interpreter(which, passed, tmp_path):
    options = ["-p", "no:cacheprovider", "-x", "-rs", "--basetemp", tmp_path / "t", "-k", which]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(passed, run.stdout)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        *((kind, tokens) for kind in ("plain", "all") for tokens in (1, TOKENS - 1, TOKENS, 3 * TOKENS)),
        *((kind, TOKENS + 1) for kind in HEADS),
    ],
)
def test_values_and_gradients_are_those_of_the_naive_way_in_float64(kind, tokens):
    head, hidden, targets = case(kind, tokens)
    assert_naive_values_and_gradients(tiled, head, hidden, targets, tolerance=1e-11)


@pytest.mark.parametrize("kind", HEADS)
def test_float32_is_as_accurate_as_the_naive_way(kind):
    head, hidden, targets = case(kind, 9)
    assert_as_accurate_as_naive(tiled, head, hidden, targets, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_logits_of_16_bit_operands_are_not_rounded_to_16_bits(kind, dtype):
    head, hidden, targets = case(kind, 9, dtype)
    assert_logits_are_float32(tiled, head, hidden, targets, tolerance=3e-6)


@only_once
def test_float32_weights_multiply_in_the_dtype_of_autocast():
    head, hidden, targets = case("all", 9, torch.float32)
    ours = values_and_gradients(lambda *inputs: tiled(*inputs, dtype=torch.bfloat16), hidden, targets, head)
    rounded = Head(head.weight.bfloat16().double(), head.bias.double(), head.scale, head.softcap)
    expected = naive_selected_logps(hidden.bfloat16().double(), targets, rounded)
    torch.testing.assert_close(ours[0], expected.float(), rtol=0, atol=3e-6)
    exact = values_and_gradients(naive_selected_logps, hidden, targets, head)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - truth).abs().max() <= 0.02 * truth.abs().max()


@only_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_weight_s_gradient_over_many_tiles_is_added_in_float32(dtype, in_place):
    head, hidden, targets = case("plain", 1, dtype)
    narrow = functools.partial(tiled, dtype=torch.bfloat16)
    assert_weight_gradient_is_added_in_float32(narrow, head, hidden, targets, times=300 * TOKENS, in_place=in_place)


@only_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_place_is_added_to(dtype):
    head, hidden, targets = case("all", 9, dtype)
    expected = values_and_gradients(tiled, hidden, targets, head)
    before = torch.linspace(-1, 1, head.weight.numel()).view(head.weight.shape).to(dtype)
    head = Head(head.weight, head.bias, head.scale, head.softcap, before.clone())
    values = tiled(hidden, targets, head)
    values.backward(torch.linspace(-1, 2, len(values)))
    assert head.weight.grad is None
    torch.testing.assert_close(hidden.grad, expected[1])
    torch.testing.assert_close(head.bias.grad, expected[3])
    if dtype == torch.float32:
        torch.testing.assert_close(head.gradient, before + expected[2])
    else:
        assert (head.gradient - before - expected[2]).abs().max() <= 0.02


@only_once
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    head, hidden, targets = case("all", 9)
    (head.weight if frozen == "weight" else hidden).requires_grad_(False)
    trained = hidden if frozen == "weight" else head.weight
    gradients = [torch.autograd.grad(f(hidden, targets, head).sum(), trained)[0] for f in (tiled, naive_selected_logps)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
    tiled(hidden, targets, head).sum().backward()
    assert (head.weight if frozen == "weight" else hidden).grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_gives_the_same_gradients(dtype):
    head, hidden, targets = case("all", 9, dtype)
    total = tiled(hidden, targets, head).sum()
    first, second = (torch.autograd.grad(total, (hidden, head.weight, head.bias), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@only_once
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode):
    head, hidden, targets = case("all", 9)
    with mode():
        values = tiled(hidden, targets, head)
    assert not values.requires_grad
    assert torch.equal(values, tiled(hidden, targets, head))


@only_once
def test_no_tokens_give_no_scores_and_zero_gradients():
    head, hidden, targets = case("bias", 0)
    values, *gradients = values_and_gradients(tiled, hidden, targets, head)
    assert values.shape == (0,)
    assert all(not g.any() for g in gradients)


def test_a_target_outside_the_vocabulary_has_no_score():
    """Rather than the score of another token: every caller refuses NaN."""
    head, hidden, targets = case("plain", 4)
    targets[2], targets[3] = -1, VOCABULARY
    assert tiled(hidden, targets, head).isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("there", [torch.nan, torch.inf, 3e38])
def test_memory_between_the_rows_of_a_tile_has_no_influence(there, softcap):
    """Triton reads it, so that rows are read 16 bytes at a time."""
    torch.manual_seed(0)
    logits, targets, grad = torch.randn(TOKENS, 43), torch.tensor([0, 42, 50, 7]), torch.randn(TOKENS)
    targets = targets + 100
    inside = torch.tensor([True, True, False, True])
    results = []
    for operations, width in ((PLAIN, 43), (OPERATIONS, 48)):
        products, out = torch.full((2, TOKENS, width), there)[..., :43]
        normalizer = Normalizer.start(TOKENS, products, torch.float32)
        operations.logsumexp_and_target(Tile(products.copy_(logits), targets, 100, None, 0.5, softcap), normalizer)
        tile = Tile(products.copy_(logits), targets, 100, None, 0.5, softcap)
        operations.logits_to_gradient(tile, normalizer.logsumexp(), grad, out)
        results.append([normalizer.logps()[inside], normalizer.logsumexp(), out])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_weights_that_are_no_numbers_give_no_score():
    head, hidden, targets = case("plain", 4)
    with torch.no_grad():
        head.weight[20] = torch.nan
    assert tiled(hidden, targets, head).isnan().all()


@only_once
@pytest.mark.parametrize(
    ("tokens", "tiles"),
    [(1, [(1, 43)]), (2, [(2, 32), (2, 11)]), (6, [(4, 16), (2, 16), (4, 16), (2, 16), (4, 11), (2, 11)])],
)
def test_tiles_of_few_tokens_are_wider(tokens, tiles):
    head, hidden, targets = case("plain", tokens)
    seen = []

    def count(tile, normalizer):
        seen.append(tuple(tile.products.shape))
        OPERATIONS.logsumexp_and_target(tile, normalizer)

    tiled(hidden, targets, head, operations=TileOperations(count, OPERATIONS.logits_to_gradient))
    assert seen == tiles


@only_once
def test_no_tensor_is_larger_than_a_tile_the_weight_or_the_hidden_states():
    head, hidden, targets = case("all", 200)
    with LargestTensor() as largest:
        tiled(hidden, targets, head).sum().backward()
    assert largest.elements == hidden.numel() > head.weight.numel() > TOKENS * COLUMNS
    assert largest.elements < 200 * VOCABULARY / 4


@only_once
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere"])
def test_models_score_and_train_as_with_the_output_layer_for_cpus(family, in_place, monkeypatch):
    results = []
    for on in (False, True):
        monkeypatch.setattr(cuda_head, "runs_on", lambda device, dtype, on=on: on)
        model = tiny_model(family)
        add_scoring_forward(model)
        for weight in add_gradients_in_place(model) if in_place else []:
            weight.grad = torch.zeros_like(weight)
        logps = token_logps(model, pad_sequences(random_rows(3))).token_logps
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad.to_dense() for p in model.parameters())])
    for chunked, one in zip(*results, strict=True):
        torch.testing.assert_close(one, chunked, rtol=1e-4, atol=2e-5)


@only_once
def test_a_cpu_keeps_its_output_layer():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert not cuda_head.runs_on(torch.device("cpu"), dtype)


@only_once
def test_autocast_chooses_the_operands_on_cuda_too(monkeypatch):
    monkeypatch.setattr(cuda_head, "runs_on", lambda device, dtype: True)
    monkeypatch.setattr(cuda_head, "_best_operations", lambda device: OPERATIONS)
    head, hidden, targets = case("all", 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = selected_logps(hidden, targets, head)
    assert torch.equal(values, tiled(hidden, targets, head, dtype=torch.bfloat16))


@only_once
def test_without_triton_the_operations_are_plain_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "offline_kto.kto_core.scoring.head_tiles_triton", None)
    assert cuda_head._best_operations.__wrapped__(torch.device("cuda")) is PLAIN
    assert re.search(r"^warning +The output layer runs in plain torch.*Triton fails: .*halted", capsys.readouterr().out)


@only_once
@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path):
    """To machine code, without a GPU. Numbers are read and written 16 bytes at a time, and registers suffice."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests/compiled_kernels.py"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 2 * 4
    for kernel, _, _, *memory in lines:
        assert "ld.global.v4.b32" in memory
        assert ("st.global.v4.b32" in memory) == (kernel == "logits_to_gradient")
        assert not any(".local" in instruction for instruction in memory)
