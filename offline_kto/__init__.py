"""Align language models from thumbs-up/down feedback, with a reference model that is scored once.

    import offline_kto as kto

    kto.precompute("base", "feedback.jsonl", out="refs")
    run = kto.train("refs", out="runs/first", lora_rank=16)
    print(run.last("loss"), run.path)

Options are those of the commands, with underscores. Log lines are printed as by the commands;
`logging.getLogger("offline_kto").setLevel("WARNING")` silences them and the progress bars. Errors that a user can fix
are raised as `KTOError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offline_kto.api import open_cache as open_cache
    from offline_kto.api import precompute as precompute
    from offline_kto.api import read as read
    from offline_kto.api import report as report
    from offline_kto.api import sweep as sweep
    from offline_kto.api import to_trl as to_trl
    from offline_kto.api import train as train
    from offline_kto.api import verify as verify
    from offline_kto.kto_core.errors import KTOError as KTOError
    from offline_kto.precompute.config import PrecomputeConfig as PrecomputeConfig
    from offline_kto.train.config import TrainConfig as TrainConfig
    from offline_kto.train.sweep.config import SweepConfig as SweepConfig

    __version__: str

# Where each name is defined; it is imported on first use. `precompute` and `train` are callable packages, because
# importing one of their modules sets the package as an attribute here.
_HOMES = {
    **dict.fromkeys(("open_cache", "read", "report", "sweep", "to_trl", "verify"), "offline_kto.api"),
    "KTOError": "offline_kto.kto_core.errors",
    "PrecomputeConfig": "offline_kto.precompute.config",
    "TrainConfig": "offline_kto.train.config",
    "SweepConfig": "offline_kto.train.sweep.config",
}
_PACKAGES = ("kto_core", "precompute", "train")

__all__ = [
    "KTOError",
    "PrecomputeConfig",
    "SweepConfig",
    "TrainConfig",
    "open_cache",
    "precompute",
    "read",
    "report",
    "sweep",
    "to_trl",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"offline_kto.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("offline-kto")
    raise AttributeError(f"module 'offline_kto' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
