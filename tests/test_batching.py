import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.kto_core.scoring.batching import deal, micro_batches, packed_batches

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


def waste(batches, lengths, max_tokens, pass_cost):
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return padded + len(batches) * pass_cost * max_tokens


def all_cuts(order):
    """Every way to cut an ordered list into runs."""
    for number in range(2 ** max(0, len(order) - 1)):
        cut = [[order[0]]] if order else []
        for place, i in enumerate(order[1:]):
            if number >> place & 1:
                cut.append([i])
            else:
                cut[-1].append(i)
        yield cut


@given(st.lists(st.integers(1, 60), max_size=9), budget_strategy, st.sampled_from([0.0, 1 / 256, 1 / 32, 1 / 4]))
def test_no_other_cut_wastes_less(lengths, max_tokens, pass_cost):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    allowed = [
        cut
        for cut in all_cuts(order)
        if all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_tokens for batch in cut)
    ]
    least = min(waste(cut, lengths, max_tokens, pass_cost) for cut in allowed)
    found = micro_batches(lengths, max_tokens, pass_cost=pass_cost)
    assert waste(found, lengths, max_tokens, pass_cost) == pytest.approx(least)


@given(lengths_strategy, budget_strategy)
def test_packed_batches_hold_every_position_once_and_stay_below_the_budget(lengths, max_tokens):
    batches = packed_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens


@given(lengths_strategy, st.integers(1, 9))
def test_shares_hold_every_position_once_and_are_nearly_even(costs, ranks):
    shares = deal(costs, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


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
