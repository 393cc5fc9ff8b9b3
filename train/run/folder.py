"""The run folder: choosing it, what is written at the start, and whether a resumed run is still the same run.

runs/NAME/config.yaml      resolved options, as `--config` takes them
runs/NAME/run.json         the cache's fingerprint, and what else the run was started with
runs/NAME/metrics.jsonl    one record for each log
runs/NAME/checkpoint-N/    what --resume goes on from
runs/NAME/_unfinished/     a checkpoint or model that is being written; it gets its name when it is whole and on the disk
runs/NAME/                 at the end: model, tokenizer, model card, evaluation.json, rewards.parquet, report.html
"""

from collections.abc import Mapping
from pathlib import Path

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.launch import world_size
from offline_kto.kto_core.lock import LOCK
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.resumed_options import compare_facts, compare_options
from offline_kto.train.run_files import (
    CONFIG,
    RUN_RECORD,
    config_text,
    make_folder,
    read_run_record,
    refuse_pipes,
    write_run_record,
)
from offline_kto.train.run_records import ComputedWith, RunRecord


def refuse_unnamed(config: TrainConfig) -> None:
    """Several processes write into one folder.

    Raises:
        ConfigError: each of them would make up its own.
    """
    if config.out is None and world_size() > 1:
        raise ConfigError("Several processes need --out: each of them would name the run after its own clock.")


def choose_folder(config: TrainConfig) -> Path:
    """The folder named by `--out`, or runs/ and the time; it is made if it does not exist.

    Raises:
        ConfigError: a file, or not writable.
    """
    return make_folder(config.out, "runs")


def refuse_occupied(config: TrainConfig, out: Path) -> None:
    """A run begins in an empty folder; with `--resume` it may go on in its own.

    Called with the folder's lock held, which names who is writing there.

    Raises:
        ConfigError: the folder holds something else.
    """
    # What a run leaves that is killed before its first file is whole.
    begun = (LOCK, f".{RUN_RECORD}.")
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith(begun))
    if found and not config.resume:
        raise ConfigError(
            f"--out {out}: the folder is not empty. Choose another one, or pass --resume to go on with the run in it."
        )
    if found and not (out / RUN_RECORD).exists():
        raise ConfigError(
            f"--resume {out}: holds {found[0]}, but no {RUN_RECORD}: it is no run of kto-train. Choose another --out."
        )


def last_checkpoint(config: TrainConfig, out: Path, manifest: Manifest, now: ComputedWith, *, main: bool) -> str | None:
    """The checkpoint to go on from, or None to start at the beginning.

    Args:
        now: what the run would compute with; see `compare_facts`.
        main: whether this is the rank that reads all of the checkpoint, and says what changed.

    Raises:
        ConfigError: the run in the folder was started with another cache, or with options that cannot change.
    """
    if not config.resume or not any(out.glob("[!.]*")):
        return None
    # Heavy, and the folder is looked at before anything heavy is loaded.
    from transformers.trainer_utils import get_last_checkpoint

    from offline_kto.train.trainer.checkpoints import check_checkpoint

    _check_same_cache(out, manifest)
    checkpoint: str | None = get_last_checkpoint(str(out))
    if checkpoint is not None:
        changed = _check_same_run(config, out, now)
        refuse_pipes(Path(checkpoint), "--resume")
        check_checkpoint(Path(checkpoint), hashes=main)
        for line in changed if main else ():
            tell(f"resume      {line}")
    return checkpoint


def _check_same_cache(out: Path, manifest: Manifest) -> None:
    what = {"fingerprint": "another cache", "labels_hash": "other labels or another row order"}
    before: Mapping[str, object] = read_run_record(out)
    for name, now in manifest.rows_identity.items():
        if before.get(name) != now:
            raise ConfigError(
                f"--resume {out}: the run was started with {what[name]} ({name} {str(before.get(name))[:12]}, now "
                f"{str(now)[:12]}). Pass the cache it was started with, or start a new run."
            )


def _check_same_run(config: TrainConfig, out: Path, now: ComputedWith) -> list[str]:
    if not (out / CONFIG).exists():
        raise ConfigError(f"--resume {out}: holds a checkpoint, but no config.yaml. Start a new run.")
    return compare_options(config, read_yaml(out / CONFIG, foreign=True), out) + compare_facts(
        now, read_run_record(out), out
    )


def write_start(config: TrainConfig, out: Path, facts: RunRecord) -> None:
    """Write config.yaml and run.json. The folder stays empty until the checks before the first update have passed."""
    write_run_record(out, facts)  # first: what tells the folder is a run's
    write_text(out / CONFIG, config_text(config))
