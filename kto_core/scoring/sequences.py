"""Lay out sequences for one forward pass: ids, positions, and which hidden state predicts which token.

padded    p0 p1 c0 c1 c2     packed    p0 p1 c0 c1 c2 q0 d0 d1
          q0 d0 d1 .  .                 0  1  2  3  4  0  1  2    (positions)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.scoring.transfer import to_device

TokenIds = tuple[np.ndarray, np.ndarray]  # prompt ids, completion ids

# A dummy sequence for ranks that must run a forward pass but have no rows left.
FILLER: TokenIds = (np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))


class Sequences(NamedTuple):
    """One micro-batch. Indices are computed on the host, because reading a mask on a GPU would block its queue.

    Attributes:
        input_ids: int64, shape (batch, length).
        position_ids: int64, shape (batch, length).
        real: bool, shape (batch, length), false at padding.
        predicts: int64, shape (completion tokens,): index of the hidden state, of batch * length, that predicts each.
        targets: int64, shape (completion tokens,): their ids.
        row_of_token: int64, shape (completion tokens,): the row each belongs to.
        rows: number of sequences; equal to `batch` if padded, more if packed.
        tokens: number of tokens without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    real: Tensor
    predicts: Tensor
    targets: Tensor
    row_of_token: Tensor
    rows: int
    tokens: int

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "Sequences":
        return to_device(self, device)


def pad_sequences(rows: Sequence[TokenIds]) -> Sequences:
    """Right-pad (prompt ids, completion ids) pairs.

    Right padding needs no attention mask under causal attention: later tokens never affect earlier ones. Pad ids are 0
    (any valid id would do); they are neither attended to nor scored.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.broadcast_to(np.arange(width), ids.shape)
    starts = np.arange(len(rows)) * width
    for i, (prompt, completion) in enumerate(rows):
        ids[i, : len(prompt)] = prompt
        ids[i, len(prompt) : len(prompt) + len(completion)] = completion
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in rows])
    return _sequences(rows, ids, positions, positions < lengths[:, None], starts)


def pack_sequences(rows: Sequence[TokenIds]) -> Sequences:
    """Concatenate (prompt ids, completion ids) pairs into one row, without padding.

    Positions begin at 0 in each of them: `transformers` distinguishes the sequences by this. Only attention
    kernels that use these boundaries (flash, flex) run faster with it.
    """
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids = np.concatenate([part for row in rows for part in row]).astype(np.int64)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return _sequences(rows, ids, positions, np.ones(ids.shape, dtype=bool), starts)


def _sequences(
    rows: Sequence[TokenIds], ids: np.ndarray, positions: np.ndarray, real: np.ndarray, starts: np.ndarray
) -> Sequences:
    # The hidden state at t predicts token t + 1.
    predicts = [
        start + len(prompt) - 1 + np.arange(len(completion))
        for start, (prompt, completion) in zip(starts, rows, strict=True)
    ]
    return Sequences(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.array(positions, order="C")),
        real=torch.from_numpy(real),
        predicts=torch.from_numpy(np.concatenate(predicts)),
        targets=torch.from_numpy(np.concatenate([completion for _, completion in rows]).astype(np.int64)),
        row_of_token=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(completion) for _, completion in rows])),
        rows=len(rows),
        tokens=int(real.sum()),
    )


def sum_rows(token_logps: Tensor, row_of_token: Tensor, rows: int) -> Tensor:
    """Sum per-token log-probs into `logps`.

    Args:
        token_logps: shape (completion tokens,).
        row_of_token: int64, shape (completion tokens,).
        rows: number of rows.

    Returns:
        float64 nats, shape (rows,).
    """
    sums = torch.zeros(rows, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, row_of_token, token_logps.double())
