"""What a run saves: the weights that were trained, in the model's own configuration, or nothing."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from click.testing import CliRunner
from models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from stopped_runs import train_until

from offline_kto.kto_core.errors import TrainingError
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.saved_model import (
    Layout,
    ModelWriter,
    UnloadableModelError,
    cast_weights,
    narrowed,
    not_finite,
)
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.kto_trainer import KTOTrainer

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config_for(cache: Path, out: Path) -> TrainConfig:
    return TrainConfig(cache=cache, out=out, batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=1, device="cpu")


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return config_for(cache, tmp_path / "run")


def scored(base: Path, feedback: Path, config: TrainConfig) -> TrainConfig:
    """The options, with a cache of their own that a model scored."""
    refs = base.with_name(f"{base.name}-refs")
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=refs, max_length=256))
    return replace(config, cache=refs)


def edited(folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    """Change fields of a JSON file; None removes one."""
    found = {**json.loads((folder / name).read_text()), **fields}
    (folder / name).write_text(json.dumps({k: v for k, v in found.items() if v is not ...}, indent=1))
    return found


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def bytes_of(weights: dict[str, torch.Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def naive_logps(folder: Path, row: dict[str, Any]) -> float:
    """A row's score from full logits in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([*row["prompt_ids"], *row["completion_ids"]])[None]
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(logps[len(row["prompt_ids"]) - 1 :].sum())


class TestConfiguration:
    def test_a_pad_token_beyond_the_vocabulary_stays_out_of_it(
        self, tmp_path: Path, feedback: Path, config: TrainConfig
    ) -> None:
        """The usual line `tokenizer.add_special_tokens({"pad_token": ...})`, without a resized model."""
        tokenizer = tiny_tokenizer()
        size = len(tokenizer)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == size
        base = save_tiny(tmp_path / "base", tokenizer=tokenizer, vocab_size=size)
        run = train(scored(base, feedback, config))
        for folder in (run, run / "checkpoint-2"):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            assert model.config.pad_token_id is None
            assert read(folder / "config.json") == read(base / "config.json")
            for name in ("generation_config.json", *TOKENIZER):
                assert (folder / name).read_bytes() == (base / name).read_bytes()

    @pytest.mark.parametrize("lora_rank", [0, 2])
    def test_the_models_own_ids_and_settings_are_saved(
        self, tmp_path: Path, feedback: Path, config: TrainConfig, lora_rank: int
    ) -> None:
        base = save_tiny(tmp_path / "base")
        own = edited(
            base, "config.json", eos_token_id=[1, 5], bos_token_id=7, pad_token_id=3, use_cache=False, mine="x"
        )
        own = edited(base, "config.json", torch_dtype=own.pop("dtype"), dtype=..., transformers_version="4.31.0")
        sampling = edited(
            base,
            "generation_config.json",
            eos_token_id=[9, 4],
            do_sample=True,
            temperature=0.6,
            top_k=20,
            pad_token_id=2,
        )
        run = train(replace(scored(base, feedback, config), lora_rank=lora_rank))
        if lora_rank:
            assert not (run / "config.json").exists()
        else:
            own.pop("dtype")
            assert read(run / "config.json") == own
            assert read(run / "generation_config.json") == sampling
        for name in TOKENIZER:
            assert (run / name).read_bytes() == (base / name).read_bytes()

    def test_settings_that_contradict_each_other_keep_their_special_tokens(
        self, tmp_path: Path, feedback: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = save_tiny(tmp_path / "base")
        edited(
            base, "generation_config.json", eos_token_id=[9, 4], pad_token_id=2, early_stopping=True, temperature=0.6
        )
        run = train(scored(base, feedback, config))
        assert "only its special tokens are saved" in capsys.readouterr().out
        saved = transformers.AutoModelForCausalLM.from_pretrained(run).generation_config
        assert (saved.eos_token_id, saved.pad_token_id, saved.early_stopping) == ([9, 4], 2, None)

    @pytest.fixture(scope="class")
    def plain(self, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
        """The weights of a run whose base is as `save_tiny` makes it."""
        folder = tmp_path_factory.mktemp("plain")
        run = train(scored(save_tiny(folder / "base"), feedback, config_for(folder, folder / "run")))
        return load_file(run / "model.safetensors")

    @pytest.mark.parametrize(
        "outputs", [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}], ids=str
    )
    def test_what_a_configuration_wants_returned_changes_nothing(
        self,
        outputs: dict[str, bool],
        plain: dict[str, torch.Tensor],
        tmp_path: Path,
        feedback: Path,
        config: TrainConfig,
    ) -> None:
        base = save_tiny(tmp_path / "base")
        edited(base, "config.json", **outputs)
        run = train(scored(base, feedback, config))
        assert all(torch.equal(plain[name], one) for name, one in load_file(run / "model.safetensors").items())
        assert outputs.items() <= read(run / "config.json").items()

    def test_a_kernel_that_ignores_a_cap_is_not_asked_for_again(
        self, tmp_path: Path, feedback: Path, config: TrainConfig
    ) -> None:
        """transformers 5.24 refuses to load such a configuration, and earlier versions score without the cap."""
        base = save_tiny(tmp_path / "base", "gemma2", attn_logit_softcapping=1.0)
        edited(base, "config.json", attn_implementation="sdpa")
        run = train(scored(base, feedback, config))
        assert "attn_implementation" not in read(run / "config.json")
        assert transformers.AutoModelForCausalLM.from_pretrained(run).config.attn_logit_softcapping == 1.0

    def test_a_head_of_its_own_is_saved_though_the_configuration_says_tied(
        self, tmp_path: Path, feedback: Path, config: TrainConfig
    ) -> None:
        base = save_tiny(tmp_path / "base")
        edited(base, "config.json", tie_word_embeddings=True)
        config = scored(base, feedback, replace(config, eval_fraction=0.3))
        run = train(config)
        saved, before = load_file(run / "model.safetensors"), load_file(base / "model.safetensors")
        assert saved.keys() == before.keys()
        assert not torch.equal(saved["lm_head.weight"], before["lm_head.weight"])
        rows = {row["row_id"]: row for row in pq.read_table(config.cache / "train").to_pylist()}  # type: ignore[operator]
        held_out = [row for row in pq.read_table(run / "rewards.parquet").to_pylist() if row["split"] == "held_out"]
        assert held_out
        for row in held_out[:3]:
            logratio = naive_logps(run, rows[row["row_id"]]) - rows[row["row_id"]]["ref_logps"]
            assert row["logratio"] == pytest.approx(logratio, abs=1e-3)

    @pytest.mark.parametrize("said", [True, False])
    def test_a_head_that_an_adapter_brought_is_saved(self, tmp_path: Path, said: bool) -> None:
        """On a tied model, whose configuration says so or leaves it to its family."""
        base = save_tiny(tmp_path / "base", "gpt2")
        edited(base, "config.json", tie_word_embeddings=True if said else ...)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
        model.config.tie_word_embeddings = False  # as `merge_adapter` leaves it
        ModelWriter.of(base, tiny_tokenizer(), model).write(model, tmp_path / "out")
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(found.lm_head.weight, model.lm_head.weight)
        assert torch.equal(found.transformer.wte.weight, model.transformer.wte.weight)

    def test_the_models_folder_may_be_gone_when_the_run_ends(self, base: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(base, tmp_path / "source"))
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        writer = ModelWriter.of(source, tiny_tokenizer(), model)
        shutil.rmtree(source)
        writer.write(model, tmp_path / "out")
        assert read(tmp_path / "out/config.json") == read(base / "config.json")
        assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    def test_a_tokenizer_that_the_run_changed_is_written_out(self, base: Path, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer(chat_template="{{ messages[0]['content'] }} changed")
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        ModelWriter.of(base, tokenizer, model).write(model, tmp_path / "out")
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert found.chat_template == tokenizer.chat_template
        assert found("hello wor").input_ids == tokenizer("hello wor").input_ids


class TestCheck:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_is_written_and_read_again(self, family: str, tmp_path: Path) -> None:
        dtype = torch.bfloat16 if FAMILIES.index(family) % 2 else None
        base = save_tiny(tmp_path / "base", family)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        ModelWriter.of(base, tiny_tokenizer(), model).write(model, tmp_path / "out", dtype=dtype)
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        expected = model.state_dict()
        assert found.state_dict().keys() == expected.keys()
        for name, weight in found.state_dict().items():
            assert torch.equal(weight, expected[name].to(weight.dtype)), name
            assert weight.dtype == (dtype or torch.float32) or name in _wide(model)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_hidden_layers": 3}, "missing keys"),
            ({"num_hidden_layers": 1}, "unexpected keys"),
            ({"intermediate_size": 48}, "cannot be loaded|mismatched keys"),
            ({"pad_token_id": 9999}, "cannot be loaded"),
        ],
    )
    def test_a_folder_that_gives_back_another_model_is_refused(
        self, change: dict[str, Any], words: str, base: Path, tmp_path: Path
    ) -> None:
        source = Path(shutil.copytree(base, tmp_path / "source"))
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        edited(source, "config.json", **change)  # what is copied into the saved folder
        with pytest.raises(UnloadableModelError, match=words):
            ModelWriter.of(source, tiny_tokenizer(), model).write(model, tmp_path / "out")

    def test_a_head_that_was_tied_by_saving_is_refused(self, tmp_path: Path) -> None:
        source = save_tiny(tmp_path / "source", "llama-tied")
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        writer = ModelWriter.of(source, tiny_tokenizer(), model)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
        with pytest.raises(UnloadableModelError, match=r"share one weight|missing"):
            writer.write(model, tmp_path / "out")

    def test_a_run_keeps_what_it_cannot_vouch_for(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Any, folder: Path, layout: Layout) -> None:
            raise UnloadableModelError("the saved model is not the one that was trained: 1 missing keys")

        monkeypatch.setattr(ModelWriter, "check_loads", refuse)
        with pytest.raises(TrainingError, match=r"_unloadable: .*1 missing keys. Its weights are kept in that folder"):
            train(replace(config, save_steps=0))
        out = config.out or Path()
        assert load_file(out / "_unloadable/model.safetensors")
        assert not (out / "model.safetensors").exists()

    def test_adapters_that_were_not_saved_are_missed(self, config: TrainConfig, base: Path, tmp_path: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        writer = ModelWriter.of(base, tiny_tokenizer(), model)
        writer.write(adapted, tmp_path / "whole")
        assert peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "whole"
        )
        some = {name: one for name, one in adapted.state_dict().items() if "layers.1" not in name}
        with pytest.raises(UnloadableModelError, match="adapters are not those of the run"):
            writer.write(adapted, tmp_path / "part", state_dict=some)


def _wide(model: Any) -> set[str]:
    """Names that the model's authors keep in float32, and buffers of whole numbers."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return {name for name in model.state_dict() if kept & {*name.split(".")}}


class TestNotFinite:
    def test_a_last_update_that_blows_up_is_not_saved(self, config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "sgd.yaml").write_text("training: {optim: sgd, max_grad_norm: 0}\n")
        options = ["--cache", config.cache, "--out", config.out, "--max-steps", 1, "--config", tmp_path / "sgd.yaml"]
        options += ["--learning-rate", 1, "--desirable-weight", 1e18, "--undesirable-weight", 1e18]
        result = CliRunner().invoke(kto_train, [str(one) for one in options])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert "row_id" in result.stderr
        assert "--learning-rate 1" in result.stderr
        assert not [*(config.out or Path()).rglob("*.safetensors")]

    @pytest.mark.parametrize(
        ("value", "lora_rank", "words"),
        [
            (float("nan"), 0, "1 of 21 trained weights are not finite"),
            (float("inf"), 2, r"1 of \d+ trained weights are not finite"),
            (1e19, 2, "the trained weights are so large that log-probabilities are not finite"),
        ],
    )
    def test_the_last_good_checkpoint_stays(
        self, config: TrainConfig, value: float, lora_rank: int, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = KTOTrainer.stop_if_weights_not_finite

        def spoiled(self: Any, what: str) -> None:
            if self.state.global_step == 2:
                trained = [one for one in self.model.parameters() if one.requires_grad]
                with torch.no_grad():
                    for one in trained if value == 1e19 else trained[:1]:
                        one.fill_(value)
            real(self, what)

        monkeypatch.setattr(KTOTrainer, "stop_if_weights_not_finite", spoiled)
        with pytest.raises(TrainingError, match=f"Step 2: {words}.*row_id.*checkpoint is not saved"):
            train(replace(config, lora_rank=lora_rank))
        out = config.out or Path()
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
        saved = load_file(next((out / "checkpoint-1").glob("*model.safetensors")))
        assert all(bool(weight.isfinite().all()) for weight in saved.values())
        assert not [*out.glob("*.safetensors")]

    def test_gradients_that_are_not_finite_change_nothing(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = KTOTrainer.training_step
        before: dict[str, torch.Tensor] = {}

        def spoiled(self: Any, *arguments: Any) -> Any:
            loss = real(self, *arguments)
            next(self.model.parameters()).grad[0, 0] = float("inf")
            before.update(copy.deepcopy(self.model.state_dict()))
            spoiled.model = self.model  # type: ignore[attr-defined]
            return loss

        monkeypatch.setattr(KTOTrainer, "training_step", spoiled)
        with pytest.raises(TrainingError, match=r"Step 1: the gradients are not finite.*row_id"):
            train(config)
        now = spoiled.model.state_dict()  # type: ignore[attr-defined]
        assert all(torch.equal(now[name], weight) for name, weight in before.items())

    def test_an_optimizer_state_that_overflowed_is_no_checkpoint(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = KTOTrainer.stop_if_weights_not_finite

        def spoiled(self: Any, what: str) -> None:
            next(iter(self.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
            real(self, what)

        monkeypatch.setattr(KTOTrainer, "stop_if_weights_not_finite", spoiled)
        with pytest.raises(TrainingError, match=r"optimizer's state is not finite.*exp_avg_sq"):
            train(config)

    def test_what_is_found(self) -> None:
        good = {
            "a": torch.ones(3),
            "empty": torch.empty(0),
            "ids": torch.tensor([2**40]),
            "half": torch.ones(2).bfloat16(),
        }
        assert not_finite(good) == []
        bad = {
            "nan": torch.tensor([1.0, np.nan]),
            "inf": torch.tensor([[-np.inf]]),
            "h": torch.tensor(np.inf).bfloat16(),
        }
        assert not_finite({**good, **bad}) == ["nan", "inf", "h"]


class TestSaveDtype:
    @pytest.mark.parametrize(("kind", "lora_rank"), [("bfloat16", 0), ("float16", 2)])
    def test_weights_are_those_that_were_trained_rounded_once(
        self, config: TrainConfig, base: Path, kind: str, lora_rank: int
    ) -> None:
        config = replace(config, lora_rank=lora_rank, eval_fraction=0.3)
        out = config.out or Path()
        whole = train(replace(config, out=out.with_name("whole")))
        run = train(replace(config, save_dtype=kind))
        name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
        wide, narrow = load_file(whole / name), load_file(run / name)
        dtype = getattr(torch, kind)
        assert wide.keys() == narrow.keys()
        for key, weight in narrow.items():
            assert weight.dtype == dtype
            assert torch.equal(weight, wide[key].to(dtype))
        assert bytes_of(narrow) * 2 == bytes_of(wide)
        assert load_file(run / "checkpoint-2" / name).popitem()[1].dtype == torch.float32
        if not lora_rank:
            assert read(run / "config.json")["dtype"] == kind

    def test_what_is_evaluated_is_what_is_saved(self, config: TrainConfig, cache: Path) -> None:
        run = train(replace(config, eval_fraction=0.3, save_dtype="bfloat16"))
        rows = {row["row_id"]: row for row in pq.read_table(cache / "train").to_pylist()}
        held_out = [row for row in pq.read_table(run / "rewards.parquet").to_pylist() if row["split"] == "held_out"]
        for row in held_out[:4]:
            logratio = naive_logps(run, rows[row["row_id"]]) - rows[row["row_id"]]["ref_logps"]
            assert row["logratio"] == pytest.approx(logratio, abs=1e-3)

    def test_what_a_model_keeps_in_float32_stays_in_it(self, tmp_path: Path) -> None:
        base = save_tiny(tmp_path / "base")
        weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
        kept = "model.layers.1.mlp.gate_proj.weight"
        weights[kept] = weights[kept].float() + 1e-5
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        ModelWriter.of(base, tiny_tokenizer(), model).write(model, tmp_path / "out", dtype=torch.bfloat16)
        saved = load_file(tmp_path / "out/model.safetensors")
        assert {name for name, weight in saved.items() if weight.dtype == torch.float32} == {kept}
        assert all(torch.equal(weight, weights[name]) for name, weight in saved.items())

    def test_what_lies_below_adapters_is_not_rounded(self, base: Path, tmp_path: Path) -> None:
        """PEFT saves embeddings that carry adapters."""
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        targets = ["q_proj", "embed_tokens"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            ModelWriter.of(base, tiny_tokenizer(), adapted).write(adapted, tmp_path / "out", dtype=torch.bfloat16)
        saved = load_file(tmp_path / "out/adapter_model.safetensors")
        assert {weight.dtype for name, weight in saved.items() if "lora_" in name} == {torch.bfloat16}
        assert {weight.dtype for name, weight in saved.items() if "lora_" not in name} == {torch.float32}

    def test_what_a_type_cannot_hold_is_refused(self) -> None:
        with pytest.raises(
            TrainingError, match=r"--save-dtype float16: w contains 7e\+04, which is too large for float16"
        ):
            narrowed("w", torch.tensor([1.0, 7e4]), torch.float16)
        assert torch.isfinite(narrowed("w", torch.tensor([7e4]), torch.bfloat16)).all()

    def test_tied_weights_stay_one(self) -> None:
        weight = torch.ones(2, 2)
        cast = cast_weights({"a": weight, "b": weight.detach(), "c": torch.ones(2, dtype=torch.int64)}, torch.bfloat16)
        assert cast["a"].data_ptr() == cast["b"].data_ptr()
        assert cast["c"].dtype == torch.int64


@pytest.fixture(params=[0o022, 0o007])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield int(request.param)
    os.umask(before)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "eval_fraction": 0.3}])
def test_every_file_has_the_usual_mode(
    umask: int, base: Path, feedback: Path, config: TrainConfig, tmp_path: Path, options: dict[str, Any]
) -> None:
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
    train(replace(config, cache=tmp_path / "refs", **options))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".pt", ".json", ".parquet", ".jsonl", ".html"}
    wrong = {str(path): oct(path.stat().st_mode) for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask}
    assert wrong == {}


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
class TestExperts:
    """Files hold each expert by itself, the model in memory all of a layer in one tensor, under another name."""

    @pytest.fixture
    def experts(self, family: str, tmp_path: Path, feedback: Path, config: TrainConfig) -> TrainConfig:
        return scored(save_tiny(tmp_path / "base", family), feedback, replace(config, max_steps=3, save_steps=2))

    def test_a_resumed_run_has_the_experts_it_trained(self, experts: TrainConfig, tmp_path: Path) -> None:
        whole = train(replace(experts, out=tmp_path / "whole"))
        train_until(experts, step=2)
        resumed = train(replace(experts, resume=True))
        one, other = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
        assert one.keys() == other.keys()
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=0)

    def test_early_stopping_ends_with_the_best_experts(self, experts: TrainConfig) -> None:
        run = train(replace(experts, eval_fraction=0.3, eval_steps=1, early_stopping=1, max_steps=4, learning_rate=0.3))
        best = read(max(run.glob("checkpoint-*/trainer_state.json")))["best_model_checkpoint"]
        saved, kept = load_file(run / "model.safetensors"), load_file(Path(best) / "model.safetensors")
        assert all(torch.equal(weight, kept[name]) for name, weight in saved.items())


def test_a_layout_names_what_is_tied() -> None:
    assert Layout.of(tiny_model("llama-tied")).tied == {frozenset({"lm_head.weight", "model.embed_tokens.weight"})}
