"""Implement the operations on tiles of logits in Triton: each reads a tile once, and writes it at most once.

Importing this module imports Triton, which comes with torch for CUDA and ROCm on Linux. A row of a tile is read in
blocks of a few thousand columns, which fit into the registers of one program. Everything is computed in the dtype of
the products, float32 or float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offline_kto.kto_core.scoring.head_tiles import Normalizer, Tile, TileOperations

BLOCK = 4096
"""Columns that a program holds in registers at a time, a power of two."""

LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}
"""Eight warps have 16 of the columns in each thread. Fused multiply-add is Triton's default up to 3.9."""


# `scale` and `softcap` are compiled in: passed at run time they would be float32, too narrow for float64 logits.
@triton.jit
def _to_logits(products, scale: tl.constexpr, softcap: tl.constexpr):
    logits = products * scale
    if softcap is not None:
        logits = softcap * (2 * tl.sigmoid(logits * (2 / softcap)) - 1)  # tanh(x) = 2 * sigmoid(2 * x) - 1
    return logits


# `first` and `columns` differ between tiles, which is no reason to compile again. `padded` is mostly a multiple of 16: the
# compiler then knows that 16 bytes at a time may be read, whatever the size of the vocabulary.
@triton.jit(do_not_specialize=["first", "columns"])
def logsumexp_and_target(
    products,
    stride,
    targets,
    bias,
    largest,
    total,
    chosen,
    first,
    columns,
    padded,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    block: tl.constexpr,
):
    """Add one row of a tile, that of program 0's index, to the statistics of its token."""
    row = tl.program_id(0).to(tl.int64)  # times the stride, it may exceed 32 bits
    products += row * stride
    high = tl.load(largest + row)
    sum_exp = tl.load(total + row)
    for start in range(0, columns, block):
        offsets = start + tl.arange(0, block)
        inside = offsets < columns
        values = tl.load(products + offsets, mask=offsets < padded, other=0.0)
        if bias is not None:
            values += tl.load(bias + offsets, mask=inside, other=0.0).to(values.dtype)
        logits = tl.where(inside, _to_logits(values, scale, softcap), -float("inf"))
        higher = tl.maximum(high, tl.max(logits, axis=0))
        sum_exp = sum_exp * tl.exp(high - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        high = higher
    tl.store(largest + row, high)
    tl.store(total + row, sum_exp)
    target = tl.load(targets + row) - first
    if (target >= 0) & (target < columns):
        value = tl.load(products + target)
        if bias is not None:
            value += tl.load(bias + target).to(value.dtype)
        tl.store(chosen + row, _to_logits(value, scale, softcap))


@triton.jit(do_not_specialize=["first", "columns"])
def logits_to_gradient(
    products,
    stride,
    out,
    out_stride,
    targets,
    bias,
    logsumexp,
    grad,
    first,
    columns,
    padded,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    block: tl.constexpr,
):
    """Write the gradient by one block of one row of products. `out` may be `products`: each is read before written."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * block + tl.arange(0, block)
    values = tl.load(products + row * stride + offsets, mask=offsets < padded, other=0.0)
    if bias is not None:
        values += tl.load(bias + offsets, mask=offsets < columns, other=0.0).to(values.dtype)
    logits = _to_logits(values, scale, softcap)
    # d logp / d logits = onehot(target) - softmax(logits)
    probabilities = tl.exp(logits - tl.load(logsumexp + row))
    is_target = offsets == tl.load(targets + row) - first
    flow = tl.load(grad + row) * tl.where(is_target, 1.0 - probabilities, -probabilities)
    if softcap is not None:
        slope = logits / softcap
        flow *= 1.0 - slope * slope
    tl.store(out + row * out_stride + offsets, (flow * scale).to(out.dtype.element_ty), mask=offsets < padded)


def _padded(columns: int, *tiles: Tensor) -> int:
    """Return the columns rounded up to a multiple of 16, as far as the rows of these tiles are in memory."""
    return min(-(-columns // 16) * 16, *(tile.stride(0) for tile in tiles))


def _logsumexp_and_target(tile: Tile, normalizer: Normalizer) -> None:
    tokens, columns = tile.products.shape
    with torch.cuda.device_of(tile.products):  # Triton launches on the current device
        logsumexp_and_target[(tokens,)](
            tile.products,
            tile.products.stride(0),
            tile.targets,
            tile.bias,
            *normalizer,
            tile.first,
            columns,
            _padded(columns, tile.products),
            scale=tile.scale,
            softcap=tile.softcap,
            block=BLOCK,
            **LAUNCH,
        )


def _logits_to_gradient(tile: Tile, logsumexp: Tensor, grad: Tensor, out: Tensor) -> None:
    tokens, columns = tile.products.shape
    with torch.cuda.device_of(tile.products):
        logits_to_gradient[(tokens, triton.cdiv(columns, BLOCK))](
            tile.products,
            tile.products.stride(0),
            out,
            out.stride(0),
            tile.targets,
            tile.bias,
            logsumexp,
            grad,
            tile.first,
            columns,
            _padded(columns, tile.products, out),
            scale=tile.scale,
            softcap=tile.softcap,
            block=BLOCK,
            **LAUNCH,
        )


TRITON = TileOperations(_logsumexp_and_target, _logits_to_gradient)
"""The operations in Triton: one pass over memory each."""
