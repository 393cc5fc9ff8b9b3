"""Convert a cache's rows to the columns that TRL's `KTOTrainer` (1.16) makes of a data set and its reference pass."""

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.errors import CacheError
from offline_kto.train.data.cache_rows import CacheRows


def trl_rows(rows: CacheRows, *, partner: int) -> datasets.Dataset:
    """Return all rows, in the cache's order.

    Args:
        rows: the cache, as it was scored (not shortened).
        partner: which mismatched completion of each row, counted from 0.

    Raises:
        CacheError: a row has fewer mismatched completions, or is more than one bit of weight 1.
    """
    if rows.masses is not None:
        raise CacheError(
            f"{rows.folder}: has votes, weights, graded ratings or objectives, which TRL's KTOTrainer does not know: it would train "
            "on labels of weight 1. Train with kto-train, or score feedback with one label for each row."
        )
    if not 0 <= partner < rows.partners:
        raise CacheError(
            f"{rows.folder}: has {rows.partners} mismatched completions for each row, but not number {partner}."
        )
    own = {name: rows.column(name) for name in ("prompt_ids", "completion_ids", "label", "ref_logps")}
    mismatched = {
        theirs: rows.column(ours, lambda lists: pc.list_element(lists, partner))
        for theirs, ours in (("KL_completion_ids", "kl_completion_ids"), ("ref_KL_logps", "ref_kl_logps"))
    }
    return datasets.Dataset(pa.table({**own, **mismatched}))
