"""Score the sequences of a plan that have no score yet, shard by shard: in this process, or with workers."""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from offline_kto.kto_core.cache.manifest_fields import RunFields, ScoreDifference, ScoringSections, WorkerFields
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.progress import Progress
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import Backend, load_transformers, vllm_engine
from offline_kto.precompute.engines.comparison import DisagreementError, choose_sample
from offline_kto.precompute.engines.protocol import Listener, Scorer
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.leader import Leader
from offline_kto.precompute.local_workers import LocalWorkers
from offline_kto.precompute.needs import Needs, SequenceIds
from offline_kto.precompute.out_folder import MERGED
from offline_kto.precompute.parts import Pace, ShardScores
from offline_kto.precompute.plan import Plan, shard_rows
from offline_kto.precompute.plan_ahead import PlansAhead
from offline_kto.precompute.plan_files import (
    PlannedRun,
    PlannedShard,
    done_path,
    plan_path,
    planned_options,
    write_plan_file,
    write_run,
)
from offline_kto.precompute.ray_workers import RayWorkers, ShardWorkerOpener
from offline_kto.precompute.score_files import read_parts, read_scores
from offline_kto.precompute.shard_tables import scored_table, shard_key, unscored_table
from offline_kto.precompute.store import ShardSize, Store
from offline_kto.precompute.workers import Answer, Workers, WorkerSettings

# Sequences on which Transformers' scoring is checked.
_SHORTEST = 16
# What is proposed for workers without work: so many shards for each of them, none of fewer rows than this.
_SHARDS_A_WORKER, _LEAST_ROWS = 3, 64


class Scoring:
    """Scores the sequences of a plan that have no score yet, shard by shard.

    Args:
        sections: the manifest's, on what scores.

    Attributes:
        difference: the engine's difference from Transformers, for the manifest; None if Transformers scored.
    """

    def __init__(
        self,
        config: PrecomputeConfig,
        reference: Reference,
        plan: Plan,
        store: Store,
        backend: Backend,
        sections: ScoringSections,
    ) -> None:
        self.config, self.reference, self.plan, self.store = config, reference, plan, store
        self.backend, self.sections = backend, sections
        self.shards = shard_rows(plan, config.rows_per_shard)
        self.scored = self.tokens = 0
        self.seconds = 0.0
        self.difference: ScoreDifference | None = None
        self.workers: list[WorkerFields] = []
        self._underway: ShardScores | None = None
        self._finishing = threading.Lock()
        self._keys = [shard_key(plan, rows) for rows in self.shards]
        store.adopt_done(self._keys)
        self.missing = [
            i
            for i, key in enumerate(self._keys)
            if not store.has(i, key, partial(unscored_table, plan, self.shards[i]))
        ]
        store.set_aside(self.missing)
        self._needs = Needs(
            plan, SequenceIds.of(plan), self.shards, missing=self.missing, keys=self._keys, files=store.scored_files
        )

    def run(self, sequences: int, gpus: Sequence[Sequence[int] | None]) -> None:
        """Score missing sequences and write missing shards.

        Args:
            sequences: number of sequences in the whole plan, for messages.
            gpus: of each worker that there may be.
        """
        self._tell_of_reused()
        if self.config.cluster is not None and self._needs.unknown_tokens:
            settings = WorkerSettings.of(self.config, str(self.store.out))
            gpus_of_one = 0 if self.config.device == "cpu" else self.config.tensor_parallel
            connect = partial(RayWorkers, self.config.cluster, ShardWorkerOpener(settings), gpus=gpus_of_one)
            self._score_with(connect, settings.out, sequences)
        elif min(len(gpus), len(self.missing)) > 1 and self._needs.unknown_tokens:
            out = str(self.store.out)
            self._score_with(partial(LocalWorkers, self.config, out, gpus), out, sequences)
        else:
            if self._needs.unknown_tokens:
                self._tell_of_idle(len(gpus))
            self._score_here(sequences)

    def _tell_of_reused(self) -> None:
        """Log what is there of earlier runs."""
        if len(self.missing) < len(self._keys):
            tell(f"resuming    {len(self._keys) - len(self.missing)} of {len(self._keys)} shards are complete")
        if self._needs.known:
            tell(f"known       {self._needs.known:,} of {self._needs.wanted:,} sequences are already scored")

    def plan_only(self) -> int:
        """Write the plan files of all missing shards. Returns: their number."""
        self._tell_of_reused()
        self._write_run()
        with PlansAhead(self._prepare) as plans:
            plans.begin(self.missing)
            for index in self.missing:
                plans.take(index)
        return len(self.missing)

    def _score_here(self, sequences: int) -> None:
        left, pace = list(self.missing), Pace()
        with (
            self._saying_what_is_kept(lambda: self._kept_here(left), sequences),
            self._engine() as scorer,
            Progress("scoring", self._needs.unknown_tokens, "tokens") as progress,
        ):
            self.reference.check_unchanged()
            for i in self.missing:
                need = self._needs.of(i)
                names, company = self._needs.ids_of(i), self._needs.company(i, need)
                scores = {name: one for name, one in zip(names, need.scores, strict=True) if one is not None}
                write = partial(self.store.write_part, self._keys[i])
                self._underway = ShardScores(company, scores, write, pace)
                self._score(company, scorer, progress)
                scores |= self._underway.scores
                table = scored_table(unscored_table(self.plan, self.shards[i]), [scores[name] for name in names])
                self.store.write(i, self._keys[i], table)
                # A sequence that another shard also needs is scored only once.
                self._needs.complete(i, [scores[names[at]] for at in self._needs.lent_by(i).tolist()])
                left.remove(i)
                pace.restart()

    def _score(self, company: Mapping[str, TokenIds], scorer: Scorer | None, progress: Progress) -> None:
        """Score the missing sequences of the shard in progress."""
        assert self._underway is not None
        before, sequences = self._underway.known, list(company.values())
        if scorer is None or len(before) == len(sequences):
            return
        started = time.monotonic()
        scorer.score(sequences, Listener(self._underway.add, progress.add), known=before)
        self.seconds += time.monotonic() - started
        fresh = [sequence for i, sequence in enumerate(sequences) if i not in before]
        self.scored += len(fresh)
        self.tokens += sum(len(prompt) + len(completion) for prompt, completion in fresh)

    @contextlib.contextmanager
    def _engine(self) -> Iterator[Scorer | None]:
        """Yield the engine, ready to score; None if there is nothing to score."""
        if not self._needs.unknown_tokens:
            yield None
        elif self.backend.name == "transformers":
            yield load_transformers(self.reference, self._needs.shortest_unscored(_SHORTEST))
        else:
            merged = self.store.out / MERGED
            sample = choose_sample(self._needs.unscored())
            try:
                with vllm_engine(self.reference, sample, merged, tokens=self._needs.unknown_tokens) as scorer:
                    yield scorer
                    self.difference = scorer.difference()
            finally:
                shutil.rmtree(merged, ignore_errors=True)

    def _tell_of_idle(self, workers: int) -> None:
        """Log that there are fewer shards than workers."""
        rows = len(self.plan.rows) if len(self.missing) == len(self.shards) else 0
        if line := without_work(len(self.missing), workers, rows):
            tell(f"workers     {line}")

    def _score_with(self, connect: Callable[[], Workers], out: str, sequences: int) -> None:
        run = self._write_run()
        workers = connect()
        room = workers.room
        if self.config.cluster is not None:
            limit = f"; --workers {self.config.workers} limits them" if self.config.workers else ""
            tell(f"cluster     {self.config.cluster}: room for {counted(room, 'worker')} now{limit}")
        self._tell_of_idle(min(room, self.config.workers or room))
        pace = Pace()

        def keep() -> None:
            if pace.is_due():
                self.store.changed()
                pace.restart()

        with Progress("scoring", self._needs.unknown_tokens, "tokens") as progress:
            leader = Leader(
                workers,
                self.missing,
                out,
                most=self.config.workers or len(self.missing),
                prepare=self._prepare,
                finish=partial(self._finish, run),
                keep=keep,
                tokens_of=self._needs.unknown_tokens_of,
                progress=progress,
            )
            with self._saying_what_is_kept(lambda: self._kept_by(leader), sequences):
                try:
                    leader.run()
                finally:
                    workers.stop()
                    shutil.rmtree(self.store.out / MERGED, ignore_errors=True)
        self._take_answers(leader)

    def _write_run(self) -> PlannedRun:
        """Write what workers need to know about this run."""
        reference = self.sections["reference"]
        run = PlannedRun(
            token=secrets.token_hex(8),
            metadata=self.store.metadata,
            versions=self.sections["scorer"]["versions"],
            hashes=[reference["weights_hash"], reference["adapter_hash"]],
            weights_state=self.reference.state_hash,
            vocabulary=self.reference.vocabulary,
            threads=torch.get_num_threads(),
            options=planned_options(self.config),
            files=self.plan.files,
            shards=[
                PlannedShard(i, self._keys[i], len(self.shards[i]), self._needs.unknown_tokens_of(i))
                for i in self.missing
            ],
        )
        write_run(self.store.out, run)
        return run

    def _prepare(self, index: int) -> set[int]:
        """Write the plan file of a shard, in any thread. Returns: the shards whose scores it awaits."""
        with self._finishing:  # which removes parts, whose scores are read here
            need = self._needs.of(index)
        table = unscored_table(self.plan, self.shards[index])
        metadata = {**self.store.metadata, "key": self._keys[index]}
        write_plan_file(plan_path(self.store.out, index), table, need, metadata)
        return need.awaited

    def _finish(self, run: PlannedRun, index: int, answer: Answer) -> None:
        """Move a shard that a worker has written into place."""
        entry = ShardSize(answer.rows, answer.bytes, answer.sha256)
        with self._finishing:
            path = self.store.adopt(index, self._keys[index], done_path(self.store.out, run.token, index), entry)
            rows, slots = np.divmod(self._needs.lent_by(index), self._needs.width)
            self._needs.complete(index, read_scores(path, rows, slots))
        plan_path(self.store.out, index).unlink(missing_ok=True)

    def _take_answers(self, leader: Leader) -> None:
        self.scored = sum(answer.scored for answer in leader.answers)
        self.tokens = sum(answer.tokens for answer in leader.answers)
        self.seconds = leader.seconds
        self.workers = leader.worker_fields()
        self.difference = leader.difference()

    @contextlib.contextmanager
    def _saying_what_is_kept(
        self, kept: Callable[[], tuple[list[int], dict[int, set[str]]]], sequences: int
    ) -> Iterator[None]:
        """Log the number of scores on disk, if the block ends with an exception.

        Args:
            kept: returns the shards that are not complete, and the ids in the parts of those that were begun.
            sequences: number of sequences in the whole plan.
        """
        try:
            yield
        except BaseException as error:  # any error, Ctrl-C, or a scheduler's signal
            if self._underway is not None:
                self._keep(error, self._underway)
            left, ids = kept()
            rows, unscored = self._needs.count_kept(ids)
            rows += sum(map(len, self.shards)) - sum(len(self.shards[i]) for i in left)
            if scores := sequences - unscored:
                tell(f"kept        {rows:,} of {len(self.plan.rows):,} rows ({scores:,} of {sequences:,} scores)")
            raise

    def _keep(self, error: BaseException, underway: ShardScores) -> None:
        """Write the scores of the shard in progress, unless the error says that they are wrong."""
        if isinstance(error, DisagreementError):
            underway.kept.clear()
            return
        with contextlib.suppress(CacheError):  # a full disk may be the error that ends the run, which is reported
            underway.flush()

    def _kept_here(self, left: list[int]) -> tuple[list[int], dict[int, set[str]]]:
        if self._underway is None or not left:
            return left, {i: set() for i in left[:1]}
        if not self._underway.kept:
            self.store.drop_parts(self._keys[left[0]])
        return left, {left[0]: self._underway.kept}

    def _kept_by(self, leader: Leader) -> tuple[list[int], dict[int, set[str]]]:
        identity, vocabulary = self.store.identity, self.store.vocabulary
        ids = {i: {*read_parts(self.store.out, self._keys[i], identity, vocabulary=vocabulary)} for i in leader.begun}
        return leader.left, ids

    def summary(self, sequences: int) -> RunFields:
        """Return the manifest's section `run`."""
        run: RunFields = {
            "scored_sequences": self.scored,
            "reused_sequences": sequences - self.scored,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
        }
        if self.workers:
            run["workers"] = self.workers
        return run


def without_work(shards: int, workers: int, rows: int) -> str:
    """Return a line about workers without a shard; empty if there are none.

    Args:
        rows: of all shards, which could be smaller; 0 if some are complete already.
    """
    idle = workers - shards
    if idle <= 0:
        return ""
    line = f"{counted(shards, 'shard')} for {workers} workers: {idle} {'has' if idle == 1 else 'have'} no work"
    size = rows // (_SHARDS_A_WORKER * workers)
    if size < _LEAST_ROWS:
        return line
    size = 1 << size.bit_length() - 1  # a power of two
    return f"{line}; --rows-per-shard {size} makes {-(-rows // size)}"
