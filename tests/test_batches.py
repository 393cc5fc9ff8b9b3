"""Which rows come together: both classes in every batch, and nothing that depends on memory or devices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feedback_files import write_rows
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.batches import EpochBatches, strata_of, units_of
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.repeated_rows import repeated_rows
from offline_kto.train.run.train_run import train


def epoch(batches: EpochBatches, number: int = 0) -> list[list[int]]:
    batches.set_epoch(number)
    return [[key.index for key in batch] for batch in batches]


class _Rows:
    """As much of `CacheRows` as batches look at."""

    def __init__(self, labels: list[bool]) -> None:
        self.labels = np.array(labels)


def balanced(labels: list[bool], batch_size: int, **options: Any) -> EpochBatches:
    rows: Any = _Rows(labels)
    strata = strata_of(rows, units_of(rows, np.arange(len(labels)), 1), balance=True)
    return EpochBatches(strata, batch_size, **{"shuffle": True, "seed": 0, **options})


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(1, 20), st.integers(0, 3))
def test_every_batch_has_the_ratio_of_the_data(labels: list[bool], batch_size: int, number: int) -> None:
    batches = balanced(labels, batch_size)
    found = epoch(batches, number)
    assert sorted(i for batch in found for i in batch) == list(range(len(labels)))
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    assert len(found) == len(batches)
    share = sum(labels) / len(labels)
    for batch in found:
        assert abs(sum(labels[i] for i in batch) - share * len(batch)) <= 1
    rarer = min(sum(labels), len(labels) - sum(labels))
    if rarer and rarer * batch_size >= len(labels):  # one for each batch
        for batch in found[:-1]:
            assert len({labels[i] for i in batch}) == min(2, len(batch))


def test_sorted_data_is_mixed() -> None:
    """Pairs split into rows, or a file of thumbs up behind one of thumbs down: a plain shuffle leaves batches of one class."""
    labels = [True] * 60 + [False] * 4
    rows: Any = _Rows(labels)
    plain = EpochBatches(strata_of(rows, units_of(rows, np.arange(64), 1), balance=False), 16, shuffle=True, seed=0)
    assert any(all(labels[i] for i in batch) for batch in epoch(plain))
    assert [sum(not labels[i] for i in batch) for batch in epoch(balanced(labels, 16))] == [1, 1, 1, 1]


def test_orders_differ_by_epoch_and_seed_alone() -> None:
    labels = [bool(i % 3) for i in range(50)]
    assert epoch(balanced(labels, 8)) == epoch(balanced(labels, 8))
    assert epoch(balanced(labels, 8)) != epoch(balanced(labels, 8), 1)
    assert epoch(balanced(labels, 8)) != epoch(balanced(labels, 8, seed=1))


def test_without_shuffling_rows_keep_the_order_of_the_file(cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=cache, batch_size=8, shuffle=False, device="cpu")
    from offline_kto.train.data.training_data import TrainingData

    assert epoch(TrainingData.open(config).batches(config)) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]


def make_cache(base: Path, folder: Path, labels: list[bool], *, twice: int = 0) -> Path:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": label} for i, label in enumerate(labels)]
    rows += [{**row, "label": not row["label"]} for row in rows[:twice]]
    folder.mkdir()
    precompute(
        PrecomputeConfig(
            model=str(base),
            data=str(write_rows(folder / "rows.jsonl", rows)),
            out=folder / "refs",
            one_class=all(labels),
        )
    )
    return folder / "refs"


def test_contradictions_and_rare_classes_are_pointed_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(base, tmp_path / "rare", [True] * 98 + [False], twice=1)
    told = capsys.readouterr().out
    assert "1 completion carries both labels" in told
    assert "only 2 of 100 rows are undesirable (2.0%)" in told
    train(TrainConfig(cache=cache, out=tmp_path / "run", batch_size=10, save_steps=0, device="cpu"))
    told = capsys.readouterr().out
    assert "labels      98 desirable (weight 1), 2 undesirable (weight 1)" in told
    assert "1 completion carries both labels" in told
    assert (
        "only 2 of 100 rows are undesirable (2.0%). At least 8 of 10 batches contain none of them; --batch-size 50"
        in told
    )


def test_healthy_data_is_not_complained_about(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeated_rows(CacheRows(cache), most=0).contradictions.total == 0
    train(TrainConfig(cache=cache, out=tmp_path / "run", max_steps=1, save_steps=0, device="cpu"))
    assert "warning" not in capsys.readouterr().out


def test_data_with_one_class_still_trains(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(base, tmp_path / "one", [True] * 9)
    train(TrainConfig(cache=cache, out=tmp_path / "run", batch_size=8, save_steps=0, device="cpu"))
    assert "every training row is desirable" in capsys.readouterr().out
