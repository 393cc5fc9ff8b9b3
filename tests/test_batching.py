import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_core.batching import micro_batches

lengths_strategy = st.lists(st.integers(1, 60), max_size=80)
budget_strategy = st.integers(1, 300)


@given(lengths_strategy, budget_strategy)
def test_every_position_once(lengths, max_tokens):
    positions = [i for batch in micro_batches(lengths, max_tokens) for i in batch]
    assert sorted(positions) == list(range(len(lengths)))


@given(lengths_strategy, budget_strategy)
def test_padded_tokens_stay_below_the_budget_unless_a_row_alone_exceeds_it(lengths, max_tokens):
    for batch in micro_batches(lengths, max_tokens):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


@given(lengths_strategy, budget_strategy)
def test_longest_first(lengths, max_tokens):
    order = [lengths[i] for batch in micro_batches(lengths, max_tokens) for i in batch]
    assert order == sorted(lengths, reverse=True)


@given(lengths_strategy, budget_strategy)
def test_a_batch_is_closed_only_when_the_next_row_does_not_fit(lengths, max_tokens):
    for batch in micro_batches(lengths, max_tokens)[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > max_tokens


@given(lengths_strategy, budget_strategy, st.randoms(use_true_random=False))
def test_the_cut_depends_on_nothing_but_the_lengths(lengths, max_tokens, shuffler: random.Random):
    shuffled = shuffler.sample(lengths, len(lengths))
    cut = [[lengths[i] for i in batch] for batch in micro_batches(lengths, max_tokens)]
    cut_of_shuffled = [[shuffled[i] for i in batch] for batch in micro_batches(shuffled, max_tokens)]
    assert cut == cut_of_shuffled


def test_equal_lengths_keep_their_order():
    assert micro_batches([3, 5, 3, 5, 3], 10) == [[1, 3], [0, 2, 4]]


def test_a_row_beyond_the_budget_is_scored_alone():
    assert micro_batches([2, 50, 2], 4) == [[1], [0, 2]]


def test_no_rows_no_batches():
    assert micro_batches([], 16) == []


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_a_budget_below_one_token_is_our_own_mistake(max_tokens):
    with pytest.raises(ValueError, match=f"at least 1, got {max_tokens}"):
        micro_batches([1], max_tokens)
