"""Declare the options of `kto-sweep` and of the space that it searches."""

from dataclasses import dataclass
from pathlib import Path

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.locations import Location
from offline_kto.kto_core.options import check_options, flag, option
from offline_kto.train.config import METRICS, VERIFICATIONS, TrainConfig

SEARCHES = ("grid", "random", "tpe")
PRUNERS = ("none", "median")

# Default number of trials of an unlimited search, and the maximum of any search.
USUAL_TRIALS, MOST_TRIALS = 20, 100_000


@dataclass(frozen=True)
class SweepConfig:
    """The options of `kto-sweep`."""

    cache: Location = option(
        Path(""), "Reference cache made by kto-precompute: a folder, or its URL (s3://, gs://, hf://).", metavar="DIR"
    )
    verify: str = option(
        "full",
        "How the first worker verifies the cache: full reads every byte; changed reads only files that changed since they were verified "
        "here. The other workers rely on it.",
        choices=VERIFICATIONS,
    )
    out: Path | None = option(None, "Sweep folder.  [default: sweeps/ and the time]", metavar="DIR")
    search: str = option("tpe", "How trials are chosen.", choices=SEARCHES)
    metric: str = option("eval/loss", "Held-out value by which trials are compared.", choices=METRICS)
    trials: int | None = option(None, f"How many trials.  [default: the whole grid, else {USUAL_TRIALS}]", metavar="N")
    pruning: str = option(
        "none", "Stop trials early that fall behind at an evaluation (--eval-steps).", choices=PRUNERS
    )
    workers: int | None = option(
        None,
        "Trials that run at the same time, each in its own process.  [default: one for each GPU, one on a CPU]",
        metavar="N",
    )
    storage: str | None = option(
        None,
        "Database of the study (Optuna's URL, or grpc://HOST:PORT), shared by several machines.  [default: study.db in --out]",
        metavar="URL",
    )
    seed: int = option(0, "Seed of the search.", most=2**32 - 1)
    space: dict[str, object] = option(
        dict, "YAML only: values or ranges of kto-train's options.", options_of=TrainConfig
    )
    train: dict[str, object] = option(
        dict, "YAML only: kto-train's options that are the same in all trials.", options_of=TrainConfig
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("trials", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, got {value}.")
        if self.seed < 0:
            raise ConfigError(f"--seed must be at least 0, got {self.seed}.")
