"""The simulation of a cluster: all shards once, times that can be computed by hand, equal seeds, losses that cost."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/simulate_cluster.py"
sys.path.insert(0, str(SCRIPT.parent))

import simulate_cluster  # noqa: E402
from simulate_cluster import Job, recommended, simulate  # noqa: E402

STEADY = Job(
    rows=64_000,
    rows_a_shard=1000,
    workers=16,
    workers_a_node=4,
    rows_a_second=10.0,
    rate_spread=0.0,
    startup=30.0,
    startup_spread=0.0,
    leader_seconds=0.0,
    plan_a_row=0.0,
    node_losses=0.0,
)
ROUGH = dataclasses.replace(STEADY, node_losses=20.0, worker_losses=2.0, startup_spread=0.3, rate_spread=0.1)


def shares(job: Job) -> list[float]:
    found = simulate(job)
    return [found.share(part) for part in (found.useful, found.lost, found.overhead, found.startup, found.idle)]


@pytest.mark.parametrize("job", [STEADY, ROUGH, dataclasses.replace(ROUGH, flush=0.0)])
def test_every_shard_is_done_once(job: Job) -> None:
    for seed in range(5):
        found = simulate(dataclasses.replace(job, seed=seed))
        assert found.done == dict.fromkeys(range(job.shards), 1)
        assert (found.losses > 0) == (job.node_losses > 0)


@pytest.mark.parametrize("workers", [1, 7, 16, 64])
def test_without_losses_the_wall_time_can_be_computed(workers: int) -> None:
    job = dataclasses.replace(STEADY, workers=workers)
    one_shard = job.overhead_a_shard + job.overhead_a_row * 1000 + 1000 / 10.0
    assert simulate(job).wall == pytest.approx(30.0 + math.ceil(64 / workers) * one_shard)


def test_a_last_shard_with_fewer_rows_takes_less_time() -> None:
    job = dataclasses.replace(STEADY, rows=1500, workers=1, overhead_a_row=0.0)
    assert job.shards == 2
    assert simulate(job).wall == pytest.approx(30.0 + 2 * job.overhead_a_shard + 150.0)


@pytest.mark.parametrize("job", [STEADY, ROUGH, dataclasses.replace(ROUGH, flush=0.0, workers=3)])
def test_shares_are_those_of_one_whole(job: Job) -> None:
    found = shares(job)
    assert sum(found) == pytest.approx(1.0)
    assert min(found) >= -1e-9


def test_rows_are_scored_once_however_many_workers_are_lost() -> None:
    job = dataclasses.replace(ROUGH, rate_spread=0.0)
    found = simulate(job)
    assert found.losses > 10
    assert found.useful == pytest.approx(job.rows / job.rows_a_second)


def test_equal_seeds_give_equal_results() -> None:
    assert simulate(ROUGH) == simulate(ROUGH)
    assert simulate(ROUGH) != simulate(dataclasses.replace(ROUGH, seed=1))


@pytest.mark.parametrize("flush", [0.0, 60.0])
def test_more_losses_cost_no_less_work(flush: float) -> None:
    """Means of ten seeds: in a single one a node may be lost just after a flush."""
    lost = []
    for rate in (0.0, 1.0, 5.0, 25.0):
        job = dataclasses.replace(STEADY, node_losses=rate, flush=flush)
        lost.append(sum(simulate(dataclasses.replace(job, seed=seed)).lost for seed in range(10)))
    assert lost[0] == 0
    assert lost == sorted(lost)
    assert lost[-1] > 0


def test_flushed_scores_are_not_lost() -> None:
    """The worker is lost 90 s after it began: 60 s are on disk, less the time before its first score."""
    job = dataclasses.replace(STEADY, scripted=((120.0, "kill worker"),), overhead_a_row=0.0, overhead_a_shard=10.0)
    assert simulate(job).lost == pytest.approx(30.0)
    assert simulate(dataclasses.replace(job, flush=0.0)).lost == pytest.approx(80.0)
    assert simulate(dataclasses.replace(job, flush=45.0)).lost == pytest.approx(0.0)


def test_a_shard_that_ends_its_workers_stops_the_run() -> None:
    found = simulate(dataclasses.replace(STEADY, deadly_shards=frozenset({5})))
    assert (found.stopped_by, found.losses) == (5, simulate_cluster.MOST_LOSSES)
    assert 5 not in found.done


def test_losses_with_their_nodes_do_not_count_against_a_shard() -> None:
    job = dataclasses.replace(STEADY, rows=1000, workers=1, flush=0.0, join=0.0)
    removals = tuple((40.0 + 60.0 * i, "remove node") for i in range(5))
    found = simulate(dataclasses.replace(job, scripted=removals))
    assert (found.stopped_by, found.losses) == (None, 5)
    assert found.done == {0: 1}


def test_a_node_that_is_added_takes_part() -> None:
    job = dataclasses.replace(STEADY, workers=4)
    more = dataclasses.replace(job, scripted=((100.0, "add node"),))
    assert simulate(more).wall < 0.7 * simulate(job).wall


def test_a_cluster_that_loses_all_nodes_is_told_apart() -> None:
    job = dataclasses.replace(STEADY, workers=4, join=None, scripted=((100.0, "remove node"),))
    with pytest.raises(RuntimeError, match="no worker is left"):
        simulate(job)


def test_a_slow_leader_is_a_limit_of_its_own() -> None:
    job = dataclasses.replace(STEADY, rows_a_shard=10, leader_seconds=0.5)
    assert simulate(job).wall == pytest.approx(6400 * 0.5, rel=0.05)


def test_slow_plan_files_are_a_limit_of_their_own() -> None:
    """Write the first ones while the workers start; no worker waits if they take less than scoring."""
    job = dataclasses.replace(STEADY, rows_a_second=1e6, overhead_a_row=0.0, overhead_a_shard=0.0)
    slow = dataclasses.replace(job, plan_a_row=0.01)
    assert simulate(slow).wall == pytest.approx(64_000 * 0.01, rel=0.01)
    more = dataclasses.replace(slow, startup=300.0)
    assert simulate(more).wall == pytest.approx(300.0 + (64 - 16) * 10.0, rel=0.01)  # sixteen files, and no more
    ahead = dataclasses.replace(STEADY, plan_a_row=0.0001)  # 0.1 s a file, of shards of 100 s
    assert simulate(ahead).wall == pytest.approx(simulate(STEADY).wall)


def test_the_recommended_size_has_the_fewest_shards_among_the_good_ones() -> None:
    cells = [
        simulate_cluster.Cell(size, 1000 // size, 0.0, hours, 0, 0, 0, 0)
        for size, hours in ((1, 104.0), (10, 100.0), (50, 101.0), (100, 110.0))
    ]
    assert recommended(cells).rows_a_shard == 50


def test_the_script_prints_a_table_for_each_number_of_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--rows", "1e5,2e5", "--gpus", "16", "--rows-per-shard", "256,4096", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    simulate_cluster.main()
    printed = capsys.readouterr().out
    assert printed.count("* recommended: --rows-per-shard 256\n") == 2
    assert printed.startswith("100,000 rows on 16 GPUs\nrows per shard")
