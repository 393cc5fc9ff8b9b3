"""Read large feedback in parts, by worker processes, with the result of one process."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.cores import usable_cores
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.feedback.tokenization import Tokenizing
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

# Bytes of data from which on workers are started unless options say so. One core reads about 4 MB/s; a worker's imports
# take as long as 8 MB.
_LEAST_BYTES = 32 * 2**20
# Bytes of a part, and number of parts of large data: every part is a file that stays open.
_PART_BYTES, _MOST_PARTS = 16 * 2**20, 400
# Parts for each worker, of data for which that makes smaller ones: the last parts keep some workers waiting.
_PARTS_FOR_EACH, _LEAST_PART_BYTES = 4, 4 * 2**20


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
    reading = Reading(config, Tokenizing(tokenizer, now=today))
    size = sum(file.bytes for file in files)
    folders = spool_folders(config.out, size)
    workers = _workers(config, size)
    part_config = None if workers == 1 else reading.feedback.for_parts()
    ranges = None if part_config is None else divided(config.data, config.split, _part_bytes(size, workers))
    if part_config is None or ranges is None or len(ranges) == 1:
        if (config.read_workers or 1) > 1:
            why = _why_in_one(config, ranges is not None)
            tell(f"reading     in one process, although --read-workers is {config.read_workers}: {why}")
        with Spool(folders[0], config.max_length) as spool:
            rows = reading.read_all(spool)
        yield Found(rows, reading, today)
        return
    with PartFiles.opened(folders, parts_key(part_config, tokenizer, files, ranges, day), today) as parts:
        try:
            read = _read_parts(part_config, tokenizer, parts, ranges, model=model, workers=workers)
            with contextlib.closing(read):  # also after an error, so that no worker writes any longer
                rows = reading.merge_all(read)
            yield Found(rows, reading, parts.day)
        except CacheError:  # of the disk, or of a worker: the parts that are read can be used
            raise
        except Exception:  # of the data, or a damaged part
            parts.remove()
            raise
        parts.remove()


def _why_in_one(config: PrecomputeConfig, is_lines: bool) -> str:
    """Return why the feedback is not read in parts."""
    if config.limit is not None:
        return f"--limit {config.limit} stops at a record"
    return "it is too small to be divided" if is_lines else "only plain JSON Lines can be divided"


def _part_bytes(size: int, workers: int) -> int:
    """Return the least number of bytes of a part."""
    return max(min(_PART_BYTES, max(_LEAST_PART_BYTES, size // (_PARTS_FOR_EACH * workers))), size // _MOST_PARTS)


def _workers(config: PrecomputeConfig, size: int) -> int:
    """Return the number of workers that would read so many bytes."""
    if config.read_workers is not None:
        return config.read_workers
    return usable_cores() if size >= _LEAST_BYTES else 1


def _read_parts(
    config: PrecomputeConfig,
    tokenizer: Tokenizer,
    files: PartFiles,
    ranges: Sequence[LineRange],
    *,
    model: Path | None,
    workers: int,
) -> Generator[tuple[LineRange, Path, ReadPart], None, None]:
    """Yield the parts in their order, with the files of their rows."""
    missing = [number for number in range(len(ranges)) if not files.has(number)]
    done = set(range(len(ranges))).difference(missing)
    if done:
        tell(f"resuming    {len(done)} of {len(ranges)} parts of the feedback are already read")
    with contextlib.ExitStack() as stack:
        if model is None or not missing:
            reader = PartReader(config, tokenizer, files)
            finished = reader.read_all([(number, ranges[number]) for number in missing])
        else:
            pool = PartWorkers(config, tokenizer, files, model, min(workers, len(missing)))
            finished = stack.enter_context(pool).read([(number, ranges[number]) for number in missing])
        progress = stack.enter_context(Progress("reading", sum(one.end - one.start for one in ranges), "B"))
        progress.skip(sum(ranges[number].end - ranges[number].start for number in done))
        for number, lines in enumerate(ranges):
            while number not in done:
                done.add(another := next(finished))
                progress.add(ranges[another].end - ranges[another].start)
            yield lines, files.rows(number), files.load(number)
