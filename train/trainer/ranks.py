"""What the processes of one run share out and add up.

Every rank reads the whole batch (it is small) and works out all shares from lengths alone, so nothing has to
be sent to agree. `plain` runs (one process, DDP) hold a whole model: forward and backward passes are a rank's own
affair, and gradients are added up once, when all of them are done. `sharded` runs (FSDP2, DeepSpeed) gather
weights in every pass, so all ranks must make equally many.
"""

from collections.abc import Callable, Sequence

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor

from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.batching import deal


class Ranks:
    """One process among all.

    Args:
        accelerator: accelerate's.
        sharded: weights are spread over the ranks.
    """

    def __init__(self, accelerator: accelerate.Accelerator, *, sharded: bool) -> None:
        self.accelerator, self.sharded = accelerator, sharded
        self.rank, self.world = int(accelerator.process_index), int(accelerator.num_processes)

    @property
    def mean_to_sum(self) -> int:
        """FSDP and DeepSpeed average gradients over ranks; losses here are shares of one mean over all of them."""
        return self.world if self.sharded else 1

    def share(self, costs: Sequence[int], passes_of: Callable[[list[int]], int]) -> tuple[list[int], int]:
        """This rank's part of some rows, and how many passes every rank must make (0: as many as it likes).

        Args:
            costs: tokens of each row of the whole batch.
            passes_of: how many passes some of these rows take, by their positions.
        """
        shares = deal(costs, self.world)
        return shares[self.rank], max(map(passes_of, shares)) if self.sharded else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.world > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, on the host, shape (ranks, ...)."""
        if self.world == 1:
            return tensor[None].cpu()
        every: Tensor = self.accelerator.gather(tensor[None].to(self.accelerator.device))
        return every.cpu()

    def any(self, happened: bool) -> bool:
        """Return whether something happened on any rank; called on every rank."""
        return bool(self.sum(torch.tensor(float(happened), device=self.accelerator.device)))

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers where they must agree, else one's own."""
        if not self.sharded:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).min())

    def sum_gradients(self, model: Model) -> None:
        """Add up gradients over the ranks, once for each update.

        DDP would do so inside of the last backward pass, after which running out of memory on one rank could not be
        mended. A rank without rows has no gradients, and adds zeros.
        """
        if self.sharded or self.world == 1:
            return
        waiting = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()
