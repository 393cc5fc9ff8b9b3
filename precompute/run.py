"""Stage 1 from end to end: plan, score what is missing, write shards, declare the cache complete."""

import contextlib
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kto_core.console import tell
from kto_core.errors import ModelError, printable
from kto_core.identity import json_hash, sequence_id
from kto_core.manifest import fingerprint, identity_of
from kto_core.models import longest_alike
from kto_core.progress import Progress
from kto_core.sequences import TokenIds
from precompute.comparison import choose_sample
from precompute.config import PrecomputeConfig
from precompute.engines import Backend, choose_backend, load_transformers, vllm_engine
from precompute.plan import Plan, PlanCounts, describe, make_plan, shard_rows
from precompute.ranks import RankedScorer, joined, on_own_device, rank, work, world_size
from precompute.reference import Reference
from precompute.remote import Scorer
from precompute.store import Store, check_out, opened_out

# The model with its adapter merged, for an engine that reads it from disk; gone when the run ends.
_MERGED = ".merged"


def precompute(config: PrecomputeConfig) -> None:
    """Run `kto-precompute`, or one rank of it.

    Raises:
        KTOError: the user's input cannot be used.
    """
    if world_size() == 1:
        _precompute(config, None)
        return
    config = on_own_device(config)

    def load(sequences: Sequence[TokenIds]) -> Scorer:
        return load_transformers(Reference.find(config), sequences)

    with joined():
        if rank() > 0:
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
        plan = make_plan(config, reference.tokenizer)
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
    mark = fingerprint(identity_of(sections), sections["pairing"], counts.rows_hash)
    with opened_out(config.out) as (out, on_change):
        identity, vocabulary = identity_of(sections), reference.vocabulary
        store = Store(out, identity, sections["pairing"], vocabulary=vocabulary, on_change=on_change)
        _fill(Scoring(config, reference, plan, store, backend, ranks), counts, sections, mark)


def _print_plan(
    config: PrecomputeConfig, reference: Reference, plan: Plan, counts: PlanCounts, backend: Backend
) -> None:
    adapter = f" with adapter {config.adapter}" if config.adapter else ""
    engine = f"{backend.name} ({backend.why})" if backend.why else backend.name
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    how = f"{reference.precision.name} on {reference.device.type}, scored with {engine}{processes}"
    tell(f"reference   {config.model}{adapter} ({how})")
    for line in describe(plan, counts, config):
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
    scoring.run()
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

    def run(self) -> None:
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
        known = self.store.known_scores(set(wanted))
        if known:
            print(f"known       {len(known):,} of {len(wanted):,} sequences were scored before", flush=True)
        unknown = [sequence for key, sequence in wanted.items() if key not in known]
        total = sum(len(prompt) + len(completion) for prompt, completion in unknown)
        with self._engine(unknown) as scorer, Progress("scoring", total, "tokens") as progress:
            self.reference.check_unchanged()
            for i in missing:
                scores = self._score(self.shards[i], known, scorer, progress)
                # A sequence that another shard needs too is scored once.
                known.update({key: one for key, one in scores.items() if uses[key] > 1})
                self.store.write(i, keys[i], [self._row(j, scores) for j in self.shards[i]])

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

    def _score(
        self, rows: range, known: Mapping[str, np.ndarray], scorer: Scorer | None, progress: Progress
    ) -> dict[str, np.ndarray]:
        wanted = self._sequences(rows)
        scores = {key: known[key] for key in wanted if key in known}
        missing = {key: s for key, s in wanted.items() if key not in scores}
        if missing and scorer is not None:
            started = time.monotonic()
            fresh = scorer.score(list(missing.values()), on_tokens=progress.add)
            self.seconds += time.monotonic() - started
            self.scored += len(missing)
            self.tokens += sum(len(prompt) + len(completion) for prompt, completion in missing.values())
            scores.update(zip(missing, fresh, strict=True))
        return scores

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
