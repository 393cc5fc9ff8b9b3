"""A stage that is killed, again and again, until it ends.

Each attempt is a forked child of the process that calls `main`, itself one of `forks.py`, so that everything is imported
once; SIGKILL ends it after a random time, or by its own hand just before its n-th change to the disk.
"""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import offline_kto.kto_core.cache.remote_lock
import offline_kto.precompute.parts as precompute_parts
from offline_kto.kto_core.locations import to_location
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train

# How a program changes the names on a disk: what a kill can fall between.
_CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir")


def main(orders: dict[str, Any]) -> dict[str, Any]:
    """Run a stage until it ends by itself.

    Args:
        orders: `stage`, `options`, and either `kills`, `seed` and `after` (seconds, from and to), or `begin_with`: a
            folder to start from, in a copy of its own for each change to the disk; a run is killed before that
            change, and repeated. `every`: of so many changes only the first. `stale_after`: seconds, of a remote lock.
            `seconds_between_parts`: how often the scores of an unfinished shard are written down.
    """
    precompute_parts.SECONDS_BETWEEN_PARTS = orders.get("seconds_between_parts", 60.0)
    if "stale_after" in orders:
        offline_kto.kto_core.cache.remote_lock.STALE_SECONDS = orders["stale_after"]
        offline_kto.kto_core.cache.remote_lock.REFRESH_SECONDS = orders["stale_after"] / 3
    stage, options = orders["stage"], orders["options"]
    if "begin_with" in orders:
        out, killed_before = options["out"], []
        for number in range(0, 1000, orders.get("every", 1)):
            options["out"] = f"{out}-{number}"
            shutil.copytree(orders["begin_with"], options["out"])
            killed = _ended_by_kill(_attempt(stage, options, prepare=lambda n=number: _kill_before_change(n)))
            if not killed:
                return {"kills": len(killed_before), "folders": [f"{out}-{n}" for n in [*killed_before, number]]}
            killed_before.append(number)
            _ended_by_kill(_attempt(stage, options))
    rng = random.Random(orders["seed"])
    for number in range(orders["kills"]):
        child = _attempt(stage, options)
        time.sleep(rng.uniform(*orders["after"]))
        os.kill(child, signal.SIGKILL)  # still a child of ours, even where it has ended
        if not _ended_by_kill(child):
            return {"kills": number}
    _ended_by_kill(_attempt(stage, options))
    return {"kills": orders["kills"]}


def _run(stage: str, options: dict[str, Any]) -> None:
    options = {**options, **{name: to_location(options[name]) for name in ("out", "cache") if name in options}}
    if stage == "precompute":
        precompute(PrecomputeConfig(**options))
    else:
        train(TrainConfig(**options))


def _attempt(stage: str, options: dict[str, Any], prepare: Callable[[], object] = lambda: None) -> int:
    """Start a child. Returns: its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prepare()
        _run(stage, options)
        code = 0
    finally:
        if code:
            traceback.print_exc()  # leaving like this prints none
        os._exit(code)


def _ended_by_kill(child: int) -> bool:
    """Wait for it. Raises: RuntimeError: it failed by itself."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError("an attempt failed")
    return False


def _kill_before_change(number: int) -> None:
    left = number

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return change(*args, **options)

        return changing

    for name in _CHANGES:
        setattr(os, name, counted(getattr(os, name)))
