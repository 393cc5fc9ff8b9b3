"""Pairing on arrays makes the choices of the naive version, row for row, and raises its errors."""

import random
from collections.abc import Callable, Sequence
from functools import partial

import naive_pairing
import pairable_rows
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive_pairing import PairableRow

from offline_kto.kto_core.errors import PairingError
from offline_kto.kto_core.feedback import pairing

Outcome = tuple[list[list[int]], int, int, int] | str
Pair = Callable[..., naive_pairing.Pairing | pairing.Pairing]

# Equal in their first halves, in their last halves, or in both; and ordered otherwise if a byte were read as signed.
IDS = [f"{high:016x}{low:016x}" for high in (0, 1, 2**63) for low in (0, 1, 2**63)]


def outcome(pair: Pair, rows: Sequence[PairableRow], partners: int) -> Outcome:
    """Return what a call returns, or the words of its error."""
    try:
        found = pair(rows, partners=partners)
    except PairingError as error:
        return str(error)
    chosen = [[int(t) for t in mine] for mine in found.partners]
    return chosen, found.same_prompt, found.same_completion, found.most_served


def assert_same(name: str, rows: Sequence[PairableRow], partners: int, **options: int) -> None:
    naive, arrays = (partial(getattr(module, name), **options) for module in (naive_pairing, pairable_rows))
    assert outcome(arrays, rows, partners) == outcome(naive, rows, partners)


@st.composite
def groups(draw: st.DrawFn) -> list[PairableRow]:
    """Rows of few prompts, few completions and few ids, so that most rows conflict and many are identical."""
    prompts, completions = (draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=6)) for _ in range(2))
    some = st.tuples(st.sampled_from(prompts), st.sampled_from(completions), st.booleans(), st.integers(0, 2))
    many = st.lists(some, max_size=60)
    mostly = draw(st.lists(st.just(draw(some)), max_size=40))
    drawn = draw(st.permutations([*mostly, *draw(many)]))
    # As in real rows: an id belongs to one prompt. Further rows of the prompt with the same text may differ in the id.
    return [
        PairableRow(prompt[:30] + f"{n}" + completion[-1], prompt, completion, label)
        for prompt, completion, label, n in drawn
    ]


@settings(max_examples=400)
@given(groups(), st.integers(1, 4), st.integers(0, 3))
@example([], 1, 0)
def test_shuffled(rows: list[PairableRow], partners: int, seed: int) -> None:
    assert_same("pair_shuffled", rows, partners, seed=seed)


@settings(max_examples=400)
@given(groups(), st.integers(1, 4), st.integers(1, 70))
@example([], 1, 4)
@pytest.mark.slow
def test_rotate(rows: list[PairableRow], partners: int, block: int) -> None:
    assert_same("pair_rotate", rows, partners, block=block)


def rows_of(count: int, prompts: int, completions: int, rng: random.Random) -> list[PairableRow]:
    drawn = [(rng.randrange(prompts), rng.randrange(completions), rng.random() < 0.5) for _ in range(count)]
    return [pairable_rows.hashed((p, c), p, c, label) for p, c, label in drawn]


@pytest.mark.parametrize("partners", [1, 3])
@pytest.mark.parametrize(
    ("prompts", "completions"), [(10**6, 10**6), (700, 10**6), (2, 10**6), (10**6, 2), (40, 3), (30, 30)]
)
@pytest.mark.parametrize("count", [700, pytest.param(2_000, marks=pytest.mark.slow)])
def test_many_rows(count: int, prompts: int, completions: int, partners: int) -> None:
    rows = rows_of(count, prompts, completions, random.Random(f"{prompts}/{completions}"))
    assert_same("pair_shuffled", rows, partners, seed=7)
    assert_same("pair_rotate", rows, partners, block=32)
    assert_same("pair_rotate", rows, partners, block=count - 1)


@pytest.mark.parametrize("partners", [1, 2, 4])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.98])
@pytest.mark.parametrize("count", [500, pytest.param(1_500, marks=pytest.mark.slow)])
def test_a_prompt_of_many_rows_hands_out_the_others_in_turn(count: int, share: float, partners: int) -> None:
    rng = random.Random(f"{share}")
    rows = [
        pairable_rows.hashed(i, "often" if rng.random() < share else i % 9, rng.choice(("yes", i)))
        for i in range(count)
    ]
    assert_same("pair_shuffled", rows, partners, seed=1)


@pytest.mark.parametrize("block", [2, 3, 5])
def test_how_far_rotate_searches_between_identical_rows(block: int) -> None:
    first, second, same = (pairable_rows.hashed(name, name, name) for name in "abc")
    for partners in range(1, block):
        for between in range(4 * block):
            for after in range(4 * block):
                rows = [*[same] * between, first, second, *[same] * after]
                assert_same("pair_rotate", rows, partners, block=block)
