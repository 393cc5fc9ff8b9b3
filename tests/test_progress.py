"""Rate and time left, which are those of the work and not of what came before it."""

import pytest

from offline_kto.kto_core import progress
from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.progress import Progress


def test_rate_and_time_left_are_those_since_the_first_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with shown_lines(), Progress("scoring", 1000, "tokens") as bar:
        bar.note("workers: 2 ready")
        bar.skip(100)  # of an earlier run
        for now[0], count in ((300.0, 100), (301.0, 50), (310.0, 150), (311.0, 1), (320.0, 99)):
            bar.add(count)
    assert capsys.readouterr().out.splitlines() == [
        "scoring: 20%, workers: 2 ready",
        "scoring: 40%, 20 tokens/s, 30 s left, workers: 2 ready",
        "scoring: 50%, 15 tokens/s, 33 s left, workers: 2 ready",
    ]


def test_words_are_told_while_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with shown_lines(), Progress("scoring", 1000, "tokens") as bar:
        for now[0] in (1.0, 9.0, 10.0, 20.0, 30.0, 300.0):
            bar.note("workers: 0 ready")
        now[0] = 301.0
        bar.note("workers: 1 ready")
        now[0] = 310.0
        bar.note("workers: 1 ready")
    assert capsys.readouterr().out.splitlines() == ["scoring: 0%, workers: 0 ready", "scoring: 0%, workers: 1 ready"]
