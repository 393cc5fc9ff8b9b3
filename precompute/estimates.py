"""Estimate what scoring will take: memory, disk, and time where this reference was measured before."""

import os
import shutil
from pathlib import Path

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.locations import Location, is_url
from offline_kto.kto_core.models.memory_check import gigabytes
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.out_folder import manifest_in
from offline_kto.precompute.plan import Plan, PlanCounts

# Bytes of a token in a shard before compression: its id, and the float32 log-probability of a completion's token.
_ID, _LOGP = 4, 4


def estimates(plan: Plan, counts: PlanCounts, reference: Reference, *, backend: str) -> list[tuple[str, str]]:
    """Return (name, text) of each line of the plan that estimates something."""
    out = reference.config.out
    weights = gigabytes(reference.weights_bytes)
    return [
        (
            "memory",
            f"{weights} for the weights ({reference.precision.name}); the passes of --max-tokens are added to it",
        ),
        ("disk", f"about {gigabytes(_cache_bytes(plan))} for the cache before compression{_free(out)}"),
        ("time", _time(manifest_in(out), counts, reference, backend)),
    ]


def _cache_bytes(plan: Plan) -> int:
    """Return the bytes of ids and scores before compression."""
    prompts, completions = int(plan.rows.prompt_lengths.sum()), int(plan.completion_lengths.sum())
    return _ID * prompts + (_ID + _LOGP) * completions


def _free(out: Location) -> str:
    if is_url(out):
        return ""
    above = next(folder for folder in (Path(out), *Path(os.path.abspath(out)).parents) if folder.exists())
    return f"; {gigabytes(shutil.disk_usage(above).free)} free"


def _time(manifest: Manifest | None, counts: PlanCounts, reference: Reference, backend: str) -> str:
    """Return the time for all sequences at the rate that the cache in `--out` was made with."""
    rate = None if manifest is None else manifest.run.get("tokens_per_second")
    if manifest is None or not isinstance(rate, int | float) or not rate > 0:
        return "unknown: this reference was not measured here; the first progress line shows the time left"
    then = (manifest.reference.get("id"), manifest.reference.get("dtype"), manifest.scorer.get("backend"))
    if then != (reference.config.model, reference.precision.name, backend):
        return "unknown: the cache in --out was scored with other settings; the first progress line shows the time left"
    seconds = counts.tokens / rate
    words = f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
    return (
        f"at most {words} for {counted(counts.tokens, 'token')}, at {rate:,.0f} tokens/s as in the cache in --out; scores that "
        "are reused take none"
    )
