"""Read large feedback in parts, by worker processes, with the result of one process."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from offline_kto.kto_core.errors import CacheError, KTOError
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.part_files import PartFiles, PartReader, parts_key
from offline_kto.precompute.part_workers import PartWorkers
from offline_kto.precompute.reading import Reading, ReadPart, ReadRows
from offline_kto.precompute.records.line_ranges import LineRange
from offline_kto.precompute.records.sources import SourceFile, divided
from offline_kto.precompute.spool import Spool
from offline_kto.precompute.spool_folder import spool_folders

# Bytes of data from which on workers are started unless options say so: their imports take seconds.
_LEAST_BYTES = 64 * 2**20
# Bytes of a part, and number of parts of large data: every part is a file that stays open.
_PART_BYTES, _MOST_PARTS = 16 * 2**20, 400


class Found(NamedTuple):
    """The rows, how they were read, and the day that chat templates with a date have written."""

    rows: ReadRows
    reading: Reading
    day: datetime


@contextlib.contextmanager
def read_feedback(
    config: PrecomputeConfig,
    tokenizer: Tokenizer,
    files: Sequence[SourceFile],
    *,
    day: datetime | None,
    model: Path | None,
) -> Iterator[Found]:
    """Read the feedback. Parts of it are kept in files until the `with` block ends without an interruption.

    Args:
        files: of the data.
        day: for chat templates that write the date; None for today.
        model: folder from which workers load the tokenizer; None to read all parts in this process.

    Raises:
        FeedbackError, TokenizationError: naming file and line.
        ConfigError: an option that cannot be used.
        CacheError: the disk is full, or a worker was lost.
    """
    today = day or datetime.now().replace(microsecond=0)
    reading = Reading(config, tokenizer, today)
    size = sum(file.bytes for file in files)
    folders = spool_folders(config.out, size)
    ranges, part_config = _ranges(config, reading, size), reading.feedback.for_parts()
    if ranges is None or part_config is None:
        with Spool(folders[0], config.max_length) as spool:
            rows = reading.read_all(spool)
        yield Found(rows, reading, today)
        return
    key = parts_key(part_config, tokenizer, files, ranges, day)
    with PartFiles.opened(folders, key, today) as parts:
        count = min(len(ranges), _wanted(config, size))
        try:
            read = _read_parts(part_config, tokenizer, parts, ranges, model=model, count=count)
            yield Found(reading.merge_all(read), reading, parts.day)
        except CacheError:  # of the disk, or of a worker: the parts that are read can be used
            raise
        except KTOError:
            parts.remove()
            raise
        parts.remove()


def _ranges(config: PrecomputeConfig, reading: Reading, size: int) -> list[LineRange] | None:
    """Return the parts of the data; None if this process reads all of it at once."""
    if _wanted(config, size) == 1 or reading.feedback.for_parts() is None:
        return None
    ranges = divided(config.data, config.split, max(_PART_BYTES, size // _MOST_PARTS))
    return None if ranges is None or len(ranges) == 1 else ranges


def _wanted(config: PrecomputeConfig, size: int) -> int:
    """Return the number of workers that would read so many bytes."""
    if config.read_workers is not None:
        return config.read_workers
    return _cores() if size >= _LEAST_BYTES else 1


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_parts(
    config: PrecomputeConfig,
    tokenizer: Tokenizer,
    files: PartFiles,
    ranges: Sequence[LineRange],
    *,
    model: Path | None,
    count: int,
) -> Iterator[tuple[LineRange, Path, ReadPart]]:
    """Yield the parts in their order, with the files of their rows."""
    missing = [number for number in range(len(ranges)) if not files.has(number)]
    done = set(range(len(ranges))).difference(missing)
    with contextlib.ExitStack() as stack:
        if model is None or not missing:
            reader = PartReader(config, tokenizer, files)
            finished = reader.read_all([(number, ranges[number]) for number in missing])
        else:
            workers = stack.enter_context(PartWorkers(config, tokenizer, files, model, min(count, len(missing))))
            finished = workers.read([(number, ranges[number]) for number in missing])
        progress = stack.enter_context(Progress("reading", sum(one.end - one.start for one in ranges), "B"))
        progress.add(sum(ranges[number].end - ranges[number].start for number in done))
        for number, lines in enumerate(ranges):
            while number not in done:
                done.add(another := next(finished))
                progress.add(ranges[another].end - ranges[another].start)
            yield lines, files.rows(number), files.load(number)
