"""Measure what sharing a pair's prompt in the gradient pass saves: the same update in both ways, in turns.

    python benchmarks/shared_gradients.py
    python benchmarks/shared_gradients.py --quick        # a tiny model, as a quick test

One update of `dpo` with AdamW, all weights, without gradient checkpointing: synthetic pairs, random ids. Each line: the
lengths, which share of all tokens runs once, the median over the rounds of shared / apart (time on the clock, and CPU
time), and the largest difference of a weight's gradient as a share of its norm. CPU, float32, one process; the
comparison of both ways that a run begins with is not part of the time. The program ends with status 1 if prompts of 300
to 600 tokens take more than 0.75 of the time, or gradients differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import accelerate
import numpy as np
import torch
import transformers
from text_table import text_table
from workload import SMALL, ModelShape, save_llama, synthetic_rows, train_tokenizer

import offline_kto.train.trainer.prompt_sharing
from offline_kto.kto_core.judgements import ONE_BIT
from offline_kto.kto_core.losses.metrics import Tokens
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.sequences import tokens_of_shared
from offline_kto.train.data.cache_rows import TrainingRow
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.ranks import Ranks
from offline_kto.train.trainer.reference_point import ReferencePoint

ALWAYS, NEVER = -1.0, 2.0
MOST_TIME, MOST_APART = 0.75, 1e-4


class Lengths(NamedTuple):
    """The fewest and the most tokens of prompts and of completions."""

    prompts: tuple[int, int]
    completions: tuple[int, int]


LONG = Lengths((300, 600), (60, 100))
CASES = (LONG, Lengths((70, 130), (70, 130)), Lengths((20, 40), (70, 130)))


def make_rows(lengths: Lengths, pairs: int, vocabulary: int) -> list[TrainingRow]:
    """Return pairs, the desirable row first; the reference's scores do not matter for the time."""
    random = np.random.default_rng(1)

    def ids(bounds: tuple[int, int]) -> np.ndarray:
        return random.integers(3, vocabulary, random.integers(bounds[0], bounds[1] + 1)).astype(np.int32)

    rows = []
    for _ in range(pairs):
        prompt = ids(lengths.prompts)
        for good in (True, False):
            completion = ids(lengths.completions)
            scores = np.full(len(completion), -8.0, dtype=np.float32)
            row = ScoredSequence(prompt, completion, float(scores.sum()), scores)
            rows.append(TrainingRow(len(rows), str(len(rows)), ONE_BIT[good], row, row))
    return rows


class Update:
    """One update, which can share prompts or not."""

    def __init__(self, model: torch.nn.Module, *, max_tokens: int) -> None:
        accelerator = accelerate.Accelerator(cpu=True)
        ranks = Ranks(accelerator, sharded=False)
        self.model = model
        policy = PreparedPolicy(model, torch.device("cpu"), ranks=ranks, max_tokens=max_tokens, rounding=2e-4)
        self.passes = GradientPasses(policy, Objective("dpo", 0.1), accelerator)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        self.start = ReferencePoint(policy.zero(), {}, Tokens(0, 0, 0))

    def run(self, rows: list[TrainingRow], worth: float) -> tuple[float, float]:
        """Make the update, sharing always or never; return its seconds on the clock and of CPU time."""
        offline_kto.train.trainer.prompt_sharing.WORTH_SHARING = worth
        started, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        self.passes.run(rows, self.start, step=1)
        self.optimizer.step()
        return time.perf_counter() - started, time.process_time() - cpu

    def gradients(self, rows: list[TrainingRow], worth: float) -> list[torch.Tensor]:
        """Return the gradients of all weights."""
        self.run(rows, worth)
        return [weight.grad.clone() for weight in self.model.parameters()]


def main() -> None:
    """Measure each case and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 1.3M parameters, few pairs")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--pairs", type=int, help="in an update; default: 8, with --quick 2")
    parser.add_argument(
        "--threads", type=int, help="of torch; 1 disturbs least where other programs run; default: torch's"
    )
    parser.add_argument("--long-only", action="store_true", help="only prompts of 300 to 600 tokens")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, pairs = (SMALL, args.pairs or 2) if args.quick else (ModelShape(), args.pairs or 8)
    with tempfile.TemporaryDirectory() as temporary:
        save_llama(Path(temporary), train_tokenizer(synthetic_rows(16, seed=0), vocabulary=1000), shape=shape, seed=0)
        model = load_causal_lm(
            transformers.AutoModelForCausalLM,
            Path(temporary),
            precision=Precision(torch.float32),
            device=torch.device("cpu"),
            frozen=False,
        )
    update, table, failed = Update(model, max_tokens=4096), [], False
    for case in CASES[:1] if args.long_only else CASES:
        rows = make_rows(case, pairs, shape.vocabulary)
        both = [update.gradients(rows, worth) for worth in (NEVER, ALWAYS)]  # also the first runs, which are slower
        apart = max(float((one - other).norm() / one.norm()) for one, other in zip(*both, strict=True))
        ratios = []
        for number in range(args.rounds):
            order = (ALWAYS, NEVER) if number % 2 else (NEVER, ALWAYS)
            found = {worth: update.run(rows, worth) for worth in order}
            ratios.append([shared / plain for shared, plain in zip(found[ALWAYS], found[NEVER], strict=True)])
        clock, cpu = ([ratio[k] for ratio in ratios] for k in (0, 1))
        units = [[row.matched.ids for row in rows[i : i + 2]] for i in range(0, len(rows), 2)]
        saved = 1 - sum(map(tokens_of_shared, units)) / sum(len(row.matched) for row in rows)
        bounds = ["{} to {}".format(*part) for part in case]
        times = [
            f"{statistics.median(clock):.2f}",
            f"{min(clock):.2f} to {max(clock):.2f}",
            f"{statistics.median(cpu):.2f}",
        ]
        table.append([*bounds, f"{saved:.0%}", *times, f"{apart:.1e}"])
        failed |= apart > MOST_APART or (case is LONG and statistics.median(clock) > MOST_TIME)
        print(table[-1], flush=True)
    head = [
        "prompts",
        "completions",
        "tokens saved",
        "shared / apart, time",
        "range",
        "CPU time",
        "gradients differ by",
    ]
    print(text_table(head, table))
    sys.exit(failed)


if __name__ == "__main__":
    main()
