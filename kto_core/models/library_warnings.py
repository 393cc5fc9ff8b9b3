"""Collect warnings that `transformers` logs while it loads a model, because the commands silence its log."""

import contextlib
import logging
from collections.abc import Iterator


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextlib.contextmanager
def collected_warnings(library: str = "transformers") -> Iterator[list[str]]:
    """Collect a library's logged warnings instead of printing or dropping them.

    Args:
        library: name of its root logger.

    Yields:
        The messages, filled while the block runs.
    """
    logger, messages = logging.getLogger(library), list[str]()
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [_Collector(messages)], False
    try:
        yield messages
    finally:
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate


# Parts of warnings after which a model may compute other scores than its author's.
_TELLING = ("rope_parameters", "to instantiate a model of type", "but you overrode it")


def telling(messages: list[str]) -> list[str]:
    """Return the warnings about a configuration that the user must see, each in one line."""
    found = [" ".join(message.split()) for message in messages if any(part in message for part in _TELLING)]
    return list(dict.fromkeys(found))


# transformers logs this, and loads the model without its quantisation.
_SKIPPED = "skip the quantization"


def skipped_quantization(messages: list[str]) -> str | None:
    """Return the library's warning that it skipped a quantisation (without its advice to ignore it), or None."""
    return next((message.split(" - ")[0] for message in messages if _SKIPPED in message), None)
