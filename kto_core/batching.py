"""Cutting sequences into padded micro-batches under a token budget."""

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences of similar length so that `rows * longest row <= max_tokens`.

    Longest first: the largest allocation comes first, so a budget that does not fit fails at once
    instead of hours later, and the allocator never has to grow again. A sequence longer than the
    budget gets a micro-batch of its own: every row is scored, whatever the budget.

    Args:
        lengths: tokens in each sequence (prompt and completion).
        max_tokens: padded tokens in one forward pass, at least 1.

    Returns:
        Positions into `lengths`, each exactly once.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    # Equal lengths keep their order, so that the cut depends on nothing but the lengths.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        # The first row of a batch is its longest: it sets the padded width.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
