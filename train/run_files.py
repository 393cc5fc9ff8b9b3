"""Name the files of a run folder, and read and write those that other modules share; light to import."""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from offline_kto.kto_core.durable_files import write_json
from offline_kto.kto_core.errors import ConfigError, printable, said_by
from offline_kto.kto_core.foreign_files import MEGABYTE, check_kinds, open_foreign, read_foreign
from offline_kto.kto_core.options import as_plain, value_in_yaml, with_absolute_paths
from offline_kto.kto_core.parquet_footers import column_chunks
from offline_kto.kto_core.redaction import secret_names, without_secrets
from offline_kto.train.config import TrainConfig
from offline_kto.train.run_records import RunRecord

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

CONFIG, RUN_RECORD, METRICS = "config.yaml", "run.json", "metrics.jsonl"
EVALUATION, REWARDS, SUSPECTS = "evaluation.json", "rewards.parquet", "suspects.csv"
UNTRAINED = "held_out_untrained.safetensors"

# Limits on untrusted files, in bytes: run.json and similar files, and a million log records.
LARGEST_JSON, LARGEST_METRICS = 64 * MEGABYTE, 512 * MEGABYTE
# Limits on rewards.parquet: rows, bytes on disk, and bytes of the decompressed columns.
_REWARD_KINDS = {"split": "string", "prompt_id": "string", "label": "bool", "logratio": "float"}
MOST_REWARDS, _LARGEST_REWARDS, _LARGEST_COLUMNS = 100_000_000, 8192 * MEGABYTE, 4096 * MEGABYTE


def make_folder(out: Path | None, parent: str) -> Path:
    """Create and return the folder of a new run or sweep; see `name_folder`.

    Raises:
        ConfigError: a file, a URL, or not writable.
    """
    out = name_folder(out, parent)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error}.") from error
    return out


def name_folder(out: Path | None, parent: str) -> Path:
    """Return `out`, or a folder in `parent` named after the current time; create nothing.

    Raises:
        ConfigError: a file, a URL, or in a folder that does not allow it.
    """
    if out is None:
        out = Path(parent) / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    if re.match(r"\w+:/", str(out)):
        raise ConfigError(
            f"--out {out}: runs and sweeps are written to a local folder; copy the folder once it is complete."
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file of that name exists; choose another folder.")
    above = folder_above(out)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: cannot be written: {above} is a file, or does not allow it.")
    return out


def folder_above(out: Path) -> Path:
    """Return `out` if it exists, or else the nearest folder above it that does."""
    return next(folder for folder in (out, *out.absolute().parents) if folder.exists())


def config_text(config: TrainConfig) -> str:
    """Return the YAML that `kto-train --config` accepts: all options that are set, except those that identify a run.

    The learning rate is a number, whatever `auto` will mean in a later version, and paths are absolute, because those in a
    config file are relative to its folder.
    """
    names = {field.name for field in dataclasses.fields(config) if field.metadata["yaml"]} - {"out"}
    values = with_absolute_paths(TrainConfig, {**as_plain(config), "learning_rate": config.peak_rate})
    return yaml_without_secrets({k: v for k, v in values.items() if k in names and v not in (None, {})})


def begun_with(given: Mapping[str, Any], yaml_path: Path | None = None) -> Path | None:
    """Return the config.yaml of the run that `--resume` continues; None if nothing has begun in `--out`.

    Args:
        given: options of the command line, or of a Python call.
        yaml_path: of `--config`, which may name the folder.
    """
    if not given.get("resume"):
        return None
    out = given.get("out")
    if out is None and yaml_path is not None:
        out = value_in_yaml(TrainConfig, yaml_path, "out")
    if out is None:
        return None
    path = Path(out) / CONFIG
    # Without its record a folder is not a run's; its config.yaml may be anything.
    return path if path.is_file() and (path.parent / RUN_RECORD).is_file() else None


def yaml_without_secrets(values: dict[str, object]) -> str:
    """Return options as YAML without secrets; a comment names each option that is left out."""
    left_out = "".join(
        f"# {name} is a secret and is left out: set it again where it is needed\n" for name in secret_names(values)
    )
    return left_out + str(yaml.safe_dump(without_secrets(values), sort_keys=False, allow_unicode=True))


def check_is_run(folder: Path, where: str) -> None:
    """Check that a folder is a run's.

    Args:
        where: the option that names it, for messages.

    Raises:
        ConfigError: there is no such folder, or it is something else.
    """
    advice = "Name the folder of a finished run of kto-train (runs/NAME)."
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise ConfigError(f"{where} {folder}: {found}. {advice}")
    if (folder / "sweep.yaml").exists():
        raise ConfigError(f"{where} {folder}: a sweep; its best run is {folder / 'best'}.")
    if not (folder / RUN_RECORD).exists():
        names = sorted(path.name for path in folder.iterdir())
        found = f"holds {printable(names[0])}, but no {RUN_RECORD}:" if names else "is empty:"
        raise ConfigError(f"{where} {folder}: {found} it is no run of kto-train. {advice}")


def refuse_pipes(folder: Path, where: str) -> None:
    """Check that reading a folder's model or checkpoint cannot block.

    Raises:
        ConfigError: it contains a pipe or device.
    """
    try:
        check_kinds(folder)
    except OSError as error:
        raise ConfigError(f"{where} {folder}: {error}. Remove it.") from error


def read_rewards(out: Path, columns: list[str]) -> "pa.Table":
    """Read columns of rewards.parquet, with strings dictionary-encoded.

    A small file may repeat a long string a billion times; dictionary encoding keeps it small in memory.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or has columns of another type.
    """
    import pyarrow.parquet as pq

    texts = [name for name in columns if _REWARD_KINDS[name] == "string"]
    with open_foreign(out / REWARDS, most=_LARGEST_REWARDS) as raw, pq.ParquetFile(raw, read_dictionary=texts) as file:
        if file.metadata.num_rows > MOST_REWARDS:
            raise ValueError(f"it has {file.metadata.num_rows:,} rows")
        kinds = {field.name: str(getattr(field.type, "value_type", field.type)) for field in file.schema_arrow}
        wrong = [name for name in columns if _REWARD_KINDS[name] not in kinds.get(name, "")]
        if wrong:
            raise ValueError(f"column {wrong[0]!r} is {kinds.get(wrong[0], 'missing')}")
        chunks = [chunk for of_group in column_chunks(file, os.fstat(raw.fileno()).st_size) for chunk in of_group]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
        if size > _LARGEST_COLUMNS:
            raise ValueError(f"its columns have {size:,} bytes")
        return file.read(columns=columns)


def holds_word(column: "pa.ChunkedArray", word: str) -> "npt.NDArray[np.bool_]":
    """Return which rows of a dictionary column equal a word, without decoding each row to a string."""
    import numpy as np

    found = [np.zeros(0, dtype=bool)]
    for chunk in column.chunks:
        places = [place for place, text in enumerate(chunk.dictionary.to_pylist()) if text == word]
        found.append(np.isin(chunk.indices.fill_null(-1).to_numpy(), places))
    return np.concatenate(found)


def write_run_record(out: Path, record: RunRecord) -> None:
    """Write run.json."""
    write_json(out / RUN_RECORD, record)


def read_run_record(out: Path) -> RunRecord:
    """Read run.json. A field may be missing, and the type of a value is not checked.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return cast("RunRecord", dict(json.loads(read_foreign(out / RUN_RECORD, most=LARGEST_JSON))))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{out / RUN_RECORD}: cannot be read ({said_by(error)}), so the settings of the run are unknown. "
            "Start a new run."
        ) from error
