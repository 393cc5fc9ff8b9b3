"""Files of a run folder that others read, by their names; light to import."""

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

import yaml

from kto_core.durable import write_json
from kto_core.errors import ConfigError, said_by
from kto_core.options import as_plain
from train.config import TrainConfig

CONFIG, FACTS, METRICS = "config.yaml", "run.json", "metrics.jsonl"
EVALUATION, REWARDS = "evaluation.json", "rewards.parquet"


def make_folder(out: Path | None, parent: str) -> Path:
    """The folder of a new run or sweep: `out`, or one in `parent` that is named after the time.

    Raises:
        ConfigError: a file, a URL, or not writable.
    """
    if out is None:
        out = Path(parent) / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    if re.match(r"\w+:/", str(out)):
        raise ConfigError(
            f"--out {out}: what is trained is written to a local folder; copy it from there when it is done."
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file of that name exists; choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error}.") from error
    return out


def config_text(config: TrainConfig) -> str:
    """YAML that `kto-train --config` takes: everything that is set, but for what names a run itself."""
    names = {field.name for field in dataclasses.fields(config) if field.metadata["yaml"]}
    values = {k: v for k, v in as_plain(config).items() if k in names and v not in (None, {})}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def write_facts(out: Path, facts: dict[str, Any]) -> None:
    """Write run.json."""
    write_json(out / FACTS, facts)


def read_facts(out: Path) -> dict[str, Any]:
    """What run.json holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return dict(json.loads((out / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{out / FACTS}: cannot be read ({said_by(error)}), so that nobody knows what the run was started with. "
            "Start a new run."
        ) from error
