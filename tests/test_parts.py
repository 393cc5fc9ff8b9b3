"""Scores of a shard that was not finished: kept through kills, used again, and never in place of others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from feedback_files import chat_rows, write_feedback, write_rows
from models import random_rows, save_tiny
from test_crashes import killed_runs

import offline_kto.precompute.parts as precompute_parts
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import CacheError, ModelError
from offline_kto.kto_core.hashing import sequence_id
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.comparison import DisagreementError
from offline_kto.precompute.engines.protocol import Listener, decode, encode, serve
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer
from offline_kto.precompute.engines.vllm_scorer import VllmScorer
from offline_kto.precompute.run import precompute

ROWS = 40


@pytest.fixture
def config(base: Path, tmp_path: Path) -> PrecomputeConfig:
    """Forty rows in one shard, in some dozens of passes."""
    data = write_feedback(tmp_path / "f.jsonl", ROWS, seed=3)
    return PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", max_tokens=64, device="cpu")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass is written down."""
    monkeypatch.setattr(precompute_parts, "SECONDS_BETWEEN_PARTS", 0.0)


def stop_in_pass(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    run = ScoringPasses.run

    def stopping(self: ScoringPasses, *args: Any, **options: Any) -> Any:
        for i, one in enumerate(run(self, *args, **options)):
            if i == number:
                raise error
            yield one

    patch.setattr(ScoringPasses, "run", stopping)


def stopped(config: PrecomputeConfig, *, after: int, error: BaseException | None = None) -> set[str]:
    """Run until so many passes are made. Returns: the ids of the sequences in parts."""
    error = error or KeyboardInterrupt()
    with pytest.MonkeyPatch.context() as patch:
        stop_in_pass(patch, after, error)
        with pytest.raises(type(error)):
            precompute(config)
    return kept_in(config.out)


def kept_in(out: Path) -> set[str]:
    rows = [row for path in out.glob(".parts/train/*.parquet") for row in pq.read_table(path).to_pylist()]
    return {sequence_id(np.array(row["prompt_ids"]), np.array(row["completion_ids"])) for row in rows}


def assert_same_bytes(out: Path, config: PrecomputeConfig) -> None:
    """Compare with the folder of an undisturbed run, except for the times in the manifest."""
    whole = config.out.with_name("whole")
    if not whole.exists():
        precompute(replace(config, out=whole))
    files = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == files
    for path in files:
        if path.suffix == ".parquet":
            assert (out / path).read_bytes() == (whole / path).read_bytes()
    assert read_manifest(out).fingerprint == read_manifest(whole).fingerprint


@pytest.mark.slow
def test_a_kill_loses_no_pass_that_was_written_down(config: PrecomputeConfig, tmp_path: Path) -> None:
    """Real kills before every 24th change to the disk; the shard is the only one."""
    (tmp_path / "nothing").mkdir()
    found = killed_runs("precompute", config, begin_with=str(tmp_path / "nothing"), every=24, seconds_between_parts=0.0)
    every = len(set().union(*sequences_by_row(config)))
    scored = []
    for folder in map(Path, found["folders"]):
        assert_same_bytes(folder, config)
        run = read_manifest(folder).run
        assert run["scored_sequences"] + run["reused_sequences"] == every
        scored.append(run["scored_sequences"])
    assert found["kills"] > 1
    killed = scored[:-1]  # the last one was not
    assert killed == sorted(killed, reverse=True)
    assert killed[-1] < every // 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("another process ended")])
def test_a_run_that_is_stopped_keeps_and_counts_what_it_scored(
    config: PrecomputeConfig, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far within the minute: it is written down when the run ends."""
    kept = stopped(config, after=8, error=error)
    printed = capsys.readouterr().out
    plan = sequences_by_row(config)
    every = {one for ids in plan for one in ids}
    assert 0 < len(kept) < len(every)
    rows = sum(kept.issuperset(ids) for ids in plan)
    assert f"kept        {rows} of {ROWS} rows ({len(kept)} of {len(every)} scores)" in printed
    precompute(config)
    assert f"known       {len(kept)} of {len(every)} sequences" in capsys.readouterr().out
    assert read_manifest(config.out).run["scored_sequences"] == len(every) - len(kept)
    assert_same_bytes(config.out, config)


def sequences_by_row(config: PrecomputeConfig) -> list[set[str]]:
    whole = config.out.with_name("whole")
    if not whole.exists():
        precompute(replace(config, out=whole))
    rows = [row for path in sorted(whole.glob("train/*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [
        {
            sequence_id(np.array(row["prompt_ids"]), np.array(y))
            for y in (row["completion_ids"], *row["kl_completion_ids"])
        }
        for row in rows
    ]


def test_stopped_again_and_again(config: PrecomputeConfig, at_once: None) -> None:
    """Each attempt makes two passes."""
    counts = [len(stopped(config, after=2)) for _ in range(3)]
    assert counts[0] < counts[1] < counts[2]
    precompute(config)
    assert_same_bytes(config.out, config)


def test_other_data_use_the_scores_of_the_same_ids(config: PrecomputeConfig) -> None:
    kept = stopped(config, after=10)
    rows = chat_rows(ROWS, seed=3)
    rows[0]["label"] = not rows[0]["label"]
    changed = replace(config, data=str(write_rows(config.out.parent / "g.jsonl", [*rows[:30], *chat_rows(5, seed=9)])))
    precompute(changed)
    (path,) = config.out.glob("train/*.parquet")
    wanted = {
        sequence_id(np.array(row["prompt_ids"]), np.array(y))
        for row in pq.read_table(path).to_pylist()
        for y in (row["completion_ids"], *row["kl_completion_ids"])
    }
    assert kept & wanted
    assert read_manifest(config.out).run["scored_sequences"] == len(wanted - kept)
    assert not (config.out / ".parts").exists()
    fresh = replace(changed, out=config.out.with_name("fresh"))
    precompute(fresh)
    found, expected = (pq.read_table(next(out.glob("train/*"))).to_pylist() for out in (config.out, fresh.out))
    for one, other in zip(found, expected, strict=True):
        assert (one["row_id"], one["label"], one["source"]) == (other["row_id"], other["label"], other["source"])
        np.testing.assert_allclose(one["ref_token_logps"], other["ref_token_logps"], atol=1e-5)


def test_another_budget_goes_on_from_a_part(config: PrecomputeConfig) -> None:
    """Resume with other passes: only what is missing is scored."""
    kept = stopped(config, after=8)
    precompute(replace(config, max_tokens=200))
    every = set().union(*sequences_by_row(config))
    assert read_manifest(config.out).run["scored_sequences"] == len(every - kept)


def test_parts_of_another_model_are_refused_and_never_used(config: PrecomputeConfig, tmp_path: Path) -> None:
    stopped(config, after=8)
    other = replace(config, model=str(save_tiny(tmp_path / "other", seed=7)))
    with pytest.raises(CacheError, match=r"reference\.weights_hash: .* in the cache"):
        precompute(other)
    precompute(replace(other, overwrite=True))
    assert_same_bytes(config.out, replace(other, out=tmp_path / "elsewhere" / "refs"))


@pytest.mark.parametrize("damage", ["a byte", "cut off", "a link"])
def test_a_damaged_part_is_scored_again(config: PrecomputeConfig, at_once: None, damage: str) -> None:
    kept = stopped(config, after=6)
    part = max(config.out.glob(".parts/train/*.parquet"), key=lambda path: path.stat().st_size)
    content = bytearray(part.read_bytes())
    group = pq.ParquetFile(part).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    scores = next(column for column in columns if column.path_in_schema.startswith("ref_token_logps"))
    if damage == "a link":
        part.rename(config.out.parent / "elsewhere.parquet")
        part.symlink_to(config.out.parent / "elsewhere.parquet")
    else:
        content[scores.dictionary_page_offset + scores.total_compressed_size - 4] ^= 16
        part.write_bytes(content if damage == "a byte" else content[: len(content) // 2])
    precompute(config)
    every = set().union(*sequences_by_row(config))
    assert read_manifest(config.out).run["scored_sequences"] > len(every - kept)
    assert_same_bytes(config.out, config)


def test_scores_that_disagree_with_another_engine_are_not_kept(
    config: PrecomputeConfig, at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(config, after=8, error=DisagreementError("log-probs differ")) == set()
    assert "kept  " not in capsys.readouterr().out
    assert not config.out.exists()


def test_another_process_sends_scores_before_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve`, over a channel in memory: some of the scores, then the rest, under the right positions."""
    rows = random_rows(6)

    class Engine:
        def score(self, sequences: Any, listener: Any, *, known: Any) -> None:
            for i in sorted(set(range(len(sequences))) - known, reverse=True):
                listener.on_scores([i], [np.full(len(sequences[i][1]), -float(i), dtype=np.float32)])

    class Channel:
        def __init__(self) -> None:
            self.asked = [encode([np.array([4], dtype=np.int32), *(ids for row in rows for ids in row)]), b""]
            self.answers: list[bytes] = []

        def recv_bytes(self) -> bytes:
            return self.asked.pop(0)

        def send_bytes(self, message: bytes) -> None:
            self.answers.append(message)

    monkeypatch.setattr(precompute_parts, "SECONDS_BETWEEN_PARTS", 0.0)
    channel = Channel()
    serve(channel, lambda sequences: Engine())
    found: dict[int, float] = {}
    for answer in channel.answers:
        done, *scores = decode(answer[1:], np.int32)
        found.update({int(i): float(one.view(np.float32)[0]) for i, one in zip(done, scores, strict=True)})
    assert [answer[:1] for answer in channel.answers] == [b"p"] * 5 + [b"s"]
    assert found == {i: -float(i) for i in (0, 1, 2, 3, 5)}


def test_vllm_answers_in_parts_and_leaves_out_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the engine: what it is asked, and how often."""
    rows = random_rows(40)
    asked: list[int] = []
    scorer = VllmScorer.__new__(VllmScorer)
    scorer._tokens = 1  # 32 tokens in a part

    def answer(sequences: Any, on_tokens: Any) -> list[np.ndarray]:
        asked.append(len(sequences))
        return [-np.arange(len(y), dtype=np.float32) for _, y in sequences]

    monkeypatch.setattr(scorer, "_score", answer)
    parts: list[list[int]] = []
    scorer.score(rows, Listener(lambda done, scores: parts.append(list(done))))
    assert sorted(i for part in parts for i in part) == list(range(40))
    assert len(parts) > 5
    assert asked == [len(part) for part in parts]
    asked.clear()
    known = frozenset(parts[0] + parts[2])
    again: list[list[int]] = []
    scorer.score(rows, Listener(lambda done, scores: again.append(list(done))), known=known)
    assert again == [part for number, part in enumerate(parts) if number not in (0, 2)]


def test_the_passes_that_are_left_are_those_of_the_whole_plan(config: PrecomputeConfig) -> None:
    """Sequences keep their company, so that a score is the same to the last bit."""
    made: list[list[tuple[int, ...]]] = []
    score = TransformersScorer.score

    with pytest.MonkeyPatch.context() as patch:

        def noting(self: TransformersScorer, sequences: Any, listener: Any, **options: Any) -> Any:
            run = self._passes.run
            made.append([])

            def counted(*args: Any, **settings: Any) -> Any:
                for one in run(*args, **settings):
                    made[-1].append(tuple(sorted(one.indices)))
                    yield one

            patch.setattr(self._passes, "run", counted)
            return score(self, sequences, listener, **options)

        patch.setattr(TransformersScorer, "score", noting)
        stopped(config, after=8)
        precompute(config)
        precompute(replace(config, out=config.out.with_name("whole")))
    first, second, whole = made
    assert len(first) == 8
    # The pass under way when a run is stopped is made again.
    assert set(first[:-1]) | set(second) == set(whole)
    assert set(second) == set(whole) - set(first[:7])
