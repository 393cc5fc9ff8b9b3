"""Choose and check the run folder, write its first files, and find the checkpoint to resume from.

runs/NAME/config.yaml      resolved options, as `--config` takes them
runs/NAME/run.json         the cache's fingerprint and the other settings the run was started with
runs/NAME/metrics.jsonl    one record for each log
runs/NAME/samples.jsonl    completions of held-out prompts, before and after training
runs/NAME/checkpoint-N/    a checkpoint that --resume can resume from
runs/NAME/_unfinished/     a checkpoint or model being written; it is renamed once it is complete and on disk
runs/NAME/hub/             what --push-to-hub uploads; it is removed once that is done
runs/NAME/                 at the end: model, tokenizer, model card, evaluation.json, rewards.parquet, report.html
"""

from pathlib import Path

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import ConfigError, shown
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.launch import world_size
from offline_kto.kto_core.lock import LOCK
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.resumed_options import compare_options, compare_records
from offline_kto.train.run_files import (
    CONFIG,
    RUN_RECORD,
    config_text,
    read_run_record,
    refuse_pipes,
    write_run_record,
)
from offline_kto.train.run_records import ComputedWith, RunRecord

# The folder of runs without --out.
RUNS = "runs"


def refuse_unnamed(config: TrainConfig) -> None:
    """Check that a launch of several processes names its folder.

    Raises:
        ConfigError: `--out` is missing, so each process would choose its own folder.
    """
    if config.out is None and world_size() > 1:
        raise ConfigError("Several processes need --out: without it each of them would choose its own folder.")


def refuse_occupied(config: TrainConfig, out: Path) -> None:
    """Check that the run folder is empty, or with `--resume` contains a run.

    Called with the folder's lock held, which identifies the writer.

    Raises:
        ConfigError: the folder contains something else.
    """
    # Left by a run that was killed before its first file was complete.
    begun = (LOCK, f".{RUN_RECORD}.")
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith(begun))
    if found and not config.resume:
        raise ConfigError(
            f"--out {out}: the folder is not empty. Choose another one, or pass --resume to continue the run in it."
        )
    if found and not (out / RUN_RECORD).exists():
        raise ConfigError(
            f"--resume {out}: contains {found[0]}, but no {RUN_RECORD}, so it is not a kto-train run. Choose another --out."
        )


def last_checkpoint(
    config: TrainConfig, out: Path, manifest: Manifest, now: ComputedWith, *, updates: int, main: bool
) -> str | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        updates: number of updates of the whole run.
        now: the settings the run would compute with; see `compare_records`.
        main: whether this is the rank that verifies the checkpoint and logs changed options.

    Raises:
        ConfigError: the run in the folder was started with another cache, or with options that cannot change.
    """
    if not config.resume or not any(out.glob("[!.]*")):
        return None
    # Imported late, because the folder is checked before slow imports.
    from transformers.trainer_utils import get_last_checkpoint

    from offline_kto.train.trainer.checkpoints import check_checkpoint

    _check_same_cache(out, manifest)
    checkpoint: str | None = get_last_checkpoint(str(out))
    if checkpoint is not None:
        made = int(Path(checkpoint).name.rpartition("-")[2])
        changed = _check_same_run(config, out, now, finished=made >= updates)
        refuse_pipes(Path(checkpoint), "--resume")
        check_checkpoint(Path(checkpoint), hashes=main)
        for line in changed if main else ():
            tell(f"resume      {line}")
    return checkpoint


def _check_same_cache(out: Path, manifest: Manifest) -> None:
    before = read_run_record(out)
    identity = manifest.rows_identity
    if before.get("fingerprint") != identity["fingerprint"]:
        what = f"another cache than --cache: {_difference(before, manifest)}"
    elif before.get("labels_hash") != identity["labels_hash"]:
        what = "other labels or another row order: --cache has the same rows and scores, but was made again from changed feedback"
    else:
        return
    raise ConfigError(
        f"--resume {out}: the run was started with {what}. Pass the cache it was started with, or start a new run."
    )


def _difference(before: RunRecord, manifest: Manifest) -> str:
    """Return in words how the cache of a run differs from another one."""
    identity = before.get("identity")
    if not isinstance(identity, dict):
        return "its reference or its rows differ"
    lines = [
        f"{name} was {shown(identity.get(name))}, now {shown(manifest.identity.get(name))}"
        for name in sorted({*identity, *manifest.identity})
        if identity.get(name) != manifest.identity.get(name) and not name.endswith("hash")
    ]
    if lines:
        return "; ".join(lines)
    hashes = [
        name for name in sorted({*identity, *manifest.identity}) if identity.get(name) != manifest.identity.get(name)
    ]
    if hashes:
        return f"the files of its reference are others ({', '.join(name.removesuffix('_hash') for name in hashes)})"
    return f"the same reference has scored other rows, or other mismatched completions ({counted(manifest.rows, 'row')} now)"


def _check_same_run(config: TrainConfig, out: Path, now: ComputedWith, *, finished: bool) -> list[str]:
    if not (out / CONFIG).exists():
        raise ConfigError(f"--resume {out}: contains a checkpoint, but no config.yaml. Start a new run.")
    options = compare_options(config, read_yaml(out / CONFIG, foreign=True), out, finished=finished)
    return options + compare_records(now, read_run_record(out), out)


def write_start(config: TrainConfig, out: Path, record: RunRecord) -> None:
    """Write config.yaml and run.json; called after the checks before the first update have passed."""
    write_run_record(out, record)  # written first: it marks the folder as a run's
    write_text(out / CONFIG, config_text(config))
