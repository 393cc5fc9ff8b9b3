"""Score many sequences without gradient, in passes under a token budget, sharing prompts if that leaves scores unchanged."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.out_of_memory import one_memory_error
from offline_kto.kto_core.scoring.batching import SCORING_PASS_COST, micro_batches, packed_batches
from offline_kto.kto_core.scoring.logps import sees_whole_passes, token_logps
from offline_kto.kto_core.scoring.model_code import model_code
from offline_kto.kto_core.scoring.sequences import (
    FILLER,
    Sequences,
    TokenIds,
    Widths,
    pack_sequences,
    pad_sequences,
    padded_widths,
)
from offline_kto.kto_core.scoring.shared_prompts import Batch, SharedPrompts, longest_shared, share_prompts
from offline_kto.kto_core.scoring.transfer import to_device

# The share of all tokens that sharing prompts must save. Below it, smaller passes and explicit masks cost more than
# they save: benchmarks/shared_prompts.py shows the break-even point.
WORTH_SHARING = 0.1

Planned = tuple[list[int], Callable[[], Batch]]


class Pass(NamedTuple):
    """The result of one forward pass.

    Attributes:
        indices: positions of the sequences that it scored.
        batch: the model's input; its rows are `indices`, in this order.
        token_logps: float32 nats, shape (completion tokens,), row after row.
        where: `indices` as a tensor on the device, int64, shape (rows,).
        values: those given for these sequences, one after the other, float64 on the device.
    """

    indices: list[int]
    batch: Batch
    token_logps: Tensor
    where: Tensor
    values: Tensor


class ScoringPasses:
    """Scores sequences under a token budget, in eval mode, without gradient.

    Args:
        model: prepared by `add_scoring_forward`, wrapped or not.
        device: where batches are placed.
        max_tokens: padded tokens in one pass.
        alone: whether this process may run its own number of passes (false for sharded ranks). If so, a prompt that several sequences share
            runs once, and when memory runs out the budget is halved. Sharing is checked first: if it changes the
            scores, or the model does not support it, it is switched off and a message is logged.
        pack: concatenate sequences, without padding.
        widths: of padded passes; None for those of the model and the device.
        tolerance: largest mean difference with and without sharing that rounding can explain, nats per token.
        say: logs a line.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        *,
        max_tokens: int,
        alone: bool = True,
        pack: bool = False,
        widths: Widths | None = None,
        tolerance: float = 1e-4,
        say: Callable[[str], None] = tell,
    ) -> None:
        one_by_one = sees_whole_passes(model)
        self.model, self.device, self.max_tokens = model, device, 1 if one_by_one else max_tokens
        self.pack, self.tolerance, self.say = pack and not one_by_one, tolerance, say
        self.widths = padded_widths(model.config, device.type) if widths is None else widths
        self.alone = alone
        self.longest_shared = longest_shared(model)
        self._shares, self._checked_length, self._told = not one_by_one, 0, False
        if one_by_one and alone:
            say(
                "rows run one by one: with 8-bit weights (LLM.int8) a row's score depends on the other rows of its pass"
            )

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[TokenIds],
        *,
        known: frozenset[int] = frozenset(),
        at_least: int = 0,
        values: Sequence[np.ndarray] | None = None,
    ) -> Iterator[Pass]:
        """Score all sequences, each once; the order of passes is the plan's.

        Args:
            sequences: (prompt ids, completion ids), neither empty.
            known: positions that are already scored. A resumed run makes the remaining passes of the same plan, so
                that its scores are bit-identical to those of an uninterrupted run.
            at_least: minimum number of passes, for ranks that must make equally many: empty ones are added.
            values: numbers that belong to each sequence; they are copied to the device together with its tokens.

        Raises:
            torch.OutOfMemoryError: on a single sequence, or if the process is not alone.
        """
        done, passes, pending = set(known), 0, list(range(len(sequences)))
        if len(known) < len(pending):
            self._check_sharing(self._groups(pending, sequences), sequences)
        if known and not self._cuts_between(known, pending, sequences):
            pending = [i for i in pending if i not in known]
        while pending:
            for indices, build in self._plan(pending, sequences):
                if done.issuperset(indices):
                    continue
                try:
                    with one_memory_error():
                        finished = self._forward(indices, build(), [values[i] for i in indices] if values else [])
                except torch.OutOfMemoryError:
                    if not self.alone or len(indices) == 1:
                        raise
                    finished = None
                if finished is None:  # outside `except`, whose traceback keeps the tensors alive
                    self._make_room(max(sum(map(len, sequences[i])) for i in indices))
                    break
                done.update(indices)
                passes += 1
                yield finished
            pending = [i for i in pending if i not in done]
        while passes < at_least:
            passes += 1
            self._forward([], pad_sequences([FILLER]))

    def passes_for(self, lengths: Sequence[int]) -> int:
        """Return the number of passes for sequences of these lengths, without sharing prompts."""
        return len(self._cut(lengths))

    def _cut(self, lengths: Sequence[int]) -> list[list[int]]:
        if self.pack:
            return packed_batches(lengths, self.max_tokens)
        return micro_batches([self.widths.of(length) for length in lengths], self.max_tokens)

    def _lay_out(self, rows: Sequence[TokenIds]) -> Sequences:
        return pack_sequences(rows) if self.pack else pad_sequences(rows, self.widths)

    def _forward(self, indices: list[int], batch: Batch, values: Sequence[np.ndarray] = ()) -> Pass:
        # The trainer may have switched to train mode since the last pass.
        if self.model.training:
            self.model.eval()
        numbers = torch.from_numpy(np.concatenate([np.empty(0), *values]))
        batch, where, numbers = to_device((batch, torch.tensor(indices, dtype=torch.int64), numbers), self.device)
        return Pass(indices, batch, token_logps(self.model, batch).token_logps, where, numbers)

    def _make_room(self, longest: int) -> None:
        """Lower the budget, or stop sharing prompts, after a pass with rows of up to `longest` tokens did not fit."""
        if self.max_tokens > longest:
            self.max_tokens = max(longest, self.max_tokens // 2)
            self.say(f"out of memory: continuing with {self.max_tokens} tokens in one scoring pass")
        else:  # one prompt, whose completions run one by one already
            self._shares = False
            self._say_why("not enough memory to share one prompt")
        torch.cuda.empty_cache()

    # -- plan ---------------------------------------------------------------------------------------

    def _cuts_between(self, known: frozenset[int], pending: list[int], sequences: Sequence[TokenIds]) -> bool:
        """Return whether each planned pass is known either entirely or not at all."""
        return all(known.issuperset(part) or known.isdisjoint(part) for part, _ in self._plan(pending, sequences))

    def _plan(self, pending: list[int], sequences: Sequence[TokenIds]) -> Iterator[Planned]:
        """Yield the passes in order: their positions, and a function that builds the batch when it is needed."""
        groups = self._groups(pending, sequences)
        shared = {i for group in groups for i in group}
        prompts = [self.widths.of(len(sequences[group[0]][0])) for group in groups]
        for part in micro_batches(prompts, self.max_tokens):
            chosen = [groups[number] for number in part]
            indices = [i for group in chosen for i in group]
            rows = [[sequences[i] for i in group] for group in chosen]
            yield indices, lambda rows=rows: self._share(rows)  # type: ignore[misc]
        alone = [i for i in pending if i not in shared]
        for part in self._cut([sum(map(len, sequences[i])) for i in alone]):
            indices = [alone[j] for j in part]
            yield indices, lambda indices=indices: self._lay_out([sequences[i] for i in indices])  # type: ignore[misc]

    def _groups(self, pending: list[int], sequences: Sequence[TokenIds]) -> list[list[int]]:
        """Return groups of sequences that share a prompt, if that saves more than it costs."""
        if not self.alone or not self._shares:
            return []
        groups = self._with_common_prompts(pending, sequences)
        if not self._is_worth_sharing(groups, pending, sequences):
            return []
        groups = [g for g in groups if max(sum(map(len, sequences[i])) for i in g) <= self.longest_shared]
        if self._is_worth_sharing(groups, pending, sequences):
            return groups
        self._say_why(
            f"the shared path supports {self.longest_shared} tokens, and most rows with a common prompt are longer"
            if self.longest_shared
            else "the model has recurrent layers, or has no key/value cache"
        )
        return []

    @staticmethod
    def _with_common_prompts(pending: Iterable[int], sequences: Sequence[TokenIds]) -> list[list[int]]:
        of_prompt: dict[bytes, list[int]] = defaultdict(list)
        for i in pending:
            of_prompt[sequences[i][0].tobytes()].append(i)
        return [group for group in of_prompt.values() if len(group) > 1]

    def _is_worth_sharing(self, groups: list[list[int]], pending: list[int], sequences: Sequence[TokenIds]) -> bool:
        saved = sum((len(group) - 1) * len(sequences[group[0]][0]) for group in groups)
        total = sum(sum(map(len, sequences[i])) for i in pending)
        return saved > max(SCORING_PASS_COST * self.max_tokens, WORTH_SHARING * total)

    def _say_why(self, why: str) -> None:
        if not self._told:
            self.say(f"prompts are not shared between sequences: {why}")
        self._told = True

    def _share(self, groups: list[list[TokenIds]]) -> SharedPrompts:
        return share_prompts(groups, self.max_tokens, self.longest_shared, widths=self.widths)

    def _check_sharing(self, groups: list[list[int]], sequences: Sequence[TokenIds]) -> None:
        """Compare scores with and without shared prompts for each new greatest length; stop sharing if they differ.

        The longest sequence runs once unshared. Then it runs split after its first quarter and before its last one: a
        short prompt with a long completion and a long prompt with a short one, padded together. The scores are
        discarded, because those of a pass must not depend on whether it was the first.
        """
        longest = max(
            (sequences[i] for group in groups for i in group), key=lambda ids: sum(map(len, ids)), default=None
        )
        if longest is None or sum(map(len, longest)) <= self._checked_length:
            return
        ids = np.concatenate(longest)
        self._checked_length, quarter = len(ids), max(1, len(ids) // 4)
        head, tail = ids[:quarter], ids[-quarter:]
        try:
            with one_memory_error():
                whole = self._forward([], pad_sequences([(head, ids[quarter:])], self.widths)).token_logps
                plain = [whole, whole[:quarter], whole[-quarter:]]
                groups_of_it = [[(head, ids[quarter:]), (head, ids[quarter : 2 * quarter])], [(ids[:-quarter], tail)]]
                why = self._against_sharing(groups_of_it, plain)
        except torch.OutOfMemoryError:
            why = "not enough memory to compare both ways"
        if why is not None:
            self._shares = False
            self._say_why(why)

    def _against_sharing(self, groups: list[list[TokenIds]], plain: list[Tensor]) -> str | None:
        try:
            with model_code(type(self.model).__name__, "the model cannot continue from a key/value cache"):
                shared = self._forward([], self._share(groups)).token_logps.split([len(one) for one in plain])
        except ModelError as error:
            return f"the model cannot continue from a key/value cache ({type(error.__cause__).__name__})"
        differences = [(one - other).abs().mean() for one, other in zip(shared, plain, strict=True)]
        apart = float(torch.stack(differences).nan_to_num(nan=float("inf")).max())
        return None if apart <= self.tolerance else f"log-probabilities would differ by {apart:.2g} nats a token"
