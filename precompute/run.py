"""Stage 1 from end to end: plan, score what is missing, write shards, declare the cache complete."""

import contextlib
import shlex
import shutil
import time
from collections import ChainMap, Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kto_core.console import tell
from kto_core.errors import CacheError, ModelError, printable
from kto_core.identity import json_hash, sequence_id
from kto_core.launch import settle_launch, world_size
from kto_core.manifest import fingerprint, identity_of
from kto_core.models import longest_alike
from kto_core.progress import Progress
from kto_core.sequences import TokenIds
from precompute.comparison import DisagreementError, choose_sample
from precompute.config import PrecomputeConfig
from precompute.engines import Backend, choose_backend, load_transformers, vllm_engine
from precompute.parts import Pace, ShardScores
from precompute.plan import Plan, PlanCounts, describe, make_plan, shard_rows
from precompute.ranks import RankedScorer, joined, on_own_device, work
from precompute.reference import Reference
from precompute.remote import Scorer
from precompute.store import KnownScores, Store, check_out, opened_out, rendered_on

# The model with its adapter merged, for an engine that reads it from disk; gone when the run ends.
_MERGED = ".merged"


def precompute(config: PrecomputeConfig) -> None:
    """Run `kto-precompute`, or one rank of it.

    Raises:
        KTOError: the user's input cannot be used.
    """
    launch = settle_launch()
    if launch.world_size == 1:
        _precompute(config, None)
        return
    config = on_own_device(config)

    def load(sequences: Sequence[TokenIds]) -> Scorer:
        return load_transformers(Reference.find(config), sequences)

    with joined():
        if not launch.is_first:
            work(load)
            return
        ranks = RankedScorer(load)
        _precompute(config, ranks)
        ranks.dismiss()


def _precompute(config: PrecomputeConfig, ranks: RankedScorer | None) -> None:
    backend = choose_backend(config)
    check_out(config.out)
    reference = Reference.find(config)
    with reference.hash_weights() as hashing:
        plan = make_plan(config, reference.tokenizer, config.template_day or rendered_on(config.out))
        counts = plan.counts()
        _print_plan(config, reference, plan, counts, backend)
        _check_vocabulary(plan, reference)
        _check_lengths(plan, reference)
        if config.dry_run:
            print("dry run     nothing was scored")
            return
        sections = {
            **reference.sections(hashing.result(), backend=backend.name, engine_versions=backend.versions()),
            "pairing": _pairing(config),
        }
        if plan.rendered_on:
            sections["tokenization"]["rendered_on"] = plan.rendered_on
    mark = fingerprint(identity_of(sections), sections["pairing"], counts.rows_hash)
    with opened_out(config.out) as (out, on_change):
        identity, vocabulary = identity_of(sections), reference.vocabulary
        store = Store(
            out,
            identity,
            sections["pairing"],
            vocabulary=vocabulary,
            rendered_on=plan.rendered_on,
            on_change=on_change,
        )
        _fill(Scoring(config, reference, plan, store, backend, ranks), counts, sections, mark)


def _print_plan(
    config: PrecomputeConfig, reference: Reference, plan: Plan, counts: PlanCounts, backend: Backend
) -> None:
    adapter = f" with adapter {config.adapter}" if config.adapter else ""
    engine = f"{backend.name} ({backend.why})" if backend.why else backend.name
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    how = f"{reference.precision.name} on {reference.device.type}, scored with {engine}{processes}"
    tell(f"reference   {config.model}{adapter} ({how})")
    for line in [*(f"warning     {one}" for one in reference.warnings), *describe(plan, counts, config)]:
        tell(line)


def _fill(scoring: "Scoring", counts: PlanCounts, sections: dict[str, Any], mark: str) -> None:
    """Score what `--out` lacks, and declare it complete."""
    shutil.rmtree(scoring.store.out / _MERGED, ignore_errors=True)  # a killed run leaves it
    config, store, labels_hash = scoring.config, scoring.store, _labels_hash(scoring.plan)
    if not store.open(
        overwrite=config.overwrite,
        mark=mark,
        labels_hash=labels_hash,
        rows_per_shard=config.rows_per_shard,
        row_ids=frozenset(row.row_id for row in scoring.plan.rows),
    ):
        tell(f"complete    {config.out} holds these scores already; nothing to do")
        return
    scoring.run(counts.sequences)
    data = {**_data(scoring.plan, counts), "labels_hash": labels_hash}
    sections = {**sections, "scorer": {**sections["scorer"], **scoring.found}}
    run = scoring.summary(counts.sequences)
    store.publish(len(scoring.shards), {**sections, "data": data, "run": run}, mark)
    _report(config, run, len(scoring.shards), mark)


def _check_vocabulary(plan: Plan, reference: Reference) -> None:
    largest = max(int(ids.max()) for row in plan.rows for ids in (row.prompt_ids, row.full_completion_ids))
    if largest >= reference.vocabulary:
        raise ModelError(
            f"{reference.config.model}: its tokenizer gives token id {largest}, but the model's vocabulary has "
            f"{reference.vocabulary} tokens. The tokenizer belongs to another model."
        )


def _check_lengths(plan: Plan, reference: Reference) -> None:
    limit = longest_alike(reference.shape.config)
    if limit is None or reference.config.max_length <= limit:
        return
    longest = max(len(prompt) + len(y) for i in range(len(plan.rows)) for prompt, y in plan.sequences(i))
    if longest > limit:
        raise ModelError(
            f"{reference.config.model}: the longest sequence has {longest} tokens, and beyond {limit} this model computes a "
            "row in another way when another one stands beside it, so that a score would depend on its neighbours. Use "
            f"--max-length {limit}."
        )


def _pairing(config: PrecomputeConfig) -> dict[str, Any]:
    shuffled = config.pairing == "shuffled"
    return {
        "method": config.pairing,
        "seed": config.seed if shuffled else None,
        "block": None if shuffled else config.pairing_block,
        "partners": config.kl_partners,
    }


def _labels_hash(plan: Plan) -> str:
    """What the fingerprint leaves out on purpose: order, labels, pairs, source rows."""
    return json_hash([[row.row_id, row.label, row.pair_id, row.source] for row in plan.rows])


class Scoring:
    """Scores what a plan lacks, shard by shard.

    Args:
        ranks: the processes of this launch, where there are several.

    Attributes:
        found: how the engine compares with Transformers, for the manifest; empty where Transformers scored.
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
        self.found: dict[str, Any] = {}
        self.underway: ShardScores | None = None

    def run(self, sequences: int) -> None:
        """Score and write what is missing.

        Args:
            sequences: how many the whole plan has, for messages.
        """
        keys = [self._key(rows) for rows in self.shards]
        missing = [i for i, key in enumerate(keys) if not self.store.has(i, key, len(self.shards[i]))]
        if len(missing) < len(keys):
            print(f"resuming    {len(keys) - len(missing)} of {len(keys)} shards are there", flush=True)
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
            print(f"known       {len(there):,} of {len(wanted):,} sequences were scored before", flush=True)
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
                # A sequence that another shard needs too is scored once.
                known.update({one: score for one, score in fresh.items() if uses[one] > 1})
                left.remove(i)
                for one in to_score:
                    unknown.pop(one, None)
                pace.restart()

    @contextlib.contextmanager
    def _saying_what_is_kept(
        self, left: Sequence[int], known: KnownScores, unknown: Collection[str], sequences: int
    ) -> Iterator[None]:
        """Whatever ends the scoring early, write down what is scored, and say how much that is.

        Args:
            left: shards that are not written; the first of them is under way.
            known: scores that need no forward pass.
            unknown: ids of the sequences that do.
            sequences: how many the whole plan has.
        """
        try:
            yield
        except BaseException as error:  # what the user can mend, what she cannot, Ctrl-C, a scheduler's signal
            kept = self._keep(error, left[0]) if self.underway is not None and left else set()
            there = known.ids | kept
            rows = sum(map(len, self.shards)) - sum(len(self.shards[i]) for i in left)
            rows += sum(there.issuperset(self._sequences(range(j, j + 1))) for i in left[:1] for j in self.shards[i])
            scores = sequences - sum(one not in kept for one in unknown)
            if scores:
                print(
                    f"kept        {rows:,} of {len(self.plan.rows):,} rows ({scores:,} of {sequences:,} scores)",
                    flush=True,
                )
            raise

    def _keep(self, error: BaseException, index: int) -> set[str]:
        """The scores of the shard under way that are on the disk when the run ends."""
        assert self.underway is not None
        if isinstance(error, DisagreementError):
            self.store.drop_parts(self._key(self.shards[index]))
            return set()
        with contextlib.suppress(CacheError):  # a full disk may be what ends the run; that is said
            self.underway.flush()
        return self.underway.kept

    @contextlib.contextmanager
    def _engine(self, sequences: Sequence[TokenIds]) -> Iterator[Scorer | None]:
        """The engine, ready to score these sequences; None where there are none."""
        if not sequences:
            yield None
        elif self.ranks is not None:
            yield self.ranks
        elif self.backend.name == "transformers":
            yield load_transformers(self.reference, sequences)
        else:
            merged = self.store.out / _MERGED
            try:
                with vllm_engine(self.reference, choose_sample(sequences), merged) as scorer:
                    yield scorer
                    self.found = {"difference": scorer.difference()}
            finally:
                shutil.rmtree(merged, ignore_errors=True)

    def _key(self, rows: range) -> str:
        """Hash of everything in a shard but the scores."""
        entries = []
        for i in rows:
            row = self.plan.rows[i]
            kl_ids = [sequence_id(row.prompt_ids, y) for y in self.plan.kl_completions(i)]
            entries.append([row.row_id, kl_ids, row.label, row.pair_id, row.source])
        return json_hash(entries)

    def _sequences(self, rows: range) -> dict[str, TokenIds]:
        """The distinct sequences of some rows, by id."""
        return {sequence_id(*s): s for i in rows for s in self.plan.sequences(i)}

    def _score(self, sequences: Mapping[str, TokenIds], scorer: Scorer | None, progress: Progress) -> None:
        """Score what the shard under way lacks."""
        assert self.underway is not None
        before = self.underway.known
        if scorer is None or len(before) == len(sequences):
            return
        started = time.monotonic()
        scorer.score(list(sequences.values()), known=before, on_scores=self.underway.add, on_tokens=progress.add)
        self.seconds += time.monotonic() - started
        fresh = [sequence for i, sequence in enumerate(sequences.values()) if i not in before]
        self.scored += len(fresh)
        self.tokens += sum(len(prompt) + len(completion) for prompt, completion in fresh)

    def _row(self, index: int, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """One row of the cache, with the columns of `kto_core.shards.SCHEMA`."""
        row = self.plan.rows[index]
        kl_completions = self.plan.kl_completions(index)
        own = scores[row.row_id]
        kl_scores = [scores[sequence_id(row.prompt_ids, y)] for y in kl_completions]
        return {
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
        }

    def summary(self, sequences: int) -> dict[str, Any]:
        """The manifest's section `run`."""
        return {
            "scored_sequences": self.scored,
            "reused_sequences": sequences - self.scored,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
        }


def _data(plan: Plan, counts: PlanCounts) -> dict[str, Any]:
    files = [{"name": printable(f.name), "sha256": f.sha256, "bytes": f.bytes} for f in plan.files]
    return {
        "files": files,
        "read": counts.read,
        "kept": counts.kept,
        "dropped": counts.dropped,
        "desirable": counts.desirable,
        "undesirable": counts.undesirable,
        "truncated": counts.truncated,
        "kl_truncated": counts.kl_truncated,
        "prompts": counts.prompts,
        "rows_hash": counts.rows_hash,
    }


def _report(config: PrecomputeConfig, run: Mapping[str, Any], shards: int, mark: str) -> None:
    print(
        f"scored      {run['scored_sequences']:,} sequences ({run['reused_sequences']:,} reused), {run['tokens']:,} tokens "
        f"in {run['seconds']:,.1f} s"
    )
    tell(f"wrote       {config.out} ({shards} shard{'s' if shards > 1 else ''}, fingerprint {mark[:12]})")
    tell(f"next        kto-train --cache {shlex.quote(str(config.out))}")
