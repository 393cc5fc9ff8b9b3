"""Write plan files ahead of the workers, in threads, so that a worker that asks for a shard finds its file written.

Only as many are written ahead as the leader asks for: those of a large run would fill the disk. Most of the time goes into
compression, outside the interpreter's lock.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from offline_kto.kto_core.cores import usable_cores

_MOST_THREADS = 4


class PlansAhead:
    """Plan files that are being written, or that no worker has asked for yet; a context that ends the threads.

    Args:
        write: writes the plan file of a shard, and returns the shards whose scores it awaits; called in several threads.
    """

    def __init__(self, write: Callable[[int], set[int]]) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, usable_cores()), thread_name_prefix="plan")
        self._begun: dict[int, Future[set[int]]] = {}

    def __enter__(self) -> "PlansAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, shards: Iterable[int]) -> None:
        """Have the files of some shards written, unless they are already; return at once."""
        for shard in shards:
            if shard not in self._begun:
                self._begun[shard] = self._pool.submit(self._write, shard)

    def take(self, shard: int) -> set[int]:
        """Wait until the file of a shard is written. Returns: the shards whose scores it awaits.

        A file that was taken is written again when it is asked for again.

        Raises:
            CacheError: it cannot be written.
        """
        self.begin([shard])
        return self._begun.pop(shard).result()
