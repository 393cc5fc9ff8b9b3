"""Hold the policy during a run: its model, device and ranks, and the layout of rows in passes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.attention import can_pack
from offline_kto.kto_core.scoring.logps import token_logps
from offline_kto.kto_core.scoring.packing_check import measure_packing
from offline_kto.kto_core.scoring.sequences import (
    FILLER,
    Sequences,
    TokenIds,
    pack_sequences,
    pad_sequences,
    padded_widths,
    share_keys,
)
from offline_kto.train.trainer.ranks import Ranks


class PreparedPolicy:
    """The policy with the settings of every pass through it.

    Args:
        model: from `PolicyFiles.load`.
        device: the device that batches are copied to.
        ranks: the processes that train it.
        max_tokens: padded tokens in one forward and backward pass.
        rounding: nats per token by which two ways to compute the same score may differ.

    Attributes:
        scoring_model: the module that passes call.
        packs: whether rows are concatenated instead of padded.
        widths: the widths of padded rows.
    """

    def __init__(self, model: Model, device: torch.device, *, ranks: Ranks, max_tokens: int, rounding: float) -> None:
        self.model, self.scoring_model = model, model
        self.device, self.ranks, self.max_tokens, self.rounding = device, ranks, max_tokens, rounding
        self.packs = can_pack(model, device)
        self.widths = padded_widths(model.config, device.type)

    def replace_model(self, model: Model, *, wrapped: Any) -> None:
        """Replace the model with the one that the Trainer prepared.

        Args:
            wrapped: the same model inside its distributed wrapper.
        """
        self.model = model
        self.scoring_model = wrapped if self.ranks.sharded else model

    def check_precision(self, promised: torch.dtype) -> None:
        """Check that passes run in the run's precision, independent of the code that prepared the model.

        Raises:
            TrainingError: without autocast, or under another one.
        """
        kind = self.device.type
        found: list[torch.dtype] = []

        def note(*_: Any) -> None:
            found.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            with torch.no_grad():
                token_logps(self.scoring_model.eval(), pad_sequences([FILLER]).to(self.device))
        finally:
            hook.remove()
        if set(found) != {promised}:
            raise TrainingError(
                f"The policy computes in {', '.join(map(str, found))}, but --dtype promises {promised}: this version of "
                "accelerate prepares models differently. Please report it, with the versions of torch, transformers and "
                "accelerate; --dtype float32 may work."
            )

    def check_packing(self, sample: Sequence[TokenIds]) -> None:
        """Disable packing if concatenation changes scores, on this rank or on a rank that must agree with it.

        Args:
            sample: two sequences; with fewer, rows are padded.
        """
        if not self.packs:
            return
        if len(sample) < 2:
            self.packs = False
            return
        why = measure_packing(self.scoring_model, self.device, sample).why_not(self.rounding)
        self.packs = bool(self.ranks.least(why is None))
        if not self.packs and self.ranks.rank == 0:
            tell(f"rows are padded, not concatenated: {why or 'another process found other scores'}")

    def halve_max_tokens(self, least: int) -> None:
        """Halve the token budget after a pass ran out of memory.

        Args:
            least: the smallest allowed budget, tokens.
        """
        self.max_tokens = max(least, self.max_tokens // 2)
        torch.cuda.empty_cache()
        tell(f"out of memory: continuing with --max-tokens {self.max_tokens}")

    def lay_out(self, sequences: Sequence[TokenIds], *, share: bool = False) -> Sequences:
        """Return one micro-batch on the host, packed or padded.

        Args:
            share: concatenate them, each prompt once; see `prompt_sharing.py`.
        """
        if share:
            return share_keys(sequences)
        return pack_sequences(sequences) if self.packs else pad_sequences(sequences, self.widths)

    def zero(self) -> Tensor:
        """Return 0 on the device; float64, scalar."""
        return torch.zeros((), dtype=torch.float64, device=self.device)
