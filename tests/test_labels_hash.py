"""The hash of labels, which is the same however its rows are encoded."""

import hashlib

import pyarrow as pa
import pytest

from offline_kto.kto_core.cache.labels_hash import encoded_labels
from offline_kto.kto_core.hashing import ListHash, json_hash


@pytest.mark.parametrize("with_pairs", [False, True])
def test_rows_that_arrow_encodes_have_the_hash_of_their_json(with_pairs: bool) -> None:
    ids = [hashlib.sha256(bytes([i])).hexdigest()[:32] for i in range(50)]
    pairs = [None if not with_pairs or i % 3 == 0 else ids[i // 2] for i in range(50)]
    labels, sources = [i % 3 == 1 for i in range(50)], [i * 10**i % 2**40 for i in range(50)]
    columns = {"row_id": ids, "label": labels, "pair_id": pa.array(pairs, pa.string()), "source": sources}
    table = pa.table(columns)
    hasher = ListHash()
    for start in (0, 20, 50):
        hasher.add_encoded(encoded_labels(table.slice(start, 20 if start == 0 else 30), ()))
    assert hasher.hexdigest() == json_hash([[*entry] for entry in zip(ids, labels, pairs, sources, strict=True)])
