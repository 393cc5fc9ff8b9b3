"""Train with TRL's KTOTrainer (1.16) from a cache of this project, without a pass over the reference.

    python examples/train_with_trl.py refs/ path/to/base out/

TRL scores references when its trainer is created, on the data set passed to it: here two synthetic rows. They are then
replaced by the real rows, which include their scores. Unlike in this project, z0 is measured over the rows of one
forward pass (`per_device_train_batch_size`), not over the whole batch, and rows are not shuffled.
"""

import sys
from typing import Any

import datasets
import transformers
from trl import KTOConfig, KTOTrainer

import offline_kto as kto


def make_trainer(cache: str, base: str, out: str, **options: Any) -> KTOTrainer:
    """Return TRL's trainer on a cache's rows; `options` are those of `KTOConfig`."""
    placeholder = datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]})
    trainer = KTOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=KTOConfig(output_dir=out, precompute_ref_log_probs=True, train_sampling_strategy="sequential", **options),
        train_dataset=placeholder,
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )
    trainer.train_dataset = kto.to_trl(cache)
    return trainer


if __name__ == "__main__":
    trainer = make_trainer(*sys.argv[1:4])
    trainer.train()
    trainer.save_model()
