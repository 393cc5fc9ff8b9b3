"""Scoring passes: sharing prompts and packing change no score, and a model that cannot share does not."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, random_rows, tiny_model

import offline_kto.kto_core.scoring.passes
from offline_kto.kto_core.scoring import transfer
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.kto_core.scoring.sequences import pack_sequences, pad_sequences
from offline_kto.kto_core.scoring.shared_prompts import SharedPrompts, share_prompts

TOLERANCE = 1e-4  # nats a token: another order of sums, on models whose logits reach 20


def model_of(family, **overrides):
    model = tiny_model(family, **overrides)
    add_scoring_forward(model)
    return model


def branching_rows(prompts, *, longest_prompt=24, longest_completion=16, seed=0):
    """For each prompt, in mixed order, as many completions as `prompts` says; some are a single token."""
    random = np.random.default_rng(seed)

    def ids(longest):
        return random.integers(0, VOCABULARY, int(random.integers(1, longest + 1))).astype(np.int32)

    rows = [(prompt, ids(longest_completion)) for count in prompts for prompt in [ids(longest_prompt)] * count]
    return [rows[i] for i in random.permutation(len(rows))]


def scores(passes, rows):
    """Per-token scores of each row, and the batches they came from."""
    results, batches = {}, []
    for done in passes.run(rows):
        pieces = done.token_logps.split([len(rows[i][1]) for i in done.indices])
        results.update(zip(done.indices, pieces, strict=True))
        batches.append(done.batch)
    assert sorted(results) == list(range(len(rows)))
    return [results[i] for i in range(len(rows))], batches


def alone(model, rows):
    with torch.no_grad():
        return [token_logps(model, pad_sequences([row])).token_logps for row in rows]


def assert_equal_scores(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < TOLERANCE


def passes_of(model, max_tokens, **options):
    return ScoringPasses(model, torch.device("cpu"), max_tokens=max_tokens, **options)


@pytest.mark.parametrize(("tokens", "room"), [(60, True), (10**6, True), (10**6, False)])
def test_passes_that_are_copied_together_score_alike(tokens, room, monkeypatch):
    """All in one transfer, in several, or in one each where a large one does not fit; values belong to their rows."""
    model, rows = model_of("llama"), branching_rows([3, 1, 2, 4, 2, 1])
    numbers = [np.full(1 + i % 3, float(i)) for i in range(len(rows))]
    real, copied = transfer.to_device, []

    def to_device(inputs, device):
        if isinstance(inputs, list):
            copied.append(len(inputs))
            if not room and len(inputs) > 1:
                raise torch.OutOfMemoryError("simulated")
        return real(inputs, device)

    monkeypatch.setattr(transfer, "_is_host", lambda device: False)
    monkeypatch.setattr(transfer, "TRANSFER_TOKENS", tokens)
    monkeypatch.setattr(offline_kto.kto_core.scoring.passes, "to_device", to_device)
    found = {}
    passes = 0
    for done in passes_of(model, 90).run(rows, values=numbers):
        passes += 1
        found.update(zip(done.indices, done.token_logps.split([len(rows[i][1]) for i in done.indices]), strict=True))
        assert done.where.tolist() == done.indices
        assert done.values.tolist() == [float(i) for i in done.indices for _ in range(1 + i % 3)]
    assert_equal_scores([found[i] for i in range(len(rows))], alone(model, rows))
    assert passes > 3
    assert sum(copied) == passes
    assert len(copied) == 1 if tokens == 10**6 else len(copied) > 1


# The windows of two are 4 tokens; the third attends in chunks.
SHARING = [family for family in FAMILIES if family not in ("gemma2", "mistral", "llama4")]


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("max_tokens", [1, 90, 1_000])
def test_shared_prompts_change_no_score(family, max_tokens, capsys):
    model, rows = model_of(family), branching_rows([3, 1, 2, 4, 2, 1])
    found, batches = scores(passes_of(model, max_tokens), rows)
    assert_equal_scores(found, alone(model, rows))
    assert any(isinstance(batch, SharedPrompts) for batch in batches)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("family", "limits"),
    [
        ("gemma2", {"sliding_window": 60}),
        ("mistral", {"sliding_window": 60}),
        ("gpt-neo", {"window_size": 60, "max_position_embeddings": 60}),
        ("mpt", {"max_seq_len": 60}),
        ("gpt2", {"n_positions": 60}),
    ],
)
@pytest.mark.parametrize("max_tokens", [200, 5_000])
def test_windows_and_tables_as_long_as_the_rows(family, limits, max_tokens, capsys):
    """No row is longer than 60 tokens; a padded prompt with another one's completion would be."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 60).astype(np.int32)
    rows = [(ids[:cut], ids[cut : 60 - less]) for cut in (5, 20, 35, 52) for less in (0, 2, 4)]
    model = model_of(family, **limits)
    found, batches = scores(passes_of(model, max_tokens), rows)
    assert_equal_scores(found, alone(model, rows))
    assert any(isinstance(batch, SharedPrompts) for batch in batches)
    assert capsys.readouterr().out == ""


def test_what_was_compared_on_short_rows_is_compared_again_on_longer_ones(capsys):
    """A model that forgets keys without saying so in its configuration."""
    model = model_of("mistral", sliding_window=40)
    model.config.sliding_window = None
    passes = passes_of(model, 2_000)
    model.config.sliding_window = 40
    short, long = branching_rows([3, 3], longest_prompt=20), branching_rows([3, 3], longest_prompt=200, seed=1)
    found, batches = scores(passes, short)
    assert_equal_scores(found, alone(model, short))
    assert all(isinstance(batch, SharedPrompts) for batch in batches)
    assert_equal_scores(scores(passes, long)[0], alone(model, long))
    assert "prompts are not shared between sequences" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_window_shorter_than_the_rows_is_not_shared_across(family, capsys):
    model, rows = model_of(family), branching_rows([3, 2, 2])
    found, batches = scores(passes_of(model, 1_000), rows)
    assert_equal_scores(found, alone(model, rows))
    assert not any(isinstance(batch, SharedPrompts) for batch in batches)
    assert "not shared between sequences: the shared path supports 4 tokens" in capsys.readouterr().out


def test_a_model_without_keys_and_values_runs_plain_and_says_so_once(capsys):
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    add_scoring_forward(model)
    passes, rows = passes_of(model, 90), branching_rows([3, 2, 2, 5, 4])
    for _ in range(2):
        assert_equal_scores(scores(passes, rows)[0], alone(model, rows))
    said = capsys.readouterr().out
    assert said.count("not shared between sequences: the model has recurrent layers") == 1


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_window_longer_than_the_rows_is_shared(family):
    model, rows = model_of(family, sliding_window=64), branching_rows([3, 2, 2, 4, 4])
    found, batches = scores(passes_of(model, 1_000), rows)
    assert_equal_scores(found, alone(model, rows))
    assert any(isinstance(batch, SharedPrompts) for batch in batches)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 400), st.integers(0, 1000))
def test_any_groups_and_budgets(prompts, max_tokens, seed):
    rows = branching_rows(prompts, seed=seed)
    found, _ = scores(passes_of(LLAMA, max_tokens), rows)
    assert_equal_scores(found, alone(LLAMA, rows))


LLAMA = model_of("llama")


def test_a_shared_prompt_runs_once():
    rows = branching_rows([4, 4])
    passes = passes_of(LLAMA, 1_000)
    scores(passes, rows)  # the first time some run both ways
    fed = sum(batch.tokens for batch in scores(passes, rows)[1])
    prompts = {row[0].tobytes(): len(row[0]) for row in rows}
    assert fed == sum(prompts.values()) + sum(len(completion) - 1 for _, completion in rows)


def test_the_first_time_gives_the_scores_of_every_later_time():
    """Bit for bit: a resumed run compares both ways in another update than one that was not stopped."""
    rows, passes = branching_rows([4, 3, 1]), passes_of(LLAMA, 60)
    first, again = scores(passes, rows)[0], scores(passes, rows)[0]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_reaches_no_position_that_no_row_has(family):
    """A long prompt beside a short one with longer completions; a table of positions has an end."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 60).astype(np.int32)
    rows = [(ids[:50], ids[50:]), (ids[:50], ids[40:50]), (ids[:20], ids[20:35]), (ids[:20], ids[25:40])]
    batch = share_prompts([rows[:2], rows[2:]], 1_000)
    (branch,) = batch.branches
    assert int(branch.position_ids.max()) < 60
    assert all(part.attention_mask.shape[1] <= 60 for part in share_prompts([rows[:2], rows[2:]], 1_000, 60).branches)
    model = model_of(family, max_position_embeddings=60) if family == "llama" else model_of(family, n_positions=60)
    with torch.no_grad():
        found = token_logps(model, batch).token_logps
    assert_equal_scores([found], [torch.cat(alone(model, rows))])


def test_completions_of_one_token_need_no_second_pass():
    prompt = np.arange(9, dtype=np.int32)
    rows = [(prompt, np.array([i], dtype=np.int32)) for i in (5, 6)]
    batch = share_prompts([rows], 100)
    assert batch.branches == ()
    with torch.no_grad():
        assert_equal_scores([token_logps(LLAMA, batch).token_logps], [torch.cat(alone(LLAMA, rows))])


def test_a_model_that_scores_otherwise_on_kept_keys_runs_plain(capsys):
    """Positions counted wrongly behind a cache: a fault that families have had."""
    model, rows = model_of("llama"), branching_rows([3, 3])
    real = model.model.forward

    def forward(*args, past_key_values=None, position_ids=None, **kwargs):
        if past_key_values is not None:
            position_ids = position_ids - position_ids[:, :1]
        return real(*args, past_key_values=past_key_values, position_ids=position_ids, **kwargs)

    expected = alone(model, rows)
    model.model.forward = forward
    found, batches = scores(passes_of(model, 1_000), rows)
    assert_equal_scores(found, expected)
    assert not any(isinstance(batch, SharedPrompts) for batch in batches)
    assert "prompts are not shared between sequences: log-probabilities would differ by" in capsys.readouterr().out


def test_a_model_that_takes_no_keys_runs_plain(capsys):
    model, rows = model_of("llama"), branching_rows([3, 3])
    real = model.model.forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise NotImplementedError("no cache here")
        return real(*args, **kwargs)

    model.model.forward = forward
    assert_equal_scores(scores(passes_of(model, 1_000), rows)[0], alone(LLAMA, rows))
    assert "cannot continue from a key/value cache (NotImplementedError)" in capsys.readouterr().out


def test_no_memory_for_the_proof_means_no_sharing(capsys):
    """Four prompts at once can be more than a pass of the budget."""
    model, rows = model_of("llama"), branching_rows([3, 3])
    real, calls = model.model.forward, []

    def forward(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("simulated")
        return real(*args, **kwargs)

    model.model.forward = forward
    found, batches = scores(passes_of(model, 100), rows)
    assert_equal_scores(found, alone(LLAMA, rows))
    assert not any(isinstance(batch, SharedPrompts) for batch in batches)
    assert "not enough memory to compare both ways" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_in_bfloat16_sharing_moves_a_score_less_than_the_precision_does(family):
    model, rows = model_of(family), branching_rows([4, 3, 4, 2], longest_prompt=40, longest_completion=30)
    exact = torch.cat(alone(model, rows))
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.cat(alone(model, rows))
        found, batches = scores(passes_of(model, 1_000, tolerance=0.2), rows)
    assert any(isinstance(batch, SharedPrompts) for batch in batches)
    rounding = (plain - exact).abs()
    apart = (torch.cat(found) - plain).abs()
    assert apart.mean() < rounding.mean()  # equal to the last bit on some processors
    assert apart.max() < 1.5 * rounding.max()


PACKING = [family for family in FAMILIES if family not in ("opt", "mpt", "xglm")]


@pytest.mark.parametrize("family", PACKING)
def test_packed_sequences_score_as_padded_ones(family):
    """On a CPU `transformers` keeps packed sequences apart with a mask; flash and flex attention read the boundaries."""
    model, rows = model_of(family), random_rows(9)
    found, batches = scores(passes_of(model, 60, pack=True, alone=False), rows)
    assert_equal_scores(found, alone(model, rows))
    assert all(batch.tokens == batch.padded_tokens for batch in batches)
    assert any(batch.rows > 1 for batch in batches)


def test_packed_sequences_have_the_same_gradients():
    model, rows = model_of("llama-tied").train(), random_rows(6)
    gradients = []
    for lay_out in (pad_sequences, pack_sequences):
        model.zero_grad()
        token_logps(model, lay_out(rows)).token_logps.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_where_ranks_must_keep_step_nothing_is_shared_and_empty_passes_are_added(monkeypatch):
    made = []
    real = ScoringPasses._forward
    monkeypatch.setattr(ScoringPasses, "_forward", lambda *a: made.append(a[1]) or real(*a))
    passes = passes_of(LLAMA, 1_000, alone=False)
    rows = branching_rows([3, 3])
    done = list(passes.run(rows, at_least=4))
    assert len(made) == 4
    assert made[len(done) :] == [[]] * (4 - len(done))
    assert len(done) == passes.passes_for([len(p) + len(c) for p, c in rows])


def test_scoring_is_in_eval_mode_and_without_gradient():
    model = model_of("llama").train()
    done = next(passes_of(model, 100).run(random_rows(2)))
    assert not model.training
    assert not done.token_logps.requires_grad
