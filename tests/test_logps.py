import copy
import functools
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from heads import HEADS, LargestTensor, as_dtype, make_head, make_inputs, naive_selected_logps, values_and_gradients
from models import FAMILIES, VOCABULARY, random_rows, tiny_model

import offline_kto.kto_core.scoring.attention
import offline_kto.kto_core.scoring.head
import offline_kto.kto_core.scoring.logps
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.scoring.attention import caps_attention
from offline_kto.kto_core.scoring.head import selected_logps
from offline_kto.kto_core.scoring.logps import Scored, add_scoring_forward, check_scoring, token_logps
from offline_kto.kto_core.scoring.output_layer import Head, add_gradients_in_place
from offline_kto.kto_core.scoring.sequences import pad_sequences, sum_rows

# Float32 keeps 7 digits. Logits here reach about 20 after some hundred operations, and another batch shape or another
# order of sums moves the last digits: the models' own logits differ by up to 5e-6 nats between a row alone and the same
# row in a batch. A wrong position, scale or bias moves them by 0.1 nats and more.
TOLERANCE = 2e-5


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five rows: every test then crosses several chunks, the last of them shorter."""
    monkeypatch.setattr(offline_kto.kto_core.scoring.head, "_CHUNK_ELEMENTS", {"cpu": 5 * VOCABULARY})


@functools.cache
def scoring_model(family):
    """Shared by tests that only read it."""
    model = tiny_model(family)
    add_scoring_forward(model)
    return model


def fresh_model(family, **overrides):
    model = tiny_model(family, **overrides)
    add_scoring_forward(model)
    return model


def own_logps(model, row):
    """The naive way, for one row alone: the model's own logits of the whole row, then log-softmax."""
    prompt, completion = row
    ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]  # (completion tokens, vocabulary)
    return logits.float().log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_of_the_projection_are_exact(kind, monkeypatch):
    monkeypatch.setattr(offline_kto.kto_core.scoring.head, "_CHUNK_ELEMENTS", {"cpu": 2 * 6})
    head = make_head(kind, vocabulary=6, hidden_size=3)
    hidden, targets = make_inputs(5, vocabulary=6, hidden_size=3)

    def score(hidden, weight, bias):
        return selected_logps(hidden, targets, Head(weight, bias, head.scale, head.softcap))

    assert torch.autograd.gradcheck(score, (hidden, head.weight, head.bias))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", HEADS)
def test_the_projection_equals_the_naive_one_in_float64(kind):
    head = make_head(kind)
    hidden, targets = make_inputs(23)
    ours = values_and_gradients(selected_logps, hidden, targets, head)
    naive = values_and_gradients(naive_selected_logps, hidden, targets, head)
    for mine, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", HEADS)
def test_the_projection_is_as_accurate_as_the_naive_one_in_float32(kind):
    """Against float64: at most three times the error that a plain implementation makes."""
    head = make_head(kind)
    hidden, targets = make_inputs(23)
    exact = values_and_gradients(naive_selected_logps, hidden, targets, head)
    narrow, narrow_head = hidden.float(), as_dtype(head, torch.float32)
    plain = values_and_gradients(naive_selected_logps, narrow, targets, narrow_head)
    ours = values_and_gradients(selected_logps, narrow, targets, narrow_head)
    for mine, other, truth in zip(ours, plain, exact, strict=True):
        allowed = 3 * (other.double() - truth).abs().max() + 1e-7
        assert mine.dtype == torch.float32
        assert (mine.double() - truth).abs().max() <= allowed


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(kind, frozen):
    head = make_head(kind)
    hidden, targets = make_inputs(23)
    (head.weight if frozen == "weight" else hidden).requires_grad_(False)
    trained = hidden if frozen == "weight" else head.weight
    gradients = [
        torch.autograd.grad(f(hidden, targets, head).sum(), trained)[0] for f in (selected_logps, naive_selected_logps)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
    selected_logps(hidden, targets, head).sum().backward()
    assert (head.weight if frozen == "weight" else hidden).grad is None


@pytest.mark.usefixtures("small_chunks")
def test_no_tokens_give_no_scores_and_zero_gradients():
    head = make_head("bias")
    hidden, targets = make_inputs(0)
    values, *gradients = values_and_gradients(selected_logps, hidden, targets, head)
    assert values.shape == (0,)
    assert all(not g.any() for g in gradients)


@pytest.mark.usefixtures("small_chunks")
def test_autocast_projects_in_its_dtype_and_normalizes_in_float32():
    """Logits rounded to bfloat16, as the model's own would be, and nothing after them."""
    head = make_head("plain", dtype=torch.float32)
    hidden, targets = make_inputs(23, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = values_and_gradients(selected_logps, hidden, targets, head)
        logits = F.linear(hidden, head.weight)
    assert logits.dtype == torch.bfloat16
    assert ours[0].dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-5)
    exact = values_and_gradients(naive_selected_logps, hidden, targets, head)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        # bfloat16 keeps 8 bits: 0.4 % of each factor.
        assert (mine - truth).abs().max() <= 0.02 * truth.abs().max()


@pytest.mark.usefixtures("small_chunks")
def test_the_softmax_of_a_bfloat16_model_is_float32():
    head = as_dtype(make_head("plain"), torch.bfloat16)
    hidden, targets = make_inputs(23, dtype=torch.bfloat16)
    logits = F.linear(hidden, head.weight).float()
    ours = selected_logps(hidden, targets, head)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)


def test_padding_stands_on_the_right_and_is_not_scored():
    batch = pad_sequences([(np.array([5, 6]), np.array([7])), (np.array([1]), np.array([2, 3, 4, 8]))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [1, 2, 3, 4, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.real.tolist() == [[True, True, True, False, False], [True] * 5]
    assert batch.predicts.tolist() == [1, 5, 6, 7, 8]
    assert batch.targets.tolist() == [7, 2, 3, 4, 8]
    assert batch.row_of_token.tolist() == [0, 1, 1, 1, 1]
    assert (batch.rows, batch.tokens, batch.padded_tokens) == (2, 8, 10)
    assert batch.input_ids.dtype == torch.int64


def test_sums_are_float64_and_keep_rows_apart():
    """2 ** 24 + 1 is the first whole number that float32 lacks."""
    batch = pad_sequences([(np.array([5, 6]), np.array([7, 7])), (np.array([1]), np.array([2, 3, 4, 8]))])
    token_values = torch.tensor([-(2.0**24), -1.0, -0.5, -0.25, -4.0, -8.0])
    assert sum_rows(token_values, batch.row_of_token, batch.rows).tolist() == [-(2.0**24) - 1, -12.75]


def test_the_gradient_of_a_sum_reaches_its_own_tokens_only():
    batch = pad_sequences([(np.array([5]), np.array([7, 7])), (np.array([1]), np.array([2, 3, 4]))])
    token_values = torch.zeros(5, requires_grad=True)
    sum_rows(token_values, batch.row_of_token, batch.rows)[1].backward()
    assert token_values.grad.tolist() == [0, 0, 1, 1, 1]


GROUPS = {"alone": [[i] for i in range(7)], "batch": [list(range(7))], "others": [[6, 2], [0, 5, 3], [4, 1]]}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", GROUPS)
def test_scores_equal_the_models_own_logits(family, groups):
    """For a row alone, in a padded batch and beside other rows."""
    model, rows = scoring_model(family), random_rows(7)
    with torch.no_grad():
        for group in GROUPS[groups]:
            batch = pad_sequences([rows[i] for i in group])
            scored = token_logps(model, batch).token_logps
            own = [own_logps(model, rows[i]) for i in group]
            assert (scored - torch.cat(own)).abs().max() < TOLERANCE
            sums = torch.stack([one.double().sum() for one in own])
            assert (sum_rows(scored, batch.row_of_token, batch.rows) - sums).abs().max() < 24 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_of_these_tests_are_not_flat(family):
    """If every token cost the same, the comparisons above would prove little."""
    with torch.no_grad():
        scores = torch.cat([own_logps(scoring_model(family), row) for row in random_rows(7)])
    assert scores.std() > 0.5


def test_the_sliding_window_is_shorter_than_the_rows():
    """A token beyond the window reaches the last one through two layers of four, and no further."""
    model = scoring_model("mistral")
    ids = torch.arange(20)[None]
    changed = ids.clone()
    changed[0, 5] = 50
    with torch.no_grad():
        before, after = (model(input_ids=i).logits[0] for i in (ids, changed))
    assert not torch.equal(before[8], after[8])
    assert torch.equal(before[19], after[19])


def plain_loss(model, rows, weights):
    return sum(w * own_logps(model, row).sum() for w, row in zip(weights, rows, strict=True))


def scored_loss(model, rows, weights):
    batch = pad_sequences(rows)
    return (
        torch.tensor(weights) * sum_rows(token_logps(model, batch).token_logps, batch.row_of_token, batch.rows)
    ).sum()


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_gradients_close(ours, plain):
    assert ours.keys() == plain.keys()
    for name, truth in plain.items():
        # Relative to the largest element: small ones are differences of large ones, and keep fewer digits. What is left
        # of a true zero (a bias on attention keys) is the rounding of terms of size 1 to 10.
        assert (ours[name] - truth).abs().max() <= 2e-5 * truth.abs().max() + 5e-6, name
    assert sum(bool(g.any()) for g in plain.values()) > 0.9 * len(plain)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral", "cohere", "opt"])
def test_gradients_of_all_parameters_equal_those_through_the_logits(family):
    model, rows = fresh_model(family), random_rows(5)
    weights = [0.3, -1.0, 0.5, -0.2, 0.8]
    plain = gradients_of(model, plain_loss(model, rows, weights))
    assert_gradients_close(gradients_of(model, scored_loss(model, rows, weights)), plain)


@pytest.mark.usefixtures("small_chunks")
def test_gradient_checkpointing_changes_no_gradient():
    model, rows = fresh_model("llama-tied").train(), random_rows(4)
    weights = [0.3, -1.0, 0.5, -0.2]
    plain = gradients_of(model, plain_loss(model, rows, weights))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_gradients_close(gradients_of(model, scored_loss(model, rows, weights)), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_autocast_scores_are_close_to_float32(family):
    """bfloat16 keeps 8 bits, so logits near 10 are off by 0.03 each time they are rounded."""
    model, rows = scoring_model(family), random_rows(7)
    batch = pad_sequences(rows)
    with torch.no_grad():
        exact = token_logps(model, batch).token_logps
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = token_logps(model, batch).token_logps
            own = torch.cat([own_logps(model, row) for row in rows])
    assert rounded.dtype == torch.float32
    # No further from float32 than the model's own logits under the same autocast are.
    assert 0 < (rounded - exact).abs().max() <= 2 * (own - exact).abs().max()
    assert (rounded - exact).abs().max() < 0.5


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "mixtral"])
def test_no_tensor_holds_the_logits_of_all_tokens(family, monkeypatch):
    vocabulary = 4001
    monkeypatch.setattr(offline_kto.kto_core.scoring.head, "_CHUNK_ELEMENTS", {"cpu": 8 * vocabulary})
    model = fresh_model(family, vocab_size=vocabulary)
    rows = random_rows(8, longest=40, seed=3, vocabulary=vocabulary)
    batch = pad_sequences(rows)
    completion_tokens = len(batch.targets)
    with LargestTensor() as largest:
        scored_loss(model, rows, [1.0] * 8).backward()
    weight = model.get_output_embeddings().weight.numel()
    assert largest.elements <= max(weight, 8 * vocabulary)
    assert largest.elements < completion_tokens * vocabulary / 4
    with LargestTensor() as full, torch.no_grad():
        _ = model(input_ids=batch.input_ids).logits
    assert full.elements == batch.input_ids.numel() * vocabulary  # the observer sees what it should


def test_router_logits_come_on_request_only():
    model = scoring_model("mixtral")
    batch = pad_sequences(random_rows(3))
    with torch.no_grad():
        without, with_them = token_logps(model, batch), token_logps(model, batch, router_logits=True)
    assert isinstance(with_them, Scored)
    assert without.router_logits == ()
    assert [tuple(one.shape) for one in with_them.router_logits] == [(batch.input_ids.numel(), 4)] * 2
    torch.testing.assert_close(without.token_logps, with_them.token_logps, rtol=0, atol=0)


def test_without_a_batch_the_forward_is_the_models_own():
    plain, taught = tiny_model("llama"), scoring_model("llama")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, taught(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_on_known_families(family):
    assert check_scoring(scoring_model(family), random_rows(3), tolerance=1e-3) < TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda logits: logits * 1.01, id="scaled"),
        pytest.param(lambda logits: torch.tanh(logits), id="capped"),
        pytest.param(lambda logits: logits + torch.linspace(0, 1, VOCABULARY), id="shifted"),
    ],
)
def test_the_self_check_refuses_a_head_it_does_not_know(change):
    model = fresh_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, out: change(out) if out.ndim == 3 else out)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: .* differ from the model's own logits"):
        check_scoring(model, random_rows(3), tolerance=1e-3)


@pytest.mark.parametrize(("nats", "refused"), [(0.007, False), (0.02, True)])
def test_one_token_among_many_may_be_further_apart_than_all_may_be(nats, refused):
    model, row = fresh_model("llama"), (np.arange(2, dtype=np.int32), np.arange(60, dtype=np.int32))

    def move(module, inputs, out):
        if out.ndim == 3:
            out[0, 5, int(row[1][4])] += nats
        return out

    model.lm_head.register_forward_hook(move)
    if refused:
        with pytest.raises(ModelError, match=r"in the mean and by .* at most"):
            check_scoring(model, [row], tolerance=1e-3)
    else:
        assert 0 < check_scoring(model, [row], tolerance=1e-3) < 1e-3


def test_the_self_check_refuses_a_model_that_sees_its_padding():
    """Rows attend to what stands behind them: harmless for a row alone, wrong in a batch."""
    model = fresh_model("llama")

    def leak(module, inputs, output):
        return output + output.mean(1, keepdim=True)

    model.model.embed_tokens.register_forward_hook(leak)
    with pytest.raises(ModelError, match="differ from the model's own logits"):
        check_scoring(model, random_rows(3), tolerance=1e-3)


@pytest.mark.parametrize("length", [2, 3, 20])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_the_self_check_passes_on_causal_models_whatever_the_rows(family, length):
    ids = np.arange(length, dtype=np.int32)
    assert check_scoring(scoring_model(family), [(ids[:1], ids[1:])], tolerance=1e-3) < TOLERANCE
    same = np.full(length, 96, dtype=np.int32)
    assert check_scoring(scoring_model(family), [(same[:1], same[1:])], tolerance=1e-3) < TOLERANCE


BIDIRECTIONAL = {
    "an encoder's configuration": {"is_causal": False},
    "EmbeddingGemma": {"use_bidirectional_attention": True},
}


@pytest.mark.parametrize("length", [2, 3, 12])
@pytest.mark.parametrize("fields", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL.keys())
def test_a_model_that_attends_to_later_tokens_is_refused_though_no_row_is_padded(fields, length):
    """Rows of one length score as the model's own logits do, and would score otherwise in another batch."""
    if "is_causal" in fields:
        model = tiny_model("llama", **fields)
    else:
        config = transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.4,
            **fields,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    add_scoring_forward(model)
    rows = [(row[:1], row[1:]) for row in np.random.default_rng(0).integers(0, VOCABULARY, (2, length), np.int32)]
    batch = pad_sequences(rows)
    with torch.no_grad():
        naive = torch.cat([own_logps(model, row) for row in rows])
        torch.testing.assert_close(token_logps(model, batch).token_logps, naive)  # unpadded, nothing shows
    with pytest.raises(ModelError, match=r"attends to later tokens .* not a causal language model"):
        check_scoring(model, rows, tolerance=1e-3)


@pytest.mark.parametrize(
    "error", [KeyError("no such key"), AssertionError(), Exception("of no kind"), ZeroDivisionError]
)
def test_whatever_a_model_s_code_raises_is_one_message_with_its_family(error):
    def fail(*args, **kwargs):
        raise error

    model = fresh_model("llama")
    model.model.layers[1].mlp.forward = types.FunctionType(
        fail.__code__, {"__name__": "modeling_x"}, closure=fail.__closure__
    )
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM: this model family \(llama\) cannot be scored") as caught:
        check_scoring(model, random_rows(3), tolerance=1e-3)
    assert "\n" not in str(caught.value)
    assert (error if isinstance(error, type) else type(error)).__name__ in str(caught.value)


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(
        offline_kto.kto_core.scoring.logps,
        "other_ids",
        types.FunctionType(_mistake.__code__, {"__name__": "offline_kto.kto_core.scoring.logps"}),
    )
    with pytest.raises(KeyError, match="ours"):
        check_scoring(scoring_model("llama"), random_rows(3), tolerance=1e-3)


def _mistake(*args):
    return {}["ours"]


def test_memory_that_runs_out_is_not_the_model_s_fault(monkeypatch):
    model = fresh_model("llama")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    model.model.layers[1].mlp.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        check_scoring(model, random_rows(3), tolerance=1e-3)


@pytest.fixture
def sdpa_ignores_caps(monkeypatch):
    """The kernel as it was before transformers 5.24, which refuses to compute a capped model with it."""
    kernels = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    kernel = kernels["sdpa"]
    monkeypatch.setitem(kernels, "sdpa", lambda *args, softcap=None, **kwargs: kernel(*args, **kwargs))


def capped(family="gemma2", **fields):
    """Gemma 2 at a cap that binds, under sdpa, which ignores the cap; and its definition, eager, in float64."""
    fields = {"attn_logit_softcapping": 1.0, **fields}
    if family == "gemma2":
        model = tiny_model(family, **fields)
    else:
        config = transformers.VaultGemmaConfig(
            **{
                **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
                **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8},
                **{"initializer_range": 0.4, **fields},
            }
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    definition = copy.deepcopy(model).double()
    definition.set_attn_implementation("eager")
    model._supports_sdpa = True  # transformers 5.24 would not choose it
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    return model, definition


@pytest.mark.usefixtures("sdpa_ignores_caps")
@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_capped_attention_is_computed_with_its_cap(family):
    model, definition = capped(family)
    rows = random_rows(4)
    with torch.no_grad():
        right = torch.cat([own_logps(definition, row) for row in rows])
        without = torch.cat([own_logps(model, row) for row in rows])
        add_scoring_forward(model)
        scored = token_logps(model, pad_sequences(rows)).token_logps
    assert (without - right).abs().max() > 0.1
    torch.testing.assert_close(scored, right, atol=TOLERANCE, rtol=0, check_dtype=False)
    assert model.config._attn_implementation == "eager"


def test_attention_without_a_cap_stays_as_it_was():
    model, _ = capped(attn_logit_softcapping=None)
    add_scoring_forward(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "field", ["attn_logit_softcapping", "attention_logit_cap", "attn_soft_cap", "attention_logits_soft_cap"]
)
def test_a_cap_is_known_by_its_configuration(field):
    text = transformers.LlamaConfig(**{field: 30.0})
    whole = transformers.LlavaConfig(text_config=text)
    assert caps_attention(text)
    assert caps_attention(whole)
    assert not caps_attention(transformers.LlamaConfig(**{field: None}))
    assert not caps_attention(transformers.Gemma2Config(attn_logit_softcapping=None, final_logit_softcapping=30.0))


@pytest.mark.usefixtures("sdpa_ignores_caps")
def test_the_self_check_refuses_a_kernel_that_leaves_something_out(monkeypatch):
    """Leave out a soft cap, as for a family whose name for it is unknown."""
    monkeypatch.setattr(offline_kto.kto_core.scoring.attention, "caps_attention", lambda config: False)
    model, _ = capped()
    add_scoring_forward(model)
    with pytest.raises(ModelError, match=r'sdpa attention omits .*\(gemma2\).*"attn_implementation": "eager"'):
        check_scoring(model, random_rows(3), tolerance=1e-3)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(ModelError, match="no linear output layer"):
        Head.of(SimpleNamespace(get_output_embeddings=lambda: None))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_added_in_place_are_those_of_autograd(family, autocast):
    """Over two micro-batches, with tied and untied weights, scaled embeddings and a padding row."""
    batches = [pad_sequences(random_rows(3, seed=seed)) for seed in (0, 1)]
    gradients = []
    for in_place in (False, True):
        model = fresh_model(family)
        for weight in add_gradients_in_place(model) if in_place else []:
            weight.grad = torch.zeros_like(weight)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                token_logps(model, batch).token_logps.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].layout == torch.strided
        torch.testing.assert_close(found[name], gradient, atol=2e-2 if autocast else 2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_adding_in_place_makes_no_tensor_of_the_vocabulary_s_size(family, monkeypatch):
    monkeypatch.setattr(offline_kto.kto_core.scoring.head, "_CHUNK_ELEMENTS", {"cpu": 8 * 4001})
    model, batch = fresh_model(family, vocab_size=4001), pad_sequences(random_rows(8, longest=40))
    sizes = []
    for in_place in (False, True):
        for weight in add_gradients_in_place(model) if in_place else []:
            weight.grad = torch.zeros_like(weight)
        there = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        with LargestTensor(besides=there) as largest:
            token_logps(model, batch).token_logps.sum().backward()
        sizes.append(largest.elements)
    weight = model.get_input_embeddings().weight
    assert sizes[0] >= weight.numel()
    assert sizes[1] <= 8 * 4001 < weight.numel()


def test_frozen_weights_get_no_gradient_in_place():
    assert add_gradients_in_place(fresh_model("llama").requires_grad_(False)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_as_that(value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 2] = value
    add_scoring_forward(model)
    with pytest.raises(ModelError, match="its own log-probabilities are infinite or NaN"):
        check_scoring(model, random_rows(2), tolerance=1e-3)
