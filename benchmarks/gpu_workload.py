"""Create the workload of the GPU report: models of real sizes with random weights, and chat rows of long-tailed lengths.

Weights are made on the device and saved in bfloat16; nothing is downloaded. The output layer is scaled so that logits
have the spread of a trained model's: with flat logits, rounding errors would look harmless.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import Row, lexicon, sentences, train_tokenizer

# Standard deviation of the logits.
_SPREAD = 2.5


@dataclass(frozen=True)
class ModelSize:
    """The shape of a Llama-like model; sizes are those of well-known open models."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices in all layers."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)

    @property
    def weights(self) -> int:
        """All weights but those of the norms."""
        return self.layer_weights + self.hidden * self.vocabulary * (1 if self.tied else 2)


SIZES = {
    "tiny": ModelSize(64, 2, 4, 2, 176, 1024, True),
    "0.5B": ModelSize(896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": ModelSize(1536, 28, 12, 2, 8960, 151_936, True),
    "8B": ModelSize(4096, 32, 32, 8, 14_336, 128_256, False),
}


def chat_rows(num_rows: int, *, seed: int, median_words: int, most_words: int, answers: int = 1) -> list[Row]:
    """Generate labelled chat rows.

    Args:
        median_words: of a row; lengths are log-normal, and 40 % of a row is its prompt.
        most_words: the longest row.
        answers: consecutive rows that share a prompt.
    """
    rng = random.Random(seed)
    words = lexicon(rng, size=4000)
    weights = [1.0 / (rank + 3) for rank in range(len(words))]

    def text(count: float) -> str:
        return sentences(rng, rng.choices(words, weights, k=max(3, round(count))))

    rows: list[Row] = []
    while len(rows) < num_rows:
        length = min(most_words, median_words * rng.lognormvariate(0.0, 0.6))
        prompt = [{"role": "user", "content": text(0.4 * length)}]
        for number in range(answers):
            completion = [{"role": "assistant", "content": text(0.6 * length)}]
            rows.append({"prompt": prompt, "completion": completion, "label": (len(rows) + number) % 2 == 0})
    return rows[:num_rows]


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(folder: Path, rows: list[Row], size: ModelSize, *, device: str, seed: int = 0) -> Path:
    """Save a model with random bfloat16 weights, and a tokenizer trained on the rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = train_tokenizer(rows, vocabulary=min(size.vocabulary, 16_000))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(_SPREAD / (size.hidden**0.5 * config.initializer_range))
    model.to("cpu").save_pretrained(folder)
    return folder
