"""The run folder: choosing it, what is written at the start, and whether a resumed run is still the same run.

runs/NAME/config.yaml      resolved options, as `--config` takes them
runs/NAME/run.json         the cache's fingerprint, and what else the run was started with
runs/NAME/metrics.jsonl    one record for each log
runs/NAME/checkpoint-N/    what --resume goes on from
runs/NAME/_unfinished/     a checkpoint or model that is being written; it gets its name when it is whole and on the disk
runs/NAME/                 at the end: model, tokenizer, model card, evaluation.json, rewards.parquet, report.html
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from kto_core.console import tell
from kto_core.durable import flush, flush_all, give_usual_modes, remove_temporary, remove_tree, write_text
from kto_core.errors import ConfigError, TrainingError, WriteError, in_one_line
from kto_core.launch import world_size
from kto_core.lock import LOCK
from kto_core.manifest import Manifest
from kto_core.options import read_yaml
from train.checkpoints import check_checkpoint, seal
from train.config import TrainConfig
from train.resumed_options import compare_facts, compare_options
from train.run_files import CONFIG, FACTS, METRICS, config_text, make_folder, read_facts, refuse_pipes, write_facts
from train.saved_model import UnloadableModelError

_UNFINISHED = "_unfinished"  # the underscore keeps it from being pushed to the hub
_UNLOADABLE = "_unloadable"
_MAKES_LOADABLE = ("config.json", "adapter_config.json")

# What torch.save and tokenizers raise, as plain errors, where a disk is full.
_CANNOT_WRITE = re.compile(r"PytorchStreamWriter|inline_container\.cc|iostream error|os error|No space left on device")


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
    begun = (LOCK, f".{FACTS}.")
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith(begun))
    if found and not config.resume:
        raise ConfigError(
            f"--out {out}: the folder is not empty. Choose another one, or pass --resume to go on with the run in it."
        )
    if found and not (out / FACTS).exists():
        raise ConfigError(
            f"--resume {out}: holds {found[0]}, but no {FACTS}: it is no run of kto-train. Choose another --out."
        )


def last_checkpoint(
    config: TrainConfig, out: Path, manifest: Manifest, now: Mapping[str, Any], *, main: bool
) -> str | None:
    """The checkpoint to go on from, or None to start at the beginning.

    Args:
        now: what the run would compute with; see `compare_facts`.
        main: whether this is the rank that reads all of the checkpoint, and says what changed.

    Raises:
        ConfigError: the run in the folder was started with another cache, or with options that cannot change.
    """
    if not config.resume or not any(out.glob("[!.]*")):
        return None
    _check_same_cache(out, manifest)
    checkpoint: str | None = get_last_checkpoint(str(out))
    if checkpoint is not None:
        changed = _check_same_run(config, out, now)
        refuse_pipes(Path(checkpoint), "--resume")
        check_checkpoint(Path(checkpoint), hashes=main)
        for line in changed if main else ():
            tell(f"resume      {line}")
    return checkpoint


@contextlib.contextmanager
def unfinished(out: Path, what: str, *, main: bool) -> Iterator[Path]:
    """A folder to save into, for all ranks; it is gone after the block, with what the block left there.

    Args:
        what: is being saved, for the message.
        main: whether this is the rank that removes it.

    Raises:
        WriteError: the disk does not take it.
        TrainingError: what was saved is not the model.
    """
    folder = out / _UNFINISHED
    try:
        yield folder
    except UnloadableModelError as error:
        if main:
            remove_tree(out / _UNLOADABLE)
            folder.rename(out / _UNLOADABLE)
        raise TrainingError(f"{out / _UNLOADABLE}: {error}. Its weights are kept there, the run stops here.") from error
    except Exception as error:
        known = isinstance(error, OSError | SafetensorError)
        if not known and not _CANNOT_WRITE.search(str(error)):
            raise
        reason = in_one_line(error) if known else "the disk does not take it"
        saved = get_last_checkpoint(str(out)) is not None
        then = "What was saved before is whole" if saved else "Nothing was saved before"
        go_on = "go on from there" if saved else "begin again"
        raise WriteError(
            f"{out}: the {what} cannot be written: {reason}. {then}; make room, and pass --resume to {go_on}."
        ) from error
    finally:
        if main:
            remove_tree(folder)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run was writing."""
    remove_temporary(out)
    remove_tree(out / _UNFINISHED)


def publish_checkpoint(folder: Path, out: Path) -> None:
    """Give a checkpoint its name, once it and the metrics up to it are on the disk."""
    give_usual_modes(folder)
    seal(folder)
    flush(out / METRICS)
    remove_tree(out / folder.name)  # one that --resume did not go on from
    folder.rename(out / folder.name)
    flush(out)


def remove_old_checkpoints(out: Path, *, keep: int | None, best: str | None) -> None:
    """Remove all but the last ones.

    Args:
        keep: how many stay; None for all.
        best: the checkpoint that stays whatever its age.
    """
    # By number: what a killed run removed in part is the newest by time.
    rotate_checkpoints(str(out), save_total_limit=keep, best_model_checkpoint=best, use_mtime=False)


def publish_model(folder: Path, out: Path) -> None:
    """Move a saved model into the run folder; what makes it loadable comes last."""
    give_usual_modes(folder)
    flush_all(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name in _MAKES_LOADABLE):
        if path.is_dir():
            remove_tree(out / path.name)  # of a run that was finished before and went on
        path.replace(out / path.name)
    flush(out)


def _check_same_cache(out: Path, manifest: Manifest) -> None:
    facts, now = read_facts(out), manifest.rows_identity
    for name, what in (("fingerprint", "another cache"), ("labels_hash", "other labels or another row order")):
        if facts.get(name) != now[name]:
            raise ConfigError(
                f"--resume {out}: the run was started with {what} ({name} {str(facts.get(name))[:12]}, now "
                f"{str(now[name])[:12]}). Pass the cache it was started with, or start a new run."
            )


def _check_same_run(config: TrainConfig, out: Path, now: Mapping[str, Any]) -> list[str]:
    if not (out / CONFIG).exists():
        raise ConfigError(f"--resume {out}: holds a checkpoint, but no config.yaml. Start a new run.")
    return compare_options(config, read_yaml(out / CONFIG, foreign=True), out) + compare_facts(
        now, read_facts(out), out
    )


def write_start(config: TrainConfig, out: Path, facts: dict[str, Any]) -> None:
    """Write config.yaml and run.json. The folder stays empty until the checks before the first update have passed."""
    write_facts(out, facts)  # first: what tells the folder is a run's
    write_text(out / CONFIG, config_text(config))
