"""Make a cache from a plan: score missing sequences, write shards, and write the manifest."""

import shlex
import shutil

from offline_kto.kto_core.cache.manifest import fingerprint, identity_of
from offline_kto.kto_core.cache.manifest_fields import (
    DataFields,
    JudgementFields,
    OptionalEntries,
    PairingFields,
    RunFields,
    ScorerFields,
    ScoringSections,
)
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ConfigError, ModelError, printable
from offline_kto.kto_core.feedback.labels import UNANIMOUS
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.judgements import OBJECTIVES
from offline_kto.kto_core.models.loading import longest_alike
from offline_kto.kto_core.options import AUTO
from offline_kto.kto_core.runtime import importing
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import Backend, choose_backend
from offline_kto.precompute.engines.reference import Reference, ReferenceFiles
from offline_kto.precompute.estimates import estimates
from offline_kto.precompute.local_workers import worker_gpus
from offline_kto.precompute.out_folder import MERGED, keeps_text, opened_out, rendered_on
from offline_kto.precompute.plan import Plan, PlanCounts, make_plan
from offline_kto.precompute.plan_page import describe, wrapped
from offline_kto.precompute.ray_workers import check_cluster
from offline_kto.precompute.scoring import Scoring
from offline_kto.precompute.store import Store


def make_cache(config: PrecomputeConfig, *, in_own_process: bool = False) -> None:
    """Make a reference cache.

    Args:
        in_own_process: see `importing`.

    Raises:
        KTOError: the user's input cannot be used.
    """
    backend = choose_backend(config)
    files = ReferenceFiles.find(config)
    _check_cluster(files)
    _print_reference(files, backend)
    with importing(in_own_process=in_own_process):  # the libraries of models, which takes seconds
        reference = Reference.open(files)
    gpus: list[list[int] | None] = [None]
    if config.cluster is None:
        gpus = worker_gpus(config, reference, backend)
    if backend.name == "transformers":
        tell(f"attention   {reference.attention.in_words}")
    with reference.hash_weights() as hashing:
        day = config.template_day or rendered_on(config.out)
        plan = make_plan(config, reference.tokenizer, day, folder=reference.folder)
        counts = plan.counts()
        for line in [
            *(line for one in reference.warnings for line in wrapped("warning", one)),
            *describe(
                plan, counts, config, reference.tokenizer, estimates(plan, counts, reference, backend=backend.name)
            ),
        ]:
            tell(line)
        _check_vocabulary(plan, reference)
        _check_lengths(plan, reference)
        if config.dry_run:
            tell("dry run     nothing was scored")
            return
        sections = reference.sections(hashing.result(), backend=backend.name, engine_versions=backend.versions())
        if plan.rendered_on:
            sections["tokenization"]["rendered_on"] = plan.rendered_on
        # Rows that are conversations are the same under either choice, so that a cache made without goes on.
        if plan.feedback.chat and (plan.feedback.found.from_text or not keeps_text(config.out)):
            sections["tokenization"]["chat"] = True
    identity, pairing = identity_of(sections), _pairing(config)
    mark = fingerprint(identity, pairing, counts.rows_hash)
    with opened_out(config.out) as (out, on_change):
        store = Store(
            out,
            identity,
            pairing,
            vocabulary=reference.vocabulary,
            rendered_on=plan.rendered_on,
            on_change=on_change,
        )
        _fill(config, reference, plan, counts, gpus, store=store, backend=backend, sections=sections, mark=mark)


def _check_cluster(files: ReferenceFiles) -> None:
    """Refuse to let a machine without a GPU choose for workers that have one, and a cluster that cannot be reached."""
    config = files.config
    if config.cluster is None:
        return
    chooses = files.device.type == "cpu" and config.device != "cpu"
    if chooses and AUTO in (config.dtype, config.backend):
        raise ConfigError(
            f"--cluster {config.cluster}: this machine has no GPU, so auto would choose --dtype float32 and --backend transformers for "
            "workers that have one. Name both, like --dtype bfloat16 --backend transformers, or add --device cpu."
        )
    check_cluster(config.cluster)


def _print_reference(files: ReferenceFiles, backend: Backend) -> None:
    config = files.config
    adapter = f" with adapter {config.adapter}" if config.adapter else ""
    engine = f"{backend.name} ({backend.why})" if backend.why else backend.name
    how = f"{files.precision.name} on {files.device.type}, scored with {engine}"
    tell(f"reference   {config.model}{adapter} ({how})")


def _fill(
    config: PrecomputeConfig,
    reference: Reference,
    plan: Plan,
    counts: PlanCounts,
    gpus: list[list[int] | None],
    *,
    store: Store,
    backend: Backend,
    sections: ScoringSections,
    mark: str,
) -> None:
    """Score what `--out` lacks, and write its manifest.

    Args:
        gpus: of each worker.
    """
    shutil.rmtree(store.out / MERGED, ignore_errors=True)  # a killed run leaves it behind
    labels_hash, places_hash = plan.labels_and_places_hash()
    if not store.open(
        overwrite=config.overwrite,
        mark=mark,
        labels_hash=labels_hash,
        places_hash=places_hash,
        rows_per_shard=config.rows_per_shard,
        row_ids=plan.sequence_ids[:, 0],
    ):
        tell(f"complete    {config.out} already contains these scores; nothing to do")
        return
    scoring = Scoring(config, reference, plan, store, backend, sections)
    if config.plan_only:
        _report_plan(config, scoring.plan_only())
        return
    scoring.run(counts.sequences, gpus)
    scorer: ScorerFields = {**sections["scorer"]}
    if scoring.difference is not None:
        scorer["difference"] = scoring.difference
    run = scoring.summary(counts.sequences)
    store.publish(
        len(scoring.shards),
        {
            **sections,
            "scorer": scorer,
            "pairing": store.pairing,
            "data": _data(plan, counts, labels_hash, places_hash),
            "run": run,
        },
        mark,
        optional=_judgements(plan),
    )
    _report(config, run, len(scoring.shards), mark)


def _check_vocabulary(plan: Plan, reference: Reference) -> None:
    largest = plan.rows.largest_id
    if largest >= reference.vocabulary:
        raise ModelError(
            f"{reference.config.model}: its tokenizer produces token id {largest}, but the model's vocabulary has "
            f"{reference.vocabulary} tokens. The tokenizer belongs to another model."
        )


def _check_lengths(plan: Plan, reference: Reference) -> None:
    limit = longest_alike(reference.shape.config)
    if limit is None or reference.config.max_length <= limit:
        return
    longest = int((plan.rows.prompt_lengths + plan.completion_lengths.max(axis=1)).max())
    if longest > limit:
        raise ModelError(
            f"{reference.config.model}: the longest sequence has {longest} tokens, and beyond {limit} this model's score of a "
            "row depends on the other rows of its batch. Use "
            f"--max-length {limit}."
        )


def _pairing(config: PrecomputeConfig) -> PairingFields:
    shuffled = config.pairing == "shuffled"
    return {
        "method": config.pairing,
        "seed": config.seed if shuffled else None,
        "block": None if shuffled else config.pairing_block,
        "partners": config.kl_partners,
    }


def _judgements(plan: Plan) -> OptionalEntries:
    """Return the manifest's entries on masses; none if every row is one bit of weight 1."""
    if not plan.mass_columns:
        return {}
    judgements: JudgementFields = {}
    feedback, votes = plan.feedback, plan.feedback.label_rule.votes
    if feedback.found.agreement and votes != UNANIMOUS:  # whose rows are all one bit, or ratings
        judgements["votes"] = votes
    if scale := feedback.rating_scale:
        judgements["rating_scale"] = [*scale]
    if plan.weights:
        judgements["weights"] = True
    if OBJECTIVES in plan.mass_columns:
        judgements["objectives"] = [*plan.rows.judgements.objectives]
    return {"columns": plan.mass_columns, "judgements": judgements}


def _data(plan: Plan, counts: PlanCounts, labels_hash: str, places_hash: str) -> DataFields:
    return {
        "files": [{"name": printable(f.name), "sha256": f.sha256, "bytes": f.bytes} for f in plan.files],
        "read": counts.read,
        "kept": counts.kept,
        "dropped": counts.dropped,
        "desirable": counts.desirable,
        "undesirable": counts.undesirable,
        "truncated": counts.truncated,
        "kl_truncated": counts.kl_truncated,
        "prompts": counts.prompts,
        "duplicates": counts.repeats.duplicates,
        "contradictions": counts.repeats.contradictions,
        "rows_hash": counts.rows_hash,
        "labels_hash": labels_hash,
        "places_hash": places_hash,
    }


def _report(config: PrecomputeConfig, run: RunFields, shards: int, mark: str) -> None:
    tell(
        f"scored      {counted(run['scored_sequences'], 'sequence')} ({run['reused_sequences']:,} reused), "
        f"{counted(run['tokens'], 'token')} "
        f"in {run['seconds']:,.1f} s"
    )
    tell(f"wrote       {config.out} ({counted(shards, 'shard')}, fingerprint {mark[:12]})")
    tell(f"next        kto-train --cache {shlex.quote(str(config.out))}")


def _report_plan(config: PrecomputeConfig, shards: int) -> None:
    tell(f"planned     {counted(shards, 'shard')} in {config.out}; nothing was scored")
    if shards:
        tell(
            "next        the same command with --part 0/N, --part 1/N, ... in place of --plan-only, each on any machine that sees "
            f"{config.out}; then without them, which writes the manifest"
        )
