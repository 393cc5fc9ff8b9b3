"""Train with TRL's KTOTrainer on a workload, and record all values that a comparison needs.

Runs inside TRL's environment, on the CPU, in float32, without gradient checkpointing; the other scripts start it::

    python benchmarks/workload.py --out /tmp/workload --rows 16 --small
    benchmarks/.venv-trl/bin/python benchmarks/trl_kto.py --model /tmp/workload/model \\
        --data /tmp/workload/feedback.jsonl --reference cached --batch-size 4 --max-steps 3 --out /tmp/trl

The record, `OUT/trl.json`:

- `rows`: of each row that TRL kept, in its order: `source` (line of the data, from 0), `prompt_ids`,
  `completion_ids` (cut as TRL's collator cuts them) and, with a cached reference, `ref_logps` and `ref_kl_logps`.
- `sum_ref_logps`, `sum_ref_kl_logps`: over all of these rows.
- `steps`: what the trainer logged after each update, under TRL's names.
- `reference_seconds`, `reference_peak_mib` (the pass over the references; null when live), `train_seconds` (null
  when only scored), `peak_mib`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where they are used, so that --help is fast and works without TRL
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer


def watched_trainer_class() -> type[KTOTrainer]:
    """Return TRL's trainer with a timer around its pass over the references, and with z0 logged before clamping."""
    from trl import KTOTrainer

    class WatchedKTOTrainer(KTOTrainer):
        reference_seconds: float | None = None
        reference_peak_mib: float | None = None

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - start
            self.reference_peak_mib = peak_mib()
            return dataset

        def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Any:
            kl_logps = super()._compute_kl_logps(model, batch)
            if "ref_KL_logps" in batch:  # cached: with a live reference this runs once for each model
                self._metrics["train"]["kl_raw"].append((kl_logps - batch["ref_KL_logps"]).mean().item())
            return kl_logps

    return WatchedKTOTrainer


def peak_mib() -> float:
    """Return the peak resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def project_completions_only() -> None:
    """Patch TRL's fused head to project completion positions only, as it does on CUDA.

    Without Triton (so on every CPU) it also projects prompts and padding to the vocabulary, and discards the result. The
    patch changes the condition under which `add_fused_lm_head` compacts; the kernels have their own copy of the name
    and still run their CPU code.
    """
    from trl.trainer import utils as trl_utils

    trl_utils._use_triton = lambda device: True


def load_rows(path: Path) -> Dataset:
    """Load the JSONL's rows in order, each with its line number as `source`."""
    from datasets import Dataset

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{**row, "source": i} for i, row in enumerate(rows)])


def training_config(args: argparse.Namespace) -> KTOConfig:
    """Return a configuration with every setting that could make the two sides differ."""
    from trl import KTOConfig

    return KTOConfig(
        output_dir=str(args.out / "model"),
        per_device_train_batch_size=args.rows_a_pass or args.batch_size,
        gradient_accumulation_steps=args.batch_size // (args.rows_a_pass or args.batch_size),
        train_sampling_strategy="sequential",
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=1.0,
        precompute_ref_log_probs=args.reference == "cached",
        gradient_checkpointing=False,
        bf16=False,
        fp16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )


def kept_rows(trainer: KTOTrainer, max_length: int) -> list[dict[str, Any]]:
    """Return the rows TRL trains on, with the ids it scores and its cached scores, if any."""
    rows = []
    for row in trainer.train_dataset:
        room = max_length - len(row["prompt_ids"])
        record = {name: row[name] for name in ("source", "prompt_ids")}
        record["completion_ids"] = row["completion_ids"][:room]
        if "ref_logps" in row:
            record["ref_logps"] = row["ref_logps"]
            record["ref_kl_logps"] = row["ref_KL_logps"]
        rows.append(record)
    return rows


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with prompt, completion and label")
    parser.add_argument("--out", type=Path, required=True, help="directory for trl.json and the trained model")
    parser.add_argument("--reference", choices=["cached", "live"], default="cached")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--rows-a-pass", type=int, help="rows in one forward pass; a batch is several (default: all of it)"
    )
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--desirable-weight", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score-only", action="store_true", help="stop after the pass over the references")
    parser.add_argument(
        "--completions-only",
        action="store_true",
        help="project completion positions only, which TRL by itself does on CUDA but not on the CPU",
    )
    return parser.parse_args()


def main() -> None:
    """Score, train once, and write the record."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.completions_only:
        project_completions_only()
    from transformers import AutoTokenizer

    trainer = watched_trainer_class()(
        model=str(args.model),
        args=training_config(args),
        train_dataset=load_rows(args.data),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    train_seconds = None
    if not args.score_only:
        train_seconds = trainer.train().metrics["train_runtime"]
        trainer.save_model()

    rows = kept_rows(trainer, args.max_length)
    cached = args.reference == "cached"
    record = {
        "rows": rows,
        "sum_ref_logps": math.fsum(row["ref_logps"] for row in rows) if cached else None,
        "sum_ref_kl_logps": math.fsum(row["ref_kl_logps"] for row in rows) if cached else None,
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "reference_seconds": trainer.reference_seconds,
        "reference_peak_mib": trainer.reference_peak_mib,
        "train_seconds": train_seconds,
        "peak_mib": peak_mib(),
    }
    (args.out / "trl.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
