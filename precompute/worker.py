"""Score shards from their plan files, on any machine that sees them.

plan file -> scores -> shard in `.done/<token>`; about once a minute the scores so far go to parts of the shard.
"""

import contextlib
import json
import logging
import secrets
import socket
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from offline_kto.kto_core.cache.manifest import identity_of
from offline_kto.kto_core.cache.manifest_fields import ScoreDifference
from offline_kto.kto_core.cache.row_schema import CacheRow
from offline_kto.kto_core.cache.shards import WRITE_AGAIN, write_table
from offline_kto.kto_core.errors import CacheError, KTOError, ModelError
from offline_kto.kto_core.hashing import file_hash
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import choose_backend, load_transformers, vllm_engine
from offline_kto.precompute.engines.comparison import ComparedScorer, DisagreementError, choose_sample
from offline_kto.precompute.engines.protocol import Listener, Scorer
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.out_folder import MERGED, PARTS
from offline_kto.precompute.parts import Pace, ShardScores
from offline_kto.precompute.plan_files import PlanFile, done_path, plan_path, read_plan_file, read_run, run_state
from offline_kto.precompute.score_files import drop_parts, read_parts, write_part
from offline_kto.precompute.shard_tables import scored_table
from offline_kto.precompute.workers import Answer, Task, WorkerPlace

# Fields of the identity that describe the rows, not what scores them.
_OF_ROWS = ("tokenization.chat",)
# Libraries whose version can change a score.
_SCORING = ("torch", "transformers", "vllm")


class RefusedError(ModelError):
    """This worker would compute other scores than those that were planned."""


class StoppedError(Exception):
    """The worker was asked to stop; its scores are in parts."""


# Kinds of errors that a transport keeps; any other `KTOError` arrives as a `ModelError`.
KEPT_ERRORS = (RefusedError, DisagreementError, CacheError, ModelError)

# For a worker that was told to end, to write its scores.
SECONDS_TO_STOP = 60.0


def kept_error(error: KTOError) -> KTOError:
    """Return an error of its kind with its message, without what could not travel."""
    kind = next((kind for kind in KEPT_ERRORS if isinstance(error, kind)), ModelError)
    return kind(str(error))


class LoggedLines(logging.Handler):
    """A logging handler that hands the worker's lines to its transport."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


class ShardWorker:
    """Scores planned shards with the reference of `config`; a context that ends its engine.

    Args:
        config: the options of the run; `device` is this worker's.
        out: folder of the cache.
        should_stop: asked after each pass.

    Raises:
        RefusedError: this worker would compute other scores: another model, tokenizer, or version of a library.
        KTOError: the plan or the model cannot be read.
    """

    def __init__(self, config: PrecomputeConfig, out: Path, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._run_state = run_state(out)
        run = read_run(out)
        if run is None:
            raise CacheError(f"{out}: there is no plan. Run kto-precompute with --plan-only first.")
        self._run, self._out, self._should_stop = run, out, should_stop
        self._backend = choose_backend(config)
        self._reference = Reference.find(config)
        self._check_identity()
        if self._reference.device.type == "cpu":
            torch.set_num_threads(run.threads)
        self._keys = {shard.number: shard.key for shard in run.shards}
        self._engine = contextlib.ExitStack()
        self._scorer: Scorer | None = None
        self._pace = Pace()

    @property
    def place(self) -> WorkerPlace:
        device = self._reference.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return WorkerPlace(socket.gethostname(), name, torch.__version__)

    def __enter__(self) -> "ShardWorker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.__exit__(kind, error, trace)

    def _check_identity(self) -> None:
        reference, run = self._reference, self._run
        weights, adapter = run.hashes
        if reference.state_hash == run.weights_state and weights is not None:
            hashes = weights, adapter
        else:
            with reference.hash_weights() as hashing:
                hashes = hashing.result()
        sections = reference.sections(hashes, backend=self._backend.name, engine_versions=self._backend.versions())
        mine = json.loads(json.dumps(identity_of(sections)))
        versions = sections["scorer"]["versions"]
        lines = [
            f"{name}: {_short(run.identity.get(name))} in the plan, {_short(mine.get(name))} here"
            for name in sorted({*mine, *run.identity} - {*_OF_ROWS})
            if mine.get(name) != run.identity.get(name)
        ]
        lines += [
            f"{name}: {run.versions.get(name)} in the plan, {versions.get(name)} here"
            for name in _SCORING
            if versions.get(name) != run.versions.get(name)
        ]
        if lines:
            raise RefusedError(
                f"{socket.gethostname()}: this worker would compute other scores than those that were planned:\n  "
                + "\n  ".join(lines)
                + "\nGive every worker the same model, options and versions."
            )

    def score(self, task: Task, on_tokens: Callable[[int], None] = lambda tokens: None) -> Answer:
        """Score a shard and write it, or, if it awaits scores of other shards, its parts.

        Args:
            on_tokens: called with the tokens scored since the last call.

        Raises:
            StoppedError: `should_stop` said so.
            KTOError: the shard cannot be scored or written.
        """
        self._check_current()
        plan = read_plan_file(plan_path(self._out, task.shard))
        key = self._keys.get(task.shard)
        if key is None or plan.metadata != {**self._run.metadata, "key": key}:
            raise CacheError(
                f"{plan_path(self._out, task.shard)}: belongs to another plan. Run kto-precompute again without --part."
            )
        before = {**read_parts(self._out, key, self._run.identity, vocabulary=self._run.vocabulary), **plan.scores}
        found = ShardScores(plan.company, before, lambda rows: self._write_part(key, rows), self._pace)
        scored, tokens, seconds = self._score(plan, found, on_tokens, key)
        scores = ChainMap(found.scores, plan.scores)
        is_written = all(one in scores for one in plan.ids)
        if is_written:
            entry = self._write(task.shard, key, plan, scores)
        else:
            found.flush()
            entry = (0, 0, "")
        self._pace.restart()
        return Answer(is_written, *entry, scored, tokens, seconds, self._difference())

    def _score(
        self, plan: PlanFile, found: ShardScores, on_tokens: Callable[[int], None], key: str
    ) -> tuple[int, int, float]:
        """Return the numbers of sequences and tokens scored, and the seconds that this took."""
        known, sequences = found.known, list(plan.company.values())
        unknown = [sequence for i, sequence in enumerate(sequences) if i not in known]
        if not unknown:
            return 0, 0, 0.0
        self._scorer = self._scorer or self._load(unknown)

        def add(done: Sequence[int], scores: Sequence[np.ndarray]) -> None:
            found.add(done, scores)
            if self._should_stop():
                raise StoppedError

        started = time.monotonic()
        try:
            self._scorer.score(sequences, Listener(add, on_tokens), known=known)
        except DisagreementError:
            drop_parts(self._out, key)
            raise
        except BaseException:  # any error, a scheduler's signal, or a leader that stops
            with contextlib.suppress(CacheError):  # a full disk may be the error that ends the run, which is reported
                found.flush()
            raise
        return len(unknown), sum(map(_length, unknown)), time.monotonic() - started

    def _load(self, sequences: Sequence[TokenIds]) -> Scorer:
        if self._backend.name == "transformers":
            scorer: Scorer = load_transformers(self._reference, sequences)
        else:
            merged = self._out / MERGED / secrets.token_hex(8)
            tokens = sum(map(_length, sequences)) * len(self._run.shards)
            scorer = self._engine.enter_context(
                vllm_engine(self._reference, choose_sample(sequences), merged, tokens=tokens)
            )
        self._reference.check_unchanged()
        return scorer

    def _difference(self) -> ScoreDifference | None:
        return self._scorer.difference() if isinstance(self._scorer, ComparedScorer) else None

    def _write(self, index: int, key: str, plan: PlanFile, scores: Mapping[str, np.ndarray]) -> tuple[int, int, str]:
        """Write the shard. Returns: its rows, bytes and hash."""
        table = scored_table(plan.table, [scores[one] for one in plan.ids])
        path = done_path(self._out, self._run.token, index)
        self._check_current()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{path.parent}: cannot be written: {error}. {WRITE_AGAIN}") from error
        write_table(path, table, {**self._run.metadata, "key": key})
        try:
            self._check_current()
        except CacheError:
            path.unlink(missing_ok=True)
            for empty in (path.parent, path.parent.parent):
                with contextlib.suppress(OSError):  # missing, or not empty
                    empty.rmdir()
            raise
        return table.num_rows, path.stat().st_size, file_hash(path)

    def _check_current(self) -> None:
        """Refuse to write once another command has planned or finished the cache: this process may have been stopped for hours."""
        if run_state(self._out) == self._run_state:
            return
        now = read_run(self._out)
        if now is None or now.token != self._run.token:
            raise CacheError(
                f"{self._out}: another command has {'finished it' if now is None else 'planned here'} meanwhile. Finished shards are "
                "kept; start this one again if some are missing."
            )

    def _write_part(self, key: str, rows: Sequence[CacheRow]) -> None:
        self._check_current()
        folder = self._out / PARTS / "train"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{folder}: cannot be written: {error}. {WRITE_AGAIN}") from error
        write_part(self._out, key, rows, self._run.metadata)


def _length(sequence: TokenIds) -> int:
    return len(sequence[0]) + len(sequence[1])


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "..." if len(text) > 40 else text
