"""Where the reference of a cache is found again: folders by their absolute path, models of the hub on the hub."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from models import save_tiny

from offline_kto.kto_core.cache.manifest import Manifest, checksum, read_manifest
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.folders import find_reference
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.inspect_cache import head
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.run.train_run import train


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.fixture
def home(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model in `org/tiny`, which could be a name on the hub."""
    home = tmp_path / "home"
    shutil.copytree(base, home / "org" / "tiny")
    monkeypatch.chdir(home)
    return home


def scored(home: Path, feedback: Path, model: str, **options: Any) -> Manifest:
    precompute(PrecomputeConfig(model=model, data=str(feedback), out=home / "refs", limit=8, **options))
    return read_manifest(home / "refs")


def found(home: Path, manifest: Manifest) -> Path:
    return PolicyFiles.find(TrainConfig(cache=home / "refs"), manifest).folder


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("model", ["org/tiny", "./org/tiny", "../home/org/tiny/", "tiny"])
def test_a_relative_folder_is_found_from_anywhere(
    home: Path, feedback: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home / "org" if model == "tiny" else home)
    manifest = scored(home, feedback, model)
    assert manifest.reference["id"] == model
    assert Path(manifest.reference["path"]).is_absolute()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if not model.startswith(".."):
        save_tiny(elsewhere / model, seed=5)  # a folder of the same name, which is another model
    monkeypatch.chdir(elsewhere)
    assert found(home, manifest).resolve() == home / "org" / "tiny"
    print(*head(home / "refs", rows=1, model=None), sep="\n")
    run = train(TrainConfig(cache=home / "refs", out=tmp_path / "run", max_steps=1, lora_rank=2, device="cpu"))
    adapter = json.loads((run / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(home / "org" / "tiny")


@pytest.mark.usefixtures("no_hub")
def test_adapters_are_evaluated_on_their_model_from_anywhere(
    home: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(home, feedback, "org/tiny")
    config = TrainConfig(cache=home / "refs", out=tmp_path / "run", model="org/tiny", max_steps=1, lora_rank=2)
    config = replace(config, device="cpu", eval_fraction=0.3)
    run = train(config)
    before = (run / "evaluation.json").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(replace(config, evaluate_only=run, out=None))
    metrics = [json.loads(text)["metrics"] for text in (before, (run / "evaluation.json").read_text())]
    assert metrics[0]["loss"]["value"] == pytest.approx(metrics[1]["loss"]["value"], abs=1e-6)


@pytest.mark.usefixtures("no_hub")
def test_a_model_that_was_moved_with_the_cache_is_found_beside_it(
    home: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = scored(home, feedback, "org/tiny")
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert found(tmp_path / "moved", manifest) == tmp_path / "moved" / "org" / "tiny"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"{home}/org/tiny \(given as org/tiny\): no such model folder.*--model"):
        found(tmp_path / "moved", manifest)


@pytest.mark.usefixtures("no_hub")
def test_a_cache_that_recorded_no_path_is_not_looked_for_on_the_hub(
    home: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(home, feedback, "org/tiny")
    path = home / "refs" / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("path", "adapter_path"):
        del content["reference"][name]
    content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))
    manifest = read_manifest(home / "refs")
    assert found(home, manifest) == home / "org" / "tiny"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="org/tiny: no such model folder; it was one when the cache was scored"):
        found(home, manifest)


def test_a_model_of_the_hub_is_not_taken_from_a_folder_of_its_name(
    home: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "0123abcd"
    shutil.copytree(home / "org" / "tiny", snapshot)
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, **options: Any) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    manifest = scored(tmp_path, feedback, "org/tiny")
    assert manifest.reference["path"] is None
    monkeypatch.chdir(home)
    assert found(tmp_path, manifest) == snapshot
    assert asked[-1] == ("org/tiny", "0123abcd")
    assert PolicyFiles.find(TrainConfig(cache=tmp_path / "refs", model="org/tiny"), manifest).folder == Path("org/tiny")


def test_an_adapter_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter").mkdir()
    reference = {"id": "m", "path": None, "adapter": "adapter", "adapter_path": str(tmp_path / "adapter")}
    assert find_reference(reference, "adapter") == (tmp_path / "adapter", None)
    (tmp_path / "adapter").rmdir()
    with pytest.raises(ModelError, match="no such adapter folder; it was one when the cache was scored"):
        find_reference(reference, "adapter")


def test_the_path_is_no_part_of_what_a_cache_is(home: Path, feedback: Path, base: Path) -> None:
    """The same model under two paths: nothing is scored again."""
    first = scored(home, feedback, "org/tiny")
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=home / "refs", limit=9)
    precompute(config)
    second = read_manifest(home / "refs")
    assert second.reference["path"] == str(base)
    assert first.identity == second.identity
    assert second.run["reused_sequences"] > 0
    precompute(replace(config, out=home / "again", model="org/tiny"))
    assert read_manifest(home / "again").fingerprint == second.fingerprint
