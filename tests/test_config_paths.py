"""Paths in a config file: relative to its folder, in every command."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.options import resolve
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.train.config import TrainConfig
from offline_kto.train.run_files import config_text
from offline_kto.train.sweep.config import SweepConfig


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with configs/ in it; commands start in its folder."""
    project = tmp_path / "project"
    for folder in ("configs/refs", "refs", "model", "configs/own/model"):
        (project / folder).mkdir(parents=True)
    (project / "configs/feedback.jsonl").touch()
    monkeypatch.chdir(project)
    return project


def read(config: type, values: dict[str, Any], **command_line: Any) -> Any:
    path = Path("configs/my.yaml")
    path.write_text(yaml.safe_dump(values))
    return resolve(config, command_line, yaml_path=path)


def test_they_are_relative_to_the_file(project: Path) -> None:
    values = {"model": "own/model", "data": "feedback.jsonl", "out": "refs", "left_out": "../left.jsonl"}
    config = read(PrecomputeConfig, values)
    assert config.model == str(project / "configs/own/model")
    assert config.data == str(project / "configs/feedback.jsonl")
    assert config.out == project / "configs/refs"
    assert config.left_out == project / "left.jsonl"  # not there yet
    found = read(TrainConfig, {"cache": "../refs", "eval_cache": "refs", "model": "../model"})
    assert (found.cache, found.eval_cache) == (project / "refs", project / "configs/refs")
    assert found.model == str(project / "model")


def test_a_dot_is_the_folder_of_the_file(project: Path) -> None:
    config = read(PrecomputeConfig, {"out": ".", "model": "./nowhere"})
    assert (config.out, config.model) == (project / "configs", str(project / "configs/nowhere"))


def test_also_in_the_tables_of_a_sweep(project: Path) -> None:
    space = {"model": ["own/model", "org/name"], "beta": [0.1]}
    config = read(SweepConfig, {"cache": "refs", "space": space, "train": {"eval-cache": "../refs", "beta": 0.1}})
    assert config.cache == project / "configs/refs"
    assert config.space == {"model": [str(project / "configs/own/model"), "org/name"], "beta": [0.1]}
    assert config.train == {"eval-cache": str(project / "refs"), "beta": 0.1}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("out", text) for text in ("/elsewhere/refs", "s3://bucket/refs")),
        *(("model", text) for text in ("org/name", "gpt2", "~/models/tiny", "/models/tiny")),
        ("data", "org/dataset"),
        ("map", "argilla"),
        ("map", "own"),  # a folder, but a name without a suffix is never a file's
    ],
)
def test_names_urls_and_absolute_paths_stay(name: str, value: str) -> None:
    assert str(getattr(read(PrecomputeConfig, {name: value}), name)) == value


@pytest.mark.parametrize(
    ("config", "name", "value", "advice"),
    [
        (TrainConfig, "eval_cache", "model", "../model"),
        (TrainConfig, "model", "model", "../model"),
        (PrecomputeConfig, "data", "configs/feedback.jsonl", "feedback.jsonl"),
        (SweepConfig, "train", {"eval_cache": "model"}, "../model"),
    ],
)
def test_a_path_from_the_current_folder_is_refused_with_what_to_write(
    project: Path, config: type, name: str, value: Any, advice: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(config, {name: value})
    assert f"Write {advice}, or an absolute path." in str(caught.value)
    assert "configs/my.yaml: " in str(caught.value)
    assert str(project / "configs") in str(caught.value)
    assert getattr(read(config, {name: value}, **{name: {} if name == "train" else "x"}), name) is not None


def test_the_command_line_is_relative_to_the_current_folder(project: Path) -> None:
    config = read(TrainConfig, {"cache": "nowhere"}, cache="refs", model="model")
    assert (config.cache, config.model) == (Path("refs"), "model")
    # What the run records can be read from its own folder.
    written = yaml.safe_load(config_text(config))
    assert (written["cache"], written["model"]) == (str(project / "refs"), str(project / "model"))
    assert yaml.safe_load(config_text(TrainConfig(model="org/name", cache="s3://b/refs")))["model"] == "org/name"


def test_a_linked_folder_is_left_by_its_own_parent(project: Path) -> None:
    (project / "elsewhere").symlink_to(project / "configs/own")
    (project / "elsewhere/my.yaml").write_text("cache: ../refs\n")
    assert resolve(TrainConfig, {}, yaml_path=Path("elsewhere/my.yaml")).cache == project / "configs/refs"


@pytest.mark.usefixtures("project")
def test_scoring_reads_its_options_as_training_does() -> None:
    values = {"model": "org/name", "data": "org/feedback", "max-length": 512, "kl_partners": 2}
    config = read(PrecomputeConfig, values, max_length=256)
    assert (config.max_length, config.kl_partners, config.dtype) == (256, 2, "auto")  # command line, YAML, default
    with pytest.raises(ConfigError, match=r"my\.yaml: unknown key 'max_lenght'\. Did you mean 'max_length'\?"):
        read(PrecomputeConfig, {"max_lenght": 512})
