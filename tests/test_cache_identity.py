"""What makes a reference another reference, and what does not.

Whatever changes a number stops `kto-precompute` with its name; whatever changes none is passed over.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from feedback_files import chat_rows, write_rows
from models import CHAT_TEMPLATE, END, MERGES, save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_precompute import count_scored, scored
from test_reuse import apart, assert_as_fresh, snapshot

import offline_kto.precompute.engines.reference
import offline_kto.precompute.engines.tokenizer
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import CacheError, ModelError
from offline_kto.kto_core.hashing import weights_hash
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute as run
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many sequences each call of the scorer got."""
    return count_scored(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    return save_tiny(tmp_path / "model")


@pytest.fixture
def config(tmp_path: Path, model: Path) -> PrecomputeConfig:
    """Options for a small cache of conversations and plain text."""
    data = write_rows(tmp_path / "feedback.jsonl", [*chat_rows(6), *apart(4)])
    return PrecomputeConfig(model=str(model), data=str(data), out=tmp_path / "refs", max_length=256, chat="never")


def change_weights(folder: Path, name: str = "model.safetensors") -> None:
    """Every matrix a tenth larger, in the same file."""
    larger = {key: tensor * 1.1 if tensor.ndim > 1 else tensor for key, tensor in load_file(folder / name).items()}
    save_file(larger, folder / name, metadata={"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def put_tokenizer(folder: Path, **options: Any) -> None:
    tiny_tokenizer(**options).save_pretrained(folder)


def end_elsewhere(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = END
    tokenizer.save_pretrained(folder)


def save_adapter(folder: Path, base: Path, settings: peft.PeftConfig, *, seed: int = 1) -> Path:
    """An adapter beside its base, as training would leave it."""
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def lora(base: Path, *, seed: int = 1) -> str:
    folder = base.with_name("adapter")
    return str(save_adapter(folder, base, peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=seed))


def named(error: pytest.ExceptionInfo[CacheError]) -> set[str]:
    """The fields that a refusal names, each with two sides that differ."""
    lines = re.findall(r"^  ([\w.]+): (.+) in the cache, (.+) now$", str(error.value), re.MULTILINE)
    assert all(old != new for _, old, new in lines)
    return {name for name, _, _ in lines}


def numbers(folder: Path) -> list[Any]:
    return [(row["ref_token_logps"], row["ref_kl_token_logps"]) for row in scored(folder)]


def assert_refused_then_replaced(config: PrecomputeConfig, names: set[str]) -> None:
    """One message with all names and no byte touched; with --overwrite, what a fresh run makes."""
    before = snapshot(config.out)
    with pytest.raises(CacheError) as refused:
        run(config)
    assert named(refused) == names
    assert str(config.out) in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert snapshot(config.out) == before
    run(replace(config, overwrite=True))
    assert_as_fresh(config)


# name: (options of the first run, of the second, what is named)
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "length": ({}, {"max_length": 80}, {"tokenization.max_length"}),
    "precision": ({}, {"dtype": "bfloat16"}, {"reference.dtype"}),
    "plain text": ({}, {"chat": "auto"}, {"tokenization.chat"}),
    "seed of the pairing": ({}, {"seed": 3}, {"pairing.seed"}),
    "way of pairing": ({}, {"pairing": "rotate"}, {"pairing.method", "pairing.seed", "pairing.block"}),
    "block of the pairing": (
        {"pairing": "rotate", "pairing_block": 4},
        {"pairing": "rotate", "pairing_block": 5},
        {"pairing.block"},
    ),
    "length and precision": (
        {},
        {"max_length": 80, "dtype": "bfloat16"},
        {"tokenization.max_length", "reference.dtype"},
    ),
    "length and seed": ({}, {"max_length": 80, "seed": 3}, {"tokenization.max_length", "pairing.seed"}),
}


@pytest.mark.parametrize(("first", "then", "names"), OPTIONS.values(), ids=OPTIONS.keys())
def test_other_options_are_named_all_at_once(
    first: dict[str, Any], then: dict[str, Any], names: set[str], config: PrecomputeConfig
) -> None:
    run(replace(config, **first))
    before = numbers(config.out)
    assert_refused_then_replaced(replace(config, **then), names)
    assert numbers(config.out) != before


FILES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "weights": (change_weights, {"reference.weights_hash"}),
    "a constant of the model": (
        lambda folder: change_json(folder / "config.json", rms_norm_eps=0.5),
        {"reference.config_hash"},
    ),
    "merges": (lambda folder: put_tokenizer(folder, merges=MERGES[:-1]), {"tokenizer.files_hash"}),
    "a token in front of every text": (lambda folder: put_tokenizer(folder, bos=True), {"tokenizer.files_hash"}),
    "the token that ends a text": (end_elsewhere, {"tokenizer.files_hash"}),
    "chat template": (
        lambda folder: put_tokenizer(folder, chat_template=OTHER_TEMPLATE),
        {"tokenizer.chat_template_hash"},
    ),
    "weights and template": (
        lambda folder: (
            change_weights(folder),
            put_tokenizer(folder, chat_template=OTHER_TEMPLATE),
        ),
        {"reference.weights_hash", "tokenizer.chat_template_hash"},
    ),
}


@pytest.mark.parametrize(("change", "names"), FILES.values(), ids=FILES.keys())
def test_a_model_changed_in_place_is_named(
    change: Callable[[Path], None], names: set[str], config: PrecomputeConfig, model: Path
) -> None:
    run(config)
    before = numbers(config.out)
    change(model)
    assert_refused_then_replaced(config, names)
    assert numbers(config.out) != before


def test_another_rule_of_tokenization_is_named(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    rule = offline_kto.precompute.engines.reference.TOKENIZATION_RULE
    monkeypatch.setattr(offline_kto.precompute.engines.reference, "TOKENIZATION_RULE", rule + 1)
    assert_refused_then_replaced(config, {"tokenization.rule"})


class TestAdapters:
    def test_one_that_is_added_or_taken_away_is_named(self, config: PrecomputeConfig, model: Path) -> None:
        run(config)
        bare = numbers(config.out)
        adapted = replace(config, adapter=lora(model))
        assert_refused_then_replaced(adapted, {"reference.adapter_hash"})
        assert numbers(config.out) != bare
        assert_refused_then_replaced(config, {"reference.adapter_hash"})
        assert numbers(config.out) == bare

    def test_one_that_was_trained_further_under_the_same_path_is_named(
        self, config: PrecomputeConfig, model: Path
    ) -> None:
        adapted = replace(config, adapter=lora(model))
        run(adapted)
        before = numbers(config.out)
        lora(model, seed=2)
        assert_refused_then_replaced(adapted, {"reference.adapter_hash"})
        assert numbers(config.out) != before

    def test_one_that_was_moved_and_renamed_is_the_same(
        self, config: PrecomputeConfig, model: Path, calls: list[int]
    ) -> None:
        adapter = lora(model)
        run(replace(config, adapter=adapter))
        moved = shutil.move(adapter, model.with_name("moved"))
        change_json(Path(moved) / "adapter_config.json", base_model_name_or_path="elsewhere", inference_mode=False)
        calls.clear()
        run(replace(config, adapter=str(moved)))
        assert calls == []

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(
        ("settings", "change"),
        [
            (peft.LoraConfig(r=2, target_modules=["q_proj"]), {"lora_alpha": 32}),
            (peft.LoraConfig(r=2, target_modules=["q_proj"]), {"use_rslora": True}),
            (peft.LoraConfig(r=2, target_modules=["q_proj"]), {"alpha_pattern": {"q_proj": 32}}),
            (peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), {"init_lora_weights": True}),
            (peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]), {"alpha": 16}),
            (peft.LoKrConfig(r=2, alpha=4, target_modules=["q_proj"]), {"alpha": 16}),
            (peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"]), {"coft": True, "eps": 1e-9}),
        ],
        ids=["LoRA alpha", "rsLoRA", "alpha of one layer", "PiSSA", "LoHa alpha", "LoKr alpha", "constrained OFT"],
    )
    def test_every_setting_that_changes_the_merged_weights_counts(
        self, settings: peft.PeftConfig, change: dict[str, Any], config: PrecomputeConfig, model: Path
    ) -> None:
        adapter = save_adapter(model.with_name("adapter"), model, settings)
        config = replace(config, adapter=str(adapter))
        run(config)
        before = numbers(config.out)
        change_json(adapter / "adapter_config.json", **change)
        run(replace(config, out=config.out.with_name("changed")))
        assert numbers(config.out.with_name("changed")) != before
        with pytest.raises(CacheError) as refused:
            run(config)
        assert named(refused) == {"reference.adapter_hash"}

    def test_one_that_lies_in_the_model_folder_is_not_merged_unseen(
        self, config: PrecomputeConfig, model: Path
    ) -> None:
        """Transformers puts it into the model by itself, and no hash covers its settings."""
        other = save_tiny(model.with_name("other"), seed=3)
        save_adapter(model, other, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ModelError, match=r"adapter_config\.json"):
            run(config)


class TestWhatIsLoadedIsWhatIsHashed:
    @pytest.mark.parametrize("name", ["a_backup.safetensors", "model_backup.safetensors", "old.safetensors"])
    def test_a_copy_beside_the_weights_hides_no_change(self, name: str, config: PrecomputeConfig, model: Path) -> None:
        shutil.copy(model / "model.safetensors", model / name)
        run(config)
        change_weights(model)
        run(replace(config, out=config.out.with_name("changed")))
        assert numbers(config.out.with_name("changed")) != numbers(config.out)
        with pytest.raises(CacheError) as refused:
            run(config)
        assert named(refused) == {"reference.weights_hash"}

    def test_a_copy_beside_an_adapter_hides_no_change(self, config: PrecomputeConfig, model: Path) -> None:
        config = replace(config, adapter=lora(model))
        adapter = model.with_name("adapter")
        shutil.copy(adapter / "adapter_model.safetensors", adapter / "old.safetensors")
        run(config)
        lora(model, seed=2)
        with pytest.raises(CacheError) as refused:
            run(config)
        assert named(refused) == {"reference.adapter_hash"}

    def test_shards_that_an_index_does_not_list_hide_no_change(
        self, config: PrecomputeConfig, model: Path, tmp_path: Path
    ) -> None:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
        (model / "model.safetensors").unlink()
        loaded.save_pretrained(tmp_path / "earlier", max_shard_size="4KB")
        loaded.save_pretrained(model, max_shard_size="8KB")
        for shard in (tmp_path / "earlier").glob("*.safetensors"):
            shutil.copy(shard, model)
        run(config)
        before = numbers(config.out)
        index = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))
        for name in set(index["weight_map"].values()):
            change_weights(model, name)
        run(replace(config, out=tmp_path / "changed"))
        assert numbers(tmp_path / "changed") != before
        with pytest.raises(CacheError) as refused:
            run(config)
        assert named(refused) == {"reference.weights_hash"}

    def test_a_file_that_is_not_loaded_changes_nothing(
        self, config: PrecomputeConfig, model: Path, calls: list[int]
    ) -> None:
        run(config)
        save_file({"exponential_average": torch.ones(3)}, model / "ema.safetensors")
        calls.clear()
        run(config)
        assert calls == []

    def test_the_type_that_the_configuration_names_changes_no_score_unseen(
        self, config: PrecomputeConfig, model: Path
    ) -> None:
        """In 16 bits a frozen model is read in the type that its configuration names, whatever its file holds."""
        config = replace(config, dtype="bfloat16")
        run(config)
        before = numbers(config.out)
        change_json(model / "config.json", dtype="bfloat16")
        run(replace(config, out=config.out.with_name("rounded")))
        with contextlib.suppress(CacheError):  # either it is named, or it changes nothing
            run(config)
            assert numbers(config.out.with_name("rounded")) == before

    def test_code_that_comes_with_the_model_counts(
        self, config: PrecomputeConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        code = (
            "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
            "class OurConfig(LlamaConfig):\n    model_type = 'ours'\n\n\n"
            "class OurModel(LlamaForCausalLM):\n    config_class = OurConfig\n\n"
            "    def __init__(self, config):\n        super().__init__(config)\n"
            "        self.model.norm.variance_epsilon = {}\n"
        )
        (model / "ours.py").write_text(code.format(1e-6), encoding="utf-8")
        classes = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModel"}
        change_json(model / "config.json", model_type="ours", auto_map=classes)
        config = replace(config, trust_remote_code=True)
        run(config)
        before = numbers(config.out)
        (model / "ours.py").write_text(code.format(50.0), encoding="utf-8")
        run(replace(config, out=tmp_path / "changed"))
        assert numbers(tmp_path / "changed") != before
        with pytest.raises(CacheError):
            run(config)


class TestQuantised:
    def test_a_setting_of_it_is_named(self, config: PrecomputeConfig, model: Path) -> None:
        """The refusal comes before anything is loaded."""
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
        run(config)
        before = snapshot(config.out)
        change_json(model / "config.json", quantization_config=settings)
        with pytest.raises(CacheError) as refused:
            run(config)
        assert named(refused) == {"reference.config_hash", "reference.quantization"}
        assert snapshot(config.out) == before

    @pytest.mark.filterwarnings("ignore")
    def test_a_model_quantised_in_place_is_named_and_scored_again(self, config: PrecomputeConfig, model: Path) -> None:
        save_tiny(model, hidden_size=64, intermediate_size=128)
        run(config)
        before = numbers(config.out)
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=settings).save_pretrained(model)
        names = {"reference.config_hash", "reference.quantization", "reference.weights_hash"}
        assert_refused_then_replaced(config, names)
        assert numbers(config.out) != before


class TestRevisions:
    """A revision names the weights; the weights decide."""

    @pytest.fixture
    def hub(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Snapshots of a hub model: `first`, `readme` with the same weights, and `trained` with others."""
        snapshots = tmp_path / "hub/models--org--tiny/snapshots"
        for name in ("first", "readme", "trained"):
            shutil.copytree(model, snapshots / name)
        change_weights(snapshots / "trained")

        def find_folder(name: str, *, revision: str | None, what: str = "model") -> tuple[Path, str | None]:
            return snapshots / str(revision), revision

        monkeypatch.setattr(offline_kto.precompute.engines.reference, "find_folder", find_folder)
        return snapshots

    @pytest.fixture
    def config(self, hub: Path, config: PrecomputeConfig) -> PrecomputeConfig:
        return replace(config, model="org/tiny", revision="first")

    def test_another_one_with_the_same_weights_costs_nothing(self, config: PrecomputeConfig, calls: list[int]) -> None:
        run(config)
        calls.clear()
        run(replace(config, revision="readme"))
        assert calls == []
        assert_as_fresh(replace(config, revision="readme"))

    def test_another_one_with_other_weights_is_named(self, config: PrecomputeConfig) -> None:
        run(config)
        before = numbers(config.out)
        assert_refused_then_replaced(replace(config, revision="trained"), {"reference.weights_hash"})
        assert numbers(config.out) != before
        assert read_manifest(config.out).reference["revision"] == "trained"


def in_many_files(folder: Path) -> Path:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def saved_by_others(folder: Path) -> Path:
    put_tokenizer(folder)
    values = {"transformers_version": "4.1", "_name_or_path": "/theirs", "use_cache": False, "architectures": None}
    change_json(folder / "config.json", **values)
    (folder / "README.md").write_text("a model", encoding="utf-8")
    return folder


SAME: dict[str, Callable[[Path], Path]] = {
    "on another path": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "as a snapshot of the hub": lambda folder: shutil.copytree(
        folder, folder.parent / "models--org--tiny/snapshots" / ("0123456789" * 4)
    ),
    "through a link": lambda folder: _link(folder),
    "in many files": in_many_files,
    "saved by other versions": saved_by_others,
}


def _link(folder: Path) -> Path:
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_the_same_model_is_the_same_reference(
    change: Callable[[Path], Path], config: PrecomputeConfig, model: Path, calls: list[int]
) -> None:
    run(config)
    before = snapshot(config.out)
    calls.clear()
    config = replace(config, model=str(change(model)))
    run(config)
    assert calls == []
    assert snapshot(config.out) == before
    assert_as_fresh(config)


def test_a_tokenizer_that_was_called_before_is_the_same(
    config: PrecomputeConfig, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and truncation stay in a tokenizer when it was called with them."""
    run(config)
    load = offline_kto.precompute.engines.tokenizer.load_tokenizer

    def used(*arguments: Any, **options: Any) -> Any:
        tokenizer = load(*arguments, **options)
        tokenizer(["hello", "hello world"], padding="max_length", truncation=True, max_length=3)
        return tokenizer

    monkeypatch.setattr(offline_kto.precompute.engines.tokenizer, "load_tokenizer", used)
    calls.clear()
    run(config)
    assert calls == []
    assert_as_fresh(config)


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same_cache(config: PrecomputeConfig, tmp_path: Path) -> None:
    run(config)
    command = [
        sys.executable,
        "-c",
        "from offline_kto.precompute.cli import precompute; precompute()",
        "--model",
        config.model,
    ]
    command += ["--data", config.data, "--max-length", "256", "--chat", config.chat]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "other")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mine, other = read_manifest(config.out), read_manifest(tmp_path / "other")
    assert mine.fingerprint == other.fingerprint
    assert mine.data["labels_hash"] == other.data["labels_hash"]
    names = ("row_id", "prompt_id", "pair_id", "source", "label", "kl_completion_ids")
    for one, two in zip(scored(config.out), scored(tmp_path / "other"), strict=True):
        assert [one[name] for name in names] == [two[name] for name in names]


class TestHashingWeights:
    """Gigabytes are read once by stage 1, and never by stage 2."""

    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The folders that were hashed, by whomever."""
        folders: list[Path] = []

        def noting(folder: Path, **options: Any) -> str:
            folders.append(folder)
            return weights_hash(folder, **options)

        for module in list(sys.modules.values()):
            package = getattr(module, "__name__", "").split(".")[0]
            if package == "offline_kto" and hasattr(module, "weights_hash"):
                monkeypatch.setattr(module, "weights_hash", noting)
        return folders

    def test_precompute_hashes_once(self, config: PrecomputeConfig, model: Path, hashed: list[Path]) -> None:
        run(config)
        assert hashed == [model]
        run(config)
        assert hashed == [model, model]

    def test_precompute_hashes_model_and_adapter_once(
        self, config: PrecomputeConfig, model: Path, hashed: list[Path]
    ) -> None:
        adapter = lora(model)
        run(replace(config, adapter=adapter))
        assert sorted(hashed) == sorted([model, Path(adapter)])

    def test_training_and_resuming_never_hash_the_model(
        self, config: PrecomputeConfig, model: Path, tmp_path: Path, hashed: list[Path]
    ) -> None:
        run(config)
        hashed.clear()
        options = TrainConfig(cache=config.out, out=tmp_path / "run", batch_size=4, save_steps=1, device="cpu")
        train(replace(options, max_steps=1))
        assert hashed == []
        train(replace(options, max_steps=2, resume=True))
        assert model not in hashed
