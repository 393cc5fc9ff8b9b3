"""Run a few updates of TRL's trainer for one loss with a live reference, and write its logs as JSON.

Runs inside TRL's environment, on the CPU, in float32; `equal_losses.py` starts it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LOSSES = ("apo_zero", "dpo", "robust", "ipo", "nca", "dpo_sft", "simpo")
SMOOTHING, SFT_WEIGHT, GAMMA = 0.2, 0.5, 0.3


def make_trainer(args: argparse.Namespace) -> Any:
    """Return TRL's trainer of the loss; `--batch-size` counts rows, two per pair."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    settings: dict[str, Any] = {
        "output_dir": str(args.out / "model"),
        "max_steps": args.max_steps,
        "max_length": args.max_length,
        "learning_rate": args.learning_rate,
        "beta": args.beta,
        "seed": args.seed,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    }
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    shared = {"train_dataset": Dataset.from_list(rows), "processing_class": AutoTokenizer.from_pretrained(args.model)}
    if args.loss == "apo_zero":
        config = KTOConfig(loss_type="apo_zero_unpaired", per_device_train_batch_size=args.batch_size, **settings)
        return KTOTrainer(model=str(args.model), args=config, **shared)
    # One pair in a micro-batch: TRL averages the likelihood of chosen completions over the tokens of a micro-batch.
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": args.batch_size // 2}
    if args.loss == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        config = CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=GAMMA, **settings)
        return CPOTrainer(model=str(args.model), args=config, **shared)
    losses = {"dpo": ["sigmoid"], "nca": ["nca_pair"], "dpo_sft": ["sigmoid", "sft"]}.get(args.loss, [args.loss])
    config = DPOConfig(
        loss_type=losses, loss_weights=[1.0, SFT_WEIGHT][: len(losses)], label_smoothing=SMOOTHING, **settings
    )
    return DPOTrainer(model=str(args.model), args=config, **shared)


def main() -> None:
    """Train, and write the log of each update to `OUT/steps.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, required=True)
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    for name, kind in (("batch-size", int), ("max-length", int), ("max-steps", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("learning-rate", "beta"):
        parser.add_argument(f"--{name}", type=float, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(args)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    (args.out / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    main()
