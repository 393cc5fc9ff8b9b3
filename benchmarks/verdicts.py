"""Count the verdicts of runs whose end is known, on the demo's task.

    python benchmarks/verdicts.py --check
    python benchmarks/verdicts.py --seeds 2 --cases demo      # a minute

Cases:

- demo: the demo's settings; better;
- no rate: a learning rate of 0; no difference;
- shuffled: the same rows with their labels shuffled; no difference, or worse;
- rate x 100: 100 times the demo's learning rate; worse.

Each of the 20 seeds draws its replies, labels, hold-out and order. `--check` asks for the expected verdict in all seeds of
the first case and in 19 of 20 of the others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import quiz_task
from text_table import text_table

CASES = ("demo", "no rate", "shuffled", "rate x 100")
EXPECTED = {
    "demo": {"better"},
    "no rate": {"no difference"},
    "shuffled": {"no difference", "worse"},
    "rate x 100": {"worse"},
}
RATES = {"no rate": 0.0, "rate x 100": 100 * quiz_task.LEARNING_RATE}
OUTCOMES = ("better", "no difference", "worse")


def main() -> None:
    """Run all cases and seeds, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    quiz_task.add_options(parser, seeds=20)
    options = parser.parse_args()
    with quiz_task.work_folder(options) as work:
        jobs = {(case, seed): (verdict, (case, seed, work)) for seed in range(options.seeds) for case in options.cases}
        found = quiz_task.run_all(jobs, at_a_time=options.jobs)
    counts = {case: Counter(found[case, seed] for seed in range(options.seeds)) for case in options.cases}
    rows = [[case, *(str(counts[case][outcome]) for outcome in OUTCOMES)] for case in options.cases]
    print(f"\nverdicts of {options.seeds} seeds\n{text_table(['case', *OUTCOMES], rows)}")
    if options.check and not all(is_met(case, counts[case]) for case in options.cases):
        sys.exit("failed: too few verdicts are the expected one")


def verdict(case: str, seed: int, work: Path) -> str:
    """Train once, and return the verdict; a run that exists already is read."""
    out = work / f"{case.replace(' ', '-')}-{seed}"
    evaluation = out / "run" / "evaluation.json"
    if not evaluation.exists():
        replies = quiz_task.draw_replies(work / "base", seed)
        labels = [reply.wanted for reply in replies]
        if case == "shuffled":
            random.Random(seed).shuffle(labels)
        rows = [reply.row(label=label) for reply, label in zip(replies, labels, strict=True)]
        quiz_task.train_ours(
            work / "base",
            quiz_task.write_rows(out / "feedback.jsonl", rows),
            out,
            scoring={"seed": seed},
            training={
                "seed": seed,
                "eval_fraction": 0.1,
                "samples": 0,
                "learning_rate": RATES.get(case, quiz_task.LEARNING_RATE),
            },
        )
    outcome: str = json.loads(evaluation.read_text(encoding="utf-8"))["verdict"]["outcome"]
    return outcome


def is_met(case: str, counts: Counter[str]) -> bool:
    """Return whether enough verdicts are the expected one: all of the demo's, 19 of 20 of the others."""
    met = sum(counts[outcome] for outcome in EXPECTED[case])
    return met >= (counts.total() if case == "demo" else math.ceil(0.95 * counts.total()))


if __name__ == "__main__":
    main()
