"""What `--resume` takes up, and what it refuses: folders of others, damaged checkpoints, another optimizer or model."""

import dataclasses
import hashlib
import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
import transformers
from models import save_tiny
from safetensors.torch import load_file, save_file

import offline_kto
import offline_kto.train.data.cache_rows
from offline_kto.kto_core.errors import CacheError, ConfigError, KTOError, TrainingError
from offline_kto.kto_core.options import as_plain
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.run.arguments import _OURS
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.resumed_options import (
    FIXED,
    FREE,
    LOGGED,
    TRAINING_FREE,
    TRAINING_LOGGED,
    compare_options,
    compare_records,
)
from offline_kto.train.run.train_run import train as run_training
from offline_kto.train.run_files import begun_with
from offline_kto.train.trainer.checkpoints import check_checkpoint

TRAIN = "from offline_kto.train.cli import train; train()"


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=1, device="cpu"
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestFolders:
    @pytest.mark.parametrize("kind", ["a model", "a cache", "a thesis"])
    def test_what_is_no_run_is_left_alone(self, config: TrainConfig, tmp_path: Path, cache: Path, kind: str) -> None:
        out = tmp_path / "taken"
        if kind == "a model":
            save_tiny(out)
        elif kind == "a cache":
            shutil.copytree(cache, out)
        else:
            (out / "_unfinished").mkdir(parents=True)
            for name in ("_unfinished/thesis", ".notes.tmp", "config.yaml", "metrics.jsonl"):
                (out / name).write_text("mine")
        before = files_in(out)
        with pytest.raises(ConfigError, match="so it is not a kto-train run"):
            run_training(replace(config, out=out, resume=True))
        assert files_in(out) == before

    def test_a_finished_run_of_another_cache_is_left_alone(
        self, config: TrainConfig, tmp_path: Path, base: Path, feedback: Path
    ) -> None:
        out = run_training(replace(config, save_steps=0))
        before = files_in(out)
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "other", limit=12))
        with pytest.raises(ConfigError, match="started with another cache"):
            run_training(replace(config, save_steps=0, cache=tmp_path / "other", resume=True))
        assert files_in(out) == before

    @pytest.mark.parametrize("out", ["s3://bucket/run", "file:///tmp/run"])
    def test_a_run_is_not_written_to_a_url(
        self, config: TrainConfig, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="local folder"):
            run_training(replace(config, out=Path(out)))
        assert not list(tmp_path.glob("*:*"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path: Path, content: bytes) -> None:
    """Replace what is in a file, and say on record that this is what was written, as older versions did."""
    sizes = path.parent / "sizes.json"
    path.write_bytes(content)
    found = json.loads(sizes.read_text())
    sizes.write_text(json.dumps({name: (path.parent / name).stat().st_size for name in found}))


def flip(path: Path, at: float) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x40
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no schedule": (lambda run: (run / "checkpoint-2/scheduler.pt").unlink(), "scheduler.pt"),
    "half an optimizer": (lambda run: cut(run / "checkpoint-2/optimizer.pt"), "optimizer.pt has"),
    "half a random state": (lambda run: cut(run / "checkpoint-2/rng_state.pth"), "rng_state.pth has"),
    "half a configuration": (lambda run: cut(run / "checkpoint-2/config.json"), "config.json has"),
    "no state": (lambda run: (run / "checkpoint-2/trainer_state.json").write_text("[]"), "trainer_state.json has"),
    "no sizes": (lambda run: (run / "checkpoint-2/sizes.json").unlink(), "sizes.json"),
    "sizes of nothing": (lambda run: (run / "checkpoint-2/sizes.json").write_text("[]"), "incomplete checkpoint"),
    "empty record": (lambda run: (run / "run.json").write_text(""), "the settings of the run are unknown"),
    "record of another kind": (
        lambda run: (run / "run.json").write_text("[]"),
        "another cache|the settings of the run are unknown",
    ),
    "another model's weights": (
        lambda run: (run / "checkpoint-2/pytorch_model.bin").write_bytes(b""),
        "pytorch_model.bin was not written with it",
    ),
    "a deep state": (
        lambda run: rewrite(run / "checkpoint-2/trainer_state.json", b"[" * 100_000),
        "trainer_state.json",
    ),
    "deep sizes": (lambda run: (run / "checkpoint-2/sizes.json").write_text("[" * 100_000), "incomplete checkpoint"),
    "sizes of no file": (
        lambda run: (run / "checkpoint-2/sizes.json").write_text('{"a": {"bytes": "x"}}'),
        "has no size of a",
    ),
    "sizes of another folder": (
        lambda run: (run / "checkpoint-2/sizes.json").write_text('{"../run.json": 5}'),
        "not in this folder",
    ),
    "deep record": (lambda run: (run / "run.json").write_text("[" * 100_000), "the settings of the run are unknown"),
    "options that are no text": (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml"),
    "no options": (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, base: Path, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    return run_training(
        TrainConfig(cache=cache, out=out, batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=1, device="cpu")
    )


class TestCheckpoints:
    @pytest.fixture
    def run(self, stopped: Path, config: TrainConfig) -> Path:
        return Path(shutil.copytree(stopped, config.out or ""))

    @pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
    def test_a_damaged_one_is_named(
        self, run: Path, config: TrainConfig, damage: Callable[[Path], object], reason: str
    ) -> None:
        damage(run)
        before = files_in(run)
        with pytest.raises(ConfigError, match=reason):
            run_training(replace(config, max_steps=3, resume=True))
        assert files_in(run) == before

    def test_what_stands_in_its_records_cannot_stop_it(self, run: Path, config: TrainConfig) -> None:
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b'\xff{"step"\n')
        run_training(replace(config, max_steps=3, resume=True))
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 3]

    def test_a_flipped_bit_in_any_file_is_found(self, run: Path) -> None:
        names = [path.name for path in (run / "checkpoint-2").iterdir() if path.name != "sizes.json"]
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"} < {*names}
        for name in names:
            for at in (0.0, 0.37, 0.93):
                copy = Path(shutil.copytree(run / "checkpoint-2", run.with_name(f"{name}{at}") / "checkpoint-2"))
                flip(copy / name, at)
                with pytest.raises(ConfigError, match=f"{name} changed since it was written"):
                    check_checkpoint(copy)

    def test_its_files_are_on_record_by_their_sha256(self, run: Path) -> None:
        files = json.loads((run / "checkpoint-2/sizes.json").read_text())
        for name, content in files_in(run / "checkpoint-2").items():
            if name != "sizes.json":
                assert files.pop(name) == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert files == {}

    def test_one_of_an_older_version_goes_on(self, run: Path, config: TrainConfig) -> None:
        """It has sizes alone."""
        state = run / "checkpoint-2/trainer_state.json"
        rewrite(state, state.read_bytes())
        assert json.loads((run / "checkpoint-2/sizes.json").read_text())["config.json"] > 0
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(
            json.dumps({k: v for k, v in record.items() if k not in ("held_out_cache", "versions")})
        )
        run_training(replace(config, max_steps=3, resume=True))
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 3]

    @pytest.mark.parametrize(
        ("name", "value"),
        [("global_step", 2.0), ("best_metric", "nan"), ("log_history", "x"), ("train_batch_size", None)],
    )
    def test_a_state_of_other_kinds_is_named(self, run: Path, name: str, value: object) -> None:
        path = run / "checkpoint-2/trainer_state.json"
        rewrite(path, json.dumps({**json.loads(path.read_text()), name: value}).encode())
        with pytest.raises(ConfigError, match=f"trainer_state.json is not a state of a Trainer: {name} is "):
            check_checkpoint(path.parent)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            *(
                (name, what)
                for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
                for what in ("noise", "a list")
            ),
            ("optimizer.pt", "a flipped bit"),  # in the values; others are mostly padding
        ],
    )
    def test_without_hashes_a_damaged_file_is_still_named(
        self, run: Path, config: TrainConfig, name: str, content: str
    ) -> None:
        path = run / "checkpoint-2" / name
        old = path.read_bytes()
        if content == "a flipped bit":
            flip(path, 0.5)
        elif content == "a list":
            torch.save([1, 2], path)
        rewrite(path, b"\x80" * len(old) if content == "noise" else path.read_bytes())
        with pytest.raises((ConfigError, TrainingError), match=f"checkpoint-2: .*{name}") as caught:
            run_training(replace(config, max_steps=3, resume=True))
        assert "weights_only" not in str(caught.value)

    def test_metrics_that_are_no_numbers_are_left_out(self, run: Path, config: TrainConfig) -> None:
        lines = ['{"step": 1, "loss": "x"}', '{"step": true}', '{"step": 2, "kl": {"a": 1}}', "[" * 100_000]
        lines += ['{"step": 2, "loss": 1' + "0" * 400 + "}", '{"step": ' + "9" * 5000 + "}", "\x00" * 50]
        with (run / "metrics.jsonl").open("a") as file:
            file.write("\n".join(lines) + "\n")
        run_training(replace(config, max_steps=3, resume=True))
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 3]

    @pytest.mark.usefixtures("run")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"training": {"optim": "sgd"}}, "another optimizer"),
            ({"training": {"adam_beta1": 0.5}}, "another optimizer"),
            ({"training": {"max_grad_norm": 0.5}}, "max_grad_norm: 1.0, not 0.5"),
            ({"model": "elsewhere"}, "--model None"),
            ({"dtype": "bfloat16"}, r"in another precision \(float32, now bfloat16\). Pass --dtype float32"),
        ],
    )
    def test_it_goes_on_with_the_same_model_and_optimizer(
        self, config: TrainConfig, base: Path, options: dict[str, object], reason: str, tmp_path: Path
    ) -> None:
        if "model" in options:
            options = {"model": str(shutil.copytree(base, tmp_path / "elsewhere"))}
        with pytest.raises(ConfigError, match=reason):
            run_training(replace(config, max_steps=3, resume=True, **options))  # type: ignore[arg-type]

    def test_the_model_below_adapters_is_still_the_reference(
        self, config: TrainConfig, base: Path, feedback: Path, tmp_path: Path
    ) -> None:
        """Only adapters are in the checkpoint and in the run; the rest is read from the model's folder again."""
        model = Path(shutil.copytree(base, tmp_path / "model"))
        precompute(PrecomputeConfig(model=str(model), data=str(feedback), out=tmp_path / "refs", max_length=256))
        config = replace(config, cache=tmp_path / "refs", lora_rank=2, eval_fraction=0.3)
        run = run_training(config)
        shutil.rmtree(model)
        shutil.copytree(base, model)
        run_training(replace(config, max_steps=3, resume=True))
        weights = load_file(model / "model.safetensors")
        save_file(
            {name: weight * 1.05 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(TrainingError, match="not the model that the cache was scored with"):
            run_training(replace(config, max_steps=4, resume=True))
        with pytest.raises(TrainingError, match="not the model that the cache was scored with"):
            evaluate_run(replace(config, evaluate_only=run))

    def test_one_without_optimizer_state_is_refused(
        self, config: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = replace(config, training={"save_only_model": True})
        run_training(config)
        assert "save_only_model" in capsys.readouterr().out.split("warning")[1]
        with pytest.raises(ConfigError, match="contains no optimizer state"):
            run_training(replace(config, max_steps=3, resume=True))


class TestOptionsOfTheFolder:
    """`--resume` needs only `--out`: the options of the run are in its config.yaml."""

    @pytest.fixture(scope="class")
    def begun(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Two updates of a run. Do not write to it."""
        out = tmp_path_factory.mktemp("begun") / "run"
        settings = {"training": {"max_grad_norm": 0.5}, "lora_rank": 2, "eval_fraction": 0.3, "metric": "eval/accuracy"}
        return run_training(
            TrainConfig(cache=cache, out=out, batch_size=8, max_steps=2, save_steps=1, device="cpu", seed=3, **settings)  # type: ignore[arg-type]
        )

    @pytest.fixture
    def run(self, begun: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(begun, tmp_path / "run"))

    @pytest.mark.usefixtures("cache")
    def test_it_needs_only_the_folder(self, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        before = read_yaml(run / "config.yaml")
        found = offline_kto.train(out="run", resume=True, max_steps=3)
        assert [record["step"] for record in found.records if "loss" in record] == [1, 2, 3]
        assert read_yaml(run / "config.yaml") == {**before, "max_steps": 3}

    def test_from_the_command_line(self, run: Path, tmp_path: Path) -> None:
        done = forks.Fork(TRAIN, "--resume", "--out", run, "--max-steps", 3).wait(100)
        assert (done.returncode, done.stderr) == (0, "")
        assert "resume      --max-steps is 3, was 2" in done.stdout
        lost = forks.Fork(TRAIN, "--resume", "--out", tmp_path / "nothing").wait(100)
        assert lost.returncode == 2
        assert "Missing option '--cache'. No run has begun in" in lost.stderr
        assert not (tmp_path / "nothing").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"learning_rate": 1e-4}, "--learning-rate 2e-05, not 0.0001"),
            ({"lora_rank": 4}, "--lora-rank 2, not 4"),
            ({"training": {"max_grad_norm": 1.0}}, "max_grad_norm: 0.5, not 1.0"),
            ({"model": "org/other"}, "org/other"),
        ],
    )
    def test_a_contradiction_is_named(self, run: Path, change: dict[str, object], message: str) -> None:
        before = files_in(run)
        with pytest.raises(KTOError, match=re.escape(message)):
            offline_kto.train(out=run, resume=True, dry_run=True, **change)
        assert files_in(run) == before

    def test_a_folder_cannot_ask_for_its_code_to_be_run(self, run: Path) -> None:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
        with pytest.raises(ConfigError, match="started with --trust-remote-code True, not False"):
            offline_kto.train(out=run, resume=True, dry_run=True)

    def test_a_config_beside_no_run_is_not_read(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "config.yaml").write_text("beta: 0.3\n")
        assert begun_with({"resume": True, "out": tmp_path}) is None
        with pytest.raises(ConfigError, match="so it is not a kto-train run"):
            offline_kto.train(cache, out=tmp_path, resume=True, dry_run=True)


class TestOptions:
    """Each is fixed, said or free when a run is resumed; a new one has to be sorted in."""

    def test_every_option_is_sorted(self) -> None:
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        assert names == FIXED | LOGGED | FREE
        assert not FIXED & LOGGED
        assert not FREE & (FIXED | LOGGED)

    def test_every_key_of_the_training_table_is_sorted(self) -> None:
        known = {*transformers.TrainingArguments.__dataclass_fields__}
        assert not TRAINING_LOGGED & TRAINING_FREE
        assert not (TRAINING_LOGGED | TRAINING_FREE) & _OURS.keys()
        fixed = known - TRAINING_LOGGED - TRAINING_FREE - _OURS.keys()
        assert fixed == {
            *("adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "optim_target_modules"),
            *("max_grad_norm", "lr_scheduler_kwargs", "neftune_noise_alpha", "label_smoothing_factor", "tf32"),
            *("data_seed", "ignore_data_skip", "train_sampling_strategy", "average_tokens_across_devices"),
            *("bf16_full_eval", "fp16_full_eval", "restore_callback_states_from_checkpoint"),
        }

    @pytest.mark.parametrize(
        ("before", "now", "outcome"),
        [
            ({"lora_rank": 4, "lora_alpha": 8.0}, {"lora_rank": 4, "lora_alpha": 64.0}, "--lora-alpha 8.0, not 64.0"),
            ({"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 8.0}, []),
            ({}, {"weight_decay": 0.1}, "--weight-decay 0.0, not 0.1"),
            ({"learning_rate": 2e-5}, {}, "--learning-rate 2e-05, not 1e-06"),
            ({}, {"seed": 3}, "--seed 0, not 3"),
            ({"eval_seed": 0}, {}, []),
            ({}, {"scheduler": "cosine"}, "--scheduler constant, not cosine"),
            ({}, {"training": {"max_grad_norm": 1.0}}, []),
            ({}, {"training": {"optim_args": "a=1"}}, "optim_args: None, not a=1"),
            ({}, {"training": {"lr_scheduler_kwargs": {"power": 2}}}, "lr_scheduler_kwargs"),
            ({}, {"training": {"save_total_limit": 5, "ddp_timeout": 9}}, []),
            ({}, {"training": {"eval_on_start": True}}, ["training: eval_on_start is True, was False"]),
            ({}, {"max_tokens": 64, "save_steps": 7, "gradient_checkpointing": True}, []),
            ({}, {"beta": 0.2}, ["--beta is 0.2, was 0.1"]),
            ({}, {"save_dtype": "bfloat16"}, ["--save-dtype is bfloat16, was auto"]),
        ],
    )
    def test_a_change_is_refused_said_or_nothing(
        self, before: dict[str, object], now: dict[str, object], outcome: str | list[str]
    ) -> None:
        started = {k: v for k, v in as_plain(TrainConfig(**before)).items() if k in before}  # type: ignore[arg-type]
        config = TrainConfig(**now)  # type: ignore[arg-type]
        if isinstance(outcome, list):
            assert compare_options(config, started, Path("run")) == outcome
            return
        with pytest.raises(ConfigError, match=re.escape(outcome)):
            compare_options(config, started, Path("run"))

    @pytest.mark.parametrize("wrong", [{"training": [1]}, {"lora_rank": "x"}, {"seed": {"a": 1}}, {"model": [2]}])
    def test_values_that_no_run_has_are_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match="--resume run"):
            compare_options(TrainConfig(), wrong, Path("run"))

    def test_what_computes_is_compared(self) -> None:
        now = {"precision": "float32", "held_out_cache": None, "versions": {"torch": "2"}}
        assert compare_records(now, {**now, "versions": {"torch": "1"}}, Path()) == ["torch is 2, was 1"]
        assert compare_records(now, {}, Path()) == []
        with pytest.raises(ConfigError, match="other held-out rows"):
            compare_records(now, {**now, "held_out_cache": {"fingerprint": "a"}}, Path())


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}),
        ({"early_stopping": True}, {"early_stopping": None}),
    ],
)
def test_settings_of_sampling_that_contradict_themselves_do_not_lose_a_run(
    config: TrainConfig, tmp_path: Path, feedback: Path, settings: dict[str, object], saved: dict[str, object]
) -> None:
    """Published models come with them; `transformers` loads but does not save them."""
    base = save_tiny(tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
    out = run_training(replace(config, cache=tmp_path / "refs"))
    found = transformers.GenerationConfig.from_pretrained(out).to_diff_dict()
    assert {name: found.get(name) for name in saved} == saved


class TestManyShards:
    def test_more_shards_than_files_may_be_open(self, base: Path, feedback: Path, tmp_path: Path) -> None:
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", rows_per_shard=1))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 16, hard))
        try:
            assert len(CacheRows(tmp_path / "refs")) == 20
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_a_system_that_does_not_allow_them(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("offline_kto.train.data.verified_file.resource.getrlimit", lambda _: (64, 64))
        with pytest.raises(CacheError, match="allows 64 open files"):
            CacheRows(cache)


def test_a_finished_run_is_not_relabelled(config: TrainConfig) -> None:
    """With updates left a new beta is logged; without, the records would name one that made no update."""
    run = run_training(replace(config, max_steps=2, save_steps=2, beta=0.1))
    before = files_in(run)
    with pytest.raises(ConfigError, match=r"started with --beta 0.1, not 0.3. All its updates are made."):
        run_training(replace(config, out=run, max_steps=2, save_steps=2, beta=0.3, resume=True))
    assert files_in(run) == before
    run_training(replace(config, out=run, max_steps=3, save_steps=2, beta=0.3, resume=True))
    assert read_yaml(run / "config.yaml")["beta"] == 0.3
