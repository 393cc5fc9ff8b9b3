"""Stage 1 in several processes: real ranks over gloo, killed with real signals."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feedback_files import write_feedback
from offline_kto.precompute.engines.shares import divide
from safetensors.torch import load_file

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import verify
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train

SCORE = "from offline_kto.precompute.cli import precompute; precompute()"


def torchrun(ranks: int, program: str, *options: object) -> subprocess.CompletedProcess[str]:
    """The real launcher, whose ranks are fresh interpreters that import everything."""
    launcher = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    command = ["--nproc_per_node", ranks, "--standalone", "--no-python", sys.executable, "-c", program, *options]
    return forks.run(launcher, *command, timeout=300)


def scoring(config: PrecomputeConfig, out: Path) -> list[object]:
    rows = ["--rows-per-shard", config.rows_per_shard]
    return ["--model", config.model, "--data", config.data, "--out", out, "--device", "cpu", *rows]


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def assert_same_rows(one: Path, other: Path) -> None:
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert a["row_id"] == b["row_id"]
        np.testing.assert_allclose(a["ref_token_logps"], b["ref_token_logps"], atol=1e-5)
        np.testing.assert_allclose(a["ref_kl_token_logps"][0], b["ref_kl_token_logps"][0], atol=1e-5)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, base: Path) -> PrecomputeConfig:
    """Scored by one process into `config.out`."""
    folder = tmp_path_factory.mktemp("ranks")
    data = write_feedback(folder / "f.jsonl", 60, seed=5)
    config = PrecomputeConfig(model=str(base), data=str(data), out=folder / "one", rows_per_shard=25)
    precompute(config)
    return config


@pytest.mark.slow
def test_four_ranks_score_what_one_scores(config: PrecomputeConfig, tmp_path: Path) -> None:
    four = tmp_path / "four"
    done = forks.run(SCORE, *scoring(config, four), ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "scored with transformers (--device cpu), 4 processes" in done.stdout
    assert_same_rows(config.out, four)
    ones, fours = read_manifest(config.out), read_manifest(four)
    assert fours.fingerprint == ones.fingerprint
    for name in ("scored_sequences", "tokens"):  # each sequence once
        assert fours.run[name] == ones.run[name]
    verify(four)

    settings = TrainConfig(
        cache=config.out, out=tmp_path / "a", batch_size=8, max_steps=3, learning_rate=3e-3, save_steps=0
    )
    a, b = (
        load_file(train(one) / "model.safetensors")
        for one in (settings, replace(settings, cache=four, out=tmp_path / "b"))
    )
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_leaves_a_cache_that_others_finish(
    config: PrecomputeConfig, tmp_path: Path, killed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "refs"
    slowly = (
        "import time; from offline_kto.precompute.engines.transformers_scorer import TransformersScorer as T; real = T.score\n"
        "def score(*a, **k):\n    time.sleep(1)\n    return real(*a, **k)\nT.score = score\n"
    )
    options = scoring(replace(config, rows_per_shard=6), out)
    launch = forks.Fork(slowly + SCORE, *options, ranks=2)
    deadline = time.monotonic() + 100
    while len(list(out.glob("train/[!.]*.parquet"))) < 3:
        assert time.monotonic() < deadline
        assert launch.is_running()
        time.sleep(0.02)
    launch.kill(killed)
    assert launch.wait(60).returncode != 0  # the launcher ends the other rank, or its closed connection does
    finished = len(list(out.glob("train/[!.]*.parquet")))
    assert 3 <= finished < 10
    assert not (out / "manifest.json").exists()

    if killed == 0:  # three others go on
        done = forks.run(SCORE, *options, ranks=3)
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
    else:  # one does
        precompute(replace(config, rows_per_shard=6, out=out, device="cpu"))
        said = capsys.readouterr().out
    assert f"{finished} of 10 shards are complete" in said
    verify(out)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train"]
    assert_same_rows(config.out, out)


@pytest.mark.slow
def test_a_mistake_is_one_message_and_the_others_leave_quietly(config: PrecomputeConfig, tmp_path: Path) -> None:
    done = torchrun(3, SCORE, *scoring(replace(config, data=str(tmp_path / "none.jsonl")), tmp_path / "refs"))
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")] == [
        f"Error: {tmp_path / 'none.jsonl'}: no such file. Check the path."
    ]
    # The launcher's own report is a traceback of its own; ours has none.
    assert "precompute/" not in done.stderr


def test_what_another_rank_cannot_do_is_told_once(config: PrecomputeConfig, tmp_path: Path) -> None:
    failing = (
        "import os, torch; from offline_kto.kto_core.scoring.passes import ScoringPasses as P; real = P._forward\n"
        "def forward(*a):\n    if os.environ['RANK'] == '1': raise torch.OutOfMemoryError('simulated')\n"
        "    return real(*a)\nP._forward = forward\n"
    )
    done = forks.run(failing + SCORE, *scoring(config, tmp_path / "refs"), ranks=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Out of memory on a single sequence" in errors[0]


def test_ranks_without_their_launcher_are_told_so(
    config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_kto.kto_core.errors import ModelError

    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError, match="or unset WORLD_SIZE"):
        precompute(replace(config, out=tmp_path / "refs"))


def test_sequences_of_one_prompt_stay_together() -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 9, int(random.integers(1, 30))).astype(np.int32) for _ in range(20)]
    sequences = [(prompts[i % 20], np.arange(random.integers(1, 30), dtype=np.int32)) for i in range(60)]
    for ranks in (1, 3, 50):
        shares = divide(sequences, ranks)
        assert sorted(i for share in shares for i in share) == list(range(60))
        for prompt in range(20):
            assert len({r for r, share in enumerate(shares) for i in share if i % 20 == prompt}) == 1
    loads = [sum(len(sequences[i][1]) for i in share) for share in divide(sequences, 3)]
    assert max(loads) < 1.6 * min(loads)
