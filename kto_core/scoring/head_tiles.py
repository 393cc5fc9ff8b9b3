"""Define the two operations on a tile of logits, and implement them in plain torch.

A tile holds the products of some tokens with some rows of the vocabulary's matrix. `cuda_head.py` computes tiles one
after another; `head_tiles_triton.py` implements the same operations in one pass over memory each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from offline_kto.kto_core.scoring.output_layer import to_logits_


class Tile(NamedTuple):
    """Products of hidden states and rows of the vocabulary's matrix, and the map from them to logits.

    The logits are `softcap * tanh((products + bias) * scale / softcap)`, as in `output_layer.Head`.

    Attributes:
        products: float32 or float64, shape (tokens, columns). Columns are contiguous; if rows are farther apart than
            they are long, what is between them may be overwritten, as may the products.
        targets: int64, shape (tokens,); token ids in the whole vocabulary.
        first: token id of the first column.
        bias: shape (columns,), or None.
        scale: factor on the logits.
        softcap: limit of the logits, or None.
    """

    products: Tensor
    targets: Tensor
    first: int
    bias: Tensor | None
    scale: float
    softcap: float | None


class Normalizer(NamedTuple):
    """The softmax statistics of each token over the tiles that were read so far, each of shape (tokens,).

    Attributes:
        largest: the largest logit.
        total: the sum of `exp(logit - largest)`.
        chosen: the target's logit; NaN until its column was read.
    """

    largest: Tensor
    total: Tensor
    chosen: Tensor

    @classmethod
    def start(cls, tokens: int, like: Tensor, dtype: torch.dtype) -> "Normalizer":
        """Return the statistics of no columns, on the device of `like`."""
        return cls(*(like.new_full((tokens,), value, dtype=dtype) for value in (-torch.inf, 0.0, torch.nan)))

    def of(self, tokens: slice) -> "Normalizer":
        """Return views of some tokens' statistics."""
        return Normalizer(self.largest[tokens], self.total[tokens], self.chosen[tokens])

    def logps(self) -> Tensor:
        """Return the targets' log-probabilities. Differences first: `largest + log(total)` would round small ones."""
        return (self.chosen - self.largest) - self.total.log()

    def logsumexp(self) -> Tensor:
        """Return the logarithm of the sum of `exp(logits)`."""
        return self.largest + self.total.log()


class TileOperations(NamedTuple):
    """One implementation of both operations.

    Attributes:
        logsumexp_and_target: (tile, normalizer) adds the tile's columns to the statistics of its tokens.
        logits_to_gradient: (tile, logsumexp, grad, out) writes the gradient by `products` of
            `sum(grad * (logits[targets] - logsumexp))` to `out`, in its dtype; `out` is laid out like `products`, and
            may be it.
            `logsumexp` and `grad` are contiguous, have the dtype of `products` and shape (tokens,).
    """

    logsumexp_and_target: Callable[[Tile, Normalizer], None]
    logits_to_gradient: Callable[[Tile, Tensor, Tensor, Tensor], None]


def _logsumexp_and_target(tile: Tile, normalizer: Normalizer) -> None:
    logits = to_logits_(tile.products, tile.bias, tile.scale, tile.softcap)
    inside, index = _targets_in(tile)
    normalizer.chosen.copy_(torch.where(inside, logits.gather(1, index)[:, 0], normalizer.chosen))
    largest = torch.maximum(normalizer.largest, logits.amax(1))
    normalizer.total.mul_((normalizer.largest - largest).exp_())
    normalizer.total.add_(logits.sub_(largest[:, None]).exp_().sum(1))
    normalizer.largest.copy_(largest)


def _logits_to_gradient(tile: Tile, logsumexp: Tensor, grad: Tensor, out: Tensor) -> None:
    logits = to_logits_(tile.products, tile.bias, tile.scale, tile.softcap)
    slope = None if tile.softcap is None else 1 - (logits / tile.softcap) ** 2
    # d logp / d logits = onehot(target) - softmax(logits)
    flow = logits.sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None])
    inside, index = _targets_in(tile)
    flow.scatter_add_(1, index, torch.where(inside, grad, 0.0)[:, None])
    flow = flow if slope is None else flow.mul_(slope)
    out.copy_(flow if tile.scale == 1.0 else flow.mul_(tile.scale))


def _targets_in(tile: Tile) -> tuple[Tensor, Tensor]:
    """Return whether each target is a column of the tile, and its column (tokens, 1), or any column if it is not."""
    columns = tile.products.shape[1]
    index = tile.targets - tile.first
    return (index >= 0) & (index < columns), index.clamp(0, columns - 1)[:, None]


PLAIN = TileOperations(_logsumexp_and_target, _logits_to_gradient)
"""The operations in plain torch: several passes over memory each, on any device."""
