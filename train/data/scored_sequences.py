"""Hold a completion with its prompt and its reference score."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScoredSequence:
    """A prompt with one completion and its reference score.

    Attributes:
        prompt_ids, completion_ids: int32.
        ref_logps: sum over completion tokens under the reference, nats.
        ref_token_logps: float32, one for each completion token.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    ref_logps: float
    ref_token_logps: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt ids and completion ids."""
        return self.prompt_ids, self.completion_ids

    def shortened(self, max_length: int) -> "ScoredSequence":
        """Return the sequence with its completion cut to fit; its score is a prefix sum."""
        room = max_length - len(self.prompt_ids)
        if len(self.completion_ids) <= room:
            return self
        logps = self.ref_token_logps[:room]
        return ScoredSequence(self.prompt_ids, self.completion_ids[:room], float(logps.sum(dtype=np.float64)), logps)
