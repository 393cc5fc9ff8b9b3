"""README, --help, configs/*.yaml and the dataclasses say the same."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import click
import datasets
import pyarrow.parquet as pq
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from click.testing import CliRunner
from docs_tables import ROOT, TABLE_FIELDS, TABLES, kto_yaml, readme_with_tables

from offline_kto.kto_core.cache.shards import SCHEMA
from offline_kto.kto_core.feedback.labels import LABEL_WORDS
from offline_kto.kto_core.options import as_plain, flag, resolve
from offline_kto.precompute.cli import cache as kto_cache
from offline_kto.precompute.cli import precompute as kto_precompute
from offline_kto.train.cli import sweep as kto_sweep
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import LOSSES, TrainConfig
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS: dict[str, click.Command] = {"kto-precompute": kto_precompute, "kto-train": kto_train, "kto-sweep": kto_sweep}


def test_readme_tables_are_current() -> None:
    assert readme_with_tables(README) == README, "run: python tests/docs_tables.py"


def test_kto_yaml_is_current_and_resolves_to_the_defaults() -> None:
    path = ROOT / "configs/kto.yaml"
    assert path.read_text(encoding="utf-8") == kto_yaml(), "run: python tests/docs_tables.py"
    assert as_plain(resolve(TrainConfig, {}, yaml_path=path)) == as_plain(TrainConfig())


def test_the_sweep_of_configs_can_be_run() -> None:
    config = resolve(SweepConfig, {"cache": Path("refs")}, yaml_path=ROOT / "configs/sweep.yaml")
    assert Trials.of(config).warnings() == []


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if not p.name.startswith(("accelerate_", "sweep"))], ids=lambda p: p.name
)
def test_every_config_resolves(path: Path) -> None:
    assert resolve(TrainConfig, {}, yaml_path=path).loss == "kto"


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name.startswith("accelerate_")], ids=lambda p: p.name)
def test_every_accelerate_file_is_one(path: Path) -> None:
    """accelerate refuses keys that it does not know."""
    found = load_config_from_file(str(path))
    assert f"--config_file configs/{path.name} --no_python kto-train" in path.read_text(encoding="utf-8")
    assert str(found.distributed_type).split(".")[-1] in ("FSDP", "DEEPSPEED")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_with_its_default(command: str) -> None:
    text = CliRunner().invoke(COMMANDS[command], ["--help"], terminal_width=200).output
    options = re.split(r"\n  (?=--)", text)[1:]
    shown = {re.split(r"[ /]", option)[0]: " ".join(option.split()) for option in options}
    for field in dataclasses.fields(TABLES[command]):
        if field.name in TABLE_FIELDS:
            continue
        entry = shown[flag(field.name)]
        assert field.metadata["help"].split("[default")[0].split()[0] in entry
        if field.name in ("model", "data", "cache") and field.default in ("", Path("")):
            continue  # required
        assert "[default: " in entry, entry
        if isinstance(field.default, float):
            assert float(re.search(r"\[default: (.*?)\]", entry).group(1)) == field.default  # type: ignore[union-attr]
        elif isinstance(field.default, int | str) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in entry


def test_readme_names_every_command_label_and_column() -> None:
    for name in (
        *COMMANDS,
        "kto-report",
        *(f"`{loss}`" for loss in LOSSES),
        *(f"kto-cache {sub}" for sub in kto_cache.commands),
    ):
        assert name in README
    for word in LABEL_WORDS:
        assert f"`{word}`" in README, word
    for column in SCHEMA.names:
        assert f"`{column}`" in README, column


def test_readme_flags_exist() -> None:
    known = {flag(field.name) for config in TABLES.values() for field in dataclasses.fields(config)}
    known |= {field.metadata["off"] for config in TABLES.values() for field in dataclasses.fields(config)}
    known |= {"--config", "--help", "--rows", "--version"}
    own = re.sub(r"```.*?```", "", README, flags=re.S)
    for name in set(re.findall(r"`(--[a-z][a-z-]+)", own)):
        assert name in known, name


def test_every_way_to_read_a_cache_that_the_readme_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the lines stand there; DuckDB and polars where they are installed."""
    monkeypatch.chdir(cache.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = pq.read_table(next((cache / "train").iterdir())).column("row_id").to_pylist()
    lines = re.findall(r"^\w+\.\w+\(.*refs/.*\).*$", README, re.MULTILINE)
    assert [line.split(".")[0] for line in lines] == ["datasets", "pandas", "polars", "duckdb"]
    for line in lines:
        name = line.split(".")[0]
        if importlib.util.find_spec(name) is None:
            continue
        frame = eval(line, {name: importlib.import_module(name)})  # noqa: S307
        found = frame.fetchall() if name == "duckdb" else list(frame["row_id"])
        assert [row[0] if name == "duckdb" else row for row in found] == expected, line
