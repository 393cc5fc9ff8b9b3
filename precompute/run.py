"""Stage 1 from end to end: plan, score what is missing, write shards, declare the cache complete."""

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kto_core.errors import CacheError, ModelError
from kto_core.identity import file_hash, json_hash, sequence_id
from kto_core.manifest import (
    MANIFEST,
    Manifest,
    check_files,
    differences,
    fingerprint,
    identity_of,
    read_manifest,
    write_manifest,
)
from kto_core.shards import check_table, decode_rows, open_shard, read_metadata, shard_name, write_shard
from precompute.config import PrecomputeConfig
from precompute.plan import Plan, PlanCounts, describe, make_plan, shard_rows
from precompute.progress import Progress
from precompute.reference import Reference
from precompute.sources import describe_source
from precompute.transformers_scorer import TransformersScorer

# New shards of a cache that is being updated; the finished cache stays valid until they are complete.
_NEXT = ".next"


def precompute(config: PrecomputeConfig) -> None:
    """Run `kto-precompute`.

    Raises:
        KTOError: the user's input cannot be used.
    """
    backend = _choose_backend(config)
    check_out(config.out)
    reference = Reference.find(config)
    hashing = reference.hash_weights()
    plan = make_plan(config, reference.tokenizer)
    counts = plan.counts()
    print(f"reference   {config.model} ({reference.precision.name} on {reference.device}, {backend})")
    print("\n".join(describe(plan, counts, config)))
    _check_vocabulary(plan, reference)
    if config.dry_run:
        print("dry run: nothing was scored.")
        return
    sections = reference.sections(hashing.result())
    sections["pairing"] = {
        "method": config.pairing,
        "seed": config.seed if config.pairing == "shuffled" else None,
        "block": config.pairing_block if config.pairing == "rotate" else None,
        "partners": config.kl_partners,
    }
    Scoring(config, reference, plan, counts, sections).run()


def _choose_backend(config: PrecomputeConfig) -> str:
    if config.backend == "vllm":
        raise ModelError("--backend vllm: this version scores with transformers only. Use --backend transformers.")
    return "transformers"


def _check_vocabulary(plan: Plan, reference: Reference) -> None:
    largest = max(int(ids.max()) for row in plan.rows for ids in (row.prompt_ids, row.full_completion_ids))
    if largest >= reference.vocabulary:
        raise ModelError(
            f"{reference.config.model}: its tokenizer gives token id {largest}, but the model's vocabulary has "
            f"{reference.vocabulary} tokens. The tokenizer belongs to another model."
        )


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else, before any work is done.

    Raises:
        CacheError: not a folder, not writable, or holds files that are not a reference cache.
    """
    if out.exists() and not out.is_dir():
        raise CacheError(f"--out {out}: a file of that name exists; choose another folder.")
    try:
        (out / "train").mkdir(parents=True, exist_ok=True)
        probe = out / "train" / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CacheError(f"--out {out}: cannot be written: {error}.") from error
    if (out / MANIFEST).exists():
        return
    foreign = [path.name for path in _shards(out) if read_metadata(path) is None]
    foreign += [
        path.name for path in out.iterdir() if path.name not in ("train", _NEXT) and not path.name.startswith(".")
    ]
    if foreign:
        raise CacheError(
            f"--out {out}: the folder holds {foreign[0]}, which is no part of a reference cache. Choose an empty folder."
        )


def _shards(folder: Path) -> list[Path]:
    return sorted((folder / "train").glob("[!.]*.parquet"))


@dataclass
class Scoring:
    """One run over one plan: which shards are there, which scores can be reused, what is left."""

    config: PrecomputeConfig
    reference: Reference
    plan: Plan
    counts: PlanCounts
    sections: dict[str, Any]
    known: dict[str, np.ndarray] = field(default_factory=dict)  # sequence id -> token log-probs
    scored: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def run(self) -> None:
        out = self.config.out
        self.identity = identity_of(self.sections)
        mark = fingerprint(self.identity, self.sections["pairing"], self.counts.rows_hash)
        ranges = shard_rows(self.plan, self.config.rows_per_shard)
        keys = [self._shard_key(rows) for rows in ranges]
        updating = self._prepare(mark)
        if updating is None:
            print(f"{out}: complete, nothing to score.")
            return
        target = out / _NEXT if updating else out
        (target / "train").mkdir(parents=True, exist_ok=True)
        places = [self._finished(key, i, target) for i, key in enumerate(keys)]
        todo = [i for i, place in enumerate(places) if place is None]
        if len(todo) < len(ranges):
            print(f"resuming    {len(ranges) - len(todo)} of {len(ranges)} shards are there")
        self._load_known([rows for i, rows in enumerate(ranges) if i in set(todo)])
        self._score([(ranges[i], keys[i], target / shard_name(i)) for i in todo])
        self._finish(len(ranges), target, mark)

    def _shard_key(self, rows: range) -> str:
        """Hash of everything in a shard but the scores."""
        entries = []
        for i in rows:
            row = self.plan.rows[i]
            kl_ids = [sequence_id(row.prompt_ids, y) for y in self.plan.kl_completions(i)]
            entries.append([row.row_id, kl_ids, row.label, row.pair_id, row.source])
        return json_hash(entries)

    def _prepare(self, mark: str) -> bool | None:
        """What to do with what is in `--out`: None for nothing, True for an update next to a finished cache."""
        out = self.config.out
        if self.config.overwrite:
            (out / MANIFEST).unlink(missing_ok=True)
            for path in _shards(out):
                path.unlink()
            shutil.rmtree(out / _NEXT, ignore_errors=True)
            return False
        if (out / MANIFEST).exists():
            return self._prepare_update(read_manifest(out), mark)
        for path in _shards(out):
            self._refuse_other((read_metadata(path) or {}).get("identity", {}))
        return False

    def _prepare_update(self, old: Manifest, mark: str) -> bool | None:
        self._refuse_other(old.identity, old.pairing)
        try:
            check_files(self.config.out, old)
        except CacheError as error:
            # The damaged shard is scored again; the others are kept.
            print(f"damaged     {error}")
            (self.config.out / MANIFEST).unlink()
            self._drop_damaged(old)
            return False
        same_files = old.data.get("labels_hash") == self._labels_hash()
        same_shards = max(int(shard["rows"]) for shard in old.shards) <= self.config.rows_per_shard
        return None if old.fingerprint == mark and same_files and same_shards else True

    def _drop_damaged(self, old: Manifest) -> None:
        for shard in old.shards:
            path = self.config.out / shard["file"]
            if path.exists() and file_hash(path) != shard["sha256"]:
                path.unlink()

    def _refuse_other(self, identity: Mapping[str, Any], pairing: Mapping[str, Any] | None = None) -> None:
        lines = differences(identity, self.identity)
        if pairing is not None:
            # More partners are an extension: the pairs that are there stay.
            wanted = self.sections["pairing"]
            lines += differences(
                {f"pairing.{k}": v for k, v in pairing.items() if k != "partners"},
                {f"pairing.{k}": v for k, v in wanted.items() if k != "partners"},
            )
        if lines:
            raise CacheError(
                f"--out {self.config.out}: holds a cache of another reference:\n  "
                + "\n  ".join(lines)
                + "\nChoose another --out, or replace it with --overwrite."
            )

    def _labels_hash(self) -> str:
        """What the fingerprint leaves out on purpose: order, labels, pairs, source rows."""
        return json_hash([[row.row_id, row.label, row.pair_id, row.source] for row in self.plan.rows])

    def _finished(self, key: str, index: int, target: Path) -> Path | None:
        """A complete shard with this content, in the target or (after a crash while moving) in place."""
        for folder in dict.fromkeys((target, self.config.out)):
            path = folder / shard_name(index)
            metadata = read_metadata(path) if path.exists() else None
            if not metadata or metadata.get("key") != key or metadata.get("identity") != self.identity:
                continue
            try:
                check_table(pq.read_table(path, page_checksum_verification=True), path.name)
            except (CacheError, OSError, pa.ArrowException):
                continue
            if folder != target:
                continue_from = target / shard_name(index)
                shutil.copyfile(path, continue_from)
                return continue_from
            return path
        return None

    def _load_known(self, missing: Iterable[range]) -> None:
        """Collect scores that older shards hold for the sequences still missing."""
        wanted = {sequence_id(*s) for rows in missing for i in rows for s in self.plan.sequences(i)}
        for folder in (self.config.out, self.config.out / _NEXT):
            for path in _shards(folder):
                if wanted - self.known.keys():
                    self._collect(path, wanted)

    def _collect(self, path: Path, wanted: set[str]) -> None:
        if (read_metadata(path) or {}).get("identity") != self.identity:
            return
        file = open_shard(path)
        for group in range(file.num_row_groups):
            for row in decode_rows(file.read_row_group(group)):
                pairs = [(row["completion_ids"], row["ref_token_logps"])]
                pairs += list(zip(row["kl_completion_ids"], row["ref_kl_token_logps"], strict=True))
                for ids, scores in pairs:
                    key = sequence_id(row["prompt_ids"], ids)
                    if key in wanted:
                        self.known[key] = scores

    def _score(self, shards: list[tuple[range, str, Path]]) -> None:
        repeated, total = self._survey(shards)
        scorer = None
        with Progress("scoring", total, "tokens") as progress:
            for rows, key, path in shards:
                missing = {}
                for i in rows:
                    for s in self.plan.sequences(i):
                        missing[sequence_id(*s)] = s
                scores = {k: self.known[k] for k in missing if k in self.known}
                missing = {k: s for k, s in missing.items() if k not in scores}
                if missing:
                    if scorer is None:
                        scorer = self._load_scorer(list(missing.values()))
                    started = time.monotonic()
                    fresh = scorer.score(list(missing.values()), on_tokens=progress.add)
                    self.seconds += time.monotonic() - started
                    scores.update(zip(missing, fresh, strict=True))
                    self.scored += len(missing)
                    self.tokens += sum(len(p) + len(c) for p, c in missing.values())
                    self.known.update({k: scores[k] for k in missing if k in repeated})
                metadata = {"format": 1, "key": key, "identity": self.identity}
                write_shard(path, [self._cached_row(i, scores) for i in rows], metadata)

    def _survey(self, shards: list[tuple[range, str, Path]]) -> tuple[set[str], int]:
        """Sequences that several shards need (scored once, then kept), and the tokens to score."""
        uses: Counter[str] = Counter()
        tokens: dict[str, int] = {}
        for rows, _, _ in shards:
            mine = {sequence_id(*s): len(s[0]) + len(s[1]) for i in rows for s in self.plan.sequences(i)}
            uses.update(mine)
            tokens.update(mine)
        total = sum(n for k, n in tokens.items() if k not in self.known)
        return {k for k, n in uses.items() if n > 1}, total

    def _load_scorer(self, sequences: list[tuple[np.ndarray, np.ndarray]]) -> TransformersScorer:
        scorer = TransformersScorer(self.reference.load(), self.reference.precision, max_tokens=self.config.max_tokens)
        scorer.self_check(sequences)
        return scorer

    def _cached_row(self, index: int, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
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

    def _finish(self, count: int, target: Path, mark: str) -> None:
        out = self.config.out
        if target != out:
            # From here until the manifest is written there is no cache; a crash in between loses no shard.
            (out / MANIFEST).unlink(missing_ok=True)
            for i in range(count):
                (target / shard_name(i)).replace(out / shard_name(i))
        names = [shard_name(i) for i in range(count)]
        for path in _shards(out):
            if f"train/{path.name}" not in names:
                path.unlink()
        for leftover in (out / "train").glob(".*.tmp"):
            leftover.unlink()
        shutil.rmtree(out / _NEXT, ignore_errors=True)
        shards = [self._entry(out, name) for name in names]
        write_manifest(out, {**self.sections, "data": self._data(), "run": self._run()}, shards, mark)
        speed = f"{self.tokens / self.seconds:,.0f} tokens/s" if self.scored else "nothing to score"
        reused = self.counts.sequences - self.scored
        print(
            f"scored      {self.scored:,} sequences, {reused:,} reused, {self.tokens:,} tokens, {self.seconds:,.1f} s, {speed}"
        )
        print(f"wrote       {out} ({count} shard{'s' if count > 1 else ''}, fingerprint {mark[:12]})")
        print(f"next        kto-train --cache {out}")

    def _entry(self, out: Path, name: str) -> dict[str, Any]:
        path = out / name
        return {
            "file": name,
            "rows": open_shard(path).metadata.num_rows,
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }

    def _data(self) -> dict[str, Any]:
        counts = self.counts
        files = [{"name": f.name, "sha256": f.sha256, "bytes": f.bytes} for f in describe_source(self.config.data)]
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
            "labels_hash": self._labels_hash(),
        }

    def _run(self) -> dict[str, Any]:
        return {
            "scored_sequences": self.scored,
            "reused_sequences": self.counts.sequences - self.scored,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
        }
