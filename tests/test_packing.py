"""Concatenated sequences: the check is exact, and boundaries come from the host."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import FAMILIES, random_rows, save_tiny, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring import varlen_attention
from offline_kto.kto_core.scoring.attention import can_pack, is_flash, packs_on, takes_boundaries
from offline_kto.kto_core.scoring.known_boundaries import current_batch, known_boundaries, row_of_slot
from offline_kto.kto_core.scoring.logps import add_scoring_forward, check_scoring, token_logps
from offline_kto.kto_core.scoring.packing_check import Packing, measure_packing
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.kto_core.scoring.sequences import (
    Widths,
    boundary_arguments,
    pack_sequences,
    pad_sequences,
    padded_widths,
)
from offline_kto.kto_core.scoring.shared_prompts import share_prompts
from offline_kto.kto_core.scoring.varlen_attention import VARLEN, register_varlen
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.prepared_policy import PreparedPolicy

CPU = torch.device("cpu")
SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.item")
VARLEN_FAMILIES = ("llama", "llama-tied", "gpt2", "cohere", "granite", "mistral", "opt")


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_varlen(transformers)
    transformers.AttentionInterface.register("leaky", leaky_attention)
    transformers.AttentionMaskInterface.register("leaky", lambda *args, **kwargs: None)


def leaky_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention that ignores boundaries."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return found.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    """Flash attention's functions, as `transformers` calls them, on the CPU; the list gets each call's longest query."""
    calls = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max(cu_seqlens_q.diff().tolist()) <= max_seqlen_q
        assert max(cu_seqlens_k.diff().tolist()) <= max_seqlen_k
        calls.append(max_seqlen_q)
        given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return varlen_attention._one_by_one(varlen_attention._Sequences(q, k, v, *given, -1, softmax_scale))

    library = transformers.modeling_flash_attention_utils
    functions = (None, varlen, None, None, None)
    processed = library._lazy_define_process_function(varlen), dict
    monkeypatch.setattr(library, "lazy_import_flash_attention", lambda name: (functions, processed))
    return calls


def model_of(family="llama", *, attention=None, **overrides):
    model = tiny_model(family, **overrides)
    if attention is not None:
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
    add_scoring_forward(model)
    return model


class Syncs(TorchDispatchMode):
    """Counts the operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(SYNCS):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def rows_of(*lengths):
    """Sequences of these numbers of tokens, half of them prompt."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 97, length).astype(np.int32) for length in lengths]
    return [(one[: len(one) // 2], one[len(one) // 2 :]) for one in ids]


# --- which attention packs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "flash_attention_2",
        "flash_attention_4",
        "kernels-community/flash-attn3",
        "kernels-community/vllm-flash-attn3",
        "kernels-community/flash-attn2@main",
        "someone/my-flash:flash_attn_varlen_func",
    ],
)
def test_flash_attention_is_recognised_by_any_of_its_names(name):
    assert is_flash(name)
    assert takes_boundaries(name)
    assert packs_on(name, torch.device("cuda"))
    assert not packs_on(name, CPU)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention", "kernels-community/paged-attention", None])
def test_no_other_attention_is_taken_for_flash(name):
    assert not is_flash(name)
    assert not takes_boundaries(name)
    assert packs_on(name, torch.device("cuda")) == (name == "flex_attention")


def test_varlen_packs_on_any_device():
    assert can_pack(model_of(attention=VARLEN), CPU)
    assert packs_on(VARLEN, torch.device("cuda"))
    assert not can_pack(model_of(), CPU)


# --- the check -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(6, 8), (40, 300), (300, 40)])
def test_attention_that_sees_across_boundaries_is_found_out_however_long_rows_are(lengths):
    found = measure_packing(model_of(attention="leaky"), CPU, rows_of(*lengths))
    assert found.moved > 0
    assert found.moved_apart == 0
    assert "would move" in str(found.why_not(tolerance=1e9))


@pytest.mark.parametrize("attention", [VARLEN, "sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(6, 8), (40, 120)])
def test_attention_that_keeps_rows_apart_moves_nothing_at_all(attention, lengths):
    found = measure_packing(model_of(attention=attention), CPU, rows_of(*lengths))
    assert (found.moved, found.moved_apart) == (0.0, 0.0)
    assert found.why_not(tolerance=1e-4) is None


def test_a_family_that_builds_its_mask_without_positions_is_found_out():
    found = measure_packing(model_of("opt"), CPU, rows_of(12, 12))
    assert found.moved > 0
    assert found.why_not(1.0) is not None


def test_experts_may_move_as_much_as_in_separate_rows():
    """The tokens of all rows that go to one expert are multiplied together, whether rows are concatenated or not."""
    assert Packing(moved=2e-6, moved_apart=1e-6, differs=0.0).why_not(1e-4) is None
    assert Packing(moved=2e-2, moved_apart=1e-6, differs=0.0).why_not(1e-4) is not None
    assert measure_packing(model_of("mixtral"), CPU, rows_of(12, 12)).why_not(1e-4) is None


def test_scores_that_differ_from_those_of_padded_rows_are_found_out():
    assert "differ by 0.1" in str(Packing(moved=0.0, moved_apart=0.0, differs=0.1).why_not(0.05))
    assert Packing(moved=float("nan"), moved_apart=0.0, differs=0.0).why_not(0.05) is not None


@pytest.mark.parametrize(("attention", "packs"), [("leaky", False), (VARLEN, True)])
def test_both_stages_pack_only_after_the_check(attention, packs, monkeypatch, capsys):
    for place in ("precompute.engines.transformers_scorer", "train.trainer.prepared_policy"):
        monkeypatch.setattr(f"offline_kto.{place}.can_pack", lambda model, device: True)
    model, rows, said = model_of(attention=attention), random_rows(12), []
    scorer = TransformersScorer(model, Precision(torch.float32), say=said.append)
    assert not scorer.packs
    scorer.self_check(rows)
    ranks = SimpleNamespace(least=lambda value: value, rank=0)
    policy = PreparedPolicy(model, CPU, ranks=ranks, max_tokens=100, rounding=1.0)
    policy.check_packing(rows[:2])
    assert (scorer.packs, policy.packs) == (packs, packs)
    said += capsys.readouterr().out.splitlines()
    assert len(said) == (0 if packs else 2)
    assert all("rows are padded, not concatenated: scores of a sequence would move by" in line for line in said)


def test_rows_are_padded_where_there_are_too_few_to_check():
    model = model_of(attention=VARLEN)
    policy = PreparedPolicy(model, CPU, ranks=SimpleNamespace(least=int, rank=0), max_tokens=100, rounding=1.0)
    policy.check_packing(random_rows(1))
    assert not policy.packs
    scorer = TransformersScorer(model, Precision(torch.float32))
    scorer.self_check(random_rows(1))
    assert not scorer.packs


# --- varlen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARLEN_FAMILIES)
def test_varlen_scores_and_gradients_are_those_of_sdpa(family):
    rows = random_rows(7, longest=20)
    results = []
    for attention in ("sdpa", VARLEN):
        model = model_of(family, attention=attention)
        for lay_out in (pad_sequences, pack_sequences):
            if attention == "sdpa" and lay_out is pack_sequences:
                continue
            model.zero_grad()
            scores = token_logps(model, lay_out(rows)).token_logps
            scores.sum().backward()
            results.append([scores.detach(), *(p.grad.clone() for p in model.parameters())])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_varlen_keeps_a_sliding_window():
    rows = rows_of(40, 30)
    wide, narrow = (
        token_logps(model_of("mistral", attention=VARLEN, sliding_window=window), pack_sequences(rows)).token_logps
        for window in (100, 4)
    )
    expected = token_logps(model_of("mistral", sliding_window=4), pad_sequences(rows)).token_logps
    torch.testing.assert_close(narrow, expected, atol=1e-4, rtol=1e-4)
    assert (wide - narrow).abs().max() > 0.1


def test_varlen_shares_prompts_and_passes_the_model_s_own_check():
    model, prompt = model_of(attention=VARLEN), np.arange(30, dtype=np.int32)
    rows = [(prompt, row[1]) for row in random_rows(6)]
    expected = [token_logps(model, pad_sequences([row])).token_logps for row in rows]
    found = token_logps(model, share_prompts([rows], 1_000)).token_logps
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert check_scoring(model, random_rows(3), tolerance=1e-3) < 1e-3


def test_a_model_that_does_not_pass_boundaries_on_is_refused_at_its_first_pass():
    model = model_of(attention=VARLEN)
    layer, real = model.model.layers[1], type(model.model.layers[1]).forward

    def forward(hidden, *args, cu_seq_lens_q=None, **kwargs):
        return real(layer, hidden, *args, **kwargs)

    layer.forward = forward
    with pytest.raises(ModelError, match="is not told where sequences begin"):
        token_logps(model, pad_sequences(random_rows(2)))


@pytest.mark.parametrize("unknown", ["softcap", "s_aux", "position_bias"])
def test_varlen_refuses_what_changes_attention_scores(unknown):
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[VARLEN]
    states = torch.zeros(1, 2, 4, 8)
    boundaries = torch.tensor([0, 4], dtype=torch.int32)
    given = {**boundary_arguments(boundaries, boundaries, 4, 4), unknown: 1.0}
    with pytest.raises(ModelError, match=unknown):
        attend(torch.nn.Module(), states, states, states, None, **given)
    with pytest.raises(ModelError, match="later tokens"):
        attend(torch.nn.Module(), states, states, states, None, **{**given, unknown: None, "is_causal": False})


def test_both_stages_run_without_padding(tmp_path: Path, capsys):
    """With `--attention varlen` the cache is the same up to rounding, has the same fingerprint, and training starts from it."""
    base = save_tiny(tmp_path / "base", "mistral")
    feedback = tmp_path / "feedback.jsonl"
    lines = [
        {"prompt": f"question {i}", "completion": "hello world " * (1 + i % 7), "label": i % 2 == 0} for i in range(24)
    ]
    feedback.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifests = {}
    for attention in ("auto", VARLEN):
        refs = tmp_path / attention
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=refs, attention=attention))
        manifests[attention] = json.loads((refs / "manifest.json").read_text())
    assert manifests["auto"]["fingerprint"] == manifests[VARLEN]["fingerprint"]
    assert [one["scorer"]["attention"] for one in manifests.values()] == ["sdpa", VARLEN]
    printed = capsys.readouterr().out
    assert "attention   sdpa (no flash attention on cpu), rows padded\n" in printed
    assert "attention   varlen, rows concatenated without padding\n" in printed
    metrics = {}
    for attention in ("auto", VARLEN):
        run = tmp_path / f"run-{attention}"
        options = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3, "save_steps": 0}
        train(TrainConfig(cache=tmp_path / VARLEN, out=run, attention=attention, **options))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        metrics[attention] = [record for record in records if "loss" in record]
        assert "attn" not in (run / "config.json").read_text()
    assert len(metrics["auto"]) == 2
    assert [record["padding"] == 0 for records in metrics.values() for record in records] == [False, False, True, True]
    for one, other in zip(*metrics.values(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


# --- boundaries from the host ----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5,), (3, 3), (7, 1, 4), (2, 2, 2, 9)])
def test_rows_of_slots_are_those_that_transformers_finds(lengths):
    rows = [(np.arange(1, dtype=np.int32), np.zeros(max(1, n - 1), np.int32)) for n in lengths]
    search = transformers.masking_utils.find_packed_sequence_indices
    for batch in (pack_sequences(rows), pad_sequences(rows)):
        expected, found = search(batch.position_ids), row_of_slot(batch)
        assert (found is None) == (expected is None)
        if expected is not None and found is not None:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_bit_for_bit_those_of_a_call_that_searches(family, monkeypatch):
    model, rows = model_of(family), random_rows(5)
    for lay_out in (pad_sequences, pack_sequences):
        batch = lay_out(rows)
        found = token_logps(model, batch).token_logps
        with monkeypatch.context() as patch:
            patch.setattr("offline_kto.kto_core.scoring.known_boundaries.current_batch", lambda: None)
            expected = token_logps(model, batch).token_logps
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_waits_for_nothing(family):
    model, batch = model_of(family), pad_sequences(random_rows(5))
    token_logps(model, batch)  # tables that a model makes once
    with Syncs() as syncs:
        token_logps(model, batch).token_logps.sum().backward()
    assert not syncs.counts


@pytest.mark.parametrize(
    ("attention", "multiple"),
    [(None, 64), *((attention, multiple) for attention in (VARLEN, "flash_attention_2") for multiple in (1, 64))],
)
def test_shared_prompts_wait_for_nothing(attention, multiple, flash):
    """Prompts of different lengths in one pass, completions of different lengths in one branch, and one of two tokens."""
    model, rows = model_of(), rows_of(12, 30, 9, 44, 4)
    if attention is not None:
        model.config._attn_implementation_internal = attention  # without the library's search for the package
    groups = [[(prompt, row[1]) for row in rows] for prompt, _ in (rows[1], rows[2])]
    expected = token_logps(model_of(), pad_sequences([row for group in groups for row in group])).token_logps
    for parts in (groups, [[(rows[1][0], rows[4][1])] * 2]):
        batch = share_prompts(parts, 10_000, widths=Widths(multiple))
        assert len(batch.branches) == 1
        with torch.no_grad(), Syncs() as syncs:
            found = token_logps(model, batch).token_logps
        assert not syncs.counts
        if parts is groups:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (flash == []) == (attention != "flash_attention_2")
    assert all(most > 1 for most in flash)


def test_the_count_of_waits_can_fail(monkeypatch):
    model, batch = model_of(), pad_sequences(random_rows(5))
    monkeypatch.setattr("offline_kto.kto_core.scoring.known_boundaries.current_batch", lambda: None)
    with Syncs() as syncs:
        token_logps(model, batch)
    assert sum(syncs.counts.values()) == 1


def test_calls_outside_of_a_scoring_pass_are_searched_as_before():
    model = model_of()
    rows = random_rows(2)
    token_logps(model, pad_sequences(rows))
    assert current_batch() is None
    batch = pack_sequences(rows)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        apart = [model(input_ids=torch.from_numpy(np.concatenate(row))[None].long()).logits[0] for row in rows]
    torch.testing.assert_close(packed, torch.cat(apart), atol=1e-4, rtol=1e-4)


def test_an_error_in_a_pass_leaves_no_batch_behind():
    batch = pad_sequences(random_rows(2))

    def fail():
        with known_boundaries(batch):
            assert current_batch() is batch
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert current_batch() is None


# --- padded widths ---------------------------------------------------------------------------------


def test_widths_are_rounded_on_a_gpu_only_and_not_beyond_the_model_s_positions():
    config = tiny_model("gpt2", n_positions=200).config
    assert padded_widths(config, "cpu") == Widths(1, 200)
    widths = padded_widths(config, "cuda")
    assert [widths.of(n) for n in (1, 64, 65, 128, 129, 193, 200)] == [64, 64, 128, 128, 192, 200, 200]
    assert Widths().of(77) == 77


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_widths_change_no_score(family):
    model, rows, widths = model_of(family), random_rows(5), Widths(64, 1024)
    batch = pad_sequences(rows, widths)
    assert batch.input_ids.shape[1] == 64
    assert batch.position_ids.max() == max(len(p) + len(c) for p, c in rows) - 1
    found, expected = (token_logps(model, one).token_logps for one in (batch, pad_sequences(rows)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rounded_widths_of_shared_prompts_change_no_score_and_stay_within_the_model_s_slots():
    model, random = model_of(), np.random.default_rng(0)
    groups = []
    for length in (5, 21):
        prompt = random.integers(0, 97, length).astype(np.int32)
        groups.append([(prompt, random.integers(0, 97, n).astype(np.int32)) for n in (1, 9, 14)])
    rows = [row for group in groups for row in group]
    expected = torch.cat([token_logps(model, pad_sequences([row])).token_logps for row in rows])
    for longest in (2**31, 60, 35, 34):
        batch = share_prompts(groups, 10_000, longest, widths=Widths(16))
        torch.testing.assert_close(token_logps(model, batch).token_logps, expected, atol=1e-4, rtol=1e-4)
        assert all(branch.attention_mask.shape[1] <= longest for branch in batch.branches)
    wide = share_prompts(groups, 10_000, widths=Widths(16))
    assert wide.input_ids.shape[1] == 32
    assert [branch.input_ids.shape[1] % 16 for branch in wide.branches] == [0] * len(wide.branches)
    assert [branch.keys.shape[1] % 16 for branch in wide.branches] == [0] * len(wide.branches)


def real_lengths(rows, seed=0):
    """(prompt, completion) tokens as in feedback on chats: log-normal, median 300, at most 1,024, prompts 40 %."""
    random = np.random.default_rng(seed)
    total = np.clip(random.lognormal(np.log(300), 0.8, rows), 8, 1024).astype(int)
    return [(max(1, int(0.4 * n)), int(n) - max(1, int(0.4 * n))) for n in total]


def test_a_hundred_batches_have_few_shapes_once_widths_are_rounded():
    """Every shape is one for which a GPU's kernels are chosen anew; without rounding nearly every pass has its own."""
    model, rows, budget = model_of(max_position_embeddings=1024), real_lengths(3200), 8192
    shapes = {}
    for multiple in (1, 64):
        passes = ScoringPasses(model, CPU, max_tokens=budget, widths=Widths(multiple, 1024))
        seen, padded, longest = [], 0, 0
        for start in range(0, len(rows), 32):
            lengths = [sum(row) for row in rows[start : start + 32]]
            for part in passes._cut(lengths):
                width = passes.widths.of(max(lengths[i] for i in part))
                seen.append((len(part), width))
                padded += len(part) * width
                longest = max(longest, len(part) * width)
        shapes[multiple] = len(set(seen)), len(seen), padded
        assert longest <= budget
    tokens = sum(map(sum, rows))
    assert shapes[1][0] > 0.5 * shapes[1][1]
    assert shapes[64][0] <= 110
    assert shapes[64][2] < 1.12 * tokens


def test_budgets_and_padding_count_rounded_widths():
    model = model_of()
    rows = random_rows(12, longest=40)
    passes = ScoringPasses(model, CPU, max_tokens=128, widths=Widths(64))
    batches = [done.batch for done in passes.run(rows)]
    assert {batch.input_ids.shape[1] for batch in batches} == {64}
    assert max(batch.padded_tokens for batch in batches) == 128
    assert passes.passes_for([sum(map(len, row)) for row in rows]) == 6
