"""Score with Transformers: shared prompts, longest first, under a token budget, completions only."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.attention import can_pack
from offline_kto.kto_core.scoring.logps import POSITIVE_ROUNDING, check_scoring, sees_whole_passes
from offline_kto.kto_core.scoring.model_code import family_of, model_code
from offline_kto.kto_core.scoring.packing_check import measure_packing
from offline_kto.kto_core.scoring.passes import Pass, ScoringPasses
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import Listener

_MAX_TOKENS = {"cuda": 32768}
_MAX_TOKENS_CPU = 4096

# Nats per token by which two correct computations may differ in the mean: the scoring forward and the model's own logits;
# shared and unshared prompts, concatenated and padded rows.
_SELF_CHECK = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
_LAYOUTS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class TransformersScorer:
    """Computes per-token log-probs of completions under a frozen model.

    Args:
        model: from `load_causal_lm`, frozen, in eval mode.
        precision: of the forward passes.
        max_tokens: padded tokens in one forward pass; None for a default by device.
        say: logs a line.
    """

    def __init__(
        self, model: Model, precision: Precision, *, max_tokens: int | None = None, say: Callable[[str], None] = tell
    ) -> None:
        self.model, self.precision, self._say = model, precision, say
        self.device = next(model.parameters()).device
        self._passes = ScoringPasses(
            model,
            self.device,
            max_tokens=max_tokens or _MAX_TOKENS.get(self.device.type, _MAX_TOKENS_CPU),
            tolerance=_LAYOUTS[precision.dtype],
            say=say,
        )

    @property
    def packs(self) -> bool:
        """Return whether sequences are concatenated; `self_check` decides."""
        return self._passes.pack

    def self_check(self, sequences: Sequence[TokenIds]) -> None:
        """Compare scores with the model's own logits on a few short sequences, batched and padded.

        Raises:
            ModelError: they disagree.
        """
        shortest = sorted(sequences, key=_length)[: 2 * 8]
        sample = shortest[::8]
        with torch.inference_mode(), self.precision.autocast(self.device):
            check_scoring(self.model, sample, tolerance=_SELF_CHECK[self.precision.dtype])
            self._decide_packing(shortest[:2])

    def _decide_packing(self, sample: Sequence[TokenIds]) -> None:
        """Concatenate rows if the attention computes each of them apart from the others, and faster than padded ones."""
        if not can_pack(self.model, self.device) or sees_whole_passes(self.model) or len(sample) < 2:
            return
        why = measure_packing(self.model, self.device, sample).why_not(_LAYOUTS[self.precision.dtype])
        self._passes.pack = why is None
        if why is not None:
            self._say(f"rows are padded, not concatenated: {why}")

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
        """Score sequences, as in `offline_kto.precompute.engines.protocol.Scorer`. Out of memory halves the budget.

        Raises:
            ModelError: a score is missing, not finite or positive; a single sequence does not fit into memory.
        """

        def keep(done: Pass) -> None:
            ends = np.cumsum([len(sequences[i][1]) for i in done.indices])
            pieces = np.split(done.token_logps.float().cpu().numpy(), ends[:-1])
            listener.on_scores(
                done.indices, [checked(piece, sequences[i][1]) for i, piece in zip(done.indices, pieces, strict=True)]
            )
            listener.on_tokens(sum(len(sequences[i][0]) + len(sequences[i][1]) for i in done.indices))

        failed = f"this model family ({family_of(self.model)}) cannot score one of the rows"
        with (
            torch.inference_mode(),
            self.precision.autocast(self.device),
            model_code(type(self.model).__name__, failed),
        ):
            # A pass is copied to the host while the next one runs, so that a GPU does not wait for the host.
            last: Pass | None = None
            try:
                for done in self._passes.run(sequences, known=known):
                    if last is not None:
                        keep(last)
                    last = done
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"Out of memory on a single sequence (the longest has {max(map(_length, sequences))} tokens). Use a "
                    "smaller --max-length, --dtype bfloat16, or a device with more memory."
                ) from error
            if last is not None:
                keep(last)


def _length(sequence: TokenIds) -> int:
    return len(sequence[0]) + len(sequence[1])


def checked(scores: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
    """Check that each completion token has a finite, non-positive score, and return the scores (rounding above 0 as 0).

    Raises:
        ModelError: a score is missing or invalid; it must never reach the cache.
    """
    if len(scores) != len(completion_ids):
        raise ModelError(
            f"The scorer returned {len(scores)} log-probabilities for {len(completion_ids)} completion tokens."
        )
    if not np.isfinite(scores).all():
        raise ModelError(
            f"The model returns log-probabilities that are not finite ({int((~np.isfinite(scores)).sum())} of {len(scores)} "
            "tokens). Its weights are damaged, or --dtype float16 overflows: try --dtype bfloat16 or float32."
        )
    if (scores > POSITIVE_ROUNDING).any():
        raise ModelError(f"The model returns a positive log-probability ({scores.max():g} nats), which is impossible.")
    return np.minimum(scores, np.float32(0))
