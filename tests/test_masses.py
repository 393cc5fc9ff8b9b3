"""Rows that are judged by more than one bit: the equalities that masses keep, and a naive reference."""

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
import transformers
from feedback_files import write_rows
from judged_caches import Row, judged, rewritten
from safetensors.torch import load_file
from stopped_runs import train_until
from test_loss_family import pair_rows

from offline_kto.kto_core.errors import CacheError, ConfigError, TrainingError
from offline_kto.kto_core.losses.metrics import BatchOutcome, Tokens, metrics_from
from offline_kto.kto_core.losses.preference_losses import judged_losses, kto_losses
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig, parse_objective
from offline_kto.train.data.cache_rows import CacheRows, RowKey
from offline_kto.train.data.row_words import rows_in_words
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.data.trl_rows import trl_rows
from offline_kto.train.diagnostics.settings import class_weight_values
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.train_run import train
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.pareto import pareto_front
from offline_kto.train.sweep.space import Trials
from offline_kto.train.sweep.sweep import sweep
from offline_kto.train.trainer.evaluation import Scores, held_out_metrics, summary
from offline_kto.train.trainer.objective import Objective

TRAIN = "from offline_kto.train.cli import train; train()"
ROWS, STEPS = 20, 3
SINGLE = ["kto", "humanline", "apo_zero", "bco"]


def votes_of(number: int) -> tuple[int, int]:
    """Three votes for a completion and none against it, two and one, ... by the number of its row."""
    return [(3, 0), (2, 1), (1, 2), (0, 3), (1, 1)][number % 5]


@pytest.fixture(scope="module")
def voted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache's rows with counts of votes as their masses."""
    out = tmp_path_factory.mktemp("voted") / "refs"
    return rewritten(cache, out, lambda number, row: [judged(row, *map(float, votes_of(number)))])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A cache of ten pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    data = write_rows(folder / "pairs.jsonl", pair_rows(10))
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", kl_partners=2))
    return folder / "refs"


def config_for(cache: Path, out: Path, loss: str = "kto", **options: Any) -> TrainConfig:
    """Updates of all rows together, unless told otherwise, that move the weights visibly."""
    settings = {"batch_size": 1000, "max_steps": STEPS, "learning_rate": 3e-3, "save_steps": 0, "shuffle": False}
    return TrainConfig(cache=cache, out=out, loss=loss, device="cpu", **{**settings, **options})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TRAINED = (
    "loss",
    "kl_raw",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "accuracy",
    "grad_norm",
)


def assert_equal(one: Path, other: Path, *, exactly: bool = False) -> None:
    """Compare the weights of two runs, and what they logged."""
    found, wanted = (load_file(run / "model.safetensors") for run in (one, other))
    for name, weight in wanted.items():
        if exactly:
            assert torch.equal(found[name], weight)
        else:
            torch.testing.assert_close(found[name], weight, atol=3e-5, rtol=0)
    logged = ([record for record in metrics(run) if "loss" in record] for run in (one, other))
    for mine, theirs in zip(*logged, strict=True):
        shared = [name for name in TRAINED if name in theirs]
        assert len(shared) > 6
        for name in shared:
            assert mine[name] == (theirs[name] if exactly else pytest.approx(theirs[name], rel=2e-3, abs=1e-5))


def written_out(number: int, row: Row) -> list[Row]:
    up, down = votes_of(number)
    return [{**row, "label": True}] * up + [{**row, "label": False}] * down


@pytest.mark.parametrize("loss", SINGLE)
def test_votes_equal_the_same_rows_written_out(loss: str, voted: Path, cache: Path, tmp_path: Path) -> None:
    many = rewritten(cache, tmp_path / "many", written_out)
    assert len(CacheRows(many)) > len(CacheRows(voted)) == ROWS
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    one = train(config_for(voted, tmp_path / "one", loss, **weights))
    other = train(config_for(many, tmp_path / "other", loss, **weights))
    assert_equal(one, other)


@pytest.mark.parametrize("loss", ["kto", "bco", "dpo", "ipo"])
def test_a_weight_of_two_equals_the_row_twice(loss: str, cache: Path, pairs: Path, tmp_path: Path) -> None:
    def weight(number: int) -> int:
        return 2 if number // 2 % 3 == 0 else 1  # the two rows of a pair are neighbours

    def twice(number: int, row: Row) -> list[Row]:
        copies = [row] * weight(number)
        return [{**one, "pair_id": one["pair_id"] and f"{one['pair_id']}{k}"} for k, one in enumerate(copies)]

    def weighted(number: int, row: Row) -> list[Row]:
        return [judged(row, weight(number) * float(row["label"]), weight(number) * float(not row["label"]))]

    scored = pairs if loss in ("dpo", "ipo") else cache
    one = train(config_for(rewritten(scored, tmp_path / "weighted", weighted), tmp_path / "one", loss))
    other = train(config_for(rewritten(scored, tmp_path / "twice", twice), tmp_path / "other", loss))
    assert_equal(one, other)
    assert TrainingData.open(config_for(tmp_path / "weighted", tmp_path, loss)).units.size == ROWS


@pytest.mark.parametrize("loss", ["kto", "bco", "dpo"])
def test_masses_of_one_bit_equal_labels_bit_for_bit(loss: str, cache: Path, pairs: Path, tmp_path: Path) -> None:
    def one_bit(number: int, row: Row) -> list[Row]:
        return [judged(row, float(row["label"]), float(not row["label"]))]

    scored = pairs if loss == "dpo" else cache
    options = {"batch_size": 8, "shuffle": True, "eval_fraction": 0.3}
    one = train(config_for(rewritten(scored, tmp_path / "refs", one_bit), tmp_path / "one", loss, **options))
    other = train(config_for(scored, tmp_path / "other", loss, **options))
    assert_equal(one, other, exactly=True)
    found, wanted = (json.loads((run / "evaluation.json").read_bytes())["metrics"] for run in (one, other))
    assert found == wanted


def naive_run(base: Path, config: TrainConfig) -> tuple[torch.nn.Module, list[float]]:
    """Updates of all rows with a live reference: one row at a time, and its two losses written out in float64."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(base).train()
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    cache = CacheRows(config.cache)

    def logp(model: torch.nn.Module, sequence: Any) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(int))[None]
        scores = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return scores[len(sequence.prompt_ids) - 1 :].sum()

    def ratio(sequence: Any) -> torch.Tensor:
        with torch.no_grad():
            ref = logp(reference, sequence)
        return logp(policy, sequence) - ref

    losses, shift = [], []
    for epoch in range(STEPS):
        rows = [cache[RowKey(i, epoch)] for i in range(ROWS)]
        total = sum(sum(row.masses) for row in rows)
        with torch.no_grad():
            z0 = max(0.0, sum(sum(row.masses) * float(ratio(row.mismatched)) for row in rows) / total)
            shift.append(sum(sum(row.masses) * float(ratio(row.matched)) for row in rows) / total)
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            a, b, r = *row.masses, ratio(row.matched)
            if config.loss == "bco":
                delta = sum(shift) / len(shift)
                good, bad = (torch.log(1 + torch.exp(-sign * config.beta * (r - delta))) for sign in (1, -1))
            else:
                good = 1 - torch.sigmoid(config.beta * (r - z0))
                bad = 1 - torch.sigmoid(config.beta * (z0 - r))
            loss = loss + a * 1.3 * good + b * 0.8 * bad
        loss = loss / total
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy, losses


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_training_equals_the_formula(loss: str, cache: Path, base: Path, tmp_path: Path) -> None:
    def shares(number: int, row: Row) -> list[Row]:
        return [judged(row, *np.random.default_rng(number).uniform(0.1, 2.0, 2).tolist())]

    refs = rewritten(cache, tmp_path / "refs", shares)
    config = config_for(refs, tmp_path / "run", loss, desirable_weight=1.3, undesirable_weight=0.8)
    expected, losses = naive_run(base, config)
    run = train(config)
    assert [one["loss"] for one in metrics(run)[:STEPS]] == pytest.approx(losses, abs=1e-4)
    found = load_file(run / "model.safetensors")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=3e-5, rtol=0)


@pytest.mark.slow
def test_how_memory_or_ranks_cut_a_batch_changes_nothing(voted: Path, tmp_path: Path) -> None:
    config = config_for(voted, tmp_path / "one", batch_size=8, max_steps=STEPS)
    one = train(config)
    assert_equal(train(replace(config, out=tmp_path / "two", max_tokens=60)), one)
    options = [
        "--cache",
        voted,
        "--out",
        tmp_path / "ranks",
        "--batch-size",
        8,
        "--max-steps",
        STEPS,
        "--device",
        "cpu",
    ]
    options += ["--learning-rate", 3e-3, "--save-steps", 0, "--no-shuffle"]
    done = forks.run(TRAIN, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path / "ranks", one)


def test_a_resumed_run_equals_one_that_was_not_stopped(voted: Path, tmp_path: Path) -> None:
    config = config_for(voted, tmp_path / "whole", "bco", batch_size=8, save_steps=1)
    whole = train(config)
    stopped = replace(config, out=tmp_path / "stopped")
    train_until(stopped, step=2)
    assert_equal(train(replace(stopped, resume=True)), whole, exactly=True)


class TestObjectives:
    @pytest.fixture(scope="class")
    def refs(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Rows whose labels are their helpfulness; half of them are judged for harmlessness as well."""

        def both(number: int, row: Row) -> list[Row]:
            helpful = (float(row["label"]), float(not row["label"]))
            harmless = (float(number % 4 == 0), float(number % 4 == 2)) if number % 2 == 0 else (0.0, 0.0)
            own = (helpful[0] + harmless[0], helpful[1] + harmless[1])
            return [judged(row, *own, helpful=helpful, harmless=harmless)]

        return rewritten(cache, tmp_path_factory.mktemp("objectives") / "refs", both)

    def test_one_objective_equals_plain_kto(self, refs: Path, cache: Path, tmp_path: Path) -> None:
        one = train(config_for(refs, tmp_path / "one", objective="helpful=1"))
        assert_equal(one, train(config_for(cache, tmp_path / "plain")), exactly=True)
        scaled = train(config_for(refs, tmp_path / "scaled", objective="helpful=3"))
        assert_equal(scaled, one)

    def test_masses_are_sums_over_objectives(self, refs: Path) -> None:
        rows = CacheRows(refs).judged_by({"helpful": 1.0, "harmless": 0.5})
        helpful, harmless = (CacheRows(refs).objectives[name] for name in ("helpful", "harmless"))
        np.testing.assert_array_equal(rows.masses_of(range(ROWS)), helpful + 0.5 * harmless)
        assert [rows[i].masses for i in range(ROWS)] == [tuple(one) for one in (helpful + 0.5 * harmless).tolist()]
        np.testing.assert_array_equal(CacheRows(refs).masses_of(range(ROWS)), helpful + harmless)

    def test_rows_that_the_choice_does_not_judge_are_left_out_and_counted(self, refs: Path, tmp_path: Path) -> None:
        data = TrainingData.open(config_for(refs, tmp_path, objective="harmless=1"))
        assert data.units.ravel().tolist() == [*range(0, ROWS, 2)]
        assert (data.unjudged, data.unpaired, data.class_counts) == (10, 0, (5, 5))
        assert data.class_masses == (5.0, 5.0)
        assert data.run_data()["unjudged"] == 10

    @pytest.mark.parametrize("seed", range(3))
    def test_every_row_is_counted_once_in_the_plan(self, refs: Path, tmp_path: Path, seed: int) -> None:
        data = TrainingData.open(config_for(refs, tmp_path, objective="harmless=1", eval_fraction=0.5, seed=seed))
        found = data.run_data()
        held = found["held_out_desirable"] + found["held_out_undesirable"]
        assert 0 < held < 10
        assert found["desirable"] + found["undesirable"] + held + found["unjudged"] == ROWS
        assert f"{found['unjudged']} left out (not judged by --objective)" in rows_in_words(found)

    def test_held_out_values_of_each_objective(self, refs: Path, tmp_path: Path) -> None:
        run = train(config_for(refs, tmp_path / "run", eval_fraction=0.5, objective="harmless=1"))
        found = json.loads((run / "evaluation.json").read_bytes())["metrics"]
        names = {"helpful/accuracy", "helpful/rewards/margins", "harmless/accuracy", "harmless/rewards/margins"}
        assert names < found.keys()
        logged = next(one for one in reversed(metrics(run)) if "eval/loss" in one)
        assert {f"eval/{name}" for name in names} < logged.keys()
        assert found["harmless/accuracy"]["value"] == found["accuracy"]["value"]
        assert found["harmless/rewards/margins"]["value"] == pytest.approx(found["rewards/margins"]["value"])

    def test_a_finished_run_is_evaluated_by_its_own_objectives(self, refs: Path, cache: Path, tmp_path: Path) -> None:
        config = config_for(refs, tmp_path / "run", eval_fraction=0.5, objective="harmless=1")
        run = train(config)
        before = json.loads((run / "evaluation.json").read_bytes())["metrics"]
        evaluate_run(replace(config, evaluate_only=run))
        after = json.loads((run / "evaluation.json").read_bytes())["metrics"]
        assert {"harmless/accuracy", "helpful/rewards/margins"} < after.keys() == before.keys()
        for name, metric in after.items():
            assert metric == pytest.approx(before[name], abs=2e-5), name
        evaluate_run(replace(config, cache=cache, evaluate_only=run))
        (other,) = run.glob("evaluation-*.json")
        assert "harmless/accuracy" not in json.loads(other.read_bytes())["metrics"]

    @pytest.mark.parametrize(
        ("objective", "words"),
        [
            ("honest=1", "--objective honest: the cache .* has no such objective; it has helpful, harmless"),
            ("harmless=0,helpful=1", None),
        ],
    )
    def test_an_objective_that_is_missing_is_named(self, refs: Path, objective: str, words: str | None) -> None:
        config = config_for(refs, refs, objective=objective)
        if words is None:
            assert len(TrainingData.open(config).units) == ROWS
            return
        with pytest.raises(TrainingError, match=words):
            TrainingData.open(config)

    def test_a_cache_without_objectives_says_where_they_come_from(self, cache: Path) -> None:
        with pytest.raises(TrainingError, match=r"has no objectives. They come from feedback such as \"labels\""):
            TrainingData.open(config_for(cache, cache, objective="helpful=1"))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("helpful=1,harmless=0.5", {"helpful": 1.0, "harmless": 0.5}),
        (" a=b =2", {"a=b": 2.0}),
        ('{"x, y": 1, "z": 0}', {"x, y": 1.0, "z": 0.0}),
    ],
)
def test_weights_of_objectives_are_read(text: str, weights: dict[str, float]) -> None:
    assert parse_objective(text) == weights
    assert TrainConfig(objective=weights).objective_weights == weights  # type: ignore[arg-type] # a table in YAML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("helpful", "expected names and weights such as .*, got 'helpful' without a weight. Write helpful=1."),
        ("a=1e300", r"--objective a: a weight must be at most 1e\+09, got 1e\+300"),
        ("helpful=much", "expected names and weights"),
        ("=1", "expected names and weights"),
        ("a=1,", "expected names and weights"),
        ("a=-1", "a weight must be finite and not negative, got -1"),
        ("a=inf", "a weight must be finite"),
        ("a=nan", "a weight must be finite"),
        ("a=1,a=2", "--objective a: given twice"),
        ("a=0,b=0", "every weight is 0"),
        ('{"a": true}', "expected names and weights"),
        ('{"a": [1]}', "expected names and weights"),
        ("{}", "every weight is 0"),
    ],
)
def test_other_weights_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(objective=text)


def test_balanced_class_weights_count_masses(voted: Path, tmp_path: Path) -> None:
    config = config_for(voted, tmp_path, desirable_weight="auto", undesirable_weight="auto")
    data = TrainingData.open(config)
    up, down = (float(sum(votes_of(i)[side] for i in range(ROWS))) for side in (0, 1))
    assert data.class_masses == (up, down) == (28.0, 28.0)
    assert class_weight_values(config, 10.0, 40.0) == class_weight_values(config, 10, 40)


def test_trl_is_not_given_what_it_would_ignore(voted: Path) -> None:
    with pytest.raises(CacheError, match="has votes, weights, graded ratings or objectives, which TRL's"):
        trl_rows(CacheRows(voted), partner=0)


def test_rewards_file_has_the_masses(voted: Path, cache: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(train(config_for(voted, tmp_path / "one", max_steps=1)) / "rewards.parquet")
    assert table["desirable_mass"].to_pylist() == [float(votes_of(i)[0]) for i in range(ROWS)]
    plain = pq.read_table(train(config_for(cache, tmp_path / "two", max_steps=1)) / "rewards.parquet")
    assert plain.schema.names == ["split", "row_id", "prompt_id", "label", "logratio"]


class TestFormulas:
    """Against sums over rows that are written out, in float64."""

    masses = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    logratios = torch.tensor([0.4, -0.3, 1.2, 0.0], dtype=torch.float64)

    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = [], []
        for i, (up, down) in enumerate(self.masses.long().tolist()):
            rows += [i] * (up + down)
            labels += [True] * up + [False] * down
        return torch.tensor(rows), torch.tensor(labels)

    def test_losses(self) -> None:
        kl = torch.tensor(0.1, dtype=torch.float64)

        def loss(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return kto_losses(self.logratios, labels, kl, beta=0.5, weights=weights)

        found = judged_losses(loss, self.masses, (1.5, 0.7))
        rows, labels = self.repeated()
        weights = torch.where(labels, torch.tensor(1.5, dtype=torch.float64), 0.7)
        each = weights * (1 - torch.sigmoid(0.5 * torch.where(labels, 1.0, -1.0) * (self.logratios[rows] - kl)))
        assert float(found.sum()) == pytest.approx(float(each.sum()), abs=1e-12)

    def test_metrics(self) -> None:
        rows, labels = self.repeated()
        one_bit = torch.stack([labels, ~labels], 1).double()
        point, tokens = torch.tensor(0.1, dtype=torch.float64), Tokens(9, 9, 9)
        losses = self.masses.sum(1) * 0.5
        sums = BatchOutcome(losses, self.logratios, self.logratios - 9, self.masses, point, tokens).sums()
        found = metrics_from(sums, beta=0.5)
        half = torch.full((len(rows),), 0.5, dtype=torch.float64)
        wanted = metrics_from(
            BatchOutcome(half, self.logratios[rows], self.logratios[rows] - 9, one_bit, point, tokens).sums(), beta=0.5
        )
        assert (found.pop("num_desirable"), found.pop("num_undesirable")) == (2, 2)
        assert (wanted.pop("num_desirable"), wanted.pop("num_undesirable")) == (6, 5)
        assert found == pytest.approx(wanted, abs=1e-12)

    def test_held_out_metrics_and_intervals(self) -> None:
        rows, labels = self.repeated()
        prompts = ["a", "b", "c", "d"]

        def scores(masses: torch.Tensor, of: torch.Tensor) -> Scores:
            r = self.logratios[of]
            return Scores(
                [prompts[i] for i in of], masses, {}, r.abs() + 1, r - 9, r, r.flip(0)[: len(of)] * 0 + r, None
            )

        objective = Objective("kto", 0.5, (1.5, 0.7))
        one, many = scores(self.masses, torch.arange(4)), scores(torch.stack([labels, ~labels], 1).double(), rows)
        assert held_out_metrics(one, objective) == pytest.approx(held_out_metrics(many, objective), abs=1e-12)
        found, wanted = (summary(each, objective, 1)["metrics"] for each in (one, many))
        for name in wanted:
            assert found[name] == pytest.approx(wanted[name], abs=1e-9), name


class TestParetoFront:
    def test_trials_that_none_beats(self) -> None:
        def trial(helpful: float, harmless: float) -> dict[str, float]:
            return {
                "eval/helpful/rewards/margins": helpful,
                "eval/harmless/rewards/margins": harmless,
                "eval/loss": 1.0,
            }

        trials = [trial(1, 3), trial(2, 2), trial(1, 2), trial(3, 1), trial(2, 2), {"eval/loss": 0.1}]
        assert pareto_front(trials) == [0, 1, 3, 4]
        assert pareto_front([{"eval/helpful/rewards/margins": 1.0, "eval/rewards/margins": 1.0}]) is None

    def test_a_sweep_searches_weights(self, tmp_path: Path) -> None:
        space = {
            "objective.helpful": [0, 1],
            "objective.harm-less": {"low": 0.5, "high": 1.0, "points": 2},
            "beta": [0.1],
        }
        config = SweepConfig(search="grid", space=space, train={"objective": "honest=2"})
        trials = Trials.of(config)
        assert trials.points == 4
        found = [trials.config(trials.point(i)).objective_weights for i in range(4)]
        assert found[0] == {"honest": 2.0, "helpful": 0.0, "harm-less": 0.5}
        assert found[3] == {"honest": 2.0, "helpful": 1.0, "harm-less": 1.0}
        assert any("Pareto front" in line for line in trials.warnings())

    @pytest.mark.parametrize(
        ("space", "words"),
        [
            ({"objective.helpful": [-1]}, "the weight of an objective must be a number from 0"),
            ({"objective.helpful": ["much"]}, "the weight of an objective must be a number from 0"),
            ({"objective.helpful": {"low": -1, "high": 1}}, "must not be negative, got -1"),
            ({"objective.honest": [1]}, "'objective.honest' is set in space: and in train:"),
        ],
    )
    def test_weights_that_cannot_be_searched(self, space: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            Trials.of(SweepConfig(space=space, train={"objective": "honest=1"}))

    @pytest.fixture
    def partly(self, cache: Path, tmp_path: Path) -> Path:
        """Rows judged for helpfulness, of which some are judged for harmlessness."""

        def both(number: int, row: Row) -> list[Row]:
            helpful = (float(row["label"]), float(not row["label"]))
            harmless = (float(number % 4 == 0), float(number % 4 == 2)) if number % 2 == 0 else (0.0, 0.0)
            return [judged(row, *helpful, helpful=helpful, harmless=harmless)]

        return rewritten(cache, tmp_path / "refs", both)

    @pytest.mark.usefixtures("warm_workers")
    @pytest.mark.slow
    def test_a_sweep_plans_with_the_rows_of_its_trials(
        self, partly: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        space: dict[str, object] = {"objective.harmless": [0.5, 1]}
        shared = {"max_steps": 1, "eval_fraction": 0.5, "device": "cpu", "save_steps": 0}
        out = sweep(SweepConfig(cache=partly, out=tmp_path / "sweep", search="grid", space=space, train=shared))
        plan = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("rows "))
        log = (out / "trials/0000/log.txt").read_text().splitlines()
        assert plan == next(line for line in log if line.startswith("rows "))
        assert "left out (not judged by --objective)" in plan

    def test_rows_that_depend_on_a_weight_of_0_are_said(self) -> None:
        both: dict[str, object] = {"objective.helpful": [0, 1], "objective.harmless": [1, 2]}
        assert Trials.of(SweepConfig(search="grid", space=both)).planned().objective_weights == {
            "helpful": 1.0,
            "harmless": 2.0,
        }
        for space, expected in ((both, True), ({"objective.helpful": [0.5, 1]}, False)):
            lines = Trials.of(SweepConfig(search="grid", space=space)).warnings()
            assert any("gives an objective no weight leaves out" in line for line in lines) == expected

    @pytest.mark.parametrize(
        ("space", "shared"),
        [
            ({"objective.honest": [0, 1]}, {}),
            ({"beta": [0.1, 0.2]}, {"objective": {"honest": 1}}),
            ({"objective": ["helpful=1", "honest=1"]}, {}),
        ],
    )
    def test_an_unknown_objective_is_refused_before_the_study_begins(
        self, partly: Path, tmp_path: Path, space: dict[str, object], shared: dict[str, object]
    ) -> None:
        shared = {"max_steps": 1, "eval_fraction": 0.5, "device": "cpu", **shared}
        config = SweepConfig(cache=partly, out=tmp_path / "sweep", search="grid", space=space, train=shared)
        with pytest.raises(TrainingError, match="has no such objective; it has helpful, harmless"):
            sweep(config)
        assert not (tmp_path / "sweep").exists()

    @pytest.mark.usefixtures("warm_workers")
    @pytest.mark.slow
    def test_results_mark_the_front(self, cache: Path, tmp_path: Path) -> None:
        def both(number: int, row: Row) -> list[Row]:
            helpful = (float(row["label"]), float(not row["label"]))
            harmless = (float(number % 3 == 0), float(number % 3 != 0))
            own = (helpful[0] + harmless[0], helpful[1] + harmless[1])
            return [judged(row, *own, helpful=helpful, harmless=harmless)]

        refs = rewritten(cache, tmp_path / "refs", both)
        space: dict[str, object] = {"objective.helpful": [0, 1], "objective.harmless": [1, 0.25]}
        shared = {"max_steps": 2, "eval_fraction": 0.5, "learning_rate": 3e-3, "device": "cpu", "save_steps": 0}
        out = sweep(SweepConfig(cache=refs, out=tmp_path / "sweep", search="grid", space=space, train=shared))
        record = json.loads((out / "sweep.json").read_bytes())
        margins = [
            [trial["metrics"][f"eval/{name}/rewards/margins"] for name in ("helpful", "harmless")]
            for trial in record["trials"]
        ]
        beaten = [any(a[0] >= b[0] and a[1] >= b[1] and a != b for a in margins) for b in margins]
        assert record["pareto_front"] == [i for i in range(4) if not beaten[i]]
        rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
        assert [row["pareto_front"] for row in rows] == ["no" if one else "yes" for one in beaten]
        assert (out / "report.html").read_text().count(">Pareto front</span>") == beaten.count(False)
