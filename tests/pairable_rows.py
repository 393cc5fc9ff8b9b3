"""Rows for pairing written one by one, as the arrays that `kto_core/feedback/pairing.py` reads."""

import hashlib
from collections.abc import Sequence

import numpy as np
from naive_pairing import PairableRow

from offline_kto.kto_core.feedback import pairing
from offline_kto.kto_core.hashing import id_array


def hashed(row: object, prompt: object, completion: object, label: bool = True) -> PairableRow:
    """Return a row whose ids are those of any values."""
    return PairableRow(_id_of(row), _id_of(prompt), _id_of(completion), label)


def _id_of(value: object) -> str:
    return hashlib.blake2b(str(value).encode(), digest_size=16).hexdigest()


def columns(rows: Sequence[PairableRow]) -> pairing.PairableRows:
    return pairing.PairableRows(
        id_array(row.row_id for row in rows),
        id_array(row.prompt_id for row in rows),
        id_array(row.completion_id for row in rows),
        np.array([row.label for row in rows], dtype=bool),
    )


def pair_shuffled(rows: Sequence[PairableRow], *, partners: int, seed: int) -> pairing.Pairing:
    return pairing.pair_shuffled(columns(rows), partners=partners, seed=seed)


def pair_rotate(rows: Sequence[PairableRow], *, partners: int, block: int) -> pairing.Pairing:
    return pairing.pair_rotate(columns(rows), partners=partners, block=block)
