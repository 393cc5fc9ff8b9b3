"""Divide sequences among several engines that score at the same time."""

from collections.abc import Sequence

from offline_kto.kto_core.scoring.batching import deal
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import Listener


def shares_of(sequences: Sequence[TokenIds], known: frozenset[int], engines: int) -> list["Share"]:
    """Return one share for each engine; they cost about the same.

    Args:
        known: positions that need no score.
    """
    return [Share(places, sequences, known) for places in divide(sequences, engines)]


def divide(sequences: Sequence[TokenIds], engines: int) -> list[list[int]]:
    """Return the positions for each engine. Sequences of one prompt stay together, to share its forward pass."""
    groups: dict[bytes, list[int]] = {}
    for i, (prompt, _) in enumerate(sequences):
        groups.setdefault(prompt.tobytes(), []).append(i)
    of_prompt = list(groups.values())
    costs = [len(sequences[g[0]][0]) + sum(len(sequences[i][1]) for i in g) for g in of_prompt]
    return [[i for number in share for i in of_prompt[number]] for share in deal(costs, engines)]


class Share:
    """The sequences that one engine scores.

    Args:
        places: their positions in all sequences.
        known: positions, in all sequences, that are already scored.

    Attributes:
        known: those positions, in this share.
        tokens: number of tokens to score.
    """

    def __init__(self, places: list[int], sequences: Sequence[TokenIds], known: frozenset[int]) -> None:
        self._places = places
        self.sequences = [sequences[i] for i in places]
        self.known = frozenset(j for j, i in enumerate(places) if i in known)
        self.tokens = sum(len(sequences[i][0]) + len(sequences[i][1]) for i in places if i not in known)

    def renumbering(self, listener: Listener) -> Listener:
        """Return a listener for this share that passes its scores on with their positions in all sequences."""
        return listener._replace(
            on_scores=lambda done, scores: listener.on_scores([self._places[j] for j in done], scores)
        )
