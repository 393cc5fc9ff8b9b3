"""Read records of saved datasets and hub datasets with the datasets library, and list a dataset folder's files."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from offline_kto.kto_core.errors import FeedbackError, printable, said_by
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.precompute.records.class_names import ClassNames
from offline_kto.precompute.records.table_records import without_nulls
from offline_kto.precompute.records.text_files import Located, readable

if TYPE_CHECKING:
    import datasets

# Suffixes of data files, and the format as which datasets reads them.
_KINDS = {
    ".parquet": ".parquet",
    ".jsonl": ".json",
    ".ndjson": ".json",
    ".json": ".json",
    ".csv": ".csv",
    ".tsv": ".csv",
}

# A file or folder whose name begins with that of a split, without its number and its kind: "train_prefs".
_SPLIT_NAME = re.compile(
    r"((?:train|test|validation|valid|val|dev|eval)[A-Za-z]*(?:[._-][A-Za-z]+)*?)"
    r"(?:[._-]?(?:part|shard|chunk)?[._-]?\d[\d._-]*(?:-of-\d+)?)*"
    r"(?:\.(?:parquet|jsonl|ndjson|json|csv|tsv))?(?:\.gz)?",
    re.IGNORECASE,
)
# Parts of a whole by their numbers, as the hub, datasets and Spark write them.
_PART = re.compile(r"(.*)-(\d{3,})-of-(\d{3,})(\D.*|\Z)", re.DOTALL)
# Copies that editors and programs leave beside a file.
_BACKUP = re.compile(r"(?:~|\.(?:bak|backup|tmp|temp|old|orig|save|swp|swo))+\Z", re.IGNORECASE)
_HUB_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# Splits with preferences, among those for fine-tuning and generation.
_PREFERENCES = re.compile("pref|kto|dpo|pair|feedback")

# What the datasets library says if a data set has several configurations.
_MISSING_CONFIG = "Config name is missing"
# JSON files of the datasets library without rows.
_DATASET_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def read_dataset(path: Path, kind: str, split: str = "train") -> Iterator[Located]:
    name = dataset_name(path, kind)
    number = 0
    dataset = _load_hub(path, split) if kind == "hub" else _load_saved(path, split)
    try:
        features = getattr(dataset, "features", None)  # unknown for some that are streamed
        named = ClassNames({} if features is None else features.to_dict())
        for row in dataset:
            number += 1
            yield f"{name}: row {number}", named.record(without_nulls(row))
    except Exception as error:
        raise FeedbackError(f"{name}: not readable after row {number} ({said_by(error)}).") from error


def dataset_name(path: Path, kind: str) -> str:
    return path.as_posix() if kind == "hub" else path.resolve().name


def _load_hub(path: Path, split: str) -> "datasets.Dataset":
    import datasets

    name = path.as_posix()
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        if "Unknown split" in str(error):
            raise no_split(name, split, _hub_splits(name)) from None
        if _MISSING_CONFIG in str(error):
            raise _several_configs(name, name, "Download the files of one of them, and pass their folder.") from None
        hint = suggest(path) if path.parent.is_dir() else " Check the name, or log in (hf auth login)."
        raise FeedbackError(
            f"{name}: neither a local path nor readable from the hub ({said_by(error)}).{hint}"
        ) from error


def _hub_splits(name: str) -> list[str]:
    import datasets

    try:
        return [str(split) for split in datasets.get_dataset_split_names(name)]
    except Exception:  # noqa: BLE001 - the message names no splits then
        return []


def _several_configs(name: str, path: str, advice: str) -> FeedbackError:
    """Return the error about a data set whose card describes several, each with its own files."""
    import datasets

    try:
        names = quoted([str(one) for one in datasets.get_dataset_config_names(path)], 300)
    except Exception:  # noqa: BLE001 - the message names none then
        names = "several"
    return FeedbackError(f"{name}: its README describes several data sets (configurations): {names}. {advice}")


def no_split(name: str, wanted: str, found: Iterable[str]) -> FeedbackError:
    """Return the error about a split that is not there, or that several have a claim to, with one to name."""
    splits = list(found)
    begun = [split for split in splits if split.startswith("train")]
    proposed = next((one for one in begun or splits if _PREFERENCES.search(one)), next(iter(begun or splits), None))
    advice = "Check the name." if proposed is None else f"Name the one to read: --split {proposed}."
    return FeedbackError(f"{name}: no split {quoted(wanted)}; found {quoted(splits, 300)}. {advice}")


def is_split_name(name: str) -> bool:
    """Return whether a file, or a key of a document, has the name of a split: train, test_prefs."""
    return _SPLIT_NAME.fullmatch(name) is not None


def is_saved(path: Path) -> bool:
    """Return whether `path` is a folder written by save_to_disk."""
    info = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    return info or (path / "dataset_dict.json").is_file()


def _load_saved(path: Path, split: str) -> "datasets.Dataset":
    import datasets

    name = dataset_name(path, "folder")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise FeedbackError(f"{name}: not readable as a dataset ({said_by(error)}).") from error
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise no_split(name, split, dataset)
    return dataset[split]


def splits_of(path: Path) -> list[str]:
    """Return the splits in a folder: of save_to_disk, or of data files; empty if it has only one without a name."""
    if not is_saved(path):
        found = _splits(path)
        return list(_named_splits(path, found) or found)
    names = path / "dataset_dict.json"
    if not names.is_file():
        return []
    with readable(dataset_name(path, "folder")):
        return [str(name) for name in json.loads(names.read_text(encoding="utf-8")).get("splits", [])]


def data_files(path: Path, split: str = "train") -> list[Path]:
    """Return the files of a split in a folder of data files, in the order in which they are read.

    The datasets library determines them (by their names, or by the folder's README). It does not read them, because it
    caches rows by the files' time stamps: for a file that changed but kept its time stamp (rsync -t, cp -p, tar) it
    would return the old rows. It takes train_prefs-00000-of-00001.parquet and train_sft-00000-of-00001.parquet for one
    split; these are two, as their names say.

    Backups and temporary copies are not among them.

    Raises:
        FeedbackError: no such split, a part of it is missing (train-00002-of-00003.parquet), several splits that fit, several
            formats (of which datasets would silently read one), or a reference cache.
    """
    found = _splits(path)
    finer = _named_splits(path, found)
    if split in finer:
        _check_parts(finer[split])
        return finer[split]
    if split not in found:
        raise _no_split_of_folder(path, split, {**found, **finer})
    files = [file for file in found[split] if file.name not in _DATASET_NOTES]
    merged = _sharing(finer, files)
    if len(merged) > 1:
        raise no_split(_shown_name(path), split, merged)
    _check_parts(files)
    return files


def _check_parts(files: Iterable[Path]) -> None:
    """Refuse files that are numbered as parts of a whole if another part is not there."""
    wholes: dict[tuple[Path, str, str, str], list[str]] = {}
    for file in files:
        part = _PART.fullmatch(file.name)
        if part is not None:
            begin, number, total, end = part.groups()
            wholes.setdefault((file.parent, begin, total, end), []).append(number)
    for (folder, begin, total, end), there in wholes.items():
        numbers = set(map(int, there))
        first = 1 if int(total) in numbers else 0
        gone = [number for number in range(first, first + int(total)) if number not in numbers]
        if gone:
            names = [f"{begin}-{number:0{len(there[0])}}-of-{total}{end}" for number in gone[:5]]
            raise FeedbackError(
                f"{_shown_name(folder)}: {len(numbers):,} of {int(total):,} parts are there; missing: {quoted(names, 300)}. Copy or "
                "download the rest, or rename the files if these are all."
            )


def split_in_full(path: Path, split: str) -> str:
    """Return the name of a split in the names of a folder's files: "train_prefs" if that is what is read as "train"."""
    if is_saved(path):
        return split
    found = _splits(path)
    finer = _named_splits(path, found)
    return split if split in finer else next(iter(_sharing(finer, found.get(split, []))), split)


def _sharing(splits: dict[str, list[Path]], files: list[Path]) -> list[str]:
    """Return the splits that have any of the files."""
    return [name for name, named in splits.items() if set(named) & set(files)]


def _no_split_of_folder(path: Path, split: str, found: Iterable[str]) -> FeedbackError:
    """Return the error about a split that no file of a folder has by its name, with the files that are in none."""
    error = no_split(_shown_name(path), split, found)
    unread = unread_files(path)
    if not unread:
        return error
    them = "file is" if len(unread) == 1 else "files are"
    return FeedbackError(
        f"{error} {len(unread):,} {them} in no split, by the names of the folder's files: {quoted(unread[:5], 200)}. To read one, "
        f"pass it as --data, or rename it to {split}{Path(unread[0]).suffix}."
    )


def _named_splits(path: Path, found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Return the files of each split with longer names than `train` or `test`: train_prefs, test_sft."""
    names: dict[str, list[Path]] = {}
    for file in (file for files in found.values() for file in files if file.name not in _DATASET_NOTES):
        inside = file.relative_to(path.resolve()).parts if file.is_relative_to(path.resolve()) else (file.name,)
        for part in reversed(inside):  # the folder may have the name of the split
            named = _SPLIT_NAME.fullmatch(part)
            if named is not None:
                names.setdefault(named[1], []).append(file)
                break
    # If one is just "train", datasets' rule applies, unless the names are those of the hub's Parquet files.
    plain = {name for name in names if name in found}
    sharded = all(_HUB_SHARD.search(file.name) for files in names.values() for file in files)
    return {} if plain and not sharded else names


def unread_files(path: Path) -> list[str]:
    """Return the data files of a folder that are in no split: if there is train.jsonl, datasets ignores more.jsonl."""
    in_a_split = {file.resolve() for files in _splits(path).values() for file in files}
    return sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if _is_data(file, path) and file.resolve() not in in_a_split
    )


def backup_files(path: Path) -> list[str]:
    """Return the backups and temporary copies of data files in a folder, which are not read."""
    return sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if _is_backup(file.name) and _suffix(Path(_BACKUP.sub("", file.name))) in _KINDS and not _is_hidden(file, path)
    )


def _splits(path: Path) -> dict[str, list[Path]]:
    _check_kinds(path, _shown_name(path))
    import datasets

    try:
        found = datasets.load_dataset_builder(str(path)).config.data_files
    except Exception as error:
        if _MISSING_CONFIG in str(error):
            raise _several_configs(
                _shown_name(path), str(path), "Pass the folder or the file of one of them."
            ) from None
        raise FeedbackError(f"{_shown_name(path)}: not readable as a dataset ({said_by(error)}).") from error
    named = {str(split): [Path(file) for file in files] for split, files in found.items()}
    return {split: [file for file in files if not _is_backup(file.name)] for split, files in named.items()}


def _shown_name(path: Path) -> str:
    return printable(dataset_name(path, "folder"), 200)


def _check_kinds(path: Path, name: str) -> None:
    if (path / "manifest.json").is_file():
        raise FeedbackError(f"{name}: this is a reference cache (manifest.json). Pass the feedback it came from.")
    with readable(name):
        files = [file for file in path.rglob("*") if _is_data(file, path)]
    kinds = sorted({_KINDS[_suffix(file)] for file in files})
    if len(kinds) == 0:
        raise FeedbackError(
            f"{name}: a folder without a dataset. Expected one from save_to_disk, or files that end in"
            f" {', '.join(_KINDS)}."
        )
    if len(kinds) > 1:
        raise FeedbackError(f"{name}: contains files of several kinds, {', '.join(kinds)}. Pass one file, or one kind.")


def _is_data(file: Path, folder: Path) -> bool:
    is_other = _is_hidden(file, folder) or _is_backup(file.name) or file.name in _DATASET_NOTES
    return _suffix(file) in _KINDS and not is_other and file.is_file()


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _is_backup(name: str) -> bool:
    return name.startswith("~") or _BACKUP.search(name) is not None


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def suggest(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return f" Its folder {printable(str(path.parent), 200)} cannot be listed either. Check the path."
    near = [printable(name, 100) for name in difflib.get_close_matches(path.name, names, n=3)]
    return f" Did you mean {' or '.join(near)}?" if near else " Check the path."
