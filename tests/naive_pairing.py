"""Choose mismatched completions as the first release did, on lists and strings.

`kto_core/feedback/pairing.py` makes the same choices on arrays, for every input. Caches are found again by these
choices, so this reference must not change.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offline_kto.kto_core.errors import PairingError
from offline_kto.kto_core.feedback.quoting import counted

# How far a row searches for a partner whose text differs from its own completion. If none is found, the data
# are repetitive ("yes", "no"), and the equal pair is kept and counted.
_TEXT_SEARCH = 64


@dataclass(frozen=True, slots=True)
class PairableRow:
    """The fields of a row that pairing reads.

    `completion_id` identifies the completion's tokens; `label` only determines the order of rows that are otherwise
    equal.
    """

    row_id: str
    prompt_id: str
    completion_id: str
    label: bool


@dataclass(frozen=True)
class Pairing:
    """The partners of every row.

    Attributes:
        partners: shape (rows, K); the position of the row whose completion serves as y'.
        same_prompt: pairs whose y' answers the same prompt (only `rotate` allows them).
        same_completion: pairs whose y' equals the row's own completion.
        most_served: how often the most used completion serves as y'.
    """

    partners: list[list[int]]
    same_prompt: int
    same_completion: int
    most_served: int


def pair_shuffled(rows: Sequence[PairableRow], *, partners: int, seed: int) -> Pairing:
    """Pair every row with completions of other prompts by a seeded derangement.

    Rows are placed on a ring ordered by a keyed hash of their content; the k-th partner is the k-th successor. If that
    successor has the same prompt, two rows trade partners. So each completion serves exactly K times, unless more
    than half of all rows share one prompt. The ring depends only on seed and content: reordering the file changes no
    pair, and appending a row changes only its neighbours' pairs.

    Args:
        rows: at least two, with at least two distinct prompts.
        partners: K, mismatched completions for each row.
        seed: determines the ring.

    Raises:
        PairingError: fewer than K rows of other prompts exist for some prompt.
    """
    _check_satisfiable(rows, partners)
    ring = _ring_order(rows, seed)
    prompt = _codes([rows[i].prompt_id for i in ring])
    completion = _codes([rows[i].completion_id for i in ring])
    chosen: list[list[int]] = [[] for _ in ring]  # ring positions
    for k in range(partners):
        target = _Round(prompt, completion, chosen, shift=k + 1).resolve()
        for i, t in enumerate(target):
            chosen[i].append(int(t))
    by_row: list[list[int]] = [[] for _ in rows]
    for i, targets in enumerate(chosen):
        by_row[ring[i]] = [ring[t] for t in targets]
    return _summarize(rows, by_row)


def pair_rotate(rows: Sequence[PairableRow], *, partners: int, block: int) -> Pairing:
    """Pair row i with the completion of row i-1, wrapping inside blocks, as the paper and TRL do.

    Blocks are `block` consecutive rows in file order; the k-th partner is row i-k. Partners of the same prompt are
    kept and counted. A row whose partner would be itself (in a last block of one row, which TRL pairs with its own
    completion) or an identical row searches further back, past its block.

    Raises:
        PairingError: one distinct prompt only, or `partners >= block`.
    """
    _check_satisfiable(rows, 1)
    if partners >= len(rows):
        raise PairingError(
            f"--kl-partners {partners} asks for more completions than the other {counted(len(rows) - 1, 'row')} can give. Lower it."
        )
    if partners >= block:
        raise PairingError(
            f"--pairing rotate takes partners from blocks of {block} rows, too few for --kl-partners {partners}. "
            "Raise --pairing-block above --kl-partners."
        )
    by_row: list[list[int]] = []
    for i in range(len(rows)):
        start = i - i % block
        size = min(block, len(rows) - start)
        inside = [start + (i - start - k) % size for k in range(1, size)]
        outside = [(start - k) % len(rows) for k in range(1, min(len(rows), partners + 1 + 2 * block))]
        mine: list[int] = []
        for t in inside + outside:
            if rows[t].row_id != rows[i].row_id and t not in mine:
                mine.append(t)
            if len(mine) == partners:
                break
        if len(mine) < partners:
            raise PairingError(
                f"--pairing rotate finds no different completion near row {i + 1}: the rows around it are identical. "
                "Remove duplicates, or use --pairing shuffled."
            )
        by_row.append(mine)
    return _summarize(rows, by_row)


class _Round:
    """The choice of every row's k-th partner. All indices are positions on the ring."""

    def __init__(self, prompt: np.ndarray, completion: np.ndarray, chosen: list[list[int]], *, shift: int) -> None:
        self.prompt, self.completion, self.chosen = prompt, completion, chosen
        self.size = len(prompt)
        self.target = (np.arange(self.size) + shift) % self.size
        self.scan_from: dict[int, int] = {}  # prompt -> where the search for a trade resumes
        self.others: dict[int, np.ndarray] = {}  # prompt -> rows of other prompts
        self.served: dict[int, int] = {}  # prompt -> how many of them were handed out

    def resolve(self) -> np.ndarray:
        for i in np.flatnonzero(self.prompt[self.target] == self.prompt):
            if self.prompt[self.target[i]] == self.prompt[i]:  # an earlier trade may have resolved it
                self._trade_prompt(int(i))
        twice = [i for i in range(self.size) if self.chosen[i] and int(self.target[i]) in self.chosen[i]]
        same_text = np.flatnonzero(self.completion[self.target] == self.completion)
        for i in sorted({*twice, *same_text.tolist()}):
            if not self._good(i, int(self.target[i])):
                self._trade_text(i)
        return self.target

    def _trade_prompt(self, i: int) -> None:
        """Trade targets with a row of another prompt whose target is of another prompt too.

        Such a row exists as long as no prompt has more than half of the rows. The scan for each prompt resumes where
        it stopped: at most two turns of the ring per prompt, not two per row.
        """
        mine = self.prompt[i]
        start = max(self.scan_from.get(mine, 0), i + 1)
        for step in range(start, 2 * self.size + i + 1):
            j = step % self.size
            if self.prompt[j] != mine and self.prompt[self.target[j]] != mine:
                self.scan_from[mine] = step + 1
                self.target[i], self.target[j] = self.target[j], self.target[i]
                return
        self.scan_from[mine] = 2 * self.size + self.size
        self.target[i] = self._hand_out(i)

    def _hand_out(self, i: int) -> int:
        """Return the next row of another prompt, in turn, when too many rows share a prompt for a one-to-one choice."""
        mine = int(self.prompt[i])
        if mine not in self.others:
            self.others[mine] = np.flatnonzero(self.prompt != mine)
        others = self.others[mine]
        for _ in range(len(others)):
            turn = self.served.get(mine, 0)
            self.served[mine] = turn + 1
            candidate = int(others[turn % len(others)])
            if candidate not in self.chosen[i]:
                return candidate
        raise AssertionError("checked beforehand: enough rows of other prompts exist")

    def _trade_text(self, i: int) -> None:
        """Trade away a partner that this row already has, or whose text equals its own completion."""
        for step in range(1, min(_TEXT_SEARCH, self.size)):
            j = (i + step) % self.size
            if self._good(i, int(self.target[j])) and self._good(j, int(self.target[i])):
                self.target[i], self.target[j] = self.target[j], self.target[i]
                return
        if int(self.target[i]) in self.chosen[i]:
            self.target[i] = self._hand_out(i)

    def _good(self, i: int, t: int) -> bool:
        return bool(
            self.prompt[i] != self.prompt[t] and self.completion[i] != self.completion[t] and t not in self.chosen[i]
        )


def _ring_order(rows: Sequence[PairableRow], seed: int) -> list[int]:
    """Return the positions of the rows, ordered by a keyed hash of their content.

    Identical rows are numbered, so that they are scattered over the ring instead of adjacent.
    """
    seen: dict[str, int] = {}
    keys: dict[int, bytes] = {}
    for i in sorted(range(len(rows)), key=lambda i: (rows[i].row_id, rows[i].label, i)):
        nth = seen[rows[i].row_id] = seen.get(rows[i].row_id, -1) + 1
        keys[i] = hashlib.blake2b(f"{seed}/{rows[i].row_id}/{nth}".encode(), digest_size=16).digest()
    return sorted(range(len(rows)), key=keys.__getitem__)


def _codes(ids: list[str]) -> np.ndarray:
    return np.unique(np.array(ids), return_inverse=True)[1]


def _check_satisfiable(rows: Sequence[PairableRow], partners: int) -> None:
    if len(rows) < 2:
        raise PairingError(
            f"{len(rows)} row is left, and KTO needs at least two rows with different prompts: its reference point "
            "is estimated from completions of other prompts. Add feedback."
        )
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.prompt_id] = counts.get(row.prompt_id, 0) + 1
    if len(counts) == 1:
        raise PairingError(
            f"All {len(rows)} rows share one prompt, so no completion of another prompt exists, and KTO's reference "
            "point (the mean log-ratio of mismatched pairs) cannot be measured. Add feedback on other prompts."
        )
    largest = max(counts.values())
    if len(rows) - largest < partners:
        raise PairingError(
            f"--kl-partners {partners} asks for {partners} different completions of other prompts, but one prompt has "
            f"{largest} of {len(rows)} rows, which leaves {len(rows) - largest}. Lower --kl-partners."
        )


def _summarize(rows: Sequence[PairableRow], partners: list[list[int]]) -> Pairing:
    served: dict[int, int] = {}
    same_prompt = same_completion = 0
    for i, mine in enumerate(partners):
        for t in mine:
            served[t] = served.get(t, 0) + 1
            same_prompt += rows[t].prompt_id == rows[i].prompt_id
            same_completion += rows[t].completion_id == rows[i].completion_id
    return Pairing(partners, same_prompt, same_completion, max(served.values()))
