"""Write rewards.parquet: the log-ratio of each training and held-out row."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offline_kto.kto_core.durable_files import replacing
from offline_kto.kto_core.judgements import MASS_COLUMNS
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.trainer.evaluation import Scores

# Rows that are in memory at a time, and in a row group.
_AT_ONCE = 65_536


def write_rewards(
    path: Path, data: TrainingData, steps: np.ndarray, logratios: np.ndarray, held_out: Scores | None
) -> None:
    """Write the log-ratio of each row: training rows as last seen (null: never seen), held-out rows at the end.

    Both are in the order of their caches.

    Args:
        steps, logratios: of all rows of the cache, in their last update; step -1 for a row that was in none.
    """
    trained = np.sort(data.units, axis=None)
    seen = np.where(steps >= 0, logratios, np.float32(np.nan))
    tables = _tables("train", data.rows, trained, seen[trained])
    if held_out is not None and data.held_out is not None:
        order = np.argsort(data.held_out.indices)
        of_held_out = held_out.logratios.numpy()[order]
        tables = itertools.chain(
            tables, _tables("held_out", data.held_out.cache, data.held_out.indices[order], of_held_out)
        )
    with replacing(path) as temporary, temporary.open("wb") as file:  # the path may not be valid Unicode
        first = next(tables)
        with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)


def _tables(split: str, rows: CacheRows, indices: np.ndarray, logratios: np.ndarray) -> Iterator[pa.Table]:
    """Yield the rows at ascending positions, many at a time."""
    waiting: list[pa.Table] = []
    for some, ids in rows.parts(["row_id", "prompt_id"], indices):
        waiting.append(_rewards(split, rows, ids, indices[some], logratios[some]))
        if sum(map(len, waiting)) >= _AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _rewards(split: str, rows: CacheRows, ids: pa.Table, indices: np.ndarray, logratios: np.ndarray) -> pa.Table:
    masses = {}
    if rows.masses is not None:
        masses = dict(zip(MASS_COLUMNS, map(pa.array, rows.masses_of(indices).T), strict=True))
    return pa.table(
        {
            "split": pa.array([split] * len(indices), pa.string()),
            "row_id": ids.column("row_id"),
            "prompt_id": ids.column("prompt_id"),
            "label": pa.array(rows.labels[indices], pa.bool_()),
            **masses,
            "logratio": pa.array(logratios.astype(np.float32), pa.float32(), mask=np.isnan(logratios)),
        }
    )
