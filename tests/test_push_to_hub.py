"""`--push-to-hub` against a hub on this machine, which huggingface_hub talks to as to the real one."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from click.testing import CliRunner
from fake_hub import TOKEN, FakeHub, serving
from huggingface_hub import ModelCard

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.train.cli import train as command
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import _find_repository, train
from offline_kto.train.run_files import config_text
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that this process is logged in to."""
    with serving() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    out = tmp_path / "run one"
    return TrainConfig(
        cache=cache,
        out=out,
        max_steps=1,
        batch_size=8,
        save_steps=0,
        device="cpu",
        eval_fraction=0.3,
        push_to_hub="tiny",
    )


def local_words(config: TrainConfig, base: Path, feedback: Path) -> list[bytes]:
    """Texts that may not leave this machine: folders, and what users wrote."""
    rows = [json.loads(line) for line in feedback.read_text().splitlines()]
    texts = {message["content"] for row in rows for message in row["prompt"] if len(message["content"]) > 12}
    assert texts
    folders = [base.parent, config.cache, Path(str(config.out)).parent, Path.home(), Path.cwd()]
    return [str(one).encode() for one in (*folders, *texts)]


class TestUpload:
    def test_of_a_model(
        self,
        hub: FakeHub,
        config: TrainConfig,
        base: Path,
        feedback: Path,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        out = train(config)
        [(name, summary, added, deleted)] = hub.commits
        assert (name, summary, deleted) == ("me/tiny", "Upload run one", [])
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.html"} <= {*added}
        assert not {"config.yaml", "run.json", "rewards.parquet", "metrics.jsonl", "evaluation.json"} & {*added}
        assert not [path for path in added if path.endswith((".bin", ".pt", ".pth")) or "/" in path]
        for path, content in hub.repositories["me/tiny"].items():
            for word in local_words(config, base, feedback):
                assert word not in content, (path, word)
        assert not (out / "hub").exists()
        said = capsys.readouterr().out
        assert (
            "hub         me/tiny (will be created): model, tokenizer, model card and report; no feedback text" in said
        )
        assert "hub         created me/tiny (public)" in said
        assert f"uploaded    {hub.address}/me/tiny" in said
        for path, content in hub.repositories["me/tiny"].items():
            (tmp_path / "downloaded").mkdir(exist_ok=True)
            (tmp_path / "downloaded" / path).write_bytes(content)
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "downloaded")
        card = ModelCard.load(tmp_path / "downloaded/README.md")
        assert "name = 'me/tiny'" in card.text
        assert "push_to_hub: tiny" in config_text(config)  # so that --resume uploads as well

    def test_of_adapters(self, hub: FakeHub, config: TrainConfig, base: Path, feedback: Path) -> None:
        hub.repositories["me/tiny"] = {
            "model.safetensors": b"old",
            "notes.txt": b"mine",
            "old/model.safetensors": b"other",
        }
        hub.private.add("me/tiny")
        out = train(replace(config, lora_rank=2, max_steps=2, save_steps=1))
        [(_, _, added, deleted)] = hub.commits
        assert deleted == ["model.safetensors"]  # it would be loaded in place of the adapters' base
        assert {"notes.txt", "old/model.safetensors"} <= {*hub.repositories["me/tiny"]}
        assert "adapter_model.safetensors" in added
        for path, content in hub.repositories["me/tiny"].items():
            for word in local_words(config, base, feedback):
                assert word not in content, (path, word)
        uploaded = json.loads(hub.repositories["me/tiny"]["adapter_config.json"])
        kept = json.loads((out / "adapter_config.json").read_text())
        assert uploaded == {**kept, "base_model_name_or_path": base.name}
        assert kept["base_model_name_or_path"] == str(base)
        assert "POST /api/repos/create" not in hub.requests

    def test_that_fails_keeps_the_run_and_says_how_to_finish(
        self, hub: FakeHub, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.repositories["me/tiny"] = {"adapter_config.json": b"{}"}
        hub.fails["POST", "/commit/main"] = 500
        with pytest.raises(
            TrainingError, match=r"the run is complete, but it could not be uploaded to me/tiny: .*500"
        ) as error:
            train(config)
        out = Path(str(config.out))
        assert {"model.safetensors", "README.md", "report.html", "evaluation.json"} <= {
            path.name for path in out.iterdir()
        }
        assert hub.commits == []
        hub.fails.clear()
        words = shlex.split(str(error.value).rpartition("To finish the upload: ")[2])
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(out / "home")}
        done = subprocess.run(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=Path.cwd(),
        )
        assert done.returncode == 0, done.stderr
        expected = {path.name for path in (out / "hub").iterdir()}
        assert {*hub.repositories["me/tiny"]} == expected

    def test_that_fails_is_one_message_of_the_command(self, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
        hub.fails["POST", "/commit/main"] = 401
        words = f"--cache {cache} --max-steps 1 --batch-size 8 --save-steps 0 --device cpu --push-to-hub tiny"
        done = CliRunner().invoke(command, [*words.split(), "--out", str(tmp_path / "run")])
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)  # no traceback
        [error] = [line for line in done.output.splitlines() if line.startswith("Error: ")]
        assert f"{tmp_path / 'run'}: the run is complete" in error
        assert error.endswith(f"hf upload me/tiny {tmp_path / 'run/hub'} .")

    def test_starts_again_with_resume(self, hub: FakeHub, config: TrainConfig) -> None:
        config = replace(config, save_steps=1)
        hub.fails["POST", "/commit/main"] = 403
        with pytest.raises(TrainingError, match="could not be uploaded"):
            train(config)
        hub.fails.clear()
        out = train(replace(config, resume=True))
        assert [commit[0] for commit in hub.commits] == ["me/tiny"]
        train(replace(config, evaluate_only=out))
        assert len(hub.commits) == 1  # an evaluation uploads nothing


class TestRefusal:
    """Before anything is trained or written."""

    @pytest.fixture(autouse=True)
    def nothing_done(self, hub: FakeHub, config: TrainConfig) -> Iterator[None]:
        yield
        assert hub.written == []
        assert not Path(str(config.out)).exists()

    @pytest.mark.parametrize("name", ["a/b/c", "./runs/x", "me/", "me/na me", "-x", "https://huggingface.co/me/x", ""])
    def test_of_a_name(self, config: TrainConfig, name: str) -> None:
        with pytest.raises(ConfigError, match="the hub has no such names"):
            train(replace(config, push_to_hub=name))

    def test_without_a_token(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(ConfigError, match=r"no token of the hub was found. Run hf auth login"):
            train(config)

    def test_of_a_token_that_is_not_valid(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        with pytest.raises(
            ConfigError, match=r"--push-to-hub tiny: the hub refuses, or cannot be reached: .*Invalid user token"
        ):
            train(config)

    def test_of_a_token_that_only_reads(self, hub: FakeHub, config: TrainConfig) -> None:
        hub.role = "read"
        with pytest.raises(ConfigError, match="the token can only read"):
            train(config)

    def test_of_a_repository_that_may_not_be_written(self, hub: FakeHub, config: TrainConfig) -> None:
        hub.repositories["org/theirs"] = {}
        hub.locked.add("org/theirs")
        with pytest.raises(ConfigError, match=r"--push-to-hub org/theirs: the hub refuses.*403"):
            train(replace(config, push_to_hub="org/theirs"))

    def test_offline(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids requests"):
            train(config)

    def test_by_a_hub_out_of_order(self, hub: FakeHub, config: TrainConfig) -> None:
        hub.fails["GET", "/api/whoami-v2"] = 500
        with pytest.raises(ConfigError, match=r"the hub refuses, or cannot be reached: .*500"):
            train(config)

    def test_is_one_message_of_the_command(self, config: TrainConfig, cache: Path) -> None:
        done = CliRunner().invoke(
            command, ["--cache", str(cache), "--out", str(config.out), "--push-to-hub", "a/b/c"], standalone_mode=True
        )
        assert done.exit_code == 1
        assert "Error: --push-to-hub a/b/c: the hub has no such names." in done.output

    def test_a_dry_run_writes_nothing_there(self, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
        train(replace(config, dry_run=True))
        assert "hub         me/tiny (will be created)" in capsys.readouterr().out


def test_a_namespace_that_is_not_the_users_is_refused_before_training(hub: FakeHub, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"--push-to-hub org/new: the hub refuses.*403"):
        train(replace(config, push_to_hub="org/new"))
    assert hub.repositories == {}
    assert not Path(str(config.out)).exists()


def test_only_the_first_rank_uploads(hub: FakeHub, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert _find_repository(config) is None
    assert hub.requests == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    found = _find_repository(config)
    assert found is not None
    assert found.name == "me/tiny"


def test_the_token_of_the_training_table_is_used(
    hub: FakeHub, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    found = _find_repository(replace(config, training={"hub_token": TOKEN}))
    assert found is not None
    found.create()
    assert [*hub.repositories] == ["me/tiny"]


@pytest.mark.parametrize("table", [{"train": {"push_to_hub": "x"}}, {"space": {"push-to-hub": ["x", "y"]}}])
def test_a_sweep_uploads_nothing(table: dict[str, object], cache: Path) -> None:
    settings = {"space": {"beta": [0.1, 0.2]}, **table}
    with pytest.raises(ConfigError, match=r"'push_to_hub'.*: trials are not uploaded"):
        Trials.of(SweepConfig(cache=cache, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"])
def test_the_trainers_own_upload_is_refused(key: str, cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=cache, out=tmp_path / "run", device="cpu", training={key: True})
    with pytest.raises(ConfigError, match=f"training: {key} .*--push-to-hub|training: {key} .*hf repos create"):
        train(config)
