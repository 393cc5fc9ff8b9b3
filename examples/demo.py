"""Run the whole pipeline in under three minutes on two CPU cores, without downloads: `make demo`.

A small model learns facts and two ways to reply, courteous and curt. Its own replies are rated with thumbs;
`kto-precompute` and `kto-train` then teach it the courteous way, and questions it has never seen show
whether that worked. The exit code is 1 if it did not. All output goes to examples/out/.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quiz import CLOSERS, OPENERS, Question, courtesy, is_wanted, split_questions

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "examples" / "out"
BASE, FEEDBACK, REFS, RUN = OUT / "base", OUT / "feedback.jsonl", OUT / "refs", OUT / "kto"

HELD_OUT = 240
SHOWN_OF_EACH = 3

# At temperature 1 the base model should give a wanted reply about half of the time, the trained one nearly always.
BEFORE = (0.35, 0.65)
AFTER = 0.85

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # no bars for files of two megabytes
    # One thread: sums, and so replies, do not depend on the number of cores, and no thread waits for a busy core.
    "OMP_NUM_THREADS": "1",
}


class DemoError(Exception):
    """The demo cannot continue, or did not show what it promises; the message is for the user."""


@dataclass(frozen=True)
class Rates:
    """Statistics of a model's replies, one to each question.

    wanted: share that is courteous and states the right fact.
    right: share of the courteous replies that state the right fact.
    courtesies: different pairs of kind opening and kind ending among the courteous replies.
    distinct: different replies.
    """

    wanted: float
    right: float
    courtesies: int
    distinct: int


def main() -> None:
    """Run the demo; exit with 1 and one sentence if it does not show what it promises."""
    parser = argparse.ArgumentParser(description="Thumbs to a better model, in small.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every random choice.  [default: 0]")
    seed = parser.parse_args().seed
    os.environ.update(ENVIRONMENT)
    started = time.monotonic()
    try:
        run_demo(seed)
    except DemoError as error:
        sys.exit(f"\nThe demo failed: {error}")
    say(f"\nDone in {time.monotonic() - started:.0f} s. Model, cache and metrics: {shown_path(OUT)}/")
    say(f"The run as a page, to be opened in any browser: {shown_path(RUN / 'report.html')}")


def run_demo(seed: int) -> None:
    """Run the five steps of the demo."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    seen, held_out = split_questions(held_out=HELD_OUT, seed=seed)

    with act("1/5  A base model that knows its facts, but not its manners"):
        teach(seen, seed)
        before = ask(BASE, held_out, seed + 2)
    rates_before = measure(held_out, before)
    if not BEFORE[0] <= rates_before.wanted <= BEFORE[1]:
        raise DemoError(
            f"the base model gives the wanted reply {rates_before.wanted:.1%} of the time, "
            f"not {BEFORE[0]:.0%} to {BEFORE[1]:.0%}."
        )
    with act("2/5  Thumbs on its own replies"):
        collect_feedback(seen, seed)
    with act("3/5  Score them once under the frozen reference"):
        command("kto-precompute", "--model", BASE, "--data", FEEDBACK, "--out", REFS)
    with act("4/5  Train, with no reference model in sight"):
        say("Expect a warning: for a real checkpoint, taught over many days, this learning rate would be ruinous.")
        say("Our tiny one was taught at 6e-3 a minute ago and gets few updates; it takes large steps well.")
        say("A tenth of the questions is held out from it, to judge by.")
        more = ("--learning-rate", "5e-4", "--epochs", "3", "--eval-fraction", "0.1")
        command("kto-train", "--cache", REFS, "--out", RUN, *more)
    with act(f"5/5  {HELD_OUT} questions that neither stage has seen"):
        after = ask(RUN, held_out, seed + 3)
        rates_after = measure(held_out, after)
        show_replies(held_out, before, after)
        show_rates(rates_before, rates_after)
    if rates_after.wanted < AFTER:
        raise DemoError(f"the wanted reply came {rates_after.wanted:.1%} of the time after training, not {AFTER:.0%}.")


def teach(questions: Sequence[Question], seed: int) -> None:
    """Build the base model, and print its progress."""
    say(f"Teaching a new model {len(questions)} questions; about half of its lessons are courteous, half curt.")
    from tiny_model import build_base_model  # torch takes seconds to import: the headline comes first

    for step, loss in build_base_model(questions, BASE, seed=seed):
        if step == 1 or step % 70 == 0:
            say(f"  step {step:3}  loss {loss:.2f}")


def ask(model: Path, questions: Sequence[Question], seed: int) -> list[str]:
    """Sample one reply to each question."""
    from tiny_model import sample_replies

    return sample_replies(model, questions, seed=seed)


def collect_feedback(questions: Sequence[Question], seed: int) -> None:
    """Sample replies of the base model, rate each with a thumb, and write them to `feedback.jsonl`."""
    from tiny_model import assistant_turn, user_turn

    replies = ask(BASE, questions, seed + 1)
    # A sampled reply is sometimes empty. An empty completion cannot be rated, and kto-precompute rejects it.
    rated = [(question, reply) for question, reply in zip(questions, replies, strict=True) if reply.strip()]
    thumbs = [is_wanted(question, reply) for question, reply in rated]
    with FEEDBACK.open("w", encoding="utf-8") as file:
        for (question, reply), thumb in zip(rated, thumbs, strict=True):
            row = {"prompt": user_turn(question), "completion": assistant_turn(reply), "label": thumb}
            file.write(json.dumps(row) + "\n")
    say(f"A reply to each of these questions, {sum(thumbs)} thumbs up and {len(thumbs) - sum(thumbs)} down. Up means")
    say(f"courteous and right, down is all the rest. Two rows of {shown_path(FEEDBACK)}:")
    for thumb in (True, False):
        question, reply = rated[thumbs.index(thumb)]
        say(f"  {'up  ' if thumb else 'down'}  {question.text}  ->  {reply}")


def command(name: str, *arguments: str | Path) -> None:
    """Print a command as a user would type it in the repository root, and run it there."""
    words = [shown_path(word) if isinstance(word, Path) else word for word in arguments]
    say(f"$ {shlex.join([name, *words])}")
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise DemoError(f"there is no {name} next to {sys.executable}; run `make install` first.")
    code = subprocess.run([program, *words], cwd=ROOT, check=False).returncode
    if code != 0:
        raise DemoError(f"{name} ended with exit code {code}; its own message stands above.")


def measure(questions: Sequence[Question], replies: Sequence[str]) -> Rates:
    """Compute rates over one reply to each question."""
    wanted = [is_wanted(question, reply) for question, reply in zip(questions, replies, strict=True)]
    courtesies = [frame for frame in map(courtesy, replies) if frame]
    return Rates(
        wanted=sum(wanted) / len(wanted),
        right=sum(wanted) / max(len(courtesies), 1),
        courtesies=len(set(courtesies)),
        distinct=len(set(replies)),
    )


def show_replies(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> None:
    """Print the first questions that the base model answered as wanted, and the first that it did not."""
    rows = list(zip(questions, before, after, strict=True))
    for wanted in (True, False):
        say(f"\nThe first {SHOWN_OF_EACH} that the base model answered {'as wanted' if wanted else 'otherwise'}:")
        for question, old, new in [row for row in rows if is_wanted(*row[:2]) is wanted][:SHOWN_OF_EACH]:
            say(f"  {question.text}")
            say(f"    before  {old}")
            say(f"    after   {new}")


def show_rates(before: Rates, after: Rates) -> None:
    """Print the same measures of both models, side by side."""
    say(f"\n  {'':44}before   after")
    say(f"  {'courteous and right':44}{before.wanted:6.1%}  {after.wanted:6.1%}")
    say(f"  {'right, of the courteous replies':44}{before.right:6.1%}  {after.right:6.1%}")
    kinds = len(OPENERS) * len(CLOSERS)
    say(f"  {f'different courtesies, of {kinds}':44}{before.courtesies:6}  {after.courtesies:6}")
    say(f"  {f'different replies, of {HELD_OUT}':44}{before.distinct:6}  {after.distinct:6}")


@contextmanager
def act(title: str) -> Iterator[None]:
    """Print a headline, and afterwards the duration of the block."""
    say(f"\n=== {title}")
    started = time.monotonic()
    yield
    say(f"    ({time.monotonic() - started:.0f} s)")


def shown_path(path: Path) -> str:
    """Return a path relative to the repository root, where the commands run."""
    return path.relative_to(ROOT).as_posix()


def say(line: str) -> None:
    """Print without buffering, so that lines keep their order between those of the commands."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
