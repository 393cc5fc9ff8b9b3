"""Render the table of docs/gpu.md: what training models of usual sizes takes, by recipe."""

import re
from typing import Any

import torch
import transformers

from offline_kto.train.model.memory_by_recipe import needs_of, size_of
from offline_kto.train.run.memory_table import tokens_cell

# Published shapes: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied.
_SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (3072, 8192, 28, 24, 8, 128_256, True),
    "8B": (4096, 14336, 32, 32, 8, 128_256, False),
    "14B": (5120, 13824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False),
    "70B": (8192, 28672, 80, 64, 8, 128_256, False),
}
_CARDS = (24, 80)


def _size(shape: tuple[Any, ...]) -> Any:
    hidden, intermediate, layers, heads, keys, vocabulary, tied = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return size_of(transformers.AutoModelForCausalLM.from_config(config))


def recipes_table() -> str:
    """Return a Markdown table: bytes and tokens of a pass by model and recipe."""
    columns = ["model", "recipe", "GB", "KiB a token", "checkpointed", *(f"tokens in {card} GB" for card in _CARDS)]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for name, shape in _SHAPES.items():
        for need in needs_of(_size(shape)):
            numbers = [f"{need.resident / 1e9:,.1f}", f"{need.token / 1024:,.0f}", f"{need.checkpointed / 1024:,.0f}"]
            numbers += [tokens_cell(need, card * 1e9) for card in _CARDS]
            recipe = re.sub(r"(--[a-z-]+ \w+)", r"`\1`", need.recipe)
            lines.append(f"| {name} | {recipe} | {' | '.join(numbers)} |")
    return "\n".join(lines)
