import sys
from collections import Counter
from functools import partial

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from naive_pairing import PairableRow
from pairable_rows import hashed, pair_rotate, pair_shuffled

from offline_kto.kto_core.errors import PairingError


def row(prompt, completion, label=True):
    return hashed(f"{prompt}/{completion}", prompt, completion, label)


def unique_prompts(count):
    return [row(i, f"c{i}") for i in range(count)]


def one_prompt_holds(held, count):
    """`count` rows, of which the prompt "big" holds `held`; the others stand between them, one prompt each."""
    every = count / (count - held)
    others = {int(i * every) for i in range(count - held)}
    return [row(f"p{i}" if i in others else "big", f"c{i}") for i in range(count)]


def largest_group(rows):
    return max(Counter(r.prompt_id for r in rows).values())


def times_served(rows, pairing):
    served = Counter(t for mine in pairing.partners for t in mine)
    return [served[i] for i in range(len(rows))]


def by_content(rows, pairing):
    """Return the pairs by content, whatever their positions."""
    return Counter(
        (r.row_id, tuple(rows[t].completion_id for t in mine)) for r, mine in zip(rows, pairing.partners, strict=True)
    )


def check_valid(rows, pairing, partners):
    assert len(pairing.partners) == len(rows)
    for i, mine in enumerate(pairing.partners):
        assert len(set(mine)) == len(mine) == partners
        assert all(rows[t].prompt_id != rows[i].prompt_id for t in mine)
    assert pairing.same_prompt == 0
    assert pairing.same_completion == sum(
        rows[t].completion_id == rows[i].completion_id for i, mine in enumerate(pairing.partners) for t in mine
    )
    assert pairing.most_served == max(times_served(rows, pairing))


@st.composite
def any_rows(draw, *, distinct_completions=False):
    """Any multiset of prompts with at least two of them: repeated rows, contradictory labels, groups of any size."""
    prompts = draw(st.lists(st.integers(0, 6), min_size=2, max_size=24))
    assume(len(set(prompts)) >= 2)
    return [
        row(p, i if distinct_completions else draw(st.integers(0, 3)), draw(st.booleans()))
        for i, p in enumerate(prompts)
    ]


seeds = st.integers(0, 5)


@given(any_rows(), st.integers(1, 4), seeds)
def test_partners_are_distinct_rows_of_other_prompts(rows, partners, seed):
    assume(len(rows) - largest_group(rows) >= partners)
    check_valid(rows, pair_shuffled(rows, partners=partners, seed=seed), partners)


@given(any_rows(), seeds)
def test_one_partner_is_a_permutation_unless_a_prompt_holds_more_than_half(rows, seed):
    assume(2 * largest_group(rows) <= len(rows))
    served = times_served(rows, pair_shuffled(rows, partners=1, seed=seed))
    assert set(served) == {1}


@given(any_rows(distinct_completions=True), st.integers(1, 3), seeds)
def test_each_completion_serves_exactly_k_times(rows, partners, seed):
    """With K up to a quarter of the rows such a choice always exists; near K = rows it need not."""
    assume(2 * largest_group(rows) <= len(rows) and 4 * partners <= len(rows))
    served = times_served(rows, pair_shuffled(rows, partners=partners, seed=seed))
    assert set(served) == {partners}


@given(any_rows(), st.integers(1, 2), seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_file_changes_no_pair(rows, partners, seed, shuffler):
    assume(len(rows) - largest_group(rows) >= partners)
    shuffled = shuffler.sample(rows, len(rows))
    pairs = by_content(rows, pair_shuffled(rows, partners=partners, seed=seed))
    assert by_content(shuffled, pair_shuffled(shuffled, partners=partners, seed=seed)) == pairs


@given(any_rows(), seeds)
def test_flipping_labels_changes_no_pair(rows, seed):
    """A changed label must cost no forward pass."""
    flipped = [PairableRow(r.row_id, r.prompt_id, r.completion_id, not r.label) for r in rows]
    pairs = by_content(rows, pair_shuffled(rows, partners=1, seed=seed))
    assert by_content(flipped, pair_shuffled(flipped, partners=1, seed=seed)) == pairs


def test_the_seed_decides():
    rows = unique_prompts(300)
    first, again, other = (pair_shuffled(rows, partners=1, seed=seed).partners.tolist() for seed in (0, 0, 1))
    assert first == again
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 15


def test_later_partners_are_more_partners_not_other_ones():
    rows = unique_prompts(50)
    one, three = (pair_shuffled(rows, partners=k, seed=0).partners.tolist() for k in (1, 3))
    assert [mine[:1] for mine in three] == one


def test_two_rows_take_each_other():
    assert pair_shuffled(unique_prompts(2), partners=1, seed=0).partners.tolist() == [[1], [0]]


@pytest.mark.parametrize("count", [3, 5, 7, 33])
@pytest.mark.parametrize("partners", [1, 2])
def test_odd_counts(count, partners):
    rows = unique_prompts(count)
    pairing = pair_shuffled(rows, partners=partners, seed=0)
    check_valid(rows, pairing, partners)
    assert pairing.most_served == partners


@pytest.mark.parametrize(("partners", "slack"), [(1, 1), (2, 4)])
def test_a_prompt_with_nine_tenths_of_the_rows_uses_all_others_alike(partners, slack):
    rows = one_prompt_holds(900, 1000)
    pairing = pair_shuffled(rows, partners=partners, seed=0)
    check_valid(rows, pairing, partners)
    served = [
        n for r, n in zip(rows, times_served(rows, pairing), strict=True) if r.prompt_id != row("big", "").prompt_id
    ]
    assert len(served) == 100
    assert max(served) - min(served) <= slack


@pytest.mark.parametrize("held", [1, 249, 250])
def test_a_prompt_with_at_most_half_of_the_rows_leaves_a_permutation(held):
    rows = one_prompt_holds(held, 500)
    pairing = pair_shuffled(rows, partners=1, seed=0)
    check_valid(rows, pairing, 1)
    assert set(times_served(rows, pairing)) == {1}


def test_heavy_duplication_with_contradictory_labels():
    rows = [row(i % 5, i % 5, label=i % 2 == 0) for i in range(200)]
    pairing = pair_shuffled(rows, partners=2, seed=0)
    check_valid(rows, pairing, 2)
    assert pairing.same_completion == 0


def test_a_short_vocabulary_of_answers_is_avoided_where_possible():
    """Half the answers are "yes", half "no": by chance every second y' would read like y."""
    rows = [row(i, ("yes", "no")[i % 2]) for i in range(400)]
    pairing = pair_shuffled(rows, partners=1, seed=0)
    check_valid(rows, pairing, 1)
    assert pairing.same_completion < 40


def test_one_completion_everywhere_is_paired_and_counted():
    rows = [row(i, "yes") for i in range(60)]
    pairing = pair_shuffled(rows, partners=2, seed=0)
    check_valid(rows, pairing, 2)
    assert pairing.same_completion == 120


@pytest.mark.parametrize("group", [1, 2, 5])
def test_an_appended_row_changes_few_pairs(group):
    rows = [row(i // group, f"c{i}") for i in range(500)]
    more = [*rows, row("new", "new")]
    before = by_content(rows, pair_shuffled(rows, partners=1, seed=0))
    after = by_content(more, pair_shuffled(more, partners=1, seed=0))
    assert (after - before).total() <= 6


LINES_A_ROW = 1_000  # a search through all rows for each of them would be beyond 8,000


@pytest.mark.parametrize("partners", [1, 2])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(unique_prompts(8_000), id="unique"),
        pytest.param(one_prompt_holds(4_000, 8_000), id="half"),
        pytest.param(one_prompt_holds(7_920, 8_000), id="99 %"),
        pytest.param([row(i % 2, i) for i in range(8_000)], id="two prompts"),
        pytest.param([row(i, "yes") for i in range(8_000)], id="one completion"),
        pytest.param([row(i % 100, i % 100) for i in range(8_000)], id="duplicates"),
    ],
)
def test_the_work_grows_with_the_rows_and_not_with_their_square(rows, partners):
    """Counted, since seconds would be a test of the machine: executed lines."""
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += 1
        return count

    tracing = sys.gettrace()
    sys.settrace(count)
    try:
        pairing = pair_shuffled(rows, partners=partners, seed=0)
    finally:
        sys.settrace(tracing)
    assert lines < LINES_A_ROW * len(rows) * partners
    check_valid(rows, pairing, partners)


@pytest.mark.parametrize("pair", [partial(pair_shuffled, seed=0), partial(pair_rotate, block=4)])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "0 row"),
        (unique_prompts(1), "1 row is left.*at least two rows with different prompts"),
        ([row("same", i) for i in range(7)], "All 7 rows share one prompt.*Add feedback on other prompts"),
    ],
)
def test_data_without_another_prompt_are_refused(pair, rows, words):
    with pytest.raises(PairingError, match=words):
        pair(rows, partners=1)


def test_more_partners_than_other_prompts_have_rows_are_refused():
    rows = one_prompt_holds(7, 10)
    pair_shuffled(rows, partners=3, seed=0)
    with pytest.raises(PairingError, match=r"--kl-partners 4 .*7 of 10 rows, which leaves 3. Lower --kl-partners"):
        pair_shuffled(rows, partners=4, seed=0)


def test_rotate_takes_the_row_before_and_wraps_in_each_block():
    pairing = pair_rotate(unique_prompts(7), partners=1, block=4)
    assert pairing.partners.tolist() == [[3], [0], [1], [2], [6], [4], [5]]
    assert (pairing.same_prompt, pairing.most_served) == (0, 1)


def test_rotate_takes_further_partners_further_back():
    assert pair_rotate(unique_prompts(4), partners=2, block=4).partners.tolist() == [[3, 2], [0, 3], [1, 0], [2, 1]]


def test_rotate_keeps_partners_of_the_same_prompt_and_counts_them():
    """Paired data stand next to each other: here y' is a real answer to x in every second row."""
    rows = [row(i // 2, f"c{i}") for i in range(8)]
    pairing = pair_rotate(rows, partners=1, block=8)
    assert pairing.partners.tolist() == [[(i - 1) % 8] for i in range(8)]
    assert pairing.same_prompt == 4


def test_rotate_counts_partners_with_the_same_text():
    rows = [row(i, "yes") for i in range(6)]
    assert pair_rotate(rows, partners=1, block=3).same_completion == 6


@pytest.mark.parametrize(("count", "expected"), [(5, 3), (9, 7)])
def test_rotate_pairs_a_last_block_of_one_row_with_the_row_before_it(count, expected):
    """TRL pairs it with its own completion."""
    pairing = pair_rotate(unique_prompts(count), partners=1, block=4)
    assert pairing.partners[-1].tolist() == [expected]


def test_rotate_never_takes_an_identical_row():
    rows = [row("a", 1), row("a", 1), row("b", 2), row("b", 2), row("c", 3)]
    pairing = pair_rotate(rows, partners=1, block=2)
    assert all(rows[t].row_id != rows[i].row_id for i, (t,) in enumerate(pairing.partners))


@given(any_rows(distinct_completions=True), st.integers(1, 3), st.integers(2, 8))
def test_rotate_gives_distinct_partners_that_are_not_the_row_itself(rows, partners, block):
    assume(partners < min(block, len(rows)))
    pairing = pair_rotate(rows, partners=partners, block=block)
    for i, mine in enumerate(pairing.partners):
        assert i not in mine
        assert len(set(mine)) == len(mine) == partners


def test_rotate_between_identical_rows_is_refused():
    rows = [row("a", 1)] * 40 + [row("b", 2)]
    with pytest.raises(PairingError, match=r"the rows around it are identical. Remove duplicates"):
        pair_rotate(rows, partners=1, block=2)


def test_rotate_needs_blocks_longer_than_the_number_of_partners():
    with pytest.raises(PairingError, match=r"blocks of 4 rows, too few for --kl-partners 4. Raise --pairing-block"):
        pair_rotate(unique_prompts(9), partners=4, block=4)


def test_rotate_with_fewer_rows_than_partners_does_not_blame_duplicates():
    with pytest.raises(PairingError, match="--kl-partners") as caught:
        pair_rotate(unique_prompts(3), partners=3, block=8)
    assert "identical" not in str(caught.value)
