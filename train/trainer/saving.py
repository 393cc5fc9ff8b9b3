"""Publish checkpoints and models; `checkpoints.py` verifies and loads checkpoints.

Files are saved into an unfinished folder, which is renamed once everything is on disk.
"""

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from offline_kto.kto_core.durable_files import flush, flush_all, give_usual_modes, remove_temporary, remove_tree
from offline_kto.kto_core.errors import TrainingError, WriteError, in_one_line
from offline_kto.kto_core.library_types import Model
from offline_kto.train.model.saved_model import UnloadableModelError, narrowed
from offline_kto.train.run_files import METRICS
from offline_kto.train.trainer.checkpoints import seal
from offline_kto.train.trainer.sharding import local_part

_UNFINISHED = "_unfinished"  # the underscore keeps it from being pushed to the hub
_UNLOADABLE = "_unloadable"
_MAKES_LOADABLE = ("config.json", "adapter_config.json")
# Messages of the generic errors that torch.save and tokenizers raise when a disk is full.
_CANNOT_WRITE = re.compile(r"PytorchStreamWriter|inline_container\.cc|iostream error|os error|No space left on device")


@contextlib.contextmanager
def unfinished(out: Path, what: str, *, main: bool) -> Iterator[Path]:
    """Yield a folder to save into, for all ranks; it is removed after the block with its remaining content.

    Args:
        what: name of what is saved, for the message.
        main: whether this is the rank that removes it.

    Raises:
        WriteError: it cannot be written.
        TrainingError: the saved files are not the model.
    """
    folder = out / _UNFINISHED
    try:
        yield folder
    except UnloadableModelError as error:
        if main:
            remove_tree(out / _UNLOADABLE)
            folder.rename(out / _UNLOADABLE)
        raise TrainingError(
            f"{out / _UNLOADABLE}: {error}. Its weights are kept in that folder, and the run stops."
        ) from error
    except Exception as error:
        known = isinstance(error, OSError | SafetensorError)
        if not known and not _CANNOT_WRITE.search(str(error)):
            raise
        reason = in_one_line(error) if known else "the disk is full or not writable"
        saved = get_last_checkpoint(str(out)) is not None
        then = "Earlier checkpoints are intact" if saved else "There is no earlier checkpoint"
        how = "continue from there" if saved else "start again"
        raise WriteError(
            f"{out}: the {what} cannot be written: {reason}. {then}; make room, and pass --resume to {how}."
        ) from error
    finally:
        if main:
            remove_tree(folder)


def remove_leftovers(out: Path) -> None:
    """Remove the unfinished files of a killed run."""
    remove_temporary(out)
    remove_tree(out / _UNFINISHED)


def publish_checkpoint(folder: Path, out: Path) -> None:
    """Rename a checkpoint to its final name, once it and the metrics up to it are on disk."""
    give_usual_modes(folder)
    seal(folder)
    flush(out / METRICS)
    remove_tree(out / folder.name)  # one that --resume did not resume from
    folder.rename(out / folder.name)
    flush(out)


def rename_best(state: transformers.TrainerState, checkpoint: Path, out: Path, *, main: bool) -> None:
    """Record the best checkpoint, if it is this one, under the name it will have when published.

    Args:
        state: the Trainer's, written into the checkpoint again.
        checkpoint: in an unfinished folder.
        out: where it will be published.
        main: whether this is the rank that writes.
    """
    if state.best_model_checkpoint != str(checkpoint):
        return
    state.best_model_checkpoint = str(out / checkpoint.name)
    if main:
        state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))


def remove_old_checkpoints(out: Path, *, keep: int | None, best: str | None) -> None:
    """Remove all but the last checkpoints.

    Args:
        keep: how many to keep; None for all.
        best: a checkpoint to keep whatever its age.
    """
    # By number: a checkpoint that a killed run removed partly is the newest by time.
    rotate_checkpoints(str(out), save_total_limit=keep, best_model_checkpoint=best, use_mtime=False)


@torch.no_grad()
def round_weights(model: Model, dtype: torch.dtype, *, keep: Collection[str]) -> None:
    """Round the trained weights to the values they will have once saved in `dtype`; called on every rank.

    Args:
        keep: names of weights that are saved as they are.

    Raises:
        TrainingError: the type cannot represent a value.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and name not in keep:
            part = local_part(weight)
            part.copy_(narrowed(name, part, dtype))


def publish_model(folder: Path, out: Path) -> None:
    """Move a saved model into the run folder; the files that make it loadable are moved last."""
    give_usual_modes(folder)
    flush_all(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name in _MAKES_LOADABLE):
        if path.is_dir():
            remove_tree(out / path.name)  # left by a finished run that was resumed
        path.replace(out / path.name)
    flush(out)
