"""Held-out values: what they are, how sure they are, which checkpoint is the best, and evaluating a finished run."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from feedback_files import chat_rows, write_rows
from safetensors.torch import load_file, save_file
from stopped_runs import train_until
from test_loss_family import metrics, pair_rows

import offline_kto.kto_core.durable_files
from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.losses.bootstrap import intervals, replicates
from offline_kto.kto_core.losses.preference_losses import class_weights, kto_losses
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows, TrainingRow
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.evaluation import Scores, held_out_metrics, summary
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.objective import Objective


def means(values: torch.Tensor) -> Any:
    return lambda weights: {"mean": (weights * values).sum(1) / weights.sum(1)}


class TestIntervals:
    def test_of_a_mean_are_those_of_the_textbook(self) -> None:
        values = torch.from_numpy(np.random.default_rng(0).normal(3.0, 2.0, size=400))
        low, high = intervals(means(values), [str(i) for i in range(400)], resamples=4000)["mean"]
        half = 1.96 * float(values.std()) / 20
        assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
        assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)

    def test_cover_the_truth_as_often_as_they_say(self) -> None:
        rng, hits = np.random.default_rng(1), 0
        for _ in range(200):
            values = torch.from_numpy(rng.exponential(1.0, size=100))
            low, high = intervals(means(values), [str(i) for i in range(100)], resamples=300)["mean"]
            hits += low <= 1.0 <= high
        assert 0.88 <= hits / 200 <= 0.99

    def test_rows_of_one_prompt_are_drawn_together(self) -> None:
        """Ten rows that say the same are one observation, not ten."""
        once = torch.from_numpy(np.random.default_rng(2).normal(size=50))
        wide = intervals(means(once), [str(i) for i in range(50)])["mean"]
        repeated = intervals(means(once.repeat_interleave(10)), [str(i // 10) for i in range(500)])["mean"]
        assert repeated == pytest.approx(wide, abs=0.02)

    def test_one_prompt_has_none(self) -> None:
        assert intervals(means(torch.ones(3, dtype=torch.float64)), ["a", "a", "a"]) == {}

    def test_what_most_samples_lack_has_none(self) -> None:
        values = torch.full((4,), float("nan"), dtype=torch.float64)
        assert intervals(means(values), list("abcd")) == {}

    def test_many_rows_are_drawn_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = torch.arange(30, dtype=torch.float64)
        whole = intervals(means(values), [str(i) for i in range(30)])
        monkeypatch.setattr("offline_kto.kto_core.losses.bootstrap._ELEMENTS", 64)
        assert intervals(means(values), [str(i) for i in range(30)])["mean"] == pytest.approx(whole["mean"], abs=0.5)

    def test_few_weights_are_in_memory_at_a_time(self) -> None:
        """A hundred thousand held-out rows would take 800 MB for a thousand samples."""
        values, most = torch.arange(5000, dtype=torch.float64), 0

        def statistic(weights: torch.Tensor) -> dict[str, torch.Tensor]:
            nonlocal most
            most = max(most, weights.nbytes)
            return means(values)(weights)

        assert len(replicates(statistic, np.arange(5000))["mean"]) == 1000
        assert most <= 4 * 2**20


def one_bit(labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([labels, ~labels], 1).double()


def some_scores(rows: int = 40) -> Scores:
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.random(rows) < 0.5)
    logratios = torch.from_numpy(rng.normal(size=rows)) + labels
    return Scores(
        prompts=np.arange(rows, dtype=np.int32) // 2,
        masses=one_bit(labels),
        objectives={},
        tokens=torch.from_numpy(rng.integers(1, 9, size=rows).astype(float)),
        logps=logratios - 20,
        logratios=logratios,
        kl_logratios=torch.from_numpy(rng.normal(0.4, 1.0, size=rows)),
        shift=None,
    )


def test_metrics_are_means_with_one_reference_point() -> None:
    scores = some_scores()
    objective = Objective("kto", 0.3, (1.2, 0.7))
    found = held_out_metrics(scores, objective)
    kl = scores.kl_logratios.mean().clamp(min=0)
    weights = class_weights(scores.labels, 1.2, 0.7)
    losses = kto_losses(scores.logratios, scores.labels, kl, beta=0.3, weights=weights)
    assert found["loss"] == pytest.approx(float(losses.mean()), abs=1e-12)
    assert found["kl"] == found["kl_raw"] == pytest.approx(float(kl))
    assert found["rewards/chosen"] == pytest.approx(0.3 * float(scores.logratios[scores.labels].mean()))
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    right = (scores.logratios > kl) == scores.labels
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))


def test_intervals_estimate_z0_anew_in_every_sample() -> None:
    """Against resampling by hand, prompt by prompt."""
    scores, objective = some_scores(), Objective("kto", 0.3)
    found = summary(scores, objective, 7)
    assert (found["rows"], found["prompts"], found["step"]) == (40, 20, 7)
    rng, samples = np.random.default_rng(4), []
    for _ in range(2000):
        drawn = np.concatenate([[2 * p, 2 * p + 1] for p in rng.integers(0, 20, size=20)])
        kl = max(0.0, float(scores.kl_logratios[drawn].mean()))
        signs = torch.where(scores.labels[drawn], 1.0, -1.0)
        samples.append(float(torch.sigmoid(-0.3 * signs * (scores.logratios[drawn] - kl)).mean()))
    low, high = np.quantile(samples, [0.025, 0.975])
    loss = found["metrics"]["loss"]
    assert loss["low"] < loss["value"] < loss["high"]
    assert (loss["low"], loss["high"]) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_a_class_without_rows_is_left_out() -> None:
    scores = some_scores()
    scores = replace(scores, masses=one_bit(torch.ones(40, dtype=torch.bool)))
    found = summary(scores, Objective("kto", 0.3), 1)["metrics"]
    assert {"loss", "accuracy", "kl", "rewards/chosen"} <= set(found)
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & set(found)


def config_for(cache: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache,
        out=out,
        batch_size=4,
        max_steps=6,
        learning_rate=3e-3,
        save_steps=0,
        eval_fraction=0.4,
        eval_steps=2,
        device="cpu",
    )


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return config_for(cache, tmp_path / "run")


def test_the_summary_is_the_last_evaluation(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config)
    found = json.loads((run / "evaluation.json").read_text())
    last = [record for record in metrics(run) if "eval/loss" in record][-1]
    assert (found["step"], last["step"]) == (6, 6)
    for name, metric in found["metrics"].items():
        assert metric["value"] == pytest.approx(last[f"eval/{name}"], abs=1e-9)
        assert metric["low"] <= metric["value"] + 1e-9
        assert metric["value"] - 1e-9 <= metric["high"]
    out = capsys.readouterr().out
    assert f"held out    {found['rows']} rows of {found['prompts']} prompts after 6 updates, 95 % intervals" in out
    assert f"{found['metrics']['loss']['low']:.4f}" in out


@pytest.mark.parametrize("loss", ["kto", "apo_zero"])
def test_rows_are_read_a_few_at_a_time(loss: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one z0 over all of them."""
    config = replace(config, loss=loss)
    run = train(config)
    said = json.loads((run / "evaluation.json").read_text())
    monkeypatch.setattr("offline_kto.train.trainer.policy_scores.HELD_OUT_TOKENS", 1)
    monkeypatch.setattr("offline_kto.train.trainer.policy_scores.FIRST_ROWS", 3)
    read: list[int] = []
    real = CacheRows.together

    def noted(self: CacheRows, indices: np.ndarray) -> list[TrainingRow]:
        rows = real(self, indices)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(CacheRows, "together", noted)
    evaluate_run(replace(config, evaluate_only=run))
    assert set(read) == {3, 1}  # the first rows, then one at a time
    found = json.loads((run / "evaluation.json").read_text())
    assert found["metrics"].keys() == said["metrics"].keys()
    for name, metric in said["metrics"].items():
        assert found["metrics"][name] == pytest.approx(metric, abs=2e-5), name


def test_rows_are_on_record(config: TrainConfig, cache: Path) -> None:
    run = train(replace(config, max_steps=None, epochs=1))
    table = pq.read_table(run / "rewards.parquet").to_pydict()
    rows = CacheRows(cache)
    every = {row.row_id: row.label for row in map(rows.__getitem__, range(len(rows)))}
    assert dict(zip(table["row_id"], table["label"], strict=True)) == every
    held = [i for i, split in enumerate(table["split"]) if split == "held_out"]
    found = json.loads((run / "evaluation.json").read_text())
    assert len(held) == found["rows"]
    desirable = [table["logratio"][i] for i in held if table["label"][i]]
    assert 0.1 * np.mean(desirable) == pytest.approx(found["metrics"]["rewards/chosen"]["value"], abs=1e-5)
    trained = [abs(table["logratio"][i]) for i in range(len(every)) if i not in held]
    assert max(trained) > 0.1


def worse_and_worse(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Evaluations come out as told."""
    left = list(values)
    real = KTOTrainer.evaluate

    def told(self: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        real_log, self.log = self.log, lambda logs, *rest: None
        handler, self.callback_handler.on_evaluate = self.callback_handler.on_evaluate, lambda a, s, c, m: c
        found = real(self, *arguments, **options)
        self.log, self.callback_handler.on_evaluate = real_log, handler
        found["eval_loss"] = left.pop(0)
        self.log(dict(found))
        self.control = handler(self.args, self.state, self.control, found)
        return found

    monkeypatch.setattr(KTOTrainer, "evaluate", told)


class TestBest:
    def test_early_stopping_ends_with_the_best_model(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        short = train(replace(config, out=tmp_path / "short", max_steps=4, keep="last"))
        worse_and_worse(monkeypatch, [0.5, 0.4, 0.6, 0.7, 0.8, 0.9])
        run = train(replace(config, max_steps=12, early_stopping=2))
        steps = [record["step"] for record in metrics(run) if "eval/loss" in record]
        assert steps == [0, 2, 4, 6, 8]
        best, four = (load_file(one / "model.safetensors") for one in (run, short))
        for name in best:
            torch.testing.assert_close(best[name], four[name], atol=1e-6, rtol=0)
        assert json.loads((run / "evaluation.json").read_text())["step"] == 4

    def test_early_stopping_counts_the_untrained_model(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worse_and_worse(
            monkeypatch, [0.59, 0.58, 0.57, 0.56, 0.55, 0.54]
        )  # better each time, and never as good as before
        run = train(replace(config, max_steps=12, early_stopping=2))
        assert [record["step"] for record in metrics(run) if "eval/loss" in record] == [0, 2, 4]

    def test_the_untrained_model_counts_after_a_resume(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worse_and_worse(monkeypatch, [0.59, 0.58, 0.57, 0.56, 0.55, 0.54])
        train_until(replace(config, max_steps=12, early_stopping=3, save_steps=2), step=4)
        run = train(replace(config, max_steps=12, early_stopping=3, save_steps=2, resume=True))
        assert [record["step"] for record in metrics(run) if "eval/loss" in record] == [0, 2, 4, 6]

    def test_the_best_checkpoint_is_kept(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        worse_and_worse(monkeypatch, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
        run = train(replace(config, max_steps=12, save_steps=3))
        kept = sorted(path.name for path in run.glob("checkpoint-*"))
        assert "checkpoint-2" in kept
        assert "checkpoint-12" in kept
        assert len(kept) <= 3

    def test_better_means_greater_for_accuracy(self, config: TrainConfig) -> None:
        run = train(replace(config, metric="eval/accuracy", save_steps=100))
        state = json.loads(next(run.glob("checkpoint-6/trainer_state.json")).read_text())
        values = [record["eval/accuracy"] for record in metrics(run) if record["step"] and "eval/accuracy" in record]
        assert state["best_metric"] == pytest.approx(max(values))

    def test_nothing_to_stop_by(self, config: TrainConfig) -> None:
        config = replace(config, eval_fraction=0.0, eval_steps=None)
        for name, value in (("early_stopping", 1), ("metric", "eval/accuracy"), ("eval_steps", 3)):
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} needs held-out rows"):
                replace(config, **{name: value})

    @pytest.mark.slow
    def test_an_evaluation_that_a_kill_fell_into_is_made_up_for(self, config: TrainConfig, tmp_path: Path) -> None:
        """At the end of an epoch, where the checkpoint and the evaluation fall together."""
        config = replace(config, max_steps=None, epochs=3, eval_steps=None, save_steps=3)
        whole = train(config)
        stopped = replace(config, out=tmp_path / "stopped")
        train_until(stopped, step=3, method="evaluate")
        run = train(replace(stopped, resume=True))
        timeless = ("tokens_per_second", "peak_memory_mb", "train_runtime", "epoch")
        records = [[{k: v for k, v in r.items() if k not in timeless} for r in metrics(one)] for one in (whole, run)]
        assert records[0] == records[1]
        assert [record["step"] for record in records[0] if "eval/loss" in record] == [0, 3, 6, 9]
        kept = [sorted(path.name for path in one.glob("checkpoint-*")) for one in (whole, run)]
        assert kept[0] == kept[1]

    @pytest.mark.slow
    def test_what_a_resumed_run_says_is_what_it_did(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, save_steps=2, max_steps=4, epochs=2)
        run = train(config)
        rewards = pq.read_table(run / "rewards.parquet")
        train(replace(config, resume=True))  # nothing left to do
        assert pq.read_table(run / "rewards.parquet").equals(rewards)
        shutil.rmtree(run / "checkpoint-4")
        train(replace(config, resume=True, beta=0.5))
        assert pq.read_table(run / "rewards.parquet")["logratio"].null_count == rewards["logratio"].null_count
        assert "beta: 0.5" in (run / "config.yaml").read_text()
        record = json.loads((run / "run.json").read_text())
        assert "--beta 0.5" in record["command"]
        assert record["alarms"]["beta"] == 0.5

    @pytest.mark.slow
    def test_logs_do_not_depend_on_where_a_run_was_resumed(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, max_steps=8, eval_steps=3, logging_steps=5, save_steps=100)
        whole = train(config)
        stopped = replace(config, out=tmp_path / "stopped")
        train_until(stopped, step=4)
        run = train(replace(stopped, resume=True))
        found = [{r["step"]: r["loss"] for r in metrics(one) if "loss" in r} for one in (whole, run)]
        assert found[0].keys() == found[1].keys()
        for step, loss in found[0].items():
            assert found[1][step] == pytest.approx(loss, abs=1e-6)

    def test_margins_of_one_class(self, base: Path, tmp_path: Path, config: TrainConfig) -> None:
        rows = [{"prompt": f"p {i}", "completion": f"c {i}", "label": True} for i in range(6)]
        data = write_rows(tmp_path / "good.jsonl", rows)
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "good", one_class=True))
        with pytest.raises(TrainingError, match="--metric eval/rewards/margins needs held-out rows of both classes"):
            train(replace(config, eval_fraction=0.0, eval_cache=tmp_path / "good", metric="eval/rewards/margins"))


class TestEvaluateOnly:
    @pytest.fixture(scope="class")
    def trained(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A finished run. Do not write to it."""
        return train(config_for(cache, tmp_path_factory.mktemp("trained") / "run"))

    @pytest.fixture
    def run(self, trained: Path, config: TrainConfig) -> Path:
        """A copy of it, at the path of `config`."""
        assert config.out is not None
        return Path(shutil.copytree(trained, config.out))

    @pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"loss": "bco"}, {"loss": "apo_zero"}], ids=str)
    def test_says_what_the_run_said(self, config: TrainConfig, options: dict[str, Any], tmp_path: Path) -> None:
        run = train(replace(config, keep="last", **options))
        said = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").unlink()
        result = CliRunner().invoke(kto_train, ["--evaluate-only", str(run), "--cache", str(config.cache)])
        assert result.exit_code == 0, result.output
        found = json.loads((run / "evaluation.json").read_text())
        assert found["rows"] == said["rows"]
        assert found["step"] == said["step"] == 6
        for name, metric in said["metrics"].items():
            assert found["metrics"][name]["value"] == pytest.approx(metric["value"], abs=2e-5), name
            assert found["metrics"][name]["low"] == pytest.approx(metric["low"], abs=2e-5)

    def other(self, base: Path, folder: Path, rows: list[dict[str, Any]]) -> Path:
        folder.mkdir()
        data = write_rows(folder / "rows.jsonl", rows)
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", max_length=256))
        return folder / "refs"

    def test_another_cache_is_evaluated_as_a_whole(
        self, run: Path, config: TrainConfig, base: Path, tmp_path: Path
    ) -> None:
        before = (run / "evaluation.json").read_bytes()
        other = self.other(base, tmp_path / "other", chat_rows(9, seed=5))
        path = evaluate_run(replace(config, cache=other, evaluate_only=run))
        found = json.loads(path.read_text())
        assert (found["rows"], found["rows_are"]) == (9, "not trained on")
        assert path.name.startswith(f"evaluation-{found['fingerprint'][:12]}-")
        assert (run / "evaluation.json").read_bytes() == before

    @pytest.mark.slow
    def test_rows_that_were_trained_on_are_never_taken_for_new_ones(
        self, config: TrainConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A cache that has grown since, and one of the training rows alone."""
        cache = self.other(base, tmp_path / "small", chat_rows(20))
        config = replace(config, cache=cache)
        run = train(config)
        table = pq.read_table(run / "rewards.parquet").to_pydict()
        trained = {p for p, split in zip(table["prompt_id"], table["split"], strict=True) if split == "train"}
        grown = self.other(base, tmp_path / "grown", chat_rows(26))
        found = json.loads(evaluate_run(replace(config, cache=grown, evaluate_only=run)).read_text())
        rows = CacheRows(grown)
        new = [p for p in rows.column("prompt_id").to_pylist() if p not in trained]
        assert found["rows"] == len(new) < len(rows)
        assert found["rows_are"] == f"not trained on; {len(rows) - len(new)} rows that it was trained on are left out"
        everything = train(replace(config, out=tmp_path / "everything", eval_fraction=0.0, eval_steps=None))
        path = evaluate_run(replace(config, eval_fraction=0.0, eval_steps=None, evaluate_only=everything))
        assert json.loads(path.read_text())["rows_are"] == "the run was trained on their prompts"
        assert "warning     20 of 20 rows have prompts that the run was trained on" in capsys.readouterr().out
        assert path.name != "evaluation.json"

    def test_flipped_labels_are_another_set(self, config: TrainConfig, base: Path, tmp_path: Path) -> None:
        rows = chat_rows(20)
        config = replace(config, cache=self.other(base, tmp_path / "right", rows))
        run = train(config)
        before = (run / "evaluation.json").read_bytes()
        flipped = self.other(base, tmp_path / "wrong", [{**row, "label": not row["label"]} for row in rows])
        evaluate_run(replace(config, cache=flipped, evaluate_only=run))
        assert (run / "evaluation.json").read_bytes() == before

    @pytest.mark.slow
    def test_adapters_stand_on_the_model_they_were_trained_on(
        self, config: TrainConfig, base: Path, tmp_path: Path
    ) -> None:
        """Not on the reference of the cache that is evaluated, which is refused anyway unless it is meant."""
        run = train(replace(config, lora_rank=2))
        other_base = tmp_path / "other-base"
        shutil.copytree(base, other_base)
        weights = load_file(other_base / "model.safetensors")
        save_file({name: tensor * 1.1 for name, tensor in weights.items()}, other_base / "model.safetensors")
        other = self.other(other_base, tmp_path / "other", chat_rows(9, seed=5))
        options = replace(config, lora_rank=2, cache=other, evaluate_only=run)
        with pytest.raises(TrainingError, match=r"scored by another reference than the run's"):
            evaluate_run(options)
        found = json.loads(evaluate_run(replace(options, allow_different_policy=True)).read_text())
        same = self.other(base, tmp_path / "same", chat_rows(9, seed=5))
        expected = json.loads(evaluate_run(replace(options, cache=same)).read_text())
        for name in ("logps/chosen", "logps/rejected"):
            assert found["metrics"][name]["value"] == pytest.approx(expected["metrics"][name]["value"], abs=1e-4)

    def test_options_are_the_runs_own(self, run: Path, config: TrainConfig) -> None:
        command = ["--evaluate-only", str(run), "--cache", str(config.cache)]
        for more in (["--beta", "3"], ["--eval-fraction", "0.5"], ["--eval-seed", "9"]):
            result = CliRunner().invoke(kto_train, [*command, *more])
            assert result.exit_code == 2
            assert f"uses the run's own options; remove {more[0]}" in result.output

    def test_the_shift_and_step_are_those_of_the_model(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Few logs, and a best model that is not the last one."""
        config = replace(config, loss="bco", early_stopping=2, eval_steps=1, logging_steps=4, max_steps=8)
        with pytest.MonkeyPatch.context() as patch:
            worse_and_worse(patch, [0.9, 0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
            run = train(config)
        said = json.loads((run / "evaluation.json").read_text())
        evaluate_run(replace(config, evaluate_only=run))
        found = json.loads((run / "evaluation.json").read_text())
        assert said["step"] == found["step"] == 2
        for name, metric in said["metrics"].items():
            assert found["metrics"][name]["value"] == pytest.approx(metric["value"], abs=2e-5), name

    def test_a_line_that_a_crash_cut_off_is_no_obstacle(self, run: Path, config: TrainConfig) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        (run / "evaluation.json").unlink()
        evaluate_run(replace(config, evaluate_only=run))
        assert json.loads((run / "evaluation.json").read_text())["metrics"]

    def test_what_a_run_does_not_say(
        self, run: Path, config: TrainConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Remove from the run which rows it was trained on, and their weights."""
        other = self.other(base, tmp_path / "other", chat_rows(9, seed=5))
        options = replace(config, cache=other, evaluate_only=run)
        (run / "rewards.parquet").unlink()
        found = json.loads(evaluate_run(options).read_text())
        assert found["rows"] == 9
        assert found["rows_are"] == "all of them; there is no record of the rows that the run was trained on"
        assert "warning     the run may have been trained on any of these 9 rows" in capsys.readouterr().out
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**record, "weights": "auto"}))
        with pytest.raises(ConfigError, match=r"run\.json: the class weights of the run are missing"):
            evaluate_run(options)

    def test_trains_and_changes_nothing(self, run: Path, config: TrainConfig) -> None:
        before = {
            path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "evaluation.json"
        }
        evaluate_run(replace(config, evaluate_only=run))
        assert {path: path.read_bytes() for path in before} == before
        assert {path.name for path in run.iterdir()} == {path.name for path in before} | {"evaluation.json"}

    def test_a_full_disk_is_one_message(self, run: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        before = (run / "evaluation.json").read_bytes()

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(offline_kto.kto_core.durable_files, "flush", full)
        result = CliRunner().invoke(kto_train, ["--evaluate-only", str(run), "--cache", str(config.cache)])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert "cannot be written: [Errno 28] No space left on device. Make room" in result.stderr
        assert (run / "evaluation.json").read_bytes() == before
        assert not [*run.glob(".*")]

    def test_an_unfinished_run(self, run: Path, config: TrainConfig, tmp_path: Path) -> None:
        (run / "config.json").unlink()
        with pytest.raises(ConfigError, match="contains no model; the run is not finished"):
            evaluate_run(replace(config, evaluate_only=run))

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("none", "there is no such folder"),
            ("file", "it is a file"),
            ("", "holds file, but no run.json"),
            ("new", "is empty"),
        ],
    )
    def test_what_is_no_run(self, name: str, found: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "new").mkdir()
        folder = tmp_path / name
        result = CliRunner().invoke(kto_train, ["--evaluate-only", str(folder), "--cache", "refs"])
        assert result.exit_code == 1
        assert f"--evaluate-only {folder}: " in result.output
        assert found in result.output
        assert "Name the folder of a finished run of kto-train" in result.output
        assert "Errno" not in result.output

    def test_a_sweep_and_its_trials(self, config: TrainConfig, tmp_path: Path) -> None:
        run = train(replace(config, out=tmp_path / "sweep/trials/0003"))
        (run / "config.json").unlink()
        (tmp_path / "sweep/sweep.yaml").touch()
        with pytest.raises(ConfigError, match="a sweep keeps only the best trial's, in best/"):
            evaluate_run(replace(config, evaluate_only=run))
        command = ["--evaluate-only", str(tmp_path / "sweep"), "--cache", str(config.cache)]
        assert f"a sweep; its best run is {tmp_path}/sweep/best" in CliRunner().invoke(kto_train, command).output

    def test_a_cache_of_another_tokenizer(self, run: Path, config: TrainConfig, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path / "other")
        tokenizer = json.loads((tmp_path / "other/tokenizer_config.json").read_text())
        tokenizer["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
        (tmp_path / "other/tokenizer_config.json").write_text(json.dumps(tokenizer))
        (tmp_path / "other/chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(TrainingError, match="its chat template differs"):
            evaluate_run(replace(config, evaluate_only=tmp_path / "other"))

    def test_pairs(self, base: Path, tmp_path: Path, config: TrainConfig) -> None:
        data = write_rows(tmp_path / "pairs.jsonl", pair_rows(8))
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "pairs"))
        run = train(replace(config, cache=tmp_path / "pairs", loss="dpo"))
        said = json.loads((run / "evaluation.json").read_text())
        evaluate_run(replace(config, cache=tmp_path / "pairs", loss="dpo", evaluate_only=run))
        found = json.loads((run / "evaluation.json").read_text())
        assert found["metrics"]["loss"]["value"] == pytest.approx(said["metrics"]["loss"]["value"], abs=2e-5)


@pytest.mark.slow
def test_the_hold_out_has_a_seed_of_its_own(config: TrainConfig) -> None:
    """Runs with other seeds are compared on the same rows."""
    splits = []
    for seed, eval_seed in ((0, None), (1, 0), (1, None)):
        run = train(replace(config, out=config.out.with_name(f"{seed}-{eval_seed}"), seed=seed, eval_seed=eval_seed))
        table = pq.read_table(run / "rewards.parquet").to_pydict()
        splits.append({r for r, s in zip(table["row_id"], table["split"], strict=True) if s == "held_out"})
    assert splits[0] == splits[1] != splits[2]
