"""Choose mismatched completions: for each prompt x, K completions y' that answer another prompt.

KTO's reference point z0 is the mean log-ratio over pairs (x, y') (paper, section 4.1). The pairs are chosen here once,
over all data, so that they do not depend on batch size, order, epoch or world size.

Rows are arrays: conflicts are found for all rows at once, and only the rows with a conflict are visited one by one.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from offline_kto.kto_core.equal_ids import EqualIds, index_type
from offline_kto.kto_core.errors import PairingError
from offline_kto.kto_core.feedback.quoting import counted

# How far a row searches for a partner whose text differs from its own completion. If none is found, the data
# are repetitive ("yes", "no"), and the equal pair is kept and counted.
_TEXT_SEARCH = 64

_AT_ONCE = 4096  # rows whose ids or positions are Python objects at one time


class PairableRows(NamedTuple):
    """The columns that pairing reads, each of shape (rows,).

    Ids are 16 bytes (dtype V16), see `hashing.id_array`. `completion_id` identifies the completion's tokens; `label`
    (bool) only determines the order of rows that are otherwise equal.
    """

    row_id: np.ndarray
    prompt_id: np.ndarray
    completion_id: np.ndarray
    label: np.ndarray


@dataclass(frozen=True, eq=False)
class Pairing:
    """The partners of every row.

    Attributes:
        partners: shape (rows, K), int32 where it suffices; the position of the row whose completion serves as y'.
        same_prompt: pairs whose y' answers the same prompt (only `rotate` allows them).
        same_completion: pairs whose y' equals the row's own completion.
        most_served: how often the most used completion serves as y'.
    """

    partners: np.ndarray
    same_prompt: int
    same_completion: int
    most_served: int


def pair_shuffled(rows: PairableRows, *, partners: int, seed: int) -> Pairing:
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
    prompt = _codes(rows.prompt_id)
    _check_satisfiable(prompt, partners)
    completion = _codes(rows.completion_id)
    ring = _ring_order(rows, seed)
    others = _OtherPrompts(prompt[ring])
    own = completion[ring]
    chosen: list[np.ndarray] = []  # for each k, ring positions
    for k in range(partners):
        chosen.append(_Round(others, own, chosen, shift=k + 1).resolve())
    by_row = np.empty((len(ring), partners), dtype=ring.dtype)
    for k, target in enumerate(chosen):
        by_row[ring, k] = ring[target]
    return _summarize(prompt, completion, by_row)


def pair_rotate(rows: PairableRows, *, partners: int, block: int) -> Pairing:
    """Pair row i with the completion of row i-1, wrapping inside blocks, as the paper and TRL do.

    Blocks are `block` consecutive rows in file order; the k-th partner is row i-k. Partners of the same prompt are
    kept and counted. A row whose partner would be itself (in a last block of one row, which TRL pairs with its own
    completion) or an identical row searches further back, past its block.

    Raises:
        PairingError: one distinct prompt only, or `partners >= block`.
    """
    prompt = _codes(rows.prompt_id)
    _check_satisfiable(prompt, 1)
    if partners >= len(prompt):
        raise PairingError(
            f"--kl-partners {partners} asks for more completions than the other {counted(len(prompt) - 1, 'row')} can give. Lower it."
        )
    if partners >= block:
        raise PairingError(
            f"--pairing rotate takes partners from blocks of {block} rows, too few for --kl-partners {partners}. "
            "Raise --pairing-block above --kl-partners."
        )
    by_row = _Rotation(_codes(rows.row_id), partners, block).resolve()
    return _summarize(prompt, _codes(rows.completion_id), by_row)


class _OtherPrompts:
    """The rows of other prompts, by number, for each prompt. All indices are positions on the ring."""

    def __init__(self, prompt: np.ndarray) -> None:
        self.prompt = prompt  # (rows,)

    @functools.cached_property
    def _grouped(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions grouped by prompt, and the prompt of each. Few data need it, so it is built on demand."""
        order = np.argsort(self.prompt, kind="stable").astype(self.prompt.dtype)
        return order, self.prompt[order]

    def without(self, prompt: int) -> "_Others":
        order, prompts = self._grouped
        start, end = np.searchsorted(prompts, np.array([prompt, prompt + 1], dtype=prompts.dtype))
        mine = order[start:end].astype(np.int64)
        return _Others(mine - np.arange(len(mine)), len(order) - len(mine))


class _Others(NamedTuple):
    """The positions that are not one prompt's, counted through; `before[n]` of them precede the prompt's n-th row."""

    before: np.ndarray
    size: int

    def nth(self, turn: int) -> int:
        turn %= self.size
        return turn + int(self.before.searchsorted(turn, side="right"))


class _Round:
    """The choice of every row's k-th partner. All indices are positions on the ring."""

    def __init__(self, others: _OtherPrompts, completion: np.ndarray, chosen: list[np.ndarray], *, shift: int) -> None:
        self.size = len(completion)
        self._prompts, self._completions, self._chosen = others.prompt, completion, chosen
        self._targets = np.roll(np.arange(self.size, dtype=completion.dtype), -shift)
        # Single values are read through memoryviews of the same bytes: three times as fast as numpy's scalars.
        self.prompt, self.completion = others.prompt.data, completion.data
        self.target = self._targets.data
        self.chosen = [earlier.data for earlier in chosen]
        self.scan_from: dict[int, int] = {}  # prompt -> where the search for a trade resumes
        self._all_others = others
        self.others: dict[int, _Others] = {}  # prompt -> rows of other prompts
        self.served: dict[int, int] = {}  # prompt -> how many of them were handed out

    def resolve(self) -> np.ndarray:
        for i in _positions(self._prompts[self._targets] == self._prompts):
            if self.prompt[self.target[i]] == self.prompt[i]:  # an earlier trade may have resolved it
                self._trade_prompt(i)
        conflicts = self._completions[self._targets] == self._completions
        for earlier in self._chosen:
            conflicts |= earlier == self._targets
        for i in _positions(conflicts):
            if not self._good(i, self.target[i]):
                self._trade_text(i)
        return self._targets

    def _trade_prompt(self, i: int) -> None:
        """Trade targets with a row of another prompt whose target is of another prompt too.

        Such a row exists as long as no prompt has more than half of the rows. The scan for each prompt resumes where
        it stopped: at most two turns of the ring per prompt, not two per row.
        """
        prompt, target, size = self.prompt, self.target, self.size
        mine = prompt[i]
        start = max(self.scan_from.get(mine, 0), i + 1)
        for step in range(start, 2 * size + i + 1):
            j = step % size
            if prompt[j] != mine and prompt[target[j]] != mine:
                self.scan_from[mine] = step + 1
                target[i], target[j] = target[j], target[i]
                return
        self.scan_from[mine] = 3 * size
        target[i] = self._hand_out(i)

    def _hand_out(self, i: int) -> int:
        """Return the next row of another prompt, in turn, when too many rows share a prompt for a one-to-one choice."""
        mine = self.prompt[i]
        if mine not in self.others:
            self.others[mine] = self._all_others.without(mine)
        others = self.others[mine]
        for _ in range(others.size):
            turn = self.served.get(mine, 0)
            self.served[mine] = turn + 1
            candidate = others.nth(turn)
            if not self._has(i, candidate):
                return candidate
        raise AssertionError("checked beforehand: enough rows of other prompts exist")

    def _trade_text(self, i: int) -> None:
        """Trade away a partner that this row already has, or whose text equals its own completion."""
        target, size = self.target, self.size
        mine = target[i]
        for step in range(1, min(_TEXT_SEARCH, size)):
            j = (i + step) % size
            if self._good(i, target[j]) and self._good(j, mine):
                target[i], target[j] = target[j], mine
                return
        if self._has(i, mine):
            target[i] = self._hand_out(i)

    def _good(self, i: int, t: int) -> bool:
        return self.completion[i] != self.completion[t] and self.prompt[i] != self.prompt[t] and not self._has(i, t)

    def _has(self, i: int, t: int) -> bool:
        return any(earlier[i] == t for earlier in self.chosen)


class _Rotation:
    """The rows before each row in its block; past the block where identical rows leave too few."""

    def __init__(self, row: np.ndarray, partners: int, block: int) -> None:
        self.row, self.partners, self.block = row, partners, block
        self.size = len(row)

    def resolve(self) -> np.ndarray:
        position = np.arange(self.size, dtype=self.row.dtype)
        inside = position % self.block
        start = position - inside
        length = np.minimum(self.block, self.size - start)
        by_row = np.empty((self.size, self.partners), dtype=self.row.dtype)
        conflicts = np.zeros(self.size, dtype=bool)
        for k in range(self.partners):  # in a block that is too short, one of these is the row itself
            by_row[:, k] = start + (inside - k - 1) % length
            conflicts |= self.row[by_row[:, k]] == self.row
        for i in _positions(conflicts):
            by_row[i] = self._search_back(i)
        return by_row

    def _search_back(self, i: int) -> list[int]:
        row, run_start = self.row, self._run_start
        mine: list[int] = []
        for first, last in self._backwards(i):
            t = first
            while t >= last:
                if row[t] == row[i]:
                    t = int(run_start[t])  # a run of identical rows is skipped at once
                elif t not in mine:
                    mine.append(t)
                    if len(mine) == self.partners:
                        return mine
                t -= 1
        raise PairingError(
            f"--pairing rotate finds no different completion near row {i + 1}: the rows around it are identical. "
            "Remove duplicates, or use --pairing shuffled."
        )

    def _backwards(self, i: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges, first >= last, that are searched from row i: its block, wrapped, then the rows before it."""
        start = i - i % self.block
        yield i - 1, start
        yield min(start + self.block, self.size) - 1, i + 1
        last = start + 1 - min(self.size, self.partners + 1 + 2 * self.block)
        yield start - 1, max(last, 0)
        yield self.size - 1, self.size + min(last, 0)

    @functools.cached_property
    def _run_start(self) -> np.ndarray:
        """The first position of the run of identical rows that each row is in."""
        begins = np.append(True, self.row[1:] != self.row[:-1])
        return np.maximum.accumulate(np.where(begins, np.arange(self.size), 0))


def _positions(conflicts: np.ndarray) -> Iterator[int]:
    """Yield where a mask is true, as of now; the indices are made block by block, so that many cost little memory."""
    for start in range(0, len(conflicts), _AT_ONCE):
        yield from (start + np.flatnonzero(conflicts[start : start + _AT_ONCE])).tolist()


def _ring_order(rows: PairableRows, seed: int) -> np.ndarray:
    """Return the positions of the rows, ordered by a keyed hash of their content.

    Identical rows are numbered, so that they are scattered over the ring instead of adjacent.
    """
    nth = _numbers_of_identical(rows)
    keys = np.empty(len(nth), dtype="V16")
    for start in range(0, len(nth), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        keys[some] = _ring_keys(rows.row_id[some], nth[some], seed)
    return EqualIds.of(keys).order.astype(nth.dtype)


def _ring_keys(row_id: np.ndarray, nth: np.ndarray, seed: int) -> np.ndarray:
    """Return blake2b("seed/row id/nth") for each row, the id as 32 hexadecimal digits."""
    digits = row_id.tobytes().hex()
    digests = (
        hashlib.blake2b(f"{seed}/{digits[32 * i : 32 * i + 32]}/{n}".encode(), digest_size=16).digest()
        for i, n in enumerate(nth.tolist())
    )
    return np.frombuffer(b"".join(digests), dtype="V16")


def _numbers_of_identical(rows: PairableRows) -> np.ndarray:
    """Return each row's number among the rows with its id: first those of label false, then in their order."""
    order, heads = EqualIds.of(rows.row_id, then_by=rows.label)
    position = np.arange(len(order))
    first = np.maximum.accumulate(np.where(heads, position, 0))
    numbers = np.empty(len(order), dtype=index_type(len(order)))
    numbers[order] = position - first
    return numbers


def _codes(ids: np.ndarray) -> np.ndarray:
    """Return a number from 0 for each id, equal where the ids are."""
    return EqualIds.of(ids).numbers()


def _check_satisfiable(prompt: np.ndarray, partners: int) -> None:
    rows = len(prompt)
    if rows < 2:
        raise PairingError(
            f"{rows} row is left, and KTO needs at least two rows with different prompts: its reference point "
            "is estimated from completions of other prompts. Add feedback."
        )
    counts = np.bincount(prompt)
    if len(counts) == 1:
        raise PairingError(
            f"All {rows} rows share one prompt, so no completion of another prompt exists, and KTO's reference "
            "point (the mean log-ratio of mismatched pairs) cannot be measured. Add feedback on other prompts."
        )
    largest = int(counts.max())
    if rows - largest < partners:
        raise PairingError(
            f"--kl-partners {partners} asks for {partners} different completions of other prompts, but one prompt has "
            f"{largest} of {rows} rows, which leaves {rows - largest}. Lower --kl-partners."
        )


def _summarize(prompt: np.ndarray, completion: np.ndarray, partners: np.ndarray) -> Pairing:
    served = np.zeros(len(partners), dtype=np.int64)
    same_prompt = same_completion = 0
    for target in partners.T:
        served += np.bincount(target, minlength=len(served))
        same_prompt += int(np.count_nonzero(prompt[target] == prompt))
        same_completion += int(np.count_nonzero(completion[target] == completion))
    return Pairing(partners, same_prompt, same_completion, int(served.max()))
