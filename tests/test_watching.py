"""The live line on real pseudo-terminals, warnings above it, and the plain lines of everything else."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from tqdm import tqdm

from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.training import Settings, Watch, run_warnings
from offline_kto.train.run.callbacks import Console, MetricsFile, read_metrics
from offline_kto.train.run.train_run import train

SETTINGS = Settings("kto", 0.1, 1e-6, 1.0, 1.0, 100, 100, 1.0)


def log_of(step: int, **changes: Any) -> dict[str, Any]:
    """Return what the Trainer logs after an update."""
    logs = {
        "loss": 0.5 - step / 1000,
        "grad_norm": 1.0,
        "rewards/chosen": step / 100,
        "rewards/rejected": -step / 50,
        "accuracy": 0.75,
        "kl": step / 10,
        "kl_raw": step / 10,
        "tokens_per_second": 12345.6,
        "epoch": step / 100,
    } | changes
    return {name: value for name, value in logs.items() if value is not None}


EVALUATION = {f"eval_{name}": value for name, value in log_of(20).items() if name != "tokens_per_second"}
END = {"train_runtime": 12.3, "train_loss": 0.4, "total_flos": 0}


@dataclass(frozen=True)
class Played:
    """A run for a Console to watch.

    Attributes:
        logs: what the Trainer would log, in order.
        total: updates planned.
        fails: an error ends it.
        pause: seconds between two logs; tqdm draws ten times a second at most.
        nested: another bar is drawn after each log, as `save_pretrained` does.
    """

    logs: list[dict[str, Any]]
    total: int
    fails: bool = False
    pause: float = 0.11
    nested: bool = False

    def show(self) -> None:
        """Call a Console as the Trainer would."""
        console = Console(Watch(SETTINGS))
        state = SimpleNamespace(global_step=0, max_steps=self.total)
        control = SimpleNamespace(should_log=True)
        console.on_train_begin(None, state, control)
        print("start       policy and cache differ by nothing", flush=True)
        for logs in self.logs:
            if "loss" in logs:
                console.on_step_begin(None, state, control)
                state.global_step += 1
                console.on_step_end(None, state, control)
            console.on_log(None, state, control, logs=logs)
            if self.nested:
                for _ in tqdm(range(3), desc="W" * 20):
                    pass
            time.sleep(self.pause)
        if self.fails:
            console.close()
            print("Error: it went wrong", file=sys.stderr, flush=True)
        else:
            console.on_train_end(None, state, control)
            print("wrote       runs/first", flush=True)


def play(run: Played, columns: int, *, resize: dict[int, int] | None = None) -> str:
    """Return what a terminal of so many columns gets from a separate process.

    Args:
        resize: how often the line was drawn when the terminal gets how many columns.
    """
    child, ours = pty.fork()
    if child == 0:
        _show_on_this_terminal(run, columns)
    output, wanted = b"", dict(resize or {})
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        output += piece
        for drawn in [n for n in wanted if output.count(b"\x1b[J") >= n]:
            _set_columns(ours, wanted.pop(drawn))
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0, output.decode()
    return output.decode("utf-8")


def _show_on_this_terminal(run: Played, columns: int) -> NoReturn:
    """In a process that pytest knows nothing of: its standard streams are the terminal."""
    code = 1
    try:
        _set_columns(1, columns)
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        run.show()
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _set_columns(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))


def drawn_lines(output: str) -> list[str]:
    """Every line that was ever on the screen, live ones as often as they were drawn."""
    return [line for line in re.split(r"\r\x1b\[J|\r\n|\r|\n", output) if line]


def screen(output: str) -> list[str]:
    """Return what can be read on a terminal that is wide enough for every line."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        elif piece == "\x1b[A":
            row -= 1
        else:
            assert not piece.startswith("\x1b"), piece
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return lines


class TestLiveLine:
    @pytest.mark.parametrize("columns", [80, 100, 120, 200])
    def test_says_everything_and_fits(self, columns: int) -> None:
        output = play(Played([log_of(step) for step in range(1, 41)] + [END], total=40, pause=0.005), columns)
        assert max(len(line) for line in drawn_lines(output)) < columns
        assert output.endswith("\n")
        live = [line for line in screen(output) if "40/40" in line]
        assert len(live) == 1  # and nothing is left of the ones before
        words = (
            ("loss 0.4600", "kl 4.0000", "desirable +0.400", "undesirable -0.800", "accuracy 75%", "12,346 tokens/s")
            if columns == 200
            else ("loss 0.460", "kl 4.0", "des +0.40", "undes -0.80", "acc 75%", "12.3k tok/s")
        )
        for word in (*words, "00:00"):
            assert word in live[0]
        assert ("|" in live[0]) == (columns > 100)  # a bar where there is room
        assert screen(output)[-4:] == [live[0], "trained     40 updates in 12.3 s", "wrote       runs/first", ""]

    @pytest.mark.parametrize(
        ("columns", "kept", "dropped"),
        [
            (70, ["loss", "kl", "des", "acc", "00:0"], ["tok/s"]),
            (52, ["loss", "kl", "des", "undes", "00:0"], ["acc"]),
            (40, ["loss", "des", "undes"], ["kl"]),
            (20, ["loss"], ["des"]),
            (10, ["4/4"], ["loss"]),
            (4, [], ["4/4"]),
        ],
    )
    def test_a_narrow_terminal_loses_whole_parts_the_least_important_first(
        self, columns: int, kept: list[str], dropped: list[str]
    ) -> None:
        output = play(Played([log_of(step) for step in range(1, 5)], total=4, fails=True), columns)
        lines = screen(output)
        assert lines[0].startswith("start ")
        assert lines[2:] == ["Error: it went wrong", ""]
        assert len(lines[1]) < columns
        for word in kept:
            assert word in lines[1]
        for word in dropped:
            assert word not in lines[1]

    def test_a_terminal_that_does_not_tell_its_width(self) -> None:
        output = play(Played([log_of(step) for step in range(1, 9)], total=8), 0)
        assert max(len(line) for line in drawn_lines(output)) < 80

    def test_follows_the_terminal_when_it_becomes_narrower_and_wider(self) -> None:
        output = play(Played([log_of(step) for step in range(1, 31)], total=30), 200, resize={6: 80, 16: 120})
        live = [len(line) for line in drawn_lines(output) if "/30" in line]
        assert 190 < live[2] < 200
        assert max(live[10:14]) < 80  # no blanks either, which would wrap
        assert 110 < live[-1] < 120
        assert output.endswith("\n")

    def test_evaluations_and_warnings_stand_above_it(self) -> None:
        fast = {"rewards/chosen": 7.0, "rewards/rejected": -9.5}
        logs = [log_of(1), log_of(2, **fast), log_of(3, **fast), EVALUATION, log_of(4, **fast), log_of(5), END]
        output = play(Played(logs, total=5), 80)
        assert max(len(line) for line in drawn_lines(output)) < 80
        lines = screen(output)
        assert lines[0].startswith("start ")
        assert lines[1].startswith("eval        3/5  loss 0.4800  kl 2.0000  desirable +0.200")
        assert lines[2] == "            accuracy 75%"
        assert lines[3].startswith("warning     step 4: undesirable rewards are at -9.5 after 4 updates")
        assert lines[4].startswith(" " * 12)
        assert "--learning-rate 1e-07" in lines[4]
        assert lines[5].startswith("5/5 loss")
        assert len(lines) == 9

    def test_another_bar_in_between_leaves_a_line_of_its_own(self) -> None:
        lines = screen(play(Played([log_of(step) for step in range(1, 4)], total=3, nested=True), 120))
        for line in lines:
            assert ("WWW" in line) + ("loss" in line) + ("start" in line) + ("wrote" in line) <= 1
        assert len([line for line in lines if "loss" in line]) == 1
        assert lines[-2:] == ["wrote       runs/first", ""]

    def test_of_a_loss_without_kl_and_batches_without_a_class(self) -> None:
        bare = {"kl": None, "kl_raw": None, "rewards/rejected": None, "tokens_per_second": None}
        logs = [log_of(step, **bare) for step in range(1, 5)]
        logs.append({"eval_loss": 0.4, "eval_accuracy": 0.5, "epoch": 1.0})
        lines = screen(play(Played([*logs, {"loss": float("nan")}], total=5), 80))
        assert lines[1] == "eval        4/5  loss 0.4000  accuracy 50%"
        assert "loss nan  00:00 left" in lines[2]


class TestPlainLines:
    """Where no one watches: as before there was a live line."""

    @pytest.mark.parametrize("dumb", [False, True], ids=["pipe", "dumb terminal"])
    def test_first_last_and_evaluations(
        self, dumb: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Played([log_of(1), log_of(2), EVALUATION, log_of(3, kl=None), END], total=3, pause=0)
        if dumb:
            monkeypatch.setenv("TERM", "dumb")
            lines = play(run, 200).splitlines()
        else:
            run.show()
            lines = capsys.readouterr().out.splitlines()
        rest = "accuracy 75%  12,346 tokens/s  "
        assert lines[0].startswith("start ")
        assert re.fullmatch(
            rf"step        1/3  loss 0.4990  kl 0.1000  desirable \+0.010  undesirable -0.020  {rest}\d+ s left",
            lines[1],
        )
        assert lines[2:] == [
            "eval        2/3  loss 0.4800  kl 2.0000  desirable +0.200  undesirable -0.400  accuracy 75%",
            f"step        3/3  loss 0.4970  desirable +0.030  undesirable -0.060  {rest}0 s left",
            "trained     3 updates in 12.3 s",
            "wrote       runs/first",
        ]

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            (0, 1, "trained     1 update in 12.3 s"),
            (3, 5, "trained     2 updates (5 in all) in 12.3 s"),
            (5, 5, "trained     no update: all 5 updates had been made in 12.3 s"),
        ],
    )
    def test_the_last_line_counts_the_updates_of_this_process(
        self, before: int, after: int, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        console, control = Console(), SimpleNamespace(should_log=True)
        for step in range(before, after):
            console.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=5), control)
        console.on_log(None, SimpleNamespace(global_step=after, max_steps=5), control, logs=dict(END))
        assert capsys.readouterr().out.splitlines()[-1] == words


class TestWarnings:
    def logs(self) -> list[dict[str, Any]]:
        """Thirty steps whose rewards have run too far at the tenth, and of which three evaluations get worse."""
        found = []
        for step in range(1, 31):
            far = {"rewards/chosen": 6.0} if step > 9 else {}
            found.append(log_of(step, loss=0.5 - step / 100, **far))
            if step in (8, 16, 24):
                found.append({"eval_loss": 0.3 + step / 40})
        return found

    def play(self, out: Path, logs: list[dict[str, Any]], step: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
        """The warnings of a run that has `step` updates behind it."""
        path = out / "metrics.jsonl"
        state = SimpleNamespace(global_step=step, max_steps=30)
        control = SimpleNamespace(should_log=True)
        watchers = [MetricsFile(path), Console(Watch(SETTINGS), path)]
        for watcher in watchers:
            watcher.on_train_begin(None, state, control)
        for log in logs:
            for watcher in watchers:
                if "loss" in log:
                    state.global_step = step + 1
                watcher.on_step_begin(None, state, control)
                watcher.on_log(None, state, control, logs=log)
            step = state.global_step
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    def test_are_told_once_and_are_found_again_in_the_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = self.play(tmp_path, self.logs(), 0, capsys)
        found = run_warnings(read_metrics(tmp_path / "metrics.jsonl"), SETTINGS)
        assert [warning.kind for warning in found] == ["rate-high", "overfitting"]
        assert told == [f"warning     step {warning.step}: {warning.text}" for warning in found]

    def test_are_not_told_again_by_a_resumed_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        logs = self.logs()
        whole = self.play(tmp_path, logs, 0, capsys)
        # Killed after its twentieth update, resumed from a checkpoint at the fifteenth.
        twenty = next(i for i, log in enumerate(logs) if log.get("epoch") == 0.2) + 1
        fifteen = next(i for i, log in enumerate(logs) if log.get("epoch") == 0.15) + 1
        (tmp_path / "metrics.jsonl").unlink()
        before = self.play(tmp_path, logs[:twenty], 0, capsys)
        after = self.play(tmp_path, logs[fifteen:], 15, capsys)
        assert (len(before), len(after)) == (1, 1)
        assert before + after == whole

    def test_a_file_with_a_line_cut_off_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 0.5}\nnonsense\n[]\n{"step": 2, "lo')
        assert read_metrics(path) == [{"step": 1, "loss": 0.5}]


def test_tensorboard_gets_every_metric(cache: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"max_steps": 3, "batch_size": 8, "save_steps": 0, "eval_fraction": 0.3, "device": "cpu"}
    run = train(TrainConfig(cache=cache, out=tmp_path / "run", report_to="tensorboard", **options))
    (events,) = run.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent)).Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/loss", "train/kl", "train/rewards/chosen", "train/accuracy", "eval/loss", "eval/accuracy"} <= tags
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses, rel=1e-5)
