"""Compare what training leads to, here and with TRL's KTOTrainer: the share of wanted replies on the demo's task.

    python benchmarks/outcomes_vs_trl.py
    python benchmarks/outcomes_vs_trl.py --seeds 1 --conditions clean      # some minutes

Both sides start from the same base model (0.51 wanted) and get the same feedback, batch of 32 rows, learning rate,
constant schedule, beta and epochs. TRL runs at micro-batches of 4 and of 32 rows: its z0 is that of a micro-batch. Each
side keeps its own order of rows (TRL's is that of the file) and its own mismatched pairs. Outcome: wanted replies to
240 questions that are in no feedback, sampled at temperature 1.

Conditions:

- clean: the thumb is right;
- flipped-20, flipped-40: this share of the labels is flipped;
- few-mixed: of ten desirable rows one is kept, and the class weight is n_U / n_D;
- few-sorted: the same, with the desirable rows at the beginning of the file.

A seed draws the replies, the flips and the order. The exit code of `--check` is 1 if ours is worse than a side of TRL in
any condition, by the 95 % interval of the difference between equal seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import quiz_task
from environments import HERE, add_environment_options, offline_env, prepare_environments
from measured_run import run_measured
from quiz_task import Reply
from text_table import text_table

CONDITIONS = ("clean", "flipped-20", "flipped-40", "few-mixed", "few-sorted")
SIDES = ("ours", "TRL at 4", "TRL at 32")
Shares = dict[tuple[str, int, str], float]


def main() -> None:
    """Train all sides in all conditions, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    quiz_task.add_options(parser, seeds=5)
    add_environment_options(parser)
    options = parser.parse_args()
    with quiz_task.work_folder(options) as work:
        environments = prepare_environments(options.trl_python)
        print(environments.describe(), flush=True)
        print(f"wanted before training: {quiz_task.wanted_share(work / 'base'):.3f}", flush=True)
        arguments = [
            (condition, seed, side)
            for seed in range(options.seeds)
            for condition in options.conditions
            for side in SIDES
        ]
        jobs = {key: (outcome, (*key, work, environments.trl_python)) for key in arguments}
        shares = quiz_task.run_all(jobs, at_a_time=options.jobs)
    print(f"\nwanted replies, mean of {options.seeds} seeds with its 95 % interval\n{table(shares, options)}")
    print(f"\nours minus TRL, same seed\n{differences_table(shares, options)}")
    if options.check and any(is_worse(shares, options, one) for one in options.conditions):
        sys.exit("failed: ours is worse than TRL in a condition, beyond the spread of the seeds")


def outcome(condition: str, seed: int, side: str, work: Path, trl_python: Path) -> float:
    """Train one side, and return its share of wanted replies; a result that exists already is read."""
    out = work / f"{condition}-{seed}-{side.replace(' ', '-')}"
    found = out / "wanted.json"
    if not found.exists():
        rows, weight = feedback(work / "base", condition, seed)
        data = quiz_task.write_rows(out / "feedback.jsonl", rows)
        train = train_ours if side == "ours" else train_trl
        model = train(work / "base", data, out, seed=seed, weight=weight, side=side, trl_python=trl_python)
        found.write_text(json.dumps(quiz_task.wanted_share(model)), encoding="utf-8")
    share: float = json.loads(found.read_text(encoding="utf-8"))
    return share


def feedback(base: Path, condition: str, seed: int) -> tuple[list[dict[str, object]], float]:
    """Return the records of a condition, and the class weight of desirable rows."""
    draw = random.Random(seed)
    replies = quiz_task.draw_replies(base, seed)
    if condition.startswith("flipped"):
        share = int(condition.removeprefix("flipped-")) / 100
        flipped = set(draw.sample(range(len(replies)), round(share * len(replies))))
        return [reply.row(label=reply.wanted ^ (i in flipped)) for i, reply in enumerate(replies)], 1.0
    if condition.startswith("few"):
        replies, weight = one_desirable_of_ten(replies, draw)
        if condition == "few-sorted":
            replies.sort(key=lambda reply: not reply.wanted)
        return [reply.row(label=reply.wanted) for reply in replies], weight
    return [reply.row(label=reply.wanted) for reply in replies], 1.0


def one_desirable_of_ten(replies: Sequence[Reply], draw: random.Random) -> tuple[list[Reply], float]:
    """Return all undesirable and a tenth of the desirable replies in their order, and n_U / n_D."""
    desirable = [reply for reply in replies if reply.wanted]
    kept = set(map(id, draw.sample(desirable, len(desirable) // 10)))
    rest = [reply for reply in replies if not reply.wanted or id(reply) in kept]
    return rest, (len(rest) - len(kept)) / len(kept)


def train_ours(base: Path, data: Path, out: Path, *, seed: int, weight: float, side: str, trl_python: Path) -> Path:
    """Train with this project, and return the model's folder."""
    return quiz_task.train_ours(
        base, data, out, scoring={"seed": seed}, training={"seed": seed, "desirable_weight": weight}
    )


def train_trl(base: Path, data: Path, out: Path, *, seed: int, weight: float, side: str, trl_python: Path) -> Path:
    """Train with TRL, and return the model's folder."""
    command: list[str | Path] = [trl_python, HERE / "trl_kto.py", "--model", base, "--data", data, "--out", out]
    settings: Mapping[str, object] = {
        "--batch-size": quiz_task.BATCH_SIZE,
        "--rows-a-pass": side.rsplit(maxsplit=1)[1],
        "--learning-rate": quiz_task.LEARNING_RATE,
        "--epochs": quiz_task.EPOCHS,
        "--seed": seed,
        "--desirable-weight": weight,
    }
    command += [str(word) for setting in settings.items() for word in setting]
    run_measured(command, log=out / "log.txt", env={**quiz_task.ENVIRONMENT, **offline_env(out)})
    return out / "model"


def table(shares: Shares, options: argparse.Namespace) -> str:
    """Return the shares by condition and side."""
    rows = [
        [one, *(quiz_task.shown(of_side(shares, options, one, side)) for side in SIDES)] for one in options.conditions
    ]
    return text_table(["condition", *SIDES], rows)


def differences_table(shares: Shares, options: argparse.Namespace) -> str:
    """Return the differences between equal seeds, and the lowest share of each side."""
    rows = []
    for one in options.conditions:
        lowest = " ".join(f"{min(of_side(shares, options, one, side)):.2f}" for side in SIDES)
        rows.append([one, *(quiz_task.shown(d, sign="+") for d in differences(shares, options, one)), lowest])
    return text_table(["condition", *SIDES[1:], "lowest of each side"], rows)


def of_side(shares: Shares, options: argparse.Namespace, condition: str, side: str) -> list[float]:
    """Return the shares of all seeds."""
    return [shares[condition, seed, side] for seed in range(options.seeds)]


def differences(shares: Shares, options: argparse.Namespace, condition: str) -> list[list[float]]:
    """Return ours minus each side of TRL, for each seed."""
    ours = of_side(shares, options, condition, "ours")
    return [
        [mine - other for mine, other in zip(ours, of_side(shares, options, condition, side), strict=True)]
        for side in SIDES[1:]
    ]


def is_worse(shares: Shares, options: argparse.Namespace, condition: str) -> bool:
    """Return whether ours is below a side of TRL, by the interval of the difference."""
    return any(quiz_task.interval(values)[1] < 0 for values in differences(shares, options, condition))


if __name__ == "__main__":
    main()
