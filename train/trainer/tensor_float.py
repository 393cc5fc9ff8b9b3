"""Compute float32 matrix products in TF32 on a GPU where the cache was scored in bfloat16, which is coarser.

Runs in float32 on a cache in bfloat16 are mostly DeepSpeed's, which would save 16-bit weights otherwise. TF32 keeps ten
bits of the mantissa, bfloat16 seven, and only TF32 and 16 bits use a GPU's tensor cores.
"""

import contextlib
from collections.abc import Iterator

import torch

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.models.precision import Precision
from offline_kto.train.config import TrainConfig


def tf32_suffices(config: TrainConfig, precision: Precision, device: torch.device, manifest: Manifest) -> bool:
    """Return whether a run's float32 products may be computed in TF32: `training: {tf32: ...}` decides otherwise."""
    coarser = manifest.reference.get("dtype") == "bfloat16"
    return device.type == "cuda" and precision.is_full and coarser and config.training.get("tf32") is None


@contextlib.contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Compute float32 matrix products in TF32 while the block runs, unless the user's own setting is another one."""
    if not wanted or not _is_default():
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9: "highest" left "ieee" there
            torch.backends.cuda.matmul.fp32_precision = "none"


def _is_default() -> bool:
    settings = (torch.backends, torch.backends.cuda.matmul)
    if any(getattr(one, "fp32_precision", "none") != "none" for one in settings):
        return False
    return torch.get_float32_matmul_precision() == "highest"
