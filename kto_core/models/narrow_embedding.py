"""Train an embedding table that is stored in 16 bits as if it were float32: its output and its gradient's sums are."""

import torch
from torch import Tensor, nn

from offline_kto.kto_core.library_types import AutogradContext


class NarrowEmbedding(nn.Embedding):
    """An embedding table in 16 bits that returns float32, so that what follows computes as with a float32 table.

    A gradient row is the sum over all places of its token. For a frequent token that is many small terms, which would
    be lost if they were added in 16 bits; they are added in float32 and rounded once for each pass.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        rows: Tensor = _Rows.apply(self.weight, input, self.padding_idx, self.sparse)
        return rows


def can_be_narrow(module: nn.Module) -> bool:
    """Return whether a module is a plain embedding table; some families scale what they look up."""
    return type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq


class _Rows(torch.autograd.Function):
    """Rows of a table, in float32."""

    @staticmethod
    def forward(ctx: AutogradContext, weight: Tensor, ids: Tensor, padding: int | None, sparse: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.options = weight.shape, weight.dtype, padding, sparse
        return nn.functional.embedding(ids, weight).float()

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        shape, dtype, padding, sparse = ctx.options
        ids, order = ids.flatten().sort(stable=True)
        terms = grad.reshape(-1, shape[1])[order].float()
        if padding is not None:
            terms = terms.masked_fill((ids == padding)[:, None], 0.0)
        # The number of distinct ids is not known without waiting for the device: there is a place for each term, and
        # the places that stay empty add zeros to row 0.
        first = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).long()]).cumsum(0) if len(ids) else ids
        sums = torch.zeros_like(terms).index_add_(0, first, terms).to(dtype)
        rows = torch.zeros_like(ids).index_copy_(0, first, ids)
        found = torch.sparse_coo_tensor(rows[None], sums, shape, check_invariants=False)
        return found if sparse else found.to_dense(), None, None, None
