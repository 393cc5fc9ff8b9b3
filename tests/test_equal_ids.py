"""Equal ids are grouped as a dictionary of Python objects would group them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.kto_core import equal_ids
from offline_kto.kto_core.equal_ids import EqualIds, IdIndex
from offline_kto.kto_core.hashing import ID

# Equal in their first halves, in their last halves, or in both; with zeros at the end; ordered otherwise if a byte were signed.
SOME = [bytes(high) + bytes(low) for high in ([0] * 8, [0] * 7 + [1], [128] + [0] * 7) for low in ([0] * 8, [1] * 8)]


def array_of(ids: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(ids), dtype=ID)


@given(st.lists(st.tuples(st.sampled_from(SOME), st.booleans()), max_size=40), st.integers(1, 9))
def test_groups_are_those_of_a_naive_search(rows: list[tuple[bytes, bool]], at_once: int) -> None:
    ids, labels = [one for one, _ in rows], np.array([label for _, label in rows], dtype=bool)
    names = sorted(set(ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal_ids, "_AT_ONCE", at_once)  # ids that are compared across the ends of pieces
        found, by_label = EqualIds.of(array_of(ids)), EqualIds.of(array_of(ids), then_by=labels)
    places = range(len(ids))
    assert found.order.tolist() == sorted(places, key=lambda i: (ids[i], i))
    assert by_label.order.tolist() == sorted(places, key=lambda i: (ids[i], labels[i], i))
    assert found.heads.tolist() == by_label.heads.tolist()
    assert found.group_count == len(names)
    assert found.sizes.tolist() == [ids.count(name) for name in names]
    assert found.sums(labels).tolist() == [sum(labels[i] for i in places if ids[i] == name) for name in names]
    assert found.numbers().tolist() == [names.index(one) for one in ids]
    assert found.firsts().tolist() == [ids.index(one) for one in ids]
    assert [i for part in found.distinct(at_once) for i in part.tolist()] == [ids.index(name) for name in names]


@given(st.sets(st.sampled_from(SOME)) | st.sets(st.sampled_from(SOME[::2])), st.lists(st.sampled_from(SOME)))
def test_ids_are_found_among_others(known: set[bytes], wanted: list[bytes]) -> None:
    """Check ids that have the same first half, and ids that do not."""
    names = sorted(known)
    index = IdIndex(array_of(names), np.arange(len(names)) + 5)
    assert index.find(array_of(wanted)).tolist() == [names.index(one) + 5 if one in known else -1 for one in wanted]


def test_a_column_of_a_table_is_grouped() -> None:
    table = array_of([SOME[0], SOME[1], SOME[0], SOME[2]]).reshape(2, 2)
    assert EqualIds.of(table[:, 0]).group_count == 1
    assert EqualIds.of(table[:, 1]).group_count == 2
