"""Write rewards.parquet: the log-ratio of each training and held-out row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offline_kto.kto_core.durable_files import replacing
from offline_kto.kto_core.judgements import MASS_COLUMNS
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.trainer.evaluation import Scores


def write_rewards(
    path: Path, data: TrainingData, seen: np.ndarray, logratios: np.ndarray, held_out: Scores | None
) -> None:
    """Write the log-ratio of each row: training rows as last seen (null: never seen), held-out rows at the end."""
    trained = np.sort(data.units.ravel())
    values = np.full(len(data.rows), np.nan)
    values[seen] = logratios
    tables = [_rewards("train", data.rows, trained, values[trained])]
    if held_out is not None and data.held_out is not None:
        tables.append(
            _rewards("held_out", data.held_out.cache, np.asarray(data.held_out.indices), held_out.logratios.numpy())
        )
    with replacing(path) as temporary, temporary.open("wb") as file:  # the path may not be valid Unicode
        pq.write_table(pa.concat_tables(tables), file, compression="zstd")


def _rewards(split: str, rows: CacheRows, indices: np.ndarray, logratios: np.ndarray) -> pa.Table:
    masses = {}
    if rows.masses is not None:
        masses = dict(zip(MASS_COLUMNS, map(pa.array, rows.masses_of(indices).T), strict=True))
    return pa.table(
        {
            "split": pa.array([split] * len(indices), pa.string()),
            "row_id": rows.ids("row_id", indices),
            "prompt_id": rows.ids("prompt_id", indices),
            "label": pa.array(rows.labels[indices], pa.bool_()),
            **masses,
            "logratio": pa.array(logratios.astype(np.float32), pa.float32(), mask=np.isnan(logratios)),
        }
    )
