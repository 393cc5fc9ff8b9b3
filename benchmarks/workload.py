"""Create the workload of the benchmarks: labelled chat rows, a tokenizer trained on them, a Llama with random weights.

Nothing is downloaded: with a fixed seed the same arguments give the same rows, the same vocabulary and the same
weights on any machine. To look at a workload::

    python benchmarks/workload.py --out /tmp/workload --rows 96
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MAX_WORDS = 360
PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# Contents are stripped so that no token can merge across the line break before a turn: the prompt's tokens are then
# always a prefix of the whole conversation's, which is what both sides need to agree on where a completion starts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ModelShape:
    """The size of a Llama. The default has 41.7M parameters with tied embeddings (58.1M if they were untied).

    Args:
        kv_heads: heads of keys and values; None for as many as there are heads.
    """

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    intermediate: int = 1376
    vocabulary: int = 32_000
    tied: bool = True
    kv_heads: int | None = None


SMALL = ModelShape(hidden=128, layers=4, heads=4, intermediate=352, vocabulary=4096)


@dataclass(frozen=True)
class Workload:
    """The paths of a workload: `data` contains the rows as JSONL, `model` the weights and the tokenizer."""

    data: Path
    model: Path
    num_rows: int
    num_parameters: int
    shape: ModelShape

    def describe(self) -> str:
        """Return one line for the top of a report."""
        embeddings = "tied" if self.shape.tied else "untied"
        return (
            f"{self.num_rows} rows; Llama, {self.num_parameters / 1e6:.1f}M parameters ({self.shape.layers} layers of "
            f"{self.shape.hidden}, vocabulary {self.shape.vocabulary}, {embeddings} embeddings), random weights, float32"
        )


def make_workload(
    directory: Path, *, data: Path | None, num_rows: int | None, shape: ModelShape, seed: int
) -> Workload:
    """Write rows, tokenizer and model under `directory`.

    Args:
        directory: Created if missing; must be empty, so that no earlier file is taken for this run's.
        data: A JSON or JSONL file of labelled chat rows; None generates rows.
        num_rows: Number of rows to use, from the start; None uses all of `data`.
        shape: Size of the model. The tokenizer's vocabulary is at most `shape.vocabulary`; if the text is too
            small to fill it, the model's remaining embeddings are unused but take memory and time.
        seed: Seed of the generated rows and of the weights.

    Raises:
        ValueError: `directory` is not empty, or `data` contains fewer rows than requested or rows that are not
            labelled chat.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; name another directory or remove it")
    rows = synthetic_rows(num_rows or 96, seed=seed) if data is None else read_rows(data, num_rows=num_rows)
    rows_path = write_rows(directory / "feedback.jsonl", rows)
    model_dir = directory / "model"
    tokenizer = train_tokenizer(rows, vocabulary=shape.vocabulary)
    tokenizer.save_pretrained(model_dir)
    num_parameters = save_llama(model_dir, tokenizer, shape=shape, seed=seed)
    return Workload(rows_path, model_dir, len(rows), num_parameters, shape)


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path, *, num_rows: int | None) -> list[Row]:
    """Read the first rows of a JSON list or JSONL file as `prompt` and `completion` messages and a boolean `label`."""
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    if num_rows is not None and len(raw) < num_rows:
        raise ValueError(f"{path} holds {len(raw)} rows, {num_rows} were asked for; give --rows {len(raw)} or fewer")
    return [_as_prompt_and_completion(row, f"{path}, row {i}") for i, row in enumerate(raw[:num_rows])]


def _as_prompt_and_completion(row: Row, where: str) -> Row:
    if not isinstance(row.get("label"), bool):
        raise ValueError(f"{where}: 'label' must be true or false, got {row.get('label')!r}")
    if "messages" in row:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    else:
        prompt, completion = row.get("prompt"), row.get("completion")
    if not (isinstance(prompt, list) and isinstance(completion, list) and prompt and completion):
        raise ValueError(f"{where}: neither 'messages' nor lists of messages under 'prompt' and 'completion'")
    return {"prompt": _turns(prompt), "completion": _turns(completion), "label": row["label"]}


def _turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def synthetic_rows(num_rows: int, *, seed: int) -> list[Row]:
    """Generate chat feedback, see `endless_rows`."""
    return list(itertools.islice(endless_rows(seed=seed), num_rows))


def endless_rows(*, seed: int) -> Iterator[Row]:
    """Generate chat feedback: one to three exchanges, Zipf-like words, long-tailed lengths, half of it desirable.

    A turn's number of words is log-normal: median 50 for the user, 110 for the assistant; a row of more than
    MAX_WORDS is drawn again, so that it fits into 512 tokens. Every two rows have one of each label in random order, so
    that a batch of even size has as many of each.
    """
    rng = random.Random(seed)
    words = lexicon(rng, size=4000)
    weights = [1.0 / (rank + 3) for rank in range(len(words))]
    while True:
        labels = [True, False]
        rng.shuffle(labels)
        for label in labels:
            row = _synthetic_row(rng, words, weights, label)
            while _num_words(row) > MAX_WORDS:
                row = _synthetic_row(rng, words, weights, label)
            yield row


def _num_words(row: Row) -> int:
    return sum(len(message["content"].split()) for message in row["prompt"] + row["completion"])


def _synthetic_row(rng: random.Random, words: list[str], weights: list[float], label: bool) -> Row:
    def turn(role: str, median_words: int) -> dict[str, str]:
        length = max(3, round(median_words * rng.lognormvariate(0.0, 0.7)))
        return {"role": role, "content": sentences(rng, rng.choices(words, weights, k=length))}

    prompt = [turn("user", 50)]
    for _ in range(rng.choice([0, 0, 1, 2])):
        prompt += [turn("assistant", 110), turn("user", 50)]
    return {"prompt": prompt, "completion": [turn("assistant", 110)], "label": label}


def sentences(rng: random.Random, words: list[str]) -> str:
    found = []
    while words:
        length = rng.randint(4, 16)
        sentence, words = words[:length], words[length:]
        found.append(" ".join(sentence).capitalize() + rng.choice([".", ".", ".", "?", "!"]))
    return " ".join(found)


def lexicon(rng: random.Random, *, size: int) -> list[str]:
    syllables = [c + v + e for c in "bcdfghklmnprstvw" for v in "aeiou" for e in ("", "", "n", "r", "s", "t")]
    words: dict[str, None] = {}  # keeps the order in which they were made, unlike a set of strings
    while len(words) < size:
        words["".join(rng.choices(syllables, k=rng.choice([1, 2, 2, 3])))] = None
    return list(words)


def train_tokenizer(rows: list[Row], *, vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer with a ChatML-like template on the text of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (message["content"] for row in rows for message in row["prompt"] + row["completion"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
    )


def save_llama(directory: Path, tokenizer: Any, *, shape: ModelShape, seed: int) -> int:
    """Save a Llama with seeded random float32 weights, and return its number of parameters."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(tokenizer, shape, dtype="float32", positions=4096)).float()
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def llama_config(tokenizer: Any, shape: ModelShape, *, dtype: str, positions: int) -> Any:
    """Return the configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype=dtype,
    )


def add_workload_options(parser: argparse.ArgumentParser, *, rows: int | None) -> None:
    """Add the options that every script with a workload shares."""
    parser.add_argument("--data", type=Path, help="JSON or JSONL of labelled chat rows (default: rows made up here)")
    parser.add_argument(
        "--rows", type=int, default=rows, help=f"use the first N rows (default: {rows or 'all of --data'})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of made-up rows and random weights (default: 0)")


def main() -> None:
    """Write a workload and describe it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_workload_options(parser, rows=None)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--small", action="store_true", help="a model of about a million parameters")
    args = parser.parse_args()
    shape = SMALL if args.small else ModelShape()
    workload = make_workload(args.out, data=args.data, num_rows=args.rows, shape=shape, seed=args.seed)
    print(f"{workload.data}\n{workload.model}\n{workload.describe()}")


if __name__ == "__main__":
    main()
