"""The rules of the layout: who may import whom, and what a command may load before it works."""

import ast
import functools
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("kto_core", "precompute", "train") for path in (ROOT / package).rglob("*.py"))
SCRIPTS = ("kto-precompute", "kto-train", "kto-cache", "kto-sweep", "kto-report")

# Rooms from the ground up: a module imports from its own room and from those in lines above its own. Modules that stand
# directly in a package are rooms of their own.
LAYERS = """
kto_core.redaction kto_core.interrupts kto_core.library_types kto_core.out_of_memory kto_core.judgements kto_core.typed_json
kto_core.errors
kto_core.console
kto_core.foreign_files kto_core.parquet_footers kto_core.locations kto_core.streams kto_core.launch kto_core.hashing kto_core.durable_files
kto_core.runtime kto_core.cores kto_core.yaml_files kto_core.progress kto_core.lock kto_core.equal_ids
kto_core.config_paths
kto_core.options
kto_core.feedback kto_core.scoring kto_core.losses kto_core.cache
kto_core.models
train.loss_traits
precompute.config train.config train.run_records
precompute.records precompute.parts train.run_files train.samples_file train.suspects_file
precompute.engines precompute.out_folder precompute.preview train.data train.model train.diagnostics
precompute.feedback precompute.spool_folder
precompute.spool
precompute.reading
precompute.part_files
precompute.part_workers
precompute.parallel_reading
precompute.plan precompute.score_files train.trainer train.report
precompute.shard_tables
precompute.store precompute.workers precompute.plan_ahead
precompute.needs
precompute.plan_files
precompute.worker
precompute.leader precompute.local_workers precompute.ray_workers
precompute.scoring precompute.judgement_page precompute.estimates train.publish
precompute.plan_page train.run
precompute.pipeline precompute.planned_part precompute.inspect_cache train.sweep
precompute.run
precompute.cli train.cli
"""

# Files that may import a library, where not all may.
ONLY_IN = {
    "click": {"precompute/cli.py", "train/cli.py"},
    "ray": {"precompute/ray_workers.py"},
    "vllm": {"precompute/engines/vllm_scorer.py"},
    "peft": {"train/model/lora.py"},
    "nltk": {"precompute/feedback/agreement.py"},
    "optuna": {"train/sweep/storage.py", "train/sweep/study.py"},
    "liger_kernel": {"train/trainer/liger_layers.py"},
    "triton": {"kto_core/scoring/head_tiles_triton.py"},
}
NOT_IN = {
    "kto_core": {"transformers", "vllm", "accelerate", "datasets", "peft", "click"},
    "precompute": {"peft"},
    "train": {"vllm"},
}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Every module a file imports, those inside functions, `importlib` and `__import__` included."""
    return tuple(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def libraries_of(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports_of(path)}


def room_of(module: str) -> str:
    """`kto_core.feedback.labels` lies in `kto_core.feedback`, `kto_core.errors` in itself."""
    return ".".join(module.split(".")[:2])


def test_every_room_stands_in_the_table_once() -> None:
    rooms = {
        room_of(name_of(path).removesuffix(".py").replace("/", ".")) for path in FILES if path.name != "__init__.py"
    }
    assert sorted(LAYERS.split()) == sorted(rooms)


def test_imports_point_to_layers_below() -> None:
    level = {room: number for number, line in enumerate(LAYERS.strip().splitlines()) for room in line.split()}
    found = []
    for path in FILES:
        room = room_of(name_of(path).removesuffix(".py").replace("/", "."))
        for module in imports_of(path):
            other = room_of(module.removeprefix("offline_kto."))
            below = other == room or level.get(other, len(level)) < level.get(room, -1)
            # The two stages meet only in files on the disk.
            stages = {room.split(".")[0], other.split(".")[0]} == {"precompute", "train"}
            if module.startswith("offline_kto.") and (not below or stages):
                found.append(f"{name_of(path)} imports {module}")
            elif module.startswith((".", "kto_core", "precompute", "train")):
                found.append(f"{name_of(path)} imports {module}: everything is imported as offline_kto.…")
    assert found == []


def test_no_two_modules_import_each_other() -> None:
    graph = {
        "offline_kto." + name_of(path).removesuffix(".py").replace("/", "."): set(imports_of(path)) for path in FILES
    }
    circles = [f"{one} <-> {other}" for one, others in graph.items() for other in others if one in graph.get(other, ())]
    assert circles == []


def test_libraries_stay_in_their_files() -> None:
    found = [
        f"{name_of(path)} imports {library}"
        for path in FILES
        for library in libraries_of(path)
        if name_of(path) not in ONLY_IN.get(library, {name_of(path)})
        or library in NOT_IN[path.relative_to(ROOT).parts[0]]
    ]
    assert found == []


def test_nothing_is_pickled() -> None:
    """A pickle runs whatever code its author put in."""
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
        bad = libraries_of(path) & PICKLES | calls & {"torch.load", "torch.save", "np.save", "eval", "exec"}
        found += [f"{name_of(path)}: {one}" for one in sorted(bad)]
        found += [f"{name_of(path)}: allow_pickle"] * ("allow_pickle=True" in text)
    assert found == []


def test_there_are_no_drawers_for_everything() -> None:
    stems = {path.stem for path in FILES}
    assert stems & {"utils", "util", "common", "helpers", "misc", "base", "registry"} == set()


def test_the_rules_see_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "def f():\n    import vllm.engine\n    import_module('peft')\n    from a.b import c\n    from . import d\n"
    )
    assert set(imports_of(path)) == {"vllm.engine", "peft", "a.b", "."}


HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "vllm", "pyarrow", "numpy", "pandas")


@pytest.mark.parametrize("module", ["offline_kto", "offline_kto.precompute.cli", "offline_kto.train.cli"])
def test_a_command_line_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_before_anything_heavy_is_loaded(script: str) -> None:
    """Check the imports that make it fast on any machine; seconds would measure the machine."""
    path = Path(sysconfig.get_path("scripts")) / script
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", path, "--help"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("Usage: ")
    loaded = {line.rsplit("|", 1)[1].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in loaded
    assert loaded & set(HEAVY) == set()


@pytest.mark.slow
def test_importing_has_no_effect() -> None:
    """No output, no environment, no random draw, no thread: modules define things, commands do them."""
    modules = [
        "offline_kto." + name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES
    ]
    program = (
        "import importlib, os, random, sys, threading\n"
        "import torch, transformers, datasets, accelerate, pyarrow.parquet, tqdm\n"
        "def state():\n"
        "    return dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), threading.active_count()\n"
        "before = state()\n"
        f"for name in {[name for name in modules if not name.endswith(('vllm_scorer', '_triton'))]!r}:\n"
        "    importlib.import_module(name)\n"
        "assert state() == before\n"
    )
    ran = forks.run(forks.AS_IF_FRESH + program)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
