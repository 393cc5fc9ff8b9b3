"""README, docs, --help, configs/*.yaml and the dataclasses say the same."""

import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import click
import datasets
import pyarrow.parquet as pq
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from click.testing import CliRunner
from doc_pages import PAGES
from docs_tables import (
    FEEDBACK_PAGE,
    GPU_PAGE,
    OPTIONS_PAGE,
    ROOT,
    TABLE_FIELDS,
    TABLES,
    kto_yaml,
    with_formats,
    with_recipes,
    with_tables,
)

from offline_kto.kto_core.cache.row_schema import SCHEMA
from offline_kto.kto_core.feedback import paths
from offline_kto.kto_core.feedback.labels import LABEL_WORDS
from offline_kto.kto_core.options import as_plain, flag, resolve
from offline_kto.precompute.cli import cache as kto_cache
from offline_kto.precompute.cli import precompute as kto_precompute
from offline_kto.train.cli import sweep as kto_sweep
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import TrainConfig
from offline_kto.train.loss_traits import LOSSES
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Trials

README, CACHE_FORMAT = PAGES["README.md"], PAGES["docs/cache-format.md"]
COMMANDS: dict[str, click.Command] = {"kto-precompute": kto_precompute, "kto-train": kto_train, "kto-sweep": kto_sweep}


def test_option_tables_are_current() -> None:
    page = OPTIONS_PAGE.read_text(encoding="utf-8")
    assert all(f"| `{flag(field.name)}`" in page for c in TABLES.values() for field in table_fields(c))
    assert with_tables(page) == page, "run: python tests/docs_tables.py"


def test_the_tables_of_formats_and_functions_are_current() -> None:
    page = FEEDBACK_PAGE.read_text(encoding="utf-8")
    functions = [name.removeprefix("_func_") for name in vars(paths._Functions) if name.startswith("_func_")]
    assert [name for name in functions if f"| `{name}(" not in page] == []
    assert all(f"| `{path.stem}`" in page for path in (ROOT / "configs/formats").glob("*.yaml"))
    assert with_formats(page) == page, "run: python tests/docs_tables.py"


def test_the_table_of_recipes_is_current() -> None:
    page = GPU_PAGE.read_text(encoding="utf-8")
    assert "<!-- memory by recipe -->\n| model | recipe |" in page
    assert with_recipes(page) == page, "run: python tests/docs_tables.py"


def table_fields(config: type) -> list["dataclasses.Field[Any]"]:
    return [field for field in dataclasses.fields(config) if field.name not in TABLE_FIELDS]


def test_kto_yaml_is_current_and_resolves_to_the_defaults() -> None:
    path = ROOT / "configs/kto.yaml"
    assert path.read_text(encoding="utf-8") == kto_yaml(), "run: python tests/docs_tables.py"
    assert as_plain(resolve(TrainConfig, {}, yaml_path=path)) == as_plain(TrainConfig())


def test_the_sweep_of_configs_can_be_run() -> None:
    config = resolve(SweepConfig, {"cache": Path("refs")}, yaml_path=ROOT / "configs/sweep.yaml")
    assert Trials.of(config).warnings() == []


PACKAGES = sorted({path.parent for name in ("kto_core", "precompute", "train") for path in (ROOT / name).rglob("*.py")})
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
    for field in table_fields(TABLES[command]):
        entry = shown[flag(field.name)]
        assert field.metadata["help"].split("[default")[0].split()[0] in entry
        if field.name in ("model", "data", "cache") and field.default in ("", Path("")):
            continue  # required
        assert "[default: " in entry, entry
        if isinstance(field.default, float):
            assert float(re.search(r"\[default: (.*?)\]", entry).group(1)) == field.default  # type: ignore[union-attr]
        elif isinstance(field.default, int | str) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in entry


def test_pages_name_every_command_loss_label_and_column() -> None:
    for name in (*COMMANDS, "kto-cache", "kto-report"):
        assert f"`{name}" in README, name
    for loss in LOSSES:
        assert f"`{loss}`" in PAGES["docs/losses.md"], loss
    for word in LABEL_WORDS:
        assert f"`{word}`" in PAGES["docs/feedback.md"], word
    for name in (*(f"kto-cache {sub}" for sub in kto_cache.commands), *(f"`{column}`" for column in SCHEMA.names)):
        assert name in CACHE_FORMAT, name


def test_every_field_of_a_manifest_is_on_its_page(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    names = [f"{name}.{field}" for name, section in manifest.items() if isinstance(section, dict) for field in section]
    names += [name for name, entry in manifest.items() if not isinstance(entry, dict)]
    names += [*manifest["shards"][0], *manifest["data"]["files"][0]]
    assert {"fingerprint", "reference.weights_hash", "sha256"} <= set(names)
    assert [name for name in names if f"`{name}`" not in CACHE_FORMAT] == []


def modules_missing_in(page: str, package: Path) -> list[str]:
    """Modules of a package that no row of this package names: `train/data/`, or `train/*.py` for the top folder."""
    name = package.relative_to(ROOT).as_posix()
    rows = re.findall(rf"^\| `{name}/(?:\*\.py)?` \|(.*)$", page, re.M)
    modules = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    return [f"{name}/{module}" for module in modules if not any(f"`{module}`" in row for row in rows)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_architecture_page_names_every_module(package: Path) -> None:
    assert modules_missing_in(PAGES["docs/architecture.md"], package) == []


def test_a_module_that_the_architecture_page_lacks_is_found() -> None:
    page = PAGES["docs/architecture.md"].replace("`cache_rows`", "")
    assert modules_missing_in(page, ROOT / "train/data") == ["train/data/cache_rows"]


def test_readme_is_one_that_is_read_to_the_end() -> None:
    assert len(README.splitlines()) <= 175
    beginning = "\n".join(README.splitlines()[:25])
    assert "Several GPUs and vLLM on a GPU are untried." in beginning


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_a_page_exist(page: str) -> None:
    known = {flag(field.name) for config in TABLES.values() for field in dataclasses.fields(config)}
    known |= {field.metadata["off"] for config in TABLES.values() for field in dataclasses.fields(config)}
    known |= {"--config", "--help", "--version"}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    own = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    for name in set(re.findall(r"`(--[a-z][a-z-]+)", own)):
        assert name in known, name


@pytest.mark.parametrize("page", PAGES)
def test_files_of_a_page_exist(page: str) -> None:
    """Tests, scripts, configs and packages that are named; mkdocs checks links within docs/, this those from outside of it."""
    text = PAGES[page]
    named = {f"tests/{name}" for name in re.findall(r"`((?:test_\w+|fuzz_by_hand)\.py)`", text)}
    named |= set(re.findall(r"\b(?:tests|benchmarks|configs)/\w+\.(?:py|yaml)", text))
    named |= set(re.findall(r"\b(?:kto_core|precompute|train)/(?:[a-z]+\b)?(?!\.)", text))
    if not page.startswith("docs/"):
        named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_messages_that_are_quoted_are_those_of_the_code() -> None:
    packages = ("kto_core", "precompute", "train", "offline_kto", "examples")
    files = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    files += (ROOT / "benchmarks").glob("*.py")  # not below: TRL's environment may be there
    code = " ".join(path.read_text(encoding="utf-8") for path in files)
    quoted = re.findall(r"^> (.*)$", PAGES["docs/troubleshooting.md"], re.M)
    assert quoted
    for part in (part.strip(" ,") for line in quoted for part in line.split("...")):
        assert part in code, part


def test_every_way_to_read_a_cache_that_its_page_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the lines as they are on the page; DuckDB and polars only where they are installed."""
    monkeypatch.chdir(cache.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = pq.read_table(next((cache / "train").iterdir())).column("row_id").to_pylist()
    lines = re.findall(r"^\w+\.\w+\(.*refs/.*\).*$", CACHE_FORMAT, re.MULTILINE)
    assert [line.split(".")[0] for line in lines] == ["datasets", "pandas", "polars", "duckdb"]
    for line in lines:
        name = line.split(".")[0]
        if importlib.util.find_spec(name) is None:
            continue
        frame = eval(line, {name: importlib.import_module(name)})  # noqa: S307
        found = frame.fetchall() if name == "duckdb" else list(frame["row_id"])
        assert [row[0] if name == "duckdb" else row for row in found] == expected, line
