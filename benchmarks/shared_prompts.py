"""Measure from which share of saved tokens on shared prompts pay off, by scoring the same rows in both ways in turns.

    python benchmarks/shared_prompts.py
    python benchmarks/shared_prompts.py --quick        # a tiny model, as a quick test

Synthetic rows of about 300 tokens, random ids; two completions for each prompt, whose length decides the share of all
tokens that running a prompt once saves. Each line: the median over the rounds of shared / plain time, and the extremes.
CPU, float32, one process; the comparison of both ways that a real run begins with is not part of the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from text_table import text_table
from workload import SMALL, ModelShape, save_llama, synthetic_rows, train_tokenizer

import offline_kto.kto_core.scoring.passes
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.kto_core.scoring.sequences import TokenIds

SAVED = (0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
TOKENS, SPREAD = 300, 0.4
ALWAYS, NEVER = -1.0, 1.0


def make_rows(saved: float, count: int, vocabulary: int, seed: int) -> list[TokenIds]:
    """Return pairs of rows with a common prompt, such that running it once saves this share of all tokens."""
    random = np.random.default_rng(seed)

    def ids(mean: float) -> np.ndarray:
        length = max(1, round(mean * random.uniform(1 - SPREAD, 1 + SPREAD)))
        return random.integers(3, vocabulary, length).astype(np.int32)

    prompts = [ids(2 * saved * TOKENS) for _ in range(count // 2)]
    return [(prompt, ids((1 - 2 * saved) * TOKENS)) for prompt in prompts for _ in range(2)]


def seconds(passes: ScoringPasses, rows: list[TokenIds], worth: float) -> float:
    """Score all rows, sharing always or never, and return the duration."""
    offline_kto.kto_core.scoring.passes.WORTH_SHARING = worth
    started = time.perf_counter()
    for _ in passes.run(rows):
        pass
    return time.perf_counter() - started


def main() -> None:
    """Measure each share and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 1.3M parameters, few rows")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    args = parser.parse_args()
    shape, count = (SMALL, 16) if args.quick else (ModelShape(), 48)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        save_llama(Path(temporary), train_tokenizer(synthetic_rows(16, seed=0), vocabulary=1000), shape=shape, seed=0)
        model = load_causal_lm(
            transformers.AutoModelForCausalLM,
            Path(temporary),
            precision=Precision(torch.float32),
            device=cpu,
            frozen=True,
        )
    passes = ScoringPasses(model, cpu, max_tokens=4096)
    table = []
    for saved in SAVED:
        rows = make_rows(saved, count, shape.vocabulary, seed=1)
        whole = sum(len(x) + len(y) for x, y in rows)
        share = sum(len(x) for x, _ in rows[::2]) / whole
        seconds(passes, rows, ALWAYS)  # the first run compares both ways
        ratios = []
        for number in range(args.rounds):
            order = (ALWAYS, NEVER) if number % 2 else (NEVER, ALWAYS)
            found = {worth: seconds(passes, rows, worth) for worth in order}
            ratios.append(found[ALWAYS] / found[NEVER])
        table.append([f"{share:.0%}", *(f"{f(ratios):.2f}" for f in (statistics.median, min, max))])
        print(table[-1], flush=True)
    print(text_table(["tokens saved", "shared / plain, time", "least", "most"], table))


if __name__ == "__main__":
    main()
