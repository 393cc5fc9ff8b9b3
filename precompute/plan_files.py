"""Write and read what workers need to score: a file for each shard, and one for the run.

refs/.plan/plan.json         the run: the fields that identify scores, and the key of every shard
refs/.plan/00007.parquet     a shard without its scores

A plan file has the columns of a shard. A list of scores is empty where there are none yet. The column `company` says of each
sequence of a row whether it is scored together with the others of this shard (see `offline_kto.precompute.needs`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.cache.shards import METADATA_KEY, WRITE_AGAIN, read_metadata, read_unlisted
from offline_kto.kto_core.cache.table_rows import Rows
from offline_kto.kto_core.durable_files import replacing, write_json
from offline_kto.kto_core.errors import CacheError, said_by
from offline_kto.kto_core.hashing import sequence_id
from offline_kto.kto_core.options import as_plain
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.config import OF_THE_RUN, PrecomputeConfig
from offline_kto.precompute.needs import Need
from offline_kto.precompute.out_folder import DONE, PLAN
from offline_kto.precompute.records.sources import SourceFile
from offline_kto.precompute.shard_tables import NO_SCORES, lists_of, scored_table

PLAN_FORMAT = 2
_RUN = "plan.json"
_COMPANY = "company"
# Options that change only what scores the planned rows. The identity of the scores has all that matters of them.
_OF_SCORING = (
    *("model", "adapter", "revision", "trust_remote_code", "tokenizer_kwargs", "chat_template"),
    *("backend", "dtype", "device", "attention", "max_tokens", "tensor_parallel", "gpu_memory_utilization"),
)
# Options that are compared by the content of what they name, or that name a file to write.
_PATHS = ("data", "left_out")


def planned_options(config: PrecomputeConfig) -> dict[str, Any]:
    """Return the options that decide which rows and shards there are, as JSON."""
    others = {*OF_THE_RUN, *_OF_SCORING, *_PATHS}
    return {name: value for name, value in as_plain(config).items() if name not in others}


class PlannedShard(NamedTuple):
    """One shard of a planned run: its number, its key, the number of its rows, and the tokens to score."""

    number: int
    key: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class PlannedRun:
    """What identifies a run of kto-precompute for its workers.

    Attributes:
        token: of the process that planned it; names its folder in `.done`.
        metadata: the footer that all shards have in common, with the identity.
        versions: of the libraries that score.
        hashes: of weights and adapter.
        weights_state: of the files that were hashed; files in the same state are not hashed again.
        vocabulary: vocabulary size of the reference.
        threads: of torch on a CPU; their number changes the last bits of a score.
        options: that decide which rows and shards there are.
        files: of the feedback: their names, hashes and sizes.
        shards: that have to be scored.
    """

    token: str
    metadata: dict[str, Any]
    versions: dict[str, str]
    hashes: list[str | None]
    weights_state: str
    vocabulary: int
    threads: int
    options: dict[str, Any]
    files: list[SourceFile]
    shards: list[PlannedShard]

    @property
    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.metadata["identity"]
        return identity


def run_path(out: Path) -> Path:
    """Return the path of the file that identifies the run."""
    return out / PLAN / _RUN


def plan_path(out: Path, index: int) -> Path:
    """Return the path of a shard's plan file."""
    return out / PLAN / f"{index:05d}.parquet"


def done_path(out: Path, token: str, index: int) -> Path:
    """Return the path to which a worker writes a shard.

    Args:
        token: of the run that asked for it, so that a worker of another run writes elsewhere.
    """
    return out / DONE / token / f"{index:05d}.parquet"


def write_run(out: Path, run: PlannedRun) -> None:
    """Write `plan.json`. Raises: CacheError: it cannot be written."""
    path = run_path(out)
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"format": PLAN_FORMAT, **dataclasses.asdict(run)})
    except OSError as error:
        raise CacheError(f"{path}: cannot be written: {error}. {WRITE_AGAIN}") from error


def run_state(out: Path) -> tuple[int, ...] | None:
    """Return what changes if `plan.json` is replaced; None if there is none. A large one takes long to read."""
    try:
        found = run_path(out).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_run(out: Path) -> PlannedRun | None:
    """Read `plan.json`; None if there is none.

    Raises:
        CacheError: it cannot be read, or another version wrote it.
    """
    path = run_path(out)
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != PLAN_FORMAT:
            raise ValueError("another version of offline-kto wrote it")
        files = [SourceFile(**file) for file in content["files"]]
        return PlannedRun(
            **{**content, "files": files, "shards": [PlannedShard(*shard) for shard in content["shards"]]}
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"{path}: cannot be read ({said_by(error)}). Plan again, with --plan-only or without --part."
        ) from error


def write_plan_file(path: Path, table: pa.Table, need: Need, metadata: Mapping[str, object]) -> None:
    """Write a shard without the scores that are not known yet.

    Args:
        table: from `unscored_table`.
        metadata: JSON values for the footer: those of the shard.

    Raises:
        CacheError: the file cannot be written.
    """
    company = lists_of(pa.array(need.in_company), len(need.in_company) // table.num_rows)
    table = scored_table(table, [NO_SCORES if one is None else one for one in need.scores])
    table = table.append_column(pa.field(_COMPANY, company.type, nullable=False), company)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written: {error}. {WRITE_AGAIN}") from error


class PlanFile(NamedTuple):
    """A shard without its scores.

    Attributes:
        metadata: of the shard.
        table: the shard without scores that are new.
        ids: of its sequences, row by row.
        company: sequences that are scored together, by id.
        scores: of sequences that have one, in `company` or not.
    """

    metadata: dict[str, object]
    table: pa.Table
    ids: list[str]
    company: dict[str, TokenIds]
    scores: dict[str, np.ndarray]


def read_plan_file(path: Path) -> PlanFile:
    """Read a plan file.

    Raises:
        CacheError: it is missing, or damaged.
    """
    metadata = read_metadata(path)
    if metadata is None:
        raise CacheError(f"{path}: missing or damaged. Run kto-precompute again without --part.")
    table = read_unlisted(path)
    found = PlanFile(metadata, table.drop_columns([_COMPANY]), [], {}, {})
    for row, members in zip(Rows(table), table.column(_COMPANY).to_pylist(), strict=True):
        _add(found, row, members)
    return found


def _add(plan: PlanFile, row: CacheRow, members: Sequence[bool]) -> None:
    completions = (row["completion_ids"], *row["kl_completion_ids"])
    scores = (row["ref_token_logps"], *row["ref_kl_token_logps"])
    for completion, found, is_member in zip(completions, scores, members, strict=True):
        name = sequence_id(row["prompt_ids"], completion)
        if is_member:
            plan.company.setdefault(name, (row["prompt_ids"], completion))
        if len(found):
            plan.scores[name] = found
        plan.ids.append(name)
