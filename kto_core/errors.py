"""Errors that a user can mend.

    KTOError
    |-- ConfigError        an option or a YAML file
    |-- FeedbackError      the feedback: files, formats, labels
    |-- TokenizationError  a row that a tokenizer or chat template cannot render safely
    |-- PairingError       no valid mismatched completion exists
    |-- ModelError         a model, adapter or tokenizer that cannot be loaded or scored
    |-- CacheError         a cache that is absent, incomplete, damaged or of another identity
    |   `-- NewerFormatError   a cache of a format that this version does not know
    |-- TrainingError      training cannot start or go on
    |   `-- WriteError         what was to be saved does not fit on the disk
    `-- OutputError        standard output cannot be written

Each message says where, what was found and what to do. The commands print it and exit with 1.
Everything else that is raised is our own mistake and keeps its traceback.
"""

import difflib
import re

from offline_kto.kto_core.redaction import hidden


class KTOError(Exception):
    """Base of all errors that the user, rather than the program, can mend.

    A message may quote what stands in a file or a URL: its lines stay, whatever else could drive a terminal is escaped,
    and secrets are hidden.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(printable(hidden(line)) for line in message.split("\n")))


class ConfigError(KTOError):
    """An option or a YAML file holds something that cannot be used."""


class FeedbackError(KTOError):
    """A feedback file or one of its rows cannot be used."""


class TokenizationError(KTOError):
    """A row cannot be rendered into prompt and completion tokens without ambiguity."""


class PairingError(KTOError):
    """The rows admit no mismatched completions under the rule asked for."""


class ModelError(KTOError):
    """A model, adapter or tokenizer cannot be loaded, or its log-probabilities cannot be trusted."""


class CacheError(KTOError):
    """A reference cache is absent, incomplete, damaged, or not the one that was asked for."""


class NewerFormatError(CacheError):
    """A cache of a format that this version does not know; it may be perfectly good."""


class TrainingError(KTOError):
    """Training cannot start, or had to stop before it did harm."""


class WriteError(TrainingError):
    """What was to be saved does not fit on the disk, or may not be written there."""


class OutputError(KTOError):
    """Standard output cannot be written, which says nothing of the disk that a command works on."""


def in_one_line(error: BaseException) -> str:
    """What a library says, in one line, without secrets: its first one, with those behind it where it is only a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines.pop(0) if lines else type(error).__name__
    while lines and _HEADING.search(said) and len(said) < _ENOUGH:
        said = f"{said} {lines.pop(0)}"
    return hidden(said)


# What announces the lines behind it: a colon, or the first line of pydantic's errors.
_HEADING = re.compile(r":$|validation errors? for \S+$")
_ENOUGH = 300


def printable(text: str, limit: int | None = None) -> str:
    """`text` cut to about `limit` characters; line breaks and whatever else could drive a terminal are escaped."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def said_by(error: BaseException) -> str:
    """What a library says of a file, fit for a message: it may quote at length what the file holds."""
    return printable(in_one_line(error), 200)


def shown(value: object) -> str:
    """A value from a file, for a message; cut where it is long."""
    try:
        return printable(str(value), 100)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"


def nearest(word: str, known: list[str]) -> str:
    """` Did you mean 'beta'?`, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
