"""Score the sequences of a plan that have no score yet, shard by shard."""

import contextlib
import shutil
import time
from collections import ChainMap, Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from offline_kto.kto_core.cache.manifest_fields import RunFields, ScoreDifference
from offline_kto.kto_core.cache.shards import CacheRow
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import json_hash, sequence_id
from offline_kto.kto_core.judgements import OBJECTIVES
from offline_kto.kto_core.progress import Progress
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import Backend, load_transformers, vllm_engine
from offline_kto.precompute.engines.comparison import DisagreementError, choose_sample
from offline_kto.precompute.engines.protocol import Listener, Scorer
from offline_kto.precompute.engines.ranks import RankedScorer
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.parts import Pace, ShardScores
from offline_kto.precompute.plan import Plan, shard_rows
from offline_kto.precompute.store import KnownScores, Store

# Folder of the model with its adapter merged, for an engine that reads it from disk; removed when the run ends.
MERGED = ".merged"


class Scoring:
    """Scores the sequences of a plan that have no score yet, shard by shard.

    Args:
        ranks: the processes of this launch, if there are several.

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
        ranks: RankedScorer | None,
    ) -> None:
        self.config, self.reference, self.plan, self.store = config, reference, plan, store
        self.backend, self.ranks = backend, ranks
        self.shards = shard_rows(plan, config.rows_per_shard)
        self.scored = self.tokens = 0
        self.seconds = 0.0
        self.difference: ScoreDifference | None = None
        self.underway: ShardScores | None = None

    def run(self, sequences: int) -> None:
        """Score missing sequences and write missing shards.

        Args:
            sequences: number of sequences in the whole plan, for messages.
        """
        keys = [self._key(rows) for rows in self.shards]
        missing = [i for i, key in enumerate(keys) if not self.store.has(i, key, len(self.shards[i]))]
        if len(missing) < len(keys):
            tell(f"resuming    {len(keys) - len(missing)} of {len(keys)} shards are complete")
        self.store.set_aside(missing)
        uses: Counter[str] = Counter()
        wanted: dict[str, TokenIds] = {}
        for i in missing:
            mine = self._sequences(self.shards[i])
            uses.update(mine.keys())
            wanted.update(mine)
        found = self.store.known_scores(set(wanted), {keys[i] for i in missing})
        known, there = found.scores, found.ids
        if there:
            tell(f"known       {len(there):,} of {len(wanted):,} sequences are already scored")
        unknown = {one: sequence for one, sequence in wanted.items() if one not in there}
        total = sum(len(prompt) + len(completion) for prompt, completion in unknown.values())
        left, pace = list(missing), Pace()
        with (
            self._saying_what_is_kept(left, found, unknown, sequences),
            self._engine(list(unknown.values())) as scorer,
            Progress("scoring", total, "tokens") as progress,
        ):
            self.reference.check_unchanged()
            for i in missing:
                to_score = {one: s for one, s in self._sequences(self.shards[i]).items() if one not in known}
                write = partial(self.store.write_part, keys[i])
                self.underway = ShardScores(to_score, found.parts[keys[i]], write, pace)
                self._score(to_score, scorer, progress)
                fresh = self.underway.scores
                self.store.write(i, keys[i], [self._row(j, ChainMap(fresh, known)) for j in self.shards[i]])
                # A sequence that another shard also needs is scored only once.
                known.update({one: score for one, score in fresh.items() if uses[one] > 1})
                left.remove(i)
                for one in to_score:
                    unknown.pop(one, None)
                pace.restart()

    @contextlib.contextmanager
    def _saying_what_is_kept(
        self, left: Sequence[int], known: KnownScores, unknown: Collection[str], sequences: int
    ) -> Iterator[None]:
        """Write the scores so far, and log their number, if the block ends with an exception.

        Args:
            left: shards that are not written; the first of them is in progress.
            known: scores that need no forward pass.
            unknown: ids of the sequences that do.
            sequences: number of sequences in the whole plan.
        """
        try:
            yield
        except BaseException as error:  # any error, Ctrl-C, or a scheduler's signal
            kept = self._keep(error, left[0]) if self.underway is not None and left else set()
            there = known.ids | kept
            rows = sum(map(len, self.shards)) - sum(len(self.shards[i]) for i in left)
            rows += sum(there.issuperset(self._sequences(range(j, j + 1))) for i in left[:1] for j in self.shards[i])
            scores = sequences - sum(one not in kept for one in unknown)
            if scores:
                tell(f"kept        {rows:,} of {len(self.plan.rows):,} rows ({scores:,} of {sequences:,} scores)")
            raise

    def _keep(self, error: BaseException, index: int) -> set[str]:
        """Write the scores of the shard in progress, and return the ids of those that are on disk."""
        assert self.underway is not None
        if isinstance(error, DisagreementError):
            self.store.drop_parts(self._key(self.shards[index]))
            return set()
        with contextlib.suppress(CacheError):  # a full disk may be the error that ends the run, which is reported
            self.underway.flush()
        return self.underway.kept

    @contextlib.contextmanager
    def _engine(self, sequences: Sequence[TokenIds]) -> Iterator[Scorer | None]:
        """Yield the engine, ready to score these sequences; None if there are none."""
        if not sequences:
            yield None
        elif self.ranks is not None:
            yield self.ranks
        elif self.backend.name == "transformers":
            yield load_transformers(self.reference, sequences)
        else:
            merged = self.store.out / MERGED
            try:
                tokens = sum(len(prompt) + len(completion) for prompt, completion in sequences)
                with vllm_engine(self.reference, choose_sample(sequences), merged, tokens=tokens) as scorer:
                    yield scorer
                    self.difference = scorer.difference()
            finally:
                shutil.rmtree(merged, ignore_errors=True)

    def _key(self, rows: range) -> str:
        """Return a hash of everything in a shard except the scores."""
        entries = []
        for i, labels in zip(rows, self.plan.labels(rows), strict=True):
            row = self.plan.rows[i]
            kl_ids = [sequence_id(row.prompt_ids, y) for y in self.plan.kl_completions(i)]
            entries.append([row.row_id, kl_ids, *labels, row.place])
        return json_hash(entries)

    def _sequences(self, rows: range) -> dict[str, TokenIds]:
        """Return the distinct sequences of some rows, by id."""
        return {sequence_id(*s): s for i in rows for s in self.plan.sequences(i)}

    def _score(self, sequences: Mapping[str, TokenIds], scorer: Scorer | None, progress: Progress) -> None:
        """Score the missing sequences of the shard in progress."""
        assert self.underway is not None
        before = self.underway.known
        if scorer is None or len(before) == len(sequences):
            return
        started = time.monotonic()
        scorer.score(list(sequences.values()), Listener(self.underway.add, progress.add), known=before)
        self.seconds += time.monotonic() - started
        fresh = [sequence for i, sequence in enumerate(sequences.values()) if i not in before]
        self.scored += len(fresh)
        self.tokens += sum(len(prompt) + len(completion) for prompt, completion in fresh)

    def _row(self, index: int, scores: Mapping[str, np.ndarray]) -> CacheRow:
        """Return one row of the cache, as `offline_kto.kto_core.cache.shards` declares it."""
        row = self.plan.rows[index]
        kl_completions = self.plan.kl_completions(index)
        own = scores[row.row_id]
        kl_scores = [scores[sequence_id(row.prompt_ids, y)] for y in kl_completions]
        found: CacheRow = {
            "row_id": row.row_id,
            "prompt_id": row.prompt_id,
            "pair_id": row.pair_id,
            "source": row.source,
            "prompt_ids": row.prompt_ids,
            "completion_ids": row.completion_ids,
            "label": row.label,
            "ref_logps": float(own.sum(dtype=np.float64)),
            "ref_token_logps": own,
            "kl_completion_ids": kl_completions,
            "ref_kl_logps": [float(one.sum(dtype=np.float64)) for one in kl_scores],
            "ref_kl_token_logps": kl_scores,
            "place": row.place,
        }
        if self.plan.mass_columns:
            found["desirable_mass"], found["undesirable_mass"] = row.judgement.masses
        if OBJECTIVES in self.plan.mass_columns:
            found["objectives"] = {
                name: {"desirable": good, "undesirable": bad} for name, (good, bad) in row.judgement.objectives.items()
            }
        return found

    def summary(self, sequences: int) -> RunFields:
        """Return the manifest's section `run`."""
        return {
            "scored_sequences": self.scored,
            "reused_sequences": sequences - self.scored,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
        }
