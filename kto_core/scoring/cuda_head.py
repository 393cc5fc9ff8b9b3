"""Compute log-probabilities of given tokens from hidden states tile by tile: the output layer on CUDA.

A GPU multiplies matrices faster than it reads and writes memory, so the passes over the logits set the time. Each tile
(4,096 tokens by 16,384 columns of the vocabulary) is one matrix product, one pass for the statistics of the softmax,
and in the backward pass one that turns logits into their gradient. No softmax is computed in the forward pass, no
logits are kept, and no tensor has the size of tokens by vocabulary. On a CPU, where the opposite holds, `head.py` uses
whole rows and a fused softmax.

Products of 16-bit numbers are summed and stored in float32:

- Logits. bfloat16 rounds those between 16 and 32 by up to 0.06 nats, so that two computations of the same log-probability,
  the reference's and the policy's, differ by more than all that comes before. The price is 4 bytes of memory traffic
  more for each logit and pass. A tile is half as wide as one of 16 bits would be, and takes 256 MiB, too. Its gradient,
  the operand of two more products, is written in the compute type.
- Gradients of weight and hidden states, which are sums over many tiles. In bfloat16, a sum stops growing at 256 times
  the size of its terms. A 16-bit weight gets its gradient rounded once.

Tiles are ordered by columns: a tile's rows of the weight are cast once, and their gradient is complete after all tokens.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from offline_kto.kto_core.console import warn
from offline_kto.kto_core.library_types import AutogradContext
from offline_kto.kto_core.scoring.head_tiles import PLAIN, Normalizer, Tile, TileOperations
from offline_kto.kto_core.scoring.output_layer import Head

TILE_TOKENS = 4096
"""Tokens of a tile: enough to read the weight and its gradient seldom."""

TILE_COLUMNS = 16384
"""Columns of a tile with that many tokens; tiles of fewer tokens are wider. A multiple of 16 keeps rows aligned."""


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this is the output layer to use on a device: on CUDA, if products of 16 bits can be float32."""
    return device.type == "cuda" and (dtype == _wide(dtype) or _adds_in_float32(device, dtype))


def tiled_logps(
    hidden: Tensor, targets: Tensor, head: Head, *, dtype: torch.dtype, operations: TileOperations | None = None
) -> Tensor:
    """Return `log_softmax(head(hidden))[targets]`, computed tile by tile in both passes.

    Args:
        hidden: shape (tokens, hidden size), any float dtype.
        targets: int64, contiguous, shape (tokens,).
        head: the projection, of any float dtype; a frozen weight gets no gradient.
        dtype: type of the operands of matrix products.
        operations: of a tile; by default Triton's if it works on this device.

    Returns:
        float32 nats (float64 for float64 products), shape (tokens,).
    """
    operations = operations or _best_operations(hidden.device)
    options = _Options(head.scale, head.softcap, dtype, head.gradient, operations)
    logps: Tensor = _TiledLogps.apply(hidden, head.weight, head.bias, targets, options)
    return logps


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    dtype: torch.dtype
    gradient: Tensor | None
    operations: TileOperations


class _TiledLogps(torch.autograd.Function):
    """`tiled_logps`; the backward pass recomputes every tile from the inputs and the saved logsumexp."""

    @staticmethod
    def forward(
        ctx: AutogradContext, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> Tensor:
        tiles = _Tiles(hidden, weight, bias, targets, options)
        normalizer = Normalizer.start(len(hidden), hidden, _wide(options.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in tiles.columns():
                matrix = weight[columns].to(options.dtype)
                for tokens, tile in tiles.of(columns, matrix):
                    options.operations.logsumexp_and_target(tile, normalizer.of(tokens))
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer.logsumexp())
        ctx.options = options
        return normalizer.logps()

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        options: _Options = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide, grad = _wide(options.dtype), grad.contiguous()
        tiles = _Tiles(hidden, weight, bias, targets, options)
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        grad_weight = _gradient_of(weight, options.gradient) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in tiles.columns():
                matrix = weight[columns].to(options.dtype)
                grad_matrix = None if grad_weight is None else _sum_of(grad_weight[columns], wide)
                for tokens, tile in tiles.of(columns, matrix):
                    flow = tiles.flow(tile)
                    options.operations.logits_to_gradient(tile, logsumexp[tokens], grad[tokens], flow)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[tokens], flow, matrix)
                    if grad_matrix is not None:
                        _add_product(grad_matrix, flow.T, tiles.hidden[tokens])
                    if grad_bias is not None:
                        grad_bias[columns] += flow.sum(0, dtype=wide)
                if grad_weight is not None and grad_matrix is not None and grad_weight.dtype != wide:
                    grad_weight[columns] += grad_matrix
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight if options.gradient is None else None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


class _Tiles:
    """The tiles of one pass, all in the same memory.

    Attributes:
        hidden: in the compute type.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options) -> None:
        self.hidden, self._bias, self._targets, self._options = hidden.to(options.dtype), bias, targets, options
        self._vocabulary, tokens = len(weight), len(hidden)
        self._height = max(1, min(TILE_TOKENS, tokens))
        self._width = min(TILE_COLUMNS * (TILE_TOKENS // self._height), self._vocabulary)
        self._products = self._empty(_wide(options.dtype))
        self._flow: Tensor | None = None

    def _empty(self, dtype: torch.dtype) -> Tensor:
        # Rows keep this distance in narrower tiles too: reading and writing rows that are not aligned is slow.
        width = -(-self._width // 16) * 16
        return torch.empty(self._height, width, dtype=dtype, device=self.hidden.device)

    def columns(self) -> Iterator[slice]:
        """Return the columns of the vocabulary, in parts as wide as a tile."""
        return _parts(self._vocabulary, self._width)

    def of(self, columns: slice, matrix: Tensor) -> Iterator[tuple[slice, Tile]]:
        """Compute the tiles of some columns, one for each group of tokens; `matrix` are the columns' weights."""
        bias = None if self._bias is None else self._bias[columns]
        scale, softcap = self._options.scale, self._options.softcap
        for tokens in _parts(len(self.hidden), self._height):
            products = self._products[: tokens.stop - tokens.start, : len(matrix)]
            _product(self.hidden[tokens], matrix.T, out=products)
            yield tokens, Tile(products, self._targets[tokens], columns.start, bias, scale, softcap)

    def flow(self, tile: Tile) -> Tensor:
        """Return memory for a tile's gradient in the compute type: the tile's own if it has that type."""
        if tile.products.dtype == self._options.dtype:
            return tile.products
        if self._flow is None:
            self._flow = self._empty(self._options.dtype)
        rows, columns = tile.products.shape
        return self._flow[:rows, :columns]


def _parts(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gradient_of(weight: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(weight) if gradient is None else gradient


def _sum_of(rows: Tensor, wide: torch.dtype) -> Tensor:
    """Return what a gradient is added to: its own rows if they are wide enough, or zeros."""
    return rows if rows.dtype == wide else torch.zeros_like(rows, dtype=wide)


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Write `left @ right` to `out`, which may have a wider dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, which may have a wider dtype, without rounding the product to theirs."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of 16-bit numbers can be added to float32.

    They can since torch 2.10, which allows `addmm` a sum of another dtype, on CUDA and newer versions of ROCm.
    """
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        with torch.autocast(device.type, enabled=False):
            _product(ones, ones, out=total)
            _add_product(total, ones, ones)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return bool((total == 32).all())


@functools.cache
def _best_operations(device: torch.device) -> TileOperations:
    """Return Triton's operations if they work on this device, or those in plain torch.

    `torch.compile` would be no third way: on a GPU it needs Triton itself.
    """
    if device.type != "cuda":
        return PLAIN
    try:
        from offline_kto.kto_core.scoring.head_tiles_triton import TRITON

        tile = Tile(
            torch.zeros(16, 16, device=device), torch.zeros(16, dtype=torch.int64, device=device), 0, None, 1.0, None
        )
        TRITON.logsumexp_and_target(tile, Normalizer.start(16, tile.products, torch.float32))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Windows has no Triton; without a C compiler it fails in its own ways
        warn(f"The output layer runs in plain torch, which is slower, because Triton fails: {error}")
        return PLAIN
    return TRITON
