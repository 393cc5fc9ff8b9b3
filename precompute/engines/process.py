"""Run an engine in a child process, because vLLM only frees its memory when its process ends.

parent  -- settings, sequences -->  standard input of the child (`child.py`), one end of a socket pair
        <-- scores, progress --     the same socket; what libraries print in the child goes to its log
"""

import contextlib
import json
from collections.abc import Iterator

from offline_kto.kto_core.errors import ModelError
from offline_kto.precompute.engines.child_process import ChildProcess
from offline_kto.precompute.engines.protocol import EngineSettings, RemoteScorer

_LOG = " Its log: "


@contextlib.contextmanager
def engine_process(settings: EngineSettings, *, name: str) -> Iterator[RemoteScorer]:
    """Start an engine in a child process, which has ended and freed its memory when the `with` block is left.

    Args:
        settings: read by `child.py`.
        name: of the engine, for messages.

    Raises:
        ModelError: the engine could not start or score, with its log's path.
    """
    child = ChildProcess("offline_kto.precompute.engines.child", "main")
    scorer = RemoteScorer(child.channel, name)
    try:
        with contextlib.suppress(ConnectionError):  # the child has already ended: the first request reports it
            child.channel.send_bytes(json.dumps(settings).encode("utf-8"))
        yield scorer
        scorer.dismiss()
    except ModelError as error:
        if not _is_of(error, scorer):
            child.log.unlink()
            raise
        ending = child.signal_name()
        log = child.kept_log()
        raise type(error)(f"{error}{f' ({ending})' if ending else ''}{f'{_LOG}{log}' if log else ''}") from error
    except BaseException:
        child.end(0.0)  # while it imports its libraries it would not notice the end of the channel
        child.log.unlink()
        raise
    else:
        child.log.unlink()
    finally:
        child.channel.close()  # the child ends then, if it has not yet
        child.end()


def _is_of(error: ModelError, scorer: RemoteScorer) -> bool:
    """Return whether an engine's log explains an error: not another engine's, nor one that names a log already."""
    return getattr(error, "engine", scorer) is scorer and _LOG not in str(error)
