"""Run stage 1: do the quick checks, then make the cache with `pipeline.py`, whose imports take seconds."""

import time

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.launch import Launch, settle_launch
from offline_kto.kto_core.runtime import importing
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.out_folder import check_free, check_out

# A launcher ends all processes as soon as one has ended.
_SECONDS_TO_SPEAK = 3.0


def precompute(config: PrecomputeConfig, *, in_own_process: bool = False) -> None:
    """Run `kto-precompute`.

    Args:
        in_own_process: whether nothing but this run uses the process; see `importing`.

    Raises:
        KTOError: the user's input cannot be used.
    """
    for name, what in (("model", "a model folder or hub id"), ("data", "a file of feedback")):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing: name {what}.")
    _refuse_launch(settle_launch())
    if config.numbered_part is None:
        check_out(config.out)
        if not config.dry_run:
            check_free(config.out)
        tell(f"starting    {config.data} -> {config.out}")
        with importing(in_own_process=in_own_process):  # torch and transformers, which takes seconds
            from offline_kto.precompute.pipeline import make_cache
        make_cache(config, in_own_process=in_own_process)
    else:
        from offline_kto.precompute.planned_part import score_part

        score_part(config, *config.numbered_part)


def _refuse_launch(launch: Launch) -> None:
    """Refuse to run under a launcher, in one process of it; the others end quietly."""
    if launch.world_size == 1:
        return
    if not launch.is_first:
        time.sleep(_SECONDS_TO_SPEAK)
        raise SystemExit(1)
    raise ConfigError(
        f"kto-precompute is started once, but this is one of {launch.world_size} processes of a launch. Type the command without "
        f"torchrun or accelerate: it starts a worker for each GPU by itself. On a CPU, add --workers {launch.world_size}. If there "
        "is no launcher, unset WORLD_SIZE."
    )
