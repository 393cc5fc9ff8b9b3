"""Check that concatenated sequences do not see each other, and have the scores of sequences in separate rows."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.logps import other_ids, token_logps
from offline_kto.kto_core.scoring.output_layer import whole_shape
from offline_kto.kto_core.scoring.sequences import Sequences, TokenIds, pack_sequences, pad_sequences

# How far a row's scores may move when its neighbour's ids change, times their movement in separate rows. That is 0
# unless rows of a pass share a computation: the tokens of all rows that go to one expert are multiplied together.
_MARGIN = 10


class Packing(NamedTuple):
    """How the scores of two sequences depend on being concatenated, nats per token.

    Attributes:
        moved: the largest change of one sequence's scores when the other's ids change.
        moved_apart: the same with the two in separate rows.
        differs: the mean difference between concatenated sequences and separate rows.
    """

    moved: float
    moved_apart: float
    differs: float

    def why_not(self, tolerance: float) -> str | None:
        """Return why sequences cannot be concatenated; None if they can.

        Args:
            tolerance: largest `differs` that rounding can explain.
        """
        if not self.moved <= _MARGIN * self.moved_apart:
            return f"scores of a sequence would move by {self.moved:.2g} nats a token with the ids of the one before it"
        if not self.differs <= tolerance:
            return f"log-probabilities would differ by {self.differs:.2g} nats a token"
        return None


@torch.no_grad()
def measure_packing(
    model: Model,
    device: torch.device,
    rows: Sequence[TokenIds],
    layout: Callable[[Sequence[TokenIds]], Sequences] = pack_sequences,
    *,
    keep_prompts: bool = False,
) -> Packing:
    """Measure whether sequences see each other when they are concatenated, in eval mode.

    The ids of one sequence are changed, and nothing else: shapes and boundaries stay, so that a kernel that keeps the
    sequences apart computes the same numbers for the other one, bit for bit.

    Args:
        model: prepared by `add_scoring_forward`, wrapped or not.
        rows: two sequences.
        layout: concatenates them.
        keep_prompts: whether only the ids of completions are changed.
    """
    model.eval()

    def scores(layout: Callable[[Sequence[TokenIds]], Sequences], both: Sequence[TokenIds]) -> tuple[Tensor, ...]:
        found = token_logps(model, layout(both).to(device)).token_logps
        return found.split([len(completion) for _, completion in both])

    def moved(layout: Callable[[Sequence[TokenIds]], Sequences], first: Tensor, second: Tensor) -> float:
        _, untouched = scores(layout, [changed[0], rows[1]])
        earlier, _ = scores(layout, [rows[0], changed[1]])
        return max(_largest(second - untouched), _largest(first - earlier))

    change = functools.partial(_changed, rows=rows, vocabulary=whole_shape(model.get_input_embeddings().weight)[0])
    changed = [(row[0], change(row)[1]) if keep_prompts else change(row) for row in rows]
    packed, apart = scores(layout, rows), scores(pad_sequences, rows)
    return Packing(
        moved=moved(layout, *packed),
        moved_apart=moved(pad_sequences, *apart),
        differs=float((torch.cat(packed) - torch.cat(apart)).abs().nan_to_num(nan=float("inf")).mean()),
    )


def _changed(row: TokenIds, rows: Sequence[TokenIds], vocabulary: int) -> TokenIds:
    known = np.concatenate([part for one in rows for part in one])
    prompt, completion = (other_ids(part, known, vocabulary).astype(part.dtype) for part in row)
    return prompt, completion


def _largest(differences: Tensor) -> float:
    return float(differences.abs().nan_to_num(nan=float("inf")).max())
