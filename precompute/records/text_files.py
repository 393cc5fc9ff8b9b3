"""Read lines of text from a feedback file, and turn operating system errors into messages with a remedy."""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from offline_kto.kto_core.errors import FeedbackError, said_by

Record = dict[str, object]
Located = tuple[str, Record]
# Takes the place and the error of a line that is no record, so that reading continues after it.
OnBadLine = Callable[[str, FeedbackError], None]
# Bytes of one record. A few compressed bytes may expand to one that fills the memory; a million tokens have about 5 MB.
LARGEST_RECORD = 64 * 2**20
# Largest compression ratio of a file; one with a higher ratio repeats the same text over and over.
MOST_PACKED = 500
# Consecutive blank lines: a compressed file may contain billions of them.
_MOST_BLANK_LINES = 10**6
_PIECE = 2**20
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
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


def as_utf_8(handle: IO[bytes], name: str) -> IO[bytes]:
    """Return a file of UTF-16 that begins with a byte order mark as UTF-8; any other file as it is.

    Args:
        handle: at its beginning, before and after.
    """
    start = handle.read(4)
    handle.seek(0)
    if not start.startswith(_UTF_16_MARKS) or start in _UTF_32_MARKS:
        return handle
    return cast(IO[bytes], io.BufferedReader(_Utf16File(handle, name)))


class _Utf16File(io.RawIOBase):
    """A file of UTF-16, read as UTF-8."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go back to the beginning. Going anywhere else is not supported."""
        if (offset, whence) == (0, io.SEEK_SET):
            self._file.seek(0)
            self._decoder = codecs.getincrementaldecoder("utf-16")()
            self._ready, self._position = b"", 0
        elif (offset, whence) != (0, io.SEEK_CUR):
            raise io.UnsupportedOperation("seek")
        return self._position

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._file.read(_PIECE)
            try:
                self._ready = self._decoder.decode(raw, final=not raw).encode("utf-8")
            except UnicodeDecodeError as error:
                raise FeedbackError(f"{self._name}: not readable as UTF-16 ({error.reason}). {COPY_AGAIN}") from None
            if not raw:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        self._position += size
        return size


def decode(raw: bytes, name: str, line: int) -> str:
    """Return `raw`, which begins at `line`, as text; only the first line may begin with a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where = f"{name}:{line + error.object.count(10, 0, error.start)}"  # 10 is the line feed
        if error.reason == "unexpected end of data" and error.end == len(error.object):
            raise FeedbackError(f"{where}: the last line is truncated. {COPY_AGAIN}") from None
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "cp1252"
        raise FeedbackError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}). Convert it, for instance with"
            f" iconv -f {encoding} -t utf-8."
        ) from None


def lines_of(handle: IO[bytes], name: str, *, before: int = 0, size: int | None = None) -> Iterator[str]:
    """Yield the lines of a file.

    Args:
        handle: at the first of them.
        before: number of lines before it.
        size: bytes of the lines; None for all that follow.
    """
    number, blank, read = before, 0, 0
    while (size is None or read < size) and (raw := handle.readline(LARGEST_RECORD)):
        number += 1
        read += len(raw)
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
