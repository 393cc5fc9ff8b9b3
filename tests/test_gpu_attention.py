"""Attention on a CUDA device: layouts agree, fused kernels are used, nothing waits, and new shapes cost nothing."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from gpus import DEVICE, MARKS, REHEARSAL
from models import FAMILIES, VOCABULARY, random_rows, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.attention_choice import choose_attention
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.runtime import deprioritize_cudnn_attention
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.packing_check import measure_packing
from offline_kto.kto_core.scoring.sequences import pack_sequences, pad_sequences, padded_widths
from offline_kto.kto_core.scoring.shared_prompts import longest_shared, share_prompts
from offline_kto.train.trainer.tensor_float import tf32_products

# As both stages do. PyTorch reads the variable at the first attention of the process, which may be another file's test.
deprioritize_cudnn_attention()

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Nats a token by which two layouts may differ: the largest in float32, the mean in bfloat16.
LARGEST, MEAN = 1e-4, 0.05

pytestmark = MARKS

# Heads of 64, as in real models; fused kernels need a multiple of 8.
REAL_HEADS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(family="llama", *, attention=None, **overrides):
    model = tiny_model(family, **{"max_position_embeddings": 8192, **overrides} if family == "llama" else overrides)
    if attention is not None:
        model.set_attn_implementation(attention)
    add_scoring_forward(model)
    return model.to(DEVICE)


def autocast(dtype):
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def scores(model, batch, dtype):
    with torch.no_grad(), autocast(dtype):
        return token_logps(model, batch.to(DEVICE)).token_logps


def assert_alike(found, expected, dtype, usual=torch.mean):
    apart = (found - expected).abs()
    assert apart.isfinite().all()
    assert apart.max() < LARGEST if dtype == "float32" else usual(apart) < MEAN


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self):
        return {name for name in self.counts if "scaled_dot_product" in name}


# --- g4: layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_packed_shared_and_single_rows_have_equal_scores(family, dtype):
    model = model_of(family)
    prompt = np.arange(2, 14, dtype=np.int32)
    rows = [(prompt, completion) for _, completion in random_rows(6, longest=20)]
    alone = torch.cat([scores(model, pad_sequences([row]), dtype) for row in rows])
    layouts = {
        "padded": pad_sequences(rows),
        "rounded": pad_sequences(rows, padded_widths(model.config, "cuda")),
    }
    longest = longest_shared(model)
    if max(len(p) + len(c) for p, c in rows) <= longest:
        layouts["shared"] = share_prompts([rows], 10_000, longest, widths=padded_widths(model.config, "cuda"))
    with autocast(dtype):
        packing = measure_packing(model, DEVICE, rows[:2])
    if packing.why_not(MEAN if dtype == "bfloat16" else LARGEST) is None:
        layouts["packed"] = pack_sequences(rows)
    # Rounding may give a token with two nearly equal experts the other one, and then it is nats apart.
    has_experts = any("experts" in name for name in vars(model.config))
    for batch in layouts.values():
        assert_alike(scores(model, batch, dtype), alone, dtype, torch.median if has_experts else torch.mean)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "mistral"])
def test_other_ids_in_one_row_leave_the_other_untouched_bit_for_bit(family, dtype):
    with autocast(dtype):
        found = measure_packing(model_of(family), DEVICE, random_rows(2, longest=40, seed=3))
    assert (found.moved, found.moved_apart) == (0.0, 0.0)


# --- g5: kernels ------------------------------------------------------------------------------------

FLASH = "_scaled_dot_product_flash_attention" + ("_for_cpu" if REHEARSAL else "")


def test_padded_rows_use_flash_attention():
    model, batch = model_of(**REAL_HEADS), pad_sequences(random_rows(6, longest=200))
    with Calls() as calls:
        scores(model, batch, "bfloat16")
    assert calls.attention == {FLASH}


def test_shared_prompts_use_a_fused_kernel():
    model, prompt = model_of(**REAL_HEADS), np.arange(64, dtype=np.int32)
    rows = [(prompt, completion) for _, completion in random_rows(6, longest=60)]
    with Calls() as calls:
        scores(model, share_prompts([rows], 10_000), "bfloat16")
    assert calls.attention <= {
        FLASH,
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    }
    assert len(calls.attention) > 1 or REHEARSAL  # prompts without a mask, branches with one


def test_no_tensor_grows_with_the_square_of_the_length():
    model, peaks = model_of(**REAL_HEADS), []
    for length in (64, 128) if REHEARSAL else (2048, 4096):
        ids = np.random.default_rng(0).integers(0, VOCABULARY, length).astype(np.int32)
        batch = pad_sequences([(ids[:-8], ids[-8:])])
        scores(model, batch, "bfloat16")  # workspaces
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scores(model, batch, "bfloat16")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 3 * peaks[0] or REHEARSAL


# --- g6: attention that packs -------------------------------------------------------------------------


def packing_model(attention):
    """A model with this attention; skips with the reason where it cannot be used."""
    shape = tiny_model("llama", **REAL_HEADS)
    half = Precision(torch.bfloat16)
    try:
        choice = choose_attention(attention, shape, {}, device=DEVICE, precision=half, library=transformers)
    except ModelError as error:
        pytest.skip(str(error))
    assert choice.packs
    return model_of(attention=choice.to_set, **REAL_HEADS)


PACKING = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn3", "flex", "varlen")


@pytest.mark.parametrize("attention", PACKING)
def test_attention_that_packs_equals_padded_rows_and_keeps_rows_apart(attention):
    model, rows = packing_model(attention), random_rows(8, longest=120)
    with autocast("bfloat16"):
        found = measure_packing(model, DEVICE, rows[:2])
    assert found.moved == 0.0
    assert found.why_not(MEAN) is None
    expected = scores(model_of(**REAL_HEADS), pad_sequences(rows), "bfloat16")
    for batch in (pack_sequences(rows), pad_sequences(rows)):
        assert_alike(scores(model, batch, "bfloat16"), expected, "bfloat16")


@pytest.mark.parametrize("attention", PACKING)
def test_attention_that_packs_has_the_gradients_of_sdpa(attention):
    rows, gradients = random_rows(8, longest=120), []
    for model, lay_out in ((model_of(**REAL_HEADS), pad_sequences), (packing_model(attention), pack_sequences)):
        with autocast("bfloat16"):
            token_logps(model.train(), lay_out(rows).to(DEVICE)).token_logps.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@pytest.mark.parametrize("attention", ["sdpa", *PACKING])
def test_a_pass_hardly_ever_waits_for_the_device(attention):
    model = model_of(**REAL_HEADS) if attention == "sdpa" else packing_model(attention)
    lay_out = pad_sequences if attention == "sdpa" else pack_sequences
    batch = lay_out(random_rows(8, longest=120)).to(DEVICE)
    scores(model, batch, "bfloat16")  # what is computed once
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            scores(model, batch, "bfloat16")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
    assert len(waits) <= (0 if attention == "sdpa" else 2), waits


def test_a_prepared_batch_is_trained_on_without_waiting():
    """g7: a wait within the forward or the backward pass is an error."""
    model, batch = model_of(**REAL_HEADS).train(), pad_sequences(random_rows(8, longest=120)).to(DEVICE)

    def update():
        with autocast("bfloat16"):
            loss = token_logps(model, batch).token_logps.sum()
        loss.backward()

    update()  # kernels are chosen, and Triton's compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- g15: new shapes ------------------------------------------------------------------------------------

SHAPES = """
import json, sys, time
import numpy as np, torch, transformers
from offline_kto.kto_core.models.attention_choice import choose_attention
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.sequences import pad_sequences

device = torch.device(sys.argv[1])
config = transformers.LlamaConfig(
    vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=2048,
)
model = transformers.AutoModelForCausalLM.from_config(config)
half = Precision(torch.bfloat16)
choose_attention("sdpa", model, {}, device=device, precision=half, library=transformers)
add_scoring_forward(model)
model.to(device)

def seconds(widths):
    batches = []
    for width in widths:
        ids = np.random.default_rng(width).integers(0, 1000, (4, width)).astype(np.int32)
        batches.append(pad_sequences([(row[: width // 2], row[width // 2 :]) for row in ids]).to(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for batch in batches:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = token_logps(model, batch).token_logps.sum()
        loss.backward()
        model.zero_grad(set_to_none=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started

updates, shortest = map(int, sys.argv[2:])
different = [shortest + 13 * i for i in range(updates)]
middle = sum(different) // updates
seconds([max(different) + 1, middle, middle])  # allocator, workspaces
print(json.dumps({"one shape": seconds([middle] * updates), "new shapes": seconds(different)}))
"""


def times_of_shapes(device, updates, shortest):
    """Seconds of updates of one shape, and of as many of different ones, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDNN_SDPA_DEPRIORITIZED"}
    done = subprocess.run(
        [sys.executable, "-c", SHAPES, device, str(updates), str(shortest)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_thirty_new_shapes_take_no_longer_than_one():
    found = times_of_shapes(DEVICE.type, *((2, 40) if REHEARSAL else (30, 400)))
    assert found["new shapes"] < 2 * found["one shape"] or REHEARSAL


# --- TF32 -------------------------------------------------------------------------------------------------


def test_products_are_rounded_to_tf32_inside_of_the_block_only():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    left, right = (torch.randn(1024, 1024, device=DEVICE) for _ in range(2))
    exact = left.double() @ right.double()
    before = left @ right
    with tf32_products(True):
        inside = left @ right
    after = left @ right
    assert torch.equal(before, after)
    errors = [float((found - exact).norm() / exact.norm()) for found in (before, inside)]
    assert errors[0] < 1e-5
    assert 1e-5 < errors[1] < 1e-2 or REHEARSAL
