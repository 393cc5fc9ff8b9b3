"""Files of a run folder that others read, by their names; light to import."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from kto_core.errors import ConfigError, said_by
from kto_core.options import as_plain
from train.config import TrainConfig

CONFIG, FACTS, METRICS = "config.yaml", "run.json", "metrics.jsonl"
EVALUATION, REWARDS = "evaluation.json", "rewards.parquet"


def config_text(config: TrainConfig) -> str:
    """YAML that `kto-train --config` takes: everything that is set, but for what names a run itself."""
    names = {field.name for field in dataclasses.fields(config) if field.metadata["yaml"]}
    values = {k: v for k, v in as_plain(config).items() if k in names and v not in (None, {})}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def read_facts(out: Path) -> dict[str, Any]:
    """What run.json holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return dict(json.loads((out / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{out / FACTS}: cannot be read ({said_by(error)}), so that nobody knows what the run was started with. "
            "Start a new run."
        ) from error
