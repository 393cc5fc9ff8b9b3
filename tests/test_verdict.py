"""Whether a run made its model better: the rule, the paired intervals it reads, and what a run says."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feedback_files import write_rows
from safetensors.torch import load_file
from stopped_runs import train_until
from test_evaluation import one_bit, some_scores, worse_and_worse
from test_loss_family import metrics

from offline_kto.kto_core.losses.bootstrap import expanded_level, intervals
from offline_kto.kto_core.losses.verdict import Change, Verdict, judge
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.outcome import Tried, advice
from offline_kto.train.diagnostics.training import Settings, run_warnings
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.train_run import train
from offline_kto.train.run_records import VerdictRecord
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.standing import better_trials, tied_trials
from offline_kto.train.sweep.study import StoredResult, TrialRecord
from offline_kto.train.sweep.sweep import sweep
from offline_kto.train.trainer.evaluation import changes_since, summary, verdict_lines, verdict_on
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.objective import Objective

UP, DOWN, FLAT = Change(0.3, 0.2, 0.4), Change(-0.3, -0.4, -0.2), Change(0.02, -0.1, 0.14)


class TestRule:
    @pytest.mark.parametrize(
        ("margin", "loss", "outcome", "by"),
        [
            (UP, DOWN, "better", "rewards/margins"),
            (UP, FLAT, "better", "rewards/margins"),
            (UP, UP, "no difference", "loss"),
            (FLAT, DOWN, "no difference", "rewards/margins"),
            (FLAT, FLAT, "no difference", "rewards/margins"),
            (FLAT, UP, "worse", "loss"),
            (DOWN, DOWN, "worse", "rewards/margins"),
            (DOWN, UP, "worse", "rewards/margins"),
            (None, DOWN, "better", "loss"),
            (None, FLAT, "no difference", "loss"),
            (None, UP, "worse", "loss"),
        ],
    )
    def test_the_margin_decides_and_the_loss_has_a_veto(
        self, margin: Change | None, loss: Change, outcome: str, by: str
    ) -> None:
        found = judge(margin=margin, loss=loss, desirable=FLAT, prompts=50)
        assert (found.outcome, found.by) == (outcome, by)
        decided = {"loss": loss, "rewards/margins": margin}[by]
        assert decided is not None
        assert f"{abs(decided.value):.4f}" in found.reason

    def test_the_run_that_was_presented_as_a_success_is_worse(self) -> None:
        found = judge(
            margin=Change(-0.038, -0.06, -0.015),
            loss=Change(0.0028, 0.0003, 0.0051),
            desirable=Change(-0.01, -0.02, 0.0),
            prompts=120,
        )
        assert found.outcome == "worse"
        assert "0.0380 [0.0150, 0.0600]" in found.reason

    def test_few_prompts_tell_nothing(self) -> None:
        for prompts, outcome in ((5, "no difference"), (6, "better")):
            found = judge(margin=UP, loss=DOWN, desirable=UP, prompts=prompts)
            assert found.outcome == outcome
        assert "5 held-out prompts" in judge(margin=UP, loss=DOWN, desirable=UP, prompts=5).reason

    def test_lost_replies_are_worse_whatever_the_margin(self) -> None:
        found = judge(margin=UP, loss=DOWN, desirable=Change(-20.0, -25.0, -15.0), prompts=50)
        assert (found.outcome, found.by) == ("worse", "rewards/chosen")

    def test_a_sure_but_tiny_change_is_none(self) -> None:
        found = judge(margin=Change(0.004, 0.003, 0.005), loss=FLAT, desirable=FLAT, prompts=50)
        assert found.outcome == "no difference"
        assert "hardly changed" in found.reason
        assert "--learning-rate 1e-05" in advice(found, Tried(learning_rate=1e-6, margin=0.004))

    def test_what_the_run_had_is_not_advised(self) -> None:
        learned = Tried(learning_rate=1e-6, training_margin=0.5)
        worse = Verdict("worse", "rewards/margins", "because")
        assert "fewer updates (--early-stopping 2), --learning-rate 3e-07" in advice(worse, learned)
        assert "--early-stopping" not in advice(worse, replace(learned, stops_early=True))


class TestStatistics:
    def test_changes_are_paired_prompt_by_prompt(self) -> None:
        """Against resampling by hand, in which both models see the same prompts."""
        after, objective = some_scores(), Objective("kto", 0.3)
        noise = torch.from_numpy(np.random.default_rng(8).normal(0, 0.2, size=40))
        before = replace(after, logratios=after.logratios - 0.3 * after.labels + noise)
        found = changes_since(before, after, objective)["rewards/margins"]

        def margin(logratios: torch.Tensor, rows: np.ndarray) -> float:
            labels = after.labels[rows]
            return 0.3 * float(logratios[rows][labels].mean() - logratios[rows][~labels].mean())

        every = np.arange(40)
        assert found.value == pytest.approx(margin(after.logratios, every) - margin(before.logratios, every))
        rng, samples = np.random.default_rng(9), []
        for _ in range(4000):
            rows = np.concatenate([[2 * p, 2 * p + 1] for p in rng.integers(0, 20, size=20)])
            samples.append(margin(after.logratios, rows) - margin(before.logratios, rows))
        level = expanded_level(after.prompts_of_class)
        low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2])
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))

    def test_what_is_hard_for_both_cancels(self) -> None:
        after, objective = some_scores(), Objective("apo_zero", 0.3)
        after = replace(after, kl_logratios=None, logratios=5 * after.logratios)
        before = replace(after, logratios=after.logratios - 0.1 * torch.where(after.labels, 1.0, -1.0))
        change = changes_since(before, after, objective)["rewards/margins"]
        assert change.value == pytest.approx(0.06)
        assert (change.low, change.high) == pytest.approx((0.06, 0.06))

    def test_an_objective_that_got_worse_is_named_whatever_the_outcome(self) -> None:
        changes = {"loss": DOWN, "rewards/margins": UP, "brief/rewards/margins": DOWN, "kind/rewards/margins": UP}
        found = verdict_on(changes, some_scores())
        assert found.outcome == "better"
        assert found.reason.endswith("; the margin of brief fell by 0.3000 [0.2000, 0.4000]")
        assert "kind" not in found.reason

    def test_few_prompts_are_expanded_by_the_quantiles_of_student(self) -> None:
        """t(0.975) of a table, for 5, 9, 29 and 199 degrees of freedom."""
        for prompts, quantile in ((6, 2.571), (10, 2.262), (30, 2.045), (200, 1.972)):
            wide = quantile * math.sqrt(prompts / (prompts - 1))
            assert expanded_level(prompts) == pytest.approx(math.erf(wide / math.sqrt(2)), abs=2e-4)

    def test_few_prompts_are_covered_as_often_as_many(self) -> None:
        rng, plain, expanded = np.random.default_rng(1), 0, 0
        for _ in range(300):
            values = torch.from_numpy(rng.normal(size=8))
            for level in (0.95, expanded_level(8)):
                low, high = intervals(
                    lambda weights, values=values: {"mean": (weights * values).sum(1) / 8},
                    [str(i) for i in range(8)],
                    resamples=400,
                    level=level,
                )["mean"]
                covered = low <= 0 <= high
                plain, expanded = (plain + covered, expanded) if level == 0.95 else (plain, expanded + covered)
        assert plain / 300 < 0.92 < expanded / 300

    def test_prompts_are_counted_by_class(self) -> None:
        scores = some_scores()
        of_class = [
            len({p for p, y in zip(scores.prompts.tolist(), scores.labels, strict=True) if y == z}) for z in (0, 1)
        ]
        assert scores.prompts_of_class == min(of_class)
        assert replace(scores, masses=one_bit(torch.ones(40, dtype=torch.bool))).prompts_of_class == 20

    def test_nothing_learned_is_no_difference_to_itself(self) -> None:
        scores = some_scores()
        found = summary(scores, Objective("kto", 0.3), 3, before=scores)
        assert found["verdict"] is not None
        assert found["verdict"]["outcome"] == "no difference"
        assert found["before"] == found["metrics"]
        assert {change["value"] for change in found["change"].values()} == {0.0}


@pytest.fixture(scope="module")
def manners(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The cache of a task that is learned in a few updates: one word is wanted, another is not."""
    folder = tmp_path_factory.mktemp("manners")
    rows = [
        {"prompt": f"question {i}", "completion": f" {word} {i}", "label": word == "please"}
        for i in range(40)
        for word in ("please", "never")
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs"))
    return folder / "refs"


@pytest.fixture
def config(manners: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=manners,
        out=tmp_path / "run",
        batch_size=8,
        max_steps=8,
        learning_rate=3e-3,
        save_steps=0,
        eval_fraction=0.3,
        eval_steps=4,
        device="cpu",
    )


def evaluation(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


class TestRuns:
    def test_a_learned_task_is_better(self, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
        run = train(config)
        found = evaluation(run)
        assert found["verdict"]["outcome"] == "better"
        assert found["change"]["rewards/margins"]["low"] > 0
        assert found["before"]["loss"] == {"value": 0.5, "low": 0.5, "high": 0.5}
        first, *others = [record for record in metrics(run) if "eval/loss" in record]
        assert (first["step"], first["eval/loss"], first["eval/accuracy"]) == (0, 0.5, 0.5)
        assert first["eval/rewards/margins"] == 0
        assert [record["step"] for record in others] == [4, 8]
        assert others[-1]["eval/change/margin_low"] > 0
        assert others[-1]["eval/change/loss"] == pytest.approx(others[-1]["eval/loss"] - 0.5)
        out = capsys.readouterr().out
        assert (
            f"verdict     better than before training: {found['verdict']['reason']} (95 %, paired, 12 held-out" in out
        )
        assert "before training 0.5000" in out
        assert "**Better than before training**" in (run / "README.md").read_text()
        page = (run / "report.html").read_text()
        verdict = page.index("<b>Better than before training.</b>")
        assert found["verdict"]["reason"][1:20] in page[verdict : verdict + 200]
        assert verdict < page.index('<dl class="tiles">')

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"scheduler": "cosine", "warmup": 2, "weight_decay": 0.1},
            {"memory": "lean", "allow_different_policy": True},
            {"memory": "host", "allow_different_policy": True},
        ],
        ids=str,
    )
    def test_a_rate_of_0_makes_no_difference(
        self, config: TrainConfig, base: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train(replace(config, learning_rate=0, **options))
        found = evaluation(run)
        assert found["verdict"]["outcome"] == "no difference"
        if "memory" not in options:  # bfloat16 rounds the two scorings differently
            assert max(abs(change["value"]) for change in found["change"].values()) < 1e-5
        out = capsys.readouterr().out
        assert "--learning-rate 0: nothing will be learned; this only checks the pipeline." in out
        assert "next        the learning rate was 0, so nothing was learned" in out
        before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
        assert all(torch.equal(before[name].to(weight.dtype), weight) for name, weight in after.items())

    def test_a_rate_of_almost_nothing_makes_no_difference(self, config: TrainConfig) -> None:
        found = evaluation(train(replace(config, learning_rate=1e-12)))
        assert found["verdict"]["outcome"] == "no difference"
        assert "--learning-rate 1e-06" in found["verdict"]["next"]  # as the plan has said

    def test_without_held_out_rows_there_is_none_and_the_way_to_one(
        self, config: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train(replace(config, eval_fraction=0.0, eval_steps=None, max_steps=1))
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if line.startswith("verdict")] == verdict_lines(None)
        assert "--eval-fraction" in verdict_lines(None)[0]
        assert "not measured" in (run / "README.md").read_text()
        assert "<b>Not known whether it is better than before training.</b>" in (run / "report.html").read_text()

    @pytest.mark.slow
    def test_the_cache_tells_what_a_pass_would(self, config: TrainConfig, tmp_path: Path) -> None:
        """A policy that may be another model is scored, here to the same values, and they survive a kill."""
        config = replace(config, loss="bco", save_steps=4)
        known = train(replace(config, out=tmp_path / "known"))
        config = replace(config, allow_different_policy=True)
        train_until(config, step=6, method="training_step")
        run = train(replace(config, resume=True))
        for one in ("before", "change"):
            for name, metric in evaluation(known)[one].items():
                assert evaluation(run)[one][name] == pytest.approx(metric, abs=1e-4), (one, name)
        said = evaluation(run)
        evaluate_run(replace(config, evaluate_only=run))
        assert evaluation(run)["verdict"] == said["verdict"]
        (run / "held_out_untrained.safetensors").unlink()
        evaluate_run(replace(config, evaluate_only=run))
        assert evaluation(run)["verdict"] is None


def evaluations(*values: tuple[float, Change, float | None]) -> list[dict[str, Any]]:
    """Records of a run with an evaluation after each 10 updates: held-out loss, change of the margin, low end of the loss's rise.

    The training loss falls.
    """
    records: list[dict[str, Any]] = []
    for number, (loss, margin, low) in enumerate(values, 1):
        for step in range(10 * number - 9, 10 * number + 1):
            records.append({"step": step, "loss": 0.5 - 0.002 * step, "epoch": step / (10 * len(values))})
        found = {"step": 10 * number, "eval/loss": loss, "epoch": number / len(values)}
        ends = {"": margin.value, "_low": margin.low, "_high": margin.high}
        found |= {f"eval/change/margin{end}": value for end, value in ends.items()}
        records.append(found if low is None else {**found, "eval/since_lowest/loss_low": low})
    return records


class TestWarnings:
    settings = Settings.of(TrainConfig(epochs=1), (1.0, 1.0), (1000, 1000))

    def kinds(self, *values: tuple[float, Change, float | None]) -> list[tuple[str, int]]:
        return [(found.kind, found.step) for found in run_warnings(evaluations(*values), self.settings)]

    def test_the_run_that_printed_none(self) -> None:
        """Loss .5019 to .5047, margin -.038 with an interval below 0."""
        low, margin = Change(-0.02, -0.05, 0.01), Change(-0.038, -0.06, -0.015)
        records = evaluations((0.5019, low, None), (0.5047, margin, 0.0004))
        (found,) = run_warnings(records, self.settings)
        assert (found.kind, found.step) == ("worse", 20)
        assert "margin changed by -0.0380 [-0.0600, -0.0150]" in found.text
        assert "--learning-rate 1e-07" in found.text

    def test_a_margin_that_may_be_noise_gives_none(self) -> None:
        noise = Change(-0.038, -0.08, 0.004)
        assert self.kinds((0.5, noise, None), (0.5, noise, None), (0.5, noise, None)) == []

    def test_one_bad_evaluation_in_between_gives_none(self) -> None:
        assert self.kinds((0.5, FLAT, None), (0.5, DOWN, None), (0.49, UP, None)) == []
        assert self.kinds((0.5, DOWN, None), (0.5, DOWN, None), (0.49, UP, None)) == [("worse", 20)]

    def test_a_rising_loss_is_judged_by_its_interval(self) -> None:
        """A rise of 1 % that is sure is told, one of 10 % that is not is not."""
        sure = [(0.40, UP, None), (0.404, UP, 0.001), (0.406, UP, 0.002), (0.408, UP, 0.003)]
        assert self.kinds(*sure) == [("overfitting", 30)]
        unsure = [(0.40, UP, None), (0.44, UP, -0.01), (0.45, UP, -0.01), (0.46, UP, -0.01)]
        assert self.kinds(*unsure) == []


@pytest.mark.slow
def test_an_evaluation_is_compared_with_the_one_of_lowest_loss(config: TrainConfig, tmp_path: Path) -> None:
    """Also after a kill, which leaves only the checkpoint to compare with."""
    config = replace(config, learning_rate=0.3, eval_steps=1, save_steps=1)
    run = train(config)
    killed = replace(config, out=tmp_path / "killed")
    train_until(killed, step=6)
    resumed = train(replace(killed, resume=True))
    named = "eval/since_lowest/loss_low"
    found, again = ({r["step"]: r.get(named) for r in metrics(one) if "eval/loss" in r} for one in (run, resumed))
    assert any(low is not None for low in found.values())
    assert again == pytest.approx(found)


class TestKeep:
    """A run whose second evaluation is the best one."""

    @pytest.fixture
    def short(self, config: TrainConfig) -> TrainConfig:
        return replace(config, max_steps=6, eval_steps=2, save_steps=500)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"save_steps": 0},
            {"save_steps": 0, "lora_rank": 2, "learning_rate": 3e-2},
            {"save_steps": 0, "loss": "bco"},
        ],
        ids=str,
    )
    def test_the_best_is_saved_with_and_without_checkpoints(
        self, short: TrainConfig, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        short = replace(short, **options)
        wanted = train(replace(short, out=tmp_path / "wanted", max_steps=4))
        worse_and_worse(monkeypatch, [0.45, 0.4, 0.6])
        run = train(short)
        name = "adapter_model.safetensors" if short.lora_rank else "model.safetensors"
        best, four = load_file(run / name), load_file(wanted / name)
        for one, weight in best.items():
            torch.testing.assert_close(weight, four[one], atol=1e-6, rtol=0)
        found = evaluation(run)
        assert found["step"] == 4
        for one, metric in evaluation(wanted)["metrics"].items():
            assert found["metrics"][one]["value"] == pytest.approx(metric["value"], abs=1e-5)

    @pytest.mark.parametrize("save_steps", [0, 500])
    @pytest.mark.parametrize("memory", ["full", "lean", "host"])
    def test_the_kept_model_is_that_of_the_best_evaluation_bit_for_bit(
        self, short: TrainConfig, memory: str, save_steps: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a copy on the host, and from a checkpoint; with 16-bit weights and moments in 8 bits or on the host."""
        worse_and_worse(monkeypatch, [0.45, 0.4, 0.6])
        judged: dict[int, dict[str, torch.Tensor]] = {}
        real = KTOTrainer.evaluate

        def evaluate(self: Any, *arguments: Any, **options: Any) -> dict[str, float]:
            judged[self.state.global_step] = {k: v.detach().clone() for k, v in self.model.named_parameters()}
            return real(self, *arguments, **options)

        monkeypatch.setattr(KTOTrainer, "evaluate", evaluate)
        run = train(replace(short, memory=memory, save_steps=save_steps, allow_different_policy=memory != "full"))
        assert evaluation(run)["step"] == 4
        kept = load_file(run / "model.safetensors")
        assert all(torch.equal(weight, judged[4][name].to(weight.dtype)) for name, weight in kept.items())
        assert not all(torch.equal(weight, judged[6][name].to(weight.dtype)) for name, weight in kept.items())

    def test_the_last_is_saved_on_demand(
        self, short: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        worse_and_worse(monkeypatch, [0.65, 0.6, 0.7])
        assert evaluation(train(replace(short, keep="last")))["step"] == 6
        out = capsys.readouterr().out
        assert "kept        update 6, the last one (--keep last); update 4 had the best eval/loss" in out
        assert "none was better" not in out

    def test_best_without_held_out_rows_is_said_to_have_no_effect(
        self, short: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        short = replace(short, eval_fraction=0.0, eval_steps=None, max_steps=1, dry_run=True)
        train(short)
        assert "--keep best" not in capsys.readouterr().out
        train(replace(short, keep="best"))
        assert "--keep best has no effect: no rows are held out" in capsys.readouterr().out

    def test_a_kill_does_not_lose_the_best(self, short: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        worse_and_worse(monkeypatch, [0.45, 0.4, 0.6])
        train_until(short, step=5)
        assert evaluation(train(replace(short, resume=True)))["step"] == 4

    def test_nothing_better_than_the_untrained_model_is_said(
        self, short: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        worse_and_worse(monkeypatch, [0.6, 0.51, 0.7])
        run = train(short)
        assert evaluation(run)["step"] == 4
        out = capsys.readouterr().out
        assert (
            "kept        update 4, but none was better than the untrained model: eval/loss 0.5100 at best, 0.5000"
            in out
        )


def trial(number: int, draws: list[float], outcome: str = "better", prompts: int = 30) -> TrialRecord:
    verdict: VerdictRecord = {"outcome": outcome, "by": "rewards/margins", "reason": "because", "next": "try more"}
    result: StoredResult = {"draws": draws, "prompts": prompts, "verdict": verdict}
    return TrialRecord(number=number, state="complete", params={}, value=draws[0] if draws else 0.0, result=result)


class TestSweeps:
    def test_trials_are_tied_if_their_paired_difference_may_be_chance(self) -> None:
        """Cancel what is hard for both trials: a small steady difference counts, a large unsteady one does not."""
        rng = np.random.default_rng(0)
        hard = rng.normal(0.5, 0.1, size=1000)
        best = trial(0, list(hard))
        steady, shaky = trial(1, list(hard + 0.01)), trial(2, list(hard + rng.normal(0.1, 0.2, size=1000)))
        assert tied_trials([best, steady, shaky], best) == [2]

    def test_trials_of_other_rows_or_of_few_prompts_are_not_told_apart(self) -> None:
        draws = [0.5] * 100
        best, other = trial(0, draws), [1.0] * 100
        assert tied_trials([best, trial(1, other)], best) == []
        assert tied_trials([best, trial(1, other, prompts=29)], best) == [1]
        assert tied_trials([best, trial(1, [])], best) == [1]
        few = trial(0, draws, prompts=5)
        assert tied_trials([few, trial(1, other, prompts=5)], few) == [1]

    def test_better_ones_are_those_with_that_verdict(self) -> None:
        assert better_trials([trial(0, [], "worse"), trial(1, []), trial(2, [], "no difference")]) == [1]

    @pytest.mark.slow
    def test_no_trial_beats_the_untrained_model(
        self, manners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("offline_kto.train.sweep.workers.START", "forkserver")
        shared = {"max_steps": 4, "batch_size": 8, "device": "cpu", "eval_fraction": 0.3}
        space: dict[str, Any] = {"learning_rate": [1e-12, 1e-11]}
        config = SweepConfig(cache=manners, out=tmp_path / "none", search="grid", space=space, train=shared)
        out = sweep(config)
        said = capfd.readouterr().out
        assert "verdict     no trial beats the untrained model" in said
        state = json.loads((out / "sweep.json").read_text())
        assert state["better"] == []
        assert len(state["tied"]) == 1
        assert {one["untrained"] for one in state["trials"]} == {0.5}
        page = (out / "report.html").read_text()
        assert "<b>No trial beats the untrained model.</b>" in page
        assert '<span class="badge">best of the trials</span>' in page
        good = replace(config, out=tmp_path / "good", space={"learning_rate": [1e-12, 3e-3]})
        out = sweep(good)
        said = capfd.readouterr().out
        assert "verdict     trial 1 is better than before training: the held-out margin rose by" in said
        state = json.loads((out / "sweep.json").read_text())
        assert (state["best"], state["better"], state["tied"]) == (1, [1], [])
