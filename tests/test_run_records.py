import json
from pathlib import Path

import pytest
from declared_fields import departures, documented

from offline_kto.train import run_records
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.train_run import train
from offline_kto.train.run_records import EvaluationRecord, MetricsRecord, RunRecord, SweepRecord
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.sweep import sweep


def test_each_field_is_explained() -> None:
    for name, (fields, explained) in documented(run_records).items():
        if name != "ComputedWith":  # a part of RunRecord
            assert explained == fields, name


def test_a_run_writes_the_declared_fields(cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        cache=cache, out=tmp_path / "run", max_steps=2, batch_size=4, device="cpu", eval_fraction=0.3, seed=1
    )
    run = train(config)
    assert departures(json.loads((run / "run.json").read_bytes()), RunRecord) == []
    assert departures(json.loads((run / "evaluation.json").read_bytes()), EvaluationRecord) == []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert departures(json.loads(line), MetricsRecord) == []
    again = evaluate_run(TrainConfig(cache=cache, evaluate_only=run, device="cpu", eval_fraction=0.3, seed=1))
    found = json.loads(again.read_bytes())
    assert departures(found, EvaluationRecord) == []
    assert found.keys() == EvaluationRecord.__annotations__.keys()


@pytest.mark.slow
def test_a_sweep_writes_the_declared_fields(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offline_kto.train.sweep.workers.START", "forkserver")  # from the process of forks.py
    config = SweepConfig(
        cache=cache,
        out=tmp_path / "sweep",
        space={"beta": [0.1], "learning_rate": {"low": 1e-4, "high": 1e-3}},
        train={"max_steps": 1, "batch_size": 4, "device": "cpu", "eval_fraction": 0.3},
        trials=1,
    )
    found = json.loads((sweep(config) / "sweep.json").read_bytes())
    assert departures(found, SweepRecord) == []
    assert found.keys() == SweepRecord.__annotations__.keys()
    assert set(found["trials"][0]) == run_records.TrialEntry.__annotations__.keys()
