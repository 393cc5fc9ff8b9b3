"""Render the tables of docs/options.md, feedback.md and gpu.md, and configs/kto.yaml. `python tests/docs_tables.py` rewrites them."""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from format_tables import formats_table, functions_table
from memory_tables import recipes_table

from offline_kto.kto_core.options import as_plain, flag
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.train.config import TrainConfig
from offline_kto.train.sweep.config import SweepConfig

ROOT = Path(__file__).resolve().parent.parent
OPTIONS_PAGE = ROOT / "docs/options.md"
FEEDBACK_PAGE = ROOT / "docs/feedback.md"
GPU_PAGE = ROOT / "docs/gpu.md"
TABLES: dict[str, type] = {"kto-precompute": PrecomputeConfig, "kto-train": TrainConfig, "kto-sweep": SweepConfig}

TABLE_FIELDS = ("training", "space", "train")  # in YAML alone


def default_text(field: "dataclasses.Field[Any]") -> str:
    """Return a default as docs/options.md shows it."""
    stated = re.search(r"\[default: (.*?)\]", field.metadata["help"])
    if stated:
        return stated.group(1)
    if field.default in ("", Path("")):
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def options_table(config: type) -> str:
    """Return a Markdown table of a command's options."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        if field.name in TABLE_FIELDS:
            continue
        text = re.sub(r"\s*\[default: .*?\]", "", field.metadata["help"]).strip()
        if field.metadata["choices"]:
            text += " One of " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"]) + "."
        name = f"`{flag(field.name)}`"
        if field.metadata["off"]:
            name = f"`{flag(field.name)}`, `{field.metadata['off']}`"
        lines.append(f"| {name} | {default_text(field)} | {text.replace('|', '/')} |")
    return "\n".join(lines)


def kto_yaml() -> str:
    """Return configs/kto.yaml: every option that a YAML file may set, at its default."""
    lines = [
        "# Every option of kto-train at its default. Copy, keep what you change:",
        "#     kto-train --cache refs/ --config my.yaml",
        "# The command line wins over this file, this file over the defaults.",
        "",
    ]
    values = as_plain(TrainConfig())
    for field in dataclasses.fields(TrainConfig):
        if not field.metadata["yaml"] or field.name in ("cache", "training"):
            continue
        text = field.metadata["help"]
        if field.metadata["choices"]:
            text += " One of " + ", ".join(field.metadata["choices"]) + "."
        lines += textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")
        value = values[field.name]
        entry = yaml.safe_dump({field.name: value}, default_flow_style=False).strip()
        lines += [f"# {field.name}:" if value is None else entry, ""]
    lines += [
        "# Passed to transformers.TrainingArguments as it is: optimizers, loggers, FSDP, hub uploads, ...",
        "# training:",
        "#   optim: adamw_torch",
        "#   save_total_limit: 2",
        "",
    ]
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """Return the text of docs/options.md with its tables replaced by current ones."""
    for command, config in TABLES.items():
        page = _with_table(page, f"options of {command}", options_table(config))
    return page


def with_formats(page: str) -> str:
    """Return the text of docs/feedback.md with its tables of formats and functions replaced by current ones."""
    page = _with_table(page, "functions of paths", functions_table())
    return _with_table(page, "recognised formats", formats_table())


def with_recipes(page: str) -> str:
    """Return the text of docs/gpu.md with its table of recipes replaced by a current one."""
    return _with_table(page, "memory by recipe", recipes_table())


def _with_table(page: str, name: str, table: str) -> str:
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _: f"{start}\n{table}\n{end}", page, flags=re.S)


if __name__ == "__main__":
    OPTIONS_PAGE.write_text(with_tables(OPTIONS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    FEEDBACK_PAGE.write_text(with_formats(FEEDBACK_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    GPU_PAGE.write_text(with_recipes(GPU_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "configs/kto.yaml").write_text(kto_yaml(), encoding="utf-8")
