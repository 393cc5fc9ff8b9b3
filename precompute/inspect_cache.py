"""The commands of `kto-cache`: describe, verify and print a reference cache."""

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from offline_kto.kto_core.cache.manifest import Manifest, check_places, read_manifest
from offline_kto.kto_core.cache.remote_cache import local_copy, speaking_of
from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.cache.shards import check_packing, open_shard, read_groups
from offline_kto.kto_core.cache.table_rows import Rows
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import ConfigError, printable
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.kto_core.locations import Location
from offline_kto.kto_core.progress import Progress
from offline_kto.kto_core.redaction import hidden
from offline_kto.precompute.preview import block, columns_of, folded, visible, width


def info(location: Location) -> list[str]:
    """Return a description of the manifest, one line per entry.

    Raises:
        CacheError: no readable cache.
    """
    manifest = read_manifest(local_copy(location))
    lines = [f"{name:<12}{printable(value)}" for name, value in describe(manifest)]
    if not manifest.intact:
        lines.append(
            "warning     manifest.json was edited or damaged: run kto-cache verify for details; kto-train will refuse it"
        )
    return lines


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """Return name and value of each line of `kto-cache info`."""
    reference, data, run = manifest.reference, manifest.data, manifest.run
    size = sum(shard["bytes"] for shard in manifest.shards)
    dropped = ", ".join(f"{count} {reason}" for reason, count in (data.get("dropped") or {}).items()) or "none"
    adapter = f" + adapter {reference['adapter']}" if reference.get("adapter") else ""
    pairing = manifest.pairing
    return [
        ("reference", f"{reference.get('id')}{adapter}"),
        ("revision", str(reference.get("revision") or "local files")),
        ("weights", str(reference.get("weights_hash"))),
        ("precision", f"{reference.get('dtype')}, attention {reference.get('attention')}"),
        ("scored with", f"{manifest.scorer.get('backend')} {json.dumps(manifest.scorer.get('versions'))}"),
        ("max length", str(manifest.tokenization.get("max_length"))),
        (
            "pairing",
            f"{pairing.get('method')}, {pairing.get('partners')} mismatched per row, seed {pairing.get('seed')}",
        ),
        ("data", ", ".join(str(file.get("name")) for file in data.get("files") or [])),
        (
            "rows",
            f"{manifest.rows:,} ({_number(data.get('desirable'))} desirable, {_number(data.get('undesirable'))} undesirable)",
        ),
        *([("judgements", _judgements(manifest))] if manifest.columns else []),
        ("read", f"{_number(data.get('read'))}, dropped: {dropped}, truncated: {data.get('truncated')}"),
        ("files", f"{counted(len(manifest.shards), 'shard')}, {size / 1e6:,.1f} MB"),
        (
            "scoring",
            f"{_number(run.get('scored_sequences'))} sequences scored, {_number(run.get('reused_sequences'))} reused, "
            f"{_number(run.get('tokens_per_second'))} tokens/s",
        ),
        ("created", manifest.created),
        ("fingerprint", manifest.fingerprint),
    ]


def _judgements(manifest: Manifest) -> str:
    """Describe how rows are judged that are more than one bit."""
    found = manifest.judgements
    scale = found.get("rating_scale")
    kinds = [
        f"votes by {found['votes']}" if "votes" in found else "",
        f"ratings from {scale[0]:g} to {scale[1]:g}" if scale else "",
        "row weights" if found.get("weights") else "",
        f"objectives {', '.join(manifest.objectives)}" if manifest.objectives else "",
    ]
    return ", ".join(filter(None, kinds)) or "masses"


def _number(value: int | float | None) -> str:
    return "?" if value is None else f"{value:,}"


def verify(location: Location) -> str:
    """Check files against the manifest, and every row against the format; return a summary of the check.

    Raises:
        CacheError: naming the file and what is wrong.
    """
    started = time.monotonic()
    folder = local_copy(location, anew=True)
    manifest = read_manifest(folder)
    with speaking_of(location, folder), Progress("verifying", manifest.rows, "rows") as progress:
        verify_cache(folder, manifest, on_rows=progress.add)
    shards = counted(len(manifest.shards), "shard")
    seconds = time.monotonic() - started
    return printable(
        hidden(f"{location}: {counted(manifest.rows, 'row')} in {shards}, all match the manifest ({seconds:.1f} s).")
    )


def head(location: Location, *, rows: int, model: str | None) -> Iterator[str]:
    """Yield the first rows as text, with y and y' in two columns, line by line.

    Raises:
        CacheError, ModelError: no cache, or no tokenizer to decode with.
        ConfigError: a negative number of rows.
    """
    if rows < 0:
        raise ConfigError(f"--rows must be at least 0, got {rows}.")
    folder = local_copy(location)
    manifest = read_manifest(folder)
    check_places(folder, manifest)
    tokenizer = _tokenizer(manifest, model)
    for row in islice(_rows(folder, manifest), min(rows, manifest.rows)):
        yield from _shown(row, tokenizer)


def _rows(folder: Path, manifest: Manifest) -> Iterator[CacheRow]:
    for shard in manifest.shards:
        path = folder / shard["file"]
        file = open_shard(path)
        check_packing(path, file)
        for table in read_groups(path, file):
            check_table(table, str(path), vocabulary=manifest.vocabulary, partners=manifest.partners)
            yield from Rows(table)


def _tokenizer(manifest: Manifest, model: str | None) -> Tokenizer:
    import transformers

    from offline_kto.kto_core.models.folders import find_folder, find_reference
    from offline_kto.kto_core.models.tokenizer_files import load_tokenizer

    folder, _ = find_folder(model, revision=None) if model else find_reference(manifest.reference)
    options = manifest.tokenizer.get("options")
    return load_tokenizer(transformers.AutoTokenizer, folder, trust_remote_code=False, options=options)


def _shown(row: CacheRow, tokenizer: Tokenizer) -> Iterator[str]:
    columns = width()
    column = (columns - 3) // 2
    thumb = "desirable" if row["label"] else "undesirable"
    tokens, row_id = len(row["completion_ids"]), printable(row["row_id"], 32)
    if "desirable_mass" in row:
        thumb += f" ({row['desirable_mass']:g} for, {row['undesirable_mass']:g} against)"
    place = f"  {printable(row['place'])}" if "place" in row else ""
    yield f"row {row['source']}  {thumb}  {row_id}  ref_logps {row['ref_logps']:.3f} over {counted(tokens, 'token')}{place}"
    yield from block("x  ", visible(tokenizer, row["prompt_ids"]), columns)
    left = _lines(f"y   ({row['ref_logps']:.2f})", visible(tokenizer, row["completion_ids"]), column)
    for ids, total in zip(row["kl_completion_ids"], row["ref_kl_logps"], strict=True):
        right = _lines(f"y'  ({total:.2f})", visible(tokenizer, ids), column)
        for i in range(max(len(left), len(right))):
            a, b = (side[i] if i < len(side) else "" for side in (left, right))
            yield f"{a}{' ' * (column - columns_of(a))} | {b}"
    yield ""


def _lines(title: str, text: str, width: int, most: int = 12) -> list[str]:
    lines = folded(text, width, at_marks=True)
    cut = [f"... {counted(len(lines) - most, 'more line')}"] if len(lines) > most else []
    return [title, *lines[:most], *cut]
