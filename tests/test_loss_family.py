"""Every loss from one cache: against a live reference and the formulas of the papers, written out row by row."""

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from feedback_files import write_rows
from safetensors.torch import load_file
from stopped_runs import train_until

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.options import flag
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows, RowKey, TrainingRow
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.loss_traits import LOSS_OF_OPTION, LOSSES, PAIRED_LOSSES
from offline_kto.train.run.start_check import Difference
from offline_kto.train.run.train_run import train
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials
from offline_kto.train.trainer.kto_trainer import KTOTrainer

BATCH, STEPS = 8, 5


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Pairs whose answers differ in length, so that sums and means over tokens differ."""
    words = ["stone", "river", "red", "maybe", "never", "went", "seven"]

    def text(seed: int, length: int) -> str:
        return " ".join(words[(seed * 3 + k * k) % len(words)] for k in range(length)) + f" {seed}"

    return [
        {"prompt": text(i, 2 + i % 5), "chosen": text(i + 100, 1 + i % 7), "rejected": text(i + 200, 3 + (i * 2) % 6)}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A cache of ten pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    data = write_rows(folder / "pairs.jsonl", pair_rows(10))
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", kl_partners=2))
    return folder / "refs"


def config_for(cache: Path, out: Path, loss: str, **options: Any) -> TrainConfig:
    """Updates that move the weights visibly, in the order of the file."""
    settings = {"batch_size": BATCH, "max_steps": STEPS, "learning_rate": 3e-3, "save_steps": 0, "shuffle": False}
    return TrainConfig(cache=cache, out=out, loss=loss, device="cpu", **{**settings, **options})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TokenLogps = Callable[[torch.nn.Module, Any], torch.Tensor]


def naive_pair_loss(config: TrainConfig, r: tuple[torch.Tensor, ...], p: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The formulas of the papers.

    Args:
        r, p: log-ratios and log-probs of the tokens of the chosen and of the rejected completion.
    """
    beta, (good, bad) = config.beta, (r[0].sum(), r[1].sum())

    def sigmoid(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + torch.exp(-x))

    match config.loss:
        case "dpo":
            return torch.log(1 + torch.exp(-beta * (good - bad)))
        case "slic":
            return torch.clamp(1 - beta * (good - bad), min=0)
        case "ipo":
            return (r[0].mean() - r[1].mean() - 1 / (2 * beta)) ** 2
        case "robust":
            e, right = config.label_smoothing, sigmoid(beta * (good - bad))
            return -((1 - e) * torch.log(right) - e * torch.log(1 - right)) / (1 - 2 * e)
        case "nca":
            each = -torch.log(1 - sigmoid(beta * good)) - torch.log(1 - sigmoid(beta * bad))
            return -torch.log(sigmoid(beta * good)) + each / 2
        case "cpo":
            return -torch.log(sigmoid(beta * p[0].sum() - beta * p[1].sum())) - p[0].mean()
        case "simpo":
            return -torch.log(sigmoid(beta * p[0].mean() - beta * p[1].mean() - config.simpo_gamma))
        case "orpo":
            odds = [torch.exp(of.mean()) / (1 - torch.exp(of.mean())) for of in p]
            return -p[0].mean() - beta * torch.log(sigmoid(torch.log(odds[0] / odds[1])))
    raise AssertionError(config.loss)


def naive_losses(
    config: TrainConfig, batch: list[TrainingRow], r: Any, kl_r: Any, history: list[float], p: Any
) -> torch.Tensor:
    """The formulas, row by row and pair by pair.

    Args:
        r, kl_r: from a row to the log-ratios of its tokens, and of its mismatched completion's.
        history: batch means of rewards so far (BCO).
        p: from a row to the log-probs of its tokens.
    """
    beta, losses, sft = config.beta, [], config.sft_weight
    if config.loss in PAIRED_LOSSES:
        for good, bad in zip(batch[::2], batch[1::2], strict=True):
            assert good.label
            assert not bad.label
            losses.append(naive_pair_loss(config, (r(good), r(bad)), (p(good), p(bad))) - sft * p(good).mean())
        return torch.stack(losses)
    low, high = (-1.0, 1.5) if config.loss == "humanline" else (-math.inf, math.inf)
    with torch.no_grad():
        z0 = max(0.0, float(torch.stack([kl_r(row).clamp(low, high).sum() for row in batch]).mean()))
        history.append(float(torch.stack([beta * r(row).sum() for row in batch]).mean()))
    delta = sum(history) / len(history)
    for row in batch:
        x, sign = r(row).clamp(low, high).sum(), 1.0 if row.label else -1.0
        if config.loss == "ppo_clip":
            q, e = torch.exp(r(row)), config.clip_epsilon
            losses.append(-torch.minimum(q * sign, q.clamp(1 - e, 1 + e) * sign).mean())
        elif config.loss == "bco":
            losses.append(torch.log(1 + torch.exp(-sign * (beta * x - delta))))
        else:
            losses.append(1 - torch.sigmoid(beta * sign * (x - (0.0 if config.loss == "apo_zero" else z0))))
        if sft and row.label:
            losses[-1] = losses[-1] - sft * p(row).mean()
    return torch.stack(losses)


def naive_run(base: Path, config: TrainConfig) -> tuple[torch.nn.Module, list[float]]:
    """Training with a live reference, full logits and one row at a time. Returns: the model, and each update's loss."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(base).train()
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    rows = CacheRows(config.cache)

    reference_logps: dict[bytes, torch.Tensor] = {}  # its weights never change

    def token_logps(model: torch.nn.Module, sequence: Any) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(int))[None]
        scores = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return scores[len(sequence.prompt_ids) - 1 :]

    def logratios(sequence: Any) -> torch.Tensor:
        key = sequence.prompt_ids.tobytes() + b"/" + sequence.completion_ids.tobytes()
        if key not in reference_logps:
            with torch.no_grad():
                reference_logps[key] = token_logps(reference, sequence)
        return token_logps(policy, sequence) - reference_logps[key]

    history: list[float] = []
    shown = []
    for step in range(config.max_steps or 0):
        steps_per_epoch = -(-len(rows) // config.batch_size)
        start = step % steps_per_epoch * config.batch_size
        end = min(start + config.batch_size, len(rows))
        batch = [rows[RowKey(i, step // steps_per_epoch)] for i in range(start, end)]
        loss = naive_losses(
            config,
            batch,
            lambda row: logratios(row.matched),
            lambda row: logratios(row.mismatched),
            history,
            lambda row: token_logps(policy, row.matched),
        ).mean()
        shown.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy, shown


@pytest.fixture(scope="module")
def run_of(cache: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a loss to a run of it with no other options, made once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run_of(loss: str) -> Path:
        return train(config_for(pairs if loss in PAIRED_LOSSES else cache, folder / loss, loss))

    return run_of


@pytest.mark.parametrize("loss", LOSSES)
def test_cached_equals_live_reference(
    loss: str, run_of: Callable[[str], Path], cache: Path, pairs: Path, base: Path
) -> None:
    equals_live_reference(
        run_of(loss), base, config_for(pairs if loss in PAIRED_LOSSES else cache, Path("naive"), loss)
    )


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("kto", {"sft_weight": 0.5}),
        ("dpo", {"sft_weight": 0.5}),
        ("ppo_clip", {"clip_epsilon": 0.02}),
        ("robust", {"label_smoothing": 0.3}),
        ("simpo", {"beta": 2.0, "simpo_gamma": 1.5}),
    ],
)
def test_options_of_one_loss_equal_live_reference(
    loss: str,
    options: dict[str, float],
    run_of: Callable[[str], Path],
    cache: Path,
    pairs: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    config = config_for(pairs if loss in PAIRED_LOSSES else cache, tmp_path / "run", loss, **options)
    run = train(config)
    equals_live_reference(run, base, config)
    without = metrics(run_of(loss))[:STEPS]
    assert (
        max(abs(a["loss"] - b["loss"]) for a, b in zip(metrics(run), without, strict=False)) > 0.01
    )  # else: no effect


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_the_likelihood_is_a_metric_of_its_own(
    loss: str, run_of: Callable[[str], Path], cache: Path, pairs: Path, tmp_path: Path
) -> None:
    """Mean over the desirable rows of their mean over tokens: the first update against the cached reference."""
    scored = pairs if loss == "dpo" else cache
    options: dict[str, Any] = {"sft_weight": 0.5, "eval_fraction": 0.3, "keep": "last", "batch_size": 1000}
    run = train(config_for(scored, tmp_path / "run", loss, **options))
    data = TrainingData.open(config_for(scored, tmp_path, loss, eval_fraction=0.3))
    assert data.held_out is not None
    first, *_ = (one for one in metrics(run) if "loss" in one)
    before = next(one for one in metrics(run) if "eval/loss" in one)
    for indices, found in ((data.units.ravel(), first["nll"]), (data.held_out.indices, before["eval/nll"])):
        rows = [data.rows[int(i)] for i in indices if data.rows.labels[int(i)]]
        assert found == pytest.approx(np.mean([-one.matched.ref_token_logps.mean() for one in rows]), abs=1e-4)
    plain = metrics(run_of(loss))
    assert not any(name.endswith("nll") for record in plain for name in record)
    found = json.loads((run / "evaluation.json").read_bytes())
    assert "low" in found["metrics"]["nll"]
    assert found["change"]["nll"]["value"] < 0


def equals_live_reference(run: Path, base: Path, config: TrainConfig) -> None:
    expected, shown = naive_run(base, config)
    for one, other in zip(metrics(run)[:STEPS], shown, strict=True):
        assert one["loss"] == pytest.approx(other, abs=1e-4)
    start = load_file(base / "model.safetensors")
    found, moved = load_file(run / "model.safetensors"), 0.0
    for name, value in expected.state_dict().items():
        # Adam divides by the size of a gradient: under cpo a weight whose first one is 1e-7, against a median of 1e-2, moves by
        # 4e-5 with the order of sums, which sharing the prompts changes.
        torch.testing.assert_close(found[name], value, atol=6e-5 if config.loss == "cpo" else 3e-5, rtol=0)
        moved = max(moved, float((found[name] - start[name]).abs().max()))
    assert moved > 1e-3


def test_limits_on_tokens_matter_here(run_of: Callable[[str], Path], cache: Path, tmp_path: Path) -> None:
    """Else the test above could not tell humanline from kto."""
    last = [metrics(run_of(loss))[STEPS - 1] for loss in ("kto", "humanline")]
    assert abs(last[0]["rewards/rejected"] - last[1]["rewards/rejected"]) > 0.01
    narrow = config_for(cache, tmp_path / "narrow", "humanline", humanline_low=-1e-3, humanline_high=1e-3)
    tokens = max(len(row.matched.completion_ids) for row in map(CacheRows(cache).__getitem__, range(20)))
    assert abs(metrics(train(narrow))[STEPS - 1]["rewards/rejected"]) <= 0.1 * 1e-3 * tokens


# They are cut into micro-batches as one of the others: apo_zero without a reference point, the pairs' by their difference.
CUT_AS_ANOTHER = ("apo_zero", "slic", "robust", "cpo")


@pytest.mark.parametrize(
    "loss", [pytest.param(one, marks=pytest.mark.slow if one in CUT_AS_ANOTHER else ()) for one in LOSSES]
)
@pytest.mark.parametrize("budget", [1, pytest.param(300, marks=pytest.mark.slow)])
def test_max_tokens_never_changes_the_result(
    loss: str, budget: int, run_of: Callable[[str], Path], cache: Path, pairs: Path, tmp_path: Path
) -> None:
    config = config_for(pairs if loss in PAIRED_LOSSES else cache, tmp_path / "other", loss)
    one, other = run_of(loss), train(replace(config, max_tokens=budget))
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=3e-5, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_losses_with_a_reference_point_make_its_pass(
    loss: str, cache: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    real = ScoringPasses.run

    def counting(self: Any, sequences: Any, **options: Any) -> Any:
        scored.append(len(sequences))
        return real(self, sequences, **options)

    monkeypatch.setattr(ScoringPasses, "run", counting)
    nothing = Difference(0, 0, 0, 0)
    monkeypatch.setattr("offline_kto.train.run.training_run.check_start", lambda *_, **__: nothing)
    run = train(config_for(pairs if loss in PAIRED_LOSSES else cache, tmp_path / "run", loss, max_steps=2))
    assert len(scored) == (2 if loss in ("kto", "humanline", "bco") else 0)
    shown = set(metrics(run)[0])
    assert ({"kl", "kl_raw"} <= shown) == (loss in ("kto", "humanline"))
    assert ("reward_shift" in shown) == (loss == "bco")


@pytest.mark.parametrize("loss", ["ppo_clip", "orpo", "kto"])
def test_held_out_losses_are_those_of_training(loss: str, cache: Path, pairs: Path, tmp_path: Path) -> None:
    """With all rows in one batch and a rate that moves nothing, both are the mean over the same rows."""
    data = pairs if loss in PAIRED_LOSSES else cache
    run = train(
        config_for(
            data,
            tmp_path / "run",
            loss,
            eval_cache=data,
            batch_size=64,
            max_steps=1,
            learning_rate=1e-12,
            sft_weight=0.5,
        )
    )
    found = json.loads((run / "evaluation.json").read_text())
    of_training = next(record for record in metrics(run) if "loss" in record)
    for name in ("loss", "rewards/chosen", "logps/rejected"):
        for when in ("metrics", "before"):
            assert found[when][name]["value"] == pytest.approx(of_training[name], abs=1e-4), when


class TestPairs:
    def test_each_batch_holds_whole_pairs(self, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        batches: list[list[TrainingRow]] = []
        real = KTOTrainer.training_step

        def watching(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
            batches.append(inputs)
            return real(self, model, inputs, *rest)

        monkeypatch.setattr(KTOTrainer, "training_step", watching)
        train(config_for(pairs, tmp_path / "run", "dpo", shuffle=True, max_steps=None, epochs=2, batch_size=6))
        assert [len(batch) for batch in batches] == [6, 6, 6, 2] * 2
        rows = CacheRows(pairs)
        for batch in batches:
            for good, bad in zip(batch[::2], batch[1::2], strict=True):
                assert (good.label, bad.label) == (True, False)
                assert rows.pair_ids.codes[good.index] == rows.pair_ids.codes[bad.index] >= 0
        order = [[row.index for batch in part for row in batch] for part in (batches[:4], batches[4:])]
        assert sorted(order[0]) == sorted(order[1]) == list(range(20))
        assert order[0] != order[1]

    def test_the_loss_starts_where_its_formula_does(self, pairs: Path, tmp_path: Path) -> None:
        for loss, start in (
            ("dpo", math.log(2)),
            ("robust", math.log(2)),
            ("slic", 1.0),
            ("ipo", (1 / 0.2) ** 2),
            ("nca", 2 * math.log(2)),
        ):
            first = metrics(train(config_for(pairs, tmp_path / loss, loss, max_steps=1)))[0]
            assert first["loss"] == pytest.approx(start, abs=1e-5)
            assert first["accuracy"] == 0.5

    def test_rows_without_a_partner_are_left_out_and_counted(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        single = [{"prompt": "alone", "completion": f"here {i}", "label": bool(i % 2)} for i in range(3)]
        data = write_rows(tmp_path / "mixed.jsonl", [*single, *pair_rows(4)])
        cache = tmp_path / "refs"
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=cache))
        run = train(config_for(cache, tmp_path / "run", "dpo", batch_size=4, max_steps=None, epochs=1))
        out = capsys.readouterr().out
        assert "8 to train on, 3 left out (not in a pair, or both rows are equal)" in out
        assert metrics(run)[-1]["step"] == 2

    @pytest.mark.parametrize("scored_at", [60, 1024])
    def test_pairs_that_become_alike_are_left_out(
        self, scored_at: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Cut to the same tokens there is nothing to tell apart; Adam would amplify the rounding of a gradient of zero."""
        long = " ".join(["stone"] * 40)
        rows = [{"prompt": f"p {i}", "chosen": f"{long} yes", "rejected": f"{long} no"} for i in range(4)]
        data, cache = write_rows(tmp_path / "alike.jsonl", [*rows, *pair_rows(4)]), tmp_path / "refs"
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=cache, max_length=scored_at))
        capsys.readouterr()
        run = train(config_for(cache, tmp_path / "run", "dpo", batch_size=4, max_steps=None, epochs=1, max_length=60))
        out = capsys.readouterr().out
        assert "8 left out (not in a pair, or both rows are equal)" in out
        assert (" cut (--max-length 60)" in out) == (scored_at > 60)  # else it was cut when it was scored
        assert metrics(run)[-1]["step"] == 2

    @pytest.mark.parametrize("loss", ["simpo", "dpo"])
    def test_the_plan_says_which_losses_ignore_the_reference(
        self, loss: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(config_for(pairs, tmp_path / "run", loss, max_steps=1, sft_weight=0.25))
        out = capsys.readouterr().out
        assert ("reference   not used by simpo" in out) == (loss == "simpo")
        assert (
            "loss simpo, simpo gamma 0.5, sft weight 0.25, beta" if loss == "simpo" else "loss dpo, sft weight"
        ) in out

    def test_held_out_pairs_are_whole(self, pairs: Path, tmp_path: Path) -> None:
        run = train(config_for(pairs, tmp_path / "run", "dpo", eval_fraction=0.3))
        found = json.loads((run / "evaluation.json").read_text())
        assert (found["rows"], found["prompts"]) == (6, 3)
        assert 0 <= found["metrics"]["accuracy"]["value"] <= 1
        assert found["metrics"]["accuracy"]["value"] * 3 == pytest.approx(
            round(found["metrics"]["accuracy"]["value"] * 3)
        )


class TestRefusals:
    @pytest.mark.parametrize("loss", PAIRED_LOSSES)
    def test_a_cache_without_pairs(self, loss: str, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=f"--loss {loss} compares two completions .* share a pair_id"):
            train(config_for(cache, tmp_path / "run", loss))
        assert not (tmp_path / "run").exists()

    def test_half_a_pair_in_a_batch(self, pairs: Path) -> None:
        with pytest.raises(ConfigError, match="--loss dpo counts both rows of a pair in --batch-size: give an even"):
            config_for(pairs, Path("x"), "dpo", batch_size=7)

    @pytest.mark.parametrize("weight", [2.0, "auto"])
    def test_class_weights_on_pairs(self, pairs: Path, weight: Any) -> None:
        with pytest.raises(ConfigError, match="class weights have no meaning there"):
            config_for(pairs, Path("x"), "ipo", desirable_weight=weight)

    @pytest.mark.parametrize("limits", [(0.5, 1.0), (-1.0, -0.5), (0.0, 0.0)])
    def test_limits_that_leave_the_start_out(self, cache: Path, limits: tuple[float, float]) -> None:
        with pytest.raises(ConfigError, match="must have 0 between"):
            config_for(cache, Path("x"), "humanline", humanline_low=limits[0], humanline_high=limits[1])

    @pytest.mark.parametrize("option", sorted(LOSS_OF_OPTION))
    def test_an_option_that_the_loss_does_not_have(self, option: str) -> None:
        value = getattr(TrainConfig, option) / 2
        with pytest.raises(
            ConfigError, match=f"{flag(option)} .* has no effect with --loss apo_zero: it is an option of"
        ):
            TrainConfig(loss="apo_zero", **{option: value})
        assert getattr(TrainConfig(loss=LOSS_OF_OPTION[option], **{option: value}), option) == value

    @pytest.mark.parametrize(
        ("loss", "option", "value"),
        [
            ("ppo_clip", "clip_epsilon", 0.0),
            ("ppo_clip", "clip_epsilon", 1.0),
            ("robust", "label_smoothing", 0.5),
            ("robust", "label_smoothing", -0.1),
            ("simpo", "simpo_gamma", -1.0),
            ("kto", "sft_weight", -1.0),
        ],
    )
    def test_values_without_a_meaning(self, loss: str, option: str, value: float) -> None:
        with pytest.raises(ConfigError, match=f"^{flag(option)} must be "):
            TrainConfig(loss=loss, **{option: value})


class TestSweepsOverLosses:
    def test_an_option_of_one_loss_is_for_its_trials(self) -> None:
        space = {"loss": ["dpo", "simpo"], "simpo_gamma": [0.3, 0.9]}
        trials = Trials.of(SweepConfig(search="grid", space=space, train={}))
        found = [trials.config(trials.point(i)) for i in range(4)]
        assert [(one.loss, one.simpo_gamma) for one in found] == [
            ("dpo", 0.5),
            ("dpo", 0.5),
            ("simpo", 0.3),
            ("simpo", 0.9),
        ]
        fixed = Trials.of(SweepConfig(search="grid", space={"loss": ["dpo", "simpo"]}, train={"simpo_gamma": 0.9}))
        assert [fixed.config(fixed.point(i)).simpo_gamma for i in range(2)] == [0.5, 0.9]

    @pytest.mark.parametrize(
        ("space", "shared", "words"),
        [
            ({"simpo_gamma": [0.3]}, {}, "'simpo_gamma' is an option of the loss simpo, which no trial has"),
            ({"beta": [0.3]}, {"simpo_gamma": 0.3}, "'simpo_gamma' is an option of the loss simpo, which no trial has"),
            ({"loss": ["dpo", "simpo"], "simpo_gamma": [-1.0]}, {}, "space: simpo_gamma: -1.0 cannot be used"),
            ({"loss": ["dpo", "simpo"]}, {"simpo_gamma": -1.0}, "cannot be used: --simpo-gamma must be at least 0"),
        ],
    )
    def test_refused(self, space: dict[str, Any], shared: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            Trials.of(SweepConfig(search="grid", space=space, train=shared))


@pytest.mark.parametrize("loss", ["bco", "dpo"])
def test_resumed_equals_uninterrupted(loss: str, cache: Path, pairs: Path, tmp_path: Path) -> None:
    """BCO's running mean is part of a checkpoint."""
    config = config_for(pairs if loss == "dpo" else cache, tmp_path / "whole", loss, save_steps=2, shuffle=True)
    whole = train(config)
    stopped = replace(config, out=tmp_path / "stopped")
    train_until(stopped, step=3)
    run = train(replace(stopped, resume=True))
    first, second = (load_file(one / "model.safetensors") for one in (whole, run))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-7, rtol=0)
    if loss == "bco":
        shifts = [[r["reward_shift"] for r in metrics(one)[:STEPS]] for one in (whole, run)]
        assert shifts[0] == pytest.approx(shifts[1], abs=1e-6)
        assert abs(shifts[0][-1]) > 1e-3
