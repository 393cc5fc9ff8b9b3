"""Lay out sequences for one forward pass: ids, positions, and which hidden state predicts which token.

padded    p0 p1 c0 c1 c2     packed    p0 p1 c0 c1 c2 q0 d0 d1
          q0 d0 d1 .  .                 0  1  2  3  4  0  1  2    (positions)
                                        0              5       8  (boundaries)

shared    p0 p1 | c0 c1 c2 | d0 d1    a prompt and two completions of it: each part between bars attends to its keys,
          0  1    2  3  4    2  3     the second completion's are p0 p1 d0 d1
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.library_types import ModelConfig
from offline_kto.kto_core.scoring.transfer import to_device

TokenIds = tuple[np.ndarray, np.ndarray]  # prompt ids, completion ids

# Padded widths on a GPU are multiples of this: fewer distinct shapes, for which kernels are chosen (cuDNN: built) anew,
# and full tiles in matrix products. On a CPU it would only cost time.
_MULTIPLE = {"cuda": 64}

# Settings of configurations that limit positions.
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")

# A dummy sequence for ranks that must run a forward pass but have no rows left.
FILLER: TokenIds = (np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))


class Widths(NamedTuple):
    """The widths that rows are padded to.

    Attributes:
        multiple: tokens that a width is rounded up to a multiple of.
        most: tokens that the model has positions for; a width is not rounded beyond.
    """

    multiple: int = 1
    most: int = 2**31

    def of(self, longest: int) -> int:
        """Return the padded width of a batch whose longest row has `longest` tokens."""
        return max(longest, min(-(-longest // self.multiple) * self.multiple, self.most))


def padded_widths(config: ModelConfig, device_type: str) -> Widths:
    """Return the widths that a model's rows are padded to on a type of device: `cpu` or `cuda`."""
    text = config.get_text_config()
    limits = [value for name in POSITION_LIMITS if isinstance(value := getattr(text, name, None), int) and value > 0]
    return Widths(_MULTIPLE.get(device_type, 1), min(limits, default=2**31))


class SharedKeys(NamedTuple):
    """The keys that the parts of a micro-batch attend to: a part is a prompt, or a completion after its prompt.

    The last query and the last key of a part are the same token, so that causal attention is aligned at the end.

    Attributes:
        slots: int64, shape (keys,): the slot, of batch * length, of each key, part after part.
        boundaries: int32, shape (parts + 1,): the key at which each part begins; then their number.
        widest: keys of one part, at most.
    """

    slots: Tensor
    boundaries: Tensor
    widest: int


class Sequences(NamedTuple):
    """One micro-batch. Indices are computed on the host, because reading a mask on a GPU would block its queue.

    Attributes:
        input_ids: int64, shape (batch, length).
        position_ids: int64, shape (batch, length).
        real: bool, shape (batch, length), false at padding.
        predicts: int64, shape (completion tokens,): index of the hidden state, of batch * length, that predicts each.
        targets: int64, shape (completion tokens,): their ids.
        row_of_token: int64, shape (completion tokens,): the row each belongs to.
        boundaries: int32, shape (rows + 1,): the slot, of batch * length, at which each row begins; then batch * length.
            With `shared` they are those of parts instead of rows.
        rows: number of sequences; equal to `batch` if padded, more if packed.
        tokens: number of tokens without padding.
        widest: slots between two boundaries, at most.
        shared: the keys of each part if rows share prompts; None if each row attends to itself.
    """

    input_ids: Tensor
    position_ids: Tensor
    real: Tensor
    predicts: Tensor
    targets: Tensor
    row_of_token: Tensor
    boundaries: Tensor
    rows: int
    tokens: int
    widest: int
    shared: SharedKeys | None = None

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def is_packed(self) -> bool:
        """Return whether sequences are concatenated."""
        return self.rows > len(self.input_ids)

    def to(self, device: torch.device | str) -> "Sequences":
        return to_device(self, device)


def pad_sequences(rows: Sequence[TokenIds], widths: Widths = Widths()) -> Sequences:  # noqa: B008 (immutable)
    """Right-pad (prompt ids, completion ids) pairs.

    Right padding needs no attention mask under causal attention: later tokens never affect earlier ones. Pad ids are 0
    (any valid id would do); they are neither attended to nor scored. Slots after the longest row repeat its last
    position: a greater one may be beyond a model's table of positions, or switch it to other frequencies.
    """
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in rows])
    width = widths.of(lengths.max())
    ids = np.zeros((len(rows), width), dtype=np.int64)
    slots = np.broadcast_to(np.arange(width), ids.shape)
    for i, (prompt, completion) in enumerate(rows):
        ids[i, : len(prompt)] = prompt
        ids[i, len(prompt) : len(prompt) + len(completion)] = completion
    positions = np.minimum(slots, lengths.max() - 1)
    return _sequences(rows, ids, positions, slots < lengths[:, None], np.arange(len(rows) + 1) * width)


def pack_sequences(rows: Sequence[TokenIds]) -> Sequences:
    """Concatenate (prompt ids, completion ids) pairs into one row, without padding.

    Positions begin at 0 in each of them. Only attention that reads the boundaries (see `attention.py`) runs faster with
    it, and computes each sequence apart from the others.
    """
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in rows])
    ids = np.concatenate([part for row in rows for part in row]).astype(np.int64)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    return _sequences(rows, ids, positions, np.ones(ids.shape, dtype=bool), boundaries)


def share_keys(rows: Sequence[TokenIds]) -> Sequences:
    """Concatenate (prompt ids, completion ids) pairs into one row, each prompt once.

    The completions of a prompt have the positions after it, and attend to its keys and to their own. Gradients of all of
    them flow into the prompt. Only attention prepared by `shared_attention.py` computes it.
    """
    parts: list[np.ndarray] = []
    slots: list[np.ndarray] = []  # of the keys of each part
    positions: list[np.ndarray] = []
    prompts: dict[bytes, np.ndarray] = {}  # slots of each prompt
    predicts = []
    length = 0

    def add(ids: np.ndarray, before: np.ndarray) -> np.ndarray:
        nonlocal length
        own = length + np.arange(len(ids))
        length += len(ids)
        parts.append(ids)
        slots.append(np.concatenate([before, own]))
        positions.append(len(before) + np.arange(len(ids)))
        return own

    for prompt, completion in rows:
        key = prompt.tobytes()
        if key not in prompts:
            prompts[key] = add(prompt, np.empty(0, dtype=np.int64))
        own = add(completion, prompts[key])
        predicts.append(np.concatenate([prompts[key][-1:], own[:-1]]))
    keys = np.cumsum([0, *map(len, slots)])
    return _sequences(
        rows,
        np.concatenate(parts).astype(np.int64)[None],
        np.concatenate(positions)[None],
        np.ones((1, length), dtype=bool),
        np.cumsum([0, *map(len, parts)]),
        predicts=predicts,
    )._replace(
        shared=SharedKeys(
            slots=torch.from_numpy(np.concatenate(slots)),
            boundaries=torch.from_numpy(keys.astype(np.int32)),
            widest=int(np.diff(keys).max()),
        )
    )


def tokens_of_shared(rows: Sequence[TokenIds]) -> int:
    """Return the tokens of `share_keys`."""
    prompts = {prompt.tobytes(): len(prompt) for prompt, _ in rows}
    return sum(prompts.values()) + sum(len(completion) for _, completion in rows)


def _sequences(
    rows: Sequence[TokenIds],
    ids: np.ndarray,
    positions: np.ndarray,
    real: np.ndarray,
    boundaries: np.ndarray,
    *,
    predicts: Sequence[np.ndarray] | None = None,
) -> Sequences:
    # The hidden state at t predicts token t + 1.
    predicts = predicts or [
        start + len(prompt) - 1 + np.arange(len(completion))
        for start, (prompt, completion) in zip(boundaries[:-1], rows, strict=True)
    ]
    return Sequences(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.array(positions, order="C")),
        real=torch.from_numpy(real),
        predicts=torch.from_numpy(np.concatenate(predicts)),
        targets=torch.from_numpy(np.concatenate([completion for _, completion in rows]).astype(np.int64)),
        row_of_token=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(completion) for _, completion in rows])),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        rows=len(rows),
        tokens=int(real.sum()),
        widest=int(np.diff(boundaries).max()),
    )


def boundary_arguments(queries: Tensor, keys: Tensor, longest_query: int, longest_key: int) -> dict[str, object]:
    """Return the arguments that tell attention where sequences begin, as `transformers` names them.

    Without them flash attention searches positions or masks in every layer, and waits for the device each time.

    Args:
        queries, keys: int32, shape (sequences + 1,): the slot of queries, of keys, at which each sequence begins; then
            their number.
        longest_query, longest_key: slots in one sequence, at most.
    """
    return {
        "cu_seq_lens_q": queries,
        "cu_seq_lens_k": keys,
        "max_length_q": longest_query,
        "max_length_k": longest_key,
    }


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
