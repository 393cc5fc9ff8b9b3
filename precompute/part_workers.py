"""Read parts of the feedback in child processes, one on each core.

parent  -- settings, parts -->  standard input of the child, one end of a socket pair; JSON
        <-- parts that are done, errors --  the same socket; what libraries print in the child goes to its log
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.errors import CacheError, KTOError, ModelError
from offline_kto.kto_core.hashing import chat_template_hash, tokenizer_hash
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.options import as_plain
from offline_kto.kto_core.runtime import keep_freed_memory, quiet_libraries
from offline_kto.kto_core.streams import encode_all
from offline_kto.kto_core.typed_json import from_json, to_json
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.child_process import ChildProcess, WatchedChannel, channel_to_parent
from offline_kto.precompute.engines.tokenizer import reference_tokenizer
from offline_kto.precompute.feedback.feedback_part import SaidError
from offline_kto.precompute.part_files import PartFiles, PartReader
from offline_kto.precompute.records.line_ranges import LineRange

# A worker is one core: its libraries start no threads for others.
_ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class ReaderSettings:
    """What a worker is started with, as JSON.

    Attributes:
        folder: with the parts.
        model: folder of the tokenizer.
        tokenizer: hash of its rules and its template, which the worker's must equal.
    """

    options: dict[str, Any]
    folder: str
    day: str
    model: str
    tokenizer: str


def _hash(tokenizer: Tokenizer) -> str:
    return f"{tokenizer_hash(tokenizer)} {chat_template_hash(tokenizer)}"


class PartWorkers:
    """Child processes that read parts. They end with the `with` block, and with this process, however it ends.

    Args:
        config: of `Feedback.for_parts`.
        model: folder from which they load the tokenizer.
        count: number of processes.
    """

    def __init__(
        self, config: PrecomputeConfig, tokenizer: Tokenizer, files: PartFiles, model: Path, count: int
    ) -> None:
        self._settings = ReaderSettings(
            as_plain(config), str(files.folder), files.day.isoformat(), str(model.absolute()), _hash(tokenizer)
        )
        self._files, self._count = files, count
        self._children: dict[Connection, ChildProcess] = {}

    def __enter__(self) -> "PartWorkers":
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children.values():
            child.channel.close()
            child.end(0.0)  # while it imports its libraries it would not notice the end of the channel
            child.log.unlink()

    def read(self, parts: Sequence[tuple[int, LineRange]]) -> Iterator[int]:
        """Yield the numbers of parts as they are done.

        Raises:
            KTOError: a worker cannot read, or was lost; the message names its log.
        """
        waiting = iter(parts)
        for _ in range(self._count):
            child = ChildProcess(__name__, "main", environment=_ONE_CORE)
            self._children[child.channel] = child
            self._send(child, to_json(self._settings))
            self._hand_out(child, waiting)
        left = len(parts)
        while left:
            for channel in wait(list(self._children)):
                child = self._children[cast("Connection", channel)]
                yield self._hear(child)
                left -= 1
                self._hand_out(child, waiting)

    def _hand_out(self, child: ChildProcess, waiting: Iterator[tuple[int, LineRange]]) -> None:
        if (one := next(waiting, None)) is not None:
            self._send(child, to_json(one))

    def _send(self, child: ChildProcess, content: object) -> None:
        try:
            child.channel.send_bytes(json.dumps(content).encode())
        except ConnectionError:
            return  # it has ended, which `_hear` reports

    def _hear(self, child: ChildProcess) -> int:
        """Return the number of the part that a worker has read."""
        try:
            message = json.loads(child.channel.recv_bytes())
        except (ConnectionError, EOFError):
            why = child.signal_name() or "by itself"
            self._children.pop(child.channel)
            child.channel.close()
            child.end()
            log = child.kept_log()
            again = "continues with the parts that are left" if self._files.has_any() else "starts again"
            raise CacheError(
                f"A process that reads the feedback has ended ({why}). The same command {again}; "
                f"--read-workers 1 reads in one process.{f' Its log: {log}' if log else ''}"
            ) from None
        if "error" in message:
            raise from_json(SaidError, message["error"]).error()
        return int(message["done"])


def main() -> None:
    """Serve the parent process at the other end of standard input, in the child process."""
    encode_all()
    keep_freed_memory()
    quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent gets them too, and ends its workers
        signal.signal(number, signal.SIG_IGN)
    channel = channel_to_parent()
    settings = from_json(ReaderSettings, json.loads(channel.recv_bytes()))
    with shown_lines():  # standard output is the log
        try:
            _serve(channel, settings)
        except KTOError as error:
            channel.send_bytes(json.dumps({"error": to_json(SaidError.of(error))}).encode())
            channel.recv_bytes()  # ends with the parent's end of the channel


def _serve(channel: WatchedChannel, settings: ReaderSettings) -> None:
    config = PrecomputeConfig(**settings.options)
    if not config.trust_remote_code:
        # transformers then tokenizes without torch, whose imports take three seconds and 150 MiB of each worker.
        sys.modules["torch"] = cast(ModuleType, None)
    import transformers

    tokenizer, _ = reference_tokenizer(transformers.AutoTokenizer, config, Path(settings.model))
    if _hash(tokenizer) != settings.tokenizer:
        raise ModelError(f"{config.model}: its tokenizer changed while the feedback was read. Run the command again.")
    files = PartFiles(Path(settings.folder), datetime.fromisoformat(settings.day))
    reader = PartReader(config, tokenizer, files)
    while True:
        number, lines = from_json(tuple[int, LineRange], json.loads(channel.recv_bytes()))
        reader.read(number, lines)
        channel.send_bytes(json.dumps({"done": number}).encode())
