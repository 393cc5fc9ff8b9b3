"""Define the errors that a user can fix.

    KTOError
    |-- ConfigError        an option or a YAML file
    |-- FeedbackError      the feedback: files, formats, labels
    |-- TokenizationError  a row that a tokenizer or chat template cannot render safely
    |-- PairingError       no valid mismatched completion exists
    |-- ModelError         a model, adapter or tokenizer that cannot be loaded or scored
    |-- CacheError         a cache that is absent, incomplete, damaged or of another identity
    |   `-- NewerFormatError   a cache of a newer format than this version reads
    |-- TrainingError      training cannot start or continue
    |   `-- WriteError         a file cannot be saved: no space or no permission
    `-- OutputError        standard output cannot be written

Each message says where the error is, what was found and what to do. The commands print it and exit with 1.
Any other exception is a bug in this package and keeps its traceback.
"""

import difflib
import re

from offline_kto.kto_core.redaction import hidden


class KTOError(Exception):
    """Base class of all errors that the user can fix.

    A message may quote untrusted text from a file or a URL. Line breaks are kept, other control characters are escaped
    and secrets are masked.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(printable(hidden(line)) for line in message.split("\n")))


class ConfigError(KTOError):
    """An option or a YAML file has an invalid value."""


class FeedbackError(KTOError):
    """A feedback file or one of its rows cannot be used."""


class TokenizationError(KTOError):
    """A row cannot be rendered into prompt and completion tokens without ambiguity."""


class PairingError(KTOError):
    """No valid mismatched completions exist for the chosen pairing method."""


class ModelError(KTOError):
    """A model, adapter or tokenizer cannot be loaded, or its log-probabilities cannot be trusted."""


class CacheError(KTOError):
    """A reference cache is absent, incomplete, damaged, or not the requested one."""


class NewerFormatError(CacheError):
    """A cache has a newer format than this version reads; it may be valid."""


class TrainingError(KTOError):
    """Training cannot start, or was stopped."""


class WriteError(TrainingError):
    """A file cannot be saved: the disk is full, or there is no permission to write."""


class OutputError(KTOError):
    """Standard output cannot be written; this is not an error of the disk that a command works on."""


def in_one_line(error: BaseException) -> str:
    """Return a library's error message in one line, without secrets: its first line, and more if that is a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines.pop(0) if lines else type(error).__name__
    while lines and _HEADING.search(said) and len(said) < _ENOUGH:
        said = f"{said} {lines.pop(0)}"
    return hidden(said)


# A heading, which the following lines explain: a colon at the end, or the first line of pydantic's errors.
_HEADING = re.compile(r":$|validation errors? for \S+$")
_ENOUGH = 300


def printable(text: str, limit: int | None = None) -> str:
    """Return `text` cut to about `limit` characters, with line breaks and other control characters escaped."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def said_by(error: BaseException) -> str:
    """Return a library's error message, escaped and shortened: it may quote a file's content at length."""
    return printable(in_one_line(error), 200)


def shown(value: object) -> str:
    """Return a value from a file for a message, escaped and shortened."""
    try:
        return printable(str(value), 100)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"


def nearest(word: str, known: list[str]) -> str:
    """Return ` Did you mean 'beta'?`, or an empty text if no known word is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
