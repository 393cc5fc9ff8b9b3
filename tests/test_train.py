"""Stage 2 from end to end, on tiny models: what the first step shows, what must not change a result, what is written."""

import copy
import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from feedback_files import chat_rows, write_feedback, write_rows
from models import save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from stopped_runs import train_until

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.hashing import chat_template_hash, tokenizer_hash
from offline_kto.kto_core.lock import only_writer
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.batches import EpochBatches, split_by_prompt
from offline_kto.train.data.cache_rows import CacheRows, RowKey
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses

TRAIN = "from offline_kto.train.cli import train; train()"


def config_for(cache: Path, out: Path) -> TrainConfig:
    """Five updates that move the weights visibly."""
    return TrainConfig(cache=cache, out=out, batch_size=8, max_steps=5, learning_rate=3e-3, save_steps=0, device="cpu")


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return config_for(cache, tmp_path / "run")


@pytest.fixture(scope="module")
def whole_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `config`, to compare others with. Do not write to it."""
    return train(config_for(cache, tmp_path_factory.mktemp("whole") / "run"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_weights(one: Path, other: Path, *, atol: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def moved(run: Path, base: Path) -> float:
    """The largest change of a weight."""
    before, after = weights(base), weights(run)
    return max(float((before[n] - after[n]).abs().max()) for n in before)


class TestFirstStep:
    """Policy and reference are one model: rewards are 0, kl is 0, and the loss is half the mean weight."""

    @pytest.mark.parametrize("options", [{}, {"desirable_weight": 1.5, "undesirable_weight": 0.5}, {"lora_rank": 2}])
    def test_nothing_is_gained_yet(self, config: TrainConfig, options: dict[str, Any]) -> None:
        run = train(replace(config, max_steps=1, batch_size=20, **options))
        first = metrics(run)[0]
        data = read_manifest(config.cache).data
        mean_weight = (
            options.get("desirable_weight", 1.0) * data["desirable"]
            + options.get("undesirable_weight", 1.0) * data["undesirable"]
        ) / 20
        assert first["step"] == 1
        assert first["loss"] == pytest.approx(mean_weight / 2, abs=1e-6)
        for name in ("kl", "kl_raw", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert first[name] == pytest.approx(0, abs=1e-5)


def naive_run(base: Path, config: TrainConfig) -> torch.nn.Module:
    """KTO with a live reference, full logits and one row at a time: no cache, no batching, none of our code."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(base).train()
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    rows = CacheRows(config.cache)

    def logps(model: torch.nn.Module, sequence: Any) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(int))[None]
        scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return scores[len(sequence.prompt_ids) - 1 :].sum()

    for step in range(config.max_steps or 0):
        steps_per_epoch = -(-len(rows) // config.batch_size)
        start = step % steps_per_epoch * config.batch_size
        keys = [RowKey(i, step // steps_per_epoch) for i in range(start, min(start + config.batch_size, len(rows)))]
        batch = [rows[key] for key in keys]
        with torch.no_grad():
            drift = [logps(policy, row.mismatched) - logps(reference, row.mismatched) for row in batch]
            z0 = torch.stack(drift).mean().clamp(min=0)
        losses = []
        for row in batch:
            with torch.no_grad():
                ref = logps(reference, row.matched)
            r = logps(policy, row.matched) - ref
            value = torch.sigmoid(config.beta * (r - z0 if row.label else z0 - r))
            losses.append(1 - value)
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy


def test_cached_equals_live_reference(config: TrainConfig, base: Path) -> None:
    """Two epochs of three updates, the last batch of each shorter, the second epoch with the second partner."""
    config = replace(config, max_steps=6, shuffle=False)
    expected = naive_run(base, config).state_dict()
    run = train(config)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)
    assert moved(run, base) > 1e-3


@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_max_tokens_never_changes_the_result(config: TrainConfig, budget: int, whole_run: Path, base: Path) -> None:
    other = train(replace(config, max_tokens=budget))
    assert_same_weights(whole_run, other, atol=2e-5)
    assert moved(whole_run, base) > 1e-3
    for one, two in zip(metrics(whole_run)[:5], metrics(other)[:5], strict=True):
        for name in ("loss", "kl", "kl_raw", "rewards/chosen", "rewards/rejected", "grad_norm"):
            assert one[name] == pytest.approx(two[name], abs=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_resumed_equals_uninterrupted(config: TrainConfig, tmp_path: Path, lora_rank: int) -> None:
    config = replace(config, save_steps=2, lora_rank=lora_rank, scheduler="linear", warmup=2)
    whole = train(config)
    name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
    stopped = replace(config, out=tmp_path / "stopped")
    train_until(stopped, step=3)
    assert [r["step"] for r in metrics(stopped.out)] == [1, 2, 3]  # the third is lost with its update
    run = train(replace(stopped, resume=True))
    one, other = load_file(whole / name), load_file(run / name)
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-7, rtol=0)
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5, 5]
    for a, b in zip(metrics(whole)[:5], metrics(run)[:5], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-7)


def test_two_ranks_equal_one(config: TrainConfig, tmp_path: Path) -> None:
    """Seven rows a batch over two gloo ranks, twenty rows: uneven parts, and a last batch of six."""
    config = replace(config, batch_size=7, eval_fraction=0.2)
    one = train(config)
    two = tmp_path / "two"
    done = forks.run(TRAIN, *options_of(config, two), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(one, two, atol=2e-5)
    records = [r for r in metrics(one) if "train_runtime" not in r]
    for a, b in zip(records, [r for r in metrics(two) if "train_runtime" not in r], strict=True):
        for name in set(a) - {"tokens_per_second", "peak_memory_mb", "padding", "eval/padding"}:
            assert a[name] == pytest.approx(b[name], abs=2e-4), name


@pytest.mark.slow
def test_a_rank_without_rows_takes_part(config: TrainConfig, tmp_path: Path) -> None:
    """Batches of three on twenty rows leave two for the last: the third rank has none of its own."""
    config = replace(config, batch_size=3, max_steps=7)
    one = train(config)
    done = forks.run(TRAIN, *options_of(config, tmp_path / "three"), ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(one, tmp_path / "three", atol=2e-5)


def options_of(config: TrainConfig, out: Path) -> list[object]:
    """Return options of `kto-train` on ranks."""
    options = [
        "--cache",
        config.cache,
        "--out",
        out,
        "--batch-size",
        config.batch_size,
        "--max-steps",
        config.max_steps,
    ]
    options += ["--learning-rate", config.learning_rate, "--save-steps", 0, "--device", "cpu"]
    return [*options, "--eval-fraction", config.eval_fraction]


class TestWhatChangesNothing:
    def test_gradient_checkpointing(self, config: TrainConfig, whole_run: Path) -> None:
        assert_same_weights(whole_run, train(replace(config, gradient_checkpointing=True)), atol=1e-6)

    def test_logging_less_often(self, config: TrainConfig, whole_run: Path) -> None:
        seldom = train(replace(config, logging_steps=2))
        assert_same_weights(whole_run, seldom, atol=0)
        assert [r["step"] for r in metrics(seldom) if "loss" in r] == [1, 2, 4, 5]  # the last one is never left out
        # The first update is logged alone, then two by two, weighted by rows.
        rows = [8, 8, 4, 8, 8]
        losses = [r["loss"] for r in metrics(whole_run)[:5]]
        grouped = [r["loss"] for r in metrics(seldom) if "loss" in r]
        assert grouped[0] == pytest.approx(losses[0])
        assert grouped[1] == pytest.approx(losses[1])
        assert grouped[2] == pytest.approx((rows[2] * losses[2] + rows[3] * losses[3]) / 12)

    def test_an_out_of_memory_error_repeats_the_batch(
        self, config: TrainConfig, whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        real = GradientPasses.backward
        seen = []

        def small_device(self: GradientPasses, loss: Any, *, last: bool) -> None:
            seen.append(last)
            real(self, loss, last=last)
            if self.policy.max_tokens > 600 and last and len(seen) > 1:  # all gradients of the batch are there already
                raise torch.OutOfMemoryError("simulated")

        monkeypatch.setattr(GradientPasses, "backward", small_device)
        run = train(config)
        assert "out of memory: continuing with --max-tokens 512" in capsys.readouterr().out
        assert_same_weights(whole_run, run, atol=2e-5)

    def test_an_out_of_memory_error_in_the_z0_pass_repeats_it(
        self, config: TrainConfig, whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        real = ScoringPasses._forward

        def small_device(self: ScoringPasses, indices: list[int], batch: Any, *beside: Any) -> Any:
            done = real(self, indices, batch, *beside)
            if self.max_tokens > 300 and len(indices) > 1:
                raise torch.OutOfMemoryError("simulated")
            return done

        monkeypatch.setattr(ScoringPasses, "_forward", small_device)
        run = train(config)
        assert "out of memory: continuing with 256 tokens in one scoring pass" in capsys.readouterr().out
        assert_same_weights(whole_run, run, atol=2e-5)

    def test_out_of_memory_on_a_single_row_is_one_message(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_memory(*arguments: Any, **options: Any) -> None:
            raise torch.OutOfMemoryError("simulated")

        monkeypatch.setattr(GradientPasses, "backward", no_memory)
        with pytest.raises(
            TrainingError, match=r"Out of memory with --max-tokens \d+, rows of at most \d+ tokens: simulated"
        ):
            train(config)


def test_bfloat16_trains_close_to_float32(
    config: TrainConfig, whole_run: Path, tmp_path: Path, base: Path, feedback: Path
) -> None:
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", dtype="bfloat16"))
    run = train(replace(config, cache=tmp_path / "refs", dtype="bfloat16"))
    first, last = metrics(run)[0], metrics(run)[4]
    assert first["loss"] == pytest.approx(0.5, abs=2e-3)
    assert abs(first["kl_raw"]) < 0.05
    assert last["loss"] == pytest.approx(metrics(whole_run)[4]["loss"], abs=0.05)
    assert {t.dtype for t in weights(run).values()} == {torch.float32}  # small updates would vanish in bfloat16


def test_learning_happens(config: TrainConfig) -> None:
    run = train(replace(config, max_steps=20, batch_size=20, learning_rate=5e-3))
    first, last = metrics(run)[0], metrics(run)[19]
    assert last["loss"] < first["loss"] - 0.1
    assert last["rewards/chosen"] > last["rewards/rejected"]
    assert last["accuracy"] > 0.9


class TestStartCheck:
    """A cache scored with anything but the policy stops the run before the first update."""

    def test_other_weights(self, config: TrainConfig, tmp_path: Path, base: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
        model.save_pretrained(tmp_path / "other")
        tiny_tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(TrainingError, match="not the model that the cache was scored with") as stopped:
            train(replace(config, model=str(tmp_path / "other")))
        assert str(tmp_path / "other") in str(stopped.value)
        assert str(base) in str(stopped.value)
        assert not config.out.exists()  # the same --out can be used again

    def test_weights_changed_in_place(self, config: TrainConfig, tmp_path: Path, feedback: Path) -> None:
        base = save_tiny(tmp_path / "base")
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
        save_tiny(base, seed=1)
        with pytest.raises(TrainingError, match="not the model"):
            train(replace(config, cache=tmp_path / "refs"))

    def test_other_template_and_tokenizer(self, config: TrainConfig, tmp_path: Path) -> None:
        spoken = save_tiny(tmp_path / "a", tokenizer=tiny_tokenizer(chat_template="{{ messages[0]['content'] }}"))
        with pytest.raises(TrainingError, match="its chat template differs"):
            train(replace(config, model=str(spoken)))
        merged = save_tiny(tmp_path / "b", tokenizer=tiny_tokenizer(merges=(("h", "e"), ("l", "l"))))
        with pytest.raises(TrainingError, match="its tokenizer differs"):
            train(replace(config, model=str(merged)))

    def test_a_different_policy_can_be_allowed(
        self, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = save_tiny(tmp_path / "other", seed=1)
        run = train(replace(config, model=str(other), allow_different_policy=True, max_steps=1))
        assert "warning" in capsys.readouterr().out
        assert abs(metrics(run)[0]["kl_raw"]) > 0.1

    def test_a_moved_reference_is_named(self, config: TrainConfig, tmp_path: Path, feedback: Path) -> None:
        base = save_tiny(tmp_path / "base")
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
        base.rename(tmp_path / "elsewhere")
        with pytest.raises(Exception, match="pass it with --model"):
            train(replace(config, cache=tmp_path / "refs"))
        train(replace(config, cache=tmp_path / "refs", model=str(tmp_path / "elsewhere"), max_steps=1))


class TestAdapters:
    @pytest.fixture
    def adapter(self, base: Path, tmp_path: Path) -> Path:
        """An SFT adapter that changes the model."""
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_policy_starts_from_the_merged_adapter(
        self, config: TrainConfig, adapter: Path, base: Path, feedback: Path, tmp_path: Path
    ) -> None:
        scoring = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", adapter=str(adapter))
        precompute(scoring)
        run = train(replace(config, cache=tmp_path / "refs", max_steps=1))
        assert metrics(run)[0]["loss"] == pytest.approx(0.5, abs=1e-6)
        with pytest.raises(TrainingError, match="with adapter"):
            train(replace(config, cache=tmp_path / "refs", model=str(base), out=tmp_path / "bare"))

    def test_lora_on_a_merged_adapter_is_saved_whole(
        self, config: TrainConfig, adapter: Path, base: Path, feedback: Path, tmp_path: Path
    ) -> None:
        scoring = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", adapter=str(adapter))
        precompute(scoring)
        run = train(replace(config, cache=tmp_path / "refs", lora_rank=2))
        assert not (run / "adapter_config.json").exists()
        found = transformers.AutoModelForCausalLM.from_pretrained(run)
        merged = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base), adapter
        ).merge_and_unload()
        ids = torch.arange(1, 20)[None]
        with torch.no_grad():
            difference = (found(ids).logits - merged(ids).logits).abs().max()
        assert 1e-4 < difference < 5  # merged, and trained a little further

    def test_lora_run_loads_with_peft(self, config: TrainConfig, base: Path) -> None:
        run = train(replace(config, lora_rank=2, lora_alpha=8, lora_targets="q_proj,down_proj", max_steps=3))
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run)
        assert loaded.peft_config["default"].base_model_name_or_path == str(base)
        assert loaded.peft_config["default"].lora_alpha == 8
        assert any(float(p.abs().max()) > 0 for n, p in loaded.named_parameters() if "lora_B" in n)
        assert {n.split(".")[-1] for n in loaded.peft_config["default"].target_modules} == {"q_proj", "down_proj"}

    def test_unknown_targets_are_named(self, config: TrainConfig) -> None:
        with pytest.raises(ConfigError, match="--lora-targets q_prj"):
            train(replace(config, lora_rank=2, lora_targets="q_prj"))
        with pytest.raises(ConfigError, match="output layer"):
            train(replace(config, lora_rank=2, lora_targets="lm_head", out=config.out.with_name("b")))


class TestEvaluation:
    def test_hold_out_is_cut_by_prompt(self, cache: Path) -> None:
        rows = CacheRows(cache)
        trained, held = (part.tolist() for part in split_by_prompt(rows, 0.3, 0))
        assert sorted(trained + held) == list(range(20))
        prompts = rows.column("prompt_id").to_pylist()
        assert not {prompts[i] for i in trained} & {prompts[i] for i in held}
        assert split_by_prompt(rows, 0.3, 1)[0].tolist() != trained
        assert len({prompts[i] for i in held}) == round(0.3 * len(set(prompts)))

    def test_held_out_values_equal_a_naive_computation(self, config: TrainConfig) -> None:
        run = train(replace(config, eval_fraction=0.3, eval_steps=5))
        found = next(r for r in metrics(run) if r["step"] and "eval/loss" in r)
        rows = CacheRows(config.cache)
        _, held = split_by_prompt(rows, 0.3, config.seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(run)

        def logratio(sequence: Any) -> float:
            ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(int))[None]
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            return float(scores[len(sequence.prompt_ids) - 1 :].sum()) - sequence.ref_logps

        kl = float(np.mean([logratio(rows[i].mismatched) for i in held]))
        ratios = np.array([logratio(rows[i].matched) for i in held])
        signs = np.where(rows.labels[held], 1, -1)
        losses = 1 / (1 + np.exp(config.beta * signs * (ratios - max(kl, 0))))
        assert found["step"] == 5
        assert found["eval/kl_raw"] == pytest.approx(kl, abs=1e-3)
        assert found["eval/loss"] == pytest.approx(losses.mean(), abs=1e-4)
        assert found["eval/accuracy"] == pytest.approx(np.mean(signs * (ratios - max(kl, 0)) > 0), abs=1e-6)

    def test_eval_cache_of_the_same_reference(self, config: TrainConfig, tmp_path: Path, base: Path) -> None:
        data = write_feedback(tmp_path / "held.jsonl", 8, seed=9)
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "held", max_length=256))
        run = train(replace(config, eval_cache=tmp_path / "held", max_steps=3))
        assert [r["step"] for r in metrics(run) if "eval/loss" in r] == [0, 3]

    def test_eval_cache_of_another_reference_is_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        data = write_feedback(tmp_path / "held.jsonl", 8, seed=9)
        other = save_tiny(tmp_path / "other", seed=3)
        precompute(PrecomputeConfig(model=str(other), data=str(data), out=tmp_path / "held"))
        with pytest.raises(TrainingError, match="scored by another reference"):
            train(replace(config, eval_cache=tmp_path / "held"))


class TestRunFolder:
    def test_holds_what_the_contract_names(self, config: TrainConfig, whole_run: Path) -> None:
        run = whole_run
        assert {"model.safetensors", "config.json", "tokenizer.json", "config.yaml", "metrics.jsonl", "README.md"} <= {
            path.name for path in run.iterdir()
        }
        assert not list(run.glob("*.bin"))
        card = (run / "README.md").read_text()
        assert read_manifest(config.cache).fingerprint in card
        records = metrics(run)
        wanted = "loss kl kl_raw rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected accuracy"
        wanted += " learning_rate grad_norm tokens_per_second peak_memory_mb"
        assert set(wanted.split()) <= records[0].keys()
        assert records[-1]["train_runtime"] > 0
        tokenizer = transformers.AutoTokenizer.from_pretrained(run)
        manifest = read_manifest(config.cache)
        assert tokenizer_hash(tokenizer) == manifest.tokenizer["files_hash"]
        assert chat_template_hash(tokenizer) == manifest.tokenizer["chat_template_hash"]

    def test_model_config_is_the_base_model_s(self, config: TrainConfig, base: Path) -> None:
        """Nothing that training needed stays behind: no dropout set to 0, no key/value cache switched off."""
        run = train(replace(config, max_steps=1, gradient_checkpointing=True))
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, run))
        aligned = {
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        }  # the Trainer brings these in line with the tokenizer
        assert {k: v for k, v in after.items() if k not in aligned} == {
            k: v for k, v in before.items() if k not in aligned
        }

    def test_its_config_repeats_the_run(self, whole_run: Path, tmp_path: Path) -> None:
        from offline_kto.kto_core.options import resolve

        again = resolve(TrainConfig, {"out": tmp_path / "again"}, yaml_path=whole_run / "config.yaml")
        assert_same_weights(whole_run, train(again), atol=0)

    def test_several_processes_need_a_folder(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="need --out"):
            train(replace(config, out=None))

    def test_a_run_is_not_overwritten(self, config: TrainConfig) -> None:
        train(replace(config, max_steps=1))
        with pytest.raises(ConfigError, match="not empty"):
            train(config)

    def test_resume_without_a_checkpoint_starts_over(
        self, config: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train(replace(config, resume=True, max_steps=2))
        assert "no checkpoint" in capsys.readouterr().out
        assert len(metrics(run)) == 3

    @pytest.mark.slow
    def test_a_scheduler_s_signal_ends_a_run_as_an_interrupt_does(self, config: TrainConfig, tmp_path: Path) -> None:
        out = tmp_path / "signalled"
        fork = forks.Fork(TRAIN, "--cache", config.cache, "--out", out, "--epochs", 100000, "--save-steps", 5)
        deadline = time.monotonic() + 100
        while not (out / "checkpoint-5/trainer_state.json").exists():
            assert time.monotonic() < deadline, "the run wrote no checkpoint"
            assert fork.is_running()
            time.sleep(0.02)
        fork.kill(by=signal.SIGTERM)
        done = fork.wait(60)
        assert done.returncode == 143
        assert "with --resume to continue" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (out / ".lock").exists()

    @pytest.mark.parametrize("max_steps", [1, 2])
    def test_resuming_a_finished_run_changes_nothing(self, config: TrainConfig, max_steps: int) -> None:
        """Two of the three updates of an epoch, so that batches are left."""
        run = train(replace(config, max_steps=2, save_steps=1))
        before = weights(run)
        (run / "model.safetensors").unlink()  # killed while it was written
        train(replace(config, max_steps=max_steps, save_steps=1, resume=True))
        for name, value in weights(run).items():
            assert torch.equal(value, before[name])
        assert [r["step"] for r in metrics(run)] == [1, 2, 2]

    def test_resume_refuses_another_cache_or_another_order(
        self, config: TrainConfig, tmp_path: Path, base: Path, feedback: Path
    ) -> None:
        train(replace(config, max_steps=2, save_steps=1))
        again = replace(config, resume=True, save_steps=1)
        with pytest.raises(ConfigError, match="started with --batch-size 8, not 4"):
            train(replace(again, batch_size=4))
        # The checkpoint's optimizer would keep the old one.
        with pytest.raises(ConfigError, match=r"started with --learning-rate 0\.\d+, not 1e-05"):
            train(replace(again, learning_rate=1e-5))
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", seed=1))
        with pytest.raises(ConfigError, match="started with another cache") as caught:
            train(replace(again, cache=tmp_path / "refs"))
        assert not re.search(r"[0-9a-f]{12}", str(caught.value).replace(str(config.out), ""))
        assert len(metrics(train(again))) == 6

    def test_resume_refuses_other_labels(self, config: TrainConfig, tmp_path: Path, base: Path) -> None:
        data = write_feedback(tmp_path / "f.jsonl", 20)
        scoring = PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs")
        precompute(scoring)
        config = replace(config, cache=tmp_path / "refs", save_steps=1)
        train(replace(config, max_steps=2))
        write_rows(data, [{**row, "label": not row["label"]} for row in chat_rows(20)])
        precompute(scoring)
        with pytest.raises(ConfigError, match="started with other labels"):
            train(replace(config, resume=True))

    @pytest.mark.parametrize("damage", ["weights cut off", "no state"])
    def test_an_incomplete_checkpoint_is_named(self, config: TrainConfig, damage: str) -> None:
        run = train(replace(config, max_steps=2, save_steps=1))
        last = run / "checkpoint-2"
        if damage == "no state":
            (last / "trainer_state.json").unlink()
        else:
            (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:1000])
        with pytest.raises(ConfigError, match="checkpoint-2: an incomplete checkpoint"):
            train(replace(config, resume=True, save_steps=1))
        shutil.rmtree(last)
        assert [r["step"] for r in metrics(train(replace(config, resume=True, save_steps=1)))] == [1, 2, 3, 4, 5, 5]

    def test_a_run_has_one_writer(self, config: TrainConfig) -> None:
        assert config.out is not None
        config.out.mkdir()
        for resume in (False, True):
            with (
                only_writer(config.out, ConfigError),
                pytest.raises(ConfigError, match=r"process \d+ on .* is writing here"),
            ):
                train(replace(config, resume=resume))


def test_shorter_max_length_is_a_prefix_sum(config: TrainConfig, tmp_path: Path, base: Path, feedback: Path) -> None:
    """Shortened rows carry the score that a reference pass over the shortened rows gives."""
    rows = CacheRows(config.cache, max_length=90)
    assert 0 < len(rows) <= 20
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "short", max_length=90))
    short = CacheRows(tmp_path / "short")
    assert len(short) == len(rows)
    cut = 0
    for i in range(len(rows)):
        a, b = rows[i].matched, short[i].matched
        np.testing.assert_array_equal(a.completion_ids, b.completion_ids)
        assert a.ref_logps == pytest.approx(b.ref_logps, abs=1e-4)
        assert len(rows[i].mismatched) <= 90
        cut += len(a) == 90
    assert cut
    with pytest.raises(TrainingError, match="cut at 256 tokens"):
        CacheRows(config.cache, max_length=500)
    run = train(replace(config, max_length=90, max_steps=1))
    assert metrics(run)[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_every_epoch_uses_the_next_partner(cache: Path) -> None:
    rows = CacheRows(cache)
    batches = EpochBatches([np.arange(20)[:, None]], 6, shuffle=True, seed=0)
    seen = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        keys = [key for batch in batches for key in batch]
        assert sorted(key.index for key in keys) == list(range(20))
        seen.append(([key.index for key in keys], rows[keys[0]].mismatched.completion_ids.tolist()))
    assert seen[0][0] != seen[1][0]
    first = rows[RowKey(3, 0)].mismatched.completion_ids.tolist()
    assert rows[RowKey(3, 1)].mismatched.completion_ids.tolist() != first
    assert rows[RowKey(3, 2)].mismatched.completion_ids.tolist() == first


def test_mixture_of_experts_keeps_its_router_loss(tmp_path: Path, feedback: Path) -> None:
    """At step 0 the KTO part is known; the router's part equals transformers' own loss over the whole batch."""
    base = save_tiny(tmp_path / "base", "mixtral", router_aux_loss_coef=0.5)
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
    config = TrainConfig(
        cache=tmp_path / "refs",
        batch_size=20,
        max_steps=3,
        learning_rate=3e-3,
        save_steps=0,
        shuffle=False,
        device="cpu",
    )
    run = train(replace(config, out=tmp_path / "a"))
    cut = train(replace(config, out=tmp_path / "b", max_tokens=1))
    assert_same_weights(run, cut, atol=5e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    rows = CacheRows(tmp_path / "refs")
    width = max(len(rows[i].matched) for i in range(20))
    ids, mask = torch.zeros(20, width, dtype=torch.long), torch.zeros(20, width, dtype=torch.long)
    for i in range(20):
        sequence = rows[i].matched
        ids[i, : len(sequence)] = torch.tensor(
            np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(int)
        )
        mask[i, : len(sequence)] = 1
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert metrics(run)[0]["aux_loss"] == pytest.approx(0.5 * float(expected), rel=1e-4)
    gate = next(name for name in weights(run) if "gate" in name)
    assert not torch.equal(weights(run)[gate], weights(base)[gate])


def test_a_loss_that_is_not_finite_stops_before_the_update(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GradientPasses.run
    names = []

    def broken(self: GradientPasses, rows: Any, reference: Any, *, step: int) -> Any:
        if step == 3:
            names.append(rows[1].row_id)
            rows = [*rows]
            rows[1] = replace(rows[1], matched=replace(rows[1].matched, ref_logps=float("nan")))
        return real(self, rows, reference, step=step)

    monkeypatch.setattr(GradientPasses, "run", broken)
    with pytest.raises(TrainingError, match="Step 3: the loss is not finite") as stopped:
        train(config)
    assert names[0] in str(stopped.value)
    assert not (config.out / "model.safetensors").exists()


def test_one_class_only_warns(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "label": True} for row in chat_rows(10)]
    data = write_rows(tmp_path / "f.jsonl", rows)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", one_class=True))
    run = train(TrainConfig(cache=tmp_path / "refs", out=tmp_path / "run", max_steps=1, save_steps=0, device="cpu"))
    assert "every training row is desirable" in capsys.readouterr().out
    assert "rewards/rejected" not in metrics(run)[0]
    assert "rewards/margins" not in metrics(run)[0]


class TestTrainingTable:
    """The YAML's `training:` table goes to TrainingArguments."""

    def test_reaches_the_trainer(self, config: TrainConfig, whole_run: Path) -> None:
        other = train(replace(config, training={"adam_beta1": 0.5, "max_grad_norm": 0.01}))
        pairs = zip(weights(whole_run).values(), weights(other).values(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"adam_beta": 0.5}, "Did you mean 'adam_beta[12]'"),
            ({"learning_rate": 1.0}, "set by --learning-rate"),
            ({"activation_checkpointing": True}, "set by --gradient-checkpointing"),
            ({"gradient_accumulation_steps": 4}, "set by --batch-size"),
            ({"optim": "galore_adamw_layerwise"}, "inside the backward pass"),
            ({"optim": "lomo"}, "inside the backward pass"),
        ],
    )
    def test_what_it_cannot_hold(self, config: TrainConfig, table: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            train(replace(config, training=table))


class TestRowsInThePlan:
    """Every command says how many rows it uses, holds out, leaves out and shortens, mismatched completions too."""

    @pytest.fixture(scope="class")
    def shortened(self, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Thirty rows, of which some do not fit into 90 tokens."""
        folder = tmp_path_factory.mktemp("plans")
        data = write_rows(folder / "f.jsonl", chat_rows(30, seed=4, longest=20))
        precompute(
            PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", max_length=130, kl_partners=2)
        )
        return folder / "refs"

    @staticmethod
    def counted(cache: Path, limit: int) -> tuple[int, int, int]:
        """(rows without room, completions cut, mismatched completions cut), from the ids in the files."""
        rows = [row for path in (cache / "train").iterdir() for row in pq.read_table(path).to_pylist()]
        kept = [row for row in rows if len(row["prompt_ids"]) < limit]
        cut = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) > limit for row in kept)
        kl_cut = sum(len(row["prompt_ids"]) + len(y) > limit for row in kept for y in row["kl_completion_ids"])
        return len(rows) - len(kept), cut, kl_cut

    def test_training_and_evaluation(self, shortened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = TrainConfig(
            cache=shortened,
            out=tmp_path / "run",
            max_length=90,
            max_steps=1,
            batch_size=4,
            save_steps=0,
            eval_fraction=0.3,
            device="cpu",
        )
        run = train(config)
        dropped, cut, kl_cut = self.counted(shortened, 90)
        assert min(dropped, cut, kl_cut) > 0
        gone = (
            f", {dropped} dropped (prompt too long), {cut} completions and {kl_cut} mismatched completions cut "
            "(--max-length 90)"
        )
        data = read_manifest(shortened).data
        assert data["kl_truncated"] > 0
        scored = (
            f"scored      {data['kept']} rows of 30, dropped: {data['dropped'].get('prompt_too_long', 'none')}"
            f"{' prompt too long' if data['dropped'] else ''}; cut at 130 tokens: {data['truncated']} completions, "
            f"{data['kl_truncated']} mismatched completions\n"
        )
        record = json.loads((run / "run.json").read_text())["data"]
        trained, held = (record[f"{side}desirable"] + record[f"{side}undesirable"] for side in ("", "held_out_"))
        assert trained + held == data["kept"] - dropped
        printed = capsys.readouterr().out
        assert scored in printed
        assert f"rows        {trained} to train on, {held} held out{gone}\n" in printed
        train(replace(config, evaluate_only=run, out=None))
        printed = capsys.readouterr().out
        assert scored in printed
        assert f"rows        {held}: held out{gone}\n" in printed

    def test_another_cache_to_evaluate_on_is_counted_apart(
        self, shortened: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(
            TrainConfig(
                cache=cache, out=tmp_path / "run", eval_cache=shortened, max_length=90, max_steps=1, device="cpu"
            )
        )
        dropped, cut, kl_cut = self.counted(shortened, 90)
        inside = (
            f"({dropped} dropped (prompt too long), {cut} completions and {kl_cut} mismatched completions cut "
            "(--max-length 90))"
        )
        printed = capsys.readouterr().out
        assert f" held out {inside}" in printed
        # Both caches are cut: each number stands with its own rows.
        assert re.search(
            r"^rows +\d+ to train on \(\d+ completions? and .* cut \(--max-length 90\)\), \d+ held", printed, re.M
        )
