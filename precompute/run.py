"""Run stage 1: do the quick checks, then make the cache with `pipeline.py`, whose imports take seconds."""

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.launch import settle_launch
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.out_folder import check_out


def precompute(config: PrecomputeConfig) -> None:
    """Run `kto-precompute`, or one rank of it.

    Raises:
        KTOError: the user's input cannot be used.
    """
    for name, what in (("model", "a model folder or hub id"), ("data", "a file of feedback")):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing: name {what}.")
    if settle_launch().is_first:
        check_out(config.out)
        tell(f"starting    {config.data} -> {config.out}")
    from offline_kto.precompute.pipeline import make_cache  # imports torch and transformers, which takes seconds

    make_cache(config)
