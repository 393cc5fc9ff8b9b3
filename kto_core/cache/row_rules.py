"""Check the rows of a shard by the rules of the format."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.cache.arrow_lists import Lists, numbers
from offline_kto.kto_core.cache.places import LONGEST_PLACE, PLACE
from offline_kto.kto_core.cache.row_schema import SCHEMA, has_places, optional_columns
from offline_kto.kto_core.errors import CacheError, printable
from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES

# Relative difference allowed between a stored sum and the sum of the stored tokens.
_SUM_TOLERANCE = 1e-9


def check_table(table: pa.Table, where: str, *, vocabulary: int | None = None, partners: int | None = None) -> int:
    """Check every rule of the format: counts, finiteness, signs, sums, masses, places, token ids.

    Args:
        table: rows with the columns of `SCHEMA`, and optional ones.
        where: named in errors.
        vocabulary: token ids must be below it; None skips that check.
        partners: mismatched completions that every row must have; None skips that check.

    Returns:
        The largest token id.

    Raises:
        CacheError: naming the first row and the rule it breaks.
    """
    for name in SCHEMA.names:
        missing = 0 if name == "pair_id" else _count_nulls(table.column(name))
        if missing:
            raise CacheError(f"{where}: column {name!r} has {missing} missing values.")
    prompts, completions = Lists(table, "prompt_ids"), Lists(table, "completion_ids")
    logps = Lists(table, "ref_token_logps")
    kl_completions, kl_logps = Lists(table, "kl_completion_ids"), Lists(table, "ref_kl_token_logps")
    kl_sums = Lists(table, "ref_kl_logps")
    if (prompts.lengths == 0).any() or (completions.lengths == 0).any():
        raise CacheError(f"{where}: a row without prompt or completion tokens.")
    _require_equal(where, "ref_token_logps", logps.lengths, completions.lengths)
    _require_equal(where, "ref_kl_token_logps", kl_logps.lengths, kl_completions.lengths)
    _require_equal(where, "ref_kl_logps", kl_sums.lengths, kl_completions.lengths)
    if partners is not None and (kl_completions.lengths != partners).any():
        raise CacheError(f"{where}: a row without its {partners} mismatched completions.")
    inner_ids, inner_logps = kl_completions.inner(), kl_logps.inner()
    _require_equal(where, "ref_kl_token_logps (tokens)", inner_logps.lengths, inner_ids.lengths)
    for name, values in (("ref_token_logps", logps.values), ("ref_kl_token_logps", inner_logps.values)):
        if not np.isfinite(values).all():
            raise CacheError(
                f"{where}: {name} contains {int((~np.isfinite(values)).sum())} values that are not finite."
            )
        if (values > 0).any():
            raise CacheError(f"{where}: {name} contains positive log-probabilities (up to {values.max():g}).")
    _require_sums(where, "ref_logps", numbers(table.column("ref_logps")), logps)
    _require_sums(where, "ref_kl_logps", kl_sums.values, inner_logps)
    _check_masses(table, where)
    _check_places(table, where)
    largest = 0
    for name, ids in (
        ("prompt_ids", prompts),
        ("completion_ids", completions),
        ("kl_completion_ids", inner_ids),
    ):
        if len(ids.values) and (ids.values.min() < 0 or (vocabulary is not None and ids.values.max() >= vocabulary)):
            raise CacheError(
                f"{where}: {name} contains token ids from {ids.values.min()} to {ids.values.max()}, "
                f"outside the vocabulary ({vocabulary} tokens)."
            )
        largest = max(largest, int(ids.values.max(initial=0)))
    return largest


def _check_masses(table: pa.Table, where: str) -> None:
    """Check the optional columns: masses that are finite and not negative, and that agree with the label."""
    optional = optional_columns(table.schema, where)
    if not optional.columns:
        return
    desirable, undesirable = (_mass_column(table.column(name), name, where) for name in MASS_COLUMNS)
    if (desirable + undesirable == 0).any():
        raise CacheError(
            f"{where}: row {_first(desirable + undesirable == 0)} has a desirable and an undesirable mass of 0."
        )
    other = numbers(table.column("label")) != (desirable >= undesirable)
    if other.any():
        row = _first(other)
        raise CacheError(
            f"{where}: label of row {row} does not agree with its masses, {desirable[row]:g} desirable and "
            f"{undesirable[row]:g} undesirable."
        )
    for name in optional.objectives:
        for side in ("desirable", "undesirable"):
            masses = pc.struct_field(table.column(OBJECTIVES), [name, side])
            _mass_column(masses, f"{OBJECTIVES}.{printable(name, 100)}.{side}", where)


def _check_places(table: pa.Table, where: str) -> None:
    if not has_places(table.schema, where):
        return
    places = table.column(PLACE)
    if places.null_count:
        raise CacheError(f"{where}: column {PLACE!r} has {places.null_count} missing values.")
    longest = pc.max(pc.utf8_length(places)).as_py() or 0
    if longest > LONGEST_PLACE:
        raise CacheError(f"{where}: a {PLACE} of {longest:,} characters; the longest has {LONGEST_PLACE}.")


def _mass_column(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    if column.null_count:
        raise CacheError(f"{where}: column {name!r} has {column.null_count} missing values.")
    masses = numbers(column)
    wrong = ~(np.isfinite(masses) & (masses >= 0))
    if wrong.any():
        row = _first(wrong)
        raise CacheError(f"{where}: {name} of row {row} is {masses[row]:g}; a mass is finite and not negative.")
    return masses


def _first(found: np.ndarray) -> int:
    return int(np.flatnonzero(found)[0])


def _count_nulls(column: pa.ChunkedArray) -> int:
    """Return the number of missing values at any depth of a column."""
    count = int(column.null_count)
    if pa.types.is_list(column.type):
        count += sum(_count_nulls(pa.chunked_array([chunk.flatten()])) for chunk in column.chunks)
    return count


def _require_equal(where: str, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    if len(found) != len(wanted) or (found != wanted).any():
        row = int(np.flatnonzero(found != wanted)[0]) if len(found) == len(wanted) else 0
        raise CacheError(f"{where}: {name} does not have one score for each token (first at entry {row}).")


def _require_sums(where: str, name: str, found: np.ndarray, tokens: Lists) -> None:
    wanted = tokens.sums()
    wrong = ~(np.abs(found - wanted) <= _SUM_TOLERANCE * np.maximum(1.0, np.abs(wanted)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise CacheError(f"{where}: {name} of row {row} is {found[row]:.6f}, but its tokens sum to {wanted[row]:.6f}.")
