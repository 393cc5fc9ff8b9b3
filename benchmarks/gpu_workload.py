"""Write a workload of the GPU report: a model of a real size with random weights, and chat rows of long-tailed lengths.

A process of its own, so that the memory in which the weights are made is free again for what is measured::

    python benchmarks/gpu_workload.py --size 0.5B --rows 800 --device cuda --out /tmp/workload

Weights are made on the device and saved in bfloat16; nothing is downloaded. The output layer is scaled so that logits
have the spread of a trained model's: with flat logits, rounding errors would look harmless.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from workload import ModelShape, Row, lexicon, llama_config, sentences, train_tokenizer, write_rows

# Standard deviation of the logits.
_SPREAD = 2.5

# Sizes are those of well-known open models.
SIZES = {
    "tiny": ModelShape(64, 2, 4, 176, 1024, tied=True, kv_heads=2),
    "0.5B": ModelShape(896, 24, 14, 4864, 151_936, tied=True, kv_heads=2),
    "1.5B": ModelShape(1536, 28, 12, 8960, 151_936, tied=True, kv_heads=2),
    "8B": ModelShape(4096, 32, 32, 14_336, 128_256, tied=False, kv_heads=8),
}


def layer_weights(shape: ModelShape) -> int:
    """Return how many weights the matrices in all layers have."""
    kv = shape.hidden * (shape.kv_heads or shape.heads) // shape.heads
    return shape.layers * (2 * shape.hidden**2 + 2 * shape.hidden * kv + 3 * shape.hidden * shape.intermediate)


def chat_rows(num_rows: int, *, seed: int, median_words: int, most_words: int) -> list[Row]:
    """Generate labelled chat rows.

    Args:
        median_words: of a row; lengths are log-normal, and 40 % of a row is its prompt.
        most_words: the longest row.
    """
    rng = random.Random(seed)
    words = lexicon(rng, size=4000)
    weights = [1.0 / (rank + 3) for rank in range(len(words))]

    def turn(role: str, count: float) -> list[dict[str, str]]:
        return [{"role": role, "content": sentences(rng, rng.choices(words, weights, k=max(3, round(count))))}]

    rows: list[Row] = []
    for number in range(num_rows):
        length = min(most_words, median_words * rng.lognormvariate(0.0, 0.6))
        prompt, completion = turn("user", 0.4 * length), turn("assistant", 0.6 * length)
        rows.append({"prompt": prompt, "completion": completion, "label": number % 2 == 0})
    return rows


def save_model(folder: Path, rows: list[Row], shape: ModelShape, *, device: str, seed: int = 0) -> None:
    """Save a model with random bfloat16 weights, and a tokenizer trained on the rows."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = train_tokenizer(rows, vocabulary=min(shape.vocabulary, 16_000))
    tokenizer.save_pretrained(folder)
    config = llama_config(tokenizer, shape, dtype="bfloat16", positions=8192)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(_SPREAD / (shape.hidden**0.5 * config.initializer_range))
    model.to("cpu").save_pretrained(folder)


def main() -> None:
    """Write rows and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl and model/")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    median, most = (12, 30) if given.size == "tiny" else (200, 650)
    rows = chat_rows(given.rows, seed=0, median_words=median, most_words=most)
    write_rows(given.out / "rows.jsonl", rows)
    save_model(given.out / "model", rows, SIZES[given.size], device=given.device)


if __name__ == "__main__":
    main()
