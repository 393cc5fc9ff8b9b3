"""Keep parts of the feedback that were read in files, until the plan is made: the same command reuses them after an interruption.

    kto-reading-5f1c.../run.json      when the command was started first
    kto-reading-5f1c.../00007.arrow   the rows of a part (`spool`)
    kto-reading-5f1c.../00007.json    what was counted in it (`ReadPart`); written last

The name of the folder is a hash of all that the rows depend on, so that whatever is in it can be used.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import stat
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from offline_kto.kto_core.durable_files import flush, remove_tree, write_text, written_to
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.feedback.tokenization import Tokenizing
from offline_kto.kto_core.hashing import chat_template_hash, file_hash, json_hash, tokenizer_hash
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.lock import is_held, only_writer
from offline_kto.kto_core.options import as_plain
from offline_kto.kto_core.runtime import no_garbage_collection
from offline_kto.kto_core.typed_json import from_json, to_json
from offline_kto.precompute.config import OF_THE_RUN, PrecomputeConfig
from offline_kto.precompute.reading import Reading, ReadPart
from offline_kto.precompute.records.line_ranges import LineRange
from offline_kto.precompute.records.sources import SourceFile
from offline_kto.precompute.spool import Spool

_PREFIX = "kto-reading-"
_RUN = "run.json"
# Seconds after which the folder of an interrupted command is removed by another one.
_STALE = 7 * 24 * 3600
_LIBRARIES = ("offline-kto", "transformers", "tokenizers", "jinja2", "pyarrow")
# Files beside the data that say how to read it.
_BESIDE = ("dataset_info.json", "dataset_infos.json")


def parts_key(
    config: PrecomputeConfig,
    tokenizer: Tokenizer,
    files: Sequence[SourceFile],
    ranges: Sequence[LineRange],
    day: datetime | None,
) -> str:
    """Return a hash of all that the rows of the parts depend on.

    Args:
        config: of `Feedback.for_parts`.
        files: of the data, with their hashes.
        day: that chat templates write, if it is given.
    """
    options = {name: value for name, value in as_plain(config).items() if name not in OF_THE_RUN}
    data = Path(config.data).absolute()
    beside = [folder / name for folder in {one.parent for one in _parents(ranges)} for name in _BESIDE]
    other = sorted({data, *beside, *([] if config.map is None else [Path(config.map)])} - {data})
    return json_hash(
        [
            options,
            str(data),
            [[one.name, one.sha256, one.bytes] for one in files],
            [to_json(one) for one in ranges],
            [[str(path), file_hash(path)] for path in other if path.is_file()],
            [type(tokenizer).__name__, tokenizer_hash(tokenizer), chat_template_hash(tokenizer)],
            None if day is None else day.isoformat(),
            [platform.python_version(), *map(_version, _LIBRARIES)],
        ]
    )


def _parents(ranges: Sequence[LineRange]) -> set[Path]:
    files = {Path(one.path).resolve() for one in ranges}
    return files | {file.parent for file in files}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return ""


class PartFiles:
    """The folder with the parts of one command.

    Attributes:
        day: that chat templates write: when the command was started first, unless it is given.
    """

    def __init__(self, folder: Path, day: datetime) -> None:
        self.folder, self.day = folder, day

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folders: Sequence[Path], key: str, day: datetime) -> Iterator["PartFiles"]:
        """Open the folder of a key, or create it, and lock it while the block runs.

        Args:
            folders: in which it may be; the first of them is where it is created.
            day: of a new folder.

        Raises:
            CacheError: it cannot be written, or another process is using it.
        """
        for folder in folders:
            _remove_stale(folder)
        name = f"{_PREFIX}{key[:32]}"
        if any(is_held(one / name) for one in folders if _is_own(one / name)):
            name += f"-{os.getpid()}"  # the same command is running: it keeps its parts
        folder = next((one / name for one in folders if _is_own(one / name)), folders[0] / name)
        with _on_disk(folder.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(folder):
            raise CacheError(f"{folder}: belongs to another user. Name another folder with TMPDIR.")
        with only_writer(folder, CacheError):
            yield cls(folder, _started(folder, day))

    def remove(self) -> None:
        """Remove all parts; mapped files remain mapped."""
        remove_tree(self.folder)

    def rows(self, number: int) -> Path:
        """Return the file with the rows of a part."""
        return self.folder / f"{number:05}.arrow"

    def _counts(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"

    def has(self, number: int) -> bool:
        """Return whether this part is complete."""
        return self._counts(number).is_file() and self.rows(number).is_file()

    def has_any(self) -> bool:
        """Return whether any part is complete."""
        return any(self.folder.glob("[0-9]*.json"))

    def load(self, number: int) -> ReadPart:
        """Return what was counted in a part."""
        with _on_disk(self.folder):
            return from_json(ReadPart, json.loads(self._counts(number).read_text(encoding="utf-8")))

    def add(self, number: int, part: ReadPart, rows: Path) -> None:
        """Store a part whose rows are in a temporary file."""
        with _on_disk(self.folder):
            flush(rows)
            os.replace(rows, self.rows(number))
            write_text(self._counts(number), json.dumps(to_json(part)))


class PartReader:
    """Reads parts of the feedback, in any order.

    Args:
        config: of `Feedback.for_parts`.
        files: where the parts are stored.
    """

    def __init__(self, config: PrecomputeConfig, tokenizer: Tokenizer, files: PartFiles) -> None:
        self._config, self._files = config, files
        self._tokenizing = Tokenizing(tokenizer, now=files.day)

    def read_all(self, parts: Sequence[tuple[int, LineRange]]) -> Iterator[int]:
        """Yield the numbers of parts as they are read. Raises: see `read`."""
        for number, lines in parts:
            self.read(number, lines)
            yield number

    @no_garbage_collection()
    def read(self, number: int, lines: LineRange) -> None:
        """Read a part. Raises: KTOError: an option cannot be used, or the disk is full."""
        folder = self._files.folder
        reading = Reading(self._config, self._tokenizing, is_part=True)
        path = folder / f".{number:05}.{os.getpid()}.tmp"
        with Spool(folder, self._config.max_length, path=path) as spool:
            part = reading.read_part(lines, spool)
        self._files.add(number, part, path)


def _on_disk(folder: Path) -> contextlib.AbstractContextManager[None]:
    return written_to(
        folder,
        CacheError,
        "The tokenized rows are kept there while the command runs. Free space, or name a folder on another disk with TMPDIR.",
    )


def _is_own(folder: Path) -> bool:
    """Return whether a folder is there and belongs to this user: anybody may write into the folder for temporary files."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _started(folder: Path, day: datetime) -> datetime:
    """Return the day of a folder, which is written into a new one."""
    path = folder / _RUN
    with _on_disk(folder):
        try:
            return datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["day"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            write_text(path, json.dumps({"day": day.isoformat()}))
            return day


def _remove_stale(folder: Path) -> None:
    """Remove folders that interrupted commands left behind days ago."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_own(path) and time.time() - path.stat().st_mtime > _STALE and not is_held(path):
                remove_tree(path)
