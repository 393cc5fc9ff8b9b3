"""Describe how many rows of a cache are used, dropped and truncated, for the plans of kto-train and kto-sweep."""

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.train.run_records import RunData, Shortened


def rows_in_words(data: RunData) -> str:
    """Describe the rows of a run for its plan, from `TrainingData.run_data`."""
    held = data["held_out_desirable"] + data["held_out_undesirable"]
    limit, of_held_out = data["max_length"], data["held_out_shortened"]
    inside = shortened_in_words(of_held_out, limit)[2:] if of_held_out else ""
    shortened = shortened_in_words(data["shortened"], limit)
    if of_held_out and shortened:  # of another cache: each number stands with its own rows
        shortened = f" ({shortened[2:]})"
    parts = [
        f"{data['desirable'] + data['undesirable']:,} to train on",
        shortened if of_held_out else "",
        f", {held:,} held out" if held else "",
        f" ({inside})" if inside else "",
        "" if of_held_out else shortened,
        f", {data['unjudged']:,} left out (not judged by --objective)" if data.get("unjudged") else "",
        f", {data['unpaired']:,} left out (not in a pair, or both rows are equal)" if data["unpaired"] else "",
    ]
    return "".join(parts)


def shortened_in_words(counts: Shortened, max_length: int) -> str:
    """Describe how `max_length` shortens a cache, each part after a comma; empty if it changes nothing."""
    dropped = f", {counts['dropped']:,} dropped (prompt too long)" if counts["dropped"] else ""
    if not counts["cut"] and not counts["kl_cut"]:
        return dropped
    cut = f"{counted(counts['cut'], 'completion')} and {counted(counts['kl_cut'], 'mismatched completion')} cut"
    return f"{dropped}, {cut} (--max-length {max_length})"


def scored_in_words(manifest: Manifest) -> str:
    """Describe from the manifest how many rows kto-precompute dropped and truncated before scoring."""
    data = manifest.data
    dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in (data.get("dropped") or {}).items())
    read, cut, kl_cut = data.get("read") or manifest.rows, data.get("truncated") or 0, data.get("kl_truncated") or 0
    return (
        f"{counted(manifest.rows, 'row')} of {read:,}, dropped: {dropped or 'none'}; cut at "
        f"{manifest.tokenization['max_length']} tokens: {counted(cut, 'completion')}, {counted(kl_cut, 'mismatched completion')}"
    )
