"""Share rows between the processes of one run, and reduce their results.

Every rank reads the whole batch (it is small) and computes all shares from lengths alone, so no communication is
needed to agree. In an unsharded run (one process, or data parallel) each rank has the whole model: passes are
independent, and gradients are summed once, from the last backward pass on (`gradient_sums.py`). In a sharded run (FSDP2, DeepSpeed)
every pass gathers weights, so all ranks must run the same number of passes.
"""

from collections.abc import Callable, Sequence

import accelerate
import torch
from torch import Tensor

from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.batching import deal
from offline_kto.train.trainer.gradient_sums import GradientSums, Sending, copy_from_first


class Ranks:
    """One process of a run, and its communication with the others.

    Args:
        accelerator: accelerate's.
        sharded: whether the weights are sharded over the ranks.
        sending: how unsharded ranks send gradients.
    """

    def __init__(self, accelerator: accelerate.Accelerator, *, sharded: bool, sending: Sending | None = None) -> None:
        self.accelerator, self.sharded, self.sending = accelerator, sharded, sending or Sending()
        self.rank, self.world = int(accelerator.process_index), int(accelerator.num_processes)

    @property
    def mean_to_sum(self) -> int:
        """Factor that turns a mean of gradients over ranks into their sum.

        FSDP and DeepSpeed average gradients, but each loss here is a share of one mean over all ranks.
        """
        return self.world if self.sharded else 1

    def share(self, costs: Sequence[int], passes_of: Callable[[list[int]], int]) -> tuple[list[int], int]:
        """Return this rank's part of some rows, and the number of passes every rank must run (0: no requirement).

        Args:
            costs: tokens of each row of the whole batch.
            passes_of: returns how many passes the rows at some positions take.
        """
        shares = deal(costs, self.world)
        return shares[self.rank], max(map(passes_of, shares)) if self.sharded else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.world > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, on the host, shape (ranks, ...)."""
        if self.world == 1:
            return tensor[None].cpu()
        every: Tensor = self.accelerator.gather(tensor[None].to(self.accelerator.device))
        return every.cpu()

    def any(self, happened: bool) -> bool:
        """Return whether something happened on any rank; called on every rank."""
        return bool(self.sum(torch.tensor(float(happened), device=self.accelerator.device)))

    def least(self, number: int) -> int:
        """Return the smallest number of all ranks if they must agree, else this rank's own."""
        if not self.sharded:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).min())

    def start_equal(self, model: Model) -> None:
        """Copy the weights of rank 0 to all ranks of an unsharded run."""
        if not self.sharded and self.world > 1:
            copy_from_first(model)

    def gradient_sums(self, model: Model, *, unannounced: Sequence[Tensor]) -> GradientSums:
        """Return the sums of one update's gradients; see `GradientSums`. A rank without rows adds zeros."""
        sending = self.sending if self.world > 1 and not self.sharded else None
        trained = [one for one in model.parameters() if one.requires_grad]
        return GradientSums(trained, sending, unannounced=unannounced)
