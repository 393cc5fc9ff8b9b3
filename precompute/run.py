"""Stage 1 from end to end: plan, score what is missing, write shards, declare the cache complete."""

import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from kto_core.errors import CacheError, ModelError
from kto_core.identity import json_hash, sequence_id
from kto_core.lock import only_writer
from kto_core.manifest import fingerprint, identity_of
from precompute.config import PrecomputeConfig
from precompute.plan import Plan, PlanCounts, describe, make_plan, shard_rows
from precompute.progress import Progress
from precompute.reference import Reference
from precompute.sources import describe_source
from precompute.store import Store, check_out, make_out
from precompute.transformers_scorer import TransformersScorer


def precompute(config: PrecomputeConfig) -> None:
    """Run `kto-precompute`.

    Raises:
        KTOError: the user's input cannot be used.
    """
    backend = choose_backend(config.backend)
    check_out(config.out)
    reference = Reference.find(config)
    with reference.hash_weights() as hashing:
        plan = make_plan(config, reference.tokenizer)
        counts = plan.counts()
        _print_plan(config, reference, plan, counts, backend)
        _check_vocabulary(plan, reference)
        if config.dry_run:
            print("dry run     nothing was scored")
            return
        sections = {**reference.sections(hashing.result()), "pairing": _pairing(config)}
    mark = fingerprint(identity_of(sections), sections["pairing"], counts.rows_hash)
    store = Store(config.out, identity_of(sections), sections["pairing"])
    make_out(config.out)
    with only_writer(config.out, CacheError):
        _fill(Scoring(config, reference, plan, store), counts, sections, mark)


def _print_plan(config: PrecomputeConfig, reference: Reference, plan: Plan, counts: PlanCounts, backend: str) -> None:
    adapter = f" with adapter {config.adapter}" if config.adapter else ""
    how = f"{reference.precision.name} on {reference.device}, scored with {backend}"
    print(f"reference   {config.model}{adapter} ({how})")
    print("\n".join(describe(plan, counts, config)), flush=True)


def _fill(scoring: "Scoring", counts: PlanCounts, sections: dict[str, Any], mark: str) -> None:
    """Score what `--out` lacks, and declare it complete."""
    config, store, labels_hash = scoring.config, scoring.store, _labels_hash(scoring.plan)
    if not store.open(
        overwrite=config.overwrite,
        mark=mark,
        labels_hash=labels_hash,
        rows_per_shard=config.rows_per_shard,
        row_ids=frozenset(row.row_id for row in scoring.plan.rows),
    ):
        print(f"complete    {config.out} holds these scores already; nothing to do")
        return
    scoring.run()
    data = {**_data(config, counts), "labels_hash": labels_hash}
    run = scoring.summary(counts.sequences)
    store.publish(len(scoring.shards), {**sections, "data": data, "run": run}, mark)
    _report(config, run, len(scoring.shards), mark)


def choose_backend(asked: str) -> str:
    """The engine that scores.

    Raises:
        ModelError: one that this version does not have.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ModelError("kto-precompute runs in one process in this version; start it without torchrun or accelerate.")
    if asked == "vllm":
        raise ModelError("--backend vllm: this version scores with transformers only. Use --backend transformers.")
    return "transformers"


def _check_vocabulary(plan: Plan, reference: Reference) -> None:
    largest = max(int(ids.max()) for row in plan.rows for ids in (row.prompt_ids, row.full_completion_ids))
    if largest >= reference.vocabulary:
        raise ModelError(
            f"{reference.config.model}: its tokenizer gives token id {largest}, but the model's vocabulary has "
            f"{reference.vocabulary} tokens. The tokenizer belongs to another model."
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
    """Scores what a plan lacks, shard by shard."""

    def __init__(self, config: PrecomputeConfig, reference: Reference, plan: Plan, store: Store) -> None:
        self.config, self.reference, self.plan, self.store = config, reference, plan, store
        self.shards = shard_rows(plan, config.rows_per_shard)
        self.scored = self.tokens = 0
        self.seconds = 0.0
        self._scorer: TransformersScorer | None = None

    def run(self) -> None:
        keys = [self._key(rows) for rows in self.shards]
        missing = [i for i, key in enumerate(keys) if not self.store.has(i, key)]
        if len(missing) < len(keys):
            print(f"resuming    {len(keys) - len(missing)} of {len(keys)} shards are there", flush=True)
        uses: Counter[str] = Counter()
        tokens: dict[str, int] = {}
        for i in missing:
            mine = {key: len(s[0]) + len(s[1]) for key, s in self._sequences(self.shards[i]).items()}
            uses.update(mine.keys())
            tokens.update(mine)
        known = self.store.known_scores(set(tokens))
        if known:
            print(f"known       {len(known):,} of {len(tokens):,} sequences were scored before", flush=True)
        total = sum(count for key, count in tokens.items() if key not in known)
        with Progress("scoring", total, "tokens") as progress:
            for i in missing:
                scores = self._score(self.shards[i], known, progress)
                # A sequence that another shard needs too is scored once.
                known.update({key: one for key, one in scores.items() if uses[key] > 1})
                self.store.write(i, keys[i], [self._row(j, scores) for j in self.shards[i]])

    def _key(self, rows: range) -> str:
        """Hash of everything in a shard but the scores."""
        entries = []
        for i in rows:
            row = self.plan.rows[i]
            kl_ids = [sequence_id(row.prompt_ids, y) for y in self.plan.kl_completions(i)]
            entries.append([row.row_id, kl_ids, row.label, row.pair_id, row.source])
        return json_hash(entries)

    def _sequences(self, rows: range) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The distinct sequences of some rows, by id."""
        return {sequence_id(*s): s for i in rows for s in self.plan.sequences(i)}

    def _score(self, rows: range, known: Mapping[str, np.ndarray], progress: Progress) -> dict[str, np.ndarray]:
        wanted = self._sequences(rows)
        scores = {key: known[key] for key in wanted if key in known}
        missing = {key: s for key, s in wanted.items() if key not in scores}
        if missing:
            scorer = self._load_scorer(list(missing.values()))
            started = time.monotonic()
            fresh = scorer.score(list(missing.values()), on_tokens=progress.add)
            self.seconds += time.monotonic() - started
            self.scored += len(missing)
            self.tokens += sum(len(prompt) + len(completion) for prompt, completion in missing.values())
            scores.update(zip(missing, fresh, strict=True))
        return scores

    def _load_scorer(self, sequences: list[tuple[np.ndarray, np.ndarray]]) -> TransformersScorer:
        if self._scorer is None:
            model = self.reference.load()
            self._scorer = TransformersScorer(model, self.reference.precision, max_tokens=self.config.max_tokens)
            self._scorer.self_check(sequences)
        return self._scorer

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


def _data(config: PrecomputeConfig, counts: PlanCounts) -> dict[str, Any]:
    files = [{"name": f.name, "sha256": f.sha256, "bytes": f.bytes} for f in describe_source(config.data)]
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
    print(f"wrote       {config.out} ({shards} shard{'s' if shards > 1 else ''}, fingerprint {mark[:12]})")
    print(f"next        kto-train --cache {shlex.quote(str(config.out))}")
