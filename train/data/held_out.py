"""Define the held-out rows of a run, and check that a cache has enough prompts for them; light to import."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.feedback.quoting import counted

if TYPE_CHECKING:
    import numpy as np

    from offline_kto.train.data.cache_rows import CacheRows


@dataclass(frozen=True)
class HeldOutRows:
    """The cache and the positions of held-out rows, shape (rows,); the two rows of a pair are neighbours."""

    cache: "CacheRows"
    indices: "np.ndarray"


def held_out_prompts(fraction: float, prompts: int) -> int:
    """Return how many of the distinct prompts are held out."""
    return round(fraction * prompts)


def check_fraction(fraction: float, prompts: int) -> None:
    """Check that a fraction of the prompts leaves rows on both sides. Raises: TrainingError: it does not."""
    held_out = held_out_prompts(fraction, prompts)
    if 0 < held_out < prompts:
        return
    side = "trained on" if held_out else "held out"
    what = f"--eval-fraction {fraction:g} of {counted(prompts, 'prompt')} leaves no row to be {side}."
    if prompts < 2:
        raise TrainingError(f"{what} Score feedback on more prompts, or give held-out rows with --eval-cache.")
    one = math.ceil(100 / prompts) / 100  # of two prompts a half, of three 0.34
    usable = f"{1 - one:g} or less" if held_out else f"{one:g} or more"
    value = 1 - one if held_out else one
    raise TrainingError(
        f"{what} Use {usable} (in a sweep, train: {{eval_fraction: {value:g}}}), score feedback on more prompts, or give "
        "held-out rows with --eval-cache."
    )
