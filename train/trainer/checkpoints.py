"""Verify and load checkpoints; `saving.py` publishes them.

A checkpoint is verified by the size and sha256 of each of its files, and errors while it is loaded become messages.
"""

import contextlib
import json
import re
import stat
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from offline_kto.kto_core.durable_files import flush_all, write_json
from offline_kto.kto_core.errors import ConfigError, KTOError, TrainingError, said_by, shown
from offline_kto.kto_core.hashing import file_hashes
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.options import value_types
from offline_kto.kto_core.out_of_memory import is_out_of_memory
from offline_kto.train.model.saved_model import ADAPTER_CONFIG, check_adapters, load_weights

_FILES = "sizes.json"
_LOADED = (".safetensors", ".json", ".pt", ".pth", ".bin")
_STATE = "trainer_state.json"
_OPTIMIZERS = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_*",
    "global_step*",
)  # one device, FSDP whole and in parts, DeepSpeed

_BEFORE = "Remove that folder; --resume then resumes from the one before."


def seal(checkpoint: Path) -> None:
    """Record size and sha256 of every file, and flush all files to disk. Hashing and flushing run in parallel."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashing = pool.submit(file_hashes, paths)
        flush_all(checkpoint)
        hashes = hashing.result()
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(paths, hashes, strict=True)
    }
    write_json(checkpoint / _FILES, files)


def check_checkpoint(checkpoint: Path, *, hashes: bool = True) -> None:
    """Compare a checkpoint with its record, so that damaged or partly copied files are not loaded.

    Args:
        hashes: whether to compare contents as well as sizes. Checkpoints of older versions have no hashes.

    Raises:
        ConfigError: a file is missing or damaged, or the checkpoint has no optimizer state to resume from.
    """
    try:
        files = _files_of(checkpoint)
        found_there = {
            path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.suffix in _LOADED
        }
        if added := sorted(found_there - files.keys() - {_FILES}):
            raise OSError(f"{added[0]} was not written with it")
        for name, entry in files.items():
            status = (checkpoint / name).stat()
            found = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{name} is not a file")
            if found != entry["bytes"]:
                raise OSError(f"{name} has {found} bytes, {entry['bytes']} were written")
        with_hash = [name for name, entry in files.items() if hashes and "sha256" in entry]
        for name, sha256 in zip(with_hash, file_hashes(checkpoint / name for name in with_hash), strict=True):
            if sha256 != files[name]["sha256"]:
                raise OSError(f"{name} changed since it was written: its sha256 differs")
        for name in files.keys() - {*with_hash} if hashes else ():
            if name.endswith((".pt", ".pth")) and _is_damaged(checkpoint / name):
                raise OSError(f"{name} is damaged")
        _check_state(checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint}: an incomplete checkpoint ({said_by(error)}). {_BEFORE}") from error
    if not any(True for pattern in _OPTIMIZERS for _ in checkpoint.glob(pattern)):
        raise ConfigError(
            f"{checkpoint}: contains no optimizer state (training: save_only_model), so a resumed run would not match "
            "an uninterrupted run. Start a new run; this checkpoint's model can be passed with --model."
        )


def _files_of(checkpoint: Path) -> dict[str, dict[str, object]]:
    try:
        files = json.loads((checkpoint / _FILES).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_FILES} is not JSON: {said_by(error)}") from error
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{_FILES} has no list of written files")
    entries = {name: entry if isinstance(entry, dict) else {"bytes": entry} for name, entry in files.items()}
    for name, entry in entries.items():
        if not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256", ""), str):
            raise ValueError(f"{_FILES} has no size of {shown(name)}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{_FILES} names {shown(name)}, which is not in this folder")
    return entries


def _check_state(checkpoint: Path) -> None:
    """Check the fields of the saved state that the Trainer reads without checking."""
    try:
        state = transformers.TrainerState.load_from_json(str(checkpoint / _STATE))
        step = state.global_step
        numbers = [name for name, kinds in value_types(transformers.TrainerState).items() if {int, float} & set(kinds)]
        for name in numbers:
            value, needed = getattr(state, name), name in ("global_step", "train_batch_size")
            if not isinstance(value, int if needed else int | float | None):
                raise TypeError(f"{name} is {shown(value)}")
        if not isinstance(state.log_history, list):
            raise TypeError(f"log_history is {shown(state.log_history)}")
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_STATE} is not a state of a Trainer: {said_by(error)}") from error
    if isinstance(step, bool) or step != int(checkpoint.name.rpartition("-")[2]):
        raise ValueError(f"{_STATE} is of update {shown(step)}")


@contextlib.contextmanager
def reading(checkpoint: Path, *files: str) -> Iterator[None]:
    """Convert any error that a library raises for an unreadable checkpoint into one message.

    The library's own message may give bad advice: torch suggests to load untrusted files with its safeguards disabled.

    Args:
        files: names of the files that are read inside the block.
    """
    try:
        yield
    except KTOError as error:
        raise TrainingError(f"{checkpoint}: cannot be loaded: {error}. {_BEFORE}") from error
    except MemoryError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        damaged = [name for name in files if _is_damaged(checkpoint / name)] or files
        said = "damaged, or not saved by torch" if _ADVICE.search(str(error)) else said_by(error)
        raise TrainingError(
            f"{checkpoint}: {' or '.join(damaged) or 'it'} cannot be loaded: {said}. {_BEFORE}"
        ) from error


def check_optimizer_loaded(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Refuse an optimizer that begins anew although the shards of a checkpoint contain its state.

    accelerate before 1.13 reads nothing from the shards of FSDP 2.

    Raises:
        TrainingError: the state was not loaded.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # slow to import

    for shards in checkpoint.glob("optimizer_*/"):
        stored = FileSystemReader(shards).read_metadata().state_dict_metadata
        if any(".state." in name for name in stored) and not optimizer.state_dict()["state"]:
            raise TrainingError(
                f"{checkpoint}: accelerate did not load the optimizer's state from {shards.name}, so a resumed run would not "
                "match an uninterrupted run. Install accelerate 1.13 or newer, and resume again."
            )


@contextlib.contextmanager
def loading_model(checkpoint: Path, model: Model) -> Iterator[None]:
    """Load a checkpoint's weights in the block, after checking that its adapters, if any, fit the model.

    Raises:
        TrainingError: they cannot be loaded.
    """
    with reading(checkpoint):
        if (checkpoint / ADAPTER_CONFIG).exists():
            check_adapters(checkpoint, model)
        yield


def load_renamed_weights(load_result: Any, checkpoint: Path, model: Model, *, trust_remote_code: bool) -> None:
    """Load the weights through `transformers` if the Trainer could not: it only knows the names in memory.

    Files of a mixture of experts store each expert separately; in memory a layer's experts are stacked in one tensor.

    Args:
        load_result: missing and unexpected keys of the Trainer's attempt.

    Raises:
        UnloadableModelError: they are not those of this model.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    without = {*tied, *(model._keys_to_ignore_on_save or ())}
    if load_result.unexpected_keys or set(load_result.missing_keys) - without:
        load_weights(model, checkpoint, trust_remote_code)


_ADVICE = re.compile(r"weights_only|Weights only load failed|pickle", re.IGNORECASE)


def _is_damaged(path: Path) -> bool:
    """Return whether a file saved by torch, a zip archive with checksums, is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except FileNotFoundError:
        return False
    except Exception:  # noqa: BLE001 - a damaged file can raise anything
        return True
