"""Ctrl-C and the SIGTERM of schedulers: exit codes, and one message for all processes of a launch."""

import os
import signal

import pytest
from click.testing import CliRunner

import offline_kto.precompute.run
from offline_kto.precompute.cli import precompute


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_command(number: int, code: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", str(rank)), ("LOCAL_RANK", str(rank))):
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(offline_kto.precompute.run, "precompute", lambda config, **_: os.kill(os.getpid(), number))
    try:
        done = CliRunner().invoke(precompute, ["--model", "base", "--data", "f.jsonl"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert done.exit_code == code
    assert ("Interrupted" in done.output) == (rank == 0)
