"""Samples of held-out prompts: what is generated, that training does not notice, and which steps the file has."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from models import FAMILIES, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from stopped_runs import train_until

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.scoring.logps import add_scoring_forward
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.model.checkpointing import enable_checkpointing, is_checkpointing
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.samples import HeldOutSamples, end_tokens
from offline_kto.train.run.train_run import train
from offline_kto.train.samples_file import MOST_NEW_TOKENS, SAMPLES, read_samples, write_samples
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.sweep import sweep
from offline_kto.train.trainer import accumulators
from offline_kto.train.trainer.generation import Generation
from offline_kto.train.trainer.prepared_policy import PreparedPolicy

ALONE = SimpleNamespace(sharded=False, world=1, rank=0, least=lambda number: number)


@pytest.fixture(autouse=True)
def whole_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate as many tokens as a user's runs do."""
    monkeypatch.setattr("offline_kto.train.run.samples.MOST_NEW_TOKENS", MOST_NEW_TOKENS)


def generation(model: Any, *, ends: Sequence[int] = (0,), budget: int = 12) -> Generation:
    """A generation on the CPU."""
    add_scoring_forward(model)
    policy = PreparedPolicy(model, torch.device("cpu"), ranks=ALONE, max_tokens=256, rounding=2e-4)  # type: ignore[arg-type]
    return Generation(policy, contextlib.nullcontext, tuple(ends), budget)


def prompts(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(2, 97, length).astype(np.int32) for length in lengths]


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache,
        out=tmp_path / "run",
        batch_size=4,
        max_steps=4,
        learning_rate=3e-3,
        save_steps=0,
        eval_fraction=0.4,
        eval_steps=2,
        device="cpu",
        samples=2,
    )


def steps_of(run: Path) -> list[int]:
    return [one["step"] for one in read_samples(run)]


class TestGeneration:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_together_is_as_alone_and_as_by_hand(self, family: str) -> None:
        """Learned positions, sliding windows shorter than a prompt, experts, soft-caps; by hand means without keys and values."""
        model = tiny_model(family)
        made = generation(model, budget=8)
        given = prompts(3, 11, 6)
        together = made.complete(given)
        for prompt, one in zip(given, together, strict=True):
            (alone,) = made.complete([prompt])
            assert alone.ids.tolist() == one.ids.tolist()
            ids = prompt.tolist()
            while len(ids) < len(prompt) + 8 and (len(ids) == len(prompt) or ids[-1] != 0):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            assert one.ids.tolist() == ids[len(prompt) :]
            assert one.ended == (ids[-1] == 0)

    def test_is_the_librarys_own_without_the_models_sampling_settings(self) -> None:
        model = tiny_model()
        (prompt,) = prompts(7)
        expected = model.generate(
            torch.tensor(prompt[None]).long(), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        model.generation_config.update(
            repetition_penalty=5.0, do_sample=True, temperature=3.0, max_length=9, min_length=8
        )
        own = model.generation_config
        (found,) = generation(model, ends=()).complete([prompt])
        assert found.ids.tolist() == expected[0, 7:].tolist()
        assert not found.ended
        assert model.generation_config is own

    def test_stops_at_an_end_token_and_keeps_it(self) -> None:
        model = tiny_model()
        whole = generation(model, ends=()).complete(prompts(4, 9))
        ends = [int(one.ids[5]) for one in whole]
        for one, found in zip(whole, generation(tiny_model(), ends=ends).complete(prompts(4, 9)), strict=True):
            first = next(i for i, token in enumerate(one.ids) if token in ends)
            assert found.ids.tolist() == one.ids[: first + 1].tolist()
            assert found.ended

    def test_prompts_are_made_alone_where_padding_changes_the_scores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("gpt2")
        expected = [one.ids.tolist() for one in generation(model).complete(prompts(4, 9, 2))]
        own, rows = model.generate, []

        def without_mask(ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
            rows.append(len(ids))
            return own(ids, attention_mask=torch.ones_like(attention_mask), **options)

        monkeypatch.setattr(model, "generate", without_mask)
        found = generation(model).complete(prompts(4, 9, 2))
        assert rows == [3, 1, 1, 1]
        assert [one.ids.tolist() for one in found] == expected

    def test_out_of_memory_together_is_tried_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model()
        own = model.generate

        def small(ids: torch.Tensor, **options: Any) -> torch.Tensor:
            if len(ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(ids, **options)

        expected = [one.ids.tolist() for one in generation(model).complete(prompts(4, 9))]
        monkeypatch.setattr(model, "generate", small)
        assert [one.ids.tolist() for one in generation(model).complete(prompts(4, 9))] == expected

    def test_a_prompt_near_the_last_position_gets_fewer_tokens(self) -> None:
        model = tiny_model("gpt2", n_positions=16)
        found = generation(model, ends=(), budget=10).complete(prompts(3, 14))
        assert [len(one.ids) for one in found] == [10, 2]

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_leaves_no_trace(self, dropout: float) -> None:
        model = tiny_model("gpt2", resid_pdrop=dropout)
        made = generation(model)
        first = [one.ids.tolist() for one in made.complete(prompts(4, 9))]
        enable_checkpointing(model)
        model.train()
        model.transformer.h[1].eval()  # modes differ from module to module
        modes = {name: module.training for name, module in model.named_modules()}
        state = torch.random.get_rng_state()
        assert [one.ids.tolist() for one in made.complete(prompts(4, 9))] == first
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert is_checkpointing(model)


class TestEndTokens:
    def test_are_those_of_tokenizer_model_and_data(self) -> None:
        tokenizer, model = tiny_tokenizer(), tiny_model(eos_token_id=5)
        turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model.generation_config.eos_token_id = [5, 6]
        ended, other = np.array([40, 41, turn]), np.array([40, 41, 42])
        assert end_tokens(tokenizer, model, [ended, ended, other]) == tuple(
            sorted({tokenizer.eos_token_id, 5, 6, turn})
        )
        assert end_tokens(tokenizer, model, [other, other, ended]) == tuple(sorted({tokenizer.eos_token_id, 5, 6}))

    def test_may_be_none(self) -> None:
        assert end_tokens(tiny_tokenizer(eos=False), tiny_model(eos_token_id=None), [np.array([40])]) == ()


class TestOfARun:
    def test_before_and_after(self, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
        """The text after training is the saved model's own, for the same held-out prompts."""
        run = train(replace(config, keep="last"))
        samples = read_samples(run)
        assert [one["step"] for one in samples] == [0, 0, 4, 4]
        assert [one["prompt_id"] for one in samples[:2]] == [one["prompt_id"] for one in samples[2:]]
        assert samples[0]["completion"] != samples[2]["completion"]
        rows = CacheRows(config.cache)  # type: ignore[arg-type]
        tokenizer = transformers.AutoTokenizer.from_pretrained(run)
        model = transformers.AutoModelForCausalLM.from_pretrained(run)
        for one in samples[2:]:
            ids = rows[rows.column("prompt_id").to_pylist().index(one["prompt_id"])].matched.prompt_ids.tolist()
            assert one["prompt"] == tokenizer.decode(ids)
            assert "<|im_start|>user" in one["prompt"]
            out = model.generate(torch.tensor([ids]), max_new_tokens=one["tokens"], do_sample=False)[0, len(ids) :]
            assert tokenizer.decode(out[: len(out) - one["ended"]]) == one["completion"]
        lines = capsys.readouterr().out
        plan = "2 of 6 held-out prompts, at most 256 new tokens each, before and after training (--samples 0 for none)"
        assert f"samples     {plan}" in lines
        assert f": {run / SAMPLES}" in lines

    @pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "gradient_checkpointing": True}], ids=["full", "lora"])
    def test_training_is_the_same_without(self, config: TrainConfig, options: Any, tmp_path: Path) -> None:
        weights = "adapter_model.safetensors" if options else "model.safetensors"
        runs = [
            train(replace(config, out=tmp_path / str(count), samples=count, samples_at=at, **options))
            for count, at in ((0, "ends"), (3, "evaluations"))
        ]
        first, second = (load_file(run / weights) for run in runs)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        for one, other in zip(*logs, strict=True):
            for record in (one, other):
                for timed in ("tokens_per_second", "train_runtime", "peak_memory_mb"):
                    record.pop(timed, None)
            assert one == other
        assert not (runs[0] / SAMPLES).exists()
        assert sorted(set(steps_of(runs[1]))) in ([0, 2], [0, 2, 4])

    @pytest.mark.slow
    def test_at_evaluations_the_last_step_is_the_kept_model(self, config: TrainConfig, tmp_path: Path) -> None:
        """The run gets worse, so its first evaluation is the best one."""
        config = replace(config, eval_steps=1, learning_rate=0.1, samples_at="evaluations", save_steps=100)
        last, best = train(replace(config, keep="last")), train(replace(config, out=tmp_path / "best"))
        assert sorted(set(steps_of(last))) == [0, 1, 2, 3, 4]
        kept = json.loads((best / "run.json").read_text())["final"]["step"]
        assert kept < 4
        assert max(steps_of(best)) == kept
        of_step = [one for one in read_samples(last) if one["step"] == kept]
        assert [one for one in read_samples(best) if one["step"] == kept] == of_step

    def test_their_time_is_no_part_of_tokens_per_second(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        monkeypatch.setattr(accumulators, "time", SimpleNamespace(monotonic=lambda: now[0]))
        make, add = HeldOutSamples.make, accumulators.Window.add
        begun: list[float] = []

        def slowly(self: HeldOutSamples, step: int) -> None:
            make(self, step)
            now[0] += 100.0

        def noted(self: accumulators.Window, *args: Any) -> None:
            begun.append(now[0] - self.started)
            add(self, *args)
            now[0] += 1.0

        monkeypatch.setattr(HeldOutSamples, "make", slowly)
        monkeypatch.setattr(accumulators.Window, "add", noted)
        train(replace(config, samples_at="evaluations"))
        assert now == [304.0]  # before training, at an evaluation, and after it
        assert (begun[0], begun[2]) == (0.0, 0.0)  # updates 1 and 3 follow samples

    def test_the_default_is_eight_with_held_out_rows(self, config: TrainConfig, cache: Path) -> None:
        assert replace(config, samples=None).prompts_to_sample() == 8
        assert replace(config, samples=None).prompts_to_sample(in_sweep=True) == 0
        assert TrainConfig(cache=cache).prompts_to_sample() == 0
        assert TrainConfig(cache=cache, samples=0).prompts_to_sample() == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 4}, "--samples needs held-out rows: give --eval-fraction 0.1 or --eval-cache"),
            ({"samples_at": "evaluations"}, "--samples-at needs held-out rows"),
            ({"samples": -1, "eval_fraction": 0.1}, "--samples must be at least 0"),
            ({"samples": 0, "samples_at": "evaluations", "eval_fraction": 0.1}, "no effect with --samples 0"),
        ],
    )
    def test_options_without_effect_are_refused(self, cache: Path, options: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            TrainConfig(cache=cache, **options)

    @pytest.mark.slow
    def test_a_resumed_run_has_the_samples_of_an_uninterrupted_one(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, save_steps=1, eval_steps=1, samples_at="evaluations", keep="last")
        whole = train(config)
        broken = replace(config, out=tmp_path / "broken")
        train_until(broken, step=3)
        assert broken.out is not None
        with (broken.out / SAMPLES).open("a") as file:  # of a step after the checkpoint, and a torn line
            file.write(json.dumps({**read_samples(broken.out)[0], "step": 9}) + '\n{"step": 9, "pro')
        train(replace(broken, resume=True, samples=5))  # the prompts of the file stay
        assert read_samples(broken.out) == read_samples(whole)

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), TypeError("no such argument")]
    )
    def test_a_failure_is_a_line(
        self,
        error: Exception,
        config: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", fail)
        run = train(config)
        assert (run / "model.safetensors").exists()
        assert (run / "evaluation.json").exists()
        assert not (run / SAMPLES).exists()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples     none")]
        assert len(lines) == 1
        assert str(error) in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "steps"), [({}, []), ({"samples": 1}, [0, 2])], ids=["default", "asked"])
def test_trials_of_a_sweep_make_samples_if_asked(
    asked: dict[str, int], steps: list[int], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline_kto.train.sweep.workers.START", "forkserver")  # from the process of forks.py
    of_all = {"max_steps": 2, "batch_size": 4, "device": "cpu", "eval_fraction": 0.3, "keep": "last", **asked}
    out = sweep(SweepConfig(cache=cache, out=tmp_path / "sweep", space={"beta": [0.1]}, train=of_all, trials=1))
    assert steps_of(out / "trials/0000") == steps
    assert steps_of(out / "best") == steps


class TestLater:
    def test_evaluate_only_makes_those_of_the_model(
        self, config: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without those before training: the policy at step 0 is not at hand."""
        run = train(replace(config, samples=0))
        made = replace(config, evaluate_only=run, out=None)
        evaluate_run(made)
        first = read_samples(run)
        assert [one["step"] for one in first] == [json.loads((run / "run.json").read_text())["final"]["step"]] * 2
        with_both = train(replace(config, out=run.parent / "both"))
        assert first == read_samples(with_both)[2:]
        (both := read_samples(with_both))[2]["completion"] = "stale"
        write_samples(with_both / SAMPLES, both)
        capsys.readouterr()
        evaluate_run(replace(made, evaluate_only=with_both, samples=5))  # the prompts of the file stay
        assert f"samples     {with_both / SAMPLES} has 2 prompts, which are kept;" in capsys.readouterr().out
        assert read_samples(with_both) == [*both[:2], *first]

    def test_those_before_training_are_made_without_the_adapters(self, config: TrainConfig) -> None:
        run = train(replace(config, lora_rank=2, keep="last"))
        whole = read_samples(run)
        (run / SAMPLES).unlink()
        result = CliRunner().invoke(kto_train, ["--evaluate-only", str(run), "--samples", "2", "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert "2 held-out prompts before and after training" in result.output
        assert read_samples(run) == whole

    def test_rows_of_another_cache_have_a_file_of_their_own(self, config: TrainConfig, cache: Path) -> None:
        run = train(replace(config, eval_fraction=0.0, eval_steps=None, samples=None, max_steps=1))
        evaluate_run(TrainConfig(cache=cache, evaluate_only=run, device="cpu"))
        assert list(run.glob("samples*")) == []
        path = evaluate_run(TrainConfig(cache=cache, evaluate_only=run, device="cpu", samples=1))
        (found,) = read_samples(run, path.with_suffix(".jsonl").name.replace("evaluation", "samples"))
        assert found["step"] == 1
        assert not (run / SAMPLES).exists()


RECORD: Any = {"step": 3, "prompt_id": "a", "prompt": "p", "completion": "c", "ended": True, "tokens": 2}

# Fields of another type, or with a value that none has.
WRONG: list[dict[str, Any]] = [
    {"step": True},
    {"step": -1},
    {"step": 1.5},
    {"tokens": "2"},
    {"tokens": -1},
    {"prompt": None},
    {"ended": 1},
]


class TestFile:
    def test_hostile_text_survives(self, tmp_path: Path) -> None:
        text = '</script><!-- \u2028\x00\x1b[31m\ud800 \U0001f600 \x85 " \\ \r\n{}'
        write_samples(tmp_path / SAMPLES, [{**RECORD, "completion": text}, {**RECORD, "step": 0}])
        assert [(one["step"], one["completion"]) for one in read_samples(tmp_path)] == [(0, "c"), (3, text)]
        assert len((tmp_path / SAMPLES).read_bytes().splitlines()) == 2

    @pytest.mark.parametrize(
        "line",
        ["", "[]", "nul", "{", "[" * 9999, '{"step": 1}', *(json.dumps({**RECORD, **one}) for one in WRONG)],
    )
    def test_damaged_lines_are_left_out(self, line: str, tmp_path: Path) -> None:
        (tmp_path / SAMPLES).write_text(f"{line}\n{json.dumps({**RECORD, 'more': [1]})}\n")
        assert read_samples(tmp_path) == [RECORD]

    def test_a_folder_without_one_has_none(self, tmp_path: Path) -> None:
        assert read_samples(tmp_path) == []
        (tmp_path / SAMPLES).mkdir()
        with pytest.raises(IsADirectoryError):
            read_samples(tmp_path)
