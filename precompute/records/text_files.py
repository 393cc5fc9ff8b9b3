"""Read lines of text from a feedback file, and turn operating system errors into messages with a remedy."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from offline_kto.kto_core.errors import FeedbackError, said_by

Record = dict[str, object]
Located = tuple[str, Record]
# Bytes of one record. A few compressed bytes may expand to one that fills the memory; a million tokens have about 5 MB.
LARGEST_RECORD = 64 * 2**20
# Largest compression ratio of a file; one with a higher ratio repeats the same text over and over.
MOST_PACKED = 500
# Consecutive blank lines: a compressed file may contain billions of them.
_MOST_BLANK_LINES = 10**6
_PIECE = 2**20
COPY_AGAIN = "Copy or download it again."
TOO_LARGE = (
    f"A record may be at most {LARGEST_RECORD // 2**20} MiB: remove larger values, or store them in another column."
)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Re-raise operating system errors of reading a file as a `FeedbackError` with a remedy."""
    try:
        yield
    except MemoryError as error:
        raise FeedbackError(f"{name}: needs more memory than is available ({said_by(error)}). {TOO_LARGE}") from error
    except PermissionError:
        raise FeedbackError(f"{name}: no permission to read it. Check its owner and mode (ls -l).") from None
    except EOFError:
        raise FeedbackError(f"{name}: the gzip data is truncated. {COPY_AGAIN}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FeedbackError(
            f"{name}: not readable as gzip ({said_by(error)}). {COPY_AGAIN} Remove .gz from its name if it is not compressed."
        ) from error
    except OSError as error:
        raise FeedbackError(f"{name}: cannot be read ({said_by(error)}).") from error


GZIP, PARQUET = b"\x1f\x8b", b"PAR1\x15"
_FORMS = {
    GZIP: ("gzip data", "Add .gz to its name."),
    PARQUET: ("Parquet data", "End its name in .parquet."),
    b"PK\x03\x04": ("a zip archive (as .xlsx is one)", "Unpack or convert it first."),
    b"\x28\xb5\x2f\xfd": ("zstandard data", "Unpack it first."),
    b"BZh": ("bzip2 data", "Unpack it first."),
    b"\xfd7zXZ": ("xz data", "Unpack it first."),
    b"ARROW1\0\0": ("an Arrow file", "Convert it to Parquet first."),
    b"version https://git-lfs.github.com/spec/": ("a git LFS pointer, not the file itself", "Run `git lfs pull`."),
}


def check_form(handle: IO[bytes], name: str, expected: bytes | None = None) -> None:
    """Refuse a file whose first bytes show another format than its name.

    Args:
        handle: at its beginning, before and after.
        expected: the magic bytes of the format in the name.

    Raises:
        FeedbackError: naming the other format, and what to do.
    """
    start = handle.read(max(map(len, _FORMS)))
    handle.seek(0)
    for mark, (form, advice) in _FORMS.items():
        if mark != expected and start.startswith(mark):
            raise FeedbackError(f"{name}: the content is {form}. {advice}")


def decode(raw: bytes, name: str, line: int) -> str:
    """Return `raw`, which begins at `line`, as text; only the first line may begin with a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where = f"{name}:{line + error.object.count(10, 0, error.start)}"  # 10 is the line feed
        if error.reason == "unexpected end of data" and error.end == len(error.object):
            raise FeedbackError(f"{where}: the last line is truncated. {COPY_AGAIN}") from None
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        raise FeedbackError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}). Convert it, for instance with"
            f" iconv -f {encoding} -t utf-8."
        ) from None


def lines_of(handle: IO[bytes], name: str) -> Iterator[str]:
    number = blank = 0
    while raw := handle.readline(LARGEST_RECORD):
        number += 1
        blank = blank + 1 if raw.isspace() else 0
        if blank > _MOST_BLANK_LINES:
            raise FeedbackError(f"{name}:{number}: more than {_MOST_BLANK_LINES:,} blank lines. {COPY_AGAIN}")
        if len(raw) == LARGEST_RECORD:
            raise FeedbackError(
                f"{name}:{number}: a line of more than {LARGEST_RECORD // 2**20} MiB. Expected one record on each line."
            )
        yield decode(raw, name, number)


def texts_of(handle: IO[bytes], name: str) -> Iterator[str]:
    """Yield the text of a file in pieces of about a mebibyte, read on demand."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        raw = handle.read(_PIECE)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            decode(error.object, name, line)  # raises the same error, with its line
            raise
        line += text.count("\n")
        if text:
            yield text
        if not raw:
            return
