"""Store Adam's moments in 8 bits a value, with one float32 scale for each block of a row.

A value is `scale * (code / levels) ** power`: the scale is the largest magnitude of the block, and the power spreads
the codes over many orders of magnitude. The power of the second moment is twice that of the first, because it is a
square. Blocks do not cross rows: in an embedding table a row is a token, and a rare token's moments would vanish next
to those of a frequent one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class Format:
    """An 8-bit format.

    Attributes:
        dtype: of the codes.
        levels: the largest code.
        halvings: the power is 2 ** halvings.
    """

    dtype: torch.dtype
    levels: int
    halvings: int


FIRST = Format(torch.int8, 127, 2)  # signed; 1 to 1e-8 of a block's largest value
SECOND = Format(torch.uint8, 255, 3)  # never negative; 1 to 1e-19


def block_of(part: Tensor) -> int | None:
    """Return the number of values that share one scale; None for a weight whose moments stay in float32.

    Those are norms, biases and odd widths, which are not worth it, and weights that are not contiguous. A rank whose
    part of a sharded weight is empty gets the number of the other ranks, so that all save the same states.
    """
    width = part.shape[-1] if part.ndim > 1 else 0
    if not width or not part.is_contiguous():
        return None
    block = next(size for size in range(min(BLOCK, width), 0, -1) if width % size == 0)
    return block if block >= _LEAST_BLOCK else None


def decode(codes: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Return float32 values of some blocks.

    Args:
        codes: shape (blocks, block).
        scale: float32, shape (blocks, 1).
    """
    return _shares(codes.float(), form) * scale


def encode(values: Tensor, form: Format, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of some blocks.

    Args:
        values: float32, shape (blocks, block).
        noise: in [0, 1), as `values`: rounds up with the probability that keeps the mean; None rounds to the nearest.
            A second moment changes by 0.1 % in an update, far less than the distance of two codes, so that it would
            never follow smaller gradients if it were rounded to the nearest.
    """
    scale = values.abs().amax(-1, keepdim=True)
    shares = values / scale.clamp(min=torch.finfo(torch.float32).tiny)
    places = shares.abs()
    for _ in range(form.halvings):
        places = places.sqrt()
    places = places * form.levels
    if noise is None:
        codes = places.round()
    else:
        # Between the values of two codes, not between the codes: the mean of a power is not the power of a mean.
        low = places.floor().clamp(max=form.levels - 1)
        below, above = _shares(low, form), _shares(low + 1, form)
        codes = low + (shares.abs() - below > noise * (above - below))
    if form.dtype == torch.int8:
        codes = codes.copysign(shares)
    return codes.to(form.dtype), scale


def _shares(codes: Tensor, form: Format) -> Tensor:
    """Return the shares of the scale that codes stand for, with their sign."""
    shares = codes / form.levels
    powers = shares.square()
    for _ in range(form.halvings - 1):
        powers = powers.square()
    return powers.copysign(shares)
