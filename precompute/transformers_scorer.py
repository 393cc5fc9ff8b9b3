"""Scoring with plain Transformers: longest first, under a token budget, completions only."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kto_core.batching import micro_batches
from kto_core.errors import ModelError
from kto_core.logps import POSITIVE_ROUNDING, check_scoring, token_logps
from kto_core.models import Precision
from kto_core.sequences import TokenIds, pad_sequences

_MAX_TOKENS = {"cuda": 32768}
_MAX_TOKENS_CPU = 4096

# Largest difference between the scoring forward and the model's own logits, nats a token.
_SELF_CHECK = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class TransformersScorer:
    """Per-token log-probs of completions under a frozen model.

    Args:
        model: from `load_causal_lm`, frozen, in eval mode.
        precision: autocast to score under.
        max_tokens: padded tokens in one forward pass; None for a default by device.
    """

    def __init__(self, model: Any, precision: Precision, *, max_tokens: int | None = None) -> None:
        self.model, self.precision = model, precision
        self.device = next(model.parameters()).device
        self.max_tokens = max_tokens or _MAX_TOKENS.get(self.device.type, _MAX_TOKENS_CPU)

    def self_check(self, sequences: Sequence[TokenIds]) -> None:
        """Compare with the model's own logits on a few short sequences, batched and padded.

        Raises:
            ModelError: they disagree.
        """
        sample = sorted(sequences, key=lambda s: len(s[0]) + len(s[1]))[: 2 * 8 : 8] or list(sequences[:1])
        with torch.inference_mode(), self.precision.autocast(self.device):
            check_scoring(self.model, sample, tolerance=_SELF_CHECK[self.precision.dtype])

    def score(self, sequences: Sequence[TokenIds], *, on_tokens: Callable[[int], None]) -> list[np.ndarray]:
        """Score sequences; an out-of-memory error halves the budget and goes on.

        Args:
            sequences: (prompt ids, completion ids), neither empty.
            on_tokens: called with the tokens of each finished micro-batch.

        Returns:
            float32 nats for each completion token, in the order of `sequences`.

        Raises:
            ModelError: a score is missing, not finite or positive.
        """
        lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
        results: list[np.ndarray | None] = [None] * len(sequences)
        pending = list(range(len(sequences)))
        while pending:
            for batch in micro_batches([lengths[i] for i in pending], self.max_tokens):
                indices = [pending[j] for j in batch]
                try:
                    scores = self._forward([sequences[i] for i in indices])
                except torch.OutOfMemoryError:
                    self._halve(max(lengths[i] for i in indices), len(indices))
                    break
                for i, one in zip(indices, scores, strict=True):
                    results[i] = checked(one, sequences[i][1])
                on_tokens(sum(lengths[i] for i in indices))
            pending = [i for i in pending if results[i] is None]
        return [one for one in results if one is not None]

    def _forward(self, sequences: Sequence[TokenIds]) -> list[np.ndarray]:
        batch = pad_sequences(sequences).to(self.device)
        with torch.inference_mode(), self.precision.autocast(self.device):
            flat = token_logps(self.model, batch).token_logps.float().cpu().numpy()
        ends = np.cumsum([len(completion) for _, completion in sequences])
        return np.split(flat, ends[:-1])

    def _halve(self, width: int, rows: int) -> None:
        if rows == 1:
            raise ModelError(
                f"Out of memory on a single sequence of {width} tokens. Use a smaller --max-length, "
                "--dtype bfloat16, or a device with more memory."
            )
        self.max_tokens = max(width, self.max_tokens // 2)
        torch.cuda.empty_cache()
        print(f"out of memory: going on with --max-tokens {self.max_tokens}")


def checked(scores: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
    """A score for each completion token, finite, not positive (rounding above 0 is brought to 0).

    Raises:
        ModelError: a rule is broken; a wrong number must never reach the cache.
    """
    if len(scores) != len(completion_ids):
        raise ModelError(
            f"The scorer returned {len(scores)} log-probabilities for {len(completion_ids)} completion tokens."
        )
    if not np.isfinite(scores).all():
        raise ModelError(
            f"The model gives log-probabilities that are not finite ({int((~np.isfinite(scores)).sum())} of {len(scores)} "
            "tokens). Its weights are damaged, or --dtype float16 overflows: try --dtype bfloat16 or float32."
        )
    if (scores > POSITIVE_ROUNDING).any():
        raise ModelError(f"The model gives a positive log-probability ({scores.max():g} nats); this cannot be.")
    return np.minimum(scores, np.float32(0))
