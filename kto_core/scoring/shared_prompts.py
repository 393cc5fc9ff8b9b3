"""Score several completions of one prompt with a single pass over the prompt, whose keys and values are reused.

    prompts        p0 p1 p2      q0 q1 .          right-padded, once each; keys and values are kept
    completions    p0 p1 p2 c0 c1                 after their prompt's keys, which end where the
                   p0 p1 p2 e0 .                  completion begins; positions continue from there
                   .  q0 q1 d0 d1

The hidden state of a prompt's last token predicts the first token of each of its completions. The last token of a
completion predicts nothing and is not passed to the model. There is no gap between a prompt's keys and its completion,
because sliding windows and some position tables count slots, not positions. No gradient flows through this path.

Attention that takes boundaries gets no mask, which it would search in every layer. The padding before a shorter
prompt's keys is a sequence of its own, without queries. The padding after a completion belongs to that row's sequence,
where no real token sees it.

Whether prompts are shared is decided in `passes.py`.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.library_types import Model, ModelBody
from offline_kto.kto_core.scoring.batching import micro_batches
from offline_kto.kto_core.scoring.sequences import POSITION_LIMITS, Sequences, TokenIds, Widths, boundary_arguments
from offline_kto.kto_core.scoring.transfer import to_device

# Settings of configurations that limit attention windows and positions.
_LIMITS = ("sliding_window", "attention_chunk_size", "window_size", "keep_window_size", *POSITION_LIMITS)


class Branches(NamedTuple):
    """Completions that run together, each after its prompt.

    Attributes:
        input_ids: int64, shape (rows, length): completions without their last token, right-padded.
        position_ids: int64, shape (rows, length).
        attention_mask: int64, shape (rows, longest prompt + length), 1 where attention is allowed.
        prompts: int64, shape (rows, 1): the prompt of each row.
        keys: int64, shape (rows, longest prompt): which of the prompt's keys is in each slot before the completion.
        query_boundaries, key_boundaries: int32, shape (2 * rows + 1,), as in `boundary_arguments`; for each row first the
            padding before its prompt's keys, which has no queries.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    prompts: Tensor
    keys: Tensor
    query_boundaries: Tensor
    key_boundaries: Tensor


class SharedPrompts(NamedTuple):
    """One micro-batch of prompts with all of their completions.

    Hidden states are numbered consecutively: first those of the prompts (prompts * prompt length), then those of each
    of the `branches`.

    Attributes:
        input_ids, position_ids: int64, shape (prompts, prompt length).
        boundaries: int32, shape (prompts + 1,): the slot, of prompts * prompt length, at which each prompt begins.
        branches: the completions; empty if every completion is a single token.
        predicts, targets, row_of_token, rows, tokens: as in `Sequences`.
    """

    input_ids: Tensor
    position_ids: Tensor
    boundaries: Tensor
    branches: tuple[Branches, ...]
    predicts: Tensor
    targets: Tensor
    row_of_token: Tensor
    rows: int
    tokens: int

    def to(self, device: torch.device | str) -> "SharedPrompts":
        return to_device(self, device)

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel() + sum(branch.input_ids.numel() for branch in self.branches)


Batch = Sequences | SharedPrompts


def share_prompts(
    groups: Sequence[Sequence[TokenIds]],
    max_tokens: int,
    longest: int = 2**31,
    *,
    widths: Widths = Widths(),  # noqa: B008 (immutable)
) -> SharedPrompts:
    """Build the micro-batch for groups of sequences; those in one group have the same prompt.

    Args:
        groups: (prompt ids, completion ids), group after group; the result counts rows in this order.
        max_tokens: keys of one branch, including the prompts' and padding.
        longest: slots in a row of keys, including padding (`longest_shared`); no sequence has more tokens.
        widths: of prompts and of completions.
    """
    prompts = [group[0][0] for group in groups]
    rows = [(number, completion) for number, group in enumerate(groups) for _, completion in group]
    longest_prompt = max(map(len, prompts))
    width = min(widths.of(longest_prompt), max(longest, longest_prompt))
    ids = _padded(prompts, width)
    # Indices of each row's hidden states: the prompt's last, then one for each completion token but the last.
    predicts = [np.array([number * width + len(prompts[number]) - 1]) for number, _ in rows]
    branches, offset = [], ids.size
    longer = [row for row, (_, completion) in enumerate(rows) if len(completion) > 1]
    lengths = [(len(prompts[rows[row][0]]), len(rows[row][1]) - 1) for row in longer]
    for part in micro_batches([width + widths.of(own) for _, own in lengths], max_tokens):
        for fitting in _within(part, lengths, longest):
            chosen = [longer[i] for i in fitting]
            branch = _branch(
                [(rows[row][0], lengths[i][0], rows[row][1][:-1]) for i, row in zip(fitting, chosen, strict=True)],
                longest,
                widths,
            )
            for i, row in enumerate(chosen):
                start = offset + i * branch.input_ids.shape[1]
                predicts[row] = np.concatenate([predicts[row], start + np.arange(len(rows[row][1]) - 1)])
            offset += branch.input_ids.numel()
            branches.append(branch)
    completions = [completion for _, completion in rows]
    return SharedPrompts(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(width).clamp(max=longest_prompt - 1).repeat(len(prompts), 1),
        boundaries=torch.arange(len(prompts) + 1, dtype=torch.int32) * width,
        branches=tuple(branches),
        predicts=torch.from_numpy(np.concatenate(predicts)),
        targets=torch.from_numpy(np.concatenate(completions).astype(np.int64)),
        row_of_token=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(c) for c in completions])),
        rows=len(rows),
        tokens=sum(map(len, prompts)) + sum(own for _, own in lengths),
    )


def _within(part: list[int], lengths: Sequence[tuple[int, int]], longest: int) -> Iterator[list[int]]:
    """Split a branch until its longest prompt plus its longest completion fit into `longest` slots."""
    prompt, own = (max(lengths[i][k] for i in part) for k in (0, 1))
    if prompt + own <= longest or len(part) == 1:
        yield part
        return
    part = sorted(part, key=lambda i: lengths[i][0])
    yield from _within(part[: len(part) // 2], lengths, longest)
    yield from _within(part[len(part) // 2 :], lengths, longest)


def _branch(rows: Sequence[tuple[int, int, np.ndarray]], longest: int, widths: Widths) -> Branches:
    """Build the branch for rows of (index of the prompt, its length, completion without its last token).

    Widths are not rounded where prompts and completions together would take more than `longest` slots.
    """
    inputs = [fed for _, _, fed in rows]
    prompts, prompt_lengths, lengths = (
        np.array(column)[:, None] for column in zip(*((of, length, len(fed)) for of, length, fed in rows), strict=True)
    )
    own, prompt = int(lengths.max()), int(prompt_lengths.max())
    own = max(own, min(widths.of(own), longest - prompt))
    prompt = max(prompt, min(widths.of(prompt), longest - own))
    steps, slots = np.arange(own)[None], np.arange(prompt)[None]
    padding = prompt - prompt_lengths
    keys = slots - padding  # (rows, longest prompt), below 0 before a shorter one
    # Padding keeps the position at which its row ends. After a long prompt it would otherwise reach positions that no
    # row has, beyond a table's end or the length at which frequencies change.
    positions = prompt_lengths + np.minimum(steps, lengths - 1)
    mask = np.concatenate([keys >= 0, steps < lengths], axis=1)
    return Branches(
        torch.from_numpy(_padded(inputs, steps.size)),
        torch.from_numpy(positions),
        torch.from_numpy(mask.astype(np.int64)),
        torch.from_numpy(prompts),
        torch.from_numpy(np.maximum(keys, 0)),
        _boundaries(np.concatenate([np.zeros_like(padding), np.full_like(padding, own)], axis=1)),
        _boundaries(np.concatenate([padding, prompt_lengths + own], axis=1)),
    )


def _boundaries(lengths: np.ndarray) -> Tensor:
    """Return where sequences of these lengths begin, one after another, and their sum."""
    return torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32))


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids


def hidden_states(body: ModelBody, batch: SharedPrompts, *, takes_positions: bool, takes_boundaries: bool) -> Tensor:
    """Return all hidden states, (prompts * prompt length + rows * length of each branch, hidden size).

    Args:
        body: the model without its output layer; it returns keys and values as in `transformers`.
        takes_positions: whether it has positions as an argument.
        takes_boundaries: whether its attention takes boundaries in place of a mask.
    """

    def positions(part: SharedPrompts | Branches) -> dict[str, Tensor]:
        return {"position_ids": part.position_ids} if takes_positions else {}

    whole = batch.input_ids.shape[1]
    extra = boundary_arguments(batch.boundaries, batch.boundaries, whole, whole) if takes_boundaries else {}
    out = body(input_ids=batch.input_ids, use_cache=True, return_dict=True, **positions(batch), **extra)
    states = [out.last_hidden_state.flatten(0, 1)]
    name = _cache_name(body)
    cache = getattr(out, name)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    for branch in batch.branches:
        copies = [tuple(_lined_up(kept, branch) for kept in layer) for layer in layers]
        done = body(
            input_ids=branch.input_ids,
            **(_branch_boundaries(branch) if takes_boundaries else {"attention_mask": branch.attention_mask}),
            use_cache=True,
            return_dict=True,
            **{name: type(cache)(copies)},
            **positions(branch),
        )
        states.append(done.last_hidden_state.flatten(0, 1))
    return torch.cat(states)


def _branch_boundaries(branch: Branches) -> dict[str, object]:
    # Flash attention has another layout for at most one query in each sequence, which those without queries do not fit.
    longest_query = max(2, branch.input_ids.shape[1])
    return boundary_arguments(
        branch.query_boundaries, branch.key_boundaries, longest_query, branch.attention_mask.shape[1]
    )


def _cache_name(body: ModelBody) -> str:
    """Return the name of keys and values in the model's arguments and outputs: `cache` in recent `transformers`.

    A forward that accepts any keyword may silently ignore the other name.
    """
    forward = getattr(body, "forward", body)
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _lined_up(kept: Tensor, branch: Branches) -> Tensor:
    """Return keys or values of prompts, (prompts, heads, prompt length, size), selected for each row of a branch."""
    prompts, keys = branch.prompts.to(kept.device), branch.keys.to(kept.device)  # layers may be on several GPUs
    return kept[prompts, :, keys].transpose(1, 2)  # (rows, heads, longest prompt, size)


def longest_shared(model: Model) -> int:
    """Return how many slots a prompt with a completion may take for this path; 0 if the model does not support it.

    Beyond a sliding window the model itself drops keys, and some models have tables with a fixed number of positions.
    Models without keys (recurrent layers) must run whole sequences.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"} or getattr(config, "is_encoder_decoder", False):
        return 0
    limits = [getattr(config, name, None) for name in _LIMITS]
    longest = min([int(limit) for limit in limits if isinstance(limit, int) and limit > 0], default=2**31)
    return longest if getattr(config, "use_cache", None) is not None else 0
