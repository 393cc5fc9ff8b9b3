"""Run the same training on both sides: TRL's KTOTrainer in its environment, `kto-precompute` and `kto-train` in ours.

Every option that could make the two differ is set here, once for both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import HERE, Environments, offline_env
from measured_run import Measured, run_measured
from workload import Workload

Step = dict[str, float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """The settings of the training run on both sides; `max_steps` of None means one pass over the rows."""

    batch_size: int
    max_length: int
    learning_rate: float
    beta: float = 0.1
    max_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrlRun:
    """TRL's side: the process that scored the references (if cached) and trained, and the record of `trl_kto.py`."""

    process: Measured
    rows: list[dict[str, Any]]
    steps: list[Step]
    reference_seconds: float | None
    reference_peak_mib: float | None
    train_seconds: float | None


@dataclass(frozen=True)
class OurRun:
    """Our side: the two processes, the cache between them, and the run's metrics."""

    precompute: Measured
    train: Measured
    rows: list[dict[str, Any]]
    manifest: dict[str, Any]
    steps: list[Step]
    train_seconds: float


def run_trl(
    environments: Environments,
    workload: Workload,
    recipe: Recipe,
    *,
    out: Path,
    reference: str,
    rows_a_pass: int | None = None,
    completions_only: bool = False,
    score_only: bool = False,
) -> TrlRun:
    """Train with TRL.

    Args:
        out: Directory for its record, its log and the model.
        reference: "cached" (scored before training, TRL's `precompute_ref_log_probs`) or "live".
        rows_a_pass: Rows in one forward pass, of which a batch takes several; None is all of the batch at once.
        completions_only: See `trl_kto.project_completions_only`.
        score_only: Stop after the pass over the references.
    """
    command: list[str | Path] = [environments.trl_python, HERE / "trl_kto.py"]
    command += ["--model", workload.model, "--data", workload.data, "--out", out, "--reference", reference]
    command += [*recipe_options(recipe), "--max-length", str(recipe.max_length)]
    if rows_a_pass is not None:
        command += ["--rows-a-pass", str(rows_a_pass)]
    if completions_only:
        command.append("--completions-only")
    if score_only:
        command.append("--score-only")
    process = run_measured(command, log=out / "log.txt", env=offline_env(out))
    record = json.loads((out / "trl.json").read_text(encoding="utf-8"))
    return TrlRun(
        process,
        record["rows"],
        record["steps"],
        record["reference_seconds"],
        record["reference_peak_mib"],
        record["train_seconds"],
    )


def run_ours(
    environments: Environments, workload: Workload, recipe: Recipe, *, out: Path, max_tokens: int | None = None
) -> OurRun:
    """Score the references with `kto-precompute`, then train with `kto-train`; pairs and row order are TRL's."""
    refs, run = out / "refs", out / "run"
    precomputed = score(environments.our_command("kto-precompute"), workload, recipe, refs=refs)

    train: list[str | Path] = [environments.our_command("kto-train"), "--cache", refs, "--out", run]
    train += [*recipe_options(recipe), "--scheduler", "constant", "--no-shuffle", "--no-gradient-checkpointing"]
    train += ["--dtype", "float32", "--device", "cpu", "--logging-steps", "1", "--save-steps", "0"]
    if max_tokens is not None:
        train += ["--max-tokens", str(max_tokens)]
    trained = run_measured(train, log=out / "train.txt", env=offline_env(out))

    manifest = json.loads((refs / "manifest.json").read_text(encoding="utf-8"))
    steps, train_seconds = read_metrics(run / "metrics.jsonl")
    return OurRun(precomputed, trained, read_cache(refs), manifest, steps, train_seconds)


def score(
    command: Path, workload: Workload, recipe: Recipe, *, refs: Path, options: Sequence[str] = (), program: str = ""
) -> Measured:
    """Score the references of a workload, with TRL's pairs.

    Args:
        command: `kto-precompute`, or an interpreter if there is a `program`.
        program: Python code that accepts the same options.
    """
    line: list[str | Path] = [command, *(("-c", program) if program else ())]
    line += ["--model", workload.model, "--data", workload.data, "--out", refs]
    line += ["--pairing", "rotate", "--pairing-block", str(recipe.batch_size), "--max-length", str(recipe.max_length)]
    line += ["--dtype", "float32", "--device", "cpu", *options]
    return run_measured(line, log=refs.with_suffix(".txt"), env=offline_env(refs.parent))


def recipe_options(recipe: Recipe) -> list[str]:
    """Return the options that both sides call by the same name."""
    options = ["--batch-size", str(recipe.batch_size), "--learning-rate", repr(recipe.learning_rate)]
    options += ["--beta", repr(recipe.beta), "--seed", str(recipe.seed)]
    if recipe.max_steps is not None:
        options += ["--max-steps", str(recipe.max_steps)]
    return options


def read_metrics(path: Path) -> tuple[list[Step], float]:
    """Return the records of all updates in a `metrics.jsonl`, and `train_runtime` of its last record, in seconds."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "loss" in record], records[-1]["train_runtime"]


def read_cache(refs: Path) -> list[dict[str, Any]]:
    """Return all rows of a reference cache, in the order of the input."""
    from pyarrow import parquet

    shards = sorted((refs / "train").glob("*.parquet"))
    rows = [row for shard in shards for row in parquet.read_table(shard).to_pylist()]
    return sorted(rows, key=lambda row: row["source"])
