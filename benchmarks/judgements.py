"""Compare what one noisy label, the majority of five and the share of five votes teach, on the demo's task.

    python benchmarks/judgements.py
    python benchmarks/judgements.py --seeds 1 --noise 40      # some minutes

Five raters judge each reply; each of them is wrong about a reply with the same probability, independently. A reply is
trained on with one rater's label (one), the label of the majority (majority), or the masses of all votes (share:
`--votes share`). The number of rows differs, the number of updates does not, so that rows differ in information alone.
Outcome: wanted replies to 240 questions that are in no feedback, sampled at temperature 1 (before training: 0.5).

A seed draws replies, votes and rows. `--check`: votes are not below the majority's labels of as many rows, by the 95 %
interval of the difference between equal seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import quiz_task
from quiz_task import Reply
from text_table import text_table

RATERS = 5
KINDS = ("one", "majority", "share")
SHARES_OF_ROWS = (0.25, 0.5, 1.0)
UPDATES = 100
Shares = dict[tuple[int, str, float, int], float]


def main() -> None:
    """Train on all kinds of labels, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=int, nargs="+", default=(0, 20, 40), help="wrong votes, percent")
    quiz_task.add_options(parser, seeds=5)
    options = parser.parse_args()
    with quiz_task.work_folder(options) as work:
        keys = [
            (noise, kind, part, seed)
            for seed in range(options.seeds)
            for noise in options.noise
            for part in SHARES_OF_ROWS
            for kind in (KINDS if noise else KINDS[:1])  # without noise, the three are one bit
        ]
        shares = quiz_task.run_all({key: (outcome, (*key, work)) for key in keys}, at_a_time=options.jobs)
    print(f"\nwanted replies, mean of {options.seeds} seeds with its 95 % interval; {UPDATES} updates")
    print(table(shares, options))
    noisy = [noise for noise in options.noise if noise]
    print(f"\nshare minus majority, same seed\n{differences_table(shares, options, noisy)}")
    if options.check and not all(holds(shares, options, noise) for noise in noisy):
        sys.exit("failed: see the table above")


def outcome(noise: int, kind: str, part: float, seed: int, work: Path) -> float:
    """Train once, and return the share of wanted replies; a result that exists already is read."""
    out = work / f"noise-{noise}-{kind}-{part}-{seed}"
    found = out / "wanted.json"
    if not found.exists():
        draw = random.Random(seed)  # the same rows and votes for all kinds
        replies = quiz_task.draw_replies(work / "base", seed)
        draw.shuffle(replies)
        rows = [judged(reply, kind, noise, draw) for reply in replies]
        data = quiz_task.write_rows(out / "feedback.jsonl", rows[: round(part * len(rows))])
        model = quiz_task.train_ours(
            work / "base",
            data,
            out,
            scoring={"seed": seed},
            training={"seed": seed, "epochs": 1e3, "max_steps": UPDATES},
        )
        found.write_text(json.dumps(quiz_task.wanted_share(model)), encoding="utf-8")
    share: float = json.loads(found.read_text(encoding="utf-8"))
    return share


def judged(reply: Reply, kind: str, noise: int, draw: random.Random) -> dict[str, object]:
    """Return a record with one label, the majority's, or the votes."""
    votes = [reply.wanted ^ (draw.random() < noise / 100) for _ in range(RATERS)]
    up = sum(votes)
    if kind == "one":
        return reply.row(label=votes[0])
    if kind == "majority":
        return reply.row(label=2 * up > RATERS)
    return reply.row(up=up, down=RATERS - up)


def table(shares: Shares, options: argparse.Namespace) -> str:
    """Return the shares by noise, rows and kind."""
    rows = []
    for noise in options.noise:
        for part in SHARES_OF_ROWS:
            kinds = KINDS if noise else KINDS[:1]
            cells = [quiz_task.shown(of_seeds(shares, options, noise, kind, part)) for kind in kinds]
            rows.append([f"{noise} % wrong", f"{part:.0%}", *cells, *[""] * (len(KINDS) - len(kinds))])
    return text_table(["votes", "rows", *KINDS], rows)


def differences_table(shares: Shares, options: argparse.Namespace, noisy: list[int]) -> str:
    """Return the share's outcome minus the majority's of as many rows, and of twice as many."""
    rows = []
    for noise in noisy:
        for part in SHARES_OF_ROWS:
            twice = quiz_task.shown(difference(shares, options, noise, part, 2 * part), sign="+") if part < 1 else ""
            rows.append(
                [
                    f"{noise} % wrong",
                    f"{part:.0%}",
                    quiz_task.shown(difference(shares, options, noise, part, part), sign="+"),
                    twice,
                ]
            )
    return text_table(["votes", "rows", "majority of as many rows", "majority of twice as many rows"], rows)


def of_seeds(shares: Shares, options: argparse.Namespace, noise: int, kind: str, part: float) -> list[float]:
    """Return the shares of all seeds."""
    return [shares[noise, kind, part, seed] for seed in range(options.seeds)]


def difference(shares: Shares, options: argparse.Namespace, noise: int, part: float, other: float) -> list[float]:
    """Return, by seed, the outcome of votes on `part` of the rows minus that of majority labels on `other`."""
    votes = of_seeds(shares, options, noise, "share", part)
    labels = of_seeds(shares, options, noise, "majority", other)
    return [mine - theirs for mine, theirs in zip(votes, labels, strict=True)]


def holds(shares: Shares, options: argparse.Namespace, noise: int) -> bool:
    """Return whether votes are not below the majority of as many rows, in the interval of the difference."""
    return all(quiz_task.interval(difference(shares, options, noise, part, part))[1] >= 0 for part in SHARES_OF_ROWS)


if __name__ == "__main__":
    main()
