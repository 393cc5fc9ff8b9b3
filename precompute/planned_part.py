"""Score a part of the planned shards, alone: `--part I/N`. Other parts may be scored at the same time, anywhere."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from offline_kto.kto_core.cache.manifest import MANIFEST, read_manifest
from offline_kto.kto_core.cache.manifest_fields import ReferenceFields
from offline_kto.kto_core.cache.shards import read_metadata
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import CacheError, ConfigError, shown
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.hashing import file_hash
from offline_kto.kto_core.lock import only_writer
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.out_folder import NEXT, done_in, shards_in
from offline_kto.precompute.plan_files import PlannedRun, PlannedShard, planned_options, read_run, run_path
from offline_kto.precompute.records.sources import files_of
from offline_kto.precompute.score_files import read_parts
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
        _check_complete(config, out)
        tell(f"complete    {out} has its manifest; this part has nothing to do")
        return
    if run is None:
        raise CacheError(f"--part {config.part}: {out} contains no plan. Run the same command with --plan-only first.")
    _check_options(config, run)
    planned: dict[tuple[str, int | None], str | None] = {(file.name, file.bytes): file.sha256 for file in run.files}
    _refuse_other_feedback(config, planned, since=run_path(out).stat().st_mtime)
    mine = run.shards[part::parts]
    files = (*done_in(out), *shards_in(out), *shards_in(out / NEXT))
    footers = [metadata for metadata in map(read_metadata, files) if metadata]
    there = {metadata.get("key") for metadata in footers if metadata.get("identity") == run.identity}
    left = [shard for shard in mine if shard.key not in there]
    total = f"{counted(len(mine), 'shard')} of {len(run.shards):,}"
    tell(f"part        {part} of {parts} (counted from 0): {total}, {len(mine) - len(left)} done")
    if known := _in_parts(run, out, left):
        tell(f"known       {counted(known, 'sequence')} of these shards are already scored")
    try:
        answers = _score(config, run, left, out)
    except CacheError:
        if read_run(out) is not None or not (out / MANIFEST).exists():
            raise
        _check_complete(config, out)
        tell(f"complete    another command has finished {out} meanwhile; this part has nothing left to do")
        return
    tokens, seconds = sum(one.tokens for one in answers), sum(one.seconds for one in answers)
    tell(f"scored      {counted(tokens, 'token')} in {seconds:,.1f} s")
    if waiting := sum(not one.is_written for one in answers):
        tell(f"waiting     {counted(waiting, 'shard')} for scores of other parts; the last command completes them")
    tell("next        when all parts are done: the same command without --part, which writes the manifest")


def _score(config: PrecomputeConfig, run: PlannedRun, shards: Sequence[PlannedShard], out: Path) -> list[Answer]:
    """Score some shards. Only one process does so for a part: two would both score all of it."""
    answers: list[Answer] = []
    if not shards:
        return answers
    busy = f"is scoring --part {config.part}. Wait for it, or end it first."
    with (
        only_writer(run_path(out).parent, CacheError, name=f".part-{str(config.part).replace('/', '-of-')}", busy=busy),
        _saying_what_is_kept(run, out, shards, answers),
        ShardWorker(config, out) as worker,
        Progress("scoring", sum(shard.tokens for shard in shards), "tokens") as progress,
    ):
        for shard in shards:
            answers.append(worker.score(Task(shard.number, str(out)), progress.add))
    return answers


@contextlib.contextmanager
def _saying_what_is_kept(
    run: PlannedRun, out: Path, shards: Sequence[PlannedShard], answers: Sequence[Answer]
) -> Iterator[None]:
    """Log what is on disk, if the block ends with an exception."""
    try:
        yield
    except BaseException:  # any error, Ctrl-C, or a scheduler's signal
        done = len(answers)
        if (kept := _in_parts(run, out, shards[done:])) or done:
            tell(f"kept        {counted(done, 'shard')} of this part, and {counted(kept, 'sequence')} of the others")
        raise


def _in_parts(run: PlannedRun, out: Path, shards: Sequence[PlannedShard]) -> int:
    """Return the number of sequences in the parts of some shards."""
    return sum(len(read_parts(out, shard.key, run.identity, vocabulary=run.vocabulary)) for shard in shards)


def _check_options(config: PrecomputeConfig, run: PlannedRun) -> None:
    """Refuse options that say other rows or shards than those of the plan, which is what is scored."""
    mine = json.loads(json.dumps(planned_options(config)))
    _refuse_others(config, mine, {name: run.options.get(name) for name in mine}, "plan")


def _check_complete(config: PrecomputeConfig, out: Path) -> None:
    """Refuse options, feedback and a model that are not those of a complete cache, as far as its manifest tells."""
    manifest = read_manifest(out)
    pairing = manifest.pairing
    theirs = {
        "max_length": manifest.tokenization.get("max_length"),
        "pairing": pairing.get("method"),
        "seed": pairing.get("seed"),
        "kl_partners": pairing.get("partners"),
    }
    _refuse_others(config, {name: getattr(config, name) for name in theirs}, theirs, "cache")
    planned: dict[tuple[str, int | None], str | None] = {
        (one["name"], one["bytes"]): one["sha256"] for one in manifest.data["files"]
    }
    _refuse_other_feedback(config, planned, since=(out / MANIFEST).stat().st_mtime)
    _refuse_other_weights(config, manifest.reference)


def _refuse_other_weights(config: PrecomputeConfig, scored: ReferenceFields) -> None:
    """Refuse a model or an adapter with other weights. Those of the same name and place are not read again."""
    from offline_kto.precompute.engines.reference import ReferenceFiles, WeightsHashing  # imports torch: seconds

    files = ReferenceFiles.find(config)
    names = {"id": config.model, "revision": files.revision, "adapter": config.adapter, **files.paths}
    if all(scored.get(name) == value for name, value in names.items()):
        return
    with WeightsHashing(files.folder, files.adapter) as hashing:
        found = hashing.result()
    if found != (scored.get("weights_hash"), scored.get("adapter_hash")):
        theirs, mine = (
            f"{model} with adapter {adapter}" if adapter else str(model)
            for model, adapter in ((scored.get("id"), scored.get("adapter")), (config.model, config.adapter))
        )
        raise ConfigError(
            f"--part {config.part}: {config.out} was scored under {theirs}, which has other weights than {mine}. Choose another --out "
            "to score under this model."
        )


def _refuse_others(
    config: PrecomputeConfig, mine: Mapping[str, object], theirs: Mapping[str, object], what: str
) -> None:
    lines = [
        f"{_flag(name)}: {_in_words(theirs[name])} in the {what}, {_in_words(mine[name])} here"
        for name in mine
        if mine[name] != theirs[name]
    ]
    if lines:
        raise ConfigError(
            f"--part {config.part}: {config.out} was planned with other options:\n  "
            + "\n  ".join(lines)
            + "\nGive every part the options of the plan, or plan again with --plan-only."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _in_words(value: object) -> str:
    return "not set" if value is None else shown(value)


def _refuse_other_feedback(
    config: PrecomputeConfig, planned: Mapping[tuple[str, int | None], str | None], *, since: float
) -> None:
    """Refuse feedback that is not the planned one, if this machine has it.

    Args:
        planned: hash of each file, by name and size.
        since: time of the plan; only files that are newer are hashed.
    """
    if not Path(config.data).exists():
        return
    for path, _ in files_of(config.data, config.split):
        state = path.stat()
        known = planned.get((path.name, state.st_size))
        if known is None or (state.st_mtime > since and file_hash(path) != known):
            raise ConfigError(
                f"--part {config.part}: {path} is not the feedback that was planned. Plan again with --plan-only, or start the parts "
                "with the feedback of the plan."
            )
