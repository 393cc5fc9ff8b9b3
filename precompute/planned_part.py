"""Score a part of the planned shards, alone: `--part I/N`. Other parts may be scored at the same time, anywhere."""

import contextlib
from pathlib import Path

from offline_kto.kto_core.cache.manifest import MANIFEST
from offline_kto.kto_core.cache.shards import read_metadata
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.out_folder import NEXT, done_in, shards_in
from offline_kto.precompute.plan_files import PlannedRun, read_run
from offline_kto.precompute.worker import ShardWorker
from offline_kto.precompute.workers import Answer, Task


def score_part(config: PrecomputeConfig, part: int, parts: int) -> None:
    """Score one of the parts into which the planned shards are divided.

    Raises:
        KTOError: there is neither a plan nor a complete cache, this machine would compute other scores, or a shard cannot be scored.
    """
    out = Path(config.out)
    run = read_run(out)
    if run is None and (out / MANIFEST).exists():
        tell(f"complete    {out} has its manifest; this part has nothing to do")
        return
    if run is None:
        raise CacheError(f"--part {config.part}: {out} contains no plan. Run the same command with --plan-only first.")
    mine = run.shards[part::parts]
    files = (*done_in(out), *shards_in(out), *shards_in(out / NEXT))
    footers = [metadata for metadata in map(read_metadata, files) if metadata]
    there = {metadata.get("key") for metadata in footers if metadata.get("identity") == run.identity}
    left = [shard for shard in mine if shard.key not in there]
    total = f"{counted(len(mine), 'shard')} of {len(run.shards):,}"
    tell(f"part        {part} of {parts} (counted from 0): {total}, {len(mine) - len(left)} done")
    waiting = 0
    answers: list[Answer] = []
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(ShardWorker(config, out)) if left else None
        progress = stack.enter_context(Progress("scoring", sum(shard.tokens for shard in left), "tokens"))
        for shard in left:
            assert worker is not None
            _check_plan(config, run)
            answers.append(worker.score(Task(shard.number, str(out)), progress.add))
            waiting += not answers[-1].is_written
    tokens, seconds = sum(one.tokens for one in answers), sum(one.seconds for one in answers)
    tell(f"scored      {counted(tokens, 'token')} in {seconds:,.1f} s")
    if waiting:
        tell(f"waiting     {counted(waiting, 'shard')} for scores of other parts; the last command completes them")
    tell("next        when all parts are done: the same command without --part, which writes the manifest")


def _check_plan(config: PrecomputeConfig, run: PlannedRun) -> None:
    """Refuse to continue once another command has planned or finished the cache."""
    now = read_run(Path(config.out))
    if now is None or now.token != run.token:
        raise CacheError(
            f"--part {config.part}: another command has {'finished' if now is None else 'planned'} {config.out} meanwhile. Finished "
            "shards are kept; start the parts again if some are missing."
        )
