"""Return the ids and lengths of all sequences of a plan as arrays, a few bytes for each."""

from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.hashing import sequence_id
from offline_kto.precompute.plan import Plan


class SequenceIds(NamedTuple):
    """The sequences of a plan: of each row (x, y), then each (x, y').

    Attributes:
        ids: `sequence_id` as 16 bytes, shape (rows, sequences of a row), dtype V16.
        tokens: prompt and completion together, int32, of the same shape.
    """

    ids: np.ndarray
    tokens: np.ndarray


def sequence_ids(plan: Plan) -> SequenceIds:
    """Compute ids and lengths of all sequences of a plan."""
    rows = len(plan.rows)
    width = len(plan.sequences(0))
    ids = np.empty((rows, width), dtype="V16")
    tokens = np.empty((rows, width), dtype=np.int32)
    for i in range(rows):
        for slot, (prompt, completion) in enumerate(plan.sequences(i)):
            ids[i, slot] = np.void(bytes.fromhex(sequence_id(prompt, completion)))
            tokens[i, slot] = len(prompt) + len(completion)
    return SequenceIds(ids, tokens)
