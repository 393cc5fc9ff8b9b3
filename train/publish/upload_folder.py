"""Collect what `--push-to-hub` uploads, in `hub/` of the run folder.

hub/                the saved model and tokenizer, as links to the run's own files
hub/README.md       the model card
hub/report.html     the report, made from the run's numbers alone

Feedback and its texts stay in the run folder, and so do config.yaml, run.json and checkpoints. Local paths are removed
from the configuration files of libraries, which may name the folder of the base model, and from the report.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from offline_kto.kto_core.durable_files import remove_tree
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.publish.base_model import CARD, BaseModel
from offline_kto.train.publish.local_paths import LocalPaths
from offline_kto.train.report.report import write_report
from offline_kto.train.run_files import CONFIG, EVALUATION, METRICS, REWARDS, RUN_RECORD, config_text

FOLDER, REPORT = "hub", "report.html"

# Python's serialization: it runs code when it is loaded.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CONFIGURATIONS = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")
_BASE, _NAMES = "base_model_name_or_path", ("_name_or_path", "name_or_path")


def collect(out: Path, saved: Iterable[str], config: TrainConfig, files: PolicyFiles, paths: LocalPaths) -> Path:
    """Collect the upload of a finished run, and return its folder.

    Args:
        out: the run folder.
        saved: names of the files of model and tokenizer in it.
        paths: the local paths that the upload must not show.
    """
    folder = out / FOLDER
    remove_tree(folder)
    for name in {*saved, CARD}:  # PEFT saves a card too, which ours replaced
        if not name.endswith(_PICKLES):
            _put(out / name, folder / name, BaseModel.of(files), paths)
    (folder / REPORT).write_text(_report_of_numbers(out, config, paths), encoding="utf-8")
    return folder


def _put(source: Path, target: Path, base: BaseModel, paths: LocalPaths) -> None:
    """Link a file, or write it without local paths."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name in _CONFIGURATIONS:
        before = json.loads(source.read_bytes())
        after = _without_paths(before, base, paths)
        if after != before:
            target.write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
            return
    try:
        target.hardlink_to(source)
    except OSError:  # not on every file system
        shutil.copyfile(source, target)


def _without_paths(settings: dict[str, Any], base: BaseModel, paths: LocalPaths) -> dict[str, Any]:
    changed = {name: paths.shorten(settings[name]) for name in _NAMES if isinstance(settings.get(name), str)}
    if settings.get(_BASE) is not None:
        changed[_BASE] = base.name
    return {**settings, **changed}


def _report_of_numbers(out: Path, config: TrainConfig, paths: LocalPaths) -> str:
    """Return a report on copies of the run's records: no file with texts is among them, and all paths are shortened."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / out.resolve().name
        run.mkdir()
        for name in (METRICS, REWARDS):
            if (out / name).exists():
                shutil.copyfile(out / name, run / name)
        for name in (RUN_RECORD, EVALUATION):
            if (out / name).exists():
                record = paths.shorten_all(json.loads((out / name).read_bytes()))
                (run / name).write_text(json.dumps(record), encoding="utf-8")
        options = paths.shorten_all(yaml.safe_load(config_text(config)))
        (run / CONFIG).write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
        page = write_report([run]).read_text(encoding="utf-8")
        return page.replace(f"{scratch}/", "")
