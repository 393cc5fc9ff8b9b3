"""Split sequences into micro-batches under a token budget, and distribute them over ranks."""

import heapq
from collections.abc import Sequence

import numpy as np

# Fixed cost of a pass, as a share of the budget: weights are read once, small matrices are slower to multiply, and with
# gradients all weights' gradients are accumulated.
GRADIENT_PASS_COST, SCORING_PASS_COST = 1 / 32, 1 / 64


def micro_batches(lengths: Sequence[int], max_tokens: int, *, pass_cost: float = SCORING_PASS_COST) -> list[list[int]]:
    """Group sequences of similar length so that `rows * longest row <= max_tokens`, with the least waste.

    Among all ways to split the rows, ordered by length, this one has the smallest sum of padded tokens
    and passes, where each pass counts as a fixed amount of padding.

    The longest come first. So the largest allocation comes first, a budget that does not fit fails at once
    instead of hours later, and the allocator never has to grow again. A sequence longer than the
    budget gets its own micro-batch: every row is scored, whatever the budget.

    Args:
        lengths: tokens in each sequence (prompt and completion).
        max_tokens: padded tokens in one forward pass, at least 1.
        pass_cost: as a share of `max_tokens`.

    Returns:
        Positions into `lengths`, each exactly once.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    # Equal lengths keep their order, so that the result depends only on the lengths.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest_first = np.array([lengths[i] for i in order], dtype=np.int64)
    cost = np.zeros(len(order) + 1)  # cost[end]: of the best split of the first `end` rows
    starts = np.zeros(len(order) + 1, dtype=np.int64)  # where the last micro-batch of that split begins
    first = 0
    for end in range(1, len(order) + 1):
        # As `end` grows, a micro-batch that begins at `first` only grows: once too large, it stays too large.
        while first < end - 1 and (end - first) * longest_first[first] > max_tokens:
            first += 1
        begins = np.arange(first, end)
        costs = cost[begins] + (end - begins) * longest_first[begins] + max_tokens * pass_cost
        best = int(costs.argmin())
        cost[end], starts[end] = costs[best], begins[best]
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


def packed_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences that will be concatenated, so that the sum of their lengths is at most `max_tokens`.

    Longest first, each into the first group that has room; arguments and result as for `micro_batches`.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    batches: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if fits is None:
            fits = len(batches)
            batches.append([])
            room.append(max_tokens)
        batches[fits].append(i)
        room[fits] -= lengths[i]
    return batches


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Distribute sequences so that all ranks have about the same load.

    The most expensive come first, each to the rank with the least load so far (Graham's LPT rule: at most a third
    above the optimum). Every rank computes the same shares from the same numbers, so nothing has to be communicated.

    Args:
        costs: tokens of each sequence.
        ranks: at least 1.

    Returns:
        For each rank positions into `costs`; over all ranks each exactly once.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + costs[i], rank))
    return shares
